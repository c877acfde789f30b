"""Rows of zeros and ones, of which only the ones are stored: counts of thousands of classes."""

import numpy as np


class SparseRows:
    """D rows of `width` columns; row d has ones in columns[starts[d] : starts[d + 1]]."""

    def __init__(self, columns: np.ndarray, starts: np.ndarray, width: int):
        self.columns, self.starts, self.width = columns, starts, width
        rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        order = np.argsort(columns, kind="stable")
        self._rows = rows[order]  # of the ones, by column
        self._used, self._firsts = np.unique(columns[order], return_index=True)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: np.ndarray) -> "SparseRows":
        """These rows (indices)."""
        sizes = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # the position of each one: where its row starts, and how far it is from there
        positions = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        return SparseRows(self.columns[positions], starts, self.width)

    def select(self, columns: np.ndarray) -> "SparseRows":
        """The rows with only these columns, in this order."""
        new_index = np.full(self.width, -1)
        new_index[columns] = np.arange(len(columns))
        new, rows = new_index[self.columns], np.repeat(np.arange(len(self)), np.diff(self.starts))
        selected = new >= 0
        sizes = np.bincount(rows[selected], minlength=len(self))
        return SparseRows(new[selected], np.concatenate([[0], np.cumsum(sizes)]), len(columns))

    def merged_empty(self) -> tuple["SparseRows", np.ndarray]:
        """The rows with one in place of all empty ones, and the new place of each row (D,)."""
        empty = np.diff(self.starts) == 0
        if not empty.any():
            return self, np.arange(len(self))
        nonempty = np.flatnonzero(~empty)
        new_index = np.full(len(self), len(nonempty))
        new_index[nonempty] = np.arange(len(nonempty))
        rows = self.take(nonempty)
        starts = np.append(rows.starts, rows.starts[-1])
        return SparseRows(rows.columns, starts, self.width), new_index

    def column(self, k: int) -> np.ndarray:
        """Column k (D,)."""
        at = np.searchsorted(self._used, k)
        values = np.zeros(len(self))
        if at < len(self._used) and self._used[at] == k:
            end = self._firsts[at + 1] if at + 1 < len(self._used) else len(self._rows)
            values[self._rows[self._firsts[at] : end]] = 1
        return values

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """weights (R, D) times the rows: (R, width) float64."""
        sums = np.zeros((len(weights), self.width))
        if len(self._used):
            # rows of memory are added, not columns
            ones = np.ascontiguousarray(weights.T)[self._rows]
            sums[:, self._used] = np.add.reduceat(ones, self._firsts, axis=0).T
        return sums


Rows = np.ndarray | SparseRows  # what records add to the sums (D, K)


def weighted(weights: np.ndarray, rows: Rows) -> np.ndarray:
    """weights (R, D) times rows (D, K): sums (R, K)."""
    return rows.weighted(weights) if isinstance(rows, SparseRows) else weights @ rows


def take(rows: Rows, indices: np.ndarray) -> Rows:
    """Some of the rows."""
    return rows.take(indices) if isinstance(rows, SparseRows) else rows[indices]
