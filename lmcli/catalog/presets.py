"""The presets there are: a line about each, and one of them in full with its comments."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lmcli import recipes
from lmcli.config import SECTIONS, Recipe
from lmcli.model import flops

PRESET_COLUMNS = ("name", "parameters", "budget", "data", "purpose")
# a line of a preset's head comment, as "# Data: plain text"
HEAD_LINE = re.compile(r"(Data|Size): *(.*)")
KEY_LINE = re.compile(r"  (\w+): *(.*?) *(?:(?<= )# *(.*))?")


class PresetFile(NamedTuple):
    """A preset as it is written: its values, and texts of values and comments by section.key."""

    name: str
    document: dict[str, Any]
    head: list[str]
    texts: dict[str, tuple[str, str]]


def preset_rows() -> list[dict[str, str]]:
    """A row of PRESET_COLUMNS for each shipped preset, from its file."""
    return [_row(name) for name in recipes.preset_names()]


def _row(name: str) -> dict[str, str]:
    head = _read(recipes.find_preset(name)).head
    facts = {m[1]: m[2] for line in head if (m := HEAD_LINE.fullmatch(line))}
    recipe = recipes.resolve(name)
    config = dataclasses.replace(
        recipe.model.complete(),
        vocab_size=recipe.tokenizer.vocab_size,
        max_position_embeddings=recipe.train.context,
    )
    return {
        "name": name,
        "parameters": facts.get("Size") or rounded(flops.parameters(config).total),
        "budget": _budget(recipe),
        "data": facts.get("Data", ""),
        "purpose": head[0] if head else "",
    }


def rounded(count: int) -> str:
    """A number of parameters for people: 1.1M, 124M, 7.2B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            digits = 1 if count < 9.95 * unit else 0
            return f"{count / unit:.{digits}f}{name}"
    return str(count)


def _budget(recipe: Recipe) -> str:
    """The budgets of a recipe: 10 min, 3 epochs."""
    train = recipe.train
    texts = [f"{train.time:g} s" if train.time < 120 else f"{train.time / 60:g} min"]
    texts = texts if train.time else []
    texts += [f"{rounded(train.tokens)} tokens"] if train.tokens else []
    texts += [f"{train.steps:,} steps"] if train.steps else []
    texts += [f"{train.epochs:g} epochs"] if train.epochs else []
    return ", ".join(texts)


def _read(path: Path) -> PresetFile:
    """The preset in a file. A comment that is not where ours stand is not found."""
    head: list[str] = []
    texts: dict[str, tuple[str, str]] = {}
    section = ""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#") and number == len(head):
            head.append(line.removeprefix("#").removeprefix(" "))
        elif line[:1].isalpha():
            section = line.partition(":")[0]
        elif match := KEY_LINE.fullmatch(line):
            texts[f"{section}.{match[1]}"] = (match[2], match[3] or "")
    return PresetFile(path.stem, recipes.load_yaml(path), head, texts)


def preset_text(preset: str) -> str:
    """A preset's YAML with its comments, and with the values of the presets that it extends.

    It is a preset too, and extends none. Raises UsageError as `recipes.resolve` does.
    """
    recipes.resolve(preset)  # reports what is wrong
    files = []
    path: Path | None = recipes.find_preset(preset)
    while path:
        files.append(_read(path))
        path = recipes.parent_file(path, files[-1].document)
    lines = [f"# {line}".rstrip() for line in files[0].head]
    if len(files) > 1:
        names = " and ".join(file.name for file in files[1:])
        lines.append(f"# Extends {names}, whose values are marked.")
    for section, config in SECTIONS.items():
        keys = [
            _key_line(files, section, field.name)
            for field in dataclasses.fields(config)
            if any(field.name in (file.document.get(section) or {}) for file in files)
        ]
        lines += [f"{section}:", *keys] if keys else []
    return "\n".join(lines) + "\n"


def _key_line(files: list[PresetFile], section: str, key: str) -> str:
    """The line of a key that the first of these files sets, with its comment and origin."""
    file = next(file for file in files if key in (file.document.get(section) or {}))
    value = file.document[section][key]
    text, comment = file.texts.get(f"{section}.{key}", ("", ""))
    try:
        same = yaml.safe_load(text) == value
    except yaml.YAMLError:
        same = False
    if not same:
        text = yaml.safe_dump(value, default_flow_style=True, width=1 << 16).removesuffix("...\n")
    origin = "" if file is files[0] else file.name
    remark = ": ".join(filter(None, (origin, comment)))
    line = f"  {key}: {text.strip()}"
    if not remark:
        return line
    if len(beside := f"{line:<32}  # {remark}") < 80:
        return beside
    above = textwrap.wrap(remark, 79, initial_indent="  # ", subsequent_indent="  # ")
    return "\n".join([*above, line])
