"""Files → documents, the validation split, and the text of documents again, piece by piece.

A document is a byte range of a file, found in one pass. So a corpus larger than memory is a list of
numbers, and the validation split can be stored (`recipe.yaml`) and measured again later.
"""

import codecs
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from lmcli.data.byte_ranges import Document, DocumentLabels, Documents
from lmcli.data.files import open_bytes, text_chunks
from lmcli.data.rows import (
    CHUNK_BYTES,
    NOT_UTF_8,
    SKIPPED,
    TABLES,
    Line,
    bad_record,
    checked_chunks,
    display_name,
    file_format,
    parse_header,
    parse_row,
    read_lines,
)
from lmcli.data.schema import (
    MESSAGES,
    PairSchema,
    Row,
    SquadExample,
    pair_schema,
    row_field,
    row_labels,
    row_messages,
    row_text,
)
from lmcli.data.schema import squad_example as row_squad_example
from lmcli.errors import UsageError, UserError
from lmcli.storage import user_errors
from lmcli.terminal import progress
from lmcli.text.chat_template import ASSISTANT
from lmcli.text.splitting import PIECE_CHARS, SAFE_CUT, SAFE_CUT_CRLF, cut_position

SEPARATOR = b"<|endoftext|>"
# of the hash by which documents are held out, in recipe.yaml; the same for each train.seed, so that
# runs can be compared
SPLIT_SEED = 0


# -- how files hold documents


def _learned_chat(row: Row) -> tuple[str, str]:
    """(what comes before the assistant's last message, that message), nearly as templates write it.

    Tokenizers are learned from it, and a row is held out or not by it.
    """
    messages = row_messages(row, MESSAGES[0])
    turns = [(row_field(message, "role"), row_field(message, "content")) for message in messages]
    while turns and turns[-1][0] != ASSISTANT:
        turns.pop()
    if not turns:
        raise ValueError(f"no message has the role {ASSISTANT!r}, whose messages are learned")
    before = "".join(f"<|{role}|>\n{text}\n" for role, text in turns[:-1])
    return f"{before}<|{ASSISTANT}|>\n", turns[-1][1]


CHAT_SCHEMA = PairSchema(MESSAGES, _learned_chat)


