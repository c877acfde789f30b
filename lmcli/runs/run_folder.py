"""A run's folder: its lock, its recipe, and metrics without gaps or duplicates."""

import json
import math
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lmcli import recipes, storage
from lmcli.checkpoints import hub
from lmcli.config import Recipe
from lmcli.errors import UsageError, UserError
from lmcli.storage import LEFTOVER, clear_leftovers, user_errors, write_text
from lmcli.terminal.notebook import NotebookTable, Table, html_picture

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from lmcli.api import Model

REPORTS = "reports.json"  # the run's id in each service of --report-to
# everything that a run writes at its top; --overwrite removes these and nothing else
OWN_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "recipe.yaml",
    "README.md",
    "metrics.jsonl",
    "loss.svg",
    "adapter_config.json",
    "adapter_model.safetensors",
    REPORTS,
)
OWN_FOLDERS = ("state",)
REPORT_FOLDERS = ("tensorboard", "wandb")  # of --report-to
LOCK_NAME = ".lock"


class Lock:
    """The lock of a folder, held until `release` or the end of the process, however that comes.

    It is the system's lock on an open file: a dead process holds none, and the file it leaves
    behind has no meaning. `problem` says so if the system or the disk has no locks; nothing is
    locked then.
    """

    def __init__(self, folder: Path):
        """Raises UserError naming the process that holds it, or if the folder is not writable."""
        self.path, self.problem = folder / LOCK_NAME, ""
        self._held: BaseFileLock | None = None
        holder = f"process {os.getpid()} on {socket.gethostname()}\n"
        with user_errors(self.path, "write"):
            try:
                self._held = storage.lock(self.path, holder=holder)
            except storage.NoLocks:
                self.path.unlink(missing_ok=True)
                self.problem = (
                    f"{folder}: this disk has no file locks: "
                    "make sure that no other process trains in this folder"
                )
            except BlockingIOError as error:
                raise UserError(
                    f"{self._holder() or 'another process'} is training in this folder: "
                    "wait for it, or end it first",
                    where=str(folder),
                ) from error

    def _holder(self) -> str:
        try:
            text = self.path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # Windows does not let others read it
            return ""
        return text if text.startswith("process ") else ""

    def release(self) -> None:
        """Releases the lock and removes its file; does nothing the second time."""
        if self._held:
            storage.unlock(self._held)
            self._held = None


class RunFolder:
    """The folder of one run, with the `lock` that this process holds on it, if any.

    `created` are the folders that this process made for it, and may remove while empty.
    """

    def __init__(self, path: Path, created: Sequence[Path] = (), lock: Lock | None = None):
        self.path, self._created, self._lock = path, created, lock
        self._begun = False
        self._metrics: TextIO | None = None

    @property
    def lock_problem(self) -> str:
        """Why the folder could not be locked; "" if it is."""
        return self._lock.problem if self._lock else ""

    @property
    def states(self) -> Path:
        """The folder of resumable states."""
        return self.path / "state"

    def begin(self) -> None:
        """Removes the run that is overwritten, now that the new one is ready."""
        self._begun = True
        _remove_run(self.path)

    def write_recipe(self, recipe: Recipe, **facts: Any) -> None:
        """Writes `recipe.yaml`: the resolved recipe and the facts of the run."""
        write_text(self.path / "recipe.yaml", recipes.to_yaml(recipe, **facts))

    def open_metrics(self, step: int, size: int | None = None) -> bool:
        """Opens `metrics.jsonl` for appending; cuts off what was logged after the state of `step`.

        The file had `size` bytes then (None: unknown). Returns False if it no longer has them.
        """
        path = self.path / "metrics.jsonl"
        with user_errors(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        intact = size is not None and len(content) >= size
        intact = intact and (not size or content[:size].endswith(b"\n"))
        if intact:
            earlier = content[:size]
        else:
            earlier = b"".join(line for line, row in _whole_lines(content) if row["step"] <= step)
        if earlier != content or not path.exists() or path.is_symlink():
            write_text(path, earlier.decode("utf-8"))  # nothing is written through a link
        with user_errors(path, "write"):
            self._metrics = path.open("a", encoding="utf-8")
        return intact or size is None

    def log(self, event: dict[str, Any]) -> None:
        """Appends one object to `metrics.jsonl`, which is open; what is undefined becomes null."""
        assert self._metrics is not None
        with user_errors(self.path / "metrics.jsonl", "write"):
            numbers = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in event.items()
            }
            self._metrics.write(json.dumps(numbers, allow_nan=False) + "\n")
            self._metrics.flush()

    def flush_metrics(self) -> int:
        """Forces `metrics.jsonl` to the disk; returns its size in bytes."""
        assert self._metrics is not None
        with user_errors(self.path / "metrics.jsonl", "write"):
            os.fsync(self._metrics.fileno())
            return os.fstat(self._metrics.fileno()).st_size

    def metrics(self) -> list[dict[str, Any]]:
        """All logged objects."""
        return [row for _, row in _whole_lines((self.path / "metrics.jsonl").read_bytes())]

    def release(self) -> None:
        """Unlocks the folder for other processes; does nothing the second time."""
        if self._metrics:
            self._metrics.close()
        if self._lock:
            self._lock.release()

    def abandon(self) -> None:
        """Removes what was written by a run that failed before its first step, and unlocks."""
        if self._begun:
            _remove_run(self.path)
        self.release()
        for folder in self._created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _remove_run(path: Path) -> None:
    reported = (path / REPORTS).is_file()  # else these folders are somebody else's
    for file in OWN_FILES:
        (path / file).unlink(missing_ok=True)
    clear_leftovers(path)
    for name in OWN_FOLDERS + (REPORT_FOLDERS if reported else ()):
        if (path / name).is_symlink():
            (path / name).unlink()
        shutil.rmtree(path / name, ignore_errors=True)


