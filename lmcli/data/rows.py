"""Lines of text, JSON Lines, TSV or CSV → rows and records: the one row parser."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from lmcli.data.files import COMPRESSED_SUFFIXES, open_bytes
from lmcli.data.schema import row_text
from lmcli.errors import UserError
from lmcli.storage import user_errors

CHUNK_BYTES = 1 << 18
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv", ".parquet": "jsonl"}
TABLES = ("tsv", "csv")  # formats whose first line names the columns


def file_format(file: str, format: str) -> str:
    """The format itself, or for "auto" that of the suffix: text, jsonl, tsv or csv.

    A suffix .gz or .zst is skipped. Rows of .parquet are read as JSON Lines.
    """
    if format != "auto":
        return format
    path = Path(file)
    return FORMATS.get(
        (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix, "text"
    )


def parse_row(line: str, format: str, columns: Sequence[str] = ()) -> dict[str, Any] | str:
    """The row on one line: a dict of fields, or for plain text the line itself.

    `columns` names the cells of a table's row. Raises ValueError for invalid JSON and CSV.
    """
    if format == "text":
        return line
    if format == "jsonl":
        return parse_json_row(line)
    return dict(zip(columns, split_cells(line, format)))


def parse_json_row(line: str) -> dict[str, Any]:
    """The JSON object on one line; ValueError for anything else.

    NaN and Infinity, which are no JSON but which Python writes, are read as null.
    """
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def split_cells(line: str, format: str) -> list[str]:
    """The cells of one line of a table: TSV is never quoted, CSV is quoted by ".

    Raises ValueError for a quoted cell that continues in the next line.
    """
    if format == "tsv":
        return line.rstrip("\r").split("\t")
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"is no whole CSV row: {error}") from None


def parse_header(line: bytes, format: str, file: str) -> list[str]:
    """The column names in the first line of a table. Raises UserError for broken CSV."""
    try:
        return split_cells(line.decode("utf-8", "replace"), format)
    except ValueError as error:
        raise bad_record(error, file, 1) from error


class Line(NamedTuple):
    """The bytes of a line without its \\n; `newline` is False on a last line that has none."""

    text: bytes
    newline: bool


def split_lines(chunks: Iterable[bytes]) -> Iterator[list[Line]]:
    """The lines of each chunk, split at \\n only; the pieces of a long line are joined once."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield [Line(b"".join(pieces), True), *(Line(line, True) for line in rest[:-1])]
            pieces = [rest[-1]]
    if last := b"".join(pieces):
        yield [Line(last, False)]


@dataclass(slots=True)
class Record:
    """One text to process, with its file, line and whole row (`fields`; None for a plain line).

    `extra_texts` are what RowReader.extract returned besides the text. `bad` marks the empty text
    that replaces a bad record.
    """

    text: str
    file: str
    line: int
    fields: dict[str, Any] | None = None
    newline: bool = True
    bad: bool = False
    extra_texts: tuple[str, ...] = ()

    @property
    def location(self) -> str:
        """Its file and line."""
        return f"{display_name(self.file)}, line {self.line}"


_values = attrgetter(*(field.name for field in dataclass_fields(Record)))


def records_to_json(records: list[Record]) -> list[tuple]:
    """Records as JSON values, for another process; `records_from_json` restores them."""
    return list(map(_values, records))


def records_from_json(values: list[list]) -> list[Record]:
    """The records that `records_to_json` encoded."""
    return [Record(*record) for record in values]


@dataclass
class RowReader:
    """Reads files into records.

    `format` is auto, text, jsonl, tsv or csv; `on_error` is stop, blank or skip. `extract` returns
    (text, extra texts) of a row or of a plain line; without it the text is the line or the row's
    `fields`. `skipped` counts the records that `on_error="skip"` dropped.
    """

    format: str = "auto"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"
    extract: Callable[[dict | str], tuple[str, tuple[str, ...]]] | None = None
    skipped: int = field(default=0, init=False)

    def batches(self, files: Iterable[str]) -> Iterator[list[Record]]:
        """Lists of records in input order, one for each chunk that could be read without waiting.

        So lines of a slow pipe are processed at once, and those of a file in thousands. Raises
        UserError (file and line) for an unreadable file and, with on_error="stop", a bad record.
        """
        for file in files:
            format, columns, number = file_format(file, self.format), None, 0
            with user_errors(file, "read"), open_bytes(file) as handle:
                for lines in split_lines(iter(lambda: handle.read(CHUNK_BYTES), b"")):
                    records = []
                    for line in lines:
                        number += 1
                        if format in TABLES and columns is None:
                            columns = parse_header(line.text, format, file)
                        elif record := self._record(line, format, columns or [], file, number):
                            records.append(record)
                    yield records

    def _record(
        self, line: Line, format: str, columns: list[str], file: str, number: int
    ) -> Record | None:
        extra_texts: tuple[str, ...] = ()
        try:
            row = parse_row(line.text.decode("utf-8"), format, columns)
            if self.extract:
                text, extra_texts = self.extract(row)
            else:
                text = row_text(row, self.fields)
        except ValueError as error:
            if self.on_error == "stop":
                raise bad_record(error, file, number) from error
            if self.on_error == "blank":
                return Record("", file, number, None, line.newline, bad=True)
            self.skipped += 1
            return None
        fields = None if isinstance(row, str) else row
        return Record(text, file, number, fields, line.newline, extra_texts=extra_texts)


def unfinished_batches(
    batches: Iterable[Sequence[Record]], done: int, include_finished: bool = False
) -> Iterator[tuple[Sequence[Record], int]]:
    """(batch, number of its records already written), given that the first `done` records are.

    Finished batches are left out unless `include_finished`. A batch begun is processed whole again:
    other neighbors in a batch would change the last digits of its results.
    """
    for batch in batches:
        written, done = min(done, len(batch)), max(0, done - len(batch))
        if include_finished or written < len(batch):
            yield batch, written


def bad_record(error: ValueError, file: str, number: int) -> UserError:
    """The UserError for a line that is no valid record."""
    what = str(error)
    if isinstance(error, UnicodeDecodeError):
        what = f"invalid UTF-8 (byte {error.start + 1} of the line)"
    return UserError(
        what,
        where=f"{display_name(file)}, line {number}",
        hint="--on-error skip leaves such records out, --on-error blank writes an empty result",
    )


def display_name(file: str) -> str:
    """The name of an input in messages."""
    return "standard input" if file == "-" else file