@dataclass(frozen=True)
class DocumentFormat:
    """How files hold documents: each is a file, line or paragraph ("blank") of text, or a row.

    `format` and `fields` are those of RowReader. `label` names the field of labels, of which a row
    has one or, with `multi_label`, any number. `paired`: `fields` are those of a PairSchema, and
    neither text may be blank. `answers` names the field of answers to questions; `fields` are then
    the context and the question. `on_error` is stop or skip. `keep_marks`: a text has the byte
    order mark at its start and the CR of CR LF, as in older runs. `chat`: conversations, which a
    chat template writes.
    """

    documents: str = "file"
    format: str = "auto"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"
    label: str = ""
    multi_label: bool = False
    paired: bool = False
    answers: str = ""
    keep_marks: bool = False
    chat: bool = False

    def has_rows(self, file: str) -> bool:
        """True if the file is JSON Lines, TSV or CSV."""
        return file_format(file, self.format) != "text"

    @property
    def has_examples(self) -> bool:
        """True if a row is an example: a pair, labeled text or question; plain text is none."""
        return bool(self.paired or self.label or self.answers)

    @property
    def pair_schema(self) -> PairSchema:
        """The PairSchema of `fields`. Raises UsageError when they are none."""
        if self.chat:
            return CHAT_SCHEMA
        if (schema := pair_schema(self.fields)) is None:
            raise UsageError(f"{len(self.fields)} fields are no pair of texts", where="--fields")
        return schema

    def text(self, row: dict) -> str:
        """The text of a row, of a pair both texts joined. Raises ValueError when it has none."""
        if not self.paired:
            return row_text(row, self.fields)
        return self.pair_schema.separator.join(self.pair(row))

    def pair(self, row: dict) -> tuple[str, str]:
        """The source and the target text of a row. Raises ValueError when a field is missing."""
        return self.pair_schema.texts(row)

    def labels(self, row: dict) -> tuple[str, ...]:
        """The labels of a row. Raises ValueError when it has none."""
        return row_labels(row, self.label, self.multi_label)

    def squad_example(self, row: dict) -> SquadExample:
        """The question of a row with its answers. Raises ValueError when it is incomplete."""
        context, question = self.fields
        return row_squad_example(row, context, question, self.answers)

    def content(self, row: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(the texts of a row, its labels). Raises ValueError when one of the fields is bad."""
        texts = self.pair(row) if self.paired else (self.text(row),)
        if self.answers:
            self.squad_example(row)
        return texts, self.labels(row) if self.label else ()


def _row_parser(file: str, doc_format: DocumentFormat) -> Callable[[bytes], dict[str, Any]]:
    """Parses lines of a file of rows; of a table it reads the header first."""
    format, columns = file_format(file, doc_format.format), []
    if format in TABLES:
        header = next(_lines(file, doc_format), Line(b"", True, 1, 0))
        columns = parse_header(header, format, file)

    def parse(line: bytes) -> dict[str, Any]:
        row = parse_row(line.decode("utf-8"), format, columns)
        assert isinstance(row, dict)  # the format is not text
        return row

    return parse


# -- finding documents


@dataclass(frozen=True)
class Survey:
    """What one pass over files found: `documents`, and the SHA-256 of each file.

    The key of a document is a hash of its texts. `labels` are those of rows with labels. `skipped`
    counts bad rows (on_error="skip"), `empty` rows with a blank text; both are left out.
    """

    documents: Documents
    hashes: dict[str, str]
    skipped: int = 0
    empty: int = 0
    labels: DocumentLabels | None = None


@dataclass
class _Findings:
    """What a scan finds besides documents: hashes of files, counts, and labels by their numbers."""

    hashes: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, int] = field(default_factory=dict)
    ids: array = field(default_factory=lambda: array("q"))  # of all documents in order
    label_counts: array = field(default_factory=lambda: array("q"))  # of each document

    def add_labels(self, labels: tuple[str, ...]) -> None:
        """Adds the labels of the next document; without any it has the label ""."""
        labels = labels or ("",)
        self.ids.extend(self.names.setdefault(label, len(self.names)) for label in labels)
        self.label_counts.append(len(labels))


def survey(files: Iterable[str], doc_format: DocumentFormat, seed: int = SPLIT_SEED) -> Survey:
    """Reads every byte of the files once, checks that it is UTF-8, and returns what is in them.

    Blank documents are left out. The documents' keys depend on `seed`. Raises UserError naming file
    and line for invalid UTF-8, bad rows and missing fields, and UserError when there are no
    documents.
    """
    files, findings = list(files), _Findings()
    with progress.stage("reading", unit="bytes"):
        progress.inputs(files)
        documents = Documents.keyed(_scan(files, doc_format, findings), seed)
    if not documents:
        raise UserError(
            "no text in it",
            where=", ".join(display_name(file) for file in files[:3]),
            hint="give a file with text, or pipe some in",
        )
    labels = None
    if doc_format.label:
        labels = DocumentLabels.of(
            list(findings.names), np.array(findings.ids), np.array(findings.label_counts)
        )
    return Survey(
        documents, findings.hashes, findings.counts["skipped"], findings.counts["empty"], labels
    )


def find_documents(files: Iterable[str], doc_format: DocumentFormat) -> Iterator[Document]:
    """The documents of `survey`, as they are found."""
    return (document for document, _ in _scan(files, doc_format, _Findings()))


def first_rows(
    files: Iterable[str], doc_format: DocumentFormat, count: int = 1
) -> list[dict[str, Any]]:
    """The first valid rows, at most `count`, of the first file that has one; [] without any."""
    for file in filter(doc_format.has_rows, files):
        rows: list[dict[str, Any]] = []
        with user_errors(file, "read"):
            parse = _row_parser(file, doc_format)
            for line in _row_lines(file, doc_format):
                with suppress(ValueError):
                    rows.append(parse(line.text))
                if len(rows) == count:
                    break
        if rows:
            return rows
    return []


def _row_lines(
    file: str, doc_format: DocumentFormat, digest: "hashlib._Hash | None" = None
) -> Iterator[Line]:
    """The `_lines` of a file of rows, without a table's header."""
    has_header = file_format(file, doc_format.format) in TABLES
    return islice(_lines(file, doc_format, digest), int(has_header), None)


def _scan(
    files: Iterable[str], doc_format: DocumentFormat, found: _Findings
) -> Iterator[tuple[Document, int]]:
    """Documents with a hash of their texts, as they are found; `found` is filled on the way."""
    for file in files:
        digest = hashlib.sha256()
        with user_errors(file, "read"):
            if doc_format.has_rows(file):
                yield from _scan_rows(file, doc_format, digest, found)
            elif doc_format.has_examples:
                raise UsageError(
                    "is plain text, which has no fields",
                    where=display_name(file),
                    hint="leave it out, or name its format with --format jsonl, tsv or csv",
                )
            elif doc_format.documents == "file":
                yield from _scan_texts(file, doc_format, digest)
            else:
                yield from _scan_lines(file, doc_format, digest)
        found.hashes[file] = digest.hexdigest()


def _scan_rows(
    file: str, doc_format: DocumentFormat, digest: "hashlib._Hash", found: _Findings
) -> Iterator[tuple[Document, int]]:
    parse = _row_parser(file, doc_format)
    for line, _, number, start in _row_lines(file, doc_format, digest):
        try:
            texts, labels = doc_format.content(parse(line))
        except ValueError as error:
            if doc_format.on_error == "stop":
                alike = number < 3  # the first row, of a table after the header
                raise bad_record(error, file, number, SKIPPED, alike) from error
            found.counts["skipped"] += 1
            continue
        if not all(text.strip() for text in texts):
            found.counts["empty"] += 1
            continue
        if doc_format.label:
            found.add_labels(labels)
        text_hash = crc32("\0".join(texts).encode("utf-8"))
        yield Document(file, start, start + len(line)), text_hash


def _scan_lines(
    file: str, doc_format: DocumentFormat, digest: "hashlib._Hash"
) -> Iterator[tuple[Document, int]]:
    """Ranges of the lines that are not blank, single ones or joined to paragraphs."""
    single = doc_format.documents == "line"
    begin, end, text_hash = -1, 0, 0
    for line, _, number, start in _lines(file, doc_format, digest):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise bad_record(error, file, number, NOT_UTF_8) from error
        if line.strip():
            begin, end = start if begin < 0 else begin, start + len(line)
            text_hash = crc32(line.rstrip(), text_hash)
        if begin >= 0 and (single or not line.strip()):
            yield Document(file, begin, end), text_hash
            begin, text_hash = -1, 0
    if begin >= 0:
        yield Document(file, begin, end), text_hash


def _scan_texts(
    file: str, doc_format: DocumentFormat, digest: "hashlib._Hash"
) -> Iterator[tuple[Document, int]]:
    """Ranges between <|endoftext|> marks; line ends right after a mark belong to the mark."""
    with open_bytes(file) as handle:
        bom, chunks = text_chunks(handle, file, CHUNK_BYTES, doc_format.keep_marks)
        digest.update(bom)
        yield from _between_marks(file, len(bom), checked_chunks(file, chunks, digest))


def _between_marks(
    file: str, begin: int, chunks: Iterable[bytes]
) -> Iterator[tuple[Document, int]]:
    position = begin
    buffer, blank, after_mark, text_hash = b"", True, False, 0
    for chunk in chunks:
        buffer += chunk
        while True:
            if after_mark:  # and still so, when more line ends may come with the next chunk
                rest = buffer.lstrip(b"\r\n")
                begin = position = position + len(buffer) - len(rest)
                buffer, blank, after_mark = rest, True, not rest
            if (at := buffer.find(SEPARATOR)) < 0:
                break
            if not (blank and not buffer[:at].strip()):
                yield Document(file, begin, position + at), crc32(buffer[:at], text_hash)
            consumed = at + len(SEPARATOR)
            buffer, position, after_mark = buffer[consumed:], position + consumed, True
            text_hash = 0
        # what may be the beginning of a mark waits for the next chunk
        tail = len(SEPARATOR) - 1
        blank = blank and not buffer[:-tail].strip()
        position += max(0, len(buffer) - tail)
        text_hash = crc32(buffer[:-tail].replace(b"\r", b""), text_hash)
        buffer = buffer[-tail:]
    if not (blank and not buffer.strip()):
        yield (
            Document(file, begin, position + len(buffer)),
            crc32(buffer.replace(b"\r", b""), text_hash),
        )


def _lines(
    file: str, doc_format: DocumentFormat, digest: "hashlib._Hash | None" = None
) -> Iterator[Line]:
    format = file_format(file, doc_format.format)
    with open_bytes(file) as handle:
        for lines in read_lines(handle, file, format, digest, keep_marks=doc_format.keep_marks):
            yield from lines


# -- the text of documents


class Piece(NamedTuple):
    """Part of a document's text, cut where no token can span the cut; `last` on the last piece.

    Of a text, `size` is the bytes of the file that it takes.
    """

    text: str
    document: Document
    last: bool
    size: int


def read_pieces(documents: Iterable[Document], doc_format: DocumentFormat) -> Iterator[Piece]:
    """The text of the documents in order, in pieces of about PIECE_CHARS characters."""
    parser = cache(partial(_row_parser, doc_format=doc_format))
    for document, chunks in _contents(documents):
        if has_rows := doc_format.has_rows(document.file):
            row = parser(document.file)(b"".join(chunks))
            chunks = iter([doc_format.text(row).encode("utf-8")])
        yield from _cut(chunks, document, has_rows or doc_format.keep_marks)


def read_rows(
    documents: Iterable[Document], doc_format: DocumentFormat
) -> Iterator[tuple[Document, dict[str, Any]]]:
    """Each document with its row, in order; all documents must be rows."""
    parser = cache(partial(_row_parser, doc_format=doc_format))
    for document, chunks in _contents(documents):
        yield document, parser(document.file)(b"".join(chunks))


def _contents(documents: Iterable[Document]) -> Iterator[tuple[Document, Iterator[bytes]]]:
    """Each document with chunks of its bytes, to be read before the next document is taken."""
    handle: BinaryIO | None = None
    file, position = None, 0
    try:
        for document in documents:
            with user_errors(document.file, "read"):
                if handle is None or document.file != file or document.start < position:
                    if handle:
                        handle.close()
                    handle, file, position = open_bytes(document.file), document.file, 0
                if document.start != position:
                    handle.seek(document.start)
                yield document, _range_chunks(handle, document)
                position = document.end
    finally:
        if handle:
            handle.close()


def _range_chunks(handle: BinaryIO, document: Document) -> Iterator[bytes]:
    remaining = document.end - document.start
    while remaining:
        chunk = handle.read(min(CHUNK_BYTES, remaining))
        if not chunk:
            raise UserError(
                "is shorter than when it was first read",
                where=display_name(document.file),
                hint="start again",
            )
        remaining -= len(chunk)
        yield chunk


def _cut(chunks: Iterable[bytes], document: Document, keep_cr: bool = True) -> Iterator[Piece]:
    """The pieces of a text; unless `keep_cr`, its line ends \\r\\n become \\n."""
    decoder, text, searched = codecs.getincrementaldecoder("utf-8")(), "", 0
    safe_cut = SAFE_CUT if keep_cr else SAFE_CUT_CRLF

    def piece(text: str, last: bool) -> Piece:
        crs = 0 if keep_cr else text.count("\r\n")
        size = len(text.encode("utf-8"))
        return Piece(text.replace("\r\n", "\n") if crs else text, document, last, size)

    for chunk in chunks:
        text += decoder.decode(chunk)
        start = 0
        while at := cut_position(text, start, max(PIECE_CHARS, searched - start), safe_cut):
            yield piece(text[start:at], False)
            start = at
        text = text[start:]
        searched = max(0, len(text) - 1)  # a text without a cut is searched once, not once a chunk
    yield piece(text + decoder.decode(b"", final=True), True)


def location(file: str, at: int) -> str:
    """The name of a file and the line that contains byte `at` of it, for messages."""
    return f"{display_name(file)}, line {line_number(file, at)}"


def line_number(file: str, at: int) -> int:
    """The number of the line, counted from 1, that contains byte `at` of a file."""
    lines = 1
    with user_errors(file, "read"), open_bytes(file) as handle:
        while at and (chunk := handle.read(min(CHUNK_BYTES, at))):
            lines, at = lines + chunk.count(b"\n"), at - len(chunk)
    return lines
