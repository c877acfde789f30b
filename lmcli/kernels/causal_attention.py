"""Causal self-attention over whole rows on a CPU: split heads, products, softmax, with gradients.

Products are torch's, the rest is kernels.c. Letters as in `model.layers`; N is B·T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcli.kernels import calls, products
from lmcli.kernels.calls import CHUNKS
from lmcli.model.memory import KEPT_WEIGHTS, QUERIES_AT_ONCE


@dataclass(frozen=True)
class BlockShape:
    """Sizes and constants of a block: rows of `length` positions, heads, ε of norms, dropout.

    `lora_dropout` is the dropout of what LoRA branches read.
    """

    rows: int
    length: int
    heads: int
    key_heads: int
    head_dim: int
    scale: float
    eps: float
    head_eps: float
    dropout: float
    lora_dropout: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the kernels that split and join heads take them."""
        return self.rows, self.length, self.heads, self.key_heads, self.head_dim


Heads = tuple[Tensor, Tensor, Tensor]  # query (B, H, T, D), key and value (B, K, T, D)
Norms = tuple[Tensor | None, Tensor | None]  # weights (D,) of the norms of queries and keys


def split_heads(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], norms: Norms, shape: BlockShape
) -> Heads:
    """Query (B, H, T, D), key and value (B, K, T, D) of qkv (N, (H + 2K)·D), normed, rotated."""
    rows, length, heads, key_heads, head_dim = shape.sizes
    query, key, value = (
        qkv.new_empty(rows, count, length, head_dim) for count in (heads, key_heads, key_heads)
    )
    arrays = (qkv, *rotary, *norms, query, key, value)
    calls.run("split_heads", qkv.dtype, *arrays, *shape.sizes, shape.head_eps)
    return query, key, value


def split_heads_backward(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], norms: Norms, gradients: Heads, shape: BlockShape
) -> tuple[Tensor, Norms]:
    """The gradients of qkv and of the norms' weights, given those of query, key and value."""
    dqkv, sums = torch.empty_like(qkv), rotary[0].new_zeros(CHUNKS, 2, shape.head_dim)
    arrays = (qkv, *rotary, *norms, *gradients, dqkv, sums)
    calls.run("split_heads_backward", qkv.dtype, *arrays, *shape.sizes, shape.head_eps)
    if norms[0] is None:
        return dqkv, (None, None)
    dquery_norm, dkey_norm = sums.sum(0).unbind()
    return dqkv, (dquery_norm, dkey_norm)


def join_heads(x: Tensor, shape: BlockShape) -> Tensor:
    """(B, H, T, D) → (N, H·D)."""
    rows, length, heads, _, head_dim = shape.sizes
    y = x.new_empty(rows * length, heads * head_dim)
    calls.run("join_heads", x.dtype, x, y, rows, length, heads, head_dim)
    return y


def unjoin_heads(x: Tensor, shape: BlockShape) -> Tensor:
    """(N, H·D) → (B, H, T, D)."""
    rows, length, heads, _, head_dim = shape.sizes
    y = x.new_empty(rows, heads, length, head_dim)
    calls.run("join_heads", x.dtype, x, y, rows, heads, length, head_dim)
    return y


def attend(
    heads: Heads, document_start: Tensor | None, shape: BlockShape
) -> tuple[Tensor, list[Tensor]]:
    """(mixed (B, H, T, D), attention weights of each chunk of queries if worth keeping).

    Each chunk of queries is multiplied with the keys that it can see: on a CPU, batched products
    are faster than torch's fused kernel.
    """
    if products.varied(heads[0], heads[1]):
        mixed, kept_weights = attend(_float32(heads), document_start, shape)
        return mixed.to(heads[0].dtype), kept_weights
    mixed, kept_weights = torch.empty_like(heads[0]), []
    out, query = mixed.flatten(0, 1), heads[0].flatten(0, 1)  # (B·H, T, D)
    key, value = (_repeat_groups(x, shape) for x in heads[1:])
    for first, last in _chunks(shape.length):
        weights = _weights(query, key, first, last, document_start, shape)
        torch.bmm(weights, value[:, :last], out=out[:, first:last])
        if shape.length <= KEPT_WEIGHTS:
            kept_weights.append(weights)
    return mixed, kept_weights


