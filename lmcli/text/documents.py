"""Documents: byte ranges of files, found in one pass; the held-out part; and their text again, piece by piece.

A range names a text without holding it, so a corpus larger than memory is a list of numbers (text/ranges.py), and the
validation part can be written down (`recipe.yaml`) and measured again later.
"""

import codecs
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from lmcli.errors import UserError
from lmcli.storage import cache_folder, user_errors
from lmcli.text.answers import Posed, posed
from lmcli.text.fields import pair_of, row_labels, row_text
from lmcli.text.opening import open_bytes
from lmcli.text.ranges import Document, Documents
from lmcli.text.records import CHUNK_BYTES, SEPARATED, bad_record, cells, file_format, json_row, shown

SEPARATOR = b"<|endoftext|>"
PIECE_CHARS = 1 << 12  # the library takes a tenth longer a character for texts of 32,000
# Between these two characters every pattern we know to (GPT-2's, Qwen2's, Llama 3's) ends a word, so text cut here gives
# the same tokens as text in one go: after a single newline, before a single space between letters, and, for languages that
# write no spaces, before punctuation after a letter (of those that every version of Unicode has). Never before what may be
# a special token that takes the white space in front of it: [MASK], <mask>.
SAFE_CUT = re.compile(r"(?<=\S\n)(?=[^\s\[<])|(?<=[^\W\d_])(?= [^\W\d_])"
                      r"|(?<=[A-Za-zぁ-ゖァ-ヺ一-龥가-힣])(?=[,.;:!?，．。、；：！？])")


class Piece(NamedTuple):
    """Part of a document's text, cut where no token can span the cut; `last` on its last piece."""

    text: str
    document: Document
    last: bool


