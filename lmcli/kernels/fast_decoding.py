"""Sequences token by token through a decoder in C: the fast twin of `model.cached_forward`.

One call of decode_step.c takes rows of tokens through all layers. It reads no padding, and the
numbers of a sequence do not depend on the other sequences, to the bit. Nothing here loads torch.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcli.kernels.decode_step import (
    WEIGHT_GROUP,
    Array,
    DecoderWeights,
    Integers,
    _Call,
    _Model,
    _Rows,
    float_array,
    forward,
    zeros,
)
from lmcli.kernels.processor import thread_count

QUERIES = 16  # of one head that are attended together, at most, as in decode_step.c
LANES = 16  # keys that lie together; tokens of a cache are a multiple of this
ALIGN = 64  # rows of activations are padded with zeros to a multiple of this, as in decode_step.c
TOKENS_AT_ONCE = 192  # most tokens of a call: prompts are read in blocks of this size
# tokens that a new cache has room for beyond the longest sequence, or half as many as that has
SPARE_TOKENS = 64


class CrossHeads(NamedTuple):
    """Keys and values of the encoder's output in every layer, for each different source."""

    # for each layer; S is a multiple of LANES
    keys: list[Array]  # (sources, K, S / LANES, D, LANES), see `in_blocks`
    values: list[Array]  # (sources, K, S, D)
    lengths: Integers  # (sources,)
    rows: Integers  # (B,): the source of each sequence

    @property
    def longest(self) -> int:
        """Tokens of the longest source."""
        return self.values[0].shape[2]

    def joined(self, chosen: Integers, others: "CrossHeads") -> "CrossHeads":
        """The `chosen` sources, then others; `rows` are those of the others, among all."""
        keys, values = (
            [_stacked(mine[chosen], theirs) for mine, theirs in zip(*pair)]
            for pair in ((self.keys, others.keys), (self.values, others.values))
        )
        lengths = np.concatenate([self.lengths[chosen], others.lengths])
        return CrossHeads(keys, values, lengths, len(chosen) + others.rows)


