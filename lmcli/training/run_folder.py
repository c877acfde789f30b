"""A run's folder: claimed before work starts, its metrics without gaps or doubles, its recipe."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmcli import recipes
from lmcli.config import Recipe
from lmcli.errors import UsageError, UserError
from lmcli.storage import LEFTOVER, clear_leftovers, user_errors, write_text
from lmcli.training import lock
from lmcli.training.lock import Lock

# everything a run writes at its top; --overwrite removes these and nothing else
OWN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "recipe.yaml", "README.md", "metrics.jsonl", "loss.svg", "adapter_config.json", "adapter_model.safetensors")


class RunFolder:
    """The folder of one run. `created` are the folders that this process made for it, and may remove while empty; `held`
    is its lock on it."""

    def __init__(self, path: Path, created: Sequence[Path] = (), held: Lock | None = None):
        self.path, self.created, self.held = path, created, held
        self._begun = False
        self._metrics = None

    def begin(self) -> None:
        """Makes room for the new run: one that is to be overwritten goes only now, when its successor is ready."""
        self._begun = True
        _remove_run(self.path)

    @property
    def states(self) -> Path:
        """Where resumable states lie."""
        return self.path / "state"

    def write_recipe(self, recipe: Recipe, **facts) -> None:
        """Writes `recipe.yaml`: the resolved recipe and the facts of the run."""
        write_text(self.path / "recipe.yaml", recipes.to_yaml(recipe, **facts))

    def open_metrics(self, step: int, size: int | None = None) -> bool:
        """Opens `metrics.jsonl` for appending. What an interrupted run logged after the state of `step`, at which the file
        had `size` bytes (None: unknown), is cut off. Returns whether it still had so many."""
        path = self.path / "metrics.jsonl"
        with user_errors(path, "read"):
            found = path.read_bytes() if path.exists() else b""
        whole = size is not None and len(found) >= size and found[:size].endswith((b"\n", b"")[size == 0])
        kept = found[:size] if whole else b"".join(
            line for line, row in _whole_lines(found) if row["step"] <= step)
        if kept != found or not path.exists():
            write_text(path, kept.decode("utf-8"))
        with user_errors(path, "write"):
            self._metrics = path.open("a", encoding="utf-8")
        return whole or size is None

    def log(self, event: dict) -> None:
        """Appends one object to `metrics.jsonl`."""
        with user_errors(self.path / "metrics.jsonl", "write"):
            self._metrics.write(json.dumps(event) + "\n")
            self._metrics.flush()

    def flush_metrics(self) -> int:
        """Has what was logged reach the disk; returns how many bytes `metrics.jsonl` has."""
        with user_errors(self.path / "metrics.jsonl", "write"):
            os.fsync(self._metrics.fileno())
            return os.fstat(self._metrics.fileno()).st_size

    def metrics(self) -> list[dict]:
        """All logged objects."""
        return [row for _, row in _whole_lines((self.path / "metrics.jsonl").read_bytes())]

    def release(self) -> None:
        """Lets other processes have the folder; nothing the second time."""
        if self._metrics:
            self._metrics.close()
        if self.held:
            self.held.release()

    def abandon(self) -> None:
        """Takes back whatever was written, when the run failed before its first step, and lets go of the folder."""
        if self._begun:
            _remove_run(self.path)
        self.release()
        for folder in self.created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _remove_run(path: Path) -> None:
    for file in OWN_FILES:
        (path / file).unlink(missing_ok=True)
    clear_leftovers(path)
    shutil.rmtree(path / "state", ignore_errors=True)


def _whole_lines(content: bytes) -> list[tuple[bytes, dict]]:
    """Lines with the objects in them, up to the first that is none: a machine that lost its power leaves half a line, or
    zeros."""
    found = []
    for line in content.splitlines(keepends=True):
        try:
            found.append((line, json.loads(line)))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            found.pop()
    return found


def claim(output: str | None, name: str, overwrite: bool) -> RunFolder:
    """The folder for a new run: `output`, else runs/NAME with the next free number; nobody else gets it until it is
    released. A run in it is not touched yet.

    Raises UsageError when it holds something already; UserError when another process works there or it cannot be written.
    """
    path = Path(output) if output else _free(Path("runs") / name)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise UsageError("is a file", where=str(path), hint="-o takes a folder")
    _require_free(path, overwrite)
    with user_errors(path, "write"):
        try:
            path.mkdir(parents=True, exist_ok=output is not None)
        except FileExistsError:  # another process has just taken this name
            return claim(output, name, overwrite)
        held = Lock(path)
    if (path / "recipe.yaml").is_file() and not overwrite:  # of a process that had it a moment ago
        held.release()
        _require_free(path, overwrite)
    if not (path / "recipe.yaml").is_file():
        _remove_run(path)  # half made, if there is anything
    return RunFolder(path, created, held)


def _require_free(path: Path, overwrite: bool) -> None:
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if "recipe.yaml" in names and not overwrite:
        raise UsageError("holds a run already", where=str(path),
                         hint=f"lm train --resume {path} goes on with it; --overwrite starts anew")
    if names and "recipe.yaml" not in names and not _half_made(names):
        raise UsageError("is not empty and holds no run", where=str(path), hint="choose another folder with -o")


def _half_made(names: set[str]) -> bool:
    """Whether these are the files of a run that was killed before all it needs was there: nothing is lost with them."""
    return lock.NAME in names and all(name in (lock.NAME, "state", *OWN_FILES) or LEFTOVER.fullmatch(name) for name in names)


def _free(path: Path) -> Path:
    if not path.exists():
        return path
    return next(found for number in range(2, 1 << 20) if not (found := path.with_name(f"{path.name}-{number}")).exists())


def take(path: Path) -> tuple[RunFolder, Recipe, dict]:
    """As `reopen`, to go on with the run: nobody else gets the folder until it is released, and what processes that were
    killed left half written is cleared away. Raises UserError when another process works there, too."""
    reopen(path)
    held = Lock(path)
    try:
        for folder in (path, path / "state"):
            with user_errors(folder, "clear"):
                clear_leftovers(folder)
        _, recipe, facts = reopen(path)
    except BaseException:
        held.release()
        raise
    return RunFolder(path, held=held), recipe, facts


def reopen(path: Path) -> tuple[RunFolder, Recipe, dict]:
    """A run's folder, its recipe, and the facts stored with it. Raises UserError for a folder that holds no run."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UserError("holds no run (no recipe.yaml)", where=str(path), hint="--resume takes a folder that lm train made")
    document = recipes.load_yaml(file)
    return RunFolder(path), recipes.from_values(document, str(file)), document
