"""The table of checkpoint families: `config.json` ↔ ModelConfig and weight names, both ways. A family is a row of data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lmcli.config import ModelConfig, check
from lmcli.errors import UsageError, UserError

LLAMA_WEIGHTS = {
    "embedding.weight": "model.embed_tokens.weight",
    "decoder.layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "decoder.layers.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "decoder.layers.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "decoder.layers.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "decoder.layers.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "decoder.layers.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "decoder.layers.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "decoder.layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "decoder.layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "decoder.layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "decoder.layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "decoder.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Family:
    """One family. `defaults` fills keys that its config.json may leave out; `fixed` are keys whose only supported value
    is given (they are written out, and another value is refused); `options` are our own switches that it implies."""

    model_type: str
    architecture: str
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=lambda: LLAMA_WEIGHTS)
    # tensors that some files carry and no forward pass needs
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM",
           defaults={"max_position_embeddings": 2048, "tie_word_embeddings": False},
           fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
           options={"query_key_norm": False}),
    Family("qwen3", "Qwen3ForCausalLM",
           defaults={"max_position_embeddings": 32768, "tie_word_embeddings": False, "head_dim": 128},
           fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
           options={"query_key_norm": True}),
)}
# the largest sizes taken from a file; unlike a preset, it cannot ask by 0 for a size to be derived
LARGEST = {"vocab_size": 1 << 28, "max_position_embeddings": 1 << 24}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


def read_config(document: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family of a `config.json` and the model it describes.

    Raises UserError naming the key for an unknown family, a missing or impossible value, and what is not supported.
    """
    family = FAMILIES.get(str(document.get("model_type")))
    if family is None:
        raise UserError(f"model_type {document.get('model_type')!r} is not supported", where=where,
                        hint=f"supported: {', '.join(sorted(FAMILIES))}")
    for key, value in family.fixed.items():
        if document.get(key, value) != value:
            raise UserError(f"{key} {document[key]!r} is not supported for {family.model_type}", where=where,
                            hint=f"supported: {value!r}")
    missing = [key for key in REQUIRED if document.get(key) is None]
    if missing:
        raise UserError(f"has no {missing[0]}", where=where)
    values = {**family.defaults, **document, "rope_theta": _rope_theta(document, where)}
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(values.get(key), list):
            values[key] = values[key][0] if values[key] else None
    known = {f.name for f in dataclasses.fields(ModelConfig)} - set(family.options)
    try:
        chosen = {key: check(ModelConfig, key, value, where) for key, value in values.items()
                  if key in known and (value is not None or key.endswith("token_id"))}
        for key, most in LARGEST.items():
            if not 1 <= chosen.get(key, 0) <= most:
                raise UserError(f"{key}: {chosen.get(key, 0)} is outside 1 to {most}", where=where)
        return family, ModelConfig(**chosen, **family.options).complete()
    except UsageError as error:
        raise UserError(error.what, where=where) from None  # a preset's mistake is usage (exit 2), a file's is not


def _rope_theta(document: dict[str, Any], where: str) -> float:
    """The rotary base from either of its two homes; scaled rotary positions are refused."""
    home = "rope_parameters" if document.get("rope_parameters") else "rope_scaling"
    rope = document.get(home) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{home} is not an object", where=where)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise UserError(f"rope type {kind!r} is not supported", where=where, hint="supported: default")
    return rope.get("rope_theta") or document.get("rope_theta") or 10_000.0


def family_of(config: ModelConfig) -> Family:
    """The family that a model of ours is saved as: the first whose options it has."""
    return next(family for family in FAMILIES.values()
                if all(getattr(config, key) == value for key, value in family.options.items()))


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model, readable by `transformers` 4 and 5, vLLM and llama.cpp."""
    family = family_of(config)
    own = {key: value for key, value in dataclasses.asdict(config).items() if key not in family.options}
    # rope_theta stands twice: `transformers` 5 reads the mapping, everyone else the plain key
    return {"architectures": [family.architecture], "model_type": family.model_type, **own, **family.fixed,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype}


def weight_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """Our name → the family's name of every tensor that a file of this model holds."""
    names = {}
    for ours, theirs in family.weights.items():
        if ours == "head.weight" and config.tie_word_embeddings:
            continue
        if not config.query_key_norm and (".query_norm." in ours or ".key_norm." in ours):
            continue
        layers = range(config.num_hidden_layers) if "{}" in ours else (None,)
        names.update((ours.replace("{}", str(i)), theirs.replace("{}", str(i))) for i in layers)
    return names
