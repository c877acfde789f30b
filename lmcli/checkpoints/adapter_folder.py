"""LoRA adapters ↔ PEFT's folders (`adapter_config.json`, `adapter_model.safetensors`)."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcli.checkpoints import adapter_base
from lmcli.checkpoints.adapter_base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lmcli.checkpoints.config_json import family_of
from lmcli.checkpoints.families import FAMILIES
from lmcli.checkpoints.family import Family
from lmcli.checkpoints.weights import (
    PEFT_PREFIX,
    StoredTensor,
    config_for_tensors,
    find_name,
    join_tensors,
    stored_tensors,
    without_wrappers,
)
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.model.layers import Linear
from lmcli.model.lora import LoraEmbedding, LoraLinear, LowRank, adapters_of, added
from lmcli.model.transformer import Transformer
from lmcli.storage import read_json, read_tensors, write_tensors, write_text

# A → B of a Linear and of an embedding
FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
PARTNERS = FACTORS | {b: a for a, b in FACTORS.items()}
TASK_TYPES = {
    ("decoder", "lm"): "CAUSAL_LM",
    ("encoder-decoder", "lm"): "SEQ_2_SEQ_LM",
    ("encoder", "sequence"): "SEQ_CLS",
    ("encoder", "token"): "TOKEN_CLS",
    ("encoder", "span"): "QUESTION_ANS",
    ("encoder", "none"): "FEATURE_EXTRACTION",
}
TASK_HEADS = {task: head for (_, head), task in TASK_TYPES.items()}
# keys of adapter_config.json that lm reads, or that change no number; others must not be set
KNOWN_KEYS = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern target_modules task_type
    use_rslora
    """.split()
)
# keys with several supported values, the default first; other values would change the base as well
SUPPORTED = {
    "bias": ("none",),
    "revision": (None, "main"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, its base model's folder, its options as in the file, and its tensors.

    The names of the tensors are without PEFT_PREFIX.
    """

    folder: Path
    base: Path
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A of a module: alpha / rank, or alpha / √rank (Kalajdzievski 2023)."""
        alpha = self.options.get("lora_alpha", 8)
        for pattern, value in (self.options.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (rank**0.5 if self.options.get("use_rslora") else rank)


def read(folder: Path) -> Adapter:
    """The adapter of a folder, with the folder of its base.

    Raises UserError naming the file for a damaged one, an option that is not supported, and a base
    that is missing or has changed.
    """
    options = read_json(folder / ADAPTER_CONFIG)
    _check_options(options, str(folder / ADAPTER_CONFIG))
    base = adapter_base.find_base(folder)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(
            f"holds no {ADAPTER_WEIGHTS}",
            where=str(folder),
            hint="lm reads weights from safetensors files only",
        )
    tensors = without_wrappers(read_tensors(file), str(file))
    return Adapter(folder, base, options, tensors)


def _check_options(options: dict[str, Any], where: str) -> None:
    """Raises UserError for an option that lm does not support."""
    if options.get("peft_type") != "LORA":
        raise UserError(
            f"peft_type {options.get('peft_type')!r} is not supported",
            where=where,
            hint="supported: LORA",
        )
    for key, allowed in SUPPORTED.items():
        if options.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} {options[key]!r} is not supported", where=where)
    for key in sorted(options.keys() - KNOWN_KEYS - SUPPORTED.keys()):
        if options[key]:
            raise UserError(
                f"{key} {options[key]!r} is not supported",
                where=where,
                hint="merge it with peft (merge_and_unload, save_pretrained) and use that folder",
            )
    for key in ("alpha_pattern", "rank_pattern"):
        if not isinstance(options.get(key) or {}, dict):
            raise UserError(f"{key} is not an object", where=where)
    alphas = {"lora_alpha": options.get("lora_alpha", 8), **(options.get("alpha_pattern") or {})}
    for key, value in alphas.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise UserError(f"{key}: {value!r} is not a number", where=where)


def merge(
    adapter: Adapter, family: Family, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A base model's tensors, by their names in its files, with the adapter merged into them.

    Raises UserError naming a tensor that the base lacks or has in another shape.
    """
    where = str(adapter.folder / ADAPTER_WEIGHTS)
    tensors = _base_tensors(adapter, family, config, tensors)
    merged = dict(tensors)
    for name, tensor in adapter.tensors.items():
        module, kind = _split_name(name)
        if not kind:
            if "lora_" in name or "base_layer" in name:
                raise UserError(f"has an unsupported tensor: {name}", where=where)
            merged[find_name(name, family.prefix, tensors) or name] = tensor
        elif kind in PARTNERS:
            partner = f"{module}.{PARTNERS[kind]}"
            if partner not in adapter.tensors:
                raise _other_base(f"has no {partner}", where)
            file_module = _file_module(family, module)
            weight = find_name(f"{file_module}.weight", family.prefix, tensors)
            if weight is None:
                raise _other_base(f"has {module}, which its base {adapter.base} lacks", where)
            if kind in FACTORS:
                factors = tensor, adapter.tensors[partner]
                transposed = _is_transposed(family, module)
                merged[weight] = _merged(adapter, module, tensors[weight], factors, transposed)
    return merged


def _other_base(what: str, where: str) -> UserError:
    return UserError(what, where=where, hint="it may have been trained for another base")


def _split_name(name: str) -> tuple[str, str]:
    """(module, kind) of a tensor in the file; ("", "") for one that is not part of an adapter."""
    pattern = r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.(?:weight|bias))"
    match = re.fullmatch(pattern, name)
    return (match[1], match[2]) if match else ("", "")


def _file_module(family: Family, module: str) -> str:
    """The name in files of a module, from its name in transformers."""
    return next((file for file, name in family.peft_names.items() if name == module), module)


def _base_tensors(
    adapter: Adapter, family: Family, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that the adapter adds to.

    They are the base's, or the copies that PEFT stored with the adapter (it does so for embedding
    and head). Where embedding and head are one matrix and one of the two has an adapter, each gets
    a tensor of its own. Raises UserError for an adapter of an embedding that two stacks share.
    """
    tied = config.head == "lm" and config_for_tensors(config, family, tensors).tie_word_embeddings
    tied_modules = [family.file_module(m) for m in ("embedding", "head.output")] if tied else []
    kinds = {}
    for name in adapter.tensors:
        module, kind = _split_name(name)
        kinds[name] = _file_module(family, module), kind
    unties = any({m, f"{family.prefix}{m}"} & {*tied_modules} for m, _ in kinds.values())
    embeds = any(kind == "lora_embedding_A" for _, kind in kinds.values())
    if config.shape == "encoder-decoder" and (unties or embeds):
        raise UserError(
            "has an adapter of an embedding that two stacks share, which is not supported",
            where=str(adapter.folder / ADAPTER_WEIGHTS),
        )
    base = dict(tensors)
    for name, (module, kind) in kinds.items():
        if kind.startswith("base_layer."):
            plain = f"{module}.{kind.removeprefix('base_layer.')}"
            base[find_name(plain, family.prefix, tensors) or plain] = adapter.tensors[name]
    if unties:
        names = {m: find_name(f"{m}.weight", family.prefix, base) for m in tied_modules}
        stored = next((name for name in names.values() if name), None)
        if stored:
            base |= {f"{m}.weight": base[stored] for m, name in names.items() if not name}
    return base


def _merged(
    adapter: Adapter, module: str, weight: Tensor, factors: tuple[Tensor, Tensor], transposed: bool
) -> Tensor:
    """A stored matrix with B A added; to an embedding (vocabulary, hidden), (B A)ᵀ is added."""
    a, b = factors
    matrix = weight.float().T if transposed else weight.float()
    embedding = f"{module}.lora_embedding_A" in adapter.tensors
    shape = tuple(reversed(matrix.shape)) if embedding else tuple(matrix.shape)
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or (len(b), a.shape[1]) != shape:
        raise UserError(
            f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {module} do not fit the "
            f"matrix {tuple(matrix.shape)} of its base {adapter.base}",
            where=str(adapter.folder / ADAPTER_WEIGHTS),
            hint="it was trained for another base",
        )
    # copies: a memory-mapped file has tensors at odd addresses, whose products may differ from a
    # run's in the last bit
    a, b, scale = a.float().clone(), b.float().clone(), adapter.scale(module, len(a))
    matrix = added(matrix, LowRank(b.T, a.T, scale) if embedding else LowRank(a, b, scale))
    return matrix.T if transposed else matrix


def _is_transposed(family: Family, module: str) -> bool:
    """True if a module's matrix is stored transposed."""
    columns = (entry for entry in family.tensors if entry.layout == "columns")
    patterns = [re.escape(entry.file_name).replace(r"\{\}", r"\d+") for entry in columns]
    names = (module, f"{family.prefix}{module}")
    return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)


def adapted_config(adapter: Adapter, document: dict[str, Any]) -> dict[str, Any]:
    """A base's config.json for the adapted model: with the head of its task and that head's labels.

    The labels' names are in a run's recipe.yaml. Raises UserError for a head the family lacks.
    """
    task = adapter.options.get("task_type")
    family, head = FAMILIES.get(str(document.get("model_type"))), TASK_HEADS.get(str(task))
    if family is None or head is None:
        return document
    if head not in family.heads:
        raise UserError(
            f"task_type {task} is not supported for {family.model_type}",
            where=str(adapter.folder / ADAPTER_CONFIG),
        )
    adapted = {**document, "architectures": [family.heads[head]]}
    entries = family.head_tensors.get(head, ())
    output = next((e.file_name for e in entries if e.modules == ("head.output",)), "")
    weight = adapter.tensors.get(f"{output}.weight")
    if head in ("sequence", "token") and weight is not None:
        labels = _labels(adapter.folder)
        if len(labels) != len(weight) and len(document.get("id2label") or {}) != len(weight):
            labels = [f"LABEL_{i}" for i in range(len(weight))]
        if len(labels) == len(weight):
            adapted["id2label"] = {str(i): name for i, name in enumerate(labels)}
    return adapted


def _labels(folder: Path) -> list[str]:
    model = adapter_base.recipe_of(folder).get("model")
    return [str(name) for name in model.get("labels") or ()] if isinstance(model, dict) else []


def fused_projections(model: Transformer) -> list[tuple[str, ...]]:
    """Our names of the Linears in each matrix that holds several of them in this model's files."""
    return [
        tuple(name.removesuffix(".weight") for name in stored.parameters)
        for stored in stored_tensors(family_of(model.config), model)
        if len(stored.parameters) > 1 and stored.name.endswith(".weight")
    ]


def save(folder: Path, model: Transformer, base: str) -> None:
    """Writes both files for the adapters of a model, as PEFT would with this `base`."""
    family, adapters = family_of(model.config), adapters_of(model)
    first = next(iter(adapters.values()))
    rank, modules = len(first.lora_a), set(_adapted_modules(family, model, adapters))
    alpha = first.scale * rank
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get((model.config.shape, model.config.head)),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": max(adapter.dropout for adapter in adapters.values()),
        "target_modules": _shortest_endings(modules, _all_modules(family, model)),
        "modules_to_save": _modules_to_save(family, model),
        "bias": "none",
        "fan_in_fan_out": any(_is_transposed(family, name) for name in modules),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }
    write_text(folder / ADAPTER_CONFIG, json.dumps(document, indent=2) + "\n")
    save_weights(folder, model)


def save_weights(folder: Path, model: Transformer) -> None:
    """Replaces the adapter's file atomically: A and B of each stored matrix, and a trained head."""
    family, heads = family_of(model.config), model.config.num_attention_heads
    tensors: dict[str, Tensor] = {}
    for name, (modules, layout) in _adapted_modules(family, model, adapters_of(model)).items():
        adapters = [m for m in modules if isinstance(m, LoraLinear | LoraEmbedding)]
        a = adapters[0].lora_a
        if isinstance(adapters[0], LoraEmbedding):
            tensors[f"{name}.lora_embedding_A"] = a
            tensors[f"{name}.lora_embedding_B"] = adapters[0].lora_b
            continue
        # all modules of a stored matrix share A; one without an adapter gets a B of zeros
        bs: list[Tensor] = []
        for m in modules:
            assert isinstance(m, Linear)
            bs.append(
                m.lora_b if isinstance(m, LoraLinear) else a.new_zeros(m.out_features, len(a))
            )
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = join_tensors(bs, layout, heads)
    for stored in _trained_tensors(family, model):
        parameters = [model.get_parameter(name) for name in stored.parameters]
        tensors[stored.name] = join_tensors(parameters, stored.layout, heads)
    document = {
        f"{PEFT_PREFIX}{name}": tensor.detach().float().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    write_tensors(folder / ADAPTER_WEIGHTS, document)


def _adapted_modules(
    family: Family, model: Transformer, adapters: Mapping[str, LoraLinear | LoraEmbedding]
) -> dict[str, tuple[list[torch.nn.Module], str]]:
    """Each stored module with an adapter → (our modules that it holds, layout of their rows)."""
    adapted = {}
    for name, parameters, layout in stored_tensors(family, model):
        modules = [parameter.removesuffix(".weight") for parameter in parameters]
        if name.endswith(".weight") and any(module in adapters for module in modules):
            name = name.removesuffix(".weight")
            adapted[family.peft_names.get(name, name)] = (
                [model.get_submodule(module) for module in modules],
                "heads" if layout == "heads" else "rows",
            )
    return adapted


def _trained_tensors(family: Family, model: Transformer) -> Iterator[StoredTensor]:
    """The stored tensors that are trained themselves: those of a head for labels."""
    for stored in stored_tensors(family, model):
        if all(model.get_parameter(name).requires_grad for name in stored.parameters):
            yield stored


def _modules_to_save(family: Family, model: Transformer) -> list[str] | None:
    """PEFT's `modules_to_save`: the top modules of a trained head."""
    names = (stored.name.removeprefix(family.prefix) for stored in _trained_tensors(family, model))
    return sorted({name.partition(".")[0] for name in names}) or None


def _all_modules(family: Family, model: Transformer) -> set[str]:
    names = {stored.name.rpartition(".")[0] for stored in stored_tensors(family, model)}
    return {family.peft_names.get(name, name) for name in names}


def _shortest_endings(targets: set[str], modules: set[str]) -> list[str]:
    """PEFT's `target_modules`: the shortest endings that match the targets and no other module.

    Whole names if there are no such endings, as when some layers have no adapter.
    """

    def matches_targets_only(ending: str) -> bool:
        return all(name in targets for name in modules if f".{name}".endswith(f".{ending}"))

    chosen = set()
    for target in targets:
        words = target.split(".")
        endings = (".".join(words[-count:]) for count in range(1, len(words)))
        chosen.add(next(filter(matches_targets_only, endings), target))
    has_layer_number = any(re.search(r"(^|\.)\d+(\.|$)", name) for name in chosen)
    return sorted(targets if has_layer_number else chosen)
