"""What simple methods need for a text: gzip, and an n-gram model counted on training tokens."""

import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ORDER = 5
MOST_TOKENS = 500_000  # of training: about a second


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits for each UTF-8 byte of the texts, one after the other, as `gzip -9` compresses them."""
    data = "".join(texts).encode("utf-8", "replace")
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data) if data else math.nan


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length in a stream of tokens.

    `ids` number the n-gram that starts at each token. Of each number: `first` is where it starts
    first, `counts` are its counts in the training part. `total` and `types` are, of each number of
    the level below, the sum and the number of the counts of what follows.
    """

    ids: np.ndarray
    first: np.ndarray
    counts: np.ndarray
    total: np.ndarray
    types: np.ndarray

    @property
    def discount(self) -> float:
        """What is taken from each count (Ney, Essen & Kneser 1994): n1 / (n1 + 2 n2)."""
        once, twice = ((self.counts == count).sum() for count in (1, 2))
        return float(once / (once + 2 * twice)) if once and twice else 0.5


def ngram_logprobs(
    training: np.ndarray,
    documents: Sequence[np.ndarray],
    vocabulary: int,
    start: Sequence[int] = (),
    order: int = ORDER,
) -> list[np.ndarray]:
    """The natural logs of the probabilities of each document's tokens.

    An interpolated Kneser-Ney model (Chen & Goodman 1999, eq. 15 to 19) of `training`, one stream
    of tokens, whose lowest order is interpolated with 1 / `vocabulary`. Each document begins anew,
    after the tokens `start`; where fewer tokens are before a token, a lower order predicts it.
    """
    # training and documents in one stream, so that their n-grams have the same numbers
    documents = [np.concatenate([np.asarray(start), ids]).astype(np.int64) for ids in documents]
    stream = np.concatenate([np.asarray(training, np.int64), *documents])
    history = np.concatenate([np.arange(len(ids)) for ids in documents] or [np.zeros(0, int)])
    levels = _levels(stream, len(training), order)
    ends = np.arange(len(training), len(stream))
    probabilities = np.full(len(ends), 1.0 / vocabulary)
    for length, level in enumerate(levels, 1):
        known = np.flatnonzero(history >= length - 1)
        starts = ends[known] - length + 1
        grams = level.ids[starts]
        contexts = levels[length - 2].ids[starts] if length > 1 else np.zeros_like(starts)
        total, discount = level.total[contexts], level.discount
        seen, known = total > 0, known[total > 0]
        counts, total, types = level.counts[grams[seen]], total[seen], level.types[contexts[seen]]
        left_over = discount * types / total * probabilities[known]
        probabilities[known] = np.maximum(counts - discount, 0) / total + left_over
    sizes = np.cumsum([len(ids) for ids in documents])
    return [logs[len(start) :] for logs in np.split(np.log(probabilities), sizes[:-1])]


def _levels(stream: np.ndarray, trained: int, order: int) -> list[_Level]:
    """The n-grams of 1 to `order` tokens; counts are of the first `trained` tokens.

    All but the longest are counted by the number of different tokens before them.
    """
    base = int(stream.max(initial=0)) + 1
    numbered: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    ids = np.zeros(len(stream) + 1, np.int64)
    for length in range(1, order + 1):
        keys = ids[: max(0, len(stream) - length + 1)] * base + stream[length - 1 :]
        _, first, ids = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(ids[: max(0, trained - length + 1)], minlength=len(first))
        numbered.append((ids, first, counts))
    levels = []
    for length, (ids, first, counts) in enumerate(numbered, 1):
        if length < order:
            _, longer, longer_counts = numbered[length]
            after = ids[longer[longer_counts > 0] + 1]
            counts = np.bincount(after, minlength=len(first))
        below, size = np.zeros(len(first), np.int64), 1
        if length > 1:
            below, size = numbered[length - 2][0][first], len(numbered[length - 2][1])
        total = np.bincount(below, counts, size)
        types = np.bincount(below, counts > 0, size)
        levels.append(_Level(ids, first, counts, total, types))
    return levels
