"""Packed rows of a corpus in an order that a position in it, one number, restores."""

import numpy as np


class PackedRows:
    """Rows of `context` + 1 ids for training: the beginning token (if there is one), then tokens of the corpus in a row.

    Reading the first `context` ids predicts the last `context`. An epoch cuts the corpus, taken as a ring, into rows
    from a random offset, so the cuts differ from epoch to epoch; rows come in a random order. Both follow from
    (seed, epoch) alone: row number `n` of the run is always the same row.
    """

    def __init__(self, ids: np.ndarray, context: int, beginning: int | None, seed: int):
        self.ids, self.context, self.beginning, self.seed = ids, context, beginning, seed
        # without a beginning token a row's first id is context only, so it takes one more from the corpus
        self.span = context if beginning is not None else context + 1
        self.rows_per_epoch = max(1, len(ids) // context)
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def batch(self, position: int, rows: int) -> np.ndarray:
        """(rows, context + 1) int64: rows number `position` to `position + rows` of the run."""
        return np.stack([self._row(position + i) for i in range(rows)])

    def _row(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._offset = int(generator.integers(len(self.ids)))
            self._epoch, self._order = epoch, generator.permutation(self.rows_per_epoch)
        start = (self._offset + int(self._order[index]) * self.context) % len(self.ids)
        row = self.ids[start:start + self.span]
        while len(row) < self.span:  # over the end of the ring
            row = np.concatenate([row, self.ids[:self.span - len(row)]])
        row = row.astype(np.int64)
        return row if self.beginning is None else np.concatenate([[self.beginning], row])
