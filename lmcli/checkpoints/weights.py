"""Tensors of a checkpoint's files ↔ parameters of a Transformer, by a family's row.

Reading works on torch's tensors and on numpy's arrays alike, and loads no torch.
"""

import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcli.checkpoints import quantization
from lmcli.checkpoints.family import Family, TensorMap
from lmcli.checkpoints.quantization import GROUP, PACKED, SCALE, SHAPE
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.kernels.decode_step import BFLOAT16, in_precision
from lmcli.storage import safetensors_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcli.model.transformer import Transformer

Shape = tuple[int, ...]
ARRAY_DTYPES: dict[str, np.dtype[Any]] = {  # of safetensors; a file with others is read by torch
    "BF16": BFLOAT16,
    "BOOL": np.dtype(np.bool_),
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
}


def map_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of a .safetensors file, uncopied: their memory is the file's.

    None if one has a dtype that numpy lacks. Raises UserError as `storage.read_tensors`.
    """
    with safetensors_errors(path):
        from safetensors import safe_open

        with safe_open(path, framework="numpy"):  # checks the header: sizes, places, no gaps
            pass
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    header.pop("__metadata__", None)
    if any(entry["dtype"] not in ARRAY_DTYPES for entry in header.values()):
        return None
    arrays = {}
    for name, entry in header.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        dtype = ARRAY_DTYPES[entry["dtype"]]
        data = memory[first:end] if first % dtype.itemsize == 0 else memory[first:end].copy()
        arrays[name] = data.view(dtype).reshape(entry["shape"])
    return arrays


class StoredTensor(NamedTuple):
    """A tensor of a file, the names of our parameters that it holds, and their layout in it."""

    name: str
    parameters: tuple[str, ...]
    layout: str


def stored_tensors(family: Family, model: "Transformer") -> Iterator[StoredTensor]:
    """Every tensor in a file of this model. Each parameter is in one tensor, LoRA's are in none."""
    return tensors_for(family, model.config, (name for name, _ in model.named_parameters()))


def tensors_for(
    family: Family, config: ModelConfig, parameters: Iterable[str]
) -> Iterator[StoredTensor]:
    """Every tensor in a file of a model with parameters of these names; LoRA's are in none."""
    left = {name for name in parameters if not name.endswith((".lora_a", ".lora_b"))}
    head_tensors = family.head_tensors.get(config.head, ())
    for entry in (*family.tensors, *head_tensors):
        if entry.when and getattr(config, entry.when[0]) != entry.when[1]:
            continue
        for name, parameters in _instances(entry, config, left):
            left.difference_update(parameters)
            if config.head == "none":
                name = name.removeprefix(family.prefix)
            yield StoredTensor(name, parameters, entry.layout)
    if left:
        raise UserError(f"{family.model_type} has no tensor for {', '.join(sorted(left))}")