def _whole_lines(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines with their objects up to a bad line: a power loss leaves half a line, or zeros."""
    lines: list[tuple[bytes, dict[str, Any]]] = []
    for line in content.splitlines(keepends=True):
        try:
            lines.append((line, json.loads(line)))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
    return lines


def claim(output: str | None, name: str, overwrite: bool) -> RunFolder:
    """The folder for a new run, locked: `output`, else runs/NAME with the next free number.

    A run in it is not touched yet. Raises UsageError if the folder holds something already;
    UserError if another process trains there or it is not writable.
    """
    path = Path(output) if output else _free(Path("runs") / name)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise UsageError("is a file", where=str(path), hint="-o takes a folder")
    _require_free(path, overwrite)
    with user_errors(path, "make this folder", "choose another folder with -o"):
        try:
            path.mkdir(parents=True, exist_ok=output is not None)
        except FileExistsError:  # another process has just taken this name
            return claim(output, name, overwrite)
        lock = Lock(path)
    # another process may have made a run here before we got the lock
    if (path / "recipe.yaml").is_file() and not overwrite:
        lock.release()
        _require_free(path, overwrite)
    if not (path / "recipe.yaml").is_file():
        _remove_run(path)  # an unfinished start, if anything
    return RunFolder(path, created, lock)


def _require_free(path: Path, overwrite: bool) -> None:
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if "recipe.yaml" in names and not overwrite:
        raise UsageError(
            "holds a run already",
            where=str(path),
            hint=f"lm train --resume {path} goes on with it; --overwrite starts anew",
        )
    if names and "recipe.yaml" not in names and not _is_unfinished_start(names):
        raise UsageError(
            "is not empty and holds no run", where=str(path), hint="choose another folder with -o"
        )


def _is_unfinished_start(names: set[str]) -> bool:
    """True if these files are of a run that was killed before it could be resumed: no loss."""
    return LOCK_NAME in names and all(
        name in (LOCK_NAME, "state", *OWN_FILES) or LEFTOVER.fullmatch(name) for name in names
    )


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1 << 20))
    return path if not path.exists() else next(each for each in numbered if not each.exists())


def take(path: Path) -> tuple[RunFolder, Recipe, dict[str, Any]]:
    """As `reopen`, and locks the folder and removes the leftovers of killed processes.

    Raises UserError also if another process trains there.
    """
    reopen(path)
    lock = Lock(path)
    try:
        for folder in (path, path / "state"):
            with user_errors(folder, "clear"):
                clear_leftovers(folder)
        _, recipe, facts = reopen(path)
    except BaseException:
        lock.release()
        raise
    return RunFolder(path, lock=lock), recipe, facts


class Run(NotebookTable):
    """The folder `path` of a run, finished or not, to look at from Python.

    `facts` are those of its recipe.yaml, `result` the newest figures. Raises UserError for a folder
    without a run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._folder, self.recipe, self.facts = reopen(self.path)
        self.result: dict[str, Any] = self.facts.get("result") or {}

    @property
    def metrics(self) -> Table[dict[str, Any]]:
        """What was logged so far: a dict for each step and evaluation."""
        with user_errors(self.path / "metrics.jsonl", "read"):
            return Table(self._folder.metrics())

    def model(self, **options: Any) -> "Model":
        """The model; `options` as for `lmcli.load`."""
        from lmcli import api

        return api.load(self.path, **options)

    def rows(self) -> list[dict[str, Any]]:
        """The newest figures, in one row."""
        return [{"run": str(self.path), **self.result}]

    def __repr__(self) -> str:
        bits, loss = (self.result.get(f"val_{name}") for name in ("bits_per_byte", "loss"))
        figure = f"{bits:.4f} bits/byte" if bits else f"loss {loss:.4f}" if loss else "no figures"
        return f"<lmcli.Run {self.path}: {self.result.get('steps', 0):,} steps, {figure}>"

    def _repr_html_(self) -> str:
        curve = self.path / "loss.svg"
        return (html_picture(curve.read_bytes()) if curve.is_file() else "") + super()._repr_html_()


def reopen(path: Path) -> tuple[RunFolder, Recipe, dict[str, Any]]:
    """A run's folder, its recipe, and the facts in it. Raises UserError if it holds no run."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UserError(
            "holds no run (no recipe.yaml)",
            where=str(path),
            hint=hub.nearby(path, ("recipe.yaml",), "runs")
            + "a run is a folder that lm train made",
        )
    document = recipes.load_yaml(file)
    return RunFolder(path), recipes.from_values(document, str(file)), document