@dataclass
class Layout:
    """How files hold documents: `documents` is file, line or blank; `format` and `fields` as for records. Where rows
    must have labels too, `label` names their field, which holds one, or `several`. With `paired` the fields are a Pair, of
    which neither side may be empty; where the two `fields` are a context and a question about it, `answers` names the field
    of the answers. `skipped` and `empty` count the rows that were left out."""

    documents: str = "file"
    format: str = "auto"
    fields: tuple[str, ...] = ()
    on_error: str = "stop"
    label: str = ""
    several: bool = False
    paired: bool = False
    answers: str = ""
    skipped: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    _headers: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    def rows(self, file: str) -> bool:
        """Whether the file holds rows: JSON Lines, TSV or CSV."""
        return file_format(file, self.format) != "text"

    def first_row(self, files: list[str]) -> dict | None:
        """The first row of the first file that holds rows, or None; a row that cannot be read is passed over."""
        for file in filter(self.rows, files):
            with user_errors(file, "read"):
                for number, _, line in _lines(file, hashlib.sha256()):
                    if not (number == 1 and self._headed(file)):
                        with suppress(ValueError):
                            return self._row(file, line)
        return None

    def _headed(self, file: str) -> bool:
        return file_format(file, self.format) in SEPARATED

    def _row(self, file: str, line: bytes) -> dict:
        """The row on one line; ValueError when it is none."""
        if not self._headed(file):
            return json_row(line.decode("utf-8"))
        layout = file_format(file, self.format)
        if file not in self._headers:
            first = next((line for _, _, line in _lines(file, hashlib.sha256())), b"")
            self._headers[file] = cells(first.decode("utf-8"), layout)
        return dict(zip(self._headers[file], cells(line.decode("utf-8"), layout)))

    def labels_of(self, row: dict) -> tuple[str, ...]:
        """The labels of a row. ValueError when there is none."""
        return row_labels(row, self.label, self.several)

    def sides_of(self, row: dict) -> tuple[str, str]:
        """What is given and what is to follow, of a row that is a pair. ValueError when a field is missing."""
        return pair_of(self.fields).sides(row)

    def text_of(self, row: dict) -> str:
        """The text of a row, of a pair both sides. ValueError when it has none."""
        return pair_of(self.fields).between.join(self.sides_of(row)) if self.paired else row_text(row, self.fields)

    def posed(self, row: dict) -> Posed:
        """The question that a row poses. ValueError when it poses none."""
        return posed(row, *self.fields, self.answers)

    def survey(self, files: list[str]) -> tuple[Documents, dict[str, str]]:
        """(documents, SHA-256 of each file): every byte is read once and checked to be UTF-8. Blank documents are left out.

        Raises UserError naming file and line for invalid UTF-8, bad rows and a missing field, and for empty data.
        """
        hashes: dict[str, str] = {}
        documents = Documents.of(self._surveyed(files, hashes))
        if not documents:
            raise UserError("no text in it", where=", ".join(shown(file) for file in files[:3]),
                            hint="give a file with text, or pipe some in")
        return documents, hashes

    def find(self, files: Iterable[str]) -> Iterator[Document]:
        """The documents of `survey`, as they are found."""
        return self._surveyed(files, {})

    def _surveyed(self, files: Iterable[str], hashes: dict[str, str]) -> Iterator[Document]:
        """The documents as they are found; `hashes` gets the SHA-256 of each file that has been read."""
        for file in files:
            digest = hashlib.sha256()
            with user_errors(file, "read"):
                yield from self._survey_file(file, digest)
            hashes[file] = digest.hexdigest()

    def _survey_file(self, file: str, digest) -> Iterator[Document]:
        if self.rows(file):
            return self._rows(file, digest)
        if self.documents == "file":
            return self._parted(file, digest)
        return self._lines_or_paragraphs(file, digest)

    def _rows(self, file: str, digest) -> Iterator[Document]:
        for number, start, line in _lines(file, digest):
            if number == 1 and self._headed(file):
                continue
            try:
                row = self._row(file, line)
                sides = self.sides_of(row) if self.paired else (self.text_of(row),)
                if self.label:
                    self.labels_of(row)
                if self.answers:
                    self.posed(row)
            except ValueError as error:
                if self.on_error == "stop":
                    raise bad_record(error, file, number) from error
                self.skipped += 1
                continue
            if all(side.strip() for side in sides):
                yield Document(file, start, start + len(line))
            else:
                self.empty += 1

    def _lines_or_paragraphs(self, file: str, digest) -> Iterator[Document]:
        begin = end = None
        for number, start, line in _lines(file, digest):
            _check_utf8(line, file, number)
            if self.documents == "line" and line.strip():
                yield Document(file, start, start + len(line))
            elif self.documents == "blank" and line.strip():
                begin, end = start if begin is None else begin, start + len(line)
            elif begin is not None:
                yield Document(file, begin, end)
                begin = None
        if begin is not None:
            yield Document(file, begin, end)

    def _parted(self, file: str, digest) -> Iterator[Document]:
        """Ranges between <|endoftext|> marks; line ends right after a mark belong to the mark."""
        begin = position = 0
        held, blank, after_mark = b"", True, False
        for chunk in _checked_chunks(file, digest):
            held += chunk
            while True:
                if after_mark:  # perhaps still, when the line ends come with the next chunk
                    rest = held.lstrip(b"\r\n")
                    begin = position = position + len(held) - len(rest)
                    held, blank, after_mark = rest, True, not rest
                if (at := held.find(SEPARATOR)) < 0:
                    break
                if not (blank and not held[:at].strip()):
                    yield Document(file, begin, position + at)
                held, position, after_mark = held[at + len(SEPARATOR):], position + at + len(SEPARATOR), True
            keep = len(SEPARATOR) - 1
            blank = blank and not held[:-keep].strip()
            position += max(0, len(held) - keep)
            held = held[-keep:]
        if not (blank and not held.strip()):
            yield Document(file, begin, position + len(held))

    def pieces(self, documents: Iterable[Document]) -> Iterator[Piece]:
        """The text of the documents in their order, in pieces of some 4,000 characters."""
        for document, chunks in self._contents(documents):
            if self.rows(document.file):
                row = self._row(document.file, b"".join(chunks))
                chunks = [self.text_of(row).encode("utf-8")]
            yield from _cut(chunks, document)

    def sampled(self, documents: Documents, most: int) -> tuple[Iterator[str], int]:
        """(text of the documents, every how manieth piece of it): all of it, or pieces from all over it that take some
        `most` bytes, since whatever counts words holds each different one in memory."""
        every = max(1, -(-documents.bytes // most))
        return (piece.text for piece in islice(self.pieces(documents), 0, None, every)), every

    def raw_rows(self, documents: Iterable[Document]) -> Iterator[tuple[Document, dict]]:
        """Documents that are rows, each with its row, in their order."""
        return ((document, self._row(document.file, b"".join(chunks))) for document, chunks in self._contents(documents))

    def _contents(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Iterator[bytes]]]:
        """Each document with its bytes, which are to be read before the next one is asked for."""
        handle, file, position = None, None, 0
        try:
            for document in documents:
                with user_errors(document.file, "read"):
                    if document.file != file or document.start < position:
                        if handle:
                            handle.close()
                        handle, file, position = open_bytes(document.file), document.file, 0
                    if document.start != position:
                        handle.seek(document.start)
                    yield document, _exactly(handle, document)
                    position = document.end
        finally:
            if handle:
                handle.close()

    def text(self, document: Document) -> str:
        """The whole text of one document."""
        return "".join(piece.text for piece in self.pieces([document]))


def _checked_chunks(file: str, digest) -> Iterator[bytes]:
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 1
    with open_bytes(file) as handle:
        while True:
            chunk = handle.read(CHUNK_BYTES)
            digest.update(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                number = lines + error.object[:error.start].count(b"\n")
                raise UserError("invalid UTF-8", where=f"{shown(file)}, line {number}",
                                hint="only UTF-8 text can be read; iconv -f LATIN1 -t UTF-8 converts one") from error
            if not chunk:
                return
            lines += chunk.count(b"\n")
            yield chunk


def _lines(file: str, digest) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, line without its \\n)"""
    number, offset, parts = 0, 0, []
    with open_bytes(file) as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
            *whole, rest = chunk.split(b"\n")
            for line in whole:
                number += 1
                line = b"".join((*parts, line))
                yield number, offset, line
                offset, parts = offset + len(line) + 1, []
            parts.append(rest)
    if last := b"".join(parts):
        yield number + 1, offset, last


def _check_utf8(line: bytes, file: str, number: int) -> None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_record(error, file, number) from error


def _exactly(handle, document: Document) -> Iterator[bytes]:
    left = document.end - document.start
    while left:
        chunk = handle.read(min(CHUNK_BYTES, left))
        if not chunk:
            raise UserError("is shorter than when it was first read", where=document.file, hint="start again")
        left -= len(chunk)
        yield chunk


def _cut(chunks: Iterable[bytes], document: Document) -> Iterator[Piece]:
    decoder, held, searched = codecs.getincrementaldecoder("utf-8")(), "", 0
    for chunk in chunks:
        held += decoder.decode(chunk)
        start = 0
        while cut := SAFE_CUT.search(held, max(start + PIECE_CHARS, searched)):
            yield Piece(held[start:cut.start()], document, False)
            start = cut.start()
        held = held[start:]
        searched = max(0, len(held) - 1)  # a text without a cut is searched once, not once a chunk
    yield Piece(held + decoder.decode(b"", final=True), document, True)


def line_number(file: str, at: int) -> int:
    """The number of the line, counted from 1, that byte `at` of a file lies in."""
    lines = 1
    with user_errors(file, "read"), open_bytes(file) as handle:
        while at and (chunk := handle.read(min(CHUNK_BYTES, at))):
            lines, at = lines + chunk.count(b"\n"), at - len(chunk)
    return lines


def split(documents: Documents, layout: Layout) -> tuple[Documents, Documents]:
    """(training, validation): every tenth document when there are 20 or more, else the last 10 % of each, cut at a line end.

    A row cannot be cut: of fewer than 20 rows the last is held out. Raises UserError when nothing would
    be left on one side.
    """
    if len(documents) >= 20:
        return Documents.of(document for i, document in enumerate(documents) if i % 10 != 9), documents[9::10]
    training, validation = [], []
    whole = [document for document in documents if layout.rows(document.file)]
    for document in documents:
        if document in whole:
            (validation if document == whole[-1] and len(documents) > 1 else training).append(document)
            continue
        cut = _line_end(document, document.start + (document.end - document.start) * 9 // 10)
        training += [document._replace(end=cut)] if cut > document.start else []
        validation += [document._replace(start=cut)] if cut < document.end else []
    if not training or not validation:
        raise UserError("too little text to hold a tenth of it out", where=shown(documents[0].file),
                        hint="give more text, or --val FILE")
    return Documents.of(training), Documents.of(validation)


def limit(documents: Documents, layout: Layout, most: int) -> Documents:
    """The documents cut down to about `most` bytes, spread over all of them: each one's first part, or every k-th one.

    Of documents that differ much in size every k-th may still be too much: then texts give their first part as well.
    """
    total = documents.bytes
    if total <= most:
        return documents
    if len(documents) >= 20 or any(layout.rows(document.file) for document in documents):
        documents = documents[::-(-total // most)]
        total = documents.bytes
        if total <= 2 * most:
            return documents
    return Documents.of(_first_parts(documents, layout, most, total))


def _first_parts(documents: Documents, layout: Layout, most: int, total: int) -> Iterator[Document]:
    for document in documents:
        if layout.rows(document.file):
            yield document
            continue
        end = _line_end(document, document.start + (document.end - document.start) * most // total)
        if end > document.start:
            yield document._replace(end=end)


def _line_end(document: Document, at: int) -> int:
    """The first line end at or after byte `at`; in a text without one nearby, the next space, or the next character."""
    with open_bytes(document.file) as handle:
        handle.seek(at)
        text = handle.read(min(1 << 16, document.end - at))
    for mark in (b"\n", b" "):
        if 0 <= (found := text.find(mark)) < len(text) - 1:
            return at + found + 1
    continuation = next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))
    return at + continuation


def pin_stdin() -> str:
    """Copies standard input into the cache folder, named by its content, so that a run on it can be resumed."""
    with user_errors(cache_folder() / "stdin", "keep standard input"), open_bytes("-") as source:
        return pinned("stdin", ".txt", "keep standard input", iter(lambda: source.read(CHUNK_BYTES), b""))


def pinned(kind: str, suffix: str, doing: str, chunks: Iterable[bytes]) -> str:
    """A file in the cache's folder of this kind that holds these chunks, named by its content. UserError, which says what
    was `doing`, where that fails."""
    folder, digest = cache_folder() / kind, hashlib.sha256()
    part = folder / f".{os.getpid()}.part"
    with user_errors(folder, doing):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as out:
                for chunk in chunks:
                    digest.update(chunk)
                    out.write(chunk)
            target = folder / f"{digest.hexdigest()[:16]}{suffix}"
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return str(target)
