"""Records: one line (or one JSON Lines or TSV row) in, one result out, in order; and the writer of those results."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lmcli.errors import UsageError, UserError
from lmcli.storage import user_errors
from lmcli.text.fields import row_text
from lmcli.text.opening import PACKED, open_bytes

CHUNK_BYTES = 1 << 18
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv", ".parquet": "jsonl"}


@dataclass(slots=True)
class Record:
    """One text to work on. `fields` is its whole row, `parts` what else of it was asked for; `newline` is False on a last
    line that has none; `bad` marks the empty text that stands for a bad record."""

    text: str
    file: str
    line: int
    fields: dict | None = None
    newline: bool = True
    bad: bool = False
    parts: tuple[str, ...] = ()


_values = attrgetter(*(one.name for one in dataclass_fields(Record)))


def said(records: list[Record]) -> list[tuple]:
    """Records as JSON can say them, for another process; `heard` makes them again."""
    return list(map(_values, records))


def heard(words: list[list]) -> list[Record]:
    """Records that another process has said."""
    return [Record(*word) for word in words]


def unwritten(parts: Iterable[list[Record]], done: int, every: bool = False) -> Iterator[tuple[list[Record], int]]:
    """(part, how many of its records have been written), where the first `done` records have; parts written whole are left
    out unless `every` one is wanted.

    A part begun is to be worked on whole again: other neighbours in a batch would change the last digits.
    """
    for part in parts:
        written, done = min(done, len(part)), max(0, done - len(part))
        if every or written < len(part):
            yield part, written


@dataclass
class Reader:
    """How files become records: `format` is auto, text, jsonl, tsv or csv; `on_error` is stop, blank or skip.

    `take` makes the text and the other parts of a record from a row, or from a plain line (a str); without it the text is
    the line, or that of `fields`. `skipped` counts the records that `on_error="skip"` dropped.
    """

    format: str = "auto"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"
    take: Callable[[dict | str], tuple[str, tuple[str, ...]]] | None = None
    skipped: int = field(default=0, init=False)

    def batches(self, files: list[str]) -> Iterator[list[Record]]:
        """Lists of records, a list for each chunk that could be read without waiting, in input order.

        So a slow pipe is answered line by line, and a file is worked on in thousands of lines at once.
        Raises UserError (file and line) for an unreadable file and, with on_error="stop", for a bad record.
        """
        for name in files:
            header: list[str] | None = None
            layout, number = file_format(name, self.format), 0
            with user_errors(name, "read"), open_bytes(name) as handle:
                for lines in _line_chunks(handle):
                    records = []
                    for line in lines:
                        number += 1
                        if layout in SEPARATED and header is None:
                            header = cells(line.text.decode("utf-8", "replace"), layout)
                            continue
                        record = self._record(line, layout, header, name, number)
                        if record is not None:
                            records.append(record)
                    yield records

    def _record(self, line: "_Line", layout: str, header: list[str] | None, name: str, number: int) -> Record | None:
        try:
            text = line.text.decode("utf-8")
            row = None if layout == "text" else json_row(text) if layout == "jsonl" else dict(
                zip(header or (), cells(text, layout)))
            if self.take:
                text, parts = self.take(text if row is None else row)
                return Record(text, name, number, row, line.newline, parts=parts)
            return Record(text if row is None else row_text(row, self.fields), name, number, row, line.newline)
        except ValueError as error:
            if self.on_error == "stop":
                raise bad_record(error, name, number) from error
            if self.on_error == "blank":
                return Record("", name, number, None, line.newline, bad=True)
            self.skipped += 1
            return None


SEPARATED = ("tsv", "csv")  # formats whose first line names the columns


def cells(line: str, layout: str) -> list[str]:
    """The cells of one line of a table: parted by tabs and never quoted (tsv), or by commas and quoted by " (csv).

    ValueError for a quoted cell that goes on in the next line."""
    if layout == "tsv":
        return line.rstrip("\r").split("\t")
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"is no whole CSV row: {error}") from None


def file_format(name: str, asked: str) -> str:
    """text, jsonl, tsv or csv: as asked, or with "auto" what the file's suffix says (before a .gz or .zst). Rows of .parquet
    come as JSON Lines."""
    path = Path(name)
    if asked != "auto":
        return asked
    return FORMATS.get((path.with_suffix("") if path.suffix in PACKED else path).suffix, "text")


def bad_record(error: ValueError, name: str, number: int) -> UserError:
    """The UserError for a line that is no valid record."""
    what = f"invalid UTF-8 (byte {error.start + 1} of the line)" if isinstance(error, UnicodeDecodeError) else str(error)
    return UserError(what, where=f"{shown(name)}, line {number}",
                     hint="--on-error skip leaves such records out, --on-error blank writes an empty result")


def json_row(text: str) -> dict:
    """The JSON object on one line; ValueError when it is none."""
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def shown(name: str) -> str:
    """The name of an input as a message shows it."""
    return "standard input" if name == "-" else name


class _Line(NamedTuple):
    text: bytes
    newline: bool


def _line_chunks(handle: BinaryIO) -> Iterator[list[_Line]]:
    """Whole lines, split at \\n only, as they arrive; parts of a long line are joined once, so its cost stays linear."""
    parts: list[bytes] = []
    while chunk := handle.read(CHUNK_BYTES):
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        if rest:
            lines = [_Line(b"".join(parts), True), *(_Line(line, True) for line in rest[:-1])]
            parts = [rest[-1]]
            yield lines
    if last := b"".join(parts):
        yield [_Line(last, False)]


def expand(arguments: tuple[str, ...] | list[str], include: str | None = None) -> tuple[list[str], int]:
    """(files, skipped): FILE… arguments with each directory replaced by its text files, sorted, and how many were not text.

    Nothing given means standard input. Hidden files are left out, binary ones skipped and counted; a file named
    itself is always taken. Raises UserError for what does not exist and for a directory without text.
    """
    files, skipped = [], 0
    for argument in arguments or ("-",):
        path = Path(argument)
        with user_errors(argument, "read"):  # a name too long, a folder that may not be entered
            taken = argument == "-" or (path.exists() and not path.is_dir())
        if taken:
            files.append(argument)
            continue
        if not path.is_dir():
            raise UserError("no such file or directory", where=argument)
        found = _visible_files(path, include or "*")
        texts = [name for name in found if _is_text(name)]
        skipped += len(found) - len(texts)
        if not texts:
            raise UserError("holds no text files", where=argument, hint=f"{len(found)} files looked at"
                            + (f" with --include {include}" if include else ""))
        files += texts
    return files, skipped


def _visible_files(folder: Path, include: str) -> list[str]:
    found = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(root, name) for name in sorted(names)
                  if not name.startswith(".") and Path(name).match(include)]
    return sorted(name for name in found if os.path.isfile(name))


def _is_text(name: str) -> bool:
    try:
        with open_bytes(name) as handle:
            head = handle.read(1 << 16)
    except OSError:
        return False
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) == 1 << 16  # only a character cut by the end of the look
    return bool(head)


# text that must stay on one line of a TSV or of piped output
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def escaped(text: str) -> str:
    """The text with backslash, newline, CR and tab written as \\\\, \\n, \\r and \\t."""
    return text.translate(ESCAPES)


class Output:
    """Results, in order, flushed as they are ready: on standard output, or in FILE, which appears whole at the end.

    An interrupted file stays as FILE.part; with `resume` its complete lines are kept and counted in `lines_kept`.
    Raises ClosedPipe when the reader has gone, UserError when the disk refuses.
    """

    def __init__(self, path: str | None = None, resume: bool = False):
        self.path = Path(path) if path and path != "-" else None
        self.lines_kept = 0
        if self.path is None:
            if resume:
                raise UsageError("--continue needs -o FILE")
            self.file = open(sys.stdout.fileno(), "wb", buffering=1 << 16, closefd=False)
            return
        if self.path.is_dir():
            raise UserError("is a directory", where=str(path), hint="-o takes a file")
        part = self._part()
        with user_errors(path, "write"):
            if part.is_symlink():
                part.unlink()  # nothing is written through a link
            if resume and part.is_file():
                self.lines_kept = _cut_to_whole_lines(part)
            self.file = open(part, "ab" if resume else "wb")

    def _part(self) -> Path:
        if self.path.exists() and not self.path.is_file():
            return self.path  # /dev/null or a pipe: written as it is, never replaced by a file
        return self.path.with_name(self.path.name + ".part")

    def write(self, text: str) -> None:
        """Appends text as UTF-8."""
        data = text.encode("utf-8", "backslashreplace")  # a JSON field may hold a lone surrogate: \ud800, as it came
        with user_errors(self.path or "standard output", "write"):
            self.file.write(data)

    def flush(self) -> None:
        """Makes everything written so far visible to the reader."""
        with user_errors(self.path or "standard output", "write"):
            self.file.flush()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.flush()
            if self.path:
                with user_errors(self.path, "write"):
                    self.file.close()
                    if (part := self._part()) != self.path:
                        os.replace(part, self.path)
            return
        try:
            self.file.close()
        except OSError:
            pass  # the error that ended the block is the one to tell


def _cut_to_whole_lines(part: Path) -> int:
    """Drops an unfinished last line of the file; returns how many whole lines it holds."""
    count = whole = position = 0
    with part.open("rb+") as file:
        while chunk := file.read(1 << 20):
            count += chunk.count(b"\n")
            if (newline := chunk.rfind(b"\n")) >= 0:
                whole = position + newline + 1
            position += len(chunk)
        file.truncate(whole)
    return count
