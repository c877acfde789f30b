"""Presets and recipes: YAML ↔ Recipe, with `extends` and `--set`; errors name the nearest key."""

import dataclasses
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lmcli.config import SECTIONS, Recipe, check
from lmcli.errors import UsageError, UserError, did_you_mean, nearest
from lmcli.storage import near_names

Values = dict[str, dict[str, Any]]  # section → key → value
Given = dict[str, tuple[Any, str]]  # section.key → its value, and the option that gives it

BUDGETS = ("time", "tokens", "steps", "epochs")
# further sections of a stored recipe.yaml, for `lm info` and `--validation`; training ignores them
FACTS = ("versions", "data", "validation", "result", "choice", "base", "stages")
KEYS_HELP = "lm help keys lists them all"
MOST_DEPTH = 50
MAX_BYTES = 1 << 26  # of a file; a recipe.yaml names the held-out ranges of its files


# keys of `train` whose option has another name
OPTIONS = {"lora_rank": "--lora", "frozen_layers": "--freeze", "precision": "--dtype"}


def preset_folder() -> Path:
    """The folder of shipped presets: in the installed package, else next to it in a checkout."""
    package = Path(__file__).parent
    return package / "presets" if (package / "presets").is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def resolve(
    preset: str,
    sets: Iterable[str] = (),
    train: Mapping[str, Any] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """The recipe of a preset (a name or a file) with changes on top.

    Applied in this order: `defaults` (section.key → value), `sets` ("section.key=value"), `train`
    (key → value; None: not set). A budget (time, tokens, steps, epochs) set here replaces all
    budgets of the preset. Raises UsageError for an unknown preset, key or value; it names the
    file, the key and the nearest valid one. Raises it too for a key that `sets` and `train` give
    two values.
    """
    settings = [*(f"{key}={value}" for key, value in defaults.items()), *sets]
    options = {key: value for key, value in train.items() if value is not None}
    values = _read(find_preset(preset), ancestors=())
    changed_keys = {setting.partition("=")[0].strip() for setting in settings}
    changed_keys |= {f"train.{key}" for key in options}
    if changed_keys & {f"train.{budget}" for budget in BUDGETS}:
        values["train"].update(dict.fromkeys(BUDGETS, 0))
    for key, value in defaults.items():
        _set(values, f"{key}={value}")
    seen = _set_once(values, sets)
    for key, value in options.items():
        option = OPTIONS.get(key, f"--{key}")
        _put(values, "train", key, value, option)
        _refuse_second(seen, f"train.{key}", values["train"][key], f"{option} {value}")
    return _recipe(values)


def _set_once(values: Values, sets: Iterable[str]) -> Given:
    """Applies "section.key=value" settings; returns them by key. UsageError for two of one key."""
    seen: Given = {}
    for setting in sets:
        section, key = _set(values, setting)
        _refuse_second(seen, f"{section}.{key}", values[section][key], f"--set {setting}")
    return seen


def _refuse_second(seen: Given, key: str, value: Any, source: str) -> None:
    first, first_source = seen.setdefault(key, (value, source))
    if value != first:
        raise UsageError(
            f"{key} is given two values: {first_source} and {source}", hint="give one of them"
        )


def _recipe(values: Values) -> Recipe:
    return Recipe(**{name: config(**values[name]) for name, config in SECTIONS.items()})


def require_budget(recipe: Recipe, where: str) -> None:
    """Raises UsageError for a recipe whose training would never end."""
    if not any(getattr(recipe.train, budget) for budget in BUDGETS):
        raise UsageError(
            f"no budget: {', '.join(BUDGETS)} are all 0",
            where=where,
            hint="give one, for example --time 5m",
        )


def with_budget(recipe: Recipe, budget: Mapping[str, Any]) -> Recipe:
    """The recipe with `budget` (time, tokens, steps, epochs) in place of all that it has."""
    budgets = {**dict.fromkeys(BUDGETS, 0), "time": 0.0, "epochs": 0.0, **budget}
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **budgets))


def refuse_partial_training(recipe: Recipe) -> None:
    """Raises UsageError for a recipe that trains only some weights: that needs --from."""
    for key in ("lora_rank", "frozen_layers"):
        if getattr(recipe.train, key):
            raise UsageError(
                f"{OPTIONS[key]} (train.{key}) needs a model to fine-tune",
                where="train",
                hint="name that model with --from",
            )


def with_settings(recipe: Recipe, sets: Iterable[str]) -> Recipe:
    """The recipe with "section.key=value" settings on top; UsageError as in `resolve`."""
    values = {name: dict(vars(getattr(recipe, name))) for name in SECTIONS}
    _set_once(values, sets)
    return _recipe(values)


