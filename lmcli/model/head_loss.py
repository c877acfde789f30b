"""The loss of a language head, from hidden states and its matrix: logits never exist all at once.

In training the gradient is made beside the loss, a piece of rows at a time: on a CPU by kernels.c, elsewhere by torch.
N positions, C hidden size, V words.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model import kernels
from lmcli.model.kernels import ACCUMULATED

ROWS_AT_ONCE = 1024  # rows of logits in one piece, for the kernels: they stay in the cache
WORDS_AT_ONCE = 2048  # columns of logits that are only read: more would be fetched anew from the system each time
LOGITS_AT_ONCE = {"cpu": 1 << 23, "mps": 1 << 23, "cuda": 1 << 28}  # so many numbers of logits exist at a time elsewhere
FEWEST_ROWS = 128  # but so many rows, for the product's sake


def rows_at_once(device: torch.device, words: int) -> int:
    """How many rows of logits over so many words torch works with at a time."""
    return max(FEWEST_ROWS, LOGITS_AT_ONCE[device.type] // words)


def with_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(losses (N,), their gradient (N, V) in the logits' precision) of logits (N, V) and targets (N,), in nats; for
    torch.compile to make two passes over memory of."""
    logprobs = logits.to(ACCUMULATED[logits.dtype]).log_softmax(-1)
    losses = -logprobs.gather(1, targets[:, None])[:, 0]
    if smoothing:
        losses = losses.lerp(-logprobs.mean(-1), smoothing)
    wanted = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = logprobs.exp() - smoothing / logits.shape[1] - (1 - smoothing) * wanted.to(logprobs.dtype)
    return losses, gradient.to(logits.dtype)


def _by_kernels(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The same; the gradient takes the place of the logits."""
    losses = torch.empty(len(logits), dtype=ACCUMULATED[logits.dtype])
    kernels.run("cross_entropy", logits.dtype, logits, targets, losses, *logits.shape, smoothing)
    return losses, logits


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, rows: int,
                beside: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
                narrow: Tensor | None, wide: Tensor | None) -> Tensor:
        matrix, added = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)  # (V, C), (V,)
        total = torch.zeros((), dtype=ACCUMULATED[hidden.dtype], device=hidden.device)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        dbias = None if bias is None else torch.zeros_like(bias)
        dnarrow, dwide = (None, None) if narrow is None else (torch.empty_like(narrow), torch.zeros_like(wide))
        factor = None if narrow is None else wide.to(hidden.dtype)  # (V, R)
        for first in range(0, len(hidden), rows):
            piece = slice(first, first + rows)
            part, wanted, dpart = hidden[piece], targets[piece], dhidden[piece]
            logits = part @ matrix.T if bias is None else torch.addmm(added, part, matrix.T)
            if narrow is not None:
                logits.addmm_(narrow[piece], factor.T)
            losses, dlogits = beside(logits, wanted, smoothing)
            total += losses.sum()
            torch.mm(dlogits, matrix, out=dpart)
            if dweight is not None:
                dweight += dlogits.T @ part
            if bias is not None:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            if narrow is not None:
                torch.mm(dlogits, factor, out=dnarrow[piece])
                dwide += dlogits.T @ narrow[piece]
        ctx.save_for_backward(dhidden, dweight, dbias, dnarrow, dwide)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias, dnarrow, dwide = (
            None if part is None else part * gradient for part in ctx.saved_tensors)
        return dhidden, dweight, dbias, *[None] * 4, dnarrow, dwide


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0,
                  beside: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = with_gradient,
                  more: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The summed −log p of targets (N,) under the logits hidden (N, C) · weightᵀ (V, C) + bias (V,), nats; smoothing as in
    `likelihood.target_losses`. Where there are no kernels for it, `beside` does the work of `with_gradient`.

    `more` are the factors (N, R) and (V, R) of what an adapter adds to the logits, the first · the secondᵀ; they get their
    gradients without one of a whole matrix."""
    more = more or (None, None)
    if not kernels.usable(hidden):
        rows = rows_at_once(hidden.device, len(weight))
        return _CrossEntropy.apply(hidden, weight, bias, targets, smoothing, rows, beside, *more)
    _require_words(targets, len(weight))
    return _CrossEntropy.apply(hidden.contiguous(), weight, bias, targets.contiguous(), smoothing, ROWS_AT_ONCE, _by_kernels,
                               *more)


def _require_words(targets: Tensor, words: int) -> None:
    assert targets.dtype == torch.int64 and (not len(targets) or 0 <= targets.min() <= targets.max() < words)


def target_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """−log p of targets (N,) under the logits hidden (N, C) · weightᵀ (V, C) + bias (V,), nats, (N,) float32 (of float64
    float64); without a gradient.

    Logits are made for a block of words at a time, in the same memory each time, and only their largest and the sum of
    their exponentials is kept, as Milakov & Gimelshein (2018) do.
    """
    _require_words(targets, len(weight))
    dtype, words = ACCUMULATED[hidden.dtype], len(weight)
    kept = torch.zeros(len(hidden), 3, dtype=dtype)  # largest logit, sum of exponentials, logit of the target
    kept[:, 0] = -torch.inf
    room = hidden.new_empty(min(ROWS_AT_ONCE, len(hidden)) * min(WORDS_AT_ONCE, words))
    for start in range(0, len(hidden), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part, wanted, known = hidden[rows], targets[rows].contiguous(), kept[rows]
        for first in range(0, words, WORDS_AT_ONCE):
            block = slice(first, first + WORDS_AT_ONCE)
            matrix = weight[block].to(hidden.dtype)
            logits = room[:len(part) * len(matrix)].view(len(part), len(matrix))
            if bias is None:
                torch.mm(part, matrix.T, out=logits)
            else:
                torch.addmm(bias[block].to(hidden.dtype), part, matrix.T, out=logits)
            kernels.run("merge_logits", hidden.dtype, logits, wanted, known, *logits.shape, first)
    return kept[:, 1].log() - (kept[:, 2] - kept[:, 0])
