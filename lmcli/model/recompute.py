"""Blocks of which only what enters them is kept for the backward pass, which calculates the rest again (Chen et al. 2016).

torch.utils.checkpoint does the same, but imports torch's compiler: over a second and 100 MB when memory has just run out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model.device import random_states, set_random_states


class _Recomputed(Function):
    @staticmethod
    def forward(ctx, run: Callable, device: torch.device, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.run, ctx.device, ctx.parameters = run, device, tensors[count:]
        ctx.states = random_states(device)
        ctx.save_for_backward(*tensors[:count])
        return _run(ctx, tensors[:count])[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        now = random_states(ctx.device)
        set_random_states(ctx.states)  # draws the same dropout again
        inputs, y = _run(ctx, ctx.saved_tensors)
        set_random_states(now)
        needed = ctx.needs_input_grad[3:]
        sources = [x for x, wanted in zip((*inputs, *ctx.parameters), needed) if wanted]
        with torch.enable_grad():
            alone = (y * gradient).sum()  # handed a gradient, torch.autograd.grad would import sympy
        found = iter(torch.autograd.grad(alone, sources, allow_unused=True))
        return None, None, None, *(next(found) if wanted else None for wanted in needed)


def _run(ctx, tensors: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], Tensor]:
    """(inputs, output) of a graph apart. The forward pass makes one too: without gradients, torch's attention would take
    another kernel, which rounds in another way."""
    inputs = [x if x is None else x.detach().requires_grad_(needed) for x, needed in zip(tensors, ctx.needs_input_grad[3:])]
    with torch.enable_grad():
        return inputs, ctx.run(*inputs)


def recomputed(layer: nn.Module, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """run(*inputs), which calls `layer` and may read no other tensor with a gradient. Values, gradients and random numbers
    are those of the plain call; only `inputs` are kept."""
    device = next(x.device for x in inputs if x is not None)
    return _Recomputed.apply(run, device, len(inputs), *inputs, *layer.parameters())
