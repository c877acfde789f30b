"""Documents → token ids in one memory-mapped array, kept in the cache under a key made of the content it came from."""

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lmcli.errors import UserError
from lmcli.storage import cached_in_steps, write_text
from lmcli.text.batches import Weighted
from lmcli.text.documents import Layout, Piece
from lmcli.text.ranges import Document
from lmcli.text.tokenizer import Encoded, Tokenizer

CHARACTERS_AT_ONCE = 1 << 19  # what the library tells of their tokens takes a hundred times as much memory, for a while
BATCHES_AT_ONCE = 2
WHOLE_CHARACTERS = 1 << 20  # of training text, for tokenizers that need it whole: encoding takes a hundred bytes for each
KEPT_EVERY = 1 << 26  # bytes of text after which a build is not begun again from before
TOLD_EVERY = 30.0  # seconds


@dataclass
class EncodedDocument:
    """One document's ids, and what its text counts: UTF-8 bytes, characters, words (runs of non-space); the SHA-256 of the
    text. With `placed` also the text and, for each token, the byte of it where the token ends."""

    document: Document
    ids: np.ndarray
    bytes: int
    characters: int
    words: int
    digest: bytes = b""
    text: str = ""
    ends: np.ndarray | None = None


@dataclass
class Corpus:
    """All documents one after another, each closed by the end-of-text token. `bytes` counts text only."""

    ids: np.ndarray
    documents: int
    bytes: int
    key: str

    @property
    def tokens(self) -> int:
        """Ids in the array, closing tokens included."""
        return len(self.ids)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for."""
        return self.bytes / self.tokens


@dataclass
class Mixture:
    """Several corpora to draw rows from in the proportion of `weights`."""

    parts: list[Corpus]
    weights: list[float]

    @property
    def ids(self) -> Weighted:
        """The ids of all."""
        return Weighted([part.ids for part in self.parts], self.weights)

    @property
    def tokens(self) -> int:
        """Ids of all."""
        return sum(part.tokens for part in self.parts)

    @property
    def bytes(self) -> int:
        """Text bytes of all."""
        return sum(part.bytes for part in self.parts)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token of the rows stands for, as they are drawn."""
        return sum(weight * part.bytes_per_token for weight, part in zip(self.weights, self.parts)) / sum(self.weights)


def encode_documents(documents: Iterable[Document], layout: Layout, tokenizer: Tokenizer,
                     placed: bool = False) -> Iterator[EncodedDocument]:
    """The documents' ids, one document at a time; a document's text need not be in memory at once, but `placed` keeps it."""
    encoded = _encoded_pieces(documents, layout, tokenizer, placed)
    for document, parts in groupby(encoded, key=lambda part: part.piece.document):
        arrays, ends, texts, counts, digest = [], [], [], np.zeros(3, dtype=np.int64), hashlib.sha256()
        for piece, data, ids, found in parts:
            if placed:
                ends.append(counts[0] + np.asarray(found.ends, dtype=np.int64))
                texts.append(piece.text)
            arrays.append(ids)
            counts += (len(data), len(piece.text), len(piece.text.split()))
            digest.update(data)
        yield EncodedDocument(document, np.concatenate(arrays), *map(int, counts), digest.digest(), "".join(texts),
                              np.concatenate(ends) if placed else None)


def encode_text(text: str, tokenizer: Tokenizer) -> EncodedDocument:
    """One text in memory as a document that lies in no file."""
    data = text.encode("utf-8")
    return EncodedDocument(Document("", 0, len(data)), np.asarray(tokenizer.encode(text), dtype=np.int32), len(data),
                           len(text), len(text.split()), hashlib.sha256(data).digest())


class EncodedPiece(NamedTuple):
    """Part of a document with its UTF-8 bytes, its ids and, where they were asked for, the tokens' ends."""

    piece: Piece
    data: bytes
    ids: np.ndarray
    found: Encoded | None


def _encoded_pieces(documents: Iterable[Document], layout: Layout, tokenizer: Tokenizer, placed: bool = False,
                    dtype: type = np.int32, most: float = math.inf) -> Iterator[EncodedPiece]:
    """The pieces in their order. Some batches are encoded ahead, in threads: the library works beside Python, so that
    reading, making arrays and whatever is done with a piece cost no time of their own.

    A tokenizer that needs texts whole gets stretches of `most` characters.
    """
    pieces = layout.pieces(documents)
    if not tokenizer.cuts_at_words:
        pieces = _whole(pieces, most)

    def encode(batch: list[Piece]) -> list[EncodedPiece]:
        texts = [piece.text for piece in batch]
        if placed:
            return [EncodedPiece(piece, piece.text.encode("utf-8"), np.asarray(found.ids, dtype=dtype), found)
                    for piece, found in zip(batch, tokenizer.encode_with_ends(texts))]
        return [EncodedPiece(piece, piece.text.encode("utf-8"), np.asarray(ids, dtype=dtype), None)
                for piece, ids in zip(batch, tokenizer.encode_batch(texts))]

    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        futures = _submitted(pool, encode, _batches(pieces))
        ahead = deque(islice(futures, BATCHES_AT_ONCE + 1))
        while ahead:
            encoded = ahead.popleft().result()
            ahead.extend(islice(futures, 1))
            yield from encoded


