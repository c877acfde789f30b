"""A model folder in Hugging Face format ↔ a Transformer, its tokenizer, generation defaults."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmcli.checkpoints import adapter_base, gguf_file, hub
from lmcli.checkpoints.config_json import family_of, is_no_id, read_config, write_config
from lmcli.checkpoints.family import Family
from lmcli.checkpoints.file_names import PICKLED, TOKENIZER_FILES, WEIGHTS_FILE, WEIGHTS_INDEX
from lmcli.checkpoints.generation_json import file_value, ignored_keys, read_generate_config
from lmcli.checkpoints.quantization import quantization_config, quantized_bits
from lmcli.checkpoints.weights import (
    config_for_tensors,
    current_names,
    dequantize_arrays,
    file_tensors,
    load_tensors,
    map_tensors,
    quantize_tensors,
    read_parameters,
    without_wrappers,
)
from lmcli.config import GenerateConfig, ModelConfig
from lmcli.errors import UserError
from lmcli.kernels import build, decode_step
from lmcli.kernels.decode_step import in_precision
from lmcli.storage import read_json, read_tensors, user_errors, write_tensors, write_text
from lmcli.text import tokenizer as tokenizers
from lmcli.text.gguf_header import is_gguf
from lmcli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from lmcli.checkpoints.adapter_folder import Adapter
    from lmcli.model.transformer import Transformer

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
# the other keys are written only if they are not at their default
ALWAYS_WRITTEN = (
    "max_new_tokens",
    *SAMPLING_KEYS,
    "repetition_penalty",
    "num_beams",
    "length_penalty",
)


@dataclass
class ModelFolder:
    """What a model folder holds, before its weights are read: this loads no torch.

    `bos` are the ids before a text, `stop_ids` those that end one, `decoder_start` the id that an
    encoder–decoder's target starts with (None for other models), `ignored` a line that names
    settings of generation that lm does not follow ("" for none). `weights` is a safetensors file,
    an index of several, or a GGUF file, which `gguf` describes. `bits` are those of quantized
    weights, 0 for others.
    """

    family: Family
    config: ModelConfig
    tokenizer: Tokenizer
    generate: GenerateConfig
    bos: list[int]
    stop_ids: list[int]
    decoder_start: int | None
    ignored: str
    weights: Path
    adapter: "Adapter | None"
    bits: int
    gguf: gguf_file.GgufModel | None

    def with_model(
        self, device: "torch.device | str" = "cpu", dtype: "torch.dtype | str | None" = "float32"
    ) -> "Checkpoint":
        """The Checkpoint of this folder, see `load`."""
        from lmcli.kernels.fast_path import build_model
        from lmcli.model.device import torch_dtype
        from lmcli.model.initialization import meta_device

        number_type = torch_dtype(dtype) if dtype else None
        unused: list[str] = []
        if self.gguf:
            with meta_device():
                model = build_model(self.config)
            gguf_file.load_parameters(model, self.gguf, number_type)
        else:
            tensors = self._tensors(read_tensors)
            if self.adapter:
                from lmcli.checkpoints import adapter_folder

                tensors = adapter_folder.merge(self.adapter, self.family, self.config, tensors)
            with meta_device():  # no memory for weights that the file already holds
                model = build_model(config_for_tensors(self.config, self.family, tensors))
            unused = load_tensors(model, self.family, tensors, str(self.weights))
        model = model.to(device=device, dtype=number_type).eval()
        return Checkpoint(**vars(self), model=model, unused=unused)

    def decoder_parameters(self) -> tuple[ModelConfig, dict[str, NDArray[Any]]] | None:
        """The parameters for the decoder in C, uncopied; None where only torch can compute.

        Raises UserError as `load`.
        """
        if self.adapter or decode_step.needs_torch(self.config) or build.library() is None:
            return None
        if self.gguf:
            shapes = decode_step.parameter_shapes(self.config)
            return self.config, dict(gguf_file.parameters(self.gguf, shapes))
        arrays = self._tensors(map_tensors)
        if arrays is None:
            return None
        config, where = config_for_tensors(self.config, self.family, arrays), str(self.weights)
        shapes = decode_step.parameter_shapes(config)
        return config, read_parameters(config, shapes, self.family, arrays, where)[0]

    def _tensors(self, read: Callable[[Path], Any]) -> Any:
        """All tensors of the weights as `read` returns those of a file, with our spelling."""
        where, architecture = str(self.weights), self.family.heads[self.config.head]
        if not self.bits:
            tensors = _read_weights(self.weights, architecture, read)
            return tensors and current_names(without_wrappers(tensors, where))
        arrays = _read_weights(self.weights, architecture, map_tensors)
        if arrays is None:
            raise UserError("holds numbers of a type that lm does not read", where=where)
        plain = dequantize_arrays(without_wrappers(arrays, where), self.bits, where)
        if read is map_tensors:
            return current_names(plain)
        import torch

        floats = {
            name: np.require(in_precision(array, "float32"), requirements="W")
            for name, array in plain.items()
        }
        return current_names({name: torch.from_numpy(each) for name, each in floats.items()})


@dataclass
class Checkpoint(ModelFolder):
    """A ModelFolder with its model; `unused` are the tensors that the model does not need."""

    model: "Transformer"
    unused: list[str]


def load(
    folder: str | Path,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | str | None" = "float32",
) -> Checkpoint:
    """The checkpoint in a folder, its model in evaluation mode on `device` in `dtype`.

    An adapter's folder is loaded as its base model with the adapter merged; a GGUF file and
    quantized weights are dequantized. With `dtype` None weights stay in the file's. Raises
    UserError naming the file for one that is missing or damaged, a missing tensor or a wrong shape,
    a tokenizer with more ids than the model has rows, and a family that is not supported.
    """
    return read_folder(folder).with_model(device, dtype)


def read_folder(folder: str | Path) -> ModelFolder:
    """The ModelFolder of a folder. Raises UserError as `load`."""
    folder = Path(folder)
    if is_gguf(folder):
        return _read_gguf(folder)
    adapter, base, document = _document(folder)
    family, config = read_config(document, str(base / "config.json"))
    tokenizer = tokenizers.load(find_file(folder, base, *TOKENIZER_FILES).parent)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"has {tokenizer.size:,} ids, but the model's vocabulary has {config.vocab_size:,}",
            where=str(folder / "tokenizer.json"),
            hint="tokenizer and model do not belong together",
        )
    _check_ids(tokenizer, config, folder)
    is_sharded = not (base / WEIGHTS_FILE).is_file() and (base / WEIGHTS_INDEX).is_file()
    generation_file = find_file(folder, base, "generation_config.json")
    generation = read_json(generation_file) if generation_file.is_file() else None
    return ModelFolder(
        family,
        config,
        tokenizer,
        read_generate_config(generation, document, config.shape, folder),
        tokenizer.prefix,
        _stop_ids(generation, document, tokenizer, folder),
        _decoder_start(generation, config, folder),
        "" if config.shape == "encoder" else ignored_keys(generation, document),
        base / (WEIGHTS_INDEX if is_sharded else WEIGHTS_FILE),
        adapter,
        quantized_bits(document, str(base / "config.json")),
        None,
    )


def _read_gguf(file: Path) -> ModelFolder:
    model, generate = gguf_file.read(file), GenerateConfig()
    tokenizer, family = model.tokenizer(), family_of(model.config)
    ids = tokenizer.prefix, model.stop_ids()
    return ModelFolder(
        family, model.config, tokenizer, generate, *ids, None, "", file, None, 0, model
    )


def _check_ids(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Raises UserError for an id that is put into texts and that the model has no row for."""
    _check_id("template", tokenizer.template_ids, config, folder / "tokenizer.json")
    if config.shape != "decoder":  # whose texts are padded with any id
        _check_id("pad_token_id", [config.pad_token_id], config, folder / "config.json")


