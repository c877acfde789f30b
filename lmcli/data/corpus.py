"""Documents → token ids in one memory-mapped array, cached under a key of its content."""

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
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lmcli.config import TokenizerConfig
from lmcli.data.byte_ranges import Document, Documents
from lmcli.data.documents import DocumentFormat, Piece, read_pieces
from lmcli.data.samplers import WeightedCorpora
from lmcli.errors import UserError
from lmcli.storage import cached_resumable, write_text
from lmcli.terminal import progress
from lmcli.text.interruptible import DeadlineExceeded
from lmcli.text.splitting import PIECE_CHARS, in_batches
from lmcli.text.tokenizer import Encoded, Tokenizer, learn

# characters encoded at once: what the library returns takes a hundred times as much memory
CHARACTERS_AT_ONCE = 1 << 19
BATCHES_AT_ONCE = 2
# characters of training text at once for tokenizers that need it whole: 100 bytes for each
WHOLE_CHARACTERS = 1 << 20
# text to learn a vocabulary from: counting its words must not need memory that grows with the text
TOKENIZER_SAMPLE_BYTES = 1 << 26
LEARNING_SHARE = 0.25  # of the time that is left, to read that text
SAVE_BYTES = 1 << 26  # bytes of text after which a build saves its progress
NOTE_SECONDS = 30.0

Sha256 = bytes


@dataclass
class EncodedDocument:
    """One document's ids and the size of its text: UTF-8 bytes, characters, words (non-space runs).

    `digest` is the SHA-256 of the text. With `with_ends` there is also the text, and `ends`: the
    byte of the text where each token ends.
    """

    document: Document
    ids: np.ndarray
    bytes: int
    characters: int
    words: int
    digest: Sha256 = b""
    text: str = ""
    ends: np.ndarray | None = None


@dataclass
class Corpus:
    """The ids of all documents one after another, each ended by the eos id if there is one.

    `bytes` counts text only.
    """

    ids: np.ndarray
    documents: int
    bytes: int
    key: str

    @property
    def tokens(self) -> int:
        """Number of ids, eos included."""
        return len(self.ids)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.bytes / self.tokens

    def first_ids(self, count: int) -> np.ndarray:
        """The first ids, at most `count`."""
        return np.asarray(self.ids[:count])


@dataclass
class Mixture:
    """Several corpora, whose rows are drawn in proportion to `weights`."""

    corpora: list[Corpus]
    weights: list[float]

    @property
    def ids(self) -> WeightedCorpora:
        """The ids of all corpora."""
        return WeightedCorpora([corpus.ids for corpus in self.corpora], self.weights)

    @property
    def tokens(self) -> int:
        """Number of ids in all corpora."""
        return sum(corpus.tokens for corpus in self.corpora)

    @property
    def bytes(self) -> int:
        """Bytes of text in all corpora."""
        return sum(corpus.bytes for corpus in self.corpora)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the rows that are drawn."""
        pairs = zip(self.weights, self.corpora)
        total = sum(weight * corpus.bytes_per_token for weight, corpus in pairs)
        return total / sum(self.weights)

    def first_ids(self, count: int) -> np.ndarray:
        """At most `count` ids: the first of each corpus, in proportion to its weight."""
        shares = [weight / sum(self.weights) for weight in self.weights]
        parts = [each.first_ids(round(count * s)) for each, s in zip(self.corpora, shares)]
        return np.concatenate(parts)


def learn_tokenizer(
    documents: Documents,
    doc_format: DocumentFormat,
    config: TokenizerConfig,
    note: Callable[[str], None],
    shape: str = "decoder",
    deadline: float | None = None,
) -> Tokenizer:
    """Learns a tokenizer from documents; of a long text from a sample of its pieces.

    `note` gets the size of the sample, and of a vocabulary that the text is too small for. With a
    `deadline` (of `time.monotonic`) reading ends after a quarter of the time until then. Raises
    UserError when that is not enough.
    """
    size = documents.bytes
    stride = max(1, -(-size // TOKENIZER_SAMPLE_BYTES))
    pieces = _sampled(read_pieces(documents, doc_format), stride)
    if stride > 1:
        note(
            f"the vocabulary is learned from about {size / stride / 1e6:,.0f} of "
            f"{size / 1e6:,.0f} MB: one of every {stride:,} pieces of {PIECE_CHARS:,} characters"
        )
    texts: Iterator[str] = (piece.text for piece in pieces)
    if deadline is not None:
        texts = _until(
            texts, time.monotonic() + LEARNING_SHARE * (deadline - time.monotonic()), note
        )
    try:
        with progress.stage("learning a vocabulary", unit="bytes"):
            progress.inputs(documents.files)
            tokenizer = learn(texts, config, shape, deadline)
    except DeadlineExceeded:
        raise UserError(
            "the time was over before a vocabulary was learned",
            where="--time",
            hint="give more time, or a tokenizer with --tokenizer DIR",
        ) from None
    if tokenizer.size < config.vocab_size:
        note(f"the text has room for a vocabulary of {tokenizer.size:,}, not {config.vocab_size:,}")
    return tokenizer


def _sampled(pieces: Iterable[Piece], stride: int) -> Iterator[Piece]:
    """One of every `stride` pieces, by chance: a pattern in the text has no influence."""
    generator = np.random.default_rng(0)
    for i, piece in enumerate(pieces):
        if i % stride == 0:
            chosen = i + int(generator.integers(stride))
        if i == chosen:
            yield piece


def _until(texts: Iterable[str], end: float, note: Callable[[str], None]) -> Iterator[str]:
    """The texts that can be read until `end`, at least one."""
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if time.monotonic() > end:
            note(f"to save time the vocabulary is learned from the first {size:,} characters")
            return


# -- encoding


def encode_documents(
    documents: Iterable[Document],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    with_ends: bool = False,
) -> Iterator[EncodedDocument]:
    """The documents' ids, one document at a time, without its text in memory unless `with_ends`."""
    encoded = _encode_pieces(documents, doc_format, tokenizer, with_ends)
    for document, pieces in groupby(encoded, key=lambda encoded: encoded.piece.document):
        sizes, digest = np.zeros(3, dtype=np.int64), hashlib.sha256()
        ids, ends, texts = [], [], []
        for piece in pieces:
            if piece.ends is not None:
                ends.append(sizes[0] + np.asarray(piece.ends, dtype=np.int64))
                texts.append(piece.piece.text)
            ids.append(piece.ids)
            text = piece.piece.text
            sizes += (len(piece.data), len(text), len(text.split()))
            digest.update(piece.data)
        size, characters, words = map(int, sizes)
        yield EncodedDocument(
            document,
            np.concatenate(ids),
            size,
            characters,
            words,
            digest.digest(),
            "".join(texts),
            np.concatenate(ends) if with_ends else None,
        )


