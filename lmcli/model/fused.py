"""A decoder's block with a backward pass of its own: as few passes over memory as there can be.

For whole rows on a CPU: training, scoring. The block is the one of transformer.py with RMSNorm, rotary causal attention and
SwiGLU; the tests compare both, value and gradient (in float64 as well). Products are torch's, what lies between them is
kernels.c.
Letters as in layers.py; N is B·T, F the width inside the MLP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model import kernels
from lmcli.model.dropout import dropped
from lmcli.model.kernels import ACCUMULATED, PARTS
from lmcli.model.low_rank import Additions, LowRank, added

QUERIES_AT_ONCE = 128  # rows of scores in one product: little above the diagonal is calculated, and products stay large
KEPT_WEIGHTS = 512  # keys up to which attention weights are kept for the backward pass, not calculated again
FIRST_MATRIX = 11  # among what `_Block` is given
TOGETHER = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)  # of its seven matrices: those that read the same
# activations as x · σ(x · (a + b x²)): (a, b)
SILU, GELU_TANH = (1.0, 0.0), (2 * (2 / torch.pi) ** 0.5, 2 * 0.044715 * (2 / torch.pi) ** 0.5)


def active(x: Tensor) -> bool:
    """Whether a forward pass over x should use these functions: all or nothing has a gradient, and the kernels are there;
    torch.compile, which cannot look into them, gets the plain ones."""
    return (x.requires_grad or not torch.is_grad_enabled()) and not torch.compiler.is_compiling() and kernels.usable(x)


@dataclass(frozen=True)
class Shape:
    """Sizes of a block's work: rows, positions of a row, query and key–value heads, width of a head; the rest of what is
    no tensor. `low_dropout` is the share of what is read that what is added to the matrices does not see."""

    rows: int
    length: int
    heads: int
    keys: int
    width: int
    scale: float
    eps: float
    head_eps: float
    dropout: float
    low_dropout: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the kernels that part and join heads take them."""
        return self.rows, self.length, self.heads, self.keys, self.width