def _check_id(name: str, ids: Sequence[int | None], config: ModelConfig, file: Path) -> None:
    largest = max((index for index in ids if index is not None), default=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{name} uses the id {largest:,}, but the model's vocabulary has {config.vocab_size:,}",
            where=str(file),
            hint="tokenizer and model do not belong together",
        )


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of the model in a folder. Raises UserError as `load` does."""
    if is_gguf(folder):
        return gguf_file.read(Path(folder)).config
    _, base, document = _document(Path(folder))
    return read_config(document, str(base / "config.json"))[1]


def _document(folder: Path) -> tuple["Adapter | None", Path, dict[str, Any]]:
    """(a folder's adapter or None, its base's folder or this one, the resulting config.json)."""
    with user_errors(folder, "read"):
        is_folder, exists = folder.is_dir(), folder.exists()
    if not is_folder:
        raise UserError(
            "is a file, not a model folder" if exists else "no such model folder",
            where=str(folder),
            hint=f"{hub.nearby(folder)}a model is a folder that holds a config.json",
        )
    needed = "a model folder needs config.json, model.safetensors, tokenizer.json"
    if not (folder / "config.json").is_file():
        needed = hub.nearby(folder) + needed
    if not adapter_base.is_adapter(folder):
        return None, folder, read_json(folder / "config.json", needed)
    from lmcli.checkpoints import adapter_folder

    adapter = adapter_folder.read(folder)
    document = read_json(adapter.base / "config.json", needed)
    return adapter, adapter.base, adapter_folder.adapted_config(adapter, document)


def find_file(folder: Path, base: Path, *names: str) -> Path:
    """The first of these files in an adapter's folder or else in its base's; a path in any case."""
    paths = [parent / name for parent in (folder, base) for name in names]
    return next((path for path in paths if path.is_file()), base / names[0])


def _conversion_hint(folder: Path, architecture: str) -> str:
    """The command that converts pickled weights; reading them may run whatever is in the file."""
    code = (
        f"from transformers import {architecture} as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
    return f"if you trust where it comes from: python -c {shlex.quote(code)}"


def _read_weights(
    file: Path, architecture: str, read: Callable[[Path], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """All tensors of a weights file, or of the shards in an index; `architecture` is for a hint.

    None if `read` returns None for a file.
    """
    if not file.is_file():
        if any(file.with_name(name).is_file() for name in PICKLED):
            raise UserError(
                f"holds no {WEIGHTS_FILE}, only {PICKLED[0]}, which lm never opens",
                where=str(file.parent),
                hint=_conversion_hint(file.parent, architecture),
            )
        raise UserError(
            f"holds no {WEIGHTS_FILE}",
            where=str(file.parent),
            hint="lm reads weights from safetensors files only",
        )
    if file.name == WEIGHTS_FILE:
        return read(file)
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError("has no weight_map", where=str(file))
    tensors: dict[str, Any] = {}
    names = {name if isinstance(name, str) else f"/{name}" for name in shards.values()}
    for name in sorted(names):
        if name in ("", "..") or Path(name).name != name or not name.isprintable():
            raise UserError(f"names a file outside the folder: {name!r}", where=str(file))
        shard = read(file.with_name(name))
        if shard is None:
            return None
        tensors.update(shard)
    return tensors


def _decoder_start(
    generation: dict[str, Any] | None, config: ModelConfig, folder: Path
) -> int | None:
    """The first id of a target: from generation_config.json, config.json, or the bos token."""
    if config.shape != "encoder-decoder":
        return None
    start, file = (generation or {}).get("decoder_start_token_id"), folder / "config.json"
    if not is_no_id(start):
        file = folder / "generation_config.json"
        start = file_value(ModelConfig, "decoder_start_token_id", start, file)
    elif config.decoder_start_token_id is not None:
        start = config.decoder_start_token_id
    elif config.bos_token_id is not None:
        start = config.bos_token_id
    else:
        raise UserError("has neither decoder_start_token_id nor bos_token_id", where=str(file))
    _check_id("decoder_start_token_id", [start], config, file)
    return start


def _stop_ids(
    generation: dict[str, Any] | None, document: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> list[int]:
    """The ids that end a text: from generation_config.json, config.json, or the tokenizer."""
    for name, source in (("generation_config.json", generation or {}), ("config.json", document)):
        eos = source.get("eos_token_id")
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            return [
                file_value(ModelConfig, "eos_token_id", i, folder / name)
                for i in ids
                if not is_no_id(i)
            ]
    eos = tokenizer.special_id("eos_token")
    return [] if eos is None else [eos]


def save(
    folder: Path,
    model: "Transformer",
    tokenizer: Tokenizer,
    generate: GenerateConfig,
    base: str = "",
    dtype: "torch.dtype | str" = "float32",
    bits: int = 0,
) -> None:
    """Writes a whole model folder, which must exist, with weights in `dtype`.

    The weights come last, so a folder with weights is complete. Of a model with adapters only the
    adapters are written, for the base model that `base` names. With `bits` (8 or 4) the matrices of
    the blocks are quantized.
    """
    from lmcli.checkpoints import adapter_folder
    from lmcli.model.lora import adapters_of

    tokenizer.save(folder, model.config.max_position_embeddings)
    _save_generation(folder, model.config, generate)
    if adapters_of(model):
        # no config.json: with one, transformers would look for the base in this folder
        adapter_folder.save(folder, model, base)
    else:
        document = write_config(model.config, str(dtype).removeprefix("torch."))
        family = family_of(model.config)
        tensors = file_tensors(model, family, dtype)
        if bits:
            tensors, ignored = quantize_tensors(tensors, model, family, bits)
            document["quantization_config"] = quantization_config(bits, ignored)
        write_text(folder / "config.json", json.dumps(document, indent=2) + "\n")
        write_tensors(folder / WEIGHTS_FILE, tensors)


def _save_generation(folder: Path, config: ModelConfig, generate: GenerateConfig) -> None:
    defaults = asdict(GenerateConfig())
    settings = {
        key: value
        for key, value in asdict(generate).items()
        if key in ALWAYS_WRITTEN or value != defaults[key]
    }
    if generate.max_length:
        del settings["max_new_tokens"]
    if settings.get("early_stopping") == "true":
        settings["early_stopping"] = True
    if config.shape == "encoder-decoder":
        settings["decoder_start_token_id"] = config.decoder_start_token_id
        settings["pad_token_id"] = config.pad_token_id
    if not generate.temperature:
        # transformers has `do_sample` instead of temperature 0, and then takes no filters
        for key in (*SAMPLING_KEYS, "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            settings.pop(key, None)
    document = {
        "do_sample": bool(generate.temperature),
        **settings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    write_text(folder / "generation_config.json", json.dumps(document, indent=2) + "\n")


def save_weights(
    folder: Path, model: "Transformer", dtype: "torch.dtype | str" = "float32"
) -> None:
    """Replaces a folder's weights atomically; of a model with adapters only theirs, in float32."""
    from lmcli.checkpoints import adapter_folder
    from lmcli.model.lora import adapters_of

    if adapters_of(model):
        adapter_folder.save_weights(folder, model)
    else:
        write_tensors(folder / WEIGHTS_FILE, file_tensors(model, family_of(model.config), dtype))
