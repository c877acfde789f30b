"""Tensors of a checkpoint ↔ parameters of a Transformer: names by the table of families, several stored as one."""

import re
from collections.abc import Iterator
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
    """Every tensor that a file of this model holds, each parameter in exactly one."""
    config, left = model.config, dict.fromkeys(name for name, _ in model.named_parameters())
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
    others = [row.theirs for rows in family.head_rows.values() for row in rows]
    return name.startswith(tuple(others)) or name.startswith(("cls.seq_relationship.", f"{family.prefix}pooler."))


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
    tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
    state, used = {}, set()
    heads = model.config.num_attention_heads
    for theirs, ours, layout in stored_tensors(family, model):
        name = _found_name(theirs, family.prefix, tensors)
        if name is None:
            raise UserError(f"has no tensor {theirs}", where=where, hint="the file and config.json do not belong together")
        parts = [model.get_parameter(part) for part in ours]
        wanted, tensor = tuple(joined(parts, layout, heads).shape), tensors[name]
        if wanted != tuple(tensor.shape):
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, config.json says {wanted}", where=where)
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {dtype_name(tensor.dtype)}, not floating-point numbers", where=where)
        state.update(zip(ours, parted(tensor, [len(part) for part in parts], layout, heads)))
        used.add(name)
    unused = [name for name in tensors if name not in used and not re.search(family.ignored, name)]
    if model.config.tie_word_embeddings:
        tied = {row.theirs for row in family.head_rows.get("lm", ()) if "head.output" in row.ours}
        unused = [name for name in unused if name.rpartition(".")[0] not in tied]
    unknown = [name for name in unused if not known_to_other_heads(family, name)]
    if unknown:
        raise UserError(f"has a tensor that {family.model_type} does not know: {unknown[0]}", where=where,
                        hint="config.json may name the wrong model_type")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return unused


def _new_name(name: str) -> str:
    """Checkpoints from TensorFlow call a norm's weight and bias gamma and beta."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _found_name(theirs: str, prefix: str, tensors: dict[str, Tensor]) -> str | None:
    """The name under which a tensor stands: a bare model's file leaves the prefix out, some others carry it all the same."""
    return next((name for name in (theirs, theirs.removeprefix(prefix), f"{prefix}{theirs}") if name in tensors), None)


def tensors_of(model: Transformer, family: Family) -> dict[str, Tensor]:
    """The tensors of a file of this model, in float32 on the CPU."""
    state = dict(model.named_parameters())
    return {theirs: joined([state[name].detach() for name in ours], layout, model.config.num_attention_heads)
            .float().cpu().contiguous() for theirs, ours, layout in stored_tensors(family, model)}
