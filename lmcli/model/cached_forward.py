"""A batch of sequences through a model: padded, then token by token with a key–value cache."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmcli.model.attention import EncoderOutput, KeyValueCache
from lmcli.model.transformer import Transformer

# columns that a new cache has beyond the first texts; a full cache is doubled
SPARE_COLUMNS = 64

Integers = NDArray[np.int64]


class DecodingState:
    """Sequences (left-padded), their key–value cache and the `logits` (B, V) of their next token.

    Logits, tokens and rows are numpy arrays, whatever the device.

    For an encoder–decoder `sources` are encoded, equal ones once, and their keys and values kept.
    At most `capacity` columns are read; then the state is `full`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        sequences: list[list[int]],
        sources: list[list[int]] | None,
        capacity: int,
    ):
        self.model, self.capacity = model, capacity
        ids, self.mask = pad(sequences, 0, left=True, device=self._device)
        self.encoder_output = None if sources is None else encode_sources(model, sources)
        self.cache = self._new_cache(len(sequences), min(capacity, ids.shape[1] + SPARE_COLUMNS))
        self.logits = self._forward(ids)

    @property
    def length(self) -> int:
        """Columns read so far, padding included."""
        return self.cache.length

    @property
    def full(self) -> bool:
        """True if no further token can be added."""
        return self.cache.length == self.capacity

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    @torch.inference_mode()
    def add(self, tokens: Integers) -> None:
        """Reads one more token (B,) of each sequence."""
        ids = torch.from_numpy(tokens).to(self._device)[:, None]
        if self.cache.length == self.cache.capacity:
            self._double_cache()
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.logits = self._forward(ids)

    @torch.inference_mode()
    def keep(self, rows: Integers) -> None:
        """Selects, reorders or repeats sequences (B', int64)."""
        chosen = torch.from_numpy(rows).to(self._device)
        self.logits = self.logits[rows]
        self.cache.keep_rows(chosen)
        self.mask = None if self.mask is None else self.mask[chosen]
        if self.encoder_output is not None:
            self.encoder_output = _select(self.encoder_output, chosen)

    @torch.inference_mode()
    def reorder(self, rows: Integers, newest: int) -> None:
        """Reorders sequences (B, int64) that differ in their `newest` tokens at most, as beams."""
        moved = np.nonzero(rows != np.arange(len(rows)))[0]
        for tensor in (self.cache.keys, self.cache.values) if len(moved) else ():
            end = self.cache.length
            columns = tensor[:, :, :, end - newest : end]  # (layers, B, K, n, D)
            columns[:, moved] = columns[:, rows[moved]]

    def _forward(self, ids: Tensor) -> NDArray[np.float32]:
        hidden = self.model.hidden(ids, self.mask, self.cache, self.encoder_output)
        return self.model.head(hidden[:, -1]).float().cpu().numpy()

    def _new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        weight = self.model.embedding.weight
        return KeyValueCache(self.model.config, rows, capacity, weight.device, weight.dtype)

    def _double_cache(self) -> None:
        old = self.cache
        self.cache = self._new_cache(old.keys.shape[1], min(self.capacity, 2 * old.capacity))
        self.cache.keys[:, :, :, : old.length] = old.keys
        self.cache.values[:, :, :, : old.length] = old.values
        self.cache.cross, self.cache.length = old.cross, old.length


def encode_sources(model: Transformer, sources: list[list[int]]) -> EncoderOutput:
    """The encoder's output, a row for each source; equal sources are encoded once."""
    output, rows = encode_different(model, sources)
    if len(output.states) == len(sources):
        return output
    return _select(output, torch.tensor(rows, device=output.states.device))


def encode_different(
    model: Transformer, sources: list[list[int]]
) -> tuple[EncoderOutput, list[int]]:
    """The encoder's output, a row for each different source, and the row of each source in it."""
    row_of = {source: row for row, source in enumerate(dict.fromkeys(map(tuple, sources)))}
    device = model.embedding.weight.device
    ids, mask = pad([list(source) for source in row_of], 0, left=False, device=device)
    return model.encode(ids, mask), [row_of[tuple(source)] for source in sources]


def _select(output: EncoderOutput, rows: Tensor) -> EncoderOutput:
    mask = output.token_mask
    return EncoderOutput(output.states[rows], None if mask is None else mask[rows])


def pad(
    sequences: list[list[int]], value: int, left: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(ids, attention mask), each (B, longest) int64; padded with `value`, the mask with 0.

    The mask is None if all sequences have the same length.
    """
    width = max(map(len, sequences))
    gaps = [width - len(ids) for ids in sequences]
    fill = [[value] * gap for gap in gaps]
    ids = [gap + row if left else row + gap for row, gap in zip(sequences, fill)]
    if not any(gaps):
        return torch.tensor(ids, device=device), None
    columns = torch.arange(width)
    starts = torch.tensor(gaps)[:, None]
    mask = columns >= starts if left else columns < width - starts
    return torch.tensor(ids, device=device), mask.long().to(device)


def padded_logits(
    model: Transformer, rows: list[tuple[list[int], list[int]]], padding: int
) -> list[Tensor]:
    """Logits (float32, on the CPU) of rows of (ids, token types), without a cache."""
    device = model.embedding.weight.device
    ids, mask = pad([ids for ids, _ in rows], padding, left=False, device=device)
    types = None
    if model.config.type_vocab_size > 1:
        types = pad([types for _, types in rows], 0, left=False, device=device)[0]
    return list(model(ids, mask, token_type_ids=types).float().cpu())
