"""Dropout (Srivastava et al. 2014) that keeps only a seed for backward; on a CPU with kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.kernels import calls


def dropped(x: Tensor, dropout: float, seed: int, residual: Tensor | None = None) -> Tensor:
    """dropout(x) + `residual` for contiguous x (…, C), without a gradient; x itself for dropout 0.

    A share `dropout` of the numbers becomes zero, the others are divided by 1 − dropout. The same
    seed selects the same numbers.
    """
    if not dropout:
        return x
    y, width = torch.empty_like(x), x.shape[-1]
    threshold = min(round((1.0 - dropout) * 2**32), 2**32 - 1)
    sizes = (x.numel() // width, width, seed, threshold, 1.0 / (1.0 - dropout))
    calls.run("dropout", x.dtype, x, residual, y, *sizes)
    return y


def dropped_sum(residual: Tensor, x: Tensor, dropout: float) -> Tensor:
    """residual + dropout(x), (…, C) each; the backward pass draws the same numbers again."""
    return _DroppedSum.apply(residual, x, dropout)


class _DroppedSum(Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, dropout: float) -> Tensor:
        ctx.dropout, ctx.seed = dropout, int(torch.randint(1 << 31, ()))
        return dropped(x.contiguous(), dropout, ctx.seed, residual.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, dropped(dy.contiguous(), ctx.dropout, ctx.seed), None
