"""Attention: masks, softmax(QKᵀ/√d)V as one reads it and as it runs fast, and the key–value cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.layers import RMSNorm, rotate


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(QKᵀ/√d)V (Vaswani et al. 2017), written to be read; `fast_attention` gives the same numbers.

    query (B, H, T, D); key and value (B, H, S, D); mask, broadcast to (B, H, T, S), is True where a query may look.
    """
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)  # (B, H, T, S)
    return weights @ value  # (B, H, T, D)


def fast_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same by torch's fused kernel; `causal` stands for a causal mask that need not be built."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def causal_mask(read: int, seen: int, device: torch.device) -> Tensor:
    """(T, S) bool: the last T of S positions, each looking at itself and what stands before it."""
    at = torch.arange(seen, device=device)
    return at <= at[seen - read:, None]


class KeyValueCache:
    """Keys and values of all layers, allocated once and filled from the left; `length` positions are filled."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, K, capacity, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
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


class Attention(nn.Module):
    """Self-attention with grouped key–value heads (Ainslie et al. 2023) and, if asked, RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.fast = layer, config.head_dim, True
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.query = nn.Linear(config.hidden_size, queries, bias=False)
        self.key = nn.Linear(config.hidden_size, keys, bias=False)
        self.value = nn.Linear(config.hidden_size, keys, bias=False)
        self.output = nn.Linear(queries, config.hidden_size, bias=False)
        if config.query_key_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.normed = config.query_key_norm

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KeyValueCache | None) -> Tensor:
        """(B, T, C) → (B, T, C). `turn` is (cos, sin) of the positions; no mask means causal within x itself."""
        rows, read, _ = x.shape
        split = (rows, read, -1, self.head_dim)
        query, key, value = self.query(x).view(split), self.key(x).view(split), self.value(x).view(split)
        if self.normed:
            query, key = self.query_norm(query), self.key_norm(key)
        cos, sin = (part.to(query.dtype) for part in turn)
        query = rotate(query.transpose(1, 2), cos, sin)  # (B, H, T, D)
        key = rotate(key.transpose(1, 2), cos, sin)  # (B, K, T, D)
        value = value.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            key, value = cache.add(self.layer, key, value)  # (B, K, S, D)
        mixed = self._attend(query, key, value, mask)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).reshape(rows, read, -1))  # (B, T, C)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        read, seen = query.shape[2], key.shape[2]
        if read == 1 and mask is None and self.groups > 1:
            # one query a head: the heads of a group stand in for T, and keys need no copying
            query = query.view(query.shape[0], -1, self.groups, self.head_dim)  # (B, K, H/K, D)
            return fast_attention(query, key, value, None, False).reshape(query.shape[0], -1, 1, self.head_dim)
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)  # (B, H, S, D)
            value = value.repeat_interleave(self.groups, dim=1)
        causal = mask is None and read > 1
        fast = self.fast and not _slow_backward(query)
        if causal and (read != seen or not fast):
            causal, mask = False, causal_mask(read, seen, query.device)
        return fast_attention(query, key, value, mask, causal) if fast else attention(query, key, value, mask)


def _slow_backward(query: Tensor) -> bool:
    """Whether plain products train faster than the fused kernel: on a CPU with short rows, whose backward pass takes most
    of the kernel's time (4 × 128, context 128: 1.38 times the tokens per second; no gain at context 256)."""
    return query.requires_grad and query.device.type == "cpu" and query.shape[2] <= 128