class FastDecodingState:
    """Sequences, their key–value cache and the `logits` (B, V) of their next token.

    An encoder–decoder reads the `sources`. At most `capacity` tokens of a sequence are read; then
    the state is `full`.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        sequences: list[list[int]],
        capacity: int,
        sources: CrossHeads | None = None,
        encode: Callable[[list[list[int]]], CrossHeads] | None = None,
    ):
        self.config, self.weights, self.capacity = weights.config, weights, capacity
        # this state's own copy, for the pointers to its cache
        self._layers = type(self.weights.layers).from_buffer_copy(self.weights.layers)
        self._model = _Model.from_buffer_copy(self.weights.model)
        self._model.layer = ctypes.addressof(self._layers)
        self._encode, self._source_of = encode, np.zeros(len(sequences), np.int64)
        self._sources = sources
        if sources is not None:
            self._set_sources(sources)
            self._source_of = sources.rows
        self._lengths = np.zeros(0, np.int64)  # tokens read of each sequence
        self._slots = np.zeros(0, np.int64)  # its place in the cache
        self._scratch: dict[str, NDArray[Any]] = {}
        # the cache: float32, or the bits of bfloat16 where the weights have no more precision
        self._model.cache_type = int(weights.weight_type != "float32")
        cache_type = np.uint16 if self._model.cache_type else np.float32
        self._keys: NDArray[Any] = np.zeros((0, 0, 0, 0, 0, LANES), cache_type)
        self._values: NDArray[Any] = np.zeros((0, 0, 0, 0, 0), cache_type)
        self.logits: Array
        self.extend(np.zeros(0, np.int64), sequences, capacity)

    @property
    def length(self) -> int:
        """Tokens read of the longest sequence."""
        return int(self._lengths.max())

    @property
    def _room(self) -> int:
        """Tokens that the cache has room for, of each sequence."""
        return int(self._values.shape[3])

    @property
    def full(self) -> bool:
        """True if no further token can be added."""
        return self.length == self.capacity

    def add(self, tokens: Integers) -> None:
        """Reads one more token (B,) of each sequence."""
        self.extend(tokens, [], 0)

    def extend(
        self,
        tokens: Integers,
        sequences: list[list[int]],
        capacity: int,
        sources: list[int] | None = None,
    ) -> None:
        """Reads one more token (B,) of each sequence, and new ones, which become the last rows.

        At most `capacity` tokens of a new one are read. `sources` are numbers of `read_sources`.
        """
        self.capacity = max(self.capacity, capacity)
        old = len(self._slots)
        if self._sources is None:
            self._source_of = np.zeros(old + len(sequences), np.int64)
        elif sources:
            self._source_of = np.concatenate([self._source_of, np.array(sources, np.int64)])
        self._reserve(sequences)
        counts = np.array([1] * old + [len(sequence) for sequence in sequences], np.int64)
        starts = np.concatenate([self._lengths, np.zeros(len(sequences), np.int64)])
        new = (np.array(sequence, np.int64) for sequence in sequences)
        self._lengths = starts + counts
        self.logits = self._read(np.concatenate([tokens, *new]), starts, counts)

    def read_sources(self, sources: list[list[int]]) -> list[int]:
        """Encodes the sources of sequences that will enter, equal ones once; returns their numbers.

        What no present sequence reads is forgotten.
        """
        assert self._sources is not None and self._encode is not None
        used, self._source_of = np.unique(self._source_of, return_inverse=True)
        self._sources = self._sources.joined(used, self._encode(sources))
        self._set_sources(self._sources)
        return self._sources.rows.tolist()

    def look_ahead(self, tokens: Integers) -> Array:
        """The logits (N, V) after each of N more tokens of the only sequence.

        `accept` must follow: only then the sequence has the first of them.
        """
        self._reserve([], len(tokens))
        rows = np.arange(len(tokens))
        positions = self._lengths + rows
        self.logits = self._forward(tokens, np.zeros_like(rows), positions, rows)
        return self.logits

    def accept(self, count: int) -> None:
        """Adds the first tokens that `look_ahead` has read, at least one."""
        self._lengths = self._lengths + count
        self.logits = self.logits[count - 1 : count]

    def keep(self, rows: Integers) -> None:
        """Selects, reorders or repeats sequences (B', int64)."""
        self._lengths, self._source_of = self._lengths[rows], self._source_of[rows]
        self._slots, self.logits = self._slots[rows], self.logits[rows]
        if len(np.unique(self._slots)) < len(self._slots):  # a repeated one needs its own place
            self._move(len(rows), self._room)

    def reorder(self, rows: Integers, newest: int) -> None:
        """Reorders rows (B, int64) of sequences that differ in their `newest` tokens at most.

        These are the beams of a prompt: its rows lie together. Only tokens of a sequence that is
        repeated are copied, to the place of one that is not among `rows`.
        """
        repeated = np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])
        dropped = np.setdiff1d(np.arange(len(rows)), rows)  # as many of each prompt
        before_end = np.arange(-newest, 0)
        to, origin = (
            (self._slots[each, None], self._lengths[each, None] + before_end)
            for each in (dropped, rows[repeated])
        )
        slots = self._slots[rows]
        slots[repeated] = self._slots[dropped]
        self._slots = slots
        keys, values = self._keys, self._values
        values[:, to[0], :, to[1]] = values[:, origin[0], :, origin[1]]
        (block, token), (old_block, old_token) = (
            divmod(tokens, LANES) for _, tokens in (to, origin)
        )
        keys[:, to[0], :, block, :, token] = keys[:, origin[0], :, old_block, :, old_token]

    def _read(self, tokens: Integers, starts: Integers, counts: Integers) -> Array:
        """Reads the next `counts` tokens of all sequences in blocks; the logits after the last."""
        rows = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(counts)
        positions = np.arange(len(tokens)) + np.repeat(starts - ends + counts, counts)
        size = max(TOKENS_AT_ONCE, len(counts))
        if len(tokens) <= size:
            return self._forward(tokens, rows, positions, ends - 1)
        logits = np.empty((len(counts), self.config.vocab_size), np.float32)
        for start in range(0, len(tokens), size):
            block = slice(start, start + size)
            ending = np.nonzero((ends > start) & (ends <= start + size))[0]
            logits[ending] = self._forward(
                tokens[block], rows[block], positions[block], ends[ending] - 1 - start
            )
        return logits

    def _forward(
        self, tokens: Integers, rows: Integers, positions: Integers, logit_rows: Integers
    ) -> Array:
        """Logits (n, V) after n of N tokens; a token belongs to a sequence and has a position."""
        logits = np.empty((len(logit_rows), self.config.vocab_size), np.float32)
        sources = self._source_of[rows]
        arrays: dict[str, NDArray[Any]] = {
            "slot": self._slots[rows],
            "position": np.ascontiguousarray(positions),
            "source": sources,
            "logit_row": np.ascontiguousarray(logit_rows),
            "x": self._embed(tokens, positions),
            "logits": logits,
            **self._rotary(positions),
        }
        if self._sources is not None:
            arrays["source_length"] = self._sources.lengths[sources]
        scratch = self._buffers(len(tokens))
        forward(
            self._model,
            _Call(
                rows=len(tokens),
                logit_rows=len(logit_rows),
                longest=scratch["scores"].shape[2],
                **{name: values.ctypes.data for name, values in arrays.items()},
                **{name: scratch[name].ctypes.data for name in ("key", "value", "scores", "part")},
                **{name: _rows(scratch, name) for name in ("normed", "query", "mixed", "inner")},
            ),
        )
        return logits

    def _embed(self, tokens: Integers, positions: Integers) -> Array:
        """Embeddings of tokens and positions, (N, C) float32."""
        config, weights = self.config, self.weights
        x = float_array(weights.embedding[tokens])
        if config.scale_embedding:
            x = x * np.float32(config.hidden_size**0.5)
        if weights.positions is not None:
            x = x + weights.positions[positions + config.position_offset]
        if weights.finish_embedding is not None:
            x = weights.finish_embedding(x, positions)
        return np.ascontiguousarray(x)

    def _rotary(self, positions: Integers) -> dict[str, Array]:
        """cos and sin (N, R/2) of the positions, for layers with full and with local attention."""
        tables = {}
        for prefix, (frequencies, factor) in self.weights.rotary.items():
            angles = positions[:, None].astype(np.float32) * frequencies
            tables[f"{prefix}cos"] = np.cos(angles) * factor
            tables[f"{prefix}sin"] = np.sin(angles) * factor
        return tables

    def _buffers(self, count: int) -> dict[str, NDArray[Any]]:
        """Arrays for intermediate results of `count` tokens or more; their rows' padding is 0."""
        config = self.config
        longest = max(self._room, self._sources.longest if self._sources else 0)
        threads, scratch = thread_count(), self._scratch
        scores = scratch["scores"].shape if scratch else (0, 0, 0)
        if scores[0] < threads or scores[2] < longest or len(scratch["key"]) < count:
            key_width = config.num_key_value_heads * config.head_dim
            width = config.num_attention_heads * config.head_dim
            self._scratch = scratch = {
                "key": np.empty((count, key_width), np.float32),
                "value": np.empty((count, key_width), np.float32),
                "scores": np.empty((threads, QUERIES, longest), np.float32),
                "part": np.empty((threads, LANES, config.head_dim), np.float32),
            }
            sizes = {"normed": config.hidden_size, "query": width, "mixed": width}
            for name, size in {**sizes, "inner": config.intermediate_size}.items():
                stride = -(-size // ALIGN) * ALIGN
                rows = 2 * count if name == "inner" else count  # the rows of the gate follow
                scratch[name] = zeros((rows, stride), np.float32)
                if self.weights.weight_type == "float32":
                    continue
                padded = -(-count // 32) * 32  # a product with AMX reads 32 rows
                # int8 leaves half of it unused
                scratch[f"{name}_packed"] = zeros((padded, stride), np.uint16)
                for kind in ("scales", "offsets"):
                    scratch[f"{name}_{kind}"] = zeros((padded, stride // WEIGHT_GROUP), np.float32)
        return scratch

    def _allocate(self, slots: int, capacity: int) -> None:
        """A new cache for `capacity` tokens of each slot, or up to LANES more."""
        config, blocks, dtype = self.config, -(-capacity // LANES), self._keys.dtype
        heads = config.num_hidden_layers, slots, config.num_key_value_heads
        self._keys = zeros((*heads, blocks, config.head_dim, LANES), dtype)
        self._values = zeros((*heads, blocks * LANES, config.head_dim), dtype)
        capacity = self._room
        for layer, keys, values in zip(self._layers, self._keys, self._values):
            layer.keys, layer.values = keys.ctypes.data, values.ctypes.data
        self._model.capacity = capacity
        if self.weights.relative_bias is not None:
            self._relative = self.weights.relative_bias(capacity)
            self._model.relative = self._relative.ctypes.data

    def _reserve(self, sequences: list[list[int]], more: int = 1) -> None:
        """Finds places for new sequences and for `more` tokens of the others.

        If there is no room, a new cache takes those that are read: its size is by the present
        number and lengths, not by those before.
        """
        slots, room = self._keys.shape[1], self._room
        old, count = len(self._slots), len(self._slots) + len(sequences)
        longest = max([*(self._lengths + more).tolist(), *map(len, sequences)])
        if count > slots or longest > room:
            room = longest + max(SPARE_TOKENS, longest // 2)
            self._move(max(count, 3 * old // 2) if count > slots else count, room)
        if sequences:
            free = np.setdiff1d(np.arange(self._keys.shape[1]), self._slots)
            self._slots = np.concatenate([self._slots, free[: len(sequences)]])

    def _move(self, slots: int, room: int) -> None:
        """Copies all sequences to a new cache, in the order of the rows."""
        (keys, values), places = (self._keys, self._values), self._slots
        self._allocate(slots, min(self.capacity, room))
        for row, (old_slot, length) in enumerate(zip(places, self._lengths)):
            blocks = -(-length // LANES)
            self._keys[:, row, :, :blocks] = keys[:, old_slot, :, :blocks]
            self._values[:, row, :, :length] = values[:, old_slot, :, :length]
        self._slots = np.arange(len(places))

    def _set_sources(self, sources: CrossHeads) -> None:
        self._model.cross_capacity = sources.longest
        for layer, keys, values in zip(self._layers, sources.keys, sources.values):
            layer.cross_keys, layer.cross_values = keys.ctypes.data, values.ctypes.data


def _stacked(first: Array, second: Array) -> Array:
    """Both arrays (sources, K, S, …) in one, with zeros after what is shorter."""
    shape = len(first) + len(second), first.shape[1], max(first.shape[2], second.shape[2])
    result = np.zeros((*shape, *first.shape[3:]), np.float32)
    result[: len(first), :, : first.shape[2]] = first
    result[len(first) :, :, : second.shape[2]] = second
    return result


def in_blocks(keys: Array) -> Array:
    """Keys (…, S, D) as the cache has them: (…, S / LANES, D, LANES); contiguous.

    The numbers of a dimension of LANES keys lie together: a vector times a number of the query adds
    to LANES scores.
    """
    *shape, tokens, size = keys.shape
    blocks = keys.reshape(*shape, tokens // LANES, LANES, size)
    return np.ascontiguousarray(blocks.swapaxes(-1, -2))


def _rows(scratch: dict[str, NDArray[Any]], name: str) -> _Rows:
    data = scratch[name]
    packed = scratch.get(f"{name}_packed", data)
    arrays = [scratch.get(f"{name}_{array}") for array in ("scales", "offsets")]
    pointers = [None if array is None else array.ctypes.data for array in arrays]
    return _Rows(data.ctypes.data, packed.ctypes.data, *pointers, data.shape[1])
