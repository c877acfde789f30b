"""Documents → token ids in one memory-mapped array, kept in the cache under a key made of the content it came from."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from lmcli.storage import atomic_folder, cache_folder, user_errors
from lmcli.text.documents import Layout, Piece
from lmcli.text.ranges import Document
from lmcli.text.tokenizer import Encoded, Tokenizer

PIECES_AT_ONCE = 64


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


def encode_documents(documents: Iterable[Document], layout: Layout, tokenizer: Tokenizer,
                     placed: bool = False) -> Iterator[EncodedDocument]:
    """The documents' ids, one document at a time; a document's text need not be in memory at once, but `placed` keeps it."""
    for document, parts in groupby(_encoded_pieces(documents, layout, tokenizer, placed), key=lambda part: part[0].document):
        arrays, ends, texts, counts, digest = [], [], [], np.zeros(3, dtype=np.int64), hashlib.sha256()
        for piece, found in parts:
            data = piece.text.encode("utf-8")
            if placed:
                ends.append(counts[0] + np.asarray(found.ends, dtype=np.int64))
                texts.append(piece.text)
            arrays.append(np.asarray(found.ids if placed else found, dtype=np.int32))
            counts += (len(data), len(piece.text), len(piece.text.split()))
            digest.update(data)
        yield EncodedDocument(document, np.concatenate(arrays), *map(int, counts), digest.digest(), "".join(texts),
                              np.concatenate(ends) if placed else None)


def encode_text(text: str, tokenizer: Tokenizer) -> EncodedDocument:
    """One text in memory as a document that lies in no file."""
    data = text.encode("utf-8")
    return EncodedDocument(Document("", 0, len(data)), np.asarray(tokenizer.encode(text), dtype=np.int32), len(data),
                           len(text), len(text.split()), hashlib.sha256(data).digest())


def _encoded_pieces(documents: Iterable[Document], layout: Layout, tokenizer: Tokenizer,
                    placed: bool = False) -> Iterator[tuple[Piece, list[int] | Encoded]]:
    pieces = layout.pieces(documents)
    if not tokenizer.cuts_at_words:
        pieces = _whole(pieces)
    while batch := list(islice(pieces, PIECES_AT_ONCE)):
        encode = tokenizer.encode_with_ends if placed else tokenizer.encode_batch
        yield from zip(batch, encode([piece.text for piece in batch]))


def _whole(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for document, parts in groupby(pieces, key=lambda piece: piece.document):
        yield Piece("".join(part.text for part in parts), document, True)


def build(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
          end_of_text: int | None) -> Corpus:
    """The corpus of these documents, from the cache when it is there.

    `hashes` is the SHA-256 of each file's content; `end_of_text` closes every document (None: nothing does).
    Raises UserError when the cache folder cannot be written.
    """
    key = _key(documents, hashes, layout, tokenizer, end_of_text)
    folder = cache_folder() / "corpus" / key
    if not (folder / "facts.json").is_file():
        with user_errors(folder, "write the token cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as part:
            _write(part, documents, layout, tokenizer, end_of_text)
    facts = json.loads((folder / "facts.json").read_text())
    ids = np.memmap(folder / "ids", dtype=facts["dtype"], mode="r") if facts["tokens"] else np.zeros(0, np.uint16)
    return Corpus(ids, facts["documents"], facts["bytes"], key)


def _key(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
         end_of_text: int | None) -> str:
    digest = hashlib.sha256(repr((1, tokenizer.hash, end_of_text, layout.fields, layout.format)).encode())
    for document in documents:
        digest.update(f"{hashes[document.file]} {document.start} {document.end}\n".encode())
    return digest.hexdigest()[:32]


def _write(folder: Path, documents: Sequence[Document], layout: Layout, tokenizer: Tokenizer,
           end_of_text: int | None) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    closing = np.asarray([] if end_of_text is None else [end_of_text], dtype=dtype)
    tokens = count = size = 0
    with (folder / "ids").open("wb") as out:
        for piece, ids in _encoded_pieces(documents, layout, tokenizer):
            out.write(np.asarray(ids, dtype=dtype).tobytes())
            tokens, size = tokens + len(ids), size + len(piece.text.encode("utf-8"))
            if piece.last:
                out.write(closing.tobytes())
                tokens, count = tokens + len(closing), count + 1
    facts = {"dtype": np.dtype(dtype).name, "tokens": tokens, "documents": count, "bytes": size}
    (folder / "facts.json").write_text(json.dumps(facts))