def encode_text(text: str, tokenizer: Tokenizer) -> EncodedDocument:
    """A text in memory as an encoded document without a file."""
    data = text.encode("utf-8")
    return EncodedDocument(
        Document("", 0, len(data)),
        np.asarray(tokenizer.encode(text), dtype=np.int32),
        len(data),
        len(text),
        len(text.split()),
        hashlib.sha256(data).digest(),
    )


class EncodedPiece(NamedTuple):
    """Part of a document: its UTF-8 bytes, ids and, if asked for, the bytes where tokens end."""

    piece: Piece
    data: bytes
    ids: np.ndarray
    ends: list[int] | None


def _encode_pieces(
    documents: Iterable[Document],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    with_ends: bool = False,
    dtype: Any = np.int32,
    max_characters: float = math.inf,
) -> Iterator[EncodedPiece]:
    """The pieces in order, some batches encoded ahead in threads while the caller works.

    A tokenizer that cannot encode pieces separately gets whole texts, up to `max_characters`.
    """
    pieces = read_pieces(documents, doc_format)
    if not tokenizer.split_safe:
        pieces = _join_pieces(pieces, max_characters)

    def encode(batch: list[Piece]) -> list[EncodedPiece]:
        texts = [piece.text for piece in batch]
        if with_ends:
            encoded = tokenizer.encode_with_ends(texts)
        else:
            encoded = [Encoded(ids, []) for ids in tokenizer.encode_batch(texts)]
        return [
            EncodedPiece(
                piece,
                piece.text.encode("utf-8"),
                np.asarray(ids, dtype=dtype),
                ends if with_ends else None,
            )
            for piece, (ids, ends) in zip(batch, encoded)
        ]

    batches = in_batches(pieces, CHARACTERS_AT_ONCE, lambda piece: len(piece.text))
    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        futures = _submit(pool, encode, batches)
        ahead = deque(islice(futures, BATCHES_AT_ONCE + 1))
        while ahead:
            encoded = ahead.popleft().result()
            ahead.extend(islice(futures, 1))
            yield from encoded


def _submit(
    pool: ThreadPoolExecutor,
    encode: Callable[[list[Piece]], list[EncodedPiece]],
    batches: Iterator[list[Piece]],
) -> Iterator[Future]:
    """A future for each batch. Errors in reading files are raised in input order."""
    try:
        for batch in batches:
            yield pool.submit(encode, batch)
    except UserError as error:
        failed: Future = Future()
        failed.set_exception(error)
        yield failed


def _join_pieces(pieces: Iterable[Piece], max_characters: float) -> Iterator[Piece]:
    """Each document as one piece; longer ones as pieces of about `max_characters`."""
    texts: list[str] = []
    size = file_bytes = 0
    for piece in pieces:
        texts.append(piece.text)
        size, file_bytes = size + len(piece.text), file_bytes + piece.size
        if piece.last or size >= max_characters:
            yield Piece("".join(texts), piece.document, piece.last, file_bytes)
            texts, size, file_bytes = [], 0, 0


# -- building a corpus


