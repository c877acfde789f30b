"""What resuming needs: weights, optimizer, counters and random states, written whole and with checksums, the newest two
kept."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lmcli.errors import UserError
from lmcli.model.device import random_states, set_random_states
from lmcli.storage import (
    atomic_folder,
    read_json,
    read_tensors,
    require_room,
    sha256_of,
    size_of,
    user_errors,
    write_tensors,
)
from lmcli.training.optimizers import Optimizers

KEPT = 2
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes and reads it
BEST = "best.safetensors"


@dataclass
class Counters:
    """Where a run stands. `rows` is the position in the data; `seconds` is time spent, all sittings together,
    `preparation` the part of it before the first steps. `best` is the best validation figure so far (what its criterion is),
    reached at `best_step`. `looked` is the share of the budget at which it was last looked whether an evaluation is due.
    `stale` counts the evaluations since the best one. `first_loss` is the loss before the first update, `losses` are the
    last ones; `evaluation_seconds` is what an evaluation took. Where memory ran out, `micro_batch_tokens` (else 0) and
    `recompute` are what fitted.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    preparation: float = 0.0
    best: float = float("inf")
    best_step: int = 0
    looked: float = 0.0
    stale: int = 0
    first_loss: float = 0.0
    losses: list[float] = field(default_factory=list)
    evaluation_seconds: float = 0.0
    micro_batch_tokens: int = 0
    recompute: bool = False


@dataclass
class Beside:
    """What of a run's folder belongs to a state: the `result` so far and its `headline`, the bytes that metrics.jsonl has
    (None: unknown), the recipe, and the SHA-256 of the best model's weights. `best_file` holds these, to be copied into the
    state; None where they are the state's own, or there are none yet."""

    result: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    metrics_bytes: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    best_sha256: str = ""
    best_file: Path | None = None


def save(folder: Path, counters: Counters, model: torch.nn.Module, optimizer: Optimizers,
         beside: Beside | None = None) -> None:
    """Writes `folder/step-N` and drops all but the newest two. Raises UserError when the disk has no room for all of it or
    refuses; the older states are then untouched."""
    beside = beside or Beside()
    moments, steps = _optimizer_tensors(model, optimizer)
    tensors = {"weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
               "optimizer": moments, "random": random_states(next(model.parameters()).device)}
    facts = {**asdict(counters), **asdict(replace(beside, best_file=None)), "optimizer_steps": steps}
    with user_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        best_bytes = beside.best_file.stat().st_size if beside.best_file else 0
    require_room(folder, sum(map(size_of, tensors.values())) + best_bytes)
    with atomic_folder(folder / f"step-{counters.step:09d}") as part:
        for name, found in tensors.items():
            write_tensors(part / f"{name}.safetensors", {key: value.cpu() for key, value in found.items()})
        if beside.best_file:
            shutil.copyfile(beside.best_file, part / BEST)
        (part / "counters.json").write_text(json.dumps(facts))
        sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(part.iterdir()))
        (part / CHECKSUMS).write_text(sums)
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def forget(folder: Path, step: int) -> int | None:
    """Drops the states of `step` and later ones, which are broken, if there is an older one; returns the step of the
    newest state that is left and is not broken."""
    states = {int(path.name.removeprefix("step-")): path for path in _states(folder)}
    sound = [number for number in states if number < step]
    if not sound:
        return None
    for number in states.keys() - set(sound):
        shutil.rmtree(states[number], ignore_errors=True)
    return max(sound)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _optimizer_tensors(model: torch.nn.Module, optimizer: Optimizers) -> tuple[dict, dict]:
    moments, steps = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state_of(parameter).items():
            if key == "step":
                steps[name] = float(value)
            else:
                moments[f"{name}.{key}"] = value.detach()
    return moments, steps