class _Block(Function):
    @staticmethod
    def forward(ctx, x: Tensor, shape: Shape, cos: Tensor, sin: Tensor, firsts: Tensor | None,
                scales: tuple[float, ...], trained: bool, *weights: Tensor | None) -> Tensor:
        norm1, norm2, query_norm, key_norm = weights[:4]
        low = [None if a is None else LowRank(a, b, scale) for a, b, scale in zip(weights[11::2], weights[12::2], scales)]
        matrices = weights[4:11] if shape.low_dropout else list(map(added, weights[4:11], low))
        query, key, value, output, gate, up, down = matrices
        ctx.shape, ctx.seeds = shape, torch.randint(1 << 31, (2,)).tolist() if shape.dropout else (0, 0)
        seeds = torch.randint(1 << 31, (4,)).tolist() if shape.low_dropout else (0,) * 4
        ctx.additions = [Additions(tuple(low[place]), [len(matrix) for matrix in matrices[place]], shape.low_dropout, seed)
                         for place, seed in zip(TOGETHER, seeds)]
        to_qkv, to_out, to_into, to_back = ctx.additions
        qkv, out = _joined(x.dtype, query, key, value), _joined(x.dtype, output)
        into, back = _joined(x.dtype, gate, up), _joined(x.dtype, down)

        products = to_qkv.product(_rms_norm(x, norm1, shape.eps), qkv)  # (N, (H + 2K)·D)
        heads = _split_heads(products, cos, sin, query_norm, key_norm, shape)
        if trained or firsts is not None:
            mixed, kept = _attend(*heads, firsts, shape)
            joined = _joined_heads(mixed, shape)  # (N, H·D)
        else:
            joined, kept = causal_attention(*heads, shape.scale).transpose(1, 2).reshape(len(x), -1), []
        middle = _add(x, joined, out, to_out, shape.dropout, ctx.seeds[0])
        gate_up = to_into.product(_rms_norm(middle, norm2, shape.eps), into)  # (N, 2F)
        y = _add(middle, _gated(gate_up), back, to_back, shape.dropout, ctx.seeds[1])
        ctx.dtype = query.dtype
        ctx.save_for_backward(x, middle, products, joined, gate_up, cos, sin, firsts, norm1, norm2, query_norm, key_norm,
                              qkv, out, into, back, *heads, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, middle, products, joined, gate_up, cos, sin, firsts, norm1, norm2, query_norm, key_norm,
         qkv, out, into, back, query, key, value, *kept) = ctx.saved_tensors
        shape, dy = ctx.shape, dy.contiguous()
        to_qkv, to_out, to_into, to_back = ctx.additions

        above = dropped(dy, shape.dropout, ctx.seeds[1])
        dgate_up, inner = _gated_backward(gate_up, to_back.input_gradient(above, back))
        ddown = _matrix_gradients(ctx, 3, above, inner)
        dinto = _matrix_gradients(ctx, 2, dgate_up, _rms_norm(middle, norm2, shape.eps))
        dmiddle, dnorm2 = _rms_norm_backward(middle, norm2, to_into.input_gradient(dgate_up, into), dy, shape.eps)
        above = dropped(dmiddle, shape.dropout, ctx.seeds[0])
        doutput = _matrix_gradients(ctx, 1, above, joined)
        dmixed = _parted_heads(to_out.input_gradient(above, out), shape)
        dheads = _attend_backward(query, key, value, dmixed, kept, firsts, shape)
        dproducts, dhead_norms = _split_heads_backward(products, cos, sin, query_norm, key_norm, dheads, shape)
        dqkv = _matrix_gradients(ctx, 0, dproducts, _rms_norm(x, norm1, shape.eps))
        dx, dnorm1 = _rms_norm_backward(x, norm1, to_qkv.input_gradient(dproducts, qkv), dmiddle, shape.eps)

        matrices, low = zip(*dqkv, *doutput, *dinto, *ddown)
        low = (part for pair in low for part in pair)
        return dx, None, None, None, None, None, None, dnorm1, dnorm2, *dhead_norms, *matrices, *low


def _matrix_gradients(ctx, which: int, dy: Tensor, x: Tensor) -> list[tuple]:
    """(gradient of the matrix or None, those of what is added to it) of each of the matrices TOGETHER[which], which read
    x (N, in) and together gave what has the gradient dy (N, out)."""
    additions = ctx.additions[which]
    trained = ctx.needs_input_grad[FIRST_MATRIX:][TOGETHER[which]]
    if all(trained):
        found = (dy.T @ x).to(ctx.dtype).split(additions.outputs)
    else:
        found = [(part.T @ x).to(ctx.dtype) if wanted else None
                 for part, wanted in zip(dy.split(additions.outputs, dim=1), trained)]
    return list(zip(found, additions.gradients(dy, x)))


def block(x: Tensor, shape: Shape, cos: Tensor, sin: Tensor, weights: tuple[Tensor | None, ...],
          firsts: Tensor | None = None, low: tuple[LowRank | None, ...] = (None,) * 7) -> Tensor:
    """x (N, C) after a block: x + attention(norm(x)), and then + mlp(norm(·)).

    cos and sin (T, D/2) turn queries and keys. With `firsts` (B, T) int64 a position sees none before the one it names.
    `weights` are those of: norm before attention, norm before the MLP, norm of
    the queries' heads, of the keys' heads (None: these are not normed), query, key, value, output, gate, up, down; they may
    be more precise than x, and get gradients as precise as themselves. `low` is what is added to each of the last seven.
    """
    dtype = ACCUMULATED[x.dtype]
    norms = (None if weight is None else weight.to(dtype) for weight in weights[:4])
    scales = tuple(1.0 if part is None else part.scale for part in low)
    sides = (side for part in low for side in (part or (None, None))[:2])
    # whether there is a gradient: what could have one says so to the function even where none is wanted
    return _Block.apply(x.contiguous(), shape, cos.to(dtype).contiguous(), sin.to(dtype).contiguous(),
                        None if firsts is None else firsts.contiguous(), scales, torch.is_grad_enabled(), *norms,
                        *weights[4:], *sides)


