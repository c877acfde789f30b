"""A batch of sequences through a model: padded, then token by token with a key–value cache."""

import torch
from torch import Tensor

from lmcli.model.attention import EncoderOutput, KeyValueCache
from lmcli.model.transformer import Transformer

# columns that a new cache has beyond the first texts; a full cache is doubled
SPARE_COLUMNS = 64


class DecodingState:
    """Sequences (left-padded), their key–value cache and the `logits` (B, V) of their next token.

    For an encoder–decoder `sources` are encoded, equal ones once, and their keys and values kept.
    At most `capacity` columns are read; then the state is `full`.
    """

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

    def add(self, tokens: Tensor) -> None:
        """Reads one more token (B,) of each sequence."""
        if self.cache.length == self.cache.capacity:
            self._double_cache()
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)
        self.logits = self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Selects, reorders or repeats sequences (B', int64)."""
        self.cache.keep_rows(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        if self.encoder_output is not None:
            self.encoder_output = _select(self.encoder_output, rows)

    def reorder(self, rows: Tensor, common: int) -> None:
        """Reorders sequences (B, int64) that are equal up to column `common`, as beams are."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for tensor in (self.cache.keys, self.cache.values) if len(moved) else ():
            columns = tensor[:, :, :, common : self.cache.length]  # (layers, B, K, n, D)
            columns[:, moved] = columns[:, rows[moved]]

    def _forward(self, ids: Tensor) -> Tensor:
        hidden = self.model.hidden(ids, self.mask, self.cache, self.encoder_output)
        return self.model.head(hidden[:, -1]).float()

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
