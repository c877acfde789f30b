"""Results of a command: in input order, flushed when ready, resumable, complete or not there."""

import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lmcli import ownership
from lmcli.errors import ClosedPipe, UsageError, UserError
from lmcli.storage import user_errors
from lmcli.terminal import progress
from lmcli.text.characters import DIM, PLAIN, shows_color, visible, without_surrogates

# for text that must stay on one line of a TSV or of piped output
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def escaped(text: str) -> str:
    """The text with backslash, newline, CR and tab written as \\\\, \\n, \\r and \\t."""
    return text.translate(ESCAPES)


def json_line(fields: Mapping[str, Any]) -> str:
    """One line of JSON, non-ASCII characters as they are.

    Raises UserError, naming the field, for NaN and infinity: no JSON may hold them.
    """
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        for name, value in fields.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                raise UserError(
                    "holds NaN or infinity, which JSON cannot write", where=f"field {name!r}"
                ) from error
        raise


class OutputFile:
    """Writes results to standard output or to a file, which appears under its name at the end.

    An interrupted file stays as FILE.part; with `resume` its complete lines are kept and counted in
    `resumed_lines`. On a terminal control characters are drawn; `styled` texts have done so and
    have colors. With `draw` a terminal gets what that makes of the texts between two flushes.
    Raises ClosedPipe when the reader is gone, UserError when writing fails.
    """

    def __init__(
        self,
        path: str | None = None,
        resume: bool = False,
        styled: bool = False,
        draw: Callable[[str], str] | None = None,
    ):
        self.path = Path(path) if path and path != "-" else None
        self._terminal = self.path is None and sys.stdout.isatty()
        self._drawn = self._terminal and not styled
        self._draw, self._pending = draw if self._terminal else None, list[str]()
        self.resumed_lines = 0
        self.header = ""  # written with the first result: a command that fails before has none
        if self.path is None:
            if resume:
                raise UsageError("--continue needs -o FILE")
            kind = progress.TerminalFile if self._terminal else io.FileIO
            raw = kind(sys.stdout.fileno(), "wb", closefd=False)
            self.file: BinaryIO = io.BufferedWriter(raw, 1 << 16)  # type: ignore[assignment]
            return
        if self.path.is_dir():
            raise UserError("is a directory", where=str(path), hint="-o takes a file")
        unfinished = _part(self.path)
        with user_errors(str(path), "write"):
            self.file = self._open(unfinished, resume)

    def _open(self, part: Path, resume: bool) -> BinaryIO:
        if part == self.path:  # a device or a pipe
            return open(part, "wb")
        if resume and part.is_file() and not part.is_symlink():
            file = ownership.open_to_extend(part)
            self.resumed_lines = _cut_to_whole_lines(file)
            return file
        part.unlink(missing_ok=True)  # also a link: nothing is written through one
        return ownership.create(part, 0o666)

    @property
    def draws(self) -> bool:
        """True if the texts are drawn for a terminal."""
        return self._draw is not None

    def write(self, text: str, dim: bool = False) -> None:
        """Appends text as UTF-8; on a terminal `dim` text has less contrast."""
        if self.header:
            header, self.header = self.header, ""
            self.write(header)
        if self._drawn or (dim and self._terminal):
            text = visible(text)
        if dim and text and self._terminal and shows_color(sys.stdout):
            text = f"{DIM}{text}{PLAIN}"
        if self._draw:
            self._pending.append(text)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # the name of a file, or a text from Python
            data = without_surrogates(text).encode("utf-8")
        with user_errors(self.path or "standard output", "write"):
            self.file.write(data)

    def _draw_pending(self) -> None:
        if self._draw and self._pending:
            text, self._pending = self._draw("".join(self._pending)), []
            self._write(text)

    def flush(self) -> None:
        """Makes everything written so far visible to the reader."""
        self.write("")
        self._draw_pending()
        with user_errors(self.path or "standard output", "write"):
            self.file.flush()

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.flush()
            if self.path:
                with user_errors(self.path, "write"):
                    self.file.close()
                    if (unfinished := _part(self.path)) != self.path:
                        os.replace(unfinished, self.path)
            return
        try:
            self._draw_pending()
            self.file.close()
        except (OSError, UserError, ClosedPipe):
            pass  # the error that ended the block is the one to report


def _part(path: Path) -> Path:
    """Where a file is written until it is complete; a device or pipe itself."""
    return path if path.exists() and not path.is_file() else path.with_name(path.name + ".part")


def _cut_to_whole_lines(file: BinaryIO) -> int:
    """Drops an incomplete last line of a file, which continues there; returns the other lines."""
    count = whole = position = 0
    while chunk := file.read(1 << 20):
        count += chunk.count(b"\n")
        if (newline := chunk.rfind(b"\n")) >= 0:
            whole = position + newline + 1
        position += len(chunk)
    file.seek(whole)
    file.truncate()
    return count
