"""GGUF, llama.cpp's file of a model: written from a checkpoint, and read into one.

The package `gguf` (extra `gguf`) knows the types of numbers. This file has llama.cpp's names of
tensors and keys; what llama.cpp does otherwise in a family stands in its row (`Family.gguf`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcli.checkpoints.config_json import LARGEST, LAYER_TYPES, family_of
from lmcli.checkpoints.families import FAMILIES
from lmcli.checkpoints.family import DEFAULT_OPTIONS, Family, GgufArchitecture
from lmcli.config import ModelConfig, check
from lmcli.errors import UsageError, UserError, import_extra
from lmcli.model.positions import rotary_frequencies
from lmcli.storage import atomic_path, require_disk_space, user_errors
from lmcli.text import gguf_tokenizer
from lmcli.text.gguf_header import (
    HEAD_SIZES,
    KEY_HEADS,
    LOCAL_BASE,
    NORM_KEYS,
    PARALLEL,
    READ_KEYS,
    ROPE_BASE,
    ROPE_CONTEXT,
    ROPE_FACTOR,
    ROPE_SIZE,
    ROPE_TYPE,
    SIZE_KEYS,
    WINDOW,
    WINDOW_PATTERN,
    GgufHeader,
    decimal,
    read_header,
    required,
)
from lmcli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcli.model.transformer import Transformer

NUMBER_TYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}  # names of --type
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
# modules of ours → llama.cpp's tensors; those of a layer begin with blk.NUMBER
TENSOR_NAMES = {
    "embedding": "token_embd",
    "decoder.positions": "position_embd",
    "decoder.norm": "output_norm",
    "head.output": "output",
    "attention_norm": "attn_norm",
    "attention_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_out_norm": "post_ffw_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
PROJECTIONS, JOINED = ("attention.query", "attention.key", "attention.value"), "attn_qkv"
EMBEDDING, OUTPUT, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"
ACTIVATION = "lm.hidden_act"  # the format has no key for it


def _library() -> ModuleType:
    return import_extra("gguf", "gguf", "GGUF files need the package gguf")


def _modules(
    parameters: Iterable[str], architecture: GgufArchitecture
) -> dict[str, tuple[str, ...]]:
    """Tensors of the file → the parameters that each holds, in their order."""
    tensors: dict[str, tuple[str, ...]] = {}
    for name in parameters:
        module, _, end = name.rpartition(".")
        layer = module.removeprefix("decoder.layers.").partition(".")
        inner, prefix = (layer[2], f"blk.{layer[0]}.") if layer[2] in TENSOR_NAMES else (module, "")
        stored = TENSOR_NAMES[inner]
        if architecture.joined and inner in PROJECTIONS:
            stored = JOINED
        key = f"{prefix}{stored}.{end}"
        tensors[key] = (*tensors.get(key, ()), name)
    return tensors


def _paired(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows i and i + D/2 of each head, which are rotated together, brought next to each other."""
    by_half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return by_half.swapaxes(1, 2).reshape(rows.shape)


