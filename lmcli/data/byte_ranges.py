"""Documents as byte ranges of files, and lists of them that take little memory."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, overload

import numpy as np

from lmcli.storage import cache_folder, user_errors

BLOCK = 1 << 14  # documents that are converted at once
MAX_IN_MEMORY = 1 << 20  # documents, of 24 bytes each; a longer list is stored on disk


class Document(NamedTuple):
    """Bytes `start` to `end` of a file's content (decompressed). A row's range is its line."""

    file: str
    start: int
    end: int


class Documents(Sequence[Document]):
    """A list of documents, stored as numbers. Equal to any sequence of the same documents."""

    def __init__(self, files: list[str], table: np.ndarray):
        self.files, self.table = files, table  # (N, 4) int64: file, start, end, key

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """The list of these documents, which have one key unless they are Documents already.

        A list of over a million is mapped from an unnamed cache file. Raises UserError when that
        file cannot be written.
        """
        if isinstance(documents, cls):
            return documents
        return cls.keyed(((document, 0) for document in documents), 0)

    @classmethod
    def keyed(cls, documents: Iterable[tuple[Document, int]], seed: int) -> "Documents":
        """As `of`, for documents with a hash of their texts, of which and `seed` keys are made."""
        numbers: dict[str, int] = {}
        rows = (
            (numbers.setdefault(file, len(numbers)), start, end, key)
            for (file, start, end), key in documents
        )
        table = _stored(_row_blocks(rows, seed))  # fills `numbers`
        return cls(list(numbers), table)

    @classmethod
    def joined(cls, lists: Sequence["Documents"]) -> "Documents":
        """The documents of several lists, one list after the other, with their keys."""
        if len(lists) == 1:
            return lists[0]
        files = [file for documents in lists for file in documents.files]
        return cls(files, _stored(_joined_blocks(lists)))

    def select(self, chosen: np.ndarray) -> "Documents":
        """The documents where `chosen` (N,) is True."""
        pairs = zip(_blocks(self.table), _blocks(chosen))
        return Documents(self.files, _stored(block[mask] for block, mask in pairs))

    @property
    def keys(self) -> np.ndarray:
        """The keys of the documents, (N,) int64."""
        return self.table[:, 3]

    @property
    def bytes(self) -> int:
        """Total bytes of the ranges."""
        return int(self.table[:, 2].sum()) - int(self.table[:, 1].sum())

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Documents(self.files, self.table[index])
        file, start, end, _ = self.table[index].tolist()
        return Document(self.files[file], start, end)

    def __iter__(self) -> Iterator[Document]:
        for block in _blocks(self.table):
            for file, start, end, _ in block.tolist():
                yield Document(self.files[file], start, end)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # compared by content


@dataclass(frozen=True)
class DocumentLabels:
    """The labels of a list of documents: label `ids[i]` is one of document `documents[i]`.

    Both are (M,); a document may have several labels. Ids follow the order of the labels' names.
    """

    ids: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], ids: np.ndarray, counts: np.ndarray) -> "DocumentLabels":
        """`names` of the labels, the `ids` of all documents in order, `counts` for each of them."""
        rank = np.argsort(np.argsort(np.array(names, dtype=object)))
        return cls(rank[ids], np.repeat(np.arange(len(counts)), counts))


def _row_blocks(rows: Iterator[tuple[int, int, int, int]], seed: int) -> Iterator[np.ndarray]:
    while rows_ := list(islice(rows, BLOCK)):
        block = np.array(rows_, dtype=np.int64)
        block[:, 3] = random_numbers(block[:, 3], seed)
        yield block


def random_numbers(hashes: np.ndarray, seeds: int | np.ndarray) -> np.ndarray:
    """(N,) int64: SplitMix64 (Steele et al. 2014) of hashes, which it makes uniform."""
    with np.errstate(over="ignore"):
        steps = np.asarray(seeds).astype(np.uint64) + np.uint64(1)
        z = hashes.astype(np.uint64) + steps * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).view(np.int64)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))


def _joined_blocks(lists: Sequence[Documents]) -> Iterator[np.ndarray]:
    files = 0
    for documents in lists:
        for block in _blocks(documents.table):
            yield block + np.array([files, 0, 0, 0])
        files += len(documents.files)


def _stored(blocks: Iterator[np.ndarray]) -> np.ndarray:
    """The rows of all blocks, (N, 4) int64, in memory or, if they are many, mapped from disk."""
    tables: list[np.ndarray] = []
    size = 0
    while size < MAX_IN_MEMORY and (block := next(blocks, None)) is not None:
        tables.append(block)
        size += len(block)
    table = np.concatenate(tables) if tables else np.zeros((0, 4), dtype=np.int64)
    if len(table) < MAX_IN_MEMORY:
        return table
    with user_errors(cache_folder(), "write the token cache"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:  # /tmp may be memory itself
            file.write(table.tobytes())
            for block in blocks:
                file.write(block.tobytes())
            file.flush()
            return np.memmap(file, dtype=np.int64, mode="r").reshape(-1, 4)
