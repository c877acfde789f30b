"""Attention: masks, softmax(QKᵀ/√d)V as one reads it and as it runs fast, and the key–value cache."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model import fused
from lmcli.model.layers import Linear, RMSNorm, rotate, together


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
              scale: float | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V (Vaswani et al. 2017), written to be read; `fast_attention` gives the same numbers.

    query (B, H, T, D); key and value (B, H, S, D); mask, broadcast to (B, H, T, S), is True where a query may look, or
    numbers to add to the scores; `scale` is 1/√D unless given (T5: 1).
    """
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    weights = scores.softmax(dim=-1)  # (B, H, T, S)
    return weights @ value  # (B, H, T, D)


def fast_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
                   scale: float | None = None) -> Tensor:
    """The same by torch's fused kernel; `causal` stands for a causal mask that need not be built."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def visible(read: int, seen: int, causal: bool, window: int, real: Tensor | None, device: torch.device) -> Tensor | None:
    """Where each of the last T of S positions may look, (B or 1, 1, T, S) bool; None when nothing but `causal` limits it.

    `window` is how many tokens a causal position sees, itself included, or how far one looks to each side otherwise; 0
    is no limit. `real` (B, S) is True for tokens that are no padding. A padding position looks at itself, so that its
    softmax exists.
    """
    near = 0 < window < seen
    if real is None and not near:
        return None
    at = torch.arange(seen, device=device)
    back = at[seen - read:, None] - at  # (T, S): how far before the query a key stands
    allowed = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if near:
        allowed = allowed & (back < window if causal else back.abs() <= window)
    if real is None:
        return allowed[None, None]
    return (allowed & (real[:, None, :] | (back == 0)))[:, None]


class Memory(NamedTuple):
    """What a decoder reads of an encoder: hidden states (B, S, C), and (B, S) bool, True where they are no padding."""

    states: Tensor
    real: Tensor | None = None


class Packed(NamedTuple):
    """Rows laid one behind another in a single row, in groups of equal length: (rows, length) of each, in order."""

    groups: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> Tensor:
        """The place of each token in its own row, (1, N)."""
        return torch.cat([torch.arange(length).repeat(rows) for rows, length in self.groups])[None]


class KeyValueCache:
    """Keys and values of all decoder layers, allocated once and filled from the left; `length` positions are filled.

    `cross` holds those of an encoder's output, made once by each layer that reads it.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, K, capacity, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.capacity, self.length = capacity, 0

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, K, T, D) behind what is there and returns all of it, (B, K, S, D) each."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length:end] = key
        self.values[layer, :, :, self.length:end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Keeps and reorders rows (B', int64), as when some are finished or a beam forks."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.cross = {layer: (key[rows], value[rows]) for layer, (key, value) in self.cross.items()}


@dataclass
class View:
    """What the positions of a stack look at, made once a forward pass and the same for all layers of a kind.

    `turn` is (cos, sin) of rotary positions, `mask` as for `attention`; without one a causal stack looks at what stands
    before each position, any other at everything. Rows that are `packed` look at themselves. Only positions from `since`
    on look, and have an outcome. With `firsts` (B, T) a position of a causal stack looks at none before the one it names.
    """

    turn: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    cache: KeyValueCache | None
    memory: Memory | None
    packed: Packed | None = None
    since: int = 0
    firsts: Tensor | None = None


def apart(firsts: Tensor, mask: Tensor | None) -> Tensor:
    """`mask` (of a causal stack; None: all that stands before), as in `attention`, but nothing before `firsts` (B, T)."""
    at = torch.arange(firsts.shape[1], device=firsts.device)
    allowed = ((at <= at[:, None]) & (at >= firsts[:, :, None]))[:, None]  # (B, 1, T, T)
    if mask is None:
        return allowed
    return allowed & mask if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))


