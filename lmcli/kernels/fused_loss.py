"""The loss of a language head, from hidden states and matrix, a chunk of logits at a time.

In training the gradient is computed together with the loss: on a CPU by kernels.c, elsewhere by
torch. N positions, C hidden size, V vocabulary size, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.kernels import calls, products
from lmcli.kernels.calls import ACCUMULATED
from lmcli.model.memory import LOGIT_ROWS_AT_ONCE, logit_rows

WORDS_AT_ONCE = 2048  # columns of logits that are only read; memory for more is slow to allocate
# logits (N, V), targets (N,) and smoothing → losses (N,) and the gradient of the logits (N, V)
LossWithGradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def with_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(losses (N,) in nats, their gradient (N, V)) by torch; two passes if compiled."""
    logprobs = logits.to(ACCUMULATED[logits.dtype]).log_softmax(-1)
    losses = -logprobs.gather(1, targets[:, None])[:, 0]
    if smoothing:
        spread = -logprobs.mean(-1)
        # infinite with any impossible token; between two infinities lerp is NaN
        losses = losses.lerp(spread, smoothing).where(spread.isfinite(), spread)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    expected = smoothing / logits.shape[1]
    gradient = logprobs.exp() - expected - (1 - smoothing) * is_target.to(logprobs.dtype)
    return losses, gradient.to(logits.dtype)


def _with_gradient_by_kernels(
    logits: Tensor, targets: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The same; the gradient overwrites the logits."""
    losses = torch.empty(len(logits), dtype=ACCUMULATED[logits.dtype])
    arrays = logits, targets, losses
    if smoothing:
        calls.run("smoothed_cross_entropy", logits.dtype, *arrays, *logits.shape, smoothing)
    else:
        calls.run("cross_entropy", logits.dtype, *arrays, *logits.shape)
    return losses, logits


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float = 0.0,
    loss_with_gradient: LossWithGradient = with_gradient,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The summed −log p (nats) of targets (N,), logits hidden (N, C) · weightᵀ (V, C) + bias (V,).

    Smoothing is as in `likelihood.target_losses`. `loss_with_gradient` is used without kernels.
    `branch` are the factors (N, R) and (V, R) of what LoRA adds to the logits; they get their
    gradients without one of a whole matrix.
    """
    a, b = branch or (None, None)
    if not calls.usable(hidden):
        rows = logit_rows(hidden.device.type, len(weight))
        options = smoothing, rows, loss_with_gradient
        return _CrossEntropy.apply(hidden, weight, bias, targets, options, a, b)
    _require_tokens(targets, len(weight))
    hidden, targets = hidden.contiguous(), targets.contiguous()
    options = smoothing, LOGIT_ROWS_AT_ONCE, _with_gradient_by_kernels
    return _CrossEntropy.apply(hidden, weight, bias, targets, options, a, b)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, int, LossWithGradient],
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        dtype, (smoothing, rows, loss_with_gradient) = hidden.dtype, options
        total = torch.zeros((), dtype=ACCUMULATED[dtype], device=hidden.device)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)  # (V, C), (V,)
        dhidden, dbias = torch.empty_like(hidden), None if bias is None else torch.zeros_like(bias)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        lora = None  # a, b, da, db
        if a is not None and b is not None:
            lora = a, b.to(dtype), torch.empty_like(a), torch.zeros_like(b)
        for first in range(0, len(hidden), rows):
            chunk = slice(first, first + rows)
            x = products.padded(hidden[chunk])
            real = len(targets[chunk])
            logits = products.matmul(x, matrix.T, offset)
            if lora is not None:
                low_rank = products.padded(lora[0][chunk])
                logits.addmm_(low_rank, lora[1].T)
            losses, dlogits = loss_with_gradient(logits[:real], targets[chunk], smoothing)
            total += losses.sum()
            if real < len(x):
                dlogits = products.padded(dlogits)
                dhidden[chunk] = products.matmul(dlogits, matrix)[:real]
            else:
                products.matmul(dlogits, matrix, out=dhidden[chunk])
            if dweight is not None:
                dweight += products.matmul(dlogits.T, x)
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            if lora is not None:
                lora[2][chunk] = products.matmul(dlogits, lora[1])[:real]
                lora[3].add_(products.matmul(dlogits.T, low_rank))
        ctx.save_for_backward(dhidden, dweight, dbias, *(lora[2:] if lora else (None, None)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias, da, db = (
            None if saved is None else saved * gradient for saved in ctx.saved_tensors
        )
        return dhidden, dweight, dbias, None, None, da, db


def target_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """−log p (nats) of targets (N,), (N,) float32 (of float64: float64), without a gradient.

    Logits are hidden (N, C) · weightᵀ (V, C) + bias (V,), computed for a block of the vocabulary at
    a time in the same memory. Only the largest and the sum of exponentials are kept (Milakov &
    Gimelshein 2018).
    """
    _require_tokens(targets, len(weight))
    dtype, words = ACCUMULATED[hidden.dtype], len(weight)
    # of each row: largest logit, sum of exponentials, logit of the target
    statistics = torch.zeros(len(hidden), 3, dtype=dtype)
    statistics[:, 0] = -torch.inf
    buffer = hidden.new_empty(min(LOGIT_ROWS_AT_ONCE, len(hidden)) * min(WORDS_AT_ONCE, words))
    for start in range(0, len(hidden), LOGIT_ROWS_AT_ONCE):
        rows = slice(start, start + LOGIT_ROWS_AT_ONCE)
        x, answers, known = hidden[rows], targets[rows].contiguous(), statistics[rows]
        for first in range(0, words, WORDS_AT_ONCE):
            block = slice(first, first + WORDS_AT_ONCE)
            matrix = weight[block].to(hidden.dtype)
            logits = buffer[: len(x) * len(matrix)].view(len(x), len(matrix))
            if bias is None:
                torch.mm(x, matrix.T, out=logits)
            else:
                torch.addmm(bias[block].to(hidden.dtype), x, matrix.T, out=logits)
            calls.run("merge_logits", hidden.dtype, logits, answers, known, *logits.shape, first)
    return statistics[:, 1].log() - (statistics[:, 2] - statistics[:, 0])


def _require_tokens(targets: Tensor, words: int) -> None:
    """The kernels write to the place of a target: none may be outside the vocabulary."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, not int64")
    if len(targets) and not 0 <= targets.min() <= targets.max() < words:
        raise ValueError(f"a target is outside the vocabulary of {words:,}")
