"""Token ids → batches, in an order that a position in it, one number, restores.

Three kinds of rows: packed ones cut from a corpus taken as a ring, the same with masks over some tokens, and examples
(source and target, or text and label) put together by length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

IGNORED = -100  # a target that nothing is to predict, as in transformers
MOST_SHUFFLED = 1 << 22  # spans whose order is a list, 8 bytes each; of more it is calculated one by one
MIXED_AT_ONCE = 64  # rows, or more with a weight below a 32nd of all, among which every source has its share
EXAMPLES_SORTED = 1 << 15  # so many examples are put together by length at a time


@dataclass
class Batch:
    """What one forward pass reads: `ids` (B, T) int64, `real` (B, T) bool or None where nothing is padding, and, for an
    encoder–decoder, `decoder_ids` (B, U). `targets`, int64, are what is to be predicted: for each position of the ids
    (of the decoder's, if there are any), or one a row; IGNORED where nothing is. Where a row may have several labels they
    are (B, labels) float32. With `firsts` (B, T) a position sees none before the one it names. `types` (B, T) int64 are
    token types. Where positions are to be predicted, the targets (B, 2) are those of start and end, `candidates` (B, T)
    bool those that may be."""

    ids: np.ndarray
    targets: np.ndarray
    real: np.ndarray | None = None
    decoder_ids: np.ndarray | None = None
    firsts: np.ndarray | None = None
    types: np.ndarray | None = None
    candidates: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Rows, or examples."""
        return len(self.ids)

    @property
    def count(self) -> int:
        """Targets to be predicted; the labels of a text are one."""
        return len(self.targets) if self.targets.dtype == np.float32 else int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens read, padding aside, and the target tokens of an encoder–decoder."""
        read = self.ids.size if self.real is None else int(self.real.sum())
        return read + (self.count if self.decoder_ids is not None else 0)

    @property
    def size(self) -> int:
        """Ids read, padding counted: what memory goes by."""
        return self.ids.size + (0 if self.decoder_ids is None else self.decoder_ids.size)


class Ring:
    """Spans of a corpus taken as a ring, cut anew each epoch from a random offset and drawn in a random order.

    Both follow from (seed, epoch) alone: span number `n` of a run is always the same span.
    """

    def __init__(self, ids: np.ndarray, stride: int, span: int, seed: int):
        self.ids, self.stride, self.span, self.seed = ids, stride, span, seed
        self.per_epoch = max(1, len(ids) // stride)
        self._epoch, self._offset, self._place = -1, 0, int

    def start(self, number: int) -> int:
        """Where span number `number` begins in the corpus."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._offset = int(generator.integers(len(self.ids)))
            self._epoch, self._place = epoch, _order(self.per_epoch, generator)
        return (self._offset + int(self._place(index)) * self.stride) % len(self.ids)

    def take(self, number: int, count: int) -> np.ndarray:
        """Spans number `number` to `number + count`, (count, span) int64."""
        rows = np.empty((count, self.span), dtype=np.int64)
        for i, row in enumerate(rows):
            start, filled = self.start(number + i), 0
            while filled < self.span:  # again where the ring begins anew
                part = self.ids[start:start + self.span - filled]
                row[filled:filled + len(part)] = part
                start, filled = 0, filled + len(part)
        return rows


def _order(count: int, generator: np.random.Generator) -> Callable[[int], int]:
    """Index → place in a random order of `count`."""
    if count <= MOST_SHUFFLED:
        return generator.permutation(count).__getitem__
    keys = generator.integers(1 << 32, size=4).tolist()
    return lambda index: scattered(index, count, keys)


def scattered(index: int, count: int, keys: list[int]) -> int:
    """Where `index` comes to in an order of 0 … `count` − 1 that follows from the keys and is nowhere kept: a Feistel
    network (Luby and Rackoff 1988) over the next even number of bits, gone through again until it is below `count`."""
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
class Weighted:
    """The ids of several corpora, whose rows are drawn in the proportion of `weights`."""

    parts: Sequence[np.ndarray]
    weights: Sequence[float]


class Rings:
    """Spans of several rings in the proportion of weights: of each `block` in a row every ring has its share, to within
    two, and of the first so many blocks to within one; in a random order.

    Which ring span number `n` of a run is of, and which of its spans it is, follows from (seed, n) alone. An epoch is as
    many spans as the rings have together, though a ring of a large weight is gone through more than once by then.
    """

    def __init__(self, rings: list[Ring], weights: Sequence[float], seed: int):
        self.rings, self.seed, self.span = rings, seed, rings[0].span
        self.per_epoch = sum(ring.per_epoch for ring in rings)
        self._borders = np.cumsum(weights) / sum(weights)
        # at least two of each, lest rounding takes one below none
        self.block = max(MIXED_AT_ONCE, math.ceil(2 * sum(weights) / min(weights)))
        self._loaded, self._before, self._of, self._rank = -1, [0], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def place(self, number: int) -> tuple[int, int]:
        """(ring, number of the span in it) of span number `number`."""
        at = self._load(number)
        ring = int(self._of[at])
        return ring, self._before[ring] + int(self._rank[at])

    def drawn(self, number: int) -> list[int]:
        """How many of the first `number` spans each ring has."""
        at = self._load(number)
        return [before + int((self._of[:at] == ring).sum()) for ring, before in enumerate(self._before)]

    def start(self, number: int) -> int:
        """Where span number `number` begins, in all corpora one after the other."""
        ring, index = self.place(number)
        return sum(len(one.ids) for one in self.rings[:ring]) + self.rings[ring].start(index)

    def take(self, number: int, count: int) -> np.ndarray:
        """Spans number `number` to `number + count`, (count, span) int64."""
        rows = np.empty((count, self.span), dtype=np.int64)
        for i in range(count):
            ring, index = self.place(number + i)
            rows[i] = self.rings[ring].take(index, 1)
        return rows

    def _load(self, number: int) -> int:
        """Draws the block that a span is in, and returns its place there."""
        block, at = divmod(number, self.block)
        if block != self._loaded:
            self._before, after = self._counts(block * self.block), self._counts((block + 1) * self.block)
            of = np.repeat(np.arange(len(self.rings)), np.subtract(after, self._before))
            self._of, self._loaded = np.random.default_rng((self.seed, 2, block)).permutation(of), block
            self._rank = np.zeros(self.block, dtype=np.int64)
            for ring in range(len(self.rings)):
                self._rank[self._of == ring] = np.arange((self._of == ring).sum())
        return at

    def _counts(self, number: int) -> list[int]:
        """Spans of each ring before the block that begins with `number`: shares rounded so that they add up to it."""
        ends = [0, *(int(number * border + 0.5) for border in self._borders[:-1].tolist()), number]
        return [end - start for start, end in pairwise(ends)]


def ring_of(ids: np.ndarray | Weighted, stride: int, span: int, seed: int) -> Ring | Rings:
    """The Ring of a corpus, or the Rings of several."""
    if isinstance(ids, Weighted):
        return Rings([Ring(part, stride, span, seed + i) for i, part in enumerate(ids.parts)], ids.weights, seed)
    return Ring(ids, stride, span, seed)


class PackedRows:
    """Rows of `context` + 1 ids for training a decoder: the beginning token (if there is one), then tokens in a row.

    Reading the first `context` ids predicts the last `context`. With the `closing` token of documents they are kept apart:
    a token sees those of its own document only.
    """

    def __init__(self, ids: np.ndarray | Weighted, context: int, beginning: int | None, seed: int,
                 closing: int | None = None):
        self.context, self.beginning, self.closing = context, beginning, closing
        # without a beginning token a row's first id is context only, so it takes one more from the corpus
        self.ring = ring_of(ids, context, context if beginning is not None else context + 1, seed)
        self.rows_per_epoch = self.ring.per_epoch

    def batch(self, position: int, rows: int) -> np.ndarray:
        """(rows, context + 1) int64: rows number `position` to `position + rows` of the run."""
        spans = self.ring.take(position, rows)
        if self.beginning is None:
            return spans
        return np.concatenate([np.full((rows, 1), self.beginning), spans], axis=1)

    def step(self, position: int, batch_tokens: int, most: int) -> list[Batch]:
        """The batches of one optimizer step of `batch_tokens`, none of them over `most` tokens (or one row)."""
        cut = (self.batch(start, rows) for start, rows in _parts(position, batch_tokens, most, self.context))
        return [Batch(rows[:, :-1], rows[:, 1:], firsts=self._firsts(rows[:, :-1])) for rows in cut]

    def _firsts(self, ids: np.ndarray) -> np.ndarray | None:
        """(B, T): where the document of each token begins; with a closing token that is the beginning one as well, there."""
        if self.closing is None:
            return None
        at = np.where(ids == self.closing, np.arange(ids.shape[1]) + int(self.closing != self.beginning), 0)
        if self.closing != self.beginning:  # a closing token is the last of its own document
            at = np.concatenate([np.zeros_like(at[:, :1]), at[:, :-1]], axis=1)
        return np.maximum.accumulate(at, axis=1)

    def places(self, position: int, rows: int) -> tuple[str, list[int]]:
        """("token", where in the corpus each of these rows begins)."""
        return "token", [self.ring.start(position + i) for i in range(rows)]


def _parts(position: int, batch_tokens: int, most: int, context: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each batch of a step."""
    rows, at_once = max(1, batch_tokens // context), max(1, most // context)
    for start in range(0, rows, at_once):
        yield position + start, min(at_once, rows - start)


@dataclass
class Masking:
    """Which tokens an encoder has to guess (Devlin et al. 2019, §3.1): `share` of all but the special ones; of those
    80 % are covered by the mask token, 10 % replaced by any token, 10 % left as they are."""

    mask: int
    vocab_size: int
    special: tuple[int, ...]
    share: float

    def apply(self, row: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(ids to read, targets) of a row of ids; one token at least is to be guessed."""
        chance, what = generator.random(len(row)), generator.random(len(row))
        chance[np.isin(row, self.special)] = 2.0
        chosen = chance < self.share
        if not chosen.any():
            chosen = chance == chance.min()
        other = generator.integers(self.vocab_size, size=len(row))
        read = np.where(chosen & (what < 0.8), self.mask, np.where(chosen & (what >= 0.9), other, row))
        return read, np.where(chosen, row, IGNORED)


class MaskedRows:
    """Rows of `context` ids for training an encoder: tokens in a row between what the template puts around a text."""

    def __init__(self, ids: np.ndarray | Weighted, context: int, around: tuple[list[int], list[int]], masking: Masking,
                 seed: int):
        self.context, self.around, self.masking, self.seed = context, around, masking, seed
        room = context - len(around[0]) - len(around[1])
        self.ring = ring_of(ids, room, room, seed)
        self.rows_per_epoch = self.ring.per_epoch

    def step(self, position: int, batch_tokens: int, most: int) -> list[Batch]:
        """The batches of one optimizer step of `batch_tokens`, none of them over `most` tokens (or one row)."""
        return [self._batch(self.ring.take(start, rows), start)
                for start, rows in _parts(position, batch_tokens, most, self.context)]

    def places(self, position: int, rows: int) -> tuple[str, list[int]]:
        """("token", where in the corpus each of these rows begins)."""
        return "token", [self.ring.start(position + i) for i in range(rows)]

    def in_order(self, ids: np.ndarray, most: int) -> Iterator[Batch]:
        """Other text, row by row, with masks that are always the same: to measure on. A last row too short is left out."""
        spans = [ids[i:i + self.ring.span].astype(np.int64) for i in range(0, len(ids), self.ring.span)]
        spans = [span for i, span in enumerate(spans) if len(span) == self.ring.span or not i]
        at_once = max(1, most // self.context)
        for start in range(0, len(spans), at_once):
            yield self._batch(spans[start:start + at_once], start)

    def _batch(self, spans: Sequence[np.ndarray], first: int) -> Batch:
        rows = [np.concatenate([self.around[0], span, self.around[1]]).astype(np.int64) for span in spans]
        pairs = [self.masking.apply(row, np.random.default_rng((self.seed, 1, first + i))) for i, row in enumerate(rows)]
        return Batch(np.stack([read for read, _ in pairs]), np.stack([targets for _, targets in pairs]))


class ExampleRows:
    """Examples in a random order, examples of like lengths together. `lengths` (N,) or (N, sides) counts each one's tokens,
    a side's by itself where sides are padded apart, and `make` turns numbers of examples into a Batch."""

    def __init__(self, lengths: np.ndarray, make: Callable[[np.ndarray], Batch], seed: int):
        self.lengths, self.make, self.seed = lengths.reshape(len(lengths), -1), make, seed
        self.rows_per_epoch = len(lengths)
        self._key, self._plan, self._starts = None, [], np.zeros(0, dtype=np.int64)

    def step(self, position: int, batch_tokens: int, most: int) -> list[Batch]:
        """The batches of the optimizer step that begins with example number `position` of the run: examples that fill
        `batch_tokens`, padding counted, none of the batches over `most` tokens (or one example)."""
        epoch, offset = divmod(position, self.rows_per_epoch)
        if self._key != (epoch, batch_tokens):
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(self.rows_per_epoch)
            pools = (order[i:i + EXAMPLES_SORTED] for i in range(0, len(order), EXAMPLES_SORTED))
            plan = [group for pool in pools for group in self._groups(pool, batch_tokens)]
            self._plan = [plan[i] for i in generator.permutation(len(plan))]
            self._starts = np.cumsum([0, *(len(group) for group in self._plan)])
            self._key = (epoch, batch_tokens)
        chosen = self._plan[int(np.searchsorted(self._starts, offset, side="right")) - 1]
        return [self.make(group) for group in self._groups(chosen, most)]

    def places(self, position: int, rows: int) -> tuple[str, list[int]]:
        """("example", the number in the training part of each of these rows, which are of the step taken last)."""
        offset = position % self.rows_per_epoch
        return "example", np.concatenate(self._plan)[offset:offset + rows].tolist()

    def in_order(self, most: int) -> Iterator[Batch]:
        """All examples once, longest first: to measure on."""
        return (self.make(group) for group in self._groups(np.arange(self.rows_per_epoch), most))

    def _groups(self, examples: np.ndarray, most: int) -> Iterator[np.ndarray]:
        first, last = self.lengths[examples].T[[0, -1]]
        # among sources of one length targets grow, among those of the next they shrink: where these meet they are alike
        ordered = examples[np.lexsort((np.where(first % 2, -last, last), -first))]
        start = 0
        while start < len(ordered):
            rows = max(1, most // max(1, int(self.lengths[ordered[start]].sum())))
            longest = np.maximum.accumulate(self.lengths[ordered[start:start + rows]]).sum(1)  # of one row, of two …
            rows = max(1, int((longest * np.arange(1, len(longest) + 1) <= most).sum()))
            yield ordered[start:start + rows]
            start += rows


def padded(rows: list[np.ndarray], value: int) -> np.ndarray:
    """(rows, longest) int64, each row filled up on the right with `value`."""
    whole = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        whole[i, :len(row)] = row
    return whole


def real_tokens(rows: list[np.ndarray]) -> np.ndarray | None:
    """(rows, longest) bool, True where `padded` put a token of the row; None where nothing had to be filled up."""
    lengths = np.array([len(row) for row in rows])
    return None if lengths.min() == lengths.max() else np.arange(lengths.max()) < lengths[:, None]
