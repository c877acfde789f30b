"""Lines of text, JSON Lines, TSV or CSV → rows and records: the one row parser."""

import codecs
import csv
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lmcli.data.files import COMPRESSED_SUFFIXES, display_name, open_bytes, text_chunks
from lmcli.data.schema import MissingField, field_names, row_text
from lmcli.errors import UserError
from lmcli.storage import user_errors
from lmcli.terminal import progress
from lmcli.text.characters import parse_json

CHUNK_BYTES = 1 << 18
MAX_LINE_BYTES = 1 << 28  # of one record: more than real ones have, and what a laptop can hold
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv", ".parquet": "jsonl"}
MAX_TEXT_LINE_BYTES = 1 << 30  # of a text that is read as a stream
DELIMITERS = {"tsv": b"\t", "csv": b","}
TABLES = tuple(DELIMITERS)  # formats whose first line names the columns


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

    `columns` names the cells of a table's row. Raises ValueError for invalid JSON and CSV, and for
    more cells than columns.
    """
    if format == "text":
        return line
    if format == "jsonl":
        return parse_json_row(line)
    cells = split_cells(line, format)
    if any(cells[len(columns) :]):
        raise ValueError(f"{len(cells)} cells, and the header names {len(columns)} columns")
    return dict(zip(columns, cells))


def parse_json_row(line: str) -> dict[str, Any]:
    """The JSON object on one line; ValueError for anything else."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def split_cells(line: str, format: str) -> list[str]:
    """The cells of one row of a table: TSV is never quoted, CSV is quoted by " as in RFC 4180.

    Raises ValueError for a cell with text after its closing quote.
    """
    if format == "tsv":
        return line.rstrip("\r").split("\t")
    try:
        csv.field_size_limit(MAX_LINE_BYTES)
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"is no whole CSV row: {error}") from None


def column_names(line: str, format: str) -> list[str]:
    """The names in the header of a table. Raises ValueError for broken CSV and a repeated name."""
    names = split_cells(line, format)
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"column {repeated!r} stands twice in the header")
    return names


def parse_header(line: "Line", format: str, file: str) -> list[str]:
    """The `column_names` in the first line of a table. Raises UserError if they are bad."""
    try:
        return column_names(line.text.decode("utf-8", "replace"), format)
    except ValueError as error:
        hint = "the first line names the columns, each by another name: correct it"
        raise bad_record(error, file, line.number, hint) from error


class Line(NamedTuple):
    """A line without its end, its number from 1, and the byte of the file where it starts.

    `newline` is False on a last line that has none. A row of CSV may have several lines.
    """

    text: bytes
    newline: bool
    number: int
    start: int


def read_lines(
    handle: BinaryIO,
    file: str,
    format: str,
    digest: Any = None,
    keep_blank: bool = False,
    keep_marks: bool = False,
) -> Iterator[list[Line]]:
    """The lines or rows of a stream, those of each chunk that could be read without waiting.

    The lines of text end at LF or CR LF, and a byte order mark is left out; `keep_marks` keeps CR
    and mark. Blank lines of rows are left out unless `keep_blank`. `digest` gets all bytes. Raises
    UserError for another encoding, a line of more than MAX_LINE_BYTES, and a quote never closed.
    """
    mark, chunks = text_chunks(handle, file, CHUNK_BYTES, keep_marks)
    if digest is not None:
        digest.update(mark)
        chunks = _digested(chunks, digest)
    lines = split_lines(chunks, file, len(mark), strip_cr=format == "text" and not keep_marks)
    if format == "csv":
        lines = _join_quoted(lines, file)
    return lines if format == "text" else _without_blank(lines, format, keep_blank)


