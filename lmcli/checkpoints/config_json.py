"""`config.json` ↔ ModelConfig, by the table of families."""

import dataclasses
import difflib
from typing import Any, NamedTuple

from lmcli.checkpoints.families import FAMILIES, Family
from lmcli.config import ModelConfig, check
from lmcli.errors import UsageError, UserError

# the largest sizes taken from a file; unlike a preset, it cannot ask by 0 for a size to be derived
LARGEST = {"vocab_size": 1 << 28, "max_position_embeddings": 1 << 24}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# fields that a family without a key for them derives from others
DERIVED = ("head_dim", "num_key_value_heads", "num_encoder_layers", "encoder_attention_heads", "encoder_intermediate_size")
# other names of activations that are ours under their own
ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu"}
MOST_LABELS = 1 << 20
ROPE_KEYS = {"rope_factor": "factor", "rope_original_context": "original_max_position_embeddings",
             "rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor"}


class Said(NamedTuple):
    """A value of a file, and the key under which it stands there, for messages."""

    key: str
    value: Any


def read_config(document: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family of a `config.json` and the model it describes.

    Raises UserError naming the key for an unknown family, a missing or impossible value, and what is not supported.
    """
    family = _family(document, where)
    for key, other in family.follows.items():
        if document.get(key) is None:
            document = {**document, key: document.get(other, family.defaults.get(other))}
    head = _head(family, document, where)
    _refuse_others(family, family.fixed, document, where)
    found = {**family.expected(head), **_chosen(family, document, where), "model_type": family.model_type,
             "shape": family.shape, "head": head}
    for ours, theirs in family.keys.items():
        value = document.get(theirs)
        meant = theirs in document and (ours in DERIVED or ours.endswith("token_id"))  # null: derived, or no such id
        found[ours] = Said(theirs, family.defaults.get(theirs) if value is None and not meant else value)
    missing = [name for name in REQUIRED if found[name].value is None]
    if missing:
        raise UserError(f"has no {found[missing[0]].key}", where=where)
    if found.get("positions") == "rotary":
        found |= _read_rope(family, document, where)
    found |= _read_window(family, document, where)
    if head in ("sequence", "token"):
        found |= _read_labels(document, where)
    values = {ours: _checked(ours, value, where) for ours, value in found.items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    if family.padding_first:
        values["position_offset"] = (values.get("pad_token_id") or 0) + 1
        values["max_position_embeddings"] -= values["position_offset"]
    for ours, most in LARGEST.items():
        if not 1 <= values.get(ours, 0) <= most:
            raise UserError(f"{family.keys[ours]}: {values.get(ours, 0)} is outside 1 to {most}", where=where)
    try:
        return family, ModelConfig(**values).complete()
    except UsageError as error:
        raise UserError(error.what, where=where) from None  # a preset's mistake is usage (exit 2), a file's is not


def _family(document: dict[str, Any], where: str) -> Family:
    name = document.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        near = difflib.get_close_matches(str(name).lower(), list(FAMILIES), n=1, cutoff=0.4)
        near = f"; the nearest supported family is {near[0]!r}" if near else ""
        own_code = "; it comes with code of its own, which lm never runs" if document.get("auto_map") else ""
        raise UserError(f"model_type {name!r} is not supported{own_code}{near}", where=where,
                        hint=f"supported: {', '.join(sorted(FAMILIES))}")
    return family


def _refuse_others(family: Family, fixed: dict[str, Any], document: dict[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if document.get(key, value) != value:
            raise UserError(f"{key} {document[key]!r} is not supported for {family.model_type}", where=where,
                            hint=f"supported: {value!r}")


def _head(family: Family, document: dict[str, Any], where: str) -> str:
    named = document.get("architectures")
    if not named:
        return next(iter(family.heads))
    architecture = named[0] if isinstance(named, list) else named
    known = {**{name: head for head, name in family.heads.items()}, **family.also}
    head = known.get(architecture) if isinstance(architecture, str) else None
    if head is None:
        raise UserError(f"architecture {architecture!r} is not supported for {family.model_type}", where=where,
                        hint=f"supported: {', '.join(family.heads.values())}")
    return head


def _chosen(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """Our options for the keys whose value stands for some; the first value is taken when a file leaves one out."""
    found = {}
    for key, choices in family.choices.items():
        value = document.get(key, choices[0][0])
        options = next((options for theirs, options in choices if theirs == value), None)
        if options is None:
            raise UserError(f"{key} {value!r} is not supported for {family.model_type}", where=where,
                            hint=f"supported: {', '.join(repr(theirs) for theirs, _ in choices)}")
        found |= options
    return found


def _checked(ours: str, value: Any, where: str) -> Any:
    """A value held against the range of our field."""
    theirs, value = value if isinstance(value, Said) else (ours, value)
    if ours in ("hidden_act", "head_act") and isinstance(value, str):
        value = ACTIVATION_NAMES.get(value, value)
    if ours.endswith("token_id") and isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    try:
        return check(ModelConfig, ours, value, where)
    except UsageError as error:
        raise UserError(error.what.replace(f"{ours}:", f"{theirs}:", 1), where=where) from None


def _read_rope(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary base and scaling from either of their homes; a mapping for each type of layer where there is one."""
    home = "rope_parameters" if document.get("rope_parameters") else "rope_scaling"
    rope = document.get(home) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{home} is not an object", where=where)
    found: dict[str, Any] = {}
    if "global_rope_theta" in family.defaults:
        known = {**family.defaults, **document}
        full, local = ({} if rope.get(kind) is None else rope[kind] for kind in ("full_attention", "sliding_attention"))
        if not isinstance(full, dict) or not isinstance(local, dict):
            raise UserError(f"{home} holds no object for each type of layer", where=where)
        if local.get("rope_type", "default") != "default":
            raise UserError(f"rope type {local['rope_type']!r} of sliding_attention is not supported", where=where)
        rope = {"rope_theta": known["global_rope_theta"], **full}
        found["local_rope_theta"] = Said("rope_theta", local.get("rope_theta") or known["local_rope_theta"])
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"rope type {kind!r} is not supported", where=where, hint="supported: default, linear, llama3, yarn")
    odd = [key for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
           if kind == "yarn" and rope.get(key) not in (None, {"beta_fast": 32, "beta_slow": 1, "truncate": True}.get(key))]
    if odd:
        raise UserError(f"{odd[0]} {rope[odd[0]]!r} of rope type 'yarn' is not supported", where=where)
    theta = rope.get("rope_theta") or document.get("rope_theta") or document.get("rotary_emb_base") or 10_000.0
    found |= {"rope_type": kind, "rope_theta": Said("rope_theta", theta)}
    if "rotary_fraction" in family.keys and rope.get("partial_rotary_factor") is not None:
        found["rotary_fraction"] = Said("partial_rotary_factor", rope["partial_rotary_factor"])
    if kind != "default":
        found |= {ours: Said(theirs, rope[theirs]) for ours, theirs in ROPE_KEYS.items() if rope.get(theirs) is not None}
        if "rope_factor" not in found:
            raise UserError(f"rope type {kind!r} without a factor", where=where)
    return found


