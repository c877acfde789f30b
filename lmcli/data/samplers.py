"""The order in which training reads spans of ids: shuffled, or of several corpora by weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# spans whose order is a list, of 8 bytes each; of more the order is computed span by span
MAX_SHUFFLED = 1 << 22
# rows in which every source has its share; more with a weight below a 32nd of all
MIXTURE_BLOCK = 64


class ShuffledSpans:
    """Spans of a corpus, read cyclically from a random offset and in a random order in each epoch.

    Both follow from (seed, epoch) alone: span `number` of a run is always the same span. Spans are
    `span` ids long and begin `stride` ids apart.
    """

    def __init__(self, ids: np.ndarray, stride: int, span: int, seed: int):
        self.ids, self.stride, self.span, self.seed = ids, stride, span, seed
        self.per_epoch = max(1, len(ids) // stride)
        self._epoch, self._offset = -1, 0
        self._permutation: Callable[[int], int] = int

    def start(self, number: int) -> int:
        """The position in the corpus where span `number` begins."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._offset = int(generator.integers(len(self.ids)))
            self._epoch, self._permutation = epoch, _permutation(self.per_epoch, generator)
        return (self._offset + int(self._permutation(index)) * self.stride) % len(self.ids)

    def take(self, number: int, count: int) -> np.ndarray:
        """Spans `number` to `number + count`, (count, span) int64."""
        rows = np.empty((count, self.span), dtype=np.int64)
        for i, row in enumerate(rows):
            start, filled = self.start(number + i), 0
            while filled < self.span:  # again from the beginning where the corpus ends
                ids = self.ids[start : start + self.span - filled]
                row[filled : filled + len(ids)] = ids
                start, filled = 0, filled + len(ids)
        return rows


def _permutation(count: int, generator: np.random.Generator) -> Callable[[int], int]:
    """A random permutation of 0 … count − 1, as a function of the index."""
    if count <= MAX_SHUFFLED:
        return generator.permutation(count).__getitem__
    keys = generator.integers(1 << 32, size=4).tolist()
    return lambda index: permute_index(index, count, keys)


def permute_index(index: int, count: int, keys: list[int]) -> int:
    """The image of `index` under a permutation of 0 … count − 1 that follows from `keys`.

    A Feistel network (Luby and Rackoff 1988) over the next even number of bits, repeated until the
    result is below `count`; nothing is stored.
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 32) & mask
        index = left << half | right
        if index < count:
            return index


@dataclass
class WeightedCorpora:
    """The ids of several corpora, whose spans are drawn in proportion to `weights`."""

    corpora: Sequence[np.ndarray]
    weights: Sequence[float]


class MixtureSampler:
    """Spans of several corpora in proportion to weights, in a random order.

    Among the first `block_size`, 2 × `block_size`, … spans every corpus has its share to within
    one span, and in each block to within two. Which corpus span `number` of a run is from, and
    which of its spans it is, follows from (seed, number) alone. An epoch has as many spans as all
    corpora together, though one of a large weight is read more than once by then.
    """

    def __init__(self, samplers: list[ShuffledSpans], weights: Sequence[float], seed: int):
        self.samplers, self.seed, self.span = samplers, seed, samplers[0].span
        self.per_epoch = sum(sampler.per_epoch for sampler in samplers)
        self._borders = np.cumsum(weights) / sum(weights)
        # at least two spans of each corpus, or rounding could leave one without any
        self.block_size = max(MIXTURE_BLOCK, math.ceil(2 * sum(weights) / min(weights)))
        # the block drawn last: spans of each corpus before it; corpus and rank of each span in it
        self._block, self._before = -1, [0]
        self._corpus_of, self._rank = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """(index of the corpus, number of the span in it) of span `number`."""
        at = self._draw_block(number)
        corpus = int(self._corpus_of[at])
        return corpus, self._before[corpus] + int(self._rank[at])

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` spans are from each corpus."""
        at = self._draw_block(number)
        drawn = self._corpus_of[:at]
        return [before + int((drawn == i).sum()) for i, before in enumerate(self._before)]

    def start(self, number: int) -> int:
        """The position where span `number` begins in the concatenation of all corpora."""
        corpus, index = self.locate(number)
        offset = sum(len(sampler.ids) for sampler in self.samplers[:corpus])
        return offset + self.samplers[corpus].start(index)

    def take(self, number: int, count: int) -> np.ndarray:
        """Spans `number` to `number + count`, (count, span) int64."""
        rows = np.empty((count, self.span), dtype=np.int64)
        for i in range(count):
            corpus, index = self.locate(number + i)
            rows[i] = self.samplers[corpus].take(index, 1)
        return rows

    def _draw_block(self, number: int) -> int:
        """Draws the block that contains span `number`; returns the span's index in the block."""
        block, at = divmod(number, self.block_size)
        if block != self._block:
            self._before = self._counts_before(block * self.block_size)
            after = self._counts_before((block + 1) * self.block_size)
            corpora = np.repeat(np.arange(len(self.samplers)), np.subtract(after, self._before))
            generator = np.random.default_rng((self.seed, 2, block))
            self._block, self._corpus_of = block, generator.permutation(corpora)
            self._rank = np.zeros(self.block_size, dtype=np.int64)
            for corpus in range(len(self.samplers)):
                chosen = self._corpus_of == corpus
                self._rank[chosen] = np.arange(chosen.sum())
        return at

    def _counts_before(self, number: int) -> list[int]:
        """Spans of each corpus before the block that begins at `number`; they sum to `number`."""
        ends = [0, *(int(number * border + 0.5) for border in self._borders[:-1].tolist()), number]
        return [end - start for start, end in pairwise(ends)]


def span_sampler(
    ids: np.ndarray | WeightedCorpora, stride: int, span: int, seed: int
) -> ShuffledSpans | MixtureSampler:
    """The sampler of one corpus or of several."""
    if not isinstance(ids, WeightedCorpora):
        return ShuffledSpans(ids, stride, span, seed)
    samplers = [
        ShuffledSpans(corpus, stride, span, seed + i) for i, corpus in enumerate(ids.corpora)
    ]
    return MixtureSampler(samplers, ids.weights, seed)