@dataclass
class Saved:
    """A state on disk whose files are as they were written."""

    path: Path
    counters: Counters
    beside: Beside
    optimizer_steps: dict[str, float]

    @property
    def best(self) -> Path | None:
        """The best model's weights, where they are not the state's own."""
        return self.path / BEST if (self.path / BEST).exists() else None

    def restore(self, model: torch.nn.Module, optimizer: Optimizers) -> Counters:
        """Puts the state back into model, optimizer and random generators; returns its counters. Raises UserError for a
        model that it is not the state of."""
        weights, moments, random = (read_tensors(self.path / f"{part}.safetensors")
                                    for part in ("weights", "optimizer", "random"))
        parameters = dict(model.named_parameters())
        if {name: value.shape for name, value in weights.items()} != {name: p.shape for name, p in parameters.items()}:
            raise UserError("is the state of another model", where=str(self.path),
                            hint="recipe.yaml was changed after the save")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
                found = {key.rpartition(".")[2]: value for key, value in moments.items() if key.rpartition(".")[0] == name}
                if name in self.optimizer_steps:
                    found["step"] = torch.tensor(self.optimizer_steps[name])
                optimizer.state_of(parameter).update({key: value.to(parameter.device) for key, value in found.items()})
        here = random_states(next(model.parameters()).device)  # a run may go on elsewhere than where it began
        set_random_states({kind: value for kind, value in random.items() if kind in here})
        return self.counters


def newest(folder: Path, note: Callable[[str], None]) -> Saved:
    """The newest state whose files are all as they were written. `note` gets what is wrong with a newer one.

    Raises UserError when there is no state, or each of them is damaged; it tells what is wrong with each.
    """
    states, problems = _states(folder), []
    if not states:
        raise UserError("holds no state to resume from", where=str(folder),
                        hint="a run can be resumed once it has saved; start again with --overwrite")
    for path in reversed(states):
        problem = _damage(path)
        if not problem:
            for text in problems:
                note(f"{text}; the state before it is taken")
            return _read(path)
        problems.append(f"{path}: {problem}")
    raise UserError(f"{'; '.join(problems)}; no other state is left",
                    hint=f"lm train --from {folder.parent} goes on with the best model; --overwrite starts again")


def _damage(state: Path) -> str:
    """What is wrong with the files of a state; nothing: "". One from before there were checksums is taken as it is."""
    try:
        if not (state / CHECKSUMS).exists() and "metrics_bytes" not in read_json(state / "counters.json"):
            return ""
        lines = (state / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: known for known, _, name in (line.partition("  ") for line in lines)}
        there = {file.name for file in state.iterdir()} - {CHECKSUMS}
        for name in sorted(there | sums.keys()):
            if name not in there:
                return f"{name}, which {CHECKSUMS} names, is missing"
            if name not in sums or sha256_of(state / name) != sums[name]:
                return f"{name} is damaged: its SHA-256 is not the one in {CHECKSUMS}"
    except (OSError, UserError, ValueError) as error:
        return f"cannot be read ({error})"
    return "" if "counters.json" in sums else f"{CHECKSUMS} is damaged: it names no counters.json"


def _read(state: Path) -> Saved:
    found = read_json(state / "counters.json")
    counters, beside = (_filled(kind, found, state) for kind in (Counters, Beside))
    steps = found.get("optimizer_steps")
    if not isinstance(steps, dict) or not all(isinstance(step, int | float) for step in steps.values()):
        raise UserError("holds no steps of the optimizer", where=str(state / "counters.json"))
    return Saved(state, counters, beside, steps)


def _filled(kind: type, found: dict[str, Any], state: Path) -> Any:
    """A Counters or Beside of what was stored, each value of the type that it should have."""
    values = {one.name: found[one.name] for one in fields(kind) if one.name in found and one.name != "best_file"}
    for name, default in asdict(kind()).items():
        right = {type(None): int | None, float: float | int}.get(type(default), type(default))
        if name in values and not isinstance(values[name], right):
            raise UserError(f"{name} cannot be {values[name]!r:.60}", where=str(state / "counters.json"))
    return kind(**values)