def _read_window(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """The sliding window, and which layers have it."""
    if not family.window:
        return {}
    known = {**family.defaults, **document}
    window = known[family.window] if known.get("use_sliding_window", True) else None
    if window is None:
        return {}
    if not _by_layer(family):
        return {"sliding_window": Said(family.window, window)}
    types = known.get("layer_types")
    if types is None:
        layers = _checked("num_hidden_layers", Said(family.keys["num_hidden_layers"], known["num_hidden_layers"]), where)
        if "max_window_layers" in family.defaults:
            first = _whole("max_window_layers", known["max_window_layers"], 0, where)
            types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        else:
            every = _whole("global_attn_every_n_layers", known["global_attn_every_n_layers"], 1, where)
            types = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    types = _checked("layer_types", types, where)
    if set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types {sorted(set(types))} is not supported", where=where,
                        hint="supported: full_attention, sliding_attention")
    if "sliding_attention" not in types:
        return {}
    window = _checked("sliding_window", Said(family.window, window), where)
    # ModernBERT tells the width of both sides together
    return {"sliding_window": window // 2 if family.window == "local_attention" else window, "layer_types": types}


def _by_layer(family: Family) -> bool:
    """Whether the family's config.json tells which layers have the window; otherwise all have."""
    return "max_window_layers" in family.defaults or "global_attn_every_n_layers" in family.defaults


def _whole(key: str, value: Any, low: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{key}: {value!r} is not a whole number from {low}", where=where)
    return value


def _read_labels(document: dict[str, Any], where: str) -> dict[str, Any]:
    names = document.get("id2label")
    if not names:
        count = _whole("num_labels", document.get("num_labels", 2), 1, where)
        if count > MOST_LABELS:
            raise UserError(f"num_labels: {count} is outside 1 to {MOST_LABELS}", where=where)
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise UserError("id2label is no object of names for 0, 1, 2 …", where=where)
    problem = document.get("problem_type")
    if problem == "regression" or (len(names) == 1 and problem is None):
        raise UserError("a model that gives one number and no label is not supported", where=where,
                        hint="problem_type: single_label_classification or multi_label_classification")
    return {"labels": tuple(str(names[str(i)]) for i in range(len(names))),
            "multi_label": problem == "multi_label_classification"}


def family_of(config: ModelConfig) -> Family:
    """The family that a model of ours is saved as: the one it names, else the first that can say all its options.

    Raises UsageError naming the option that no family, or not the one named, can say.
    """
    if config.model_type and config.model_type not in FAMILIES:
        raise UsageError(f"model_type {config.model_type!r} is none of {', '.join(FAMILIES)}", where="model")
    candidates = [FAMILIES[config.model_type]] if config.model_type else list(FAMILIES.values())
    problems = [_unsayable(family, config) for family in candidates]
    for family, problem in zip(candidates, problems):
        if problem is None:
            return family
    nearest = next((problem for family, problem in zip(candidates, problems) if family.shape == config.shape), problems[0])
    raise UsageError(f"no checkpoint family has {nearest}" if len(candidates) > 1 else
                     f"{config.model_type} has no {nearest}", where="model",
                     hint="a model is saved in a format that others read: change the option, or model_type")


def _unsayable(family: Family, config: ModelConfig) -> str | None:
    """The first option of a model that this family's config.json cannot say, as "key value"; None when there is none."""
    if config.shape != family.shape:
        return f"shape {config.shape}"
    if config.head not in family.heads:
        return f"head {config.head}"
    expected = {"head_act": config.hidden_act, **family.expected(config.head)}
    if config.head == "none" and not config.head_dense:
        expected["head_dense"] = False  # a bare encoder may do without
    if family.padding_first:
        expected["position_offset"] = (config.pad_token_id or 0) + 1
    free = {*family.keys, "multi_label", *(("sliding_window",) if family.window else ()),
            *(("layer_types",) if _by_layer(family) else ())}
    if family.window and not _by_layer(family):
        expected["layer_types"] = ()
    for choices in family.choices.values():
        options = next((options for _, options in choices
                        if all(getattr(config, key) == value for key, value in options.items())), None)
        if options is None:
            key = next(iter(choices[0][1]))
            return f"{key} {getattr(config, key)!r}"
        free |= options.keys()
    for key in DERIVED:
        if (key not in free and config.shape == "encoder-decoder") or key in ("head_dim", "num_key_value_heads"):
            expected.setdefault(key, getattr(dataclasses.replace(config, **{key: 0}).complete(), key))
    wrong = next((key for key, value in expected.items() if key not in free and getattr(config, key) != value), None)
    return wrong and f"{wrong} {getattr(config, wrong)!r}"


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model, readable by `transformers` 4 and 5, vLLM and llama.cpp."""
    family = family_of(config)
    document = {"architectures": [family.heads[config.head]], "model_type": family.model_type}
    document |= {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    document |= family.fixed
    for key, choices in family.choices.items():
        document[key] = next(theirs for theirs, options in choices
                             if all(getattr(config, ours) == value for ours, value in options.items()))
    if family.padding_first:
        document["max_position_embeddings"] += config.position_offset
    if config.positions == "rotary":
        document |= _write_rope(family, config)
    if family.window:
        document |= _write_window(family, config)
    if config.head in ("sequence", "token"):
        document |= {"id2label": {str(i): name for i, name in enumerate(config.labels)},
                     "label2id": {name: i for i, name in enumerate(config.labels)},
                     "problem_type": "multi_label_classification" if config.multi_label else "single_label_classification"}
    return {**document, "initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype}


def _write_rope(family: Family, config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    if config.rope_type != "default":
        rope |= {theirs: getattr(config, ours) for ours, theirs in ROPE_KEYS.items()
                 if config.rope_type == "llama3" or ours == "rope_factor"}
    if config.rope_type in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope_original_context or config.max_position_embeddings
    if "rotary_fraction" in family.keys:
        rope["partial_rotary_factor"] = config.rotary_fraction
    if family.window == "local_attention":
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local},
                "global_rope_theta": config.rope_theta, "local_rope_theta": local["rope_theta"]}
    # rope_theta stands twice: `transformers` 5 reads the mapping, everyone else the plain key
    scaling = {"rope_scaling": rope} if config.rope_type != "default" else {}
    return {"rope_parameters": rope, "rope_theta": config.rope_theta, **scaling}


def _write_window(family: Family, config: ModelConfig) -> dict[str, Any]:
    types = list(config.kinds_of_layers(config.num_hidden_layers))
    if family.window == "local_attention":
        return {"layer_types": types, "local_attention": 2 * config.sliding_window or 128,
                **({} if config.sliding_window else {"global_attn_every_n_layers": 1})}
    document: dict[str, Any] = {"sliding_window": config.sliding_window or None}
    if "use_sliding_window" in family.defaults:
        document |= {"use_sliding_window": bool(config.sliding_window), "layer_types": types}
        document["max_window_layers"] = types.count("full_attention")
    return document
