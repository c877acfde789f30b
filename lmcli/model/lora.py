"""LoRA (Hu et al. 2021): small trained matrices added to frozen ones of a model, from outside."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import LORA_TARGETS
from lmcli.errors import UsageError
from lmcli.model.heads import LanguageHead
from lmcli.model.layers import Linear
from lmcli.model.transformer import Transformer

IN_BLOCK = re.compile(r"(?:en|de)coder\.layers\.\d+\.(?:attention|cross|mlp)\.(\w+)")
OUTSIDE_BLOCKS = ("embedding", "head")  # targets that "all" does not include


class Lora(NamedTuple):
    """Options of adapters: scale = alpha / rank; `dropout` is applied to their input in training.

    `targets` are names of matrices in a block, "all" for all of these, "embedding", "head".
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)


class LowRank(NamedTuple):
    """An update of a matrix (out, in): scale · b a, with a (rank, in) and b (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float


def added(weight: Tensor, lora: LowRank | None) -> Tensor:
    """The matrix (out, in) plus its update."""
    return weight if lora is None else torch.addmm(weight, lora.b, lora.a, alpha=lora.scale)


class LoraLinear(Linear):
    """x (W + scale · B A)ᵀ + b, (…, in) → (…, out), with trained A (rank, in) and B (out, rank).

    W and b are frozen. B starts at 0, so a new adapter changes nothing. In training x goes through
    dropout, A and B one after the other; otherwise through the sum, as in the merged model.
    """

    def __init__(self, base: Linear, lora_a: nn.Parameter, scale: float, dropout: float):
        nn.Module.__init__(self)
        self.multiply = base.multiply
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.lora_a = base.weight, base.bias, lora_a
        self.scale, self.dropout = scale, dropout
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, len(lora_a)))

    @property
    def lora(self) -> LowRank:
        """The update of the matrix."""
        return LowRank(self.lora_a, self.lora_b, self.scale)

    @property
    def matrix(self) -> Tensor:
        """W + scale · B A, (out, in)."""
        return added(self.weight, self.lora)

    def lora_branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale · dropout(x) Aᵀ (…, rank), B (out, rank)): their product is added to x Wᵀ."""
        x = F.dropout(x, self.dropout, self.training)
        return self.multiply(x, self.lora_a.to(x.dtype)) * self.scale, self.lora_b

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            inner, b = self.lora_branch(x)
            return super().forward(x) + self.multiply(inner, b.to(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.matrix.to(x.dtype), bias)


class LoraEmbedding(nn.Module):
    """Rows of W + scale · (B A)ᵀ, ids (…) → (…, hidden); A (rank, V), B (hidden, rank).

    W (V, hidden) is frozen, A and B are trained. A starts at 0 and B normal, as in PEFT, which has
    no dropout here. In training the rows of A are looked up; otherwise those of the sum, as in the
    merged model.
    """

    dropout = 0.0

    def __init__(self, base: nn.Embedding, lora_b: nn.Parameter, scale: float):
        super().__init__()
        self.weight, self.lora_b, self.scale = base.weight, lora_b, scale
        self.lora_a = nn.Parameter(base.weight.new_zeros(lora_b.shape[1], len(base.weight)))

    @property
    def matrix(self) -> Tensor:
        """W + scale · (B A)ᵀ, (V, hidden)."""
        return added(self.weight, LowRank(self.lora_b.T, self.lora_a.T, self.scale))

    def forward(self, ids: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return F.embedding(ids, self.matrix)
        inner = F.embedding(ids, self.lora_a.T)  # (…, rank)
        return F.embedding(ids, self.weight) + F.linear(inner * self.scale, self.lora_b)


def put_on(
    model: Transformer, lora: Lora, joined: Iterable[tuple[str, ...]] = (), seed: int = 0
) -> None:
    """Replaces the trained target modules by adapters and freezes all other weights of the model.

    `joined` are groups of Linears (names) that a file stores in one matrix; these share one A, as
    in the file. `seed` determines the initial weights. Raises UsageError for a target that the
    model does not have or that cannot have an adapter.
    """
    _check_targets(model, lora.targets)
    targets = set(lora.targets)
    if "all" in targets:
        targets.update(name for name in LORA_TARGETS[1:] if name not in OUTSIDE_BLOCKS)
    modules = {
        name: module
        for name, (module, target) in _candidates(model).items()
        if target in targets and module.weight.requires_grad
    }
    if not modules:
        raise UsageError(
            "frozen_layers leaves nothing that LoRA could train", where="train", hint="lower it"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    first_of = {name: names[0] for names in joined for name in names}
    drawn: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        group = first_of.get(name, name)
        if group not in drawn:
            drawn[group] = _draw(lora.rank, module, generator)
        factor, scale = drawn[group], lora.alpha / lora.rank
        if isinstance(module, Linear):
            _replace(model, name, LoraLinear(module, factor, scale, lora.dropout))
        else:
            _replace(model, name, LoraEmbedding(module, factor, scale))


def _candidates(model: Transformer) -> dict[str, tuple[Linear | nn.Embedding, str]]:
    """The modules that may have an adapter, by name, and the target that each one is."""
    modules: dict[str, tuple[Linear | nn.Embedding, str]] = {
        name: (module, match[1])
        for name, module in model.named_modules()
        if isinstance(module, Linear) and (match := IN_BLOCK.fullmatch(name))
    }
    modules["embedding"] = model.embedding, "embedding"
    if isinstance(model.head, LanguageHead):
        modules["head.output"] = model.head.output, "head"
    return modules


def _check_targets(model: Transformer, targets: tuple[str, ...]) -> None:
    available = {target for _, target in _candidates(model).values()}
    if not targets:
        names = ", ".join(LORA_TARGETS)
        raise UsageError("lora_targets is empty", where="train", hint=f"choose from {names}")
    for target in targets:
        if target == "all" or target in available:
            continue
        raise UsageError(
            "lora_targets: this model has no head over the vocabulary (one for labels is trained "
            "whole)"
            if target == "head"
            else f"lora_targets: no block of this model has a matrix {target!r}",
            where="train",
            hint=f"choose from {', '.join(name for name in LORA_TARGETS if name in available)}",
        )
    outside = [target for target in targets if target in OUTSIDE_BLOCKS]
    if outside and model.tied:
        raise UsageError(
            f"lora_targets: {outside[0]!r} cannot have an adapter: embedding and head of this "
            "model share one matrix, and the adapter would change only one of them",
            where="train",
            hint=f"leave out {' and '.join(outside)}, or train the whole model, without LoRA",
        )
    if "embedding" in targets and model.config.shape == "encoder-decoder":
        raise UsageError(
            "lora_targets: 'embedding' cannot have an adapter: encoder and decoder share the "
            "embedding, and in PEFT's format each would have its own",
            where="train",
            hint="leave out embedding",
        )


def _draw(rank: int, module: Linear | nn.Embedding, generator: torch.Generator) -> nn.Parameter:
    """The factor that does not start at 0, as in PEFT.

    A of a Linear is uniform within 1/√in, B of an embedding standard normal.
    """
    size = module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        factor = torch.empty(size, rank).normal_(generator=generator)
    else:
        factor = torch.empty(rank, size).uniform_(-1, 1, generator=generator) / math.sqrt(size)
    return nn.Parameter(factor.to(module.weight))


def _replace(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module.train(model.training))


def adapters_of(model: nn.Module) -> dict[str, LoraLinear | LoraEmbedding]:
    """The adapters of a model, by module name; empty without any."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear | LoraEmbedding)
    }


def freeze_below(model: Transformer, layers: int) -> None:
    """Freezes the embedding and the lowest `layers` blocks (with two stacks, of the encoder).

    Raises UsageError if there are fewer blocks.
    """
    stack = model.stacks()[0]
    if layers > len(stack.layers):
        raise UsageError(
            f"frozen_layers {layers} is more than the {len(stack.layers)} blocks there are",
            where="train",
            hint=f"choose 0 to {len(stack.layers)}",
        )
    below = (model.embedding, stack.positions, stack.types, stack.embedding_norm, stack.relative)
    for module in (*below, *stack.layers[:layers]):
        if module is not None:
            module.requires_grad_(False)
