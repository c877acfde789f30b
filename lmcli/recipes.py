"""Presets and recipes: YAML ↔ Recipe, with `extends`, `--set`, and errors that name the file and the nearest key."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lmcli.config import Recipe, check
from lmcli.errors import UsageError, UserError

SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
# facts that a stored recipe carries beside the four sections; read by `lm info` and `--validation`, not by training
BUDGETS = ("time", "tokens", "steps", "epochs")
FACTS = ("versions", "data", "validation", "result", "choice", "base")
MOST_DEPTH = 50
OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
           yaml.BlockMappingStartToken)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def preset_folder() -> Path:
    """The folder of shipped presets: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    return package / "presets" if (package / "presets").is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names that `--preset` takes, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def resolve(preset: str, sets: Iterable[str] = (), train: Mapping[str, Any] = MappingProxyType({}),
            below: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """The recipe of a preset's name or file, with `below` (section.key → value), `section.key=value` settings and then
    `train` values (None: not given) on top. A budget given here (time, tokens, steps, epochs) takes the place of all of
    the preset's.

    Raises UsageError for an unknown preset, key or value; it names the file, the key and the nearest valid one.
    """
    sets = [*(f"{key}={value}" for key, value in below.items()), *sets]
    values = _read(_find(preset), seen=())
    given = {setting.partition("=")[0].strip() for setting in sets}
    given |= {f"train.{key}" for key, value in train.items() if value is not None}
    if given & {f"train.{budget}" for budget in BUDGETS}:
        values["train"].update(dict.fromkeys(BUDGETS, 0))
    for setting in sets:
        _set(values, setting)
    for key, value in train.items():
        if value is not None:
            _put(values, "train", key, value, f"--{key}")
    return Recipe(**{name: make(**values[name]) for name, make in SECTIONS.items()})


def require_budget(recipe: Recipe, where: str) -> None:
    """UsageError for a recipe by which training would never end."""
    if not any(getattr(recipe.train, budget) for budget in BUDGETS):
        raise UsageError(f"no budget: {', '.join(BUDGETS)} are all 0", where=where, hint="give one, for example --time 5m")


def require_origin(recipe: Recipe) -> None:
    """UsageError for a recipe that trains only parts of a model, which is for models that are trained further."""
    for key, option in (("lora_rank", "--lora"), ("frozen_layers", "--freeze")):
        if getattr(recipe.train, key):
            raise UsageError(f"{option} (train.{key}) trains a part of a model that is there already", where="train",
                             hint="--from names that model")


def changed(recipe: Recipe, sets: Iterable[str]) -> Recipe:
    """The recipe with `section.key=value` settings on top; UsageError as in `resolve`."""
    values = {name: dict(vars(getattr(recipe, name))) for name in SECTIONS}
    for setting in sets:
        _set(values, setting)
    return Recipe(**{name: make(**values[name]) for name, make in SECTIONS.items()})


def _set(values: dict[str, dict[str, Any]], setting: str) -> None:
    name, equals, text = setting.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise UsageError(f"{setting!r} is not section.key=value", where="--set",
                         hint="for example --set train.learning_rate=3e-4")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{setting!r} has no readable value", where="--set") from error
    _put(values, section, key, value, "--set")


def from_values(document: dict[str, Any], where: str) -> Recipe:
    """The Recipe inside a stored `recipe.yaml` that has been read to plain values."""
    values = {name: {} for name in SECTIONS}
    for section in SECTIONS:
        for key, value in _keys(section, document.get(section), where).items():
            _put(values, section, key, value, where)
    return Recipe(**{name: make(**values[name]) for name, make in SECTIONS.items()})


def to_yaml(recipe: Recipe, **facts: Any) -> str:
    """A `recipe.yaml`: the four sections in full, then the facts of the run. Reading it back gives the same Recipe."""
    return yaml.safe_dump({**dataclasses.asdict(recipe), **facts}, sort_keys=False, allow_unicode=True, width=120)


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain values. Anchors are refused, since a few lines of them can fill the memory, and so is what is
    nested deeper than MOST_DEPTH, at which PyYAML becomes very slow."""
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                raise UsageError("uses a YAML alias (*name)", where=str(path), hint="write the value out, or use `extends:`")
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > MOST_DEPTH:
                raise UsageError(f"is nested more than {MOST_DEPTH} deep", where=f"{path}, line {token.start_mark.line + 1}")
        document = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date like 2024-99-99
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"is not YAML: {getattr(error, 'problem', error)}", where=f"{path}{line}") from error
    if not isinstance(document, dict):
        raise UsageError("is not a mapping of sections", where=str(path), hint=f"sections: {', '.join(SECTIONS)}")
    return document


def _find(preset: str) -> Path:
    path = Path(preset)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if not path.is_file():
            raise UsageError("no such preset file", where=preset, hint=f"shipped presets: {', '.join(preset_names())}")
        return path
    if preset not in preset_names():
        raise UsageError(f"no preset is named {preset!r}{_nearest(preset, preset_names())}", where="--preset",
                         hint=f"shipped presets: {', '.join(preset_names())}; or give a .yaml file")
    return preset_folder() / f"{preset}.yaml"


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    if path.resolve() in seen:
        raise UsageError("extends itself", where=str(path))
    document = load_yaml(path)
    values = {name: {} for name in SECTIONS}
    if "extends" in document:
        parent = str(document.pop("extends"))
        beside = path.parent / parent
        values = _read(beside if beside.suffix in (".yaml", ".yml") else _find(parent), (*seen, path.resolve()))
    for section, keys in document.items():
        if section in FACTS:  # a stored recipe.yaml is a preset too
            continue
        _check_section(section, str(path))
        for key, value in _keys(section, keys, str(path)).items():
            _put(values, section, key, value, str(path))
    return values


def _check_section(section: str, where: str) -> None:
    if section not in SECTIONS:
        raise UsageError(f"unknown section {section!r}{_nearest(str(section), SECTIONS)}", where=where,
                         hint=f"sections: {', '.join(SECTIONS)}")


def _keys(section: str, keys: Any, where: str) -> dict[str, Any]:
    if keys is None:  # every line of the section is commented out
        return {}
    if not isinstance(keys, dict):
        raise UsageError(f"section {section} is not a mapping of keys", where=where)
    return keys


def _put(values: dict[str, dict[str, Any]], section: str, key: str, value: Any, where: str) -> None:
    _check_section(section, where)
    keys = [f.name for f in dataclasses.fields(SECTIONS[section])]
    if key not in keys:
        raise UsageError(f"unknown key {section}.{key}{_nearest(str(key), keys)}", where=where,
                         hint=f"keys of {section}: {', '.join(keys)}")
    values[section][key] = check(SECTIONS[section], key, value, f"{where}: {section}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
