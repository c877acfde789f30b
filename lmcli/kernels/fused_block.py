"""A decoder block with a backward pass of its own, in as few passes over memory as possible.

For whole rows on a CPU, in training and scoring: RMSNorm, rotary causal attention and SwiGLU as in
`model.transformer`; the tests compare value and gradient (in float64 as well). Products are
torch's, the rest is kernels.c. Letters as in `model.layers`; N is B·T, F the size inside the MLP.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.kernels import calls
from lmcli.kernels.calls import ACCUMULATED, CHUNKS
from lmcli.kernels.causal_attention import (
    BlockShape,
    attend,
    attend_backward,
    causal_attention,
    join_heads,
    split_heads,
    split_heads_backward,
    unjoin_heads,
)
from lmcli.kernels.dropout import dropped
from lmcli.kernels.lora_products import LoraProducts
from lmcli.kernels.products import matmul, matrix_gradient, regular
from lmcli.model.layers import gelu_tanh
from lmcli.model.lora import LowRank, added

# activations as x · σ(x · (a + b x²)): (a, b)
Curve = tuple[float, float]
SILU: Curve = (1.0, 0.0)
GELU_TANH: Curve = (2 * (2 / torch.pi) ** 0.5, 2 * 0.044715 * (2 / torch.pi) ** 0.5)
CURVES: dict[Any, Curve] = {F.silu: SILU, gelu_tanh: GELU_TANH}
# which of the seven matrices read the same input: query, key, value; output; gate, up; down
QKV, OUTPUT, GATE_UP, DOWN = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)
MATRICES = slice(9, 16)  # their positions among the arguments of `_Block`


class BlockWeights(NamedTuple):
    """The weights of a block; the norms of heads are None if queries and keys have none."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def active(x: Tensor) -> bool:
    """True if a forward pass over x should use these functions.

    They compute all gradients or none, need the kernels, and are opaque to torch.compile.
    """
    return (
        (x.requires_grad or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and calls.usable(x)
    )


def block(
    x: Tensor,
    shape: BlockShape,
    rotary: tuple[Tensor, Tensor],
    weights: BlockWeights,
    document_start: Tensor | None = None,
    branches: tuple[LowRank | None, ...] = (None,) * 7,
) -> Tensor:
    """x (N, C) → x + attention(norm(x)), and then + mlp(norm(·)), (N, C).

    `rotary` is cos and sin, (T, D/2) each. Weights may be more precise than x, and get gradients of
    their own precision. No position attends to any before its `document_start` (B, T) int64.
    `branches` are the LoRA branches of the seven matrices.
    """
    dtype = ACCUMULATED[x.dtype]
    cos, sin = (table.to(dtype).contiguous() for table in rotary)
    start = None if document_start is None else document_start.contiguous()
    scales = tuple(1.0 if lora is None else lora.scale for lora in branches)
    norms = (None if weight is None else weight.to(dtype) for weight in weights[:4])
    factors = (
        factor for lora in branches for factor in ((lora.a, lora.b) if lora else (None,) * 2)
    )
    # tensors report requires_grad inside a Function even where no gradient is computed
    options = shape, scales, torch.is_grad_enabled()
    arguments = (*norms, *weights[4:], *factors)
    return _Block.apply(x.contiguous(), options, cos, sin, start, *arguments)


class _Block(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, options: tuple, cos: Tensor, sin: Tensor, start: Any, *weights: Any
    ) -> Tensor:
        shape, scales, trained = options
        norm1, norm2, *head_norms = weights[:4]
        branches = tuple(
            None if a is None else LowRank(a, b, scale)
            for a, b, scale in zip(weights[11::2], weights[12::2], scales)
        )
        # without dropout the branches are added to the matrices
        matrices = (
            weights[4:11] if shape.lora_dropout else list(map(added, weights[4:11], branches))
        )
        ctx.seeds = torch.randint(1 << 31, (2,)).tolist() if shape.dropout else (0, 0)
        seeds = torch.randint(1 << 31, (4,)).tolist() if shape.lora_dropout else (0,) * 4
        ctx.products = [
            LoraProducts(
                branches[group], list(map(len, matrices[group])), shape.lora_dropout, seed, trained
            )
            for group, seed in zip((QKV, OUTPUT, GATE_UP, DOWN), seeds)
        ]
        qkv_products, output_products, gate_up_products, down_products = ctx.products
        joined = [_join(x.dtype, matrices[group]) for group in (QKV, OUTPUT, GATE_UP, DOWN)]

        # x + attention(norm(x))
        qkv = qkv_products.product(_rms_norm(x, norm1, shape.eps), joined[0])  # (N, (H + 2K)·D)
        heads = split_heads(qkv, (cos, sin), (head_norms[0], head_norms[1]), shape)
        if trained or start is not None:
            mixed, kept_weights = attend(heads, start, shape)
            mixed = join_heads(mixed, shape)  # (N, H·D)
        else:
            query, key, value = heads
            mixed, kept_weights = causal_attention(query, key, value, shape.scale), []
            mixed = mixed.transpose(1, 2).reshape(len(x), -1)
        middle = _add(x, mixed, joined[1], output_products, shape.dropout, ctx.seeds[0])
        # + mlp(norm(·))
        normed = _rms_norm(middle, norm2, shape.eps)
        gate_up = gate_up_products.product(normed, joined[2])  # (N, 2F)
        y = _add(middle, _gated(gate_up), joined[3], down_products, shape.dropout, ctx.seeds[1])

        ctx.shape, ctx.dtype = shape, weights[4].dtype
        saved = (x, middle, qkv, mixed, gate_up, cos, sin, start, norm1, norm2)
        ctx.save_for_backward(*saved, *head_norms, *joined, *heads, *kept_weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, middle, qkv, mixed, gate_up, cos, sin, start, norm1, norm2 = saved[:10]
        head_norms, joined, heads, kept_weights = (
            saved[10:12],
            saved[12:16],
            saved[16:19],
            saved[19:],
        )
        shape, dy = ctx.shape, dy.contiguous()
        qkv_products, output_products, gate_up_products, down_products = ctx.products

        # the MLP
        above = dropped(dy, shape.dropout, ctx.seeds[1])
        dgate_up, inner = _gated_backward(gate_up, down_products.input_gradient(above, joined[3]))
        ddown = _matrix_gradients(ctx, DOWN, down_products, above, inner)
        normed = _rms_norm(middle, norm2, shape.eps)
        dinto = _matrix_gradients(ctx, GATE_UP, gate_up_products, dgate_up, normed)
        dnormed = gate_up_products.input_gradient(dgate_up, joined[2])
        dmiddle, dnorm2 = _rms_norm_backward(middle, norm2, dnormed, dy, shape.eps)
        # attention
        above = dropped(dmiddle, shape.dropout, ctx.seeds[0])
        doutput = _matrix_gradients(ctx, OUTPUT, output_products, above, mixed)
        dmixed = unjoin_heads(output_products.input_gradient(above, joined[1]), shape)
        dheads = attend_backward(heads, dmixed, kept_weights, start, shape)
        dqkv, dhead_norms = split_heads_backward(qkv, (cos, sin), head_norms, dheads, shape)
        normed = _rms_norm(x, norm1, shape.eps)
        dprojections = _matrix_gradients(ctx, QKV, qkv_products, dqkv, normed)
        dnormed = qkv_products.input_gradient(dqkv, joined[0])
        dx, dnorm1 = _rms_norm_backward(x, norm1, dnormed, dmiddle, shape.eps)

        dmatrices, dbranches = zip(*dprojections, *doutput, *dinto, *ddown)
        dfactors = (factor for pair in dbranches for factor in pair)
        return dx, *(None,) * 4, dnorm1, dnorm2, *dhead_norms, *dmatrices, *dfactors


def _matrix_gradients(
    ctx: Any, group: slice, products: LoraProducts, dy: Tensor, x: Tensor
) -> list[tuple]:
    """(its gradient or None, those of its LoRA branch) of each matrix of a group.

    The group reads x (N, in); dy (N, Σ out) is the gradient of its products.
    """
    trained = ctx.needs_input_grad[MATRICES][group]
    gradients: Any
    if all(trained):
        gradients = matrix_gradient(dy, x).to(ctx.dtype).split(products.outputs)
    else:
        gradients = [
            matrix_gradient(columns, x).to(ctx.dtype) if needed else None
            for columns, needed in zip(dy.split(products.outputs, dim=1), trained)
        ]
    return list(zip(gradients, products.gradients(dy, x)))


def _join(dtype: torch.dtype, matrices: Any) -> Tensor:
    return (matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))).to(dtype)


