"""Tensors of a checkpoint ↔ parameters of a Transformer: names by the table of families, several stored as one."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.checkpoints.families import Family, Row
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.model.device import dtype_name
from lmcli.model.transformer import Transformer


class Stored(NamedTuple):
    """A tensor of a file, and the names of the parameters it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: str


def stored_tensors(family: Family, model: Transformer) -> Iterator[Stored]:
    """Every tensor that a file of this model holds, each parameter in exactly one; what adapters add stands in none."""
    config = model.config
    left = dict.fromkeys(name for name, _ in model.named_parameters() if not name.endswith((".lora_a", ".lora_b")))
    head_rows = family.head_rows.get(config.head, ())
    for row in (*family.rows, *head_rows):
        if row.when and getattr(config, row.when[0]) != row.when[1]:
            continue
        for theirs, ours in _instances(row, config, left):
            for name in ours:
                del left[name]
            bare = config.head == "none" or (row in head_rows and not theirs.startswith(family.prefix))
            yield Stored(theirs.removeprefix(family.prefix) if config.head == "none" and bare else theirs, ours, row.layout)
    assert not left, f"{family.model_type} has no place for {', '.join(left)}"


def _instances(row: Row, config: ModelConfig, left: dict[str, None]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(their name, our names) of the tensors of a row that the model has."""
    layers = range(max(config.num_hidden_layers, config.num_encoder_layers)) if "{}" in row.ours[0] else (0,)
    for layer in layers:
        for end in ("", ".weight", ".bias"):
            ours = tuple(f"{name.replace('{}', str(layer))}{end}" for name in row.ours)
            if all(name in left for name in ours):
                yield f"{row.theirs.replace('{}', str(layer))}{end}", ours


def known_to_other_heads(family: Family, name: str) -> bool:
    """Whether a tensor belongs to another head that the family's files may carry beside this one's."""
    others = {row.theirs for rows in family.head_rows.values() for row in rows} | {*family.aside}
    return any(spelled == other or spelled.startswith(f"{other}.")
               for spelled in (name, f"{family.prefix}{name}") for other in others)


def joined(parts: list[Tensor], layout: str, heads: int) -> Tensor:
    """One stored tensor out of our parameters."""
    if layout == "flat":
        return parts[0].reshape(1, -1)
    if layout == "heads":
        split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
        return torch.stack(split, dim=1).reshape(-1, *parts[0].shape[1:])
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.T if layout == "columns" and whole.ndim == 2 else whole


def parted(tensor: Tensor, sizes: list[int], layout: str, heads: int) -> list[Tensor]:
    """Our parameters, of `sizes` rows, out of one stored tensor."""
    if layout == "flat":
        return [tensor.reshape(-1)]
    if layout == "heads":
        split = tensor.reshape(heads, len(sizes), -1, *tensor.shape[1:])
        return [split[:, i].reshape(-1, *tensor.shape[1:]) for i in range(len(sizes))]
    if layout == "columns" and tensor.ndim == 2:
        tensor = tensor.T
    return list(tensor.split(sizes)) if len(sizes) > 1 else [tensor]


def put(model: Transformer, family: Family, tensors: dict[str, Tensor], where: str) -> list[str]:
    """Gives a model made on the "meta" device the tensors of a file, without a copy; returns the names it had no use for.

    Raises UserError naming the tensor that is missing, has a wrong shape (with both shapes) or holds no floating-point
    numbers, and one that only another kind of model can have.
    """
    state, used = {}, set()
    heads, config = model.config.num_attention_heads, model.config
    for theirs, ours, layout in stored_tensors(family, model):
        parts = [model.get_parameter(part) for part in ours]
        wanted = tuple(joined(parts, layout, heads).shape)
        name = _found_name(theirs, family, config, tensors)
        if name is None and theirs in family.optional:
            name, tensors = theirs, {**tensors, theirs: torch.zeros(wanted)}
        if name is None:
            raise UserError(f"has no tensor {theirs}", where=where, hint="the file and config.json do not belong together")
        tensor = tensors[name]
        if wanted != tuple(tensor.shape):
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, config.json says {wanted}", where=where)
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {dtype_name(tensor.dtype)}, not floating-point numbers", where=where)
        state.update(zip(ours, parted(tensor, [len(part) for part in parts], layout, heads)))
        used.add(name)
    _refuse_other_embeddings(family, config, tensors, where)
    repeated = {*_repeated(family, config)}
    if config.head == "lm":
        repeated |= {*family.twice, *family.twice.values()}
    unused = [name for name in tensors if name not in used and not re.search(family.ignored, name)
              and not {name, f"{family.prefix}{name}"} & repeated]
    unknown = [name for name in unused if not known_to_other_heads(family, name)]
    if unknown:
        raise UserError(f"has a tensor that {family.model_type} does not know: {unknown[0]}", where=where,
                        hint="config.json may name the wrong model_type")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return unused


def new_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints from TensorFlow call a norm's weight and bias gamma and beta."""
    return {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): tensor for name, tensor in tensors.items()}