def _joined(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    kernels.run("rms_norm", x.dtype, x, weight, y, *x.shape, eps)
    return y


def _rms_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dx, sums = torch.empty_like(x), weight.new_zeros(PARTS, len(weight))
    kernels.run("rms_norm_backward", x.dtype, x, weight, dy, residual, dx, sums, *x.shape, eps)
    return dx, sums.sum(0)


def _gated(gate_up: Tensor, curve: tuple[float, float] = SILU) -> Tensor:
    rows, size = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    kernels.run("gated", gate_up.dtype, gate_up, y, rows, size, *curve)
    return y


def _gated_backward(gate_up: Tensor, dy: Tensor, curve: tuple[float, float] = SILU) -> tuple[Tensor, Tensor]:
    """(gradient, what the forward pass gave)."""
    dx, y = torch.empty_like(gate_up), torch.empty_like(dy)
    kernels.run("gated_backward", gate_up.dtype, gate_up, dy, dx, y, *dy.shape, *curve)
    return dx, y


class _Gated(Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, curve: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.curve = curve
        return _gated(gate_up, curve)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gated_backward(*ctx.saved_tensors, gradient.contiguous(), ctx.curve)[0], None


def gated(gate_up: Tensor, curve: tuple[float, float]) -> Tensor:
    """act(gate) · up of rows [gate, up] (…, 2F) → (…, F), for the activation of SILU or GELU_TANH."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    return _Gated.apply(rows, curve).view(*gate_up.shape[:-1], -1)


def _add(residual: Tensor, x: Tensor, weight: Tensor, additions: Additions, dropout: float, seed: int) -> Tensor:
    """residual + what dropout leaves of x · weightᵀ."""
    if not (dropout or additions.share):
        return torch.addmm(residual, x, weight.T)
    y = additions.product(x, weight)
    return dropped(y, dropout, seed, residual) if dropout else y.add_(residual)


def _split_heads(products: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
                 shape: Shape) -> tuple[Tensor, ...]:
    """Query (B, H, T, D), key and value (B, K, T, D); queries and keys normed, if at all, and turned."""
    query, key, value = (products.new_empty(shape.rows, count, shape.length, shape.width)
                         for count in (shape.heads, shape.keys, shape.keys))
    kernels.run("split_heads", products.dtype, products, cos, sin, query_norm, key_norm, query, key, value, *shape.sizes,
                shape.head_eps)
    return query, key, value


def _split_heads_backward(products: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
                          gradients: tuple[Tensor, ...], shape: Shape) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    dx, sums = torch.empty_like(products), cos.new_zeros(PARTS, 2, shape.width)
    kernels.run("split_heads_backward", products.dtype, products, cos, sin, query_norm, key_norm, *gradients, dx, sums,
                *shape.sizes, shape.head_eps)
    return dx, (None, None) if query_norm is None else sums.sum(0).unbind()


def _joined_heads(mixed: Tensor, shape: Shape) -> Tensor:
    """(B, H, T, D) → (N, H·D)."""
    y = mixed.new_empty(shape.rows * shape.length, shape.heads * shape.width)
    kernels.run("join_heads", mixed.dtype, mixed, y, shape.rows, shape.length, shape.heads, shape.width)
    return y


def _parted_heads(joined: Tensor, shape: Shape) -> Tensor:
    """(N, H·D) → (B, H, T, D)."""
    y = joined.new_empty(shape.rows, shape.heads, shape.length, shape.width)
    kernels.run("join_heads", joined.dtype, joined, y, shape.rows, shape.heads, shape.length, shape.width)
    return y


def _attend(query: Tensor, key: Tensor, value: Tensor, firsts: Tensor | None, shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """(mixed (B, H, T, D), attention weights of each chunk of queries if they are worth keeping).

    Chunks of queries, each against the keys that it can see: products of batches are faster on a CPU than its fused kernel.
    """
    mixed, kept = torch.empty_like(query), []
    query, key, value, out = _flat(query), _each_head(key, shape), _each_head(value, shape), _flat(mixed)
    for first, last in _chunks(shape.length):
        weights = _weights(query, key, first, last, firsts, shape)
        torch.bmm(weights, value[:, :last], out=out[:, first:last])
        if shape.length <= KEPT_WEIGHTS:
            kept.append(weights)
    return mixed, kept


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`attention.attention` with a causal mask, (B, H, T, D), of the last T of S positions: queries (B, H, T, D), keys and
    values (B, K, S, D); without a gradient. In memory the heads of a position lie beside each other.

    Scores and weights stay in the cache, and are float32 whatever the precision of what is read (Dao et al. 2022).
    """
    (rows, heads, length, width), (_, keys, seen, _) = query.shape, key.shape
    out = query.new_empty(rows, length, heads, width).transpose(1, 2)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value)]
    steps = torch.tensor([part.stride()[:3] for part in (*parts, out)])
    kernels.run("attention", query.dtype, *parts, out, steps, rows, heads, keys, length, seen, width, scale)
    return out


