"""What differs between a saved run and the run that would resume it: settings, data, versions."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lmcli import __version__
from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.storage import cached, read_json

# settings of train that may change on resume: model, data and budget do not depend on them
CHANGEABLE = ("learning_rate", "matrix_learning_rate", "gradient_clip", "precision", "recompute")
# settings of train that decide what a state consists of
FIXED = ("objective", "optimizer", "lora_rank", "lora_targets", "frozen_layers")
# the code that a run's numbers depend on
CODE = (
    "text/*.py",
    "data/*.py",
    "model/*.py",
    "kernels/*.py",
    "kernels/*.c",
    "distributed/*.py",
    "checkpoints/*.py",
    "generation/*.py",
    "scoring/*.py",
    "training/*.py",
    "runs/*.py",
)
LIBRARIES = ("torch", "tokenizers", "numpy")
VERSIONS = ("lm", "code", *LIBRARIES)


@dataclass(frozen=True)
class Change:
    """One difference. `refused`: only with --allow-changes; `impossible`: no state fits it."""

    what: str
    old: str
    new: str
    refused: bool = True
    impossible: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.old} → {self.new}"


def settings(saved: dict[str, Any], now: Recipe) -> Iterator[Change]:
    """Differences from the recipe in a state; sampling settings are no part of training."""
    for section, values in plain(now).items():
        for key, new in values.items():
            old = saved.get(section, {}).get(key, new)
            if old == new:
                continue
            free = section == "generate" or (section == "train" and key in CHANGEABLE)
            impossible = section == "model" or (section == "train" and key in FIXED)
            before, after = (json.dumps(value, ensure_ascii=False) for value in (old, new))
            yield Change(f"{section}.{key}", before, after, not free, impossible)


def plain(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe as JSON returns it."""
    return json.loads(json.dumps(asdict(recipe)))


def files(saved: dict[str, str], now: dict[str, str]) -> Iterator[Change]:
    """Files whose SHA-256 differs; files that are in one of the two only are left out."""
    for file, old in saved.items():
        if file in now and now[file] != old:
            yield Change(f"{file} (SHA-256)", old[:12], now[file][:12])


def versions(saved: dict[str, Any]) -> Iterator[Change]:
    """Programs whose version differs, as far as it was recorded."""
    now = versions_here()
    for name in VERSIONS:
        if name in saved and str(saved[name]) != now[name]:
            what = "code of lm (SHA-256)" if name == "code" else name
            yield Change(what, str(saved[name]), now[name])


def versions_here() -> dict[str, str]:
    """The versions of lm and its libraries by name, as `recipe.yaml` stores them."""
    return {
        "lm": __version__,
        "code": code(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }


@cache
def code() -> str:
    """12 digits of a SHA-256 over the code of CODE; comments and docstrings do not count.

    Parsing takes a second: the cache has the digest of the same files, if lm has seen them before.
    """
    package = Path(__file__).resolve().parent.parent
    files = sorted(file for pattern in CODE for file in package.glob(pattern))
    texts = {str(file.relative_to(package)): file.read_text(encoding="utf-8") for file in files}
    key = hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def write(folder: Path) -> None:
        digest = hashlib.sha256()
        for name, text in texts.items():
            python = name.endswith(".py")
            meaning = syntax(ast.parse(text)) if python else without_c_comments(text)
            digest.update(f"{name}\n{meaning}\n".encode())
        (folder / "facts.json").write_text(json.dumps({"code": digest.hexdigest()[:12]}))

    return read_json(cached("code", key, write) / "facts.json")["code"]


def syntax(node: Any) -> str:
    """A syntax tree as text without docstrings and positions, the same in all versions of Python.

    >>> syntax(ast.parse("x = 1  # one")) == syntax(ast.parse("x = (1)"))
    True
    """
    if isinstance(node, list):
        return "[" + " ".join(map(syntax, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {
        name: value for name, value in ast.iter_fields(node) if value is not None and value != []
    }
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and ast.get_docstring(node, False):
        fields["body"] = node.body[1:]
    values = " ".join(f"{name}={syntax(value)}" for name, value in fields.items())
    return f"({type(node).__name__} {values})"


def without_c_comments(text: str) -> str:
    """C source without comments, each run of spaces as one space or line break; strings stay."""
    string = r'("(?:\\.|[^"\\])*")'
    text = re.sub(
        string + r"|/\*.*?\*/|//[^\n]*", lambda match: match[1] or " ", text, flags=re.DOTALL
    )
    return re.sub(
        string + r"|\s+", lambda match: match[1] or ("\n" if "\n" in match[0] else " "), text
    ).strip()


def require_allowed(
    differences: list[Change], folder: Path, allow: bool, note: Callable[[str], None]
) -> None:
    """Passes each change on to `note`, or raises UserError naming those that are not allowed."""
    impossible = [change for change in differences if change.impossible]
    if impossible:
        raise UserError(
            f"this state was saved with other settings: {'; '.join(map(str, impossible))}",
            where=str(folder),
            hint=f"correct recipe.yaml, or start a new run with --from {folder}",
        )
    refused = [change for change in differences if change.refused]
    if refused and not allow:
        raise UserError(
            f"has changed since it was saved: {'; '.join(map(str, refused))}",
            where=str(folder),
            hint=f"--allow-changes resumes anyway, as a different run; or use --from {folder}",
        )
    for change in differences:
        note(f"changed: {change}")