def _digested(chunks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def split_lines(
    chunks: Iterable[bytes], file: str = "", start: int = 0, strip_cr: bool = False
) -> Iterator[list[Line]]:
    """The lines of each chunk, split at LF; the pieces of a long line are joined once.

    `start` is the byte of the file where the first chunk starts. With `strip_cr` a CR before LF
    belongs to the line's end. Raises UserError for a line of more than MAX_LINE_BYTES.
    """
    pieces: list[bytes] = []
    size, number = 0, 1
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        size += len(first)
        if size > MAX_LINE_BYTES:
            raise line_too_long(file, number, MAX_LINE_BYTES)
        if rest:
            lines = []
            for text in (b"".join(pieces), *rest[:-1]):
                shown = text[:-1] if strip_cr and text[-1:] == b"\r" else text
                lines.append(Line(shown, True, number, start))
                number, start = number + 1, start + len(text) + 1
            yield lines
            pieces, size = [rest[-1]], len(rest[-1])
    if last := b"".join(pieces):
        yield [Line(last, False, number, start)]


def line_too_long(file: str, number: int, limit: int) -> UserError:
    """The UserError for a line of more bytes than the limit."""
    return UserError(
        f"more than {limit / 1e6:,.0f} MB without a line end",
        where=f"{display_name(file)}, line {number:,}",
        hint="split it into lines or files",
    )


def checked_chunks(file: str, chunks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    """The chunks of a text, which `digest` gets too.

    Raises UserError, which names the line, where it is not UTF-8 or has no line end for long.
    """
    decoder, lines, line_bytes = codecs.getincrementaldecoder("utf-8")(), 1, 0
    for chunk in chain(chunks, [b""]):  # b"": the end
        digest.update(chunk)
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            number = lines + error.object[: error.start].count(b"\n")
            raise UserError(
                "invalid UTF-8", where=f"{display_name(file)}, line {number}", hint=NOT_UTF_8
            ) from error
        line_bytes = (
            len(chunk) - end - 1 if (end := chunk.rfind(b"\n")) >= 0 else line_bytes + len(chunk)
        )
        lines += chunk.count(b"\n")
        if line_bytes > MAX_TEXT_LINE_BYTES:
            raise line_too_long(file, lines, MAX_TEXT_LINE_BYTES)
        if chunk:
            yield chunk


def _join_quoted(batches: Iterable[list[Line]], file: str) -> Iterator[list[Line]]:
    """Rows of CSV: lines joined where a quoted cell continues in the next one (RFC 4180)."""
    open_lines: list[Line] = []  # of a row whose last cell is open
    size = 0
    for lines in batches:
        rows = []
        for line in lines:
            if open_lines or b'"' in line.text:
                open_lines.append(line)
                size += len(line.text)
                if size > MAX_LINE_BYTES:
                    raise _never_closed(file, open_lines[0].number)
                if _ends_in_quotes(line.text, len(open_lines) > 1):
                    continue
                if len(open_lines) > 1:
                    text = b"\n".join([open_line.text for open_line in open_lines])
                    line = Line(text, line.newline, open_lines[0].number, open_lines[0].start)
                open_lines, size = [], 0
            rows.append(line)
        yield rows
    if open_lines:
        raise _never_closed(file, open_lines[0].number)


def _never_closed(file: str, number: int) -> UserError:
    return UserError(
        "a quoted cell begins in this row and never ends",
        where=f"{display_name(file)}, line {number}",
        hint='close it with ", and write a quote inside of a cell as ""',
    )


# the rest of a quoted cell: "" is a quote, any other " ends it
CLOSING_QUOTE = re.compile(rb'[^"]*+(?:""[^"]*+)*+"')


def _ends_in_quotes(line: bytes, inside: bool) -> bool:
    """Whether a quoted cell of CSV is open at the end of a line; `inside`: one is at its start."""
    at = 0
    while True:
        if not inside:  # a quote opens a cell at its start only
            if at == 0 and line[:1] == b'"':
                at = 1
            elif (comma := line.find(b',"', at)) >= 0:
                at = comma + 2
            else:
                return False
        if not (closing := CLOSING_QUOTE.match(line, at)):
            return True
        at, inside = closing.end(), False


def _without_blank(
    batches: Iterable[list[Line]], format: str, keep_blank: bool
) -> Iterator[list[Line]]:
    """The rows, and of a table the header, without blank lines.

    In a table of one column a blank line is an empty cell. `keep_blank` keeps those after a header.
    """
    header: bytes | None = None if format in TABLES else b""
    for lines in batches:
        rows = []
        for line in lines:
            if text := line.text.strip() if format == "jsonl" else line.text.rstrip(b"\r"):
                header = text if header is None else header
            elif header is None or not (keep_blank or _has_one_column(header, format)):
                continue
            rows.append(line)
        yield rows


def _has_one_column(header: bytes, format: str) -> bool:
    return format in TABLES and DELIMITERS[format] not in header


def named_roles(fields: Sequence[str], row: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The columns that `--fields` names as ROLE=COLUMN, by their role, in the order given.

    A field of the row is a column, whatever its name.

    >>> named_roles(["text=review", "label=stars"], ["review", "stars"])
    {'text': ('review',), 'label': ('stars',)}
    """
    named: dict[str, tuple[str, ...]] = {}
    for each in fields:
        if "=" in each and each not in row:
            role, _, column = (part.strip() for part in each.partition("="))
            named[role] = (*named.get(role, ()), column)
    return named


@dataclass(slots=True)
class Record:
    """One text to process, with its file, line and whole row (`fields`; None for a plain line).

    `extra_texts` are what RowReader.extract returned besides the text. `bad` marks the empty text
    that replaces a bad record. `number` counts all records of the input, skipped ones too, from 1.
    """

    text: str
    file: str
    line: int
    fields: dict[str, Any] | None = None
    newline: bool = True
    bad: bool = False
    extra_texts: tuple[str, ...] = ()
    number: int = 0

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
    `fields`. A row without one of the fields `keep` is bad. `skipped` counts the records that
    `on_error="skip"` dropped.
    """

    format: str = "auto"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"
    extract: Callable[[dict | str], tuple[str, tuple[str, ...]]] | None = None
    keep: tuple[str, ...] = ()
    skipped: int = field(default=0, init=False)
    count: int = field(default=0, init=False)

    def batches(self, files: Iterable[str]) -> Iterator[list[Record]]:
        """Lists of records in input order, one for each chunk that could be read without waiting.

        So lines of a slow pipe are processed at once, and those of a file in thousands. Raises
        UserError (file and line) for an unreadable file and, with on_error="stop", a bad record.
        """
        files = list(files)
        progress.inputs(files)
        for file in files:
            format, columns = file_format(file, self.format), None
            keep_blank = self.on_error == "blank"  # the lines of the output stay aligned
            with user_errors(display_name(file), "read"), open_bytes(file) as handle:
                for lines in read_lines(handle, file, format, keep_blank=keep_blank):
                    records = []
                    for line in lines:
                        if format in TABLES and columns is None:
                            columns = parse_header(line, format, file)
                        elif record := self._record(line, format, columns or [], file):
                            records.append(record)
                    progress.read(len(records))
                    yield records

    def _record(self, line: Line, format: str, columns: list[str], file: str) -> Record | None:
        number = line.number
        extra_texts: tuple[str, ...] = ()
        self.count += 1
        try:
            row = parse_row(line.text.decode("utf-8"), format, columns)
            for name in self.keep:
                require_field(row, name)
            if self.extract:
                text, extra_texts = self.extract(row)
            else:
                text = row_text(row, self.fields)
        except ValueError as error:
            if self.on_error == "stop":
                alike = format in TABLES or self.count == 1
                raise bad_record(error, file, number, alike=alike) from error
            if self.on_error == "blank":
                return Record("", file, number, None, line.newline, bad=True, number=self.count)
            self.skipped += 1
            return None
        fields = None if isinstance(row, str) else row
        return Record(text, file, number, fields, line.newline, False, extra_texts, self.count)


def require_field(row: dict[str, Any] | str, name: str) -> None:
    """Raises ValueError for a row without this field, whatever its value, and for a plain line."""
    if isinstance(row, str):
        raise ValueError(f"is plain text, without a field {name!r}")
    if name not in row:
        raise MissingField(f"no field {name!r} among {field_names(row)}")


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


SKIPPED = "--on-error skip leaves such records out"
SKIPPED_OR_BLANK = f"{SKIPPED}, --on-error blank writes an empty result"
NOT_UTF_8 = "only UTF-8 text can be read; iconv -f LATIN1 -t UTF-8 converts Latin-1"


def bad_record(
    error: ValueError, file: str, number: int, hint: str = SKIPPED_OR_BLANK, alike: bool = False
) -> UserError:
    """The UserError for a line that is no valid record.

    If all rows are `alike`, they lack the same fields: nothing would be left if they were skipped.
    """
    what = str(error)
    if alike and isinstance(error, MissingField):
        return UserError(what, where=f"{display_name(file)}, line {number}")
    if isinstance(error, UnicodeDecodeError):
        what = f"invalid UTF-8 (byte {error.start + 1} of the line)"
    return UserError(what, where=f"{display_name(file)}, line {number}", hint=hint)
