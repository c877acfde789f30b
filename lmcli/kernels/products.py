"""Products of many rows with a matrix, in few shapes.

On a CPU, bfloat16 products are oneDNN's. It generates code for each new shape, in 2 to 20 ms, and
keeps it, a third of a megabyte, for each of some 50 products of a training step. Batches of texts
have another number of rows at nearly every step. So rows are padded with zeros to one of few
numbers. And a thread apart makes the first product of a shape: glibc gives each thread memory of
its own, and code that stays among tensors that go would leave holes between them.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

REGULAR_ROWS = 256  # multiples of it are left alone: rows of one length, as packed text has
REGULAR_LENGTH = 64  # as packed text, and long texts, have
SHAPES: set[tuple] = set()  # of the products that code was generated for


def padded_rows(rows: int) -> int:
    """To how many rows so many are padded: one of 8 numbers between powers of two.

    That adds 4 % on average; below 128 it is a multiple of 16.
    """
    step = max(16, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step


def regular(x: Tensor) -> bool:
    """True if the products of these rows (N, C) are made as they are."""
    rows = len(x)
    return not rows % REGULAR_ROWS or rows == padded_rows(rows) or not _generates_code(x)


def _generates_code(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def matmul(a: Tensor, b: Tensor, added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (N, C) · b (C, O) + `added`, which broadcasts to (N, O); without a gradient."""
    product = partial(torch.mm, a, b) if added is None else partial(torch.addmm, added, a, b)
    if not _generates_code(a):
        return product(out=out)
    sums = None if added is None else added.dim()
    shape = (*a.shape, *a.stride(), *b.shape, *b.stride(), sums)
    if shape in SHAPES:
        return product(out=out)
    SHAPES.add(shape)
    out = a.new_empty(len(a), b.shape[1]) if out is None else out
    return _code_thread().submit(_into, out, product).result()


@torch.inference_mode()
def _into(out: Tensor, product: partial[Tensor]) -> Tensor:
    return product(out=out)


@cache
def _code_thread() -> ThreadPoolExecutor:
    # code is generated for a number of threads
    return ThreadPoolExecutor(1, "code", torch.set_num_threads, (torch.get_num_threads(),))


def padded(x: Tensor) -> Tensor:
    """x (N, C) with rows of zeros up to `padded_rows`, unless its rows are regular."""
    if regular(x):
        return x
    y = x.new_empty(padded_rows(len(x)), x.shape[1])
    y[: len(x)], y[len(x) :] = x, 0
    return y


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, C) · matrix (C, O)."""
    return matmul(padded(x), matrix)[: len(x)]


def matrix_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ · x (O, C), of rows dy (N, O) and x (N, C)."""
    return matmul(padded(dy).T, padded(x))


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, C) · matrixᵀ (O, C) + bias (O,), as F.linear."""
    rows = x.reshape(-1, x.shape[-1])
    packed = not len(rows) % REGULAR_ROWS and not x.shape[-2] % REGULAR_LENGTH
    plain = packed or not _generates_code(x)
    if plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, matrix, bias)
    return _Linear.apply(rows, matrix, bias).unflatten(0, x.shape[:-1])


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return matmul(padded(x), matrix.T, bias)[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, matrix), needed = ctx.saved_tensors, ctx.needs_input_grad
        dx = product(dy, matrix) if needed[0] else None
        dmatrix = matrix_gradient(dy, x) if needed[1] else None
        return dx, dmatrix, dy.sum(0) if needed[2] else None


def varied(query: Tensor, key: Tensor) -> bool:
    """True if products of these heads (B, H, T, D) should be float32, which MKL multiplies.

    These are small and many, and in bfloat16 each number of rows and each length would be code of
    its own. Lengths that are multiples of 64 are those of packed text, and of long ones bfloat16 is
    faster.
    """
    lengths = query.shape[2], key.shape[2]
    odd = any(length % REGULAR_LENGTH for length in lengths) and max(lengths) <= 128
    return odd and _generates_code(query)