def attend_backward(
    heads: Heads,
    dmixed: Tensor,
    kept_weights: list[Tensor],
    document_start: Tensor | None,
    shape: BlockShape,
) -> Heads:
    """The gradients of query, key and value (`heads`), given that of `attend`."""
    if products.varied(heads[0], heads[1]):
        above = dmixed.float()
        gradients = attend_backward(_float32(heads), above, kept_weights, document_start, shape)
        query, key, value = (x.to(dmixed.dtype) for x in gradients)
        return query, key, value
    query, dmixed = heads[0].flatten(0, 1), dmixed.flatten(0, 1)  # (B·H, T, D)
    key, value = (_repeat_groups(x, shape) for x in heads[1:])
    dquery, dkey, dvalue = (torch.empty_like(query) for _ in range(3))
    for i, (first, last) in reversed(list(enumerate(_chunks(shape.length)))):
        weights = (
            kept_weights[i]
            if kept_weights
            else _weights(query, key, first, last, document_start, shape)
        )
        above = dmixed[:, first:last]
        # the last chunk comes first and sees all keys: it sets what the others add to
        beta = float(last < shape.length)
        dvalue[:, :last].baddbmm_(weights.mT, above, beta=beta)
        scores = above @ value[:, :last].mT  # the gradient of the weights, then of the scores
        sizes = (*scores.shape, first, shape.scale)
        calls.run("causal_softmax_backward", query.dtype, weights, scores, *sizes)
        torch.bmm(scores, key[:, :last], out=dquery[:, first:last])
        dkey[:, :last].baddbmm_(scores.mT, query[:, first:last], beta=beta)
    return dquery, _sum_groups(dkey, shape), _sum_groups(dvalue, shape)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`model.attention` with a causal mask, (B, H, T, D), for reading only, without a gradient.

    Queries (B, H, T, D) are the last T of S positions; keys and values are (B, K, S, D). The result
    is stored as (B, T, H, D). Scores and weights stay in the cache (Dao et al. 2022), and are
    float32 whatever the precision of the inputs.
    """
    (rows, heads, length, head_dim), (_, key_heads, keys, _) = query.shape, key.shape
    out = query.new_empty(rows, length, heads, head_dim).transpose(1, 2)
    arrays = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    strides = torch.tensor([x.stride()[:3] for x in (*arrays, out)])
    sizes = (rows, heads, key_heads, length, keys, head_dim)
    calls.run("attention", query.dtype, *arrays, out, strides, *sizes, scale)
    return out


def _float32(heads: Heads) -> Heads:
    query, key, value = (x.float() for x in heads)
    return query, key, value


def _chunks(length: int) -> list[tuple[int, int]]:
    starts = range(0, length, QUERIES_AT_ONCE)
    return [(first, min(first + QUERIES_AT_ONCE, length)) for first in starts]


def _weights(
    query: Tensor,
    key: Tensor,
    first: int,
    last: int,
    document_start: Tensor | None,
    shape: BlockShape,
) -> Tensor:
    """Attention weights (B·H, last − first, last) of a chunk of queries."""
    weights = query[:, first:last] @ key[:, :last].mT
    sizes = (*weights.shape, first, shape.heads, shape.length, shape.scale)
    calls.run("causal_softmax", query.dtype, weights, document_start, *sizes)
    return weights


def _repeat_groups(x: Tensor, shape: BlockShape) -> Tensor:
    """Keys or values (B, K, T, D) → (B·H, T, D), repeated for the heads of each group."""
    if shape.heads != shape.key_heads:
        x = x.repeat_interleave(shape.heads // shape.key_heads, dim=1)
    return x.flatten(0, 1)


def _sum_groups(gradient: Tensor, shape: BlockShape) -> Tensor:
    """The gradient of what `_repeat_groups` read."""
    if shape.heads == shape.key_heads:
        return gradient
    rows, length, _, key_heads, head_dim = shape.sizes
    return gradient.view(rows, key_heads, -1, length, head_dim).sum(2)
