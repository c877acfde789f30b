"""Attention: masks, softmax(QKᵀ/√D)V, and the key–value cache. Letters as in `layers`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.layers import Linear, RMSNorm, rotate


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """softmax(QKᵀ/√D)V (Vaswani et al. 2017), (B, H, T, D).

    query (B, H, T, D); key and value (B, H, S, D). `mask`, broadcast to (B, H, T, S), is True where
    a query attends to a key, or holds numbers to add to the scores. `scale` None is 1/√D (T5: 1).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (B, H, T, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    weights = scores.softmax(dim=-1)  # (B, H, T, S)
    return weights @ value  # (B, H, T, D)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S) bool: each of the last T of S positions attends to itself and all before it."""
    at = torch.arange(keys, device=device)
    return at <= at[keys - queries :, None]


def attention_mask(
    queries: int,
    keys: int,
    causal: bool,
    window: int,
    token_mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Where the last T of S positions attend, (B or 1, 1, T, S) bool; None if `causal` says it all.

    `window` is how many tokens a causal position sees, itself included, or how far a bidirectional
    one sees to each side; 0 is no limit. `token_mask` (B, S) is False for padding. A padding
    position attends to itself, so that its softmax exists.
    """
    limited = 0 < window < keys
    if token_mask is None and not limited:
        return None
    at = torch.arange(keys, device=device)
    back = at[keys - queries :, None] - at  # (T, S): how far before its query a key is
    allowed = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if limited:
        allowed = allowed & (back < window if causal else back.abs() <= window)
    if token_mask is None:
        return allowed[None, None]
    return (allowed & (token_mask[:, None, :] | (back == 0)))[:, None]


def document_mask(document_start: Tensor, mask: Tensor | None) -> Tensor:
    """A causal `mask` (None: no other limit) without the keys before `document_start` (B, T)."""
    at = torch.arange(document_start.shape[1], device=document_start.device)
    allowed = (at <= at[:, None]) & (at >= document_start[:, :, None])  # (B, T, T)
    return allowed[:, None] if mask is None else allowed[:, None] & mask  # (B, 1, T, T)


class EncoderOutput(NamedTuple):
    """What a decoder reads of an encoder: states (B, S, C), and (B, S) bool, False for padding."""

    states: Tensor
    token_mask: Tensor | None = None


class KeyValueCache:
    """Keys and values of all decoder layers, allocated once; the first `length` positions are set.

    `cross` holds the keys and values of an encoder's output, computed once per layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, rows, heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, K, capacity, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.capacity, self.length = capacity, 0

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, D) to a layer; returns all its keys and values, (B, K, S, D) each."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Selects and reorders rows (B', int64), for finished texts and beams."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.cross = {layer: (key[rows], value[rows]) for layer, (key, value) in self.cross.items()}


@dataclass(frozen=True)
class AttentionContext:
    """What the layers of a stack share in one forward pass.

    `rotary` is (cos, sin) of the positions. `mask` is as in `attention`; without one, causal
    positions attend to all before them and others to everything. Positions before `query_start`
    are keys and values only: the layer returns the states of the others.
    """

    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    cache: KeyValueCache | None
    encoder_output: EncoderOutput | None
    query_start: int = 0


class Attention(nn.Module):
    """Self-attention with grouped key–value heads (Ainslie et al. 2023).

    With `query_key_norm`, queries and keys are RMS-normalized per head.
    """

    def __init__(
        self, config: ModelConfig, layer: int, heads: int, head_dim: int, causal: bool = True
    ):
        super().__init__()
        self.layer, self.head_dim, self.causal = layer, head_dim, causal
        divisor = config.query_pre_attn_scalar or head_dim
        self.scale = divisor**-0.5 if config.scale_attention else 1.0
        key_heads = heads * config.num_key_value_heads // config.num_attention_heads
        self.groups = heads // key_heads
        size, width, key_width = config.hidden_size, heads * head_dim, key_heads * head_dim
        biased = config.attention_bias != "none"
        self.query = Linear(size, width, bias=biased)
        self.key = Linear(size, key_width, bias=biased)
        self.value = Linear(size, key_width, bias=biased)
        self.output = Linear(width, size, bias=config.attention_bias == "all")
        normed = config.query_key_norm
        self.query_norm = RMSNorm(head_dim, config.norm_eps) if normed else None
        self.key_norm = RMSNorm(head_dim, config.norm_eps) if normed else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) → (B, T − query_start, C)."""
        query, key, value = self.heads(x, context)
        if context.cache is not None:
            key, value = context.cache.add(self.layer, key, value)  # (B, K, S, D)
        mask = None if context.mask is None else context.mask[..., context.query_start :, :]
        mixed = self.attend(query, key, value, mask)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, T, C)

    def heads(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D), with rotary positions applied."""
        start = context.query_start
        projected = self.project(x, start)
        query = self.split_heads(projected[0], self.query_norm)
        key = self.split_heads(projected[1], self.key_norm)
        value = self.split_heads(projected[2])
        if context.rotary is not None:
            cos, sin = (table.to(query.dtype) for table in context.rotary)
            query = rotate(query, cos[..., start:, :], sin[..., start:, :])
            key = rotate(key, cos, sin)
        return query, key, value

    def project(self, x: Tensor, query_start: int) -> tuple[Tensor, ...]:
        """Queries (B, T − query_start, H·D), keys and values (B, T, K·D)."""
        return self.query(x[:, query_start:]), *self.project_keys(x)

    def project_keys(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values, (B, S, K·D) each."""
        return self.key(x), self.value(x)

    def split_heads(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """(B, T, heads·D) → (B, heads, T, D), normalized per head."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`attention` of queries (B, H, T, D) to keys and values (B, K, S, D) of grouped heads."""
        if self.causal and mask is None:
            mask = causal_mask(query.shape[2], key.shape[2], query.device)
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)  # (B, H, S, D)
            value = value.repeat_interleave(self.groups, dim=1)
        return attention(query, key, value, mask, self.scale)


class CrossAttention(Attention):
    """Attention from the positions of a decoder to the output of an encoder."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        query = self.split_heads(self.query(x), self.query_norm)  # (B, H, T, D)
        key, value = self.encoder_heads(context)  # (B, K, S, D)
        assert context.encoder_output is not None
        token_mask = context.encoder_output.token_mask
        mask = None if token_mask is None else token_mask[:, None, None, :]  # (B, 1, 1, S)
        mixed = self.attend(query, key, value, mask)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, T, C)

    def encoder_heads(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, (B, K, S, D) each, cached if possible."""
        if context.cache is not None and self.layer in context.cache.cross:
            return context.cache.cross[self.layer]
        assert context.encoder_output is not None
        key, value = self.project_keys(context.encoder_output.states)
        key, value = self.split_heads(key, self.key_norm), self.split_heads(value)
        if context.cache is not None:
            context.cache.cross[self.layer] = key, value
        return key, value
