"""Documents as byte ranges of files, and lists of them that take little memory."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
        self.files, self.table = files, table  # (N, 3) int64: file, start, end

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """The list of these documents. One of over a million is mapped from an unnamed cache file.

        Raises UserError when that file cannot be written.
        """
        if isinstance(documents, cls):
            return documents
        numbers: dict[str, int] = {}
        rows = (
            (numbers.setdefault(document.file, len(numbers)), document.start, document.end)
            for document in documents
        )
        table = _document_table(rows)  # fills `numbers`
        return cls(list(numbers), table)

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
        file, start, end = self.table[index].tolist()
        return Document(self.files[file], start, end)

    def __iter__(self) -> Iterator[Document]:
        for first in range(0, len(self.table), BLOCK):
            for file, start, end in self.table[first : first + BLOCK].tolist():
                yield Document(self.files[file], start, end)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # compared by content


def _document_table(rows: Iterator[tuple[int, int, int]]) -> np.ndarray:
    """(N, 3) int64, in memory or, for a long list, mapped from disk."""
    blocks: list[np.ndarray] = []
    while len(blocks) * BLOCK < MAX_IN_MEMORY and (block := list(islice(rows, BLOCK))):
        blocks.append(np.array(block, dtype=np.int64))
    table = np.concatenate(blocks) if blocks else np.zeros((0, 3), dtype=np.int64)
    if len(table) < MAX_IN_MEMORY:
        return table
    with user_errors(cache_folder(), "write the token cache"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:  # /tmp may be memory itself
            file.write(table.tobytes())
            while block := list(islice(rows, BLOCK)):
                file.write(np.array(block, dtype=np.int64).tobytes())
            file.flush()
            return np.memmap(file, dtype=np.int64, mode="r").reshape(-1, 3)
