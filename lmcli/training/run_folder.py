"""A run's folder: claimed before work starts, its metrics without gaps or doubles, its recipe."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmcli import recipes
from lmcli.config import Recipe
from lmcli.errors import UsageError, UserError
from lmcli.storage import user_errors, write_text

# everything a run writes at its top; --overwrite removes these and nothing else
OWN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "recipe.yaml", "README.md", "metrics.jsonl", "loss.svg", "adapter_config.json", "adapter_model.safetensors")


class RunFolder:
    """The folder of one run. `created` are the folders that this process made for it, and may remove while empty."""

    def __init__(self, path: Path, created: Sequence[Path] = ()):
        self.path, self.created = path, created
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

    def open_metrics(self, step: int) -> None:
        """Opens `metrics.jsonl` for appending; what an interrupted run logged after `step` is cut off."""
        path = self.path / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        with user_errors(path, "write"):
            self._metrics = path.open("a", encoding="utf-8")

    def log(self, event: dict) -> None:
        """Appends one object to `metrics.jsonl`."""
        with user_errors(self.path / "metrics.jsonl", "write"):
            self._metrics.write(json.dumps(event) + "\n")
            self._metrics.flush()

    def metrics(self) -> list[dict]:
        """All logged objects."""
        return [json.loads(line) for line in _whole_lines(self.path / "metrics.jsonl")]

    def abandon(self) -> None:
        """Takes back whatever was written, when the run failed before its first step."""
        if self._begun:
            _remove_run(self.path)
        for folder in self.created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _remove_run(path: Path) -> None:
    for file in OWN_FILES:
        (path / file).unlink(missing_ok=True)
    shutil.rmtree(path / "state", ignore_errors=True)


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def claim(output: str | None, name: str, overwrite: bool) -> RunFolder:
    """The folder for a new run: `output`, else runs/NAME with the next free number. Nothing in it is touched yet.

    Raises UsageError when it holds something already; UserError when it cannot be written.
    """
    path = Path(output) if output else _free(Path("runs") / name)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise UsageError("is a file", where=str(path), hint="-o takes a folder")
    if not created and any(path.iterdir()):
        if not (path / "recipe.yaml").is_file():
            raise UsageError("is not empty and holds no run", where=str(path), hint="choose another folder with -o")
        if not overwrite:
            raise UsageError("holds a run already", where=str(path),
                             hint=f"lm train --resume {path} goes on with it; --overwrite starts anew")
    with user_errors(path, "write"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe.part"
        probe.write_text("")
        probe.unlink()
    return RunFolder(path, created)


def _free(path: Path) -> Path:
    if not path.exists():
        return path
    return next(found for number in range(2, 1 << 20) if not (found := path.with_name(f"{path.name}-{number}")).exists())


def reopen(path: Path) -> tuple[RunFolder, Recipe, dict]:
    """A run's folder, its recipe, and the facts stored with it. Raises UserError for a folder that holds no run."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UserError("holds no run (no recipe.yaml)", where=str(path), hint="--resume takes a folder that lm train made")
    document = recipes.load_yaml(file)
    return RunFolder(path), recipes.from_values(document, str(file)), document