def _halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `_paired`."""
    by_pair = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(rows.shape)


def _heads(name: str, config: ModelConfig, architecture: GgufArchitecture) -> int:
    """Heads whose rows `_paired` reorders in a tensor; 0 for none."""
    if not architecture.paired:
        return 0
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


# writing ------------------------------------------------------------------------------------------


def write(
    path: Path,
    model: "Transformer",
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    number_type: str,
    name: str,
) -> str:
    """Writes a model as a GGUF file, complete or not at all; returns a remark, "" for none.

    `number_type` is that of matrices. Vectors are float32, and with q8_0 matrices whose rows 32
    does not divide are float16. Raises UserError for a model or tokenizer that llama.cpp cannot
    express, and for weights that are no numbers or out of the type's range.
    """
    import torch

    gguf, config = _library(), model.config
    architecture, template = _architecture(config), (tokenizer.prefix, tokenizer.suffix)
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[number_type],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        ACTIVATION: config.hidden_act,
        **_metadata(config, architecture),
        **gguf_tokenizer.to_metadata(
            tokenizer.core, tokenizer.settings, template, config.vocab_size, stop_ids
        ),
    }
    tensors = {
        tensor: [model.get_parameter(name).detach() for name in names]
        for tensor, names in _modules(dict(model.named_parameters()), architecture).items()
    }
    if architecture.own_head:
        tensors.setdefault(OUTPUT, tensors[EMBEDDING])
    if config.rope_type == "llama3":
        tensors[ROPE_FREQUENCIES] = [torch.from_numpy(_frequency_factors(config))]
    kinds = {name: _kind(name, matrices, number_type, gguf) for name, matrices in tensors.items()}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            _write_header(writer, metadata, tensors, kinds, gguf)
            require_disk_space(path, sum(info.nbytes for info in writer.tensors[0].values()))
            for tensor, matrices in tensors.items():
                values = torch.cat(matrices).float().numpy()
                if heads := _heads(tensor, config, architecture):
                    values = _paired(values, heads)
                writer.write_tensor_data(_converted(values, kinds[tensor], tensor, gguf))
        finally:
            writer.close()
    exact = config.hidden_act == "gelu"
    return "llama.cpp computes GELU by its tanh approximation, this model exactly" if exact else ""


def _write_header(
    writer: Any,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Sequence["Tensor"]],
    kinds: Mapping[str, Any],
    gguf: ModuleType,
) -> None:
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{add}")(key, value)
    for name, matrices in tensors.items():
        shape = (sum(map(len, matrices)), *matrices[0].shape[1:])
        stored = gguf.quants.quant_shape_to_byte_shape(shape, kinds[name])
        dtype = np.dtype(np.uint8)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _kind(name: str, parts: Sequence["Tensor"], number_type: str, gguf: ModuleType) -> Any:
    """The type in which a tensor is stored."""
    kinds = gguf.GGMLQuantizationType
    if parts[0].ndim == 1 or name == POSITIONS:
        return kinds.F32
    if number_type == "q8_0" and parts[0].shape[1] % 32:
        return kinds.F16
    return kinds[NUMBER_TYPES[number_type]]


def _converted(values: NDArray[Any], kind: Any, name: str, gguf: ModuleType) -> NDArray[np.uint8]:
    """The bytes of a tensor in a type."""
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinity: the model is damaged")
    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise UserError(f"{name} holds numbers above 65,504", "--type", "use bf16 or f32")
    return stored.view(np.uint8)


def _architecture(config: ModelConfig) -> GgufArchitecture:
    """llama.cpp's architecture for a model; UserError naming what llama.cpp does not compute."""
    model_type = config.model_type or family_of(config).model_type
    architecture = FAMILIES[model_type].gguf if config.head == "lm" else None
    if architecture is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
        raise UserError(
            f"llama.cpp has no architecture for {model_type} with the head {config.head}",
            hint=f"--gguf writes {known} with a language-model head",
        )
    lacking = [
        option
        for option, default in DEFAULT_OPTIONS.items()
        for values in [architecture.options.get(option, (default,))]
        if values and option != "sliding_window" and getattr(config, option) not in values
    ]
    layer_types = config.resolved_layer_types(config.num_hidden_layers)
    slides = "sliding_attention" in layer_types and config.sliding_window
    if architecture.full_every:
        if layer_types != _layer_types(config.num_hidden_layers, architecture.full_every):
            lacking.append("layer_types")
        if (config.query_pre_attn_scalar or config.head_dim) != _divisor(vars(config)):
            lacking.append("query_pre_attn_scalar")
    elif slides and config.sliding_window < config.max_position_embeddings:
        lacking.append("sliding_window")
    if config.rope_type == "llama3" and not architecture.frequencies:
        lacking.append("rope_type")
    if architecture.square and config.head_dim * config.num_attention_heads != config.hidden_size:
        lacking.append("head_dim")
    if lacking:
        option = lacking[0]
        raise UserError(
            f"llama.cpp cannot compute {model_type} with {option} {getattr(config, option)!r}",
            hint="a file without it would be another model",
        )
    return architecture


