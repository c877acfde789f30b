"""The parts of a block with a backward pass of their own: as few passes over memory as there can be, for training.

Each is an autograd function around kernels.c and matrix products; layers.py and attention.py hold the same in plain
PyTorch, which the tests compare them with, value and gradient (in float64 as well). Letters as in layers.py.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model import kernels
from lmcli.model.kernels import ACCUMULATED, PARTS

QUERIES_AT_ONCE = 128  # rows of scores in one product: little above the diagonal is calculated, and products stay large
KEPT_WEIGHTS = 512  # keys up to which attention weights are kept for the backward pass, not calculated again
ROWS_AT_ONCE = 1024  # rows of logits in one piece: they stay in the cache


def active(x: Tensor) -> bool:
    """Whether a forward pass over x should use these functions: gradients are wanted, and the kernels are there."""
    return x.requires_grad and kernels.usable(x)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        joined = weights[0].to(x.dtype) if len(weights) == 1 else torch.cat([weight.to(x.dtype) for weight in weights])
        ctx.save_for_backward(x, joined)
        ctx.sizes, ctx.dtype = [len(weight) for weight in weights], weights[0].dtype
        return x @ joined.T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        dx = gradient @ joined if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *(None for _ in ctx.sizes)
        return dx, *(gradient.T @ x).to(ctx.dtype).split(ctx.sizes)


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x (N, C) times each of the weights (outputs, C) in one product → (N, all outputs), in the precision of x."""
    return _Linear.apply(x, *weights)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty_like(x)
        kernels.run("rms_norm", x.dtype, x, weight, y, x.numel() // x.shape[-1], x.shape[-1], eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, dx = x.shape[-1], torch.empty_like(x)
        sums = weight.new_zeros(PARTS, size)
        kernels.run("rms_norm_backward", x.dtype, x, weight, gradient.contiguous(), dx, sums, x.numel() // size, size, ctx.eps)
        return dx, sums.sum(0), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.RMSNorm` of x (…, C) with a float32 weight (C,)."""
    return _RMSNorm.apply(x.contiguous(), weight.to(ACCUMULATED[x.dtype]), eps)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows, size = len(gate_up), gate_up.shape[-1] // 2
        y = gate_up.new_empty(rows, size)
        kernels.run("swiglu", gate_up.dtype, gate_up, y, rows, size)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gate_up, = ctx.saved_tensors
        dx = torch.empty_like(gate_up)
        kernels.run("swiglu_backward", gate_up.dtype, gate_up, gradient.contiguous(), dx, len(dx), dx.shape[-1] // 2)
        return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (N, F), of rows [gate, up], (N, 2F)."""
    return _SwiGLU.apply(gate_up)


class _SplitHeads(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor | None, key_weight: Tensor | None,
                shape: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, cos, sin, query_weight, key_weight)
        ctx.shape, ctx.eps = shape, eps
        rows, seen, heads, keys, width = shape
        query, key, value = (x.new_empty(rows, count, seen, width) for count in (heads, keys, keys))
        kernels.run("split_heads", x.dtype, x, cos, sin, query_weight, key_weight, query, key, value, *shape, eps)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, query_weight, key_weight = ctx.saved_tensors
        dx, sums = torch.empty_like(x), cos.new_zeros(PARTS, 2, ctx.shape[-1])
        kernels.run("split_heads_backward", x.dtype, x, cos, sin, query_weight, key_weight,
                    *(gradient.contiguous() for gradient in gradients), dx, sums, *ctx.shape, ctx.eps)
        by_weight = (None, None) if query_weight is None else sums.sum(0).unbind()
        return dx, None, None, *by_weight, None, None


def split_heads(x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, Tensor] | None,
                shape: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, D), key and value (B, K, T, D) of products x (B·T, (H + 2K)·D), queries and keys turned by the angles
    of their positions and, with `weights` (queries', keys'; (D,) each), normed before.

    cos and sin are (T, D/2); `shape` is (B, T, H, K, D).
    """
    dtype = ACCUMULATED[x.dtype]
    query_weight, key_weight = (None, None) if weights is None else (weight.to(dtype) for weight in weights)
    return _SplitHeads.apply(x, cos.to(dtype).contiguous(), sin.to(dtype).contiguous(), query_weight, key_weight, shape, eps)


class _JoinHeads(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows, heads, seen, width = x.shape
        y = x.new_empty(rows, seen, heads, width)
        kernels.run("join_heads", x.dtype, x, y, rows, seen, heads, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _JoinHeads.forward(ctx, gradient.contiguous())


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H, D), contiguous."""
    return _JoinHeads.apply(x)


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        mixed, weights = torch.empty_like(query), []
        for first, last in _chunks(query):
            weights.append(_weights(query, key, first, last, scale))
            torch.bmm(weights[-1], value[:, :last], out=mixed[:, first:last])
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, *(weights if key.shape[1] <= KEPT_WEIGHTS else ()))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        dquery, dkey, dvalue = (torch.empty_like(query) for _ in range(3))
        for i, (first, last) in reversed(list(enumerate(_chunks(query)))):
            weights = kept[i] if kept else _weights(query, key, first, last, ctx.scale)
            rows, above = query[:, first:last], gradient[:, first:last]
            add = float(last < query.shape[1])  # the last chunk sees all keys and comes first: it sets what others add to
            dvalue[:, :last].baddbmm_(weights.mT, above, beta=add)
            scores = above @ value[:, :last].mT  # the weights' gradient, and then the scores'
            kernels.run("causal_softmax_backward", query.dtype, weights, scores, *scores.shape, first, ctx.scale)
            torch.bmm(scores, key[:, :last], out=dquery[:, first:last])
            dkey[:, :last].baddbmm_(scores.mT, rows, beta=add)
        return dquery, dkey, dvalue, None


def _chunks(query: Tensor) -> list[tuple[int, int]]:
    size = query.shape[1]
    return [(first, min(first + QUERIES_AT_ONCE, size)) for first in range(0, size, QUERIES_AT_ONCE)]


def _weights(query: Tensor, key: Tensor, first: int, last: int, scale: float) -> Tensor:
    scores = query[:, first:last] @ key[:, :last].mT  # (B·H, rows, last)
    kernels.run("causal_softmax", query.dtype, scores, *scores.shape, first, scale)
    return scores


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`attention.attention` with a causal mask, all (B, H, T, D): chunks of queries, each against the keys it can see."""
    flat = (part.reshape(-1, *part.shape[2:]) for part in (query, key, value))
    return _CausalAttention.apply(*flat, scale).view(query.shape)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        matrix = weight.to(hidden.dtype)  # (V, C)
        losses = torch.empty(len(hidden), dtype=ACCUMULATED[hidden.dtype])
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for first in range(0, len(hidden), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            part = hidden[rows]
            logits = part @ matrix.T
            kernels.run("cross_entropy", hidden.dtype, logits, targets[rows], losses[rows], *logits.shape, float(smoothing))
            torch.mm(logits, matrix, out=dhidden[rows])
            dweight += logits.T @ part
        ctx.save_for_backward(dhidden, dweight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * gradient.to(dhidden.dtype), dweight * gradient, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The summed −log p of targets (N,) under the logits hidden (N, C) · weightᵀ (V, C), nats; smoothing as in
    `likelihood.target_losses`. The gradient is made beside the loss, so the logits never exist all at once."""
    return _CrossEntropy.apply(hidden.contiguous(), weight, targets.contiguous(), smoothing)
