"""What results look like in a notebook: tables, painted text, a line of progress."""

from __future__ import annotations

import base64
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape
from typing import Any, TypeVar

from lmcli.errors import UserError
from lmcli.terminal import progress
from lmcli.terminal.painted_text import Segment, segments_html
from lmcli.terminal.progress_line import SECONDS_BEFORE, SECONDS_BETWEEN, line_text
from lmcli.text.characters import visible

Item = TypeVar("Item")
ROWS_SHOWN, ITEMS_SHOWN = 50, 5
LINE_COLUMNS = 100


class NotebookTable:
    """Something with `rows()`, a list of dicts, that a notebook draws as a table."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return html_table(self.rows())


class Table(list[Item]):
    """A list of dicts that a notebook draws as a table."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table."""
        return self  # type: ignore[return-value]

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame. Raises UserError without pandas."""
        return data_frame(self.rows())

    def __repr__(self) -> str:
        shown = [repr(item) for item in self[:ITEMS_SHOWN]]
        more = [f"… {len(self) - ITEMS_SHOWN:,} more"] if len(self) > ITEMS_SHOWN else []
        return f"[{', '.join(shown + more)}]"

    def _repr_html_(self) -> str:
        return html_table(self.rows())


class Results(Table[Item]):
    """What a model returned, in input order; `inputs` has the text that each result is for."""

    def __init__(self, results: Iterable[Item], inputs: Sequence[Any]):
        super().__init__(results)
        self.inputs = list(inputs)

    def rows(self) -> list[dict[str, Any]]:
        """The `rows()` of all results; `record` is the number of the input, from 1."""
        return [
            {"record": i + 1, **_input_fields(text), **row}
            for i, (text, result) in enumerate(zip(self.inputs, self))
            for row in result.rows()  # type: ignore[attr-defined]
        ]

    def _repr_html_(self) -> str:
        blocks = [
            result.painted(getattr(text, "text", text))
            for result, text in zip(self[:ROWS_SHOWN], self.inputs)
            if hasattr(result, "painted")
        ]
        if not any(blocks):
            return super()._repr_html_()
        more = len(self) - ROWS_SHOWN
        return "".join(blocks) + (f"<p>… {more:,} more</p>" if more > 0 else "")


def _input_fields(text: Any) -> dict[str, Any]:
    """The input of a result as columns: a text, a pair of texts, or texts with names."""
    if isinstance(text, str):
        return {"input": text}
    if isinstance(text, dict):
        return text
    names = getattr(text, "_fields", None) or [f"input_{k + 1}" for k in range(len(text))]
    return {name: value for name, value in zip(names, text) if value}


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a pandas.DataFrame. Raises UserError without pandas."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise UserError("to_pandas needs pandas", hint="pip install pandas") from error
    return pandas.DataFrame(list(rows))


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of HTML, of at most ROWS_SHOWN rows; numbers have four significant digits."""
    names = list(dict.fromkeys(name for row in rows[:ROWS_SHOWN] for name in row))
    head = "".join(f'<th style="text-align: left">{_text(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name)) for name in names) + "</tr>"
        for row in rows[:ROWS_SHOWN]
    )
    more = len(rows) - ROWS_SHOWN
    note = f"<p>… {more:,} more rows</p>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None:
        text = "–"
    elif isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    else:
        text = f"{value:,}" if number else _text(value)
    style = "text-align: right" if number else "text-align: left; white-space: pre-wrap"
    return f'<td style="{style}">{text}</td>'


def html_picture(svg: bytes) -> str:
    """An SVG as a picture of HTML: no script in it runs."""
    data = base64.b64encode(svg).decode("ascii")
    return f'<img alt="" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">'


def _text(value: Any) -> str:
    return escape(visible(str(value)))


def painted_html(parts: Iterable[Segment]) -> str:
    """A text of HTML whose segments have backgrounds by their bits of surprisal."""
    style = "white-space: pre-wrap; line-height: 1.6"
    return f'<div dir="auto" style="{style}">{segments_html(parts)}</div>'


def progress_shown() -> AbstractContextManager[None]:
    """Shows the stages inside below the cell of a notebook; does nothing elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not hasattr(shell, "kernel") or progress.is_watched():
        return nullcontext()
    return _watched(NotebookProgress())


@contextmanager
def _watched(watcher: NotebookProgress) -> Iterator[None]:
    progress.watch(watcher)
    try:
        yield
    finally:
        progress.watch(None)
        watcher.draw("")


class NotebookProgress:
    """A line that the work itself draws as it goes on, and that is empty at the end."""

    def __init__(self) -> None:
        self._drawn_at, self._handle = 0.0, None

    def told(self) -> None:
        """Draws the line, if it is time to."""
        now, shown = time.monotonic(), progress.shown()
        begun = shown.stage.begun
        due = begun is not None and now - begun >= SECONDS_BEFORE
        if begun is not None and due and now - self._drawn_at >= SECONDS_BETWEEN:
            self._drawn_at = now
            self.draw(line_text(shown, now - begun, LINE_COLUMNS))

    def hidden(self, text: bytes) -> AbstractContextManager[None]:
        """Nothing: what is printed has its own place."""
        return nullcontext()

    def draw(self, text: str) -> None:
        """Replaces the line; "" only if there is one."""
        html = f'<code style="white-space: pre">{escape(text)}</code>' if text else ""
        data = {"text/plain": text, "text/html": html}
        if self._handle is not None:
            self._handle.update(data, raw=True)
        elif text:
            display = importlib.import_module("IPython.display").display
            self._handle = display(data, raw=True, display_id=True)