def _set(values: Values, setting: str) -> tuple[str, str]:
    """Applies one "section.key=value"; returns its section and key."""
    name, equals, text = setting.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        near = next(iter(_nearest_keys(section)), "train.learning_rate")
        raise UsageError(
            f"{setting!r} is not section.key=value",
            where="--set",
            hint=f"write it as in --set {near}={text or '3e-4'}; {KEYS_HELP}",
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{setting!r} has no readable value", where="--set") from error
    _put(values, section, key, value, "--set")
    return section, key


def from_values(document: dict[str, Any], where: str) -> Recipe:
    """The Recipe in the plain values of a stored `recipe.yaml`."""
    values: Values = {name: {} for name in SECTIONS}
    for section in SECTIONS:
        for key, value in _keys(section, document.get(section), where).items():
            _put(values, section, key, value, where)
    return _recipe(values)


def to_yaml(recipe: Recipe, **facts: Any) -> str:
    """A `recipe.yaml`: the four sections in full, then the facts of the run."""
    document = {**dataclasses.asdict(recipe), **facts}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


class _PlainValues(yaml.SafeLoader):
    """Refuses aliases, deep nesting, and a key twice, of which PyYAML takes the last value."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise UsageError(
                "uses a YAML alias (*name)",
                where=self.name,
                hint="write the value out, or use `extends:`",
            )
        if self.depth >= MOST_DEPTH and self.check_event(yaml.CollectionStartEvent):
            raise UsageError(
                f"is nested more than {MOST_DEPTH} deep",
                where=f"{self.name}, line {self.peek_event().start_mark.line + 1}",
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:  # a list is refused below
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                )
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain values.

    Refuses aliases, since a few lines of them can fill the memory, and nesting deeper than
    MOST_DEPTH, which makes PyYAML very slow.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"has more than {MAX_BYTES / 1e6:.0f} MB", where=str(path))
        # PyYAML knows UTF-16 by its byte order mark too
        text = data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
        loader = _PlainValues(text)
        loader.name = str(path)
        document = loader.get_single_data()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=str(path)) from error
    # a ValueError is text that is not UTF-8, or a date like 2024-99-99
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise UsageError(f"is not YAML: {problem}", where=f"{path}{line}") from error
    if not isinstance(document, dict):
        raise UsageError("is not a mapping of sections", where=str(path), hint=_sections_hint())
    return document


def _sections_hint() -> str:
    return f"choose from the sections {', '.join(SECTIONS)}"


def parent_file(path: Path, document: Mapping[str, Any]) -> Path | None:
    """The preset file that this one extends; None if there is none."""
    if "extends" not in document:
        return None
    file = path.parent / str(document["extends"])
    return file if file.suffix in (".yaml", ".yml") else find_preset(str(document["extends"]))


def find_preset(preset: str) -> Path:
    """The file of a preset's name or file; UsageError with the nearest name if there is none."""
    path = Path(preset)
    shipped = f"choose a shipped preset ({', '.join(preset_names())})"
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if path.is_dir() or not path.exists():
            raise UsageError(f"no such preset file{near_names(path)}", where=preset, hint=shipped)
        return path
    if preset not in preset_names():
        raise UsageError(
            f"no preset is named {preset!r}{did_you_mean(preset, preset_names())}",
            where="--preset",
            hint=f"{shipped}, or give a .yaml file",
        )
    return preset_folder() / f"{preset}.yaml"


def _read(path: Path, ancestors: tuple[Path, ...]) -> Values:
    """The values of a preset file on top of those it extends; `ancestors` extend this one."""
    if path.resolve() in ancestors:
        raise UsageError("extends itself", where=str(path))
    document = load_yaml(path)
    values: Values = {name: {} for name in SECTIONS}
    if file := parent_file(path, document):
        values = _read(file, (*ancestors, path.resolve()))
    for section, keys in document.items():
        if section in (*FACTS, "extends"):  # a stored recipe.yaml is a preset too
            continue
        _check_section(section, str(path))
        for key, value in _keys(section, keys, str(path)).items():
            _put(values, section, key, value, str(path))
    return values


def _check_section(section: str, where: str) -> None:
    if section not in SECTIONS:
        near = did_you_mean(str(section), SECTIONS)
        raise UsageError(f"unknown section {section!r}{near}", where=where, hint=_sections_hint())


def _keys(section: str, keys: Any, where: str) -> dict[str, Any]:
    if keys is None:  # every line of the section is commented out
        return {}
    if not isinstance(keys, dict):
        raise UsageError(f"section {section} is not a mapping of keys", where=where)
    return keys


def _put(values: Values, section: str, key: str, value: Any, where: str) -> None:
    _check_section(section, where)
    keys = [f.name for f in dataclasses.fields(SECTIONS[section])]
    if key not in keys:
        first, *others = _nearest_keys(str(key), section) or [""]
        near = f"; did you mean {first.removeprefix(f'{section}.')!r}?" if first else ""
        also = f"also near: {', '.join(others)}; " if others else ""
        raise UsageError(f"unknown key {section}.{key}{near}", where, also + KEYS_HELP)
    values[section][key] = check(SECTIONS[section], key, value, f"{where}: {section}")


def _nearest_keys(key: str, section: str = "") -> list[str]:
    """SECTION.KEY of the keys that are most like this one, those of the section first."""
    keys = {name: [each.name for each in dataclasses.fields(SECTIONS[name])] for name in SECTIONS}
    same = [f"{name}.{key}" for name in SECTIONS if key in keys[name]]
    own = [f"{section}.{near}" for near in nearest(key, keys.get(section, ()), 3)]
    others = [f"{name}.{near}" for name in SECTIONS for near in nearest(key, keys[name], 1, 0.7)]
    return list(dict.fromkeys([*same, *own, *others]))[:3]
