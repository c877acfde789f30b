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
from lmcli.model.layers import Linear
from lmcli.model.low_rank import LowRank, added
from lmcli.model.transformer import LanguageHead, Transformer

PLACE = re.compile(r"(?:en|de)coder\.layers\.\d+\.(?:attention|cross|mlp)\.(\w+)")
OUTSIDE = ("embedding", "head")  # of the blocks: these targets are no part of "all"


class Lora(NamedTuple):
    """How adapters are made: their rank, the alpha by which scale = alpha / rank, the share of what they read that training
    sets to zero, and what gets one: parts of a block, "embedding", "head"."""

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
    def low(self) -> LowRank:
        """What is added to the matrix."""
        return LowRank(self.lora_a, self.lora_b, self.scale)

    @property
    def matrix(self) -> Tensor:
        """W + scale · B A, (out, in)."""
        return added(self.weight, self.low)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale · x Aᵀ (…, rank), x behind dropout, and B (out, rank)."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(x, self.lora_a.to(x.dtype)) * self.scale, self.lora_b

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        if not (self.training and torch.is_grad_enabled()):
            return F.linear(x, self.matrix.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        narrow, wide = self.beside(x)
        return super().forward(x) + F.linear(narrow, wide.to(x.dtype))


class LoraEmbedding(nn.Module):
    """The rows of W + scale · (B A)ᵀ that ids name, (…) → (…, hidden): W (words, hidden) is an embedding's own, frozen,
    A (rank, words) and B (hidden, rank) are trained. A starts at 0, B normal, as PEFT has it.

    Training reads the rows of A by themselves, without dropout; all else the sum, as the merged model does.
    """

    dropout = 0.0  # PEFT has none here

    def __init__(self, base: nn.Embedding, lora_b: nn.Parameter, scale: float):
        super().__init__()
        self.weight, self.lora_b, self.scale = base.weight, lora_b, scale
        self.lora_a = nn.Parameter(base.weight.new_zeros(lora_b.shape[1], len(base.weight)))

    @property
    def matrix(self) -> Tensor:
        """W + scale · (B A)ᵀ, (words, hidden)."""
        return added(self.weight, LowRank(self.lora_b.T, self.lora_a.T, self.scale))

    def forward(self, ids: Tensor) -> Tensor:
        """As the class says."""
        if not (self.training and torch.is_grad_enabled()):
            return F.embedding(ids, self.matrix)
        narrow = F.embedding(ids, self.lora_a.T)  # (…, rank)
        return F.embedding(ids, self.weight) + F.linear(narrow * self.scale, self.lora_b)


def put_on(model: Transformer, lora: Lora, together: Iterable[tuple[str, ...]] = (), seed: int = 0) -> None:
    """Gives the targets that are trained an adapter, a LoraLinear or LoraEmbedding, and freezes all other weights of the
    model.

    Those that a file keeps `together` in one matrix (names of Linears) share one A, as they do there; `seed` decides what
    is drawn. Raises UsageError for a target that the model has not, or that cannot have one.
    """
    _require(model, lora.targets)
    inner = [target for target in LORA_TARGETS[1:] if target not in OUTSIDE] if "all" in lora.targets else []
    modules = {name: model.get_submodule(name) for name, target in _places(model).items()
               if target in (*inner, *lora.targets)}
    chosen = {name: module for name, module in modules.items() if module.weight.requires_grad}
    if not chosen:
        raise UsageError("frozen_layers leaves nothing that LoRA could train", where="train", hint="lower it")
    model.requires_grad_(False)
    generator, first = torch.Generator().manual_seed(seed), {name: names[0] for names in together for name in names}
    shared: dict[str, nn.Parameter] = {}
    for name, module in chosen.items():
        group = first.get(name, name)
        if group not in shared:
            shared[group] = nn.Parameter(_fresh(lora.rank, module, generator))
        _swap(model, name, _adapted(module, shared[group], lora))
    for block in model.blocks():
        block.low_dropout = lora.dropout


def _places(model: Transformer) -> dict[str, str]:
    """The modules that may get an adapter, by name: which target each is."""
    linears = (name for name, module in model.named_modules() if isinstance(module, Linear))
    inner = {name: PLACE.fullmatch(name)[1] for name in linears if PLACE.fullmatch(name)}
    return inner | {"embedding": "embedding"} | ({"head.output": "head"} if isinstance(model.head, LanguageHead) else {})


def _require(model: Transformer, targets: tuple[str, ...]) -> None:
    there = set(_places(model).values())
    if not targets:
        raise UsageError("lora_targets names nothing", where="train", hint=f"some of {', '.join(LORA_TARGETS)}")
    if missing := [target for target in targets if target != "all" and target not in there]:
        what = "this model has no head over the vocabulary (one for labels is trained whole)" if missing[0] == "head" else \
            f"no block of this model has a matrix {missing[0]!r}"
        raise UsageError(f"lora_targets: {what}", where="train",
                         hint=f"it has: {', '.join(target for target in LORA_TARGETS if target in there)}")
    outside = [target for target in targets if target in OUTSIDE]
    if outside and "head" in there and model.head.output.weight is model.embedding.weight:
        raise UsageError(f"lora_targets: {outside[0]!r} cannot have an adapter: embedding and head of this model are one "
                         "matrix, and an adapter on one of them would make two of it", where="train",
                         hint=f"leave {' and '.join(outside)} out, or train the whole model, without LoRA")
    if "embedding" in targets and model.config.shape == "encoder-decoder":
        raise UsageError("lora_targets: 'embedding' cannot have an adapter: two stacks share it, and in PEFT's form each "
                         "would have its own", where="train", hint="leave embedding out")


def _adapted(module: Linear | nn.Embedding, drawn: nn.Parameter, lora: Lora) -> LoraLinear | LoraEmbedding:
    scale = lora.alpha / lora.rank
    return LoraEmbedding(module, drawn, scale) if isinstance(module, nn.Embedding) else \
        LoraLinear(module, drawn, scale, lora.dropout)


def _fresh(rank: int, module: Linear | nn.Embedding, generator: torch.Generator) -> Tensor:
    """What does not start at 0, as PEFT draws it: A of a Linear uniform within 1/√in, B of an embedding normal."""
    if isinstance(module, nn.Embedding):
        return torch.empty(module.embedding_dim, rank).normal_(generator=generator).to(module.weight)
    drawn = torch.empty(rank, module.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(module.in_features)
    return drawn.to(module.weight)


def _swap(model: Transformer, name: str, module: nn.Module) -> None:
    place, _, part = name.rpartition(".")
    setattr(model.get_submodule(place), part, module.train(model.training))


def adapters_of(model: nn.Module) -> dict[str, LoraLinear | LoraEmbedding]:
    """The adapters of a model by the names of the modules that they stand for; empty without any."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoraLinear, LoraEmbedding))}


def take_off(model: Transformer, merge: bool = False) -> None:
    """Puts plain modules back: with their own weights, or with `merge` with what the adapters add to them."""
    for name, adapter in adapters_of(model).items():
        with torch.device("meta"):
            plain = nn.Embedding(*adapter.weight.shape) if isinstance(adapter, LoraEmbedding) else \
                Linear(adapter.in_features, adapter.out_features, bias=adapter.bias is not None)
        plain.weight = nn.Parameter(adapter.matrix.detach()) if merge else adapter.weight
        if isinstance(adapter, LoraLinear):
            plain.bias = adapter.bias
        _swap(model, name, plain)
    for block in model.blocks():
        block.low_dropout = 0.0


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
