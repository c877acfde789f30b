"""What differs between a run as it was saved and what it would go on with: settings, data, tokenizer, versions."""

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

# settings that may change under way: neither model nor data nor budget hang on them
CHANGEABLE = ("learning_rate", "matrix_learning_rate", "gradient_clip", "precision", "recompute")
# settings that a state is made of
FIXED = ("objective", "optimizer", "lora_rank", "lora_targets", "frozen_layers")
# parts of the package and libraries that a run's numbers come from
CODE = ("text/*.py", "model/*.py", "model/*.c", "checkpoints/*.py", "training/*.py", "inference/*.py", "first_model.py",
        "runs.py", "training_run.py")
LIBRARIES = ("torch", "tokenizers", "numpy")
VERSIONS = ("lm", "code", *LIBRARIES)


@dataclass(frozen=True)
class Change:
    """One thing that is another one now. `refused`: only if the user allows it; `impossible`: no state fits it."""

    what: str
    old: str
    new: str
    refused: bool = True
    impossible: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.old} → {self.new}"


def settings(saved: dict[str, Any], now: Recipe) -> Iterator[Change]:
    """How a recipe differs from the one that a state was saved with. What texts are drawn with is no part of training."""
    for section, values in plain(now).items():
        for key, new in values.items():
            old = saved.get(section, {}).get(key, new)
            if old != new:
                free = section == "generate" or (section == "train" and key in CHANGEABLE)
                yield Change(f"{section}.{key}", json.dumps(old, ensure_ascii=False), json.dumps(new, ensure_ascii=False),
                             not free, section == "model" or (section == "train" and key in FIXED))


def plain(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def files(saved: dict[str, str], now: dict[str, str]) -> Iterator[Change]:
    """Files whose content is another than that with the SHA-256 saved; those of which none is known are left out."""
    for file, old in saved.items():
        if file in now and now[file] != old:
            yield Change(f"{file} (SHA-256)", old[:12], now[file][:12])


def versions(saved: dict[str, Any]) -> Iterator[Change]:
    """How the programs differ from those that a run was made with, as far as they are known."""
    now = versions_here()
    for name in VERSIONS:
        if name in saved and str(saved[name]) != now[name]:
            yield Change("code of lm (SHA-256)" if name == "code" else name, str(saved[name]), now[name])


def versions_here() -> dict[str, str]:
    """The versions of what calculates, by name, as `recipe.yaml` keeps them."""
    return {"lm": __version__, "code": code(), **{name: importlib.metadata.version(name) for name in LIBRARIES},
            "python": platform.python_version()}


@cache
def code() -> str:
    """The first 12 digits of a SHA-256 over the code that training results depend on; comments and docstrings do not count."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for file in sorted(file for pattern in CODE for file in package.glob(pattern)):
        text = file.read_text(encoding="utf-8")
        meaning = syntax(ast.parse(text)) if file.suffix == ".py" else without_c_comments(text)
        digest.update(f"{file.relative_to(package)}\n{meaning}\n".encode())
    return digest.hexdigest()[:12]


def syntax(node: Any) -> str:
    """A syntax tree as text, without docstrings, positions and empty fields, so that all versions of Python give the same.

    >>> syntax(ast.parse("x = 1  # one")) == syntax(ast.parse("x = (1)"))
    True
    """
    if isinstance(node, list):
        return "[" + " ".join(map(syntax, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, False):
        fields["body"] = node.body[1:]
    return f"({type(node).__name__} " + " ".join(f"{name}={syntax(value)}" for name, value in fields.items()) + ")"


def without_c_comments(text: str) -> str:
    """C source without comments and with one space or line break for each run of them; strings stay as they are."""
    string = r'("(?:\\.|[^"\\])*")'
    text = re.sub(string + r"|/\*.*?\*/|//[^\n]*", lambda found: found[1] or " ", text, flags=re.DOTALL)
    return re.sub(string + r"|\s+", lambda found: found[1] or ("\n" if "\n" in found[0] else " "), text).strip()


def require_allowed(found: list[Change], folder: Path, allow: bool, note: Callable[[str], None]) -> None:
    """Tells `note` each change, old → new. Raises UserError naming them unless there are none but harmless ones or they are
    allowed; what a state cannot be the state of is never allowed."""
    impossible = [change for change in found if change.impossible]
    if impossible:
        raise UserError(f"its state is not one of {'; '.join(map(str, impossible))}", where=str(folder),
                        hint=f"put recipe.yaml right, or start a new run with --from {folder}")
    refused = [change for change in found if change.refused]
    if refused and not allow:
        raise UserError(f"is not as it was when it was saved: {'; '.join(map(str, refused))}", where=str(folder),
                        hint=f"--allow-changes goes on all the same, as another run than was begun; or --from {folder}")
    for change in found:
        note(f"changed: {change}")
