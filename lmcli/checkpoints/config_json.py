"""`config.json` ↔ ModelConfig, for every family by its row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmcli.checkpoints.families import FAMILIES
from lmcli.checkpoints.family import Family, WindowRule
from lmcli.config import ModelConfig, check
from lmcli.data.schema import label_text
from lmcli.errors import UsageError, UserError, nearest

# the largest sizes accepted from a file; a file cannot ask by 0 for a derived size, as a preset can
LARGEST = {"vocab_size": 1 << 28, "max_position_embeddings": 1 << 24}
MAX_LABELS = 1 << 20
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# options that are derived from others in a family without keys for them
DERIVED = (
    "head_dim",
    "num_key_value_heads",
    "num_encoder_layers",
    "encoder_attention_heads",
    "encoder_intermediate_size",
)
# other names of activations → their names here
ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu"}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_original_context": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
# further keys of YaRN → the value that lm computes with; any other value is an error
YARN_KEYS = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}


def is_no_id(value: Any) -> bool:
    """True for what a file writes for a special token that there is none of: null or a negative."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and value < 0)


class FileValue(NamedTuple):
    """A value from a file with the key it has there, for error messages."""

    key: str
    value: Any


def read_config(document: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family of a `config.json` and the model that it describes.

    Raises UserError naming the key for an unknown family, a missing or impossible value, and a
    value that lm does not support.
    """
    family = _family(document, where)
    for key, other in family.fallbacks.items():
        if document.get(key) is None:
            document = {**document, key: document.get(other, family.defaults.get(other))}
    others = {key: document[name] for name, key in family.aliases.items() if document.get(name)}
    document = {**document, **others}
    head = _head(family, document, where)
    for key, value in family.fixed.items():
        if document.get(key, value) != value:
            raise _unsupported(f"{key} {document[key]!r}", where, repr(value), family)
    # options: fixed by the family, then chosen by a key's value, then with keys of their own
    options: dict[str, Any] = {
        **family.options_for(head),
        **_read_choices(family, document, where),
        "model_type": family.model_type,
        "shape": family.shape,
        "head": head,
        **{option: _file_value(option, family, document) for option in family.keys},
    }
    for option in REQUIRED:
        if options[option].value is None:
            raise UserError(f"has no {options[option].key}", where=where)
    if options["positions"] == "rotary":
        options |= _read_rope(family, document, where)
    options |= _read_window(family, document, where)
    if head in ("sequence", "token"):
        options |= _read_labels(document, where)
    _check_repeated(options, family, document, where)
    # values in their ranges
    values = {option: _checked(option, value, where) for option, value in options.items()}
    values = {option: value for option, value in values.items() if value is not None}
    if family.padding_first:
        # such a family counts positions from the padding id, even from -1
        padding = document.get("pad_token_id", values.get("pad_token_id"))
        values["position_offset"] = 0 if padding == -1 else (values.get("pad_token_id") or 0) + 1
        values["max_position_embeddings"] -= values["position_offset"]
    for option in family.derived:
        if not values[option]:  # which would mean another option's value
            raise UserError(f"{family.keys[option]}: 0 is not 1 or more", where=where)
    for option, most in LARGEST.items():
        size = values.get(option, 0)
        if not 1 <= size <= most:
            raise UserError(f"{family.keys[option]}: {size} is outside 1 to {most}", where=where)
    try:
        return family, ModelConfig(**values).complete()
    except UsageError as error:
        # a mistake in a preset is wrong usage (exit code 2), one in a file is not
        raise UserError(error.what, where=where) from None


def _unsupported(what: str, where: str, supported: str, family: Family | None = None) -> UserError:
    suffix = f" for {family.model_type}" if family else ""
    return UserError(
        f"{what} is not supported{suffix}", where=where, hint=f"supported: {supported}"
    )


def _family(document: dict[str, Any], where: str) -> Family:
    name = document.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        near = nearest(str(name), FAMILIES, cutoff=0.4)
        own_code = "; it comes with its own code, which lm never runs"
        raise UserError(
            f"model_type {name!r} is not supported"
            + (own_code if document.get("auto_map") else "")
            + (f"; the nearest supported family is {near[0]!r}" if near else ""),
            where=where,
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return family


def _head(family: Family, document: dict[str, Any], where: str) -> str:
    named = document.get("architectures")
    if not named:
        return next(iter(family.heads))
    architecture = named[0] if isinstance(named, list) else named
    heads = {**{name: head for head, name in family.heads.items()}, **family.architectures}
    head = heads.get(architecture) if isinstance(architecture, str) else None
    if head is None:
        supported = ", ".join(family.heads.values())
        raise _unsupported(f"architecture {architecture!r}", where, supported, family)
    return head


def _file_value(option: str, family: Family, document: dict[str, Any]) -> FileValue:
    """The value under an option's key, or the default. For some options null has a meaning."""
    key = family.keys[option]
    value = document.get(key)
    # null means "derived" or "no such id"
    null_has_a_meaning = option in DERIVED or option.endswith("token_id")
    if value is None and not (key in document and null_has_a_meaning):
        value = family.defaults.get(key)
    return FileValue(key, value)


def _read_choices(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """The options that the values of some keys stand for; a missing key has the first value."""
    options: dict[str, Any] = {}
    for key, choices in family.choices.items():
        value = document.get(key, choices[0][0])
        chosen = next((options for choice, options in choices if choice == value), None)
        if chosen is None:
            supported = ", ".join(repr(choice) for choice, _ in choices)
            raise _unsupported(f"{key} {value!r}", where, supported, family)
        options |= chosen
    return options


def _check_repeated(
    options: dict[str, Any], family: Family, document: dict[str, Any], where: str
) -> None:
    """Raises UserError for a key that contradicts the one that says the same thing."""
    for key, option in family.repeated.items():
        value = document.get(key)
        if value is not None and ACTIVATION_NAMES.get(str(value), value) != options[option]:
            others = (name for name, choices in family.choices.items() if option in choices[0][1])
            raise UserError(
                f"{key} {value!r} contradicts "
                + ", ".join(f"{name} {document.get(name)!r}" for name in others),
                where=where,
                hint="keep the one that the weights were trained with",
            )


def _checked(option: str, value: Any, where: str) -> Any:
    """A value as the option's type. Raises UserError naming the file's key if out of range."""
    key, value = value if isinstance(value, FileValue) else (option, value)
    if option in ("hidden_act", "head_act") and isinstance(value, str):
        value = ACTIVATION_NAMES.get(value, value)
    if option.endswith("token_id"):
        ids = value if isinstance(value, list) else [value]
        value = next((index for index in ids if not is_no_id(index)), None)
    if value is None:
        return None
    try:
        return check(ModelConfig, option, value, where)
    except UsageError as error:
        raise UserError(error.what.replace(f"{option}:", f"{key}:", 1), where=where) from None


def _read_rope(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary base and scaling: under `rope_scaling`, else under `rope_parameters`.

    A file with both means the former, as in transformers: people add it to extend a context.
    """
    key = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    rope = document.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} is not an object", where=where)
    options: dict[str, Any] = {}
    if family.rope_keys:
        rope, local_theta = _rope_by_layer_type(rope, key, family, document, where)
        options["local_rope_theta"] = local_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise _unsupported(f"rope type {kind!r}", where, ", ".join(ROPE_TYPES))
    if kind == "yarn":
        for name, value in YARN_KEYS.items():
            if rope.get(name) not in (None, value):
                raise UserError(
                    f"{name} {rope[name]!r} of rope type 'yarn' is not supported", where=where
                )
    theta = rope.get("rope_theta") or document.get(family.rope_base_key)
    theta = theta or document.get("rope_theta")
    options |= {"rope_type": kind, "rope_theta": FileValue("rope_theta", theta or 10_000.0)}
    if "rotary_fraction" in family.keys and rope.get("partial_rotary_factor") is not None:
        fraction = rope["partial_rotary_factor"]
        options["rotary_fraction"] = FileValue("partial_rotary_factor", fraction)
    elif "rotary_fraction" not in family.keys:
        fraction = rope.get("partial_rotary_factor", document.get("partial_rotary_factor"))
        if fraction not in (None, 1):
            raise _unsupported(f"partial_rotary_factor {fraction!r}", where, "1", family)
    if kind != "default":
        options |= {
            option: FileValue(name, rope[name])
            for option, name in ROPE_KEYS.items()
            if rope.get(name) is not None
        }
        if "rope_factor" not in options:
            raise UserError(f"rope type {kind!r} without a factor", where=where)
    return options


def _rope_by_layer_type(
    rope: dict[str, Any], key: str, family: Family, document: dict[str, Any], where: str
) -> tuple[dict[str, Any], FileValue]:
    """(parameters of layers with full attention, rotary base of those with a window)."""
    assert family.rope_keys
    full_theta, local_theta = ({**family.defaults, **document}[name] for name in family.rope_keys)
    scaling = rope if key == "rope_scaling" else {}
    by_type = (document.get("rope_parameters") or {}) if scaling else rope
    full, local = ({} if by_type.get(kind) is None else by_type[kind] for kind in LAYER_TYPES)
    if not isinstance(full, dict) or not isinstance(local, dict) or {*by_type} - {*LAYER_TYPES}:
        raise UserError(
            "rope_parameters holds no object for each type of layer, and only these", where=where
        )
    full = {**full, **scaling}
    local = local if family.scales_full_only else {**local, **scaling}
    kind = local.get("rope_type") or local.get("type") or "default"
    if kind != "default":
        raise UserError(f"rope type {kind!r} of sliding_attention is not supported", where=where)
    local_value = FileValue("rope_theta", local.get("rope_theta") or local_theta)
    return {"rope_theta": full_theta, **full}, local_value


def _read_window(family: Family, document: dict[str, Any], where: str) -> dict[str, Any]:
    """The sliding window, and which layers have it."""
    rule = family.window
    if rule is None:
        return {}
    known = {**family.defaults, **document}
    width = known[rule.key] if rule.switch is None or known.get(rule.switch) else None
    if rule.one_side_key and isinstance(one_side := document.get(rule.one_side_key), int):
        width = rule.sides * one_side
    if width is None:
        return {}
    if rule.pattern is None:
        return {"sliding_window": FileValue(rule.key, width)}
    layer_types = known.get("layer_types")
    if layer_types is None:
        key = family.keys["num_hidden_layers"]
        layers = _checked("num_hidden_layers", FileValue(key, known[key]), where)
        number = _whole(rule.pattern.key, known[rule.pattern.key], rule.pattern.low, where)
        is_full = rule.pattern.is_full
        full, sliding = LAYER_TYPES
        layer_types = [full if is_full(layer, number) else sliding for layer in range(layers)]
    layer_types = _checked("layer_types", layer_types, where)
    if set(layer_types) - {*LAYER_TYPES}:
        raise _unsupported(f"layer_types {sorted(set(layer_types))}", where, ", ".join(LAYER_TYPES))
    if "sliding_attention" not in layer_types:
        return {}
    width = _checked("sliding_window", FileValue(rule.key, width), where)
    return {"sliding_window": width // rule.sides, "layer_types": layer_types}


def _whole(key: str, value: Any, low: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{key}: {value!r} is not a whole number from {low}", where=where)
    return value


def _read_labels(document: dict[str, Any], where: str) -> dict[str, Any]:
    names, stated = document.get("id2label"), document.get("num_labels")
    # a file with both and two counts means num_labels, as in transformers
    if not names or (stated is not None and isinstance(names, dict) and stated != len(names)):
        count = _whole("num_labels", document.get("num_labels", 2), 1, where)
        if count > MAX_LABELS:
            raise UserError(f"num_labels: {count} is outside 1 to {MAX_LABELS}", where=where)
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise UserError("id2label is no object of names for 0, 1, 2 …", where=where)
    problem = document.get("problem_type")
    if problem == "regression" or (len(names) == 1 and problem is None):
        raise UserError(
            "regression (one number instead of labels) is not supported",
            where=where,
            hint="use problem_type: single_label_classification or multi_label_classification",
        )
    return {
        "labels": tuple(_label_name(names[str(i)]) for i in range(len(names))),
        "multi_label": problem == "multi_label_classification",
    }


def _label_name(value: Any) -> str:
    """A label as rows of data are read: true and false in small letters, 1.0 as 1."""
    text = label_text(value)
    return str(value) if text is None or isinstance(value, str) else text


def family_of(config: ModelConfig) -> Family:
    """The family to save a model as: the one it names, else the first that supports its options.

    Raises UsageError naming the option that the named family, or every family, does not support.
    """
    if config.model_type and config.model_type not in FAMILIES:
        raise UsageError(
            f"model_type {config.model_type!r} is none of {', '.join(FAMILIES)}", where="model"
        )
    candidates = [FAMILIES[config.model_type]] if config.model_type else list(FAMILIES.values())
    problems = {family.model_type: _unsupported_option(family, config) for family in candidates}
    for family in candidates:
        if problems[family.model_type] is None:
            return family
    nearest = next((f for f in candidates if f.shape == config.shape), candidates[0])
    subject = f"{config.model_type} has no" if config.model_type else "no checkpoint family has"
    raise UsageError(
        f"{subject} {problems[nearest.model_type]}",
        where="model",
        hint="change the option, or model_type: models are saved in formats that others can read",
    )


def _choice(
    choices: Sequence[tuple[Any, Mapping[str, Any]]], config: ModelConfig
) -> tuple[Any, Mapping[str, Any]] | None:
    """The (value, options) of a key whose options are those of a model; None if there is none."""
    for value, options in choices:
        if all(getattr(config, option) == expected for option, expected in options.items()):
            return value, options
    return None


def _unsupported_option(family: Family, config: ModelConfig) -> str | None:
    """The first option that the family's config.json cannot express, as "option value", or None."""
    if config.shape != family.shape:
        return f"shape {config.shape}"
    if config.head not in family.heads:
        return f"head {config.head}"
    # options with keys of their own may have any value
    free = {*family.keys, "multi_label"}
    expected = {"head_act": config.hidden_act, **family.options_for(config.head)}
    if config.head == "none" and not config.head_dense:
        expected["head_dense"] = False  # a bare encoder's pooler is optional
    if family.padding_first:
        expected["position_offset"] = (config.pad_token_id or 0) + 1
    if family.window:
        free.add("sliding_window")
        if family.window.pattern:
            free.add("layer_types")
        else:
            expected["layer_types"] = ()
    for choices in family.choices.values():
        choice = _choice(choices, config)
        if choice is None:
            option = next(iter(choices[0][1]))
            return f"{option} {getattr(config, option)!r}"
        free |= choice[1].keys()
    # the others must be what the family fixes or derives
    for option in DERIVED:
        always = option in ("head_dim", "num_key_value_heads")
        if always or (config.shape == "encoder-decoder" and option not in free):
            unset: dict[str, Any] = {option: 0}
            derived = dataclasses.replace(config, **unset).complete()
            expected.setdefault(option, getattr(derived, option))
    for option, value in expected.items():
        if option not in free and getattr(config, option) != value:
            return f"{option} {getattr(config, option)!r}"
    return None


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model, readable by `transformers` 4 and 5, vLLM and llama.cpp."""
    family = family_of(config)
    document: dict[str, Any] = {
        "architectures": [family.heads[config.head]],
        "model_type": family.model_type,
        **{key: getattr(config, option) for option, key in family.keys.items()},
        **family.fixed,
        **{
            family.keys[option]: getattr(config, option) or getattr(config, other)
            for option, other in family.derived.items()
        },
    }
    for key, choices in family.choices.items():
        choice = _choice(choices, config)
        assert choice, "family_of has checked the options"
        document[key] = choice[0]
    if family.padding_first:
        document["max_position_embeddings"] += config.position_offset
    if config.positions == "rotary":
        document |= _write_rope(family, config)
    if family.window:
        document |= _write_window(family.window, config)
    if config.head in ("sequence", "token"):
        kind = "multi" if config.multi_label else "single"
        document |= {
            "id2label": {str(i): name for i, name in enumerate(config.labels)},
            "label2id": {name: i for i, name in enumerate(config.labels)},
            "problem_type": f"{kind}_label_classification",
        }
    return {**document, "initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype}


def _write_rope(family: Family, config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    if config.rope_type != "default":
        rope |= {
            key: getattr(config, option)
            for option, key in ROPE_KEYS.items()
            if config.rope_type == "llama3" or option == "rope_factor"
        }
    if config.rope_type in ("llama3", "yarn"):
        context = config.rope_original_context or config.max_position_embeddings
        rope["original_max_position_embeddings"] = context
    if "rotary_fraction" in family.keys:
        rope["partial_rotary_factor"] = config.rotary_fraction
    if family.rope_keys:
        full_key, local_key = family.rope_keys
        local_theta = config.local_rope_theta or config.rope_theta
        local = {"rope_type": "default", "rope_theta": local_theta}
        return {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            full_key: config.rope_theta,
            local_key: local_theta,
        }
    # rope_theta is written twice: `transformers` 5 reads the object, all others the plain key
    scaling = {"rope_scaling": rope} if config.rope_type != "default" else {}
    return {"rope_parameters": rope, "rope_theta": config.rope_theta, **scaling}


def _write_window(rule: WindowRule, config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    layer_types = list(config.resolved_layer_types(config.num_hidden_layers))
    values: dict[str, Any] = {
        rule.key: rule.sides * window or rule.off,
        "use_sliding_window": bool(window),
        "layer_types": layer_types,
    }
    number = rule.pattern and rule.pattern.number(layer_types, window)
    if rule.pattern and number is not None:
        values[rule.pattern.key] = number
    return {key: values[key] for key in rule.written if key in values}
