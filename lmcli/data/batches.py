"""Token ids → batches, in an order that one number, the position in the run, restores.

Three kinds of rows: spans of a corpus for a decoder (packed), the same with masked tokens for an
encoder, and examples (source and target, or text and label) grouped by length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmcli.data.examples import Examples, Texts
from lmcli.data.samplers import WeightedCorpora, span_sampler

IGNORED = -100  # a target without a loss, as in transformers
EXAMPLES_SORTED = 1 << 15  # examples that are sorted by length together


@dataclass
class Batch:
    """The input and the targets of one forward pass.

    ids: (B, T) int64. targets: int64, (B, T) for language modeling (of the decoder's positions if
    there are decoder_ids), IGNORED without a loss; (B,) labels; (B, labels) float32 if multi-label;
    (B, 2) first and last token of an answer. token_mask: (B, T) bool, False for padding; None
    without padding. decoder_ids: (B, U) int64. document_start: (B, T), the first position that each
    one attends to. types: (B, T) int64 token types. candidates: (B, T) bool, where an answer may
    begin or end.
    """

    ids: np.ndarray
    targets: np.ndarray
    token_mask: np.ndarray | None = None
    decoder_ids: np.ndarray | None = None
    document_start: np.ndarray | None = None
    types: np.ndarray | None = None
    candidates: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of targets with a loss; the labels of one text count once."""
        if self.targets.dtype == np.float32:
            return len(self.targets)
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens read, without padding, plus an encoder–decoder's target tokens."""
        read = self.ids.size if self.token_mask is None else int(self.token_mask.sum())
        return read + (self.count if self.decoder_ids is not None else 0)

    @property
    def size(self) -> int:
        """Ids read, padding included: what memory depends on."""
        return self.ids.size + (0 if self.decoder_ids is None else self.decoder_ids.size)