def build(
    documents: Sequence[Document],
    hashes: dict[str, str],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    eos: int | None,
    note: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """The corpus of these documents: from the cache, or built; an interrupted build is continued.

    hashes: the SHA-256 of each file's content. eos: the id that ends every document, or None.
    `note` gets the progress. Raises UserError when the cache folder cannot be written.
    """
    version = 1 if tokenizer.split_safe else (1, WHOLE_CHARACTERS)
    marks = () if doc_format.keep_marks else ("line ends are \\n",)
    settings = (version, tokenizer.hash, eos, doc_format.fields, doc_format.format, *marks)
    key = fingerprint(documents, hashes, settings)
    folder = cached_resumable(
        "corpus",
        key,
        lambda part: _write(part, documents, doc_format, tokenizer, eos, note),
        lambda: note("another process tokenizes the same text: waiting for it"),
    )
    facts = json.loads((folder / "facts.json").read_text())
    ids = np.zeros(0, np.uint16)
    if facts["tokens"]:  # an empty file cannot be mapped
        ids = np.memmap(folder / "ids", dtype=facts["dtype"], mode="r")
    return Corpus(ids, facts["documents"], facts["bytes"], key)


def id_type(tokenizer: Tokenizer) -> type:
    """The smallest integer type that holds the ids of a tokenizer."""
    return np.uint16 if tokenizer.size <= 1 << 16 else np.uint32


def fingerprint(documents: Sequence[Document], hashes: dict[str, str], settings: tuple) -> str:
    """A cache key of these documents in files with these hashes, and of settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for document in documents:
        digest.update(f"{hashes[document.file]} {document.start} {document.end}\n".encode())
    return digest.hexdigest()[:32]


@dataclass
class _Progress:
    """What is written: whole documents, bytes of the file of the next (`inside`), and totals."""

    documents: int = 0
    inside: int = 0
    tokens: int = 0
    bytes: int = 0


def _write(
    folder: Path,
    documents: Sequence[Document],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    eos: int | None,
    note: Callable[[str], None],
) -> None:
    dtype = np.dtype(id_type(tokenizer))
    eos_bytes = b"" if eos is None else np.asarray([eos], dtype=dtype).tobytes()
    done = _load_progress(folder, dtype.itemsize)
    if done.bytes:
        note(f"tokenizing continues after {done.bytes / 1e6:,.0f} MB, where it was interrupted")
    if not tokenizer.split_safe and any(
        document.end - document.start > WHOLE_CHARACTERS for document in documents
    ):
        note(
            "this tokenizer encodes texts whole, and longer ones in pieces of about "
            f"{WHOLE_CHARACTERS:,} characters"
        )
    saved_bytes = noted_bytes = done.bytes
    noted_at = time.monotonic()
    with (folder / "ids").open("ab") as out:
        out.truncate(done.tokens * dtype.itemsize)  # drops what was written after the last save
        rest = _remaining(documents, done)
        for piece, data, ids, _ in _encode_pieces(
            rest, doc_format, tokenizer, dtype=dtype, max_characters=WHOLE_CHARACTERS
        ):
            # append the ids
            out.write(ids.tobytes())
            done.tokens += len(ids)
            done.bytes += len(data)
            done.inside += piece.size
            if piece.last:
                out.write(eos_bytes)
                done.tokens += int(eos is not None)
                done.documents, done.inside = done.documents + 1, 0
            # save the progress: a row is not continued in its middle
            in_row = done.inside and doc_format.has_rows(piece.document.file)
            if done.bytes - saved_bytes >= SAVE_BYTES and not in_row:
                _save_progress(folder / "progress.json", done, out)
                saved_bytes = done.bytes
            if (seconds := time.monotonic() - noted_at) >= NOTE_SECONDS:
                rate = (done.bytes - noted_bytes) / seconds / 1e6
                note(f"{done.bytes / 1e6:,.0f} MB tokenized, {rate:.1f} MB/s")
                noted_at, noted_bytes = time.monotonic(), done.bytes
    (folder / "progress.json").unlink(missing_ok=True)
    facts = {
        "dtype": dtype.name,
        "tokens": done.tokens,
        "documents": done.documents,
        "bytes": done.bytes,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def _remaining(documents: Sequence[Document], done: _Progress) -> Iterator[Document]:
    """The documents that are not written yet, the first one from where its text continues."""
    for i, document in enumerate(documents[done.documents :]):
        yield document if i else document._replace(start=document.start + done.inside)


def _save_progress(file: Path, done: _Progress, ids: BinaryIO) -> None:
    """Saves how far a build is, once its ids are on the disk."""
    ids.flush()
    os.fsync(ids.fileno())
    write_text(file, json.dumps(asdict(done)))


def _load_progress(folder: Path, itemsize: int) -> _Progress:
    """How far an interrupted build is; nothing where its files do not fit together."""
    for incomplete in folder.glob(".progress.json.*"):
        incomplete.unlink()
    file, ids = folder / "progress.json", folder / "ids"
    done = _Progress(**json.loads(file.read_text())) if file.is_file() else _Progress()
    complete = ids.is_file() and ids.stat().st_size >= done.tokens * itemsize
    return done if complete else _Progress()
