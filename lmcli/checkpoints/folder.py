"""A model folder ↔ a Transformer, its tokenizer and its generation defaults, in Hugging Face format."""

import json
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lmcli.checkpoints import adapter_base, adapters
from lmcli.checkpoints.config_json import family_of, read_config, write_config
from lmcli.checkpoints.families import Family
from lmcli.checkpoints.weights import as_stored, new_names, put, tensors_of
from lmcli.config import GenerateConfig, ModelConfig, check
from lmcli.errors import UserError
from lmcli.model.adapters import adapters_of
from lmcli.model.device import dtype_name
from lmcli.model.transformer import Transformer
from lmcli.storage import read_json, read_tensors, user_errors, write_tensors, write_text
from lmcli.text import tokenizer as tokenizers
from lmcli.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
              "source.spm")  # a folder with one of them has a tokenizer of its own
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# generation_config.json keys, which mean the same here; `do_sample: false` is temperature 0
GENERATE_KEYS = tuple(field.name for field in fields(GenerateConfig))
ALWAYS_WRITTEN = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams",
                  "length_penalty")  # the others only where they do something


@dataclass
class Checkpoint:
    """What a model folder holds. `stops` are the ids that end a text, `beginning` those that start a context, `unused`
    the names of tensors that the file has and the model does not need, `start` the id that an encoder–decoder's target
    starts from, if there is one."""

    model: Transformer
    tokenizer: Tokenizer
    generate: GenerateConfig
    beginning: list[int]
    stops: list[int]
    unused: list[str]
    start: int | None = None


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The model of a folder, in evaluation mode on `device` in `dtype`; of an adapter's folder, its base model with what the
    adapter adds.

    Raises UserError naming the file for a missing or damaged one, a missing tensor or a wrong shape, a tokenizer with
    more ids than the model has rows, and a family that is not supported.
    """
    folder = Path(folder)
    adapter, base, document = _document(folder)
    family, config = read_config(document, str(base / "config.json"))
    tokenizer = tokenizers.load(own_or_base(folder, base, *TOKENIZERS).parent)
    if tokenizer.size > config.vocab_size:
        raise UserError(f"has {tokenizer.size:,} ids, the model has {config.vocab_size:,} rows for them",
                        where=str(folder / "tokenizer.json"), hint="tokenizer and model do not belong together")
    weights = base / (INDEX if not (base / WEIGHTS).is_file() and (base / INDEX).is_file() else WEIGHTS)
    tensors = new_names(_tensors(weights, family.heads[config.head]))
    if adapter:
        tensors = adapters.merged(adapter, family, config, tensors)
    model, unused = _model(family, config, tensors, str(weights))
    generation = _optional_json(own_or_base(folder, base, "generation_config.json"))
    return Checkpoint(model.to(device=device, dtype=dtype).eval(), tokenizer,
                      _generate_config(generation, document, config.shape, folder), tokenizer.prefix,
                      _stops(generation, document, tokenizer, folder), unused, _start(generation, config, folder))


def configuration(folder: str | Path) -> ModelConfig:
    """What the model of a folder is, without its weights. Raises UserError as `load` does."""
    _, base, document = _document(Path(folder))
    return read_config(document, str(base / "config.json"))[1]


def _document(folder: Path) -> tuple[adapters.Adapter | None, Path, dict[str, Any]]:
    """The adapter that a folder holds, if it does; the folder of its base, or itself; the config.json of what both make."""
    with user_errors(folder, "read"):
        there = folder.is_dir()
    if not there:
        raise UserError("no such model folder", where=str(folder), hint="-m takes a folder with config.json in it")
    adapter = adapters.read(folder) if adapter_base.is_adapter(folder) else None
    base = adapter.base if adapter else folder
    document = read_json(base / "config.json", "a model folder needs config.json, model.safetensors, tokenizer.json")
    return adapter, base, adapters.as_adapted(adapter, document) if adapter else document


def own_or_base(folder: Path, base: Path, *names: str) -> Path:
    """The first of these files that an adapter's folder has, else (at the first name, if there is none) that of its base."""
    places = [place / name for place in (folder, base) for name in names]
    return next((place for place in places if place.is_file()), base / names[0])