def _attend_backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, kept: list[Tensor],
                     firsts: Tensor | None, shape: Shape) -> tuple[Tensor, ...]:
    query, key, value, gradient = _flat(query), _each_head(key, shape), _each_head(value, shape), _flat(gradient)
    dquery, dkey, dvalue = (torch.empty_like(query) for _ in range(3))
    for i, (first, last) in reversed(list(enumerate(_chunks(shape.length)))):
        weights = kept[i] if kept else _weights(query, key, first, last, firsts, shape)
        rows, above = query[:, first:last], gradient[:, first:last]
        add = float(last < shape.length)  # the last chunk sees all keys and comes first: it sets what others add to
        dvalue[:, :last].baddbmm_(weights.mT, above, beta=add)
        scores = above @ value[:, :last].mT  # the weights' gradient, and then the scores'
        kernels.run("causal_softmax_backward", query.dtype, weights, scores, *scores.shape, first, shape.scale)
        torch.bmm(scores, key[:, :last], out=dquery[:, first:last])
        dkey[:, :last].baddbmm_(scores.mT, rows, beta=add)
    return dquery, _each_key(dkey, shape), _each_key(dvalue, shape)


def _chunks(size: int) -> list[tuple[int, int]]:
    return [(first, min(first + QUERIES_AT_ONCE, size)) for first in range(0, size, QUERIES_AT_ONCE)]


def _weights(query: Tensor, key: Tensor, first: int, last: int, firsts: Tensor | None, shape: Shape) -> Tensor:
    scores = query[:, first:last] @ key[:, :last].mT  # (B·H, rows, last)
    kernels.run("causal_softmax", query.dtype, scores, firsts, *scores.shape, first, shape.heads, shape.length, shape.scale)
    return scores


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)  # (B·H, T, D)


def _each_head(x: Tensor, shape: Shape) -> Tensor:
    """Keys or values (B, K, T, D) → (B·H, T, D): those of a group once for each of its heads."""
    return _flat(x if shape.heads == shape.keys else x.repeat_interleave(shape.heads // shape.keys, dim=1))


def _each_key(gradient: Tensor, shape: Shape) -> Tensor:
    """Back from `_each_head`: summed over a group."""
    if shape.heads == shape.keys:
        return gradient
    return gradient.view(shape.rows, shape.keys, -1, shape.length, shape.width).sum(2)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_rms_norm_backward(*ctx.saved_tensors, gradient.contiguous(), None, ctx.eps), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.RMSNorm` of x (…, C) with weight (C,)."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight.to(ACCUMULATED[x.dtype]), eps).view(x.shape)


def gelu_tanh_(x: Tensor) -> Tensor:
    """x (…, F), contiguous, becomes GELU(x) by its tanh formula (Hendrycks & Gimpel 2016); without a gradient."""
    kernels.run("gelu_tanh", x.dtype, x, x.numel() // x.shape[-1], x.shape[-1])
    return x
