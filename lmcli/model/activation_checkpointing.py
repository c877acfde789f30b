"""Activation checkpointing (Chen et al. 2016): blocks that keep only their inputs for backward.

torch.utils.checkpoint does the same, but imports torch's compiler, which takes over a second and
100 MB just when memory has run out.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lmcli.model.attention import AttentionContext, EncoderOutput
from lmcli.model.device import random_states, set_random_states
from lmcli.model.transformer import Block, Transformer


def set_activation_checkpointing(model: Transformer, on: bool) -> None:
    """Makes the blocks of a model keep only their inputs in training, or all activations again.

    Saves memory for a third more work. Values and gradients stay the same.
    """
    for block in model.blocks():
        vars(block).pop("forward", None)
        if on:  # hides the method of the class
            block.forward = MethodType(_block_forward, block)  # type: ignore[method-assign]


def _block_forward(block: Block, x: Tensor, context: AttentionContext) -> Tensor:
    forward = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, x, context)
    states, token_mask = context.encoder_output or (None, None)

    def run(x: Tensor, mask: Tensor | None, states: Tensor | None) -> Tensor:
        output = None if states is None else EncoderOutput(states, token_mask)
        return forward(block, x, replace(context, mask=mask, encoder_output=output))

    return checkpointed(block, run, x, context.mask, states)


def checkpointed(layer: nn.Module, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """run(*inputs), of which only `inputs` are kept for the backward pass.

    `run` calls `layer` and reads no other tensor with a gradient. Values, gradients and random
    numbers are the same as of the plain call.
    """
    device = next(x.device for x in inputs if x is not None)
    return _Checkpoint.apply(run, device, len(inputs), *inputs, *layer.parameters())


class _Checkpoint(Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable, device: torch.device, count: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.run, ctx.device, ctx.parameters = run, device, tensors[count:]
        ctx.states = random_states(device)
        ctx.save_for_backward(*tensors[:count])
        return _run(ctx, tensors[:count])[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        current = random_states(ctx.device)
        set_random_states(ctx.states)  # to draw the same dropout again
        inputs, y = _run(ctx, ctx.saved_tensors)
        set_random_states(current)
        needed = ctx.needs_input_grad[3:]
        sources = [x for x, needs in zip((*inputs, *ctx.parameters), needed) if needs]
        with torch.enable_grad():  # given grad_outputs, torch.autograd.grad would import sympy
            total = (y * gradient).sum()
        gradients = iter(torch.autograd.grad(total, sources, allow_unused=True))
        return None, None, None, *(next(gradients) if needs else None for needs in needed)


def _run(ctx: Any, tensors: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], Tensor]:
    """(inputs, output) in a graph of their own.

    The forward pass builds one too: without gradients, torch's attention would choose another
    kernel, which rounds differently.
    """
    inputs = [
        x if x is None else x.detach().requires_grad_(needs)
        for x, needs in zip(tensors, ctx.needs_input_grad[3:])
    ]
    with torch.enable_grad():
        return inputs, ctx.run(*inputs)
