"""A folder in PEFT's form (`adapter_config.json`, `adapter_model.safetensors`) ↔ what LoRA adds to a base model."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcli import recipes
from lmcli.checkpoints import adapter_base
from lmcli.checkpoints.adapter_base import CONFIG, WEIGHTS
from lmcli.checkpoints.config_json import family_of
from lmcli.checkpoints.families import FAMILIES, Family
from lmcli.checkpoints.weights import as_stored, joined, spelled, stored_tensors
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.model.adapters import LoraEmbedding, LoraLinear, adapters_of
from lmcli.model.low_rank import LowRank, added
from lmcli.model.transformer import Transformer
from lmcli.storage import read_json, read_tensors, write_tensors, write_text

LEAD = "base_model.model."  # of all names in the file
FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}  # A and B of a Linear, of an embedding
PARTNERS = FACTORS | {b: a for a, b in FACTORS.items()}
TASKS = {("decoder", "lm"): "CAUSAL_LM", ("encoder-decoder", "lm"): "SEQ_2_SEQ_LM", ("encoder", "sequence"): "SEQ_CLS",
         ("encoder", "token"): "TOKEN_CLS", ("encoder", "span"): "QUESTION_ANS", ("encoder", "none"): "FEATURE_EXTRACTION"}
HEADS = {task: head for (_, head), task in TASKS.items()}
# what of an adapter_config.json is understood or changes no number; any other option that is set is refused
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "target_modules", "task_type",
    "use_rslora"}
SUPPORTED = {"bias": ("none",), "revision": (None, "main"),
             "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva")}  # others change the base as well


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: the folder of its base model, its options as the file has them, its tensors without LEAD."""

    folder: Path
    base: Path
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by: alpha / rank, or alpha / √rank (Kalajdzievski 2023)."""
        patterns = self.options.get("alpha_pattern") or {}
        alpha = next((own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
                     self.options.get("lora_alpha", 8))
        return alpha / (rank ** 0.5 if self.options.get("use_rslora") else rank)


def read(folder: Path) -> Adapter:
    """The adapter of a folder, its base found.

    Raises UserError naming the file for a damaged one, an option that is not supported, and a base that is not there or
    not the one it was.
    """
    options = read_json(folder / CONFIG)
    _refuse_others(options, str(folder / CONFIG))
    base = adapter_base.find(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"holds no {WEIGHTS}", where=str(folder), hint="only safetensors hold weights here")
    tensors = {name.removeprefix(LEAD): tensor for name, tensor in read_tensors(folder / WEIGHTS).items()}
    return Adapter(folder, base, options, tensors)


def _refuse_others(options: dict[str, Any], where: str) -> None:
    if options.get("peft_type") != "LORA":
        raise UserError(f"peft_type {options.get('peft_type')!r} is not supported", where=where, hint="supported: LORA")
    for key, allowed in SUPPORTED.items():
        if options.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} {options[key]!r} is not supported", where=where)
    other = next((key for key in sorted(options) if key not in UNDERSTOOD and key not in SUPPORTED and options[key]), None)
    if other:
        raise UserError(f"{other} {options[other]!r} is not supported", where=where,
                        hint="merge it with peft (merge_and_unload, save_pretrained), and take that folder")
    for key in ("alpha_pattern", "rank_pattern"):
        if not isinstance(options.get(key) or {}, dict):
            raise UserError(f"{key} is not an object", where=where)
    for key, value in {"lora_alpha": options.get("lora_alpha", 8), **(options.get("alpha_pattern") or {})}.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{key}: {value!r} is not a number", where=where)


def merged(adapter: Adapter, family: Family, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A base model's tensors, by their names in its files, with what the adapter adds to them or puts in their place.

    Raises UserError naming the tensor that the base has not or has in another shape.
    """
    tensors, where = _underneath(adapter, family, config, tensors), str(adapter.folder / WEIGHTS)
    done = dict(tensors)
    for name, tensor in adapter.tensors.items():
        module, part = _parted(name)
        if not part and ("lora_" in name or "base_layer" in name):
            raise UserError(f"has a tensor of a kind that is not supported: {name}", where=where)
        if not part:
            done[spelled(name, family.prefix, tensors) or name] = tensor
        elif part in PARTNERS:
            weight = spelled(f"{_in_files(family, module)}.weight", family.prefix, tensors)
            other = adapter.tensors.get(f"{module}.{PARTNERS[part]}")
            if weight is None or other is None:
                lacks = f"no {module}.{PARTNERS[part]}" if other is None else \
                    f"{module}, which its base {adapter.base} has not"
                raise UserError(f"has {lacks}", where=where, hint="it may have been made for another base")
            if part in FACTORS:
                done[weight] = _added(adapter, module, tensors[weight], tensor, other, _stands(family, module))
    return done