def _add(
    residual: Tensor, x: Tensor, weight: Tensor, products: LoraProducts, dropout: float, seed: int
) -> Tensor:
    """residual + dropout(x · weightᵀ)."""
    if not (dropout or products.dropout or products.trained):
        return torch.addmm(residual, x, weight.T)
    if not (dropout or products.dropout) and regular(x):
        return matmul(x, weight.T, residual)
    y = products.product(x, weight)
    return dropped(y, dropout, seed, residual) if dropout else y.add_(residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.layers.RMSNorm` of x (…, C) with weight (C,)."""
    rows = x.reshape(-1, x.shape[-1])
    return _RMSNorm.apply(rows, weight.to(ACCUMULATED[x.dtype]), eps).view(x.shape)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_rms_norm_backward(x, weight, gradient.contiguous(), None, ctx.eps), None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    calls.run("rms_norm", x.dtype, x, weight, y, *x.shape, eps)
    return y


def _rms_norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x (plus `residual`) and of the weight."""
    dx, sums = torch.empty_like(x), weight.new_zeros(CHUNKS, len(weight))
    calls.run("rms_norm_backward", x.dtype, x, weight, dy, residual, dx, sums, *x.shape, eps)
    return dx, sums.sum(0)


def gated(gate_up: Tensor, curve: Curve) -> Tensor:
    """act(gate) · up of rows [gate, up] (…, 2F) → (…, F), for the activation of a curve."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    return _Gated.apply(rows, curve).view(*gate_up.shape[:-1], -1)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, curve: Curve) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.curve = curve
        return _gated(gate_up, curve)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return _gated_backward(gate_up, gradient.contiguous(), ctx.curve)[0], None


def _gated(gate_up: Tensor, curve: Curve = SILU) -> Tensor:
    rows, size = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    calls.run("gated", gate_up.dtype, gate_up, y, rows, size, *curve)
    return y


def _gated_backward(gate_up: Tensor, dy: Tensor, curve: Curve = SILU) -> tuple[Tensor, Tensor]:
    """(the gradient, the result of the forward pass)."""
    dx, y = torch.empty_like(gate_up), torch.empty_like(dy)
    calls.run("gated_backward", gate_up.dtype, gate_up, dy, dx, y, *dy.shape, *curve)
    return dx, y


def gelu_tanh_(x: Tensor) -> Tensor:
    """Replaces x (…, F), contiguous, by GELU(x) (Hendrycks & Gimpel 2016), without a gradient."""
    calls.run("gelu_tanh", x.dtype, x, x.numel() // x.shape[-1], x.shape[-1])
    return x
