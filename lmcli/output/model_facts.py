"""Facts of `lm info` about model and run folders: architecture, parameters, weights, run."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmcli import recipes
from lmcli.checkpoints import adapter_base, adapter_folder, folder, gguf_file
from lmcli.checkpoints.adapter_folder import Adapter
from lmcli.checkpoints.config_json import read_config
from lmcli.checkpoints.family import Family
from lmcli.checkpoints.file_names import TOKENIZER_FILES, WEIGHTS_FILE, WEIGHTS_INDEX
from lmcli.checkpoints.quantization import PACKED, SCALE, SHAPE, quantized_bits
from lmcli.checkpoints.weights import current_names, load_tensors, stored_tensors
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.model.initialization import meta_device
from lmcli.model.transformer import Transformer
from lmcli.output.facts import Summary
from lmcli.output.file_facts import (
    SAFETENSORS_DTYPES,
    TensorHeader,
    read_header,
    tensor_facts,
    tokenizer_facts,
)
from lmcli.storage import read_json
from lmcli.text import tokenizer as tokenizers

OUTPUTS = {  # of a model's head
    "lm": "words",
    "sequence": "a label of the text",
    "token": "a label of each token",
    "span": "where an answer starts and ends",
    "none": "none",
}
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SIZE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_encoder_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "positions", "norm"),
)
# components that make up a model, and kinds of layers by a mark in the parameter's name
MODEL_COMPONENTS = ("embedding", "encoder", "decoder", "head")
LAYER_MARKS = (
    ("norm", "norm."),
    ("cross_attention", ".cross."),
    ("attention", ".attention."),
    ("attention", "relative."),
    ("mlp", ".mlp."),
)
LAYER_KINDS = ("attention", "cross_attention", "mlp", "norm")


def model_summary(path: Path, kind: str) -> Summary:
    """The summary of a folder of a model, run or adapter (`kind`); damage is noted, not raised."""
    summary = Summary({"kind": kind, "path": str(path)})
    facts, adapter, base = summary.facts, None, path
    if adapter_base.is_adapter(path):
        with summary.noting():
            adapter = adapter_folder.read(path)
            base = adapter.base
            facts["adapter"] = _adapter_facts(adapter)
        if adapter is None:
            return summary

    family = tokenizer = header = None
    bits = 0
    with summary.noting():
        family, bits = _add_config(summary, base, adapter)
    with summary.noting():
        tokenizer = tokenizers.load(folder.find_file(path, base, *TOKENIZER_FILES).parent)
    with summary.noting():
        files = _weight_files(base)
        header = {name: tensor for file in files for name, tensor in read_header(file).items()}
        header |= _head_of_adapter(adapter) if adapter else {}
        size = sum(file.stat().st_size for file in files)
        weights = {"files": [file.name for file in files], "bytes": size, **tensor_facts(header)}
        facts["weights"] = weights

    if family and summary.config:
        header = _plain_header(header, bits) if bits else header
        parameters, tensor_names = _check_tensors(summary, summary.config, family, header, base)
        facts["parameters"] = parameters
        facts["weights"] = facts.pop("weights", {}) | tensor_names  # after the parameters
        total = parameters["total"]
        facts["memory"] = {name: total * size for name, size in NUMBER_BYTES.items()}
        facts |= _cache_facts(summary.config)
    if tokenizer:
        facts["tokenizer"] = tokenizer_facts(tokenizer)
        if summary.config and tokenizer.size > summary.config.vocab_size:
            rows = summary.config.vocab_size
            message = f"has {tokenizer.size:,} ids, the model has {rows:,} rows for them"
            hint = "use the tokenizer that the model was trained with"
            summary.damage.append(UserError(message, str(path / "tokenizer.json"), hint))
    if kind == "run":
        with summary.noting():
            facts["run"] = _run_facts(recipes.load_yaml(path / "recipe.yaml"))
    return summary


def gguf_summary(path: Path) -> Summary:
    """The summary of a GGUF file; damage is noted, not raised."""
    summary = Summary({"kind": "model", "path": str(path)})
    facts = summary.facts
    with summary.noting():
        file = gguf_file.read(path)
        summary.config = config = file.config
        facts |= {"family": config.model_type, "architecture": file.architecture.name}
        facts |= _config_facts(config)
        with meta_device():
            parameters = count_parameters(Transformer(config))
        tensors = {
            name: (gguf_file.type_name(tensor.type), tensor.shape)
            for name, tensor in file.header.tensors.items()
        }
        facts |= {
            "parameters": parameters,
            "weights": {"bytes": path.stat().st_size, **tensor_facts(tensors)},
            "memory": {name: parameters["total"] * n for name, n in NUMBER_BYTES.items()},
            **_cache_facts(config),
            "tokenizer": tokenizer_facts(file.tokenizer()),
        }
    return summary


def _plain_header(header: TensorHeader | None, bits: int) -> TensorHeader | None:
    """The header with the packed matrices as they are when read."""
    if header is None:
        return None
    plain = {name: each for name, each in header.items() if not name.endswith((SCALE, SHAPE))}
    for name in [name for name in plain if name.endswith(PACKED)]:
        module = name.removesuffix(PACKED)
        rows, words = plain.pop(name)[1]
        plain[f"{module}.weight"] = "F32", (rows, words * 32 // bits)
    return plain


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    targets = adapter.options.get("target_modules")
    tensors = adapter.tensors.items()
    return {
        "base": str(adapter.base),
        "rank": adapter.options.get("r"),
        "alpha": adapter.options.get("lora_alpha"),
        "targets": sorted(targets) if isinstance(targets, list) else targets,
        "parameters": sum(t.numel() for name, t in tensors if ".base_layer." not in name),
    }


def _head_of_adapter(adapter: Adapter) -> TensorHeader:
    """The tensors of a head that an adapter brings along."""
    return {
        name: ("F32", tuple(tensor.shape))
        for name, tensor in adapter.tensors.items()
        if "lora_" not in name and ".base_layer." not in name
    }


def _add_config(summary: Summary, base: Path, adapter: Adapter | None) -> tuple[Family, int]:
    """Reads the configuration into the summary; the model's family, bits of quantized weights."""
    where = base / "config.json"
    needs = "a model folder needs config.json, model.safetensors, tokenizer.json"
    document = read_json(where, needs)
    if adapter:
        document = adapter_folder.adapted_config(adapter, document)
    summary.facts["family"] = document.get("model_type")
    summary.facts["architecture"] = document.get("architectures")
    family, config = read_config(document, str(where))
    summary.config = config
    summary.facts["architecture"] = family.heads[config.head]
    summary.facts |= _config_facts(config)
    if bits := quantized_bits(document, str(where)):
        summary.facts["quantization"] = f"int{bits}"
    return family, bits