class _SpanRows:
    """Rows of `context` tokens, each made of one span of a corpus; `_batch` makes batches."""

    def __init__(
        self, ids: np.ndarray | WeightedCorpora, context: int, stride: int, span: int, seed: int
    ):
        self.context, self.seed = context, seed
        self.sampler = span_sampler(ids, stride, span, seed)
        self.rows_per_epoch = self.sampler.per_epoch

    def step(self, position: int, batch_tokens: int, max_tokens: int) -> list[Batch]:
        """The batches of a step of `batch_tokens`, each with at most `max_tokens` (or one row)."""
        end = position + max(1, batch_tokens // self.context)
        size = max(1, max_tokens // self.context)
        starts = range(position, end, size)
        return [self._batch(start, min(size, end - start)) for start in starts]

    def _batch(self, position: int, rows: int) -> Batch:
        raise NotImplementedError

    def locations(self, position: int, rows: int) -> tuple[str, list[int]]:
        """("token", where in the corpus each of these rows begins)."""
        return "token", [self.sampler.start(position + i) for i in range(rows)]


class PackedRows(_SpanRows):
    """Rows of `context` + 1 ids for training a decoder: `bos` (if there is one), then a span.

    The first `context` ids predict the last `context`. With the `eos` that ends documents a token
    attends to its own document only.
    """

    def __init__(
        self,
        ids: np.ndarray | WeightedCorpora,
        context: int,
        bos: int | None,
        seed: int,
        eos: int | None = None,
    ):
        self.bos, self.eos = bos, eos
        # without bos the first id of a row is input only, so the span has one more
        super().__init__(ids, context, context, context + int(bos is None), seed)

    def batch(self, position: int, rows: int) -> np.ndarray:
        """(rows, context + 1) int64: rows `position` to `position + rows` of the run."""
        ids = self.sampler.take(position, rows)
        if self.bos is None:
            return ids
        return np.concatenate([np.full((rows, 1), self.bos), ids], axis=1)

    def _batch(self, position: int, rows: int) -> Batch:
        ids = self.batch(position, rows)
        return Batch(ids[:, :-1], ids[:, 1:], document_start=self._document_start(ids[:, :-1]))

    def _document_start(self, ids: np.ndarray) -> np.ndarray | None:
        """(B, T): where the document of each token begins; an eos that is bos too begins one."""
        if self.eos is None:
            return None
        offset = int(self.eos != self.bos)
        start = np.where(ids == self.eos, np.arange(ids.shape[1]) + offset, 0)
        if offset:  # eos is the last token of its own document
            start = np.concatenate([np.zeros_like(start[:, :1]), start[:, :-1]], axis=1)
        return np.maximum.accumulate(start, axis=1)


@dataclass
class TokenMasking:
    """Masks tokens for an encoder to predict (Devlin et al. 2019, §3.1).

    A `share` of all but the special ids is predicted. Of these 80 % are replaced by the mask id,
    10 % by a random id, 10 % are left unchanged.
    """

    mask: int
    vocab_size: int
    special: tuple[int, ...]
    share: float

    def apply(
        self, row: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids to read, targets) of a row of ids, with one target at least."""
        chance, action = generator.random(len(row)), generator.random(len(row))
        chance[np.isin(row, self.special)] = 2.0
        chosen = chance < self.share
        if not chosen.any():
            chosen = chance == chance.min()
        random_ids = generator.integers(self.vocab_size, size=len(row))
        ids = np.where(chosen & (action >= 0.9), random_ids, row)
        ids = np.where(chosen & (action < 0.8), self.mask, ids)
        return ids, np.where(chosen, row, IGNORED)


class MaskedRows(_SpanRows):
    """Rows of `context` ids for training an encoder: a span between `prefix` and `suffix`."""

    def __init__(
        self,
        ids: np.ndarray | WeightedCorpora,
        context: int,
        template: tuple[list[int], list[int]],
        masking: TokenMasking,
        seed: int,
    ):
        self.masking, (self.prefix, self.suffix) = masking, template
        span = context - len(self.prefix) - len(self.suffix)
        super().__init__(ids, context, span, span, seed)

    def in_order(self, ids: np.ndarray, max_tokens: int) -> Iterator[Batch]:
        """Rows of validation text in order, with the same masks each time.

        A last row that is too short is left out, unless it is the only one.
        """
        size = self.sampler.span
        rows = [ids[i : i + size].astype(np.int64) for i in range(0, len(ids), size)]
        rows = [row for i, row in enumerate(rows) if len(row) == size or not i]
        rows_per_batch = max(1, max_tokens // self.context)
        for start in range(0, len(rows), rows_per_batch):
            yield self._masked(rows[start : start + rows_per_batch], start)

    def _batch(self, position: int, rows: int) -> Batch:
        return self._masked(self.sampler.take(position, rows), position)

    def _masked(self, rows: Sequence[np.ndarray] | np.ndarray, first: int) -> Batch:
        masked = []
        for number, row in enumerate(rows, first):
            ids = np.concatenate([self.prefix, row, self.suffix]).astype(np.int64)
            generator = np.random.default_rng((self.seed, 1, number))
            masked.append(self.masking.apply(ids, generator))
        ids, targets = map(np.stack, zip(*masked))
        return Batch(ids, targets)


class ExampleRows:
    """Examples in a random order, those of similar lengths in one batch.

    lengths: (N,) or (N, sides) tokens of each example; sides are padded separately. `make` turns
    indices of examples into a Batch.
    """

    def __init__(self, lengths: np.ndarray, make: Callable[[np.ndarray], Batch], seed: int):
        self.lengths, self.make, self.seed = lengths.reshape(len(lengths), -1), make, seed
        self.rows_per_epoch = len(lengths)
        # the groups of the current epoch, one a step, and the position where each begins
        self._key: tuple[int, int] | None = None
        self._groups: list[np.ndarray] = []
        self._starts = np.zeros(0, dtype=np.int64)

    def step(self, position: int, batch_tokens: int, max_tokens: int) -> list[Batch]:
        """The batches of the step that begins with example `position` of the run.

        They fill `batch_tokens`, padding included, each with at most `max_tokens` (or one example).
        """
        epoch, offset = divmod(position, self.rows_per_epoch)
        if self._key != (epoch, batch_tokens):
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(self.rows_per_epoch)
            pools = (order[i : i + EXAMPLES_SORTED] for i in range(0, len(order), EXAMPLES_SORTED))
            groups = [group for pool in pools for group in self._group(pool, batch_tokens)]
            self._groups = [groups[i] for i in generator.permutation(len(groups))]
            self._starts = np.cumsum([0, *(len(group) for group in self._groups)])
            self._key = (epoch, batch_tokens)
        chosen = self._groups[int(np.searchsorted(self._starts, offset, side="right")) - 1]
        return [self.make(group) for group in self._group(chosen, max_tokens)]

    def locations(self, position: int, rows: int) -> tuple[str, list[int]]:
        """("example", the index of each of these rows of the last step in the training set)."""
        offset = position % self.rows_per_epoch
        return "example", np.concatenate(self._groups)[offset : offset + rows].tolist()

    def in_order(self, max_tokens: int) -> Iterator[Batch]:
        """All examples once, longest first, for evaluation."""
        return (self.make(group) for group in self._group(np.arange(len(self.lengths)), max_tokens))

    def _group(self, examples: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
        first, last = self.lengths[examples].T[[0, -1]]
        # targets grow among sources of one length and shrink among those of the next, so that
        # neighbors are alike
        ordered = examples[np.lexsort((np.where(first % 2, -last, last), -first))]
        start = 0
        while start < len(ordered):
            rows = max(1, max_tokens // max(1, int(self.lengths[ordered[start]].sum())))
            # the padded length of 1, 2, … rows
            lengths = np.maximum.accumulate(self.lengths[ordered[start : start + rows]]).sum(1)
            rows = max(1, int((lengths * np.arange(1, len(lengths) + 1) <= max_tokens).sum()))
            yield ordered[start : start + rows]
            start += rows


def padded(rows: list[np.ndarray], value: int) -> np.ndarray:
    """(rows, longest) int64, each row filled up on the right with `value`."""
    array = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def token_mask(rows: list[np.ndarray]) -> np.ndarray | None:
    """(rows, longest) bool, False where `padded` filled up; None where it filled up nothing."""
    lengths = np.array([len(row) for row in rows])
    return None if lengths.min() == lengths.max() else np.arange(lengths.max()) < lengths[:, None]


def truncate_pair(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """A pair cut to `room` ids together: the end of the longer first, as in `tokenizers`."""
    short = min(len(first), len(second))
    if len(first) + len(second) <= room:
        return first, second
    if 2 * short <= room:
        rest = room - short
        return (first[:rest], second) if len(first) > short else (first, second[:rest])
    half, more = room // 2, room - room // 2
    if len(first) > len(second):
        return first[:more], second[:half]
    return first[:half], second[:more]


@dataclass(frozen=True)
class ExampleCollator:
    """Makes batches of examples: the template around a text, and special ids.

    An encoder–decoder's decoder reads `decoder_start` and the target; a decoder alone reads source
    and target `joined`. `eos` ends a target. `join_pair` puts a pair of texts into its template and
    returns (ids, token types).
    """

    prefix: list[int]
    suffix: list[int]
    context: int
    padding: int
    decoder_start: int = 0
    eos: int | None = None
    joined: bool = False
    join_pair: Callable[[list[int], list[int]], tuple[list[int], list[int]]] | None = None

    def source(self, ids: np.ndarray) -> np.ndarray:
        """A text inside its template, cut to the context."""
        room = self.context - len(self.prefix) - len(self.suffix)
        return np.concatenate([self.prefix, ids[:room], self.suffix]).astype(np.int64)

    def target(self, ids: np.ndarray) -> np.ndarray:
        """A target and `eos`, cut to the context."""
        if self.eos is None:
            return ids[: self.context].astype(np.int64)
        return np.concatenate([ids[: self.context - 1], [self.eos]]).astype(np.int64)

    def lengths(self, examples: Examples) -> np.ndarray:
        """Tokens of each example's sides within the context, (N, 1 or 2)."""
        return np.minimum(np.stack(self._full_lengths(examples), axis=1), self.context)

    def truncated_tokens(self, examples: Examples) -> np.ndarray:
        """(N,): tokens of each example that do not fit into the context."""
        return sum(np.maximum(side - self.context, 0) for side in self._full_lengths(examples))

    def _full_lengths(self, examples: Examples) -> tuple[np.ndarray, ...]:
        """Tokens of each side of each example, without a limit."""
        sources, targets = examples.sources.lengths, examples.targets
        if examples.masks:
            return (sources - 1,)
        if targets is None:
            return (sources + len(self.prefix) + len(self.suffix),)
        if examples.labels is not None:
            return (sources + targets.lengths + self._pair_template_length(),)
        ends = int(self.eos is not None)
        if self.joined:  # the last token is a target, not an input
            return (sources + len(self.prefix) + targets.lengths + ends - 1,)
        return (sources + len(self.prefix) + len(self.suffix), targets.lengths + ends)

    def _pair_template_length(self) -> int:
        assert self.join_pair is not None  # set wherever texts have labels
        return len(self.join_pair([], [])[0])

    def batch(self, examples: Examples, chosen: np.ndarray) -> Batch:
        """The Batch of the examples with these indices."""
        if examples.masks:
            rows = ((examples.sources[i], examples.masks[i]) for i in chosen)
            return self._next_tokens(rows)
        if examples.targets is None:
            batch = self._sources(examples, chosen)
            assert examples.labels is not None  # there is something to predict
            return replace(batch, targets=examples.labels[chosen])
        if examples.labels is not None:
            return self._pairs(examples, examples.targets, examples.labels[chosen], chosen)
        if self.joined:
            return self._joined(examples, examples.targets, chosen)
        targets = [self.target(examples.targets[i]) for i in chosen]
        inputs = [np.concatenate([[self.decoder_start], target[:-1]]) for target in targets]
        return replace(
            self._sources(examples, chosen),
            targets=padded(targets, IGNORED),
            decoder_ids=padded(inputs, self.padding),
        )

    def _sources(self, examples: Examples, chosen: np.ndarray) -> Batch:
        sources = [self.source(examples.sources[i]) for i in chosen]
        no_targets = np.zeros(0, dtype=np.int64)
        return Batch(padded(sources, self.padding), no_targets, token_mask(sources))

    def _pairs(
        self, examples: Examples, seconds: Texts, labels: np.ndarray, chosen: np.ndarray
    ) -> Batch:
        room = max(0, self.context - self._pair_template_length())
        assert self.join_pair is not None
        ids, types = [], []
        for i in chosen:
            pair = truncate_pair(examples.sources[i].tolist(), seconds[i].tolist(), room)
            row_ids, row_types = self.join_pair(*pair)
            ids.append(np.asarray(row_ids, dtype=np.int64))
            types.append(np.asarray(row_types, dtype=np.int64))
        return Batch(padded(ids, self.padding), labels, token_mask(ids), types=padded(types, 0))

    def _joined(self, examples: Examples, targets: Texts, chosen: np.ndarray) -> Batch:
        """Source and target in one row; the source loses its beginning where both do not fit."""
        rows = []
        for i in chosen:
            target = self.target(targets[i])
            room = self.context + 1 - len(self.prefix) - len(target)
            source = examples.sources[i][-room:] if room > 0 else np.zeros(0, dtype=np.int64)
            row = np.concatenate([self.prefix, source, target])
            rows.append((row, np.arange(len(row)) >= len(row) - len(target)))
        return self._next_tokens(rows)

    def _next_tokens(self, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """A Batch of rows of ids; masks say which are targets. Long ones lose their beginning."""
        inputs, labels = [], []
        for ids, is_target in rows:
            row = ids[-self.context - 1 :].astype(np.int64)
            inputs.append(row[:-1])
            labels.append(np.where(is_target[-self.context - 1 :], row, IGNORED)[1:])
        return Batch(padded(inputs, self.padding), padded(labels, IGNORED), token_mask(inputs))


def unigram_entropy(targets: Iterator[np.ndarray]) -> float:
    """The entropy of single targets in nats: the loss of a model that knows their counts only.

    Multi-label targets, (N, labels) float32, have the sum of the entropies of all labels.
    """
    counts, rows = np.zeros(0, dtype=np.int64), 0
    for batch in targets:
        if batch.dtype == np.float32:  # multi-label
            rows += len(batch)
            new = batch.sum(0).astype(np.int64)
        else:
            new = np.bincount(batch[batch != IGNORED])
        size = max(len(new), len(counts))
        counts = np.pad(counts, (0, size - len(counts))) + np.pad(new, (0, size - len(new)))
    if rows:
        shares = np.stack([counts, rows - counts]) / rows
    else:
        shares = counts[None] / max(1, counts.sum())
    return float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum())
