"""Products of many rows with a matrix, in few shapes.

On a CPU, bfloat16 products are oneDNN's. It generates code for each new shape, in 2 to 20 ms, and
keeps it, a third of a megabyte, for each of some 50 products of a training step. Batches of texts
have another number of rows at nearly every step. So rows are filled up with zeros to one of few
numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

REGULAR_ROWS = 256  # multiples of it are left alone: rows of one length, as packed text has


def filled_rows(rows: int) -> int:
    """To how many rows so many are filled up: one of 8 numbers between powers of two.

    That adds 4 % on average; below 128 it is a multiple of 16.
    """
    step = max(16, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step


def regular(x: Tensor) -> bool:
    """True if the products of these rows (N, C) are made as they are."""
    rows = len(x)
    return not rows % REGULAR_ROWS or rows == filled_rows(rows) or not _generates_code(x)


def _generates_code(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def filled(x: Tensor) -> Tensor:
    """x (N, C) with rows of zeros up to `filled_rows`, unless its rows are regular."""
    if regular(x):
        return x
    y = x.new_empty(filled_rows(len(x)), x.shape[1])
    y[: len(x)], y[len(x) :] = x, 0
    return y


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, C) · matrix (C, O)."""
    return (filled(x) @ matrix)[: len(x)]


def matrix_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ · x (O, C), of rows dy (N, O) and x (N, C)."""
    return filled(dy).T @ filled(x)


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, C) · matrixᵀ (O, C) + bias (O,), as F.linear."""
    rows = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or regular(rows):
        return F.linear(x, matrix, bias)
    y = _Product.apply(rows, matrix).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return product(x, matrix.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        rows, dy = len(dy), filled(dy)
        dx = (dy @ matrix)[:rows] if ctx.needs_input_grad[0] else None
        return dx, dy.T @ filled(x) if ctx.needs_input_grad[1] else None


def varied(query: Tensor, key: Tensor) -> bool:
    """True if products of these heads (B, H, T, D) should be float32, which MKL multiplies.

    These are small and many, and in bfloat16 each number of rows and each length would be code of
    its own. Lengths that are multiples of 64 are those of packed text, and of long ones bfloat16 is
    faster.
    """
    lengths = query.shape[2], key.shape[2]
    odd = any(length % 64 for length in lengths) and max(lengths) <= 128
    return odd and _generates_code(query)
