"""Dropout (Srivastava et al. 2014) of which only a seed is kept for the backward pass; on a CPU with compiled kernels."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model import kernels


def dropped(x: Tensor, share: float, seed: int, residual: Tensor | None = None) -> Tensor:
    """x (…, C), contiguous, a share of it set to zero and the rest divided by 1 − share, added to `residual`; x itself when
    the share is 0. The same seed drops the same numbers. Without a gradient."""
    if not share:
        return x
    y, width = torch.empty_like(x), x.shape[-1]
    kept = min(round((1.0 - share) * 2 ** 32), 2 ** 32 - 1)
    kernels.run("dropout", x.dtype, x, residual, y, x.numel() // width, width, seed, kept, 1.0 / (1.0 - share))
    return y


class _DroppedSum(Function):
    @staticmethod
    def forward(ctx, residual: Tensor, x: Tensor, share: float) -> Tensor:
        ctx.share, ctx.seed = share, int(torch.randint(1 << 31, ()))
        return dropped(x.contiguous(), share, ctx.seed, residual.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, dropped(dy.contiguous(), ctx.share, ctx.seed), None


def dropped_sum(residual: Tensor, x: Tensor, share: float) -> Tensor:
    """residual + dropout(x), both (…, C), of which dropout leaves all but a `share`. Nothing is kept for the backward pass,
    which draws the same numbers again."""
    return _DroppedSum.apply(residual, x, share)