def _config_facts(config: ModelConfig) -> dict[str, Any]:
    """Sizes and choices of a model, named as in config.json."""
    facts: dict[str, Any] = {"shape": config.shape, "head": OUTPUTS[config.head]}
    if config.labels:
        facts |= {"labels": list(config.labels), "multi_label": config.multi_label}
    facts |= {"context": config.max_position_embeddings, "vocab_size": config.vocab_size}
    for name in SIZE_FIELDS:
        if name != "num_encoder_layers" or config.shape == "encoder-decoder":
            facts[name] = getattr(config, name)
    if config.sliding_window:
        facts["sliding_window"] = config.sliding_window
    facts["tie_word_embeddings"] = config.tie_word_embeddings and config.head == "lm"
    return facts


def _cache_facts(config: ModelConfig) -> dict[str, Any]:
    """Bytes of the keys and values of one token in a decoder's cache.

    Each token of an encoder–decoder's source takes as much.
    """
    if config.shape == "encoder":
        return {}
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"cache_bytes_per_token": {name: numbers * size for name, size in NUMBER_BYTES.items()}}


def _check_tensors(
    summary: Summary, config: ModelConfig, family: Family, header: TensorHeader | None, path: Path
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The model's parameters by component, and the names of `unused` and `missing` tensors.

    The model is built on the meta device and loaded with empty tensors of the files' shapes; what
    fails is noted as damage.
    """
    has_pooler = header is None or any("pooler." in name for name in header)
    if config.head == "none" and not has_pooler:
        config = replace(config, head_dense=False)
    with meta_device():
        model = Transformer(config)
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, SAFETENSORS_DTYPES.get(dtype, "uint8")))
            for name, (dtype, shape) in (header or {}).items()
        }
    parameters = count_parameters(model)
    if header is None:
        return parameters, {}

    # a prefix may be there or not
    present = {*current_names(header)}
    prefix, spellings = family.prefix, {}
    for name in (stored.name for stored in stored_tensors(family, model)):
        spellings[name] = {name, name.removeprefix(prefix), f"{prefix}{name}"}
    missing = [name for name, names in spellings.items() if not names & present]
    others = present.difference(*spellings.values())
    unused = sorted(name for name in others if not re.search(family.ignored, name))
    with summary.noting():
        file = WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else WEIGHTS_INDEX
        unused = load_tensors(model, family, tensors, str(path / file))
    return parameters, {"unused": unused, "missing": missing}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters: in all, then of each component (they add up), then by kind of layer."""
    counts = Counter[str]()
    for name, weight in model.named_parameters():
        component, _, rest = name.partition(".")
        if rest.startswith(("positions.", "types.", "embedding_norm.")):
            component = "embedding"
        counts[component] += weight.numel()
        kind = next((kind for kind, mark in LAYER_MARKS if mark in name), "")
        counts[kind] += weight.numel()
    names = (*MODEL_COMPONENTS, *LAYER_KINDS)
    total = sum(counts[component] for component in MODEL_COMPONENTS)
    return {"total": total, **{name: counts[name] for name in names if counts[name]}}


def _run_facts(recipe: dict[str, Any]) -> dict[str, Any]:
    """What recipe.yaml records of a run: its data, budget and results, whatever its content."""
    data, result, train, versions = (
        recipe[name] if isinstance(recipe.get(name), dict) else {}
        for name in ("data", "result", "train", "versions")
    )
    files = data.get("files") if isinstance(data.get("files"), list) else []
    return {
        "data": [str(file) for file in files],
        "data_bytes": data.get("bytes"),
        "data_tokens": data.get("tokens"),
        "budget": {name: train[name] for name in recipes.BUDGETS if train.get(name)},
        **_stage_facts(recipe.get("stages")),
        **{key: each for key, each in result.items() if isinstance(each, (int, float, str, bool))},
        "lm": versions.get("lm"),
    }


def _stage_facts(stages: Any) -> dict[str, list[str]]:
    """The budgets of a run before the present one, with the steps made in each."""
    if not isinstance(stages, list):
        return {}
    return {
        "earlier_budgets": [
            f"{name}={value} ({stage.get('steps')} steps)"
            for stage in stages
            if isinstance(stage, dict) and isinstance(stage.get("budget"), dict)
            for name, value in stage["budget"].items()
        ]
    }


def _weight_files(base: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names."""
    if (base / WEIGHTS_FILE).is_file():
        return [base / WEIGHTS_FILE]
    if not (base / WEIGHTS_INDEX).is_file():
        folder.load(base)  # raises the UserError that says what is missing
    weight_map = read_json(base / WEIGHTS_INDEX).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    where = str(base / WEIGHTS_INDEX)
    if not names:
        raise UserError("has no weight_map", where=where)
    for name in names:
        if Path(name).name != name or not (base / name).is_file():
            raise UserError(f"names a shard that does not exist: {name!r}", where=where)
    return [base / name for name in names]