def as_stored(config: ModelConfig, family: Family, tensors: dict[str, Tensor]) -> ModelConfig:
    """The configuration, corrected by what a file holds: a bare encoder may come without the layer on its first token,
    and a head that is said to share the embedding with a matrix of its own, which transformers then takes."""
    if config.head == "none" and not any("pooler." in name for name in tensors):
        config = replace(config, head_dense=False)
    if config.head == "lm" and config.tie_word_embeddings:
        names = [spelled(f"{family.module_of(ours)}.weight", family.prefix, tensors)
                 for ours in ("embedding", "head.output")]
        if None not in names and not _same(*(tensors[name] for name in names)):
            config = replace(config, tie_word_embeddings=False)
    return config


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _refuse_other_embeddings(family: Family, config: ModelConfig, tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError where a stack has an embedding of its own: ours share one."""
    name = _found_name(f"{family.module_of('embedding')}.weight", family, config, tensors)
    for copy in (spelled(f"{module}.weight", family.prefix, tensors) for module in family.copies):
        if copy is not None and not _same(tensors[copy], tensors[name]):
            raise UserError(f"{copy} differs from {name}", where=where,
                            hint="stacks with embeddings of their own are not supported")


def _repeated(family: Family, config: ModelConfig) -> list[str]:
    """Names under which the embedding may stand once more, or instead."""
    head = [family.module_of("head.output")] if config.head == "lm" and config.tie_word_embeddings else []
    return [f"{module}.weight" for module in (*family.copies, *head)]


def _found_name(theirs: str, family: Family, config: ModelConfig, tensors: dict[str, Tensor]) -> str | None:
    """The name under which a tensor stands in a file, its own first."""
    names = [theirs, *(name for pair in family.twice.items() if theirs in pair for name in pair)]
    if theirs == f"{family.module_of('embedding')}.weight":
        names += _repeated(family, config)
    found = (spelled(name, family.prefix, tensors) for name in names)
    return next((name for name in found if name is not None), None)


def spelled(theirs: str, prefix: str, tensors: dict[str, Tensor]) -> str | None:
    """The name that a file has for a tensor; None without it. A bare model's file leaves the prefix out, some others carry
    it all the same."""
    return next((name for name in (theirs, theirs.removeprefix(prefix), f"{prefix}{theirs}") if name in tensors), None)


def tensors_of(model: Transformer, family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a file of this model, in `dtype` on the CPU."""
    state = dict(model.named_parameters())
    tensors = {theirs: joined([state[name].detach() for name in ours], layout, model.config.num_attention_heads)
               .to(dtype).cpu().contiguous() for theirs, ours, layout in stored_tensors(family, model)}
    return {**tensors, **{name: tensors[read].clone() for name, read in family.twice.items() if read in tensors}}
