"""LoRA (Hu et al. 2021): small trained matrices beside frozen ones, put on a model, merged and taken off from outside."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import LORA_TARGETS
from lmcli.errors import UsageError
from lmcli.model import fused
from lmcli.model.layers import Linear
from lmcli.model.transformer import Transformer

PLACE = re.compile(r"(?:en|de)coder\.layers\.\d+\.(?:attention|cross|mlp)\.(\w+)")


class Lora(NamedTuple):
    """How adapters are made: their rank, the alpha by which scale = alpha / rank, the share of what they read that training
    sets to zero, and the parts of a block that get one."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)


class LoraLinear(Linear):
    """x (W + scale · B A)ᵀ + b, (…, in) → (…, out): W and b are a Linear's own, frozen, A (rank, in) and B (out, rank) are
    trained. B starts at 0, and so the whole as the Linear it takes the place of.

    Training reads A and B by themselves, behind dropout; all else the sum, as the merged model does.
    """

    def __init__(self, base: Linear, lora_a: nn.Parameter, scale: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.lora_a, self.scale, self.dropout = base.weight, base.bias, lora_a, scale, dropout
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, len(lora_a)))

    @property
    def low(self) -> fused.LowRank:
        """What is added to the matrix."""
        return fused.LowRank(self.lora_a, self.lora_b, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        if not (self.training and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, fused.added(self.weight, self.low).to(x.dtype), bias)
        narrow = F.linear(F.dropout(x, self.dropout) if self.dropout else x, self.lora_a.to(x.dtype))  # (…, rank)
        return super().forward(x) + F.linear(narrow, self.lora_b.to(x.dtype)) * self.scale


def put_on(model: Transformer, lora: Lora, together: Iterable[tuple[str, ...]] = (), seed: int = 0) -> None:
    """Gives the targets among the blocks' Linears that are trained a LoraLinear, and freezes all other weights of the model.

    Those that a file keeps `together` in one matrix (names of Linears) share one A, as they do there; `seed` decides A.
    Raises UsageError for a target that the model has not.
    """
    if not lora.targets:
        raise UsageError("lora_targets names no part of a block", where="train", hint=f"some of {', '.join(LORA_TARGETS)}")
    there = _linears(model)
    named = LORA_TARGETS[1:] if "all" in lora.targets else lora.targets
    parts = {PLACE.fullmatch(name)[1] for name in there}
    if missing := [target for target in lora.targets if target != "all" and target not in parts]:
        raise UsageError(f"lora_targets: no block of this model has a matrix {missing[0]!r}", where="train",
                         hint=f"it has: {', '.join(target for target in LORA_TARGETS if target in parts)}")
    chosen = {name: linear for name, linear in there.items()
              if PLACE.fullmatch(name)[1] in named and linear.weight.requires_grad}
    if not chosen:
        raise UsageError("frozen_layers leaves no block that LoRA could train", where="train", hint="lower it")
    model.requires_grad_(False)
    generator, first = torch.Generator().manual_seed(seed), {name: names[0] for names in together for name in names}
    shared: dict[str, nn.Parameter] = {}
    for name, linear in chosen.items():
        group = first.get(name, name)
        if group not in shared:
            shared[group] = nn.Parameter(_fresh(lora.rank, linear, generator))
        _swap(model, name, LoraLinear(linear, shared[group], lora.alpha / lora.rank, lora.dropout))
    for block in model.blocks():
        block.inner_dropout = bool(lora.dropout)


def _linears(model: Transformer) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and PLACE.fullmatch(name)}


def _fresh(rank: int, linear: Linear, generator: torch.Generator) -> Tensor:
    """A as PEFT draws it: uniform within 1/√in."""
    drawn = torch.empty(rank, linear.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(linear.in_features)
    return drawn.to(linear.weight)


def _swap(model: Transformer, name: str, linear: Linear) -> None:
    place, _, part = name.rpartition(".")
    setattr(model.get_submodule(place), part, linear.train(model.training))


def put_on_linears(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapters of a model by the names of the Linears that they stand for; empty without any."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def take_off(model: Transformer, merge: bool = False) -> None:
    """Puts plain Linears back: with their own weights, or with `merge` with what the adapters add to them."""
    for name, adapter in put_on_linears(model).items():
        with torch.device("meta"):
            plain = Linear(adapter.in_features, adapter.out_features, bias=adapter.bias is not None)
        weight = fused.added(adapter.weight, adapter.low).detach() if merge else adapter.weight
        plain.weight, plain.bias = nn.Parameter(weight), adapter.bias
        _swap(model, name, plain)
    for block in model.blocks():
        block.inner_dropout = False


def freeze_below(model: Transformer, layers: int) -> None:
    """Stops the training of so many blocks from the bottom (of two stacks: the encoder's), of the embedding and of what lies
    between. Raises UsageError when there are not so many blocks."""
    stack = model.decoder if model.encoder is None else model.encoder
    if layers > len(stack.layers):
        raise UsageError(f"frozen_layers {layers} is more than the {len(stack.layers)} blocks there are", where="train",
                         hint=f"choose 0 to {len(stack.layers)}")
    below = (model.embedding, stack.positions, stack.types, stack.embedding_norm, stack.relative)
    for part in (*below, *stack.layers[:layers]):
        if part is not None:
            part.requires_grad_(False)