def _parted(name: str) -> tuple[str, str]:
    """(module, what of its adapter) that a tensor of the file is; two empty words for one that belongs to no adapter."""
    found = re.fullmatch(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.(?:weight|bias))", name)
    return (found[1], found[2]) if found else ("", "")


def _in_files(family: Family, module: str) -> str:
    """What files call a module that transformers calls so."""
    return next((theirs for theirs, name in family.modules.items() if name == module), module)


def _underneath(adapter: Adapter, family: Family, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the adapter adds to: those of its base, or what peft stored of it again (of an embedding and a head
    it does); of a matrix that is both, where an adapter is on one of the two, a tensor for each.

    Raises UserError for an adapter of what two stacks share.
    """
    tied = config.head == "lm" and as_stored(config, family, tensors).tie_word_embeddings
    outer = [family.module_of(ours) for ours in ("embedding", "head.output")] if tied else []
    parts = {}
    for name in adapter.tensors:
        module, part = _parted(name)
        parts[name] = _in_files(family, module), part
    apart = any({module, f"{family.prefix}{module}"} & {*outer} for module, _ in parts.values())
    if config.shape == "encoder-decoder" and (apart or any(part == "lora_embedding_A" for _, part in parts.values())):
        raise UserError("has an adapter of an embedding that two stacks share, which is not supported",
                        where=str(adapter.folder / WEIGHTS))
    found = dict(tensors)
    for name, (module, part) in parts.items():
        if part.startswith("base_layer."):
            plain = f"{module}.{part.removeprefix('base_layer.')}"
            found[spelled(plain, family.prefix, tensors) or plain] = adapter.tensors[name]
    if apart:
        names = [(module, spelled(f"{module}.weight", family.prefix, found)) for module in outer]
        one = next((name for _, name in names if name), None)
        found |= {f"{module}.weight": found[one] for module, name in names if one and not name}
    return found


def _added(adapter: Adapter, module: str, weight: Tensor, a: Tensor, b: Tensor, stands: bool) -> Tensor:
    """The matrix, which may stand transposed, with B A; of an embedding (words, hidden) with (B A)ᵀ."""
    whole = weight.float().T if stands else weight.float()
    embedding = f"{module}.lora_embedding_A" in adapter.tensors
    shape = tuple(reversed(whole.shape)) if embedding else tuple(whole.shape)
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or (len(b), a.shape[1]) != shape:
        raise UserError(f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {module} do not fit the matrix "
                        f"{tuple(whole.shape)} of its base {adapter.base}", where=str(adapter.folder / WEIGHTS),
                        hint="it was made for another base")
    # copies: products of what lies in a mapped file, at odd addresses, may differ in their last bit from those of a run
    a, b, scale = a.float().clone(), b.float().clone(), adapter.scale(module, len(a))
    whole = added(whole, LowRank(b.T, a.T, scale) if embedding else LowRank(a, b, scale))
    return whole.T if stands else whole


def _stands(family: Family, module: str) -> bool:
    """Whether a module's matrix is stored transposed."""
    return any(row.layout == "columns" and re.fullmatch(re.escape(row.theirs).replace(r"\{\}", r"\d+"), name)
               for row in family.rows for name in (module, f"{family.prefix}{module}"))


def as_adapted(adapter: Adapter, document: dict[str, Any]) -> dict[str, Any]:
    """A base's config.json for the model that the adapter makes of it: with the head of its task, and the labels of a head
    that it brings (named by a run's recipe.yaml). Raises UserError for a head that the family has not."""
    family, head = FAMILIES.get(str(document.get("model_type"))), HEADS.get(adapter.options.get("task_type"))
    if family is None or head is None:
        return document
    if head not in family.heads:
        raise UserError(f"task_type {adapter.options['task_type']} is not supported for {family.model_type}",
                        where=str(adapter.folder / CONFIG))
    changed = {**document, "architectures": [family.heads[head]]}
    output = next((row.theirs for row in family.head_rows.get(head, ()) if row.ours == ("head.output",)), "")
    brought = adapter.tensors.get(f"{output}.weight")
    if head in ("sequence", "token") and brought is not None:
        names = _labels(adapter.folder)
        if len(names) != len(brought) and len(document.get("id2label") or {}) != len(brought):
            names = [f"LABEL_{i}" for i in range(len(brought))]
        if len(names) == len(brought):
            changed["id2label"] = {str(i): name for i, name in enumerate(names)}
    return changed


def _labels(folder: Path) -> list[str]:
    file = folder / "recipe.yaml"
    model = recipes.load_yaml(file).get("model") if file.is_file() else None
    return [str(name) for name in model.get("labels") or ()] if isinstance(model, dict) else []


def together(model: Transformer) -> list[tuple[str, ...]]:
    """The Linears (by our names) that a file of this model keeps in one matrix, several in each."""
    return [tuple(name.removesuffix(".weight") for name in ours)
            for theirs, ours, _ in stored_tensors(family_of(model.config), model)
            if len(ours) > 1 and theirs.endswith(".weight")]


def save(folder: Path, model: Transformer, base: str) -> None:
    """Writes both files for the adapters of a model, as PEFT would for the same model of transformers with `base`."""
    family, adapters = family_of(model.config), adapters_of(model)
    first = next(iter(adapters.values()))
    rank, own = len(first.lora_a), set(_adapted(family, model, adapters))
    alpha = first.scale * rank
    document = {
        "peft_type": "LORA", "task_type": TASKS.get((model.config.shape, model.config.head)),
        "base_model_name_or_path": base, "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": max(part.dropout for part in adapters.values()),
        "target_modules": _names(own, _modules(family, model)),
        "modules_to_save": _brought(family, model), "bias": "none",
        "fan_in_fan_out": any(_stands(family, name) for name in own), "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": None, "layers_pattern": None, "revision": None}
    write_text(folder / CONFIG, json.dumps(document, indent=2) + "\n")
    save_weights(folder, model)


def save_weights(folder: Path, model: Transformer) -> None:
    """Replaces the adapter's tensors atomically: A and B of each matrix that a file has, and a head that is trained."""
    family, heads = family_of(model.config), model.config.num_attention_heads
    tensors: dict[str, Tensor] = {}
    for module, (parts, layout) in _adapted(family, model, adapters_of(model)).items():
        found = [part for part in parts if isinstance(part, (LoraLinear, LoraEmbedding))]
        a = found[0].lora_a
        if isinstance(found[0], LoraEmbedding):
            tensors |= {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": found[0].lora_b}
            continue
        bs = [part.lora_b if isinstance(part, LoraLinear) else a.new_zeros(part.out_features, len(a)) for part in parts]
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": joined(bs, layout, heads)}
    for theirs, ours, layout in _trained(family, model):
        tensors[theirs] = joined([model.get_parameter(name) for name in ours], layout, heads)
    write_tensors(folder / WEIGHTS, {f"{LEAD}{name}": tensor.detach().float().cpu().contiguous()
                                     for name, tensor in tensors.items()})


def _adapted(family: Family, model: Transformer,
             adapters: dict[str, LoraLinear | LoraEmbedding]) -> dict[str, tuple[list[torch.nn.Module], str]]:
    """Their name of each module with an adapter → the modules of ours that it holds, and how their rows are joined."""
    found = {}
    for theirs, ours, layout in stored_tensors(family, model):
        names = [name.removesuffix(".weight") for name in ours]
        if theirs.endswith(".weight") and any(name in adapters for name in names):
            module = theirs.removesuffix(".weight")
            found[family.modules.get(module, module)] = ([model.get_submodule(name) for name in names],
                                                     "heads" if layout == "heads" else "rows")
    return found


def _trained(family: Family, model: Transformer) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The stored tensors that are trained themselves: those of a head for labels."""
    for stored in stored_tensors(family, model):
        if all(model.get_parameter(name).requires_grad for name in stored.ours):
            yield stored


def _brought(family: Family, model: Transformer) -> list[str] | None:
    """PEFT's modules_to_save: the modules of a head that is trained, by the first part of their names."""
    names = {theirs.removeprefix(family.prefix).partition(".")[0] for theirs, _, _ in _trained(family, model)}
    return sorted(names) or None


def _modules(family: Family, model: Transformer) -> set[str]:
    names = {stored.theirs.rpartition(".")[0] for stored in stored_tensors(family, model)}
    return {family.modules.get(name, name) for name in names}


def _names(targets: set[str], modules: set[str]) -> list[str]:
    """Endings of names that mean these modules and no others, as short as can be ("q_proj"); whole names where there are no
    such endings, as when some layers have no adapter."""
    found = set()
    for target in targets:
        parts = target.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
        found.add(next((ending for ending in endings if all(
            module in targets for module in modules if module == ending or module.endswith(f".{ending}"))), target))
    return sorted(targets if any(re.search(r"(^|\.)\d+(\.|$)", name) for name in found) else found)
