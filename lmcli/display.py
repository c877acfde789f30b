"""Terminal output: live progress, tables and Markdown on a terminal, plain lines elsewhere.

rich is loaded when it draws something: it takes as long as a short text takes to write.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcli.data.output_file import json_line
from lmcli.terminal.tables import table
from lmcli.terminal.wrapping import message_for
from lmcli.text.characters import for_stream, visible, without_surrogates

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from lmcli.training.loop import Due, Validation
    from lmcli.training.train_step import Note, Step

SECONDS_BETWEEN_LINES = 10.0
MARKDOWN_COLUMNS = 100


def note(text: str) -> None:
    """Prints a message on standard error: what was chosen, skipped or changed."""
    print(message_for(sys.stderr, f"lm: {text}"), file=sys.stderr, flush=True)


def clock(seconds: float | None) -> str:
    """Seconds as "1:05" or "2:03:04"; "–" for None."""
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def markdown(text: str) -> str:
    """Markdown rendered for this terminal, at most MARKDOWN_COLUMNS wide."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=min(MARKDOWN_COLUMNS, Console().width))
    with console.capture() as captured:
        console.print(Markdown(text, code_theme="ansi_dark"))
    return captured.get()


def print_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    readable: Callable[[Mapping[str, Any]], dict[str, str]] | None = None,
) -> None:
    """Prints rows of figures on standard output.

    JSON Lines (all keys) and TSV (`columns`) are printed as the rows come. A terminal gets a table
    at the end, with the cells that `readable` returns for a row.
    """
    if as_json:
        for row in rows:
            line = json_line(without_surrogates(row))
            print(for_stream(line, sys.stdout), end="", flush=True)
    elif sys.stdout.isatty():
        lines = [
            readable(row) if readable else {key: _cell(row[key]) for key in columns} for row in rows
        ]
        print(table(list(lines[0]), [list(line.values()) for line in lines]), end="")
    else:
        for number, row in enumerate(rows):
            if not number:
                print("\t".join(columns))
            print("\t".join(_cell(row[key]) for key in columns), flush=True)


def _cell(value: Any) -> str:
    """A TSV cell: floats with six significant digits, NA for None."""
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _moving_average(average: float | None, value: float, weight: float) -> float:
    """The exponential moving average after one more value, which has this weight."""
    return value if average is None else (1 - weight) * average + weight * value


class TrainingView:
    """Progress of a run: a live panel on a terminal, elsewhere a line every ten seconds.

    Prints nothing with `quiet`. `target` is the unit of a loss, as in nats per token;
    `bytes_per_token`, unless 0, converts it to bits per byte.
    """

    def __init__(self, quiet: bool, bytes_per_token: float = 0.0, target: str = "token"):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.quiet, self.bytes_per_token, self.target = quiet, bytes_per_token, target
        self.live: Live | None = None
        self.last: Step | None = None
        self.loss: float | None = None
        self.speed: float | None = None
        self.figures = self.sample_text = self.status = ""
        self._printed = time.monotonic()

    def __enter__(self) -> TrainingView:
        if self.console.is_terminal and not self.quiet:
            from rich.live import Live

            self.live = Live(console=self.console, refresh_per_second=8, transient=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, kind: str, event: Any) -> None:
        """Shows an event of a run; `kind` is step, evaluation, validation, sample or note."""
        views: dict[str, Callable[[Any], None]] = {
            "step": self.step,
            "evaluation": self.evaluation,
            "validation": self.validation,
            "sample": self.sample,
            "note": self.note,
        }
        views[kind](event)

    def step(self, step: Step) -> None:
        """Shows a training step: loss (average over about 20 steps) and speed (about 10)."""
        self.loss = _moving_average(self.loss, step.loss, 0.05)
        self.speed = _moving_average(self.speed, step.tokens_per_second, 0.1)
        self.last = step
        if self.live:
            self._draw()
        elif self._line_is_due():
            self._print(self._line(step))

    def _draw(self) -> None:
        if self.live:
            from rich.text import Text

            self.live.update(self._panel(self.last) if self.last else Text(self.status))

    def _line(self, step: Step) -> str:
        return (
            f"step {step.step:,} · {step.share:.0%} · epoch {step.epoch:.2f} · loss {self._loss()} "
            f"· {self.speed:,.0f} tokens/s · {clock(step.remaining)} left"
        )

    def _loss(self, style: str = "", end: str = "") -> str:
        loss = self.loss or 0.0
        nats = f"{style}{loss:.3f}{end} nats/{self.target}"
        if not self.bytes_per_token:
            return nats
        return f"{nats} = {style}{loss / math.log(2) / self.bytes_per_token:.3f}{end} bits/byte"

    def _panel(self, step: Step) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = Table.grid(padding=(0, 1))
        progress.add_row(
            ProgressBar(total=1.0, completed=step.share, width=30),
            f"{step.share:.0%}",
            f"[bold]{clock(step.remaining)}[/bold] left",
            f"step {step.step:,}",
            f"epoch {step.epoch:.2f}",
        )
        panel = Table.grid(padding=(0, 1))
        panel.add_row(progress)
        panel.add_row(
            f"training   loss {self._loss('[bold]', '[/bold]')} · {self.speed:,.0f} tokens/s "
            f"· rate {step.learning_rate:.2g}"
        )
        if self.status:
            panel.add_row(Text(self.status))
        if self.figures:
            panel.add_row(Text(visible(self.figures)))
        if self.sample_text:
            text = visible(self.sample_text, keep="")
            panel.add_row(Text(text, style="italic dim", overflow="fold"))
        return panel

    def evaluation(self, event: Due) -> None:
        """Shows that the model is evaluated; as a line, if there was none for a while."""
        self.status = f"evaluating after step {event.step:,} …"
        if self.live:
            self._draw()
        elif self._line_is_due():
            self._print(self.status)

    def _line_is_due(self) -> bool:
        """True every SECONDS_BETWEEN_LINES, where lines are printed."""
        if self.quiet or time.monotonic() - self._printed < SECONDS_BETWEEN_LINES:
            return False
        self._printed = time.monotonic()
        return True

    def validation(self, event: Validation) -> None:
        """Shows the figures of an evaluation."""
        self.status = ""
        when = f"step {event.step:,}" if event.step else "before the first step"
        best = ", best" if event.best else ""
        self.figures = f"validation {event.figures.headline()} ({when}{best})"
        self._draw()
        self._print(self.figures)

    def sample(self, text: str) -> None:
        """Shows a sample text, on one line outside a terminal."""
        self.sample_text = " ".join(text.split())
        self._draw()
        self._print(f"sample     {self.sample_text}")

    def _print(self, line: str) -> None:
        if not self.live and not self.quiet:
            print(for_stream(line, sys.stderr), file=sys.stderr, flush=True)

    def note(self, event: Note) -> None:
        """Shows one line that stays: what the run has changed by itself."""
        if self.live:
            from rich.text import Text

            self.console.print(Text(f"lm: {visible(event.text)}"))
        elif not self.quiet:
            note(event.text)
