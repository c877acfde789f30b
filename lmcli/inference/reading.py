"""A batch of texts on its way through a model: read whole once, then token by token over a key–value cache."""

import torch
from torch import Tensor

from lmcli.inference.ordering import pad
from lmcli.model.attention import KeyValueCache, Memory
from lmcli.model.transformer import Transformer

ROOM = 64  # columns that a cache begins with beyond what is read at once; it doubles when they are full


class Reading:
    """Texts (ids, padded on the left) and what a model has made of them. `logits` (B, V) float32 are for their next token.

    With `sources` (ids) the model is an encoder–decoder: equal ones are encoded once, and what its layers read of them
    is kept. At most `capacity` columns are read, then the reading is `full`.
    """

    def __init__(self, model: Transformer, texts: list[list[int]], sources: list[list[int]] | None, capacity: int):
        self.model, self.capacity = model, capacity
        ids, self.real = pad(texts, 0, left=True, device=self._device)
        self.memory = None if sources is None else encoded(model, sources, self._device)
        self.cache = self._new_cache(len(texts), min(capacity, ids.shape[1] + ROOM))
        self.logits = self._read(ids)

    @property
    def length(self) -> int:
        """Columns read so far, padding counted."""
        return self.cache.length

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return self.cache.length == self.capacity

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def add(self, tokens: Tensor) -> None:
        """Reads one more token (B,) of each text."""
        if self.cache.length == self.cache.capacity:
            self._grow()
        if self.real is not None:
            self.real = torch.cat([self.real, torch.ones_like(tokens)[:, None]], dim=1)
        self.logits = self._read(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Keeps, reorders or repeats texts (B', int64)."""
        self.cache.keep_rows(rows)
        self.real = None if self.real is None else self.real[rows]
        if self.memory is not None:
            real = self.memory.real
            self.memory = Memory(self.memory.states[rows], None if real is None else real[rows])

    def reorder(self, rows: Tensor, since: int) -> None:
        """Reorders texts (B, int64) that are the same up to column `since`, as the beams of one prompt are."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for part in (self.cache.keys, self.cache.values) if len(moved) else ():
            written = part[:, :, :, since:self.cache.length]  # (layers, B, K, n, D)
            written[:, moved] = written[:, rows[moved]]

    def _read(self, ids: Tensor) -> Tensor:
        return self.model.head(self.model.hidden(ids, self.real, self.cache, self.memory)[:, -1]).float()

    def _new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.model.config, rows, capacity, self._device, self.model.embedding.weight.dtype)

    def _grow(self) -> None:
        old = self.cache
        self.cache = self._new_cache(old.keys.shape[1], min(self.capacity, 2 * old.capacity))
        self.cache.keys[:, :, :, :old.length] = old.keys
        self.cache.values[:, :, :, :old.length] = old.values
        self.cache.cross, self.cache.length = old.cross, old.length


def encoded(model: Transformer, sources: list[list[int]], device: torch.device) -> Memory:
    """What the encoder makes of sources, a row for each; equal ones go through it once."""
    different = {tuple(source): None for source in sources}
    place = {source: i for i, source in enumerate(different)}
    ids, real = pad([list(source) for source in different], 0, left=False, device=device)
    memory = model.encode(ids, real)
    if len(different) == len(sources):
        return memory
    rows = torch.tensor([place[tuple(source)] for source in sources], device=device)
    return Memory(memory.states[rows], None if memory.real is None else memory.real[rows])