def _optional_json(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _converting(folder: Path, architecture: str) -> str:
    """The command that makes safetensors of pickled weights: reading those may run whatever their author put in."""
    code = (f"from transformers import {architecture} as M; "
            f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")
    return f"if you trust where it comes from: python -c {shlex.quote(code)}"


def _tensors(file: Path, architecture: str) -> dict[str, torch.Tensor]:
    """All tensors of a weights file, or of the shards that an index names; `architecture` is for the hint of a refusal."""
    if not file.is_file():
        if any(file.with_name(name).is_file() for name in PICKLED):
            raise UserError(f"holds no {WEIGHTS}, only {PICKLED[0]}, which lm never opens", where=str(file.parent),
                            hint=_converting(file.parent, architecture))
        raise UserError(f"holds no {WEIGHTS}", where=str(file.parent), hint="only safetensors hold weights here")
    if file.name == WEIGHTS:
        return read_tensors(file)
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict):
        raise UserError("has no weight_map", where=str(file))
    tensors = {}
    for name in sorted({str(name) for name in places.values()}):
        if Path(name).name != name or name == "..":
            raise UserError(f"names a file outside the folder: {name!r}", where=str(file))
        tensors.update(read_tensors(file.with_name(name)))
    return tensors


def _model(family: Family, config: ModelConfig, tensors: dict[str, torch.Tensor],
           where: str) -> tuple[Transformer, list[str]]:
    """A Transformer around the tensors, and the names of those it has no use for; nothing is allocated for weights that
    a file already holds."""
    with torch.device("meta"):
        model = Transformer(as_stored(config, family, tensors))
    return model, put(model, family, tensors, where)


def _generate_config(generation: dict[str, Any] | None, document: dict[str, Any], shape: str,
                     folder: Path) -> GenerateConfig:
    """Defaults of a folder: of its generation_config.json, or without one, as in old folders, of its config.json.

    Where `do_sample` stands in neither, a decoder has our defaults, and an encoder–decoder does not sample.
    """
    where = folder / ("config.json" if generation is None else "generation_config.json")
    found = document if generation is None else generation
    found = {key: value for key, value in found.items() if value is not None}
    sampled = found.get("do_sample", None if shape == "decoder" else False)
    config = GenerateConfig()
    if sampled is not None:  # the file means to decide: what it leaves out has transformers' defaults
        config = replace(config, temperature=1.0, top_p=1.0, top_k=50 if sampled else 0)
    values = {key: check(GenerateConfig, key, _as_ours(key, found[key]), str(where))
              for key in GENERATE_KEYS if key in found}
    if "max_new_tokens" in values:
        values["max_length"] = 0
    config = replace(config, **values)
    return replace(config, temperature=0.0) if sampled is False else config


def _as_ours(key: str, value: Any) -> Any:
    """A value of generation_config.json as GenerateConfig has it."""
    if key == "early_stopping" and isinstance(value, bool):
        return str(value).lower()
    if key == "forced_eos_token_id" and isinstance(value, list) and len(value) == 1:
        return value[0]
    return value


def _start(generation: dict[str, Any] | None, config: ModelConfig, folder: Path) -> int | None:
    """The id that a target starts from, by generation_config.json, config.json or else the beginning token."""
    if config.shape != "encoder-decoder":
        return None
    found = (generation or {}).get("decoder_start_token_id")
    if found is not None:
        return check(ModelConfig, "decoder_start_token_id", found, str(folder / "generation_config.json"))
    return config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id


def _stops(generation: dict[str, Any] | None, document: dict[str, Any], tokenizer: Tokenizer,
           folder: Path) -> list[int]:
    for name, source in (("generation_config.json", generation or {}), ("config.json", document)):
        found = source.get("eos_token_id")
        if found is not None:
            return [check(ModelConfig, "eos_token_id", i, str(folder / name))
                    for i in (found if isinstance(found, list) else [found])]
    eos = tokenizer.special("eos_token")
    return [] if eos is None else [eos]


def save(folder: Path, model: Transformer, tokenizer: Tokenizer, generate: GenerateConfig, base: str = "",
         dtype: torch.dtype = torch.float32) -> None:
    """Writes a whole model folder (which must exist), the weights last and in `dtype`, so that a folder with weights is
    complete. A model with adapters is written as its adapter, to be put on the model that `base` names."""
    tokenizer.save(folder, model.config.max_position_embeddings)
    _save_generation(folder, model.config, generate)
    if adapters_of(model):
        adapters.save(folder, model, base)  # beside a config.json, transformers would not look for the base elsewhere
    else:
        write_text(folder / "config.json", json.dumps(write_config(model.config, dtype_name(dtype)), indent=2) + "\n")
        save_weights(folder, model, dtype)


def _save_generation(folder: Path, config: ModelConfig, generate: GenerateConfig) -> None:
    plain = asdict(GenerateConfig())
    settings = {key: value for key, value in asdict(generate).items() if key in ALWAYS_WRITTEN or value != plain[key]}
    if generate.max_length:
        del settings["max_new_tokens"]
    if "early_stopping" in settings:
        settings["early_stopping"] = {"true": True}.get(generate.early_stopping, generate.early_stopping)
    if config.shape == "encoder-decoder":
        settings |= {"decoder_start_token_id": config.decoder_start_token_id, "pad_token_id": config.pad_token_id}
    if not generate.temperature:  # transformers has no temperature 0, it has do_sample, and saves no filters beside that
        for key in ("temperature", "top_k", "top_p", "min_p"):
            del settings[key]
    write_text(folder / "generation_config.json", json.dumps(
        {"do_sample": bool(generate.temperature), **settings,
         "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}, indent=2) + "\n")


def save_weights(folder: Path, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
    """Replaces the weights of a model folder atomically; of a model with adapters only theirs, always in float32."""
    if adapters_of(model):
        adapters.save_weights(folder, model)
    else:
        write_tensors(folder / WEIGHTS, tensors_of(model, family_of(model.config), dtype))