def _metadata(config: ModelConfig, architecture: GgufArchitecture) -> dict[str, Any]:
    """The keys that describe the model, with the architecture's name in front."""
    values: dict[str, Any] = {key: getattr(config, option) for option, key in SIZE_KEYS.items()}
    values |= {
        KEY_HEADS: config.num_key_value_heads,
        NORM_KEYS[config.norm]: config.norm_eps,
        "vocab_size": config.vocab_size,
        **dict.fromkeys(HEAD_SIZES, config.head_dim),
    }
    if config.positions == "rotary":
        values |= {ROPE_SIZE: config.rotary_size, ROPE_BASE: config.rope_theta}
    if config.rope_type in ("linear", "yarn"):
        values |= {ROPE_TYPE: config.rope_type, ROPE_FACTOR: config.rope_factor}
    if config.rope_type in ("yarn", "llama3"):
        values[ROPE_CONTEXT] = config.rope_original_context or config.max_position_embeddings
    if architecture.parallel_key:
        values[PARALLEL] = config.parallel_block
    if architecture.full_every:
        values |= {WINDOW: config.sliding_window, WINDOW_PATTERN: architecture.full_every}
        values[LOCAL_BASE] = config.local_rope_theta or config.rope_theta
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def _frequency_factors(config: ModelConfig) -> NDArray[np.float32]:
    """What llama.cpp divides each rotary frequency by, (R/2,)."""
    index = np.arange(config.rotary_size // 2, dtype=np.float32)
    scaled, _ = rotary_frequencies(config, config.rope_theta, index)
    plain, _ = rotary_frequencies(replace(config, rope_type="default"), config.rope_theta, index)
    return (plain / scaled).astype(np.float32)


# reading ------------------------------------------------------------------------------------------


class GgufModel(NamedTuple):
    """A file that describes a model of a family of ours."""

    path: Path
    header: GgufHeader
    config: ModelConfig
    architecture: GgufArchitecture

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file."""
        return Tokenizer(*gguf_tokenizer.from_metadata(self.header.metadata, str(self.path)))

    def stop_ids(self) -> list[int]:
        """The ids that end a text."""
        return gguf_tokenizer.stop_ids(self.header.metadata)


def read(path: Path) -> GgufModel:
    """The model that a GGUF file describes, without its weights.

    Raises UserError naming the file if it is damaged, of an architecture that lm does not have, or
    with a key or a tensor that lm does not know.
    """
    header, where = read_header(path), str(path)
    name = header.metadata.get("general.architecture")
    rows = [(family, family.gguf) for family in FAMILIES.values() if family.gguf]
    family, architecture = next((row for row in rows if row[1].name == name), (None, rows[0][1]))
    if family is None:
        known = dict.fromkeys(row.name for _, row in rows)
        raise UserError(
            f"architecture {name!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(known)}",
        )
    prefix = f"{name}."
    keys = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    unknown = [key for key, value in keys.items() if value and key not in READ_KEYS]
    if unknown:
        raise UserError(f"{prefix}{unknown[0]} {keys[unknown[0]]!r} is not supported", where=where)
    try:
        values = _options(family, architecture, keys, header, where)
        values = {key: check(ModelConfig, key, value, where) for key, value in values.items()}
        for option, most in LARGEST.items():
            if not 1 <= values[option] <= most:
                raise UserError(f"{option} {values[option]} is outside 1 to {most}", where=where)
        config = ModelConfig(**values).complete()
        family_of(config)  # raises for options that the family does not have
        if ROPE_FREQUENCIES in header.tensors:
            config = _with_frequencies(config, path, header)
    except UsageError as error:
        raise UserError(error.what, where=where) from None
    return GgufModel(path, header, config, architecture)


def _options(
    family: Family,
    architecture: GgufArchitecture,
    keys: Mapping[str, Any],
    header: GgufHeader,
    where: str,
) -> dict[str, Any]:
    """Values of ModelConfig from the keys and the names of the tensors."""
    tensors = header.tensors
    if EMBEDDING not in tensors:
        raise UserError(f"has no tensor {EMBEDDING}", where=where)
    names = {name.split(".", 2)[-1] for name in tensors}
    activation = header.metadata.get(ACTIVATION)
    if activation not in architecture.options.get("hidden_act", ()):
        activation = family.defaults[family.keys["hidden_act"]]
    biases = {"attn_output.bias": "all", "attn_q.bias": "qkv", "attn_qkv.bias": "qkv"}
    options = {
        **family.options_for("lm"),
        "model_type": family.model_type,
        "hidden_act": activation,
        **{option: required(keys, key, where) for option, key in SIZE_KEYS.items()},
        "vocab_size": tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": OUTPUT not in tensors,
        "attention_bias": next((biases[name] for name in biases if name in names), "none"),
        "mlp_bias": "ffn_up.bias" in names,
    }
    options["norm_eps"] = decimal(required(keys, NORM_KEYS[options["norm"]], where))
    heads = options["num_attention_heads"]
    if keys.get(HEAD_SIZES[0]) != keys.get(HEAD_SIZES[1]):
        raise UserError(f"{' and '.join(HEAD_SIZES)} differ", where=where)
    size = keys.get(HEAD_SIZES[0]) or (heads and options["hidden_size"] // heads)
    options |= {"num_key_value_heads": keys.get(KEY_HEADS, heads), "head_dim": size}
    if architecture.parallel_key:
        options["parallel_block"] = keys.get(PARALLEL, True)
    if options["positions"] == "rotary":
        rotated = keys.get(ROPE_SIZE, size)
        options["rotary_fraction"] = rotated / size if rotated != size else 1.0
        kind = keys.get(ROPE_TYPE, "none")
        options |= {
            "rope_theta": decimal(keys.get(ROPE_BASE, 10_000.0)),
            "rope_type": "default" if kind == "none" else kind,
            "rope_factor": decimal(keys.get(ROPE_FACTOR, 1.0) or 1.0),
            "rope_original_context": keys.get(ROPE_CONTEXT, 0),
        }
    if architecture.full_every:
        layers, every = options["num_hidden_layers"], keys.get(WINDOW_PATTERN)
        every = every or architecture.full_every
        options |= {
            "query_pre_attn_scalar": _divisor(options),
            "sliding_window": required(keys, WINDOW, where),
            "layer_types": every if isinstance(every, list) else _layer_types(layers, every),
            "local_rope_theta": decimal(keys.get(LOCAL_BASE, 10_000.0)),
        }
    for name in ("bos", "eos"):
        options[f"{name}_token_id"] = header.metadata.get(f"{gguf_tokenizer.KEY}{name}_token_id")
    return options


def _divisor(options: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar in llama.cpp, which knows the largest Gemma 3 by its 62 layers."""
    width = options["hidden_size"] // (options["num_attention_heads"] or 1)
    return int(width if options["num_hidden_layers"] == 62 else options["head_dim"])


def _layer_types(layers: int, full_every: int) -> tuple[str, ...]:
    return tuple(LAYER_TYPES[(i + 1) % full_every > 0] for i in range(layers))


ROPE_CONTEXTS = tuple(1 << power for power in range(10, 21))


def _with_frequencies(config: ModelConfig, path: Path, header: GgufHeader) -> ModelConfig:
    """The configuration of Llama 3's rotary frequencies, found by the factors in the file."""
    factors = _dequantized(path, header, ROPE_FREQUENCIES)
    for context in (config.rope_original_context, 8192, *ROPE_CONTEXTS):
        candidate = replace(
            config,
            rope_type="llama3",
            rope_factor=round(float(factors.max()), 4),
            rope_original_context=context,
        )
        expected = _frequency_factors(candidate)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return candidate
    raise UserError(f"the factors in {ROPE_FREQUENCIES} are not those of Llama 3", str(path))


def load_parameters(
    model: "Transformer", file: GgufModel, dtype: "torch.dtype | None" = None
) -> None:
    """Assigns the file's numbers to a model on the "meta" device, in `dtype` or float32.

    Raises UserError as `parameters`.
    """
    import torch

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    arrays = parameters(file, shapes)
    state = {name: torch.from_numpy(values).to(dtype or torch.float32) for name, values in arrays}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()


def parameters(
    file: GgufModel, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The parameters with these names and shapes, dequantized to float32.

    Raises UserError for a tensor that is missing, left over, or of a wrong shape.
    """
    config, architecture, where = file.config, file.architecture, str(file.path)
    modules = _modules(shapes, architecture)
    left = {*file.header.tensors} - {*modules, ROPE_FREQUENCIES}
    if left:
        raise UserError(f"has a tensor that {architecture.name} does not have: {min(left)}", where)
    for name, names in modules.items():
        sizes = [shapes[parameter][0] for parameter in names]
        shape = (sum(sizes), *shapes[names[0]][1:])
        if name not in file.header.tensors:
            raise UserError(f"has no tensor {name}", where=where)
        if (stored := file.header.tensors[name].shape) != shape:
            raise UserError(f"{name} has shape {stored}, its keys say {shape}", where=where)
        values = _dequantized(file.path, file.header, name)
        if heads := _heads(name, config, architecture):
            values = np.ascontiguousarray(_halves(values, heads))
        yield from zip(names, np.split(values, np.cumsum(sizes)[:-1]))


def type_name(number: int) -> str:
    """The name of a type of numbers, such as Q4_K."""
    try:
        return _library().GGMLQuantizationType(number).name
    except ValueError:
        return f"unknown type {number}"


def _dequantized(path: Path, header: GgufHeader, name: str) -> NDArray[np.float32]:
    """A tensor of a file in float32."""
    gguf, tensor = _library(), header.tensors[name]
    try:
        kind = gguf.GGMLQuantizationType(tensor.type)
        stored = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        with user_errors(path, "read"), path.open("rb") as file:
            file.seek(tensor.start)
            data = np.fromfile(file, np.uint8, int(np.prod(stored, dtype=object)))
        values = gguf.quants.dequantize(data.reshape(stored), kind)
    except (ValueError, NotImplementedError, OverflowError, MemoryError) as error:
        raise UserError(f"{name} cannot be read: {error}", where=str(path)) from None
    return values.astype(np.float32, copy=False)
