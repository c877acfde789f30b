"""Documents as byte ranges of files, and lists of them that take little memory however many they are."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, overload

import numpy as np

from lmcli.storage import cache_folder, user_errors

BLOCK = 1 << 14
MOST_IN_MEMORY = 1 << 20  # documents, of 24 bytes each; a longer list lies on disk


class Document(NamedTuple):
    """Bytes `start` to `end` of `file` (of its content, for a .gz). For JSON Lines the range is the row."""

    file: str
    start: int
    end: int


class Documents(Sequence[Document]):
    """A list of documents, kept as numbers: file, start, end. Equal to any sequence of the same documents."""

    def __init__(self, files: list[str], table: np.ndarray):
        self.files, self.table = files, table  # (N, 3) int64

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """The list of these documents, taken one by one. Past a million it lies in a file without a name in the cache's
        folder, mapped into memory; UserError when that cannot be written."""
        if isinstance(documents, cls):
            return documents
        numbers: dict[str, int] = {}
        rows = ((numbers.setdefault(document.file, len(numbers)), document.start, document.end) for document in documents)
        table = _table(rows)  # fills `numbers` on its way
        return cls(list(numbers), table)

    @property
    def bytes(self) -> int:
        """Bytes of their files that the documents take."""
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
        file, start, end = self.table[index].tolist()
        return Document(self.files[file], start, end)

    def __iter__(self) -> Iterator[Document]:
        for first in range(0, len(self.table), BLOCK):
            for file, start, end in self.table[first:first + BLOCK].tolist():
                yield Document(self.files[file], start, end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


def _table(rows: Iterator[tuple[int, int, int]]) -> np.ndarray:
    """(N, 3) int64; what is more than fits into memory well is mapped from disk."""
    blocks: list[np.ndarray] = []
    while len(blocks) * BLOCK < MOST_IN_MEMORY and (block := list(islice(rows, BLOCK))):
        blocks.append(np.array(block, dtype=np.int64))
    held = np.concatenate(blocks) if blocks else np.zeros((0, 3), dtype=np.int64)
    if len(held) < MOST_IN_MEMORY:
        return held
    with user_errors(cache_folder(), "write the token cache"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:  # /tmp may be memory itself
            file.write(held)
            while block := list(islice(rows, BLOCK)):
                file.write(np.array(block, dtype=np.int64))
            file.flush()
            return np.memmap(file, dtype=np.int64, mode="r").reshape(-1, 3)