class Attention(nn.Module):
    """Attention with grouped key–value heads (Ainslie et al. 2023) and, if asked, RMSNorm on queries and keys.

    Self-attention, or with `cross` from a decoder's positions to an encoder's output.
    """

    def __init__(self, config: ModelConfig, layer: int, heads: int, head_dim: int, causal: bool, cross: bool = False):
        super().__init__()
        self.layer, self.head_dim, self.causal, self.cross, self.fast = layer, head_dim, causal, cross, True
        self.scale = head_dim ** -0.5 if config.scale_attention else 1.0
        keys = heads * config.num_key_value_heads // config.num_attention_heads
        self.groups = heads // keys
        biased = config.attention_bias != "none"
        self.query = Linear(config.hidden_size, heads * head_dim, bias=biased)
        self.key = Linear(config.hidden_size, keys * head_dim, bias=biased)
        self.value = Linear(config.hidden_size, keys * head_dim, bias=biased)
        self.output = Linear(heads * head_dim, config.hidden_size, bias=config.attention_bias == "all")
        if config.query_key_norm:
            self.query_norm = RMSNorm(head_dim, config.norm_eps)
            self.key_norm = RMSNorm(head_dim, config.norm_eps)
        self.normed = config.query_key_norm

    def forward(self, x: Tensor, view: View) -> Tensor:
        """(B, T, C) → (B, T, C), or of the view's positions `since` one on."""
        since = 0 if self.cross else view.since
        rows, read = x.shape[0], x.shape[1] - since
        if self.cross:
            query = self._queries(self.query(x))
            key, value = self._remembered(view)
            real = view.memory.real
            mask = None if real is None else real[:, None, None, :]
        else:
            query, *others = together(x, self.query, self.key, self.value) if not since else (
                self.query(x[:, since:]), *together(x, self.key, self.value))
            query, (key, value) = self._queries(query), self._keys_and_values(*others)
            if view.turn is not None:
                cos, sin = (part.to(query.dtype) for part in view.turn)
                query, key = rotate(query, cos[..., since:, :], sin[..., since:, :]), rotate(key, cos, sin)
            if view.cache is not None:
                key, value = view.cache.add(self.layer, key, value)  # (B, K, S, D)
            mask = view.mask if view.firsts is None else apart(view.firsts, view.mask)
            mask = mask if mask is None else mask[..., since:, :]
        if view.packed is not None:
            return self.output(self._attend_packed(query, key, value, view.packed))  # (1, N, C)
        mixed = self._attend(query, key, value, mask)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).reshape(rows, read, -1))  # (B, T, C)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        """(1, N, H·D) of (1, H or K, N, D): attention within each of the rows."""
        found, start = [], 0
        for rows, length in packed.groups:
            end = start + rows * length
            own = (part[0, :, start:end].unflatten(1, (rows, length)).transpose(0, 1) for part in (query, key, value))
            found.append(self._attend(*own, None).transpose(1, 2).reshape(rows * length, -1))
            start = end
        return torch.cat(found)[None]

    def _queries(self, made: Tensor) -> Tensor:
        """(B, T, H·D) → (B, H, T, D), normed if queries are."""
        query = made.unflatten(-1, (-1, self.head_dim))
        return (self.query_norm(query) if self.normed else query).transpose(1, 2)

    def _keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, K·D) → (B, K, S, D) each, keys normed if they are."""
        key, value = (made.unflatten(-1, (-1, self.head_dim)) for made in (key, value))
        return (self.key_norm(key) if self.normed else key).transpose(1, 2), value.transpose(1, 2)

    def _remembered(self, view: View) -> tuple[Tensor, Tensor]:
        if view.cache is None:
            return self._keys_and_values(*together(view.memory.states, self.key, self.value))
        if self.layer not in view.cache.cross:
            view.cache.cross[self.layer] = self._keys_and_values(*together(view.memory.states, self.key, self.value))
        return view.cache.cross[self.layer]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        read, seen = query.shape[2], key.shape[2]
        fast = self.fast and not _slow_backward(query)
        if read == 1 and mask is None and self.groups > 1 and fast:
            # one query a head: the heads of a group stand in for T, and keys need no copying
            query = query.view(query.shape[0], -1, self.groups, self.head_dim)  # (B, K, H/K, D)
            mixed = fast_attention(query, key, value, None, False, self.scale)
            return mixed.reshape(query.shape[0], -1, 1, self.head_dim)
        if self.causal and mask is None and read > 1 and fast and fused.active(query) and not query.requires_grad:
            return fused.causal_attention(query, key, value, self.scale)
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)  # (B, H, S, D)
            value = value.repeat_interleave(self.groups, dim=1)
        causal = self.causal and mask is None and read > 1
        if causal and (read != seen or not fast):
            at = torch.arange(seen, device=query.device)
            causal, mask = False, at <= at[seen - read:, None]
        if fast:
            return fast_attention(query, key, value, mask, causal, self.scale)
        return attention(query, key, value, mask, self.scale)


def _slow_backward(query: Tensor) -> bool:
    """Whether plain products train faster than the fused kernel: on a CPU with short rows, whose backward pass takes most
    of the kernel's time (4 × 128, context 128: 1.38 times the tokens per second; no gain at context 256)."""
    return query.requires_grad and query.device.type == "cpu" and query.shape[2] <= 128