def _submitted(pool: ThreadPoolExecutor, encode: Callable[[list[Piece]], list[EncodedPiece]],
               batches: Iterator[list[Piece]]) -> Iterator[Future]:
    """The work on each batch. What is wrong with a file is told in its turn, after all that came before it."""
    try:
        for batch in batches:
            yield pool.submit(encode, batch)
    except UserError as error:
        failed: Future = Future()
        failed.set_exception(error)
        yield failed


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _whole(pieces: Iterable[Piece], most: float) -> Iterator[Piece]:
    """Documents as one piece, or as several, each with some `most` characters, where they are longer."""
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece.text)
        size += len(piece.text)
        if piece.last or size >= most:
            yield Piece("".join(parts), piece.document, piece.last)
            parts, size = [], 0


def build(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
          end_of_text: int | None, note: Callable[[str], None] = lambda text: None) -> Corpus:
    """The corpus of these documents, from the cache when it is there, else written, from where an interrupted build ended.

    `hashes` is the SHA-256 of each file's content; `end_of_text` closes every document (None: nothing does); `note` gets
    how far it is. Raises UserError when the cache folder cannot be written.
    """
    key = _key(documents, hashes, layout, tokenizer, end_of_text)
    folder = cached_in_steps("corpus", key, lambda part: _write(part, documents, layout, tokenizer, end_of_text, note),
                             lambda: note("another process tokenizes the same text: waiting for it"))
    facts = json.loads((folder / "facts.json").read_text())
    ids = np.memmap(folder / "ids", dtype=facts["dtype"], mode="r") if facts["tokens"] else np.zeros(0, np.uint16)
    return Corpus(ids, facts["documents"], facts["bytes"], key)


def _key(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
         end_of_text: int | None) -> str:
    version = 1 if tokenizer.cuts_at_words else (1, WHOLE_CHARACTERS)
    digest = hashlib.sha256(repr((version, tokenizer.hash, end_of_text, layout.fields, layout.format)).encode())
    for document in documents:
        digest.update(f"{hashes[document.file]} {document.start} {document.end}\n".encode())
    return digest.hexdigest()[:32]


@dataclass
class Written:
    """How far a build is: whole documents, text bytes of the one after them (its pieces end there), and what the ids
    written so far count."""

    documents: int = 0
    inside: int = 0
    tokens: int = 0
    bytes: int = 0


def _write(folder: Path, documents: Sequence[Document], layout: Layout, tokenizer: Tokenizer, end_of_text: int | None,
           note: Callable[[str], None]) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    closing = np.asarray([] if end_of_text is None else [end_of_text], dtype=dtype)
    done = _taken_up(folder, dtype.itemsize)
    if done.bytes:
        note(f"tokenizing goes on after {done.bytes / 1e6:,.0f} MB, where it was interrupted")
    if not tokenizer.cuts_at_words and any(part.end - part.start > WHOLE_CHARACTERS for part in documents):
        note(f"this tokenizer encodes texts whole, and longer ones in stretches of about {WHOLE_CHARACTERS:,} characters")
    kept, told, before = done.bytes, time.monotonic(), done.bytes
    with (folder / "ids").open("ab") as out:
        out.truncate(done.tokens * dtype.itemsize)  # what was written after the last note of how far it was
        left = _rest(documents, done)
        for piece, data, ids, _ in _encoded_pieces(left, layout, tokenizer, False, dtype, WHOLE_CHARACTERS):
            out.write(ids)
            done.tokens, done.bytes, done.inside = done.tokens + len(ids), done.bytes + len(data), done.inside + len(data)
            if piece.last:
                out.write(closing)
                done.tokens, done.documents, done.inside = done.tokens + len(closing), done.documents + 1, 0
            if done.bytes - kept >= KEPT_EVERY and not (done.inside and layout.rows(piece.document.file)):
                _keep(folder / "progress.json", done, out)
                kept = done.bytes
            if (passed := time.monotonic() - told) >= TOLD_EVERY:
                note(f"{done.bytes / 1e6:,.0f} MB tokenized, {(done.bytes - before) / passed / 1e6:.1f} MB/s")
                told, before = time.monotonic(), done.bytes
    (folder / "progress.json").unlink(missing_ok=True)
    facts = {"dtype": dtype.name, "tokens": done.tokens, "documents": done.documents, "bytes": done.bytes}
    (folder / "facts.json").write_text(json.dumps(facts))


def _rest(documents: Sequence[Document], done: Written) -> Iterator[Document]:
    """The documents that are not written yet, the first of them from where its text goes on."""
    for i, document in enumerate(documents[done.documents:]):
        yield document if i else document._replace(start=document.start + done.inside)


def _keep(file: Path, done: Written, ids: BinaryIO) -> None:
    """Writes down how far a build is, once its ids are on the disk."""
    ids.flush()
    os.fsync(ids.fileno())
    write_text(file, json.dumps(asdict(done)))


def _taken_up(folder: Path, itemsize: int) -> Written:
    """How far an interrupted build had come; nothing where that cannot be trusted."""
    for half in folder.glob(".progress.json.*"):
        half.unlink()
    file, ids = folder / "progress.json", folder / "ids"
    done = Written(**json.loads(file.read_text())) if file.is_file() else Written()
    whole = ids.is_file() and ids.stat().st_size >= done.tokens * itemsize
    return done if whole else Written()