def _instances(
    entry: TensorMap, config: ModelConfig, left: set[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file's name, our names) of each tensor of an entry that the model has, in each layer."""
    layers = max(config.num_hidden_layers, config.num_encoder_layers)
    for layer in range(layers) if "{}" in entry.modules[0] else (0,):
        for end in ("", ".weight", ".bias"):
            names = (f"{name}{end}".replace("{}", str(layer)) for name in entry.modules)
            parameters = tuple(names)
            if left.issuperset(parameters):
                yield f"{entry.file_name}{end}".replace("{}", str(layer)), parameters


def _of_another_head(family: Family, name: str) -> bool:
    """True if a tensor belongs to a head of the family that this model does not have."""
    entries = (entry for entries in family.head_tensors.values() for entry in entries)
    modules = {*(entry.file_name for entry in entries), *family.other_heads}
    return any(
        full_name == module or full_name.startswith(f"{module}.")
        for full_name in (name, f"{family.prefix}{name}")
        for module in modules
    )


def join_tensors(parameters: Sequence["Tensor"], layout: str, heads: int) -> "Tensor":
    """One stored tensor from our parameters; the inverse of `split_tensor`."""
    import torch

    first = parameters[0]
    if layout == "flat":
        return first.reshape(1, -1)
    if layout == "less_one":
        return first.float() - 1
    if layout == "heads":
        by_head = [tensor.reshape(heads, -1, *tensor.shape[1:]) for tensor in parameters]
        return torch.stack(by_head, dim=1).reshape(-1, *first.shape[1:])
    joined = torch.cat(list(parameters)) if len(parameters) > 1 else first
    return joined.T if layout == "columns" and joined.ndim == 2 else joined


def joined_shape(shapes: Sequence[Shape], layout: str) -> Shape:
    """The shape of the stored tensor that holds parameters of these shapes."""
    first, rows = shapes[0], sum(shape[0] for shape in shapes)
    if layout == "flat":
        return (1, math.prod(first))
    shape = (rows, *first[1:])
    return shape[::-1] if layout == "columns" and len(shape) == 2 else shape


def split_tensor(tensor: Any, sizes: list[int], layout: str, heads: int) -> list[Any]:
    """Our parameters, with `sizes` rows each, from one stored tensor."""
    if layout == "flat":
        return [tensor.reshape(-1)]
    if layout == "less_one":
        is_array = isinstance(tensor, np.ndarray)
        return [(in_precision(tensor, "float32") if is_array else tensor.float()) + 1]
    if layout == "heads":
        by_head = tensor.reshape(heads, len(sizes), -1, *tensor.shape[1:])
        return [by_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(len(sizes))]
    if layout == "columns" and tensor.ndim == 2:
        tensor = tensor.T
    return [tensor[end - size : end] for size, end in zip(sizes, accumulate(sizes))]


def load_tensors(
    model: "Transformer", family: Family, tensors: dict[str, "Tensor"], where: str
) -> list[str]:
    """Assigns a file's tensors to a model on the "meta" device, uncopied; returns the unused names.

    Raises UserError as `read_parameters`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    state, unused = read_parameters(model.config, shapes, family, tensors, where)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return unused


def read_parameters(
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    family: Family,
    tensors: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], list[str]]:
    """(the parameters with these names and shapes from a file's tensors, the unused tensors).

    Raises UserError naming a tensor that is missing, has a wrong shape (with both shapes) or holds
    no floating-point numbers, and one that no model of the family has.
    """
    heads = config.num_attention_heads
    # each parameter from its tensor
    state: dict[str, Any] = {}
    used = set()
    for stored in tensors_for(family, config, shapes):
        shape = joined_shape([shapes[name] for name in stored.parameters], stored.layout)
        name = _name_in_file(stored.name, family, config, tensors)
        if name is None and stored.name in family.optional:
            import torch

            name = stored.name
            tensors = {**tensors, name: torch.zeros(shape)}
        if name is None:
            raise _missing(stored.name, tensors, where)
        tensor = tensors[name]
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}", where=where
            )
        kind = file_dtype(tensor)
        if not kind.startswith(("float", "bfloat")):
            raise UserError(f"{name} holds {kind}, not floating-point numbers", where=where)
        sizes = [shapes[parameter][0] for parameter in stored.parameters]
        state.update(zip(stored.parameters, split_tensor(tensor, sizes, stored.layout, heads)))
        used.add(name)
    # tensors that are left over
    _refuse_separate_embeddings(family, config, tensors, where)
    repeated = {*_embedding_copies(family, config)}
    if config.head == "lm":
        repeated |= {*family.duplicates, *family.duplicates.values()}
    unused = [
        name
        for name in tensors
        if name not in used
        and not re.search(family.ignored, name)
        and not {name, f"{family.prefix}{name}"} & repeated
    ]
    for name in unused:
        if not _of_another_head(family, name):
            raise UserError(
                f"has a tensor that {family.model_type} does not have: {name}",
                where=where,
                hint="config.json may name the wrong model_type",
            )
    return state, unused


def file_dtype(tensor: Any) -> str:
    """The dtype of a file's tensor or array by torch's name: bfloat16."""
    name = str(tensor.dtype).removeprefix("torch.")
    return {BFLOAT16.str: "bfloat16"}.get(name, name)


def current_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with TensorFlow's names of a norm's parameters, gamma and beta, replaced."""
    return {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): tensor
        for name, tensor in tensors.items()
    }


# parts of names that torch.compile, DistributedDataParallel, FSDP, activation checkpointing and
# DeepSpeed put in front of a module's own
WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
PEFT_PREFIX = "base_model.model."


def without_wrappers(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """The tensors without what wrappers left in their names, such as "_orig_mod.".

    Raises UserError if two tensors would then have one name.
    """
    plain: dict[str, Any] = {}
    for name, tensor in tensors.items():
        plain_name = ".".join(
            component for component in name.split(".") if component not in WRAPPERS
        )
        plain_name = plain_name.removeprefix(PEFT_PREFIX)
        if plain_name in plain:
            raise UserError(
                f"has {plain_name} twice, once with the prefix of a wrapper: {name}",
                where=where,
                hint="keep one of the two",
            )
        plain[plain_name] = tensor
    return plain


def _missing(name: str, tensors: Mapping[str, Any], where: str) -> UserError:
    """The error for a missing tensor; it names the prefix under which the file has the tensor."""
    prefixed = next((other for other in tensors if other.endswith(f".{name}")), None)
    if prefixed:
        prefix = prefixed.removesuffix(name)
        return UserError(
            f"has no tensor {name}, but {prefixed}",
            where=where,
            hint=f"a wrapper may have left the prefix {prefix!r}: save the tensors without it",
        )
    hint = "the file and config.json do not belong together"
    if any("lora_" in other or ".base_layer." in other for other in tensors):
        hint = "it holds an adapter that is not merged: use merge_and_unload of peft, then save it"
    return UserError(f"has no tensor {name}", where=where, hint=hint)


def config_for_tensors(
    config: ModelConfig, family: Family, tensors: Mapping[str, Any]
) -> ModelConfig:
    """The configuration with two corrections that only a file's tensors can tell.

    A bare encoder may come without a pooler. A head that config.json calls tied may have its own
    matrix in the file, which is then used, as in transformers.
    """
    if config.head == "none" and not any("pooler." in name for name in tensors):
        config = replace(config, head_dense=False)
    if config.head == "lm" and config.tie_word_embeddings:
        embedding, head = (
            find_name(f"{family.file_module(module)}.weight", family.prefix, tensors)
            for module in ("embedding", "head.output")
        )
        if embedding and head and not _equal(tensors[embedding], tensors[head]):
            config = replace(config, tie_word_embeddings=False)
    return config


def _equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _refuse_separate_embeddings(
    family: Family, config: ModelConfig, tensors: Mapping[str, Any], where: str
) -> None:
    """Raises UserError if encoder and decoder have different embeddings: ours share one."""
    embedding = _name_in_file(f"{family.file_module('embedding')}.weight", family, config, tensors)
    for module in family.embedding_copies:
        copy = find_name(f"{module}.weight", family.prefix, tensors)
        if copy and embedding and not _equal(tensors[copy], tensors[embedding]):
            raise UserError(
                f"{copy} differs from {embedding}",
                where=where,
                hint="an encoder and a decoder with different embeddings are not supported",
            )


def _embedding_copies(family: Family, config: ModelConfig) -> list[str]:
    """Names under which a file may repeat the embedding, or hold it instead of its own name."""
    tied = config.head == "lm" and config.tie_word_embeddings
    modules = [*family.embedding_copies, *([family.file_module("head.output")] if tied else [])]
    return [f"{module}.weight" for module in modules]


def _name_in_file(
    name: str, family: Family, config: ModelConfig, tensors: Mapping[str, Any]
) -> str | None:
    """The name under which a file holds a tensor; other names only if its own is missing."""
    pairs = family.duplicates.items()
    names = [name, *(other for pair in pairs if name in pair for other in pair)]
    if name == f"{family.file_module('embedding')}.weight":
        names += _embedding_copies(family, config)
    names_in_file = (find_name(name, family.prefix, tensors) for name in names)
    return next((name for name in names_in_file if name), None)


def find_name(name: str, prefix: str, tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor in a file, with or without the prefix; None if the file lacks it.

    A bare model's file usually leaves the prefix out, but some have it.
    """
    names = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((name for name in names if name in tensors), None)


def file_tensors(
    model: "Transformer", family: Family, dtype: "torch.dtype | str" = "float32"
) -> dict[str, "Tensor"]:
    """The tensors of a file of this model, in `dtype` on the CPU."""
    from lmcli.model.device import torch_dtype

    state, heads = dict(model.named_parameters()), model.config.num_attention_heads
    tensors = {}
    for stored in stored_tensors(family, model):
        parameters = [state[name].detach() for name in stored.parameters]
        joined = join_tensors(parameters, stored.layout, heads)
        tensors[stored.name] = joined.to(torch_dtype(dtype)).cpu().contiguous()
    copies = {
        copy: tensors[name].clone() for copy, name in family.duplicates.items() if name in tensors
    }
    return {**tensors, **copies}


def quantize_tensors(
    tensors: dict[str, "Tensor"], model: "Transformer", family: Family, bits: int
) -> tuple[dict[str, "Tensor"], list[str]]:
    """A file's tensors with the matrices of all blocks packed, and the modules that are not packed.

    A matrix stays as it is if GROUP does not divide its inputs, and so does a head. Raises
    UserError for weights that are not finite, and for a family that stores its matrices transposed.
    """
    import torch

    quantized, ignored = dict(tensors), []
    for stored in stored_tensors(family, model):
        owner, _, end = stored.parameters[0].rpartition(".")
        if end != "weight" or not isinstance(model.get_submodule(owner), torch.nn.Linear):
            continue
        module = stored.name.removesuffix(".weight")
        if stored.layout == "columns":
            raise UserError(
                f"{family.model_type} stores its matrices transposed, for which the format has no "
                "place",
                hint="lm export --gguf FILE --type q8_0 quantizes it",
            )
        if owner.startswith("head.") or tensors[stored.name].shape[1] % GROUP:
            ignored.append(module)
            continue
        weight = quantized.pop(stored.name).float().numpy()
        if not np.isfinite(weight).all():
            raise UserError(f"{stored.name} holds NaN or infinity: the model is damaged")
        values, scales = quantization.quantize_groups(weight, bits)
        quantized[f"{module}{PACKED}"] = torch.from_numpy(quantization.pack(values, bits))
        quantized[f"{module}{SCALE}"] = torch.from_numpy(scales)
        quantized[f"{module}{SHAPE}"] = torch.tensor(values.shape)
    heads = (entry.file_name for entry in family.head_tensors.get(model.config.head, ()))
    return quantized, sorted({*ignored, *heads})


def dequantize_arrays(
    arrays: Mapping[str, NDArray[Any]], bits: int, where: str
) -> dict[str, NDArray[Any]]:
    """A file's arrays with every packed matrix as float32.

    Raises UserError if the parts of a matrix do not fit together.
    """
    plain = {name: each for name, each in arrays.items() if not name.endswith((SCALE, SHAPE))}
    for name in [name for name in plain if name.endswith(PACKED)]:
        module = name.removesuffix(PACKED)
        stored = {f"{module}{end}": arrays.get(f"{module}{end}") for end in (PACKED, SCALE, SHAPE)}
        present = {name: array for name, array in stored.items() if array is not None}
        if (scales := present.get(f"{module}{SCALE}")) is not None:
            present[f"{module}{SCALE}"] = in_precision(scales, "float32")
        matrix = quantization.packed_matrix(present, module, bits, where)
        plain[f"{module}.weight"] = matrix.weight()
        del plain[name]
    return plain
