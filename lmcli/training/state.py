"""What resuming needs: weights, optimizer, counters and random states, written whole and with checksums, the newest two
kept."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from lmcli.training import sharding
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
    `recompute` are what fitted. Weights are averaged over the last `averaged` steps. `look_first`: an evaluation is due
    before the first step.
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
    averaged: int = 0
    look_first: bool = False


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
    """Writes `folder/step-N` and drops all but the newest two; processes that share out the model each write their part,
    those that follow by `write_share`. Raises UserError when the disk has no room for all of it or refuses; the older states
    are then untouched."""
    beside, team = beside or Beside(), optimizer.team
    steps = {name: float(state["step"]) for name, state in _optimizer_states(model, optimizer) if "step" in state}
    tensors = {"weights": weights_of(model), "optimizer": moments_of(model, optimizer),
               "random": random_states(next(model.parameters()).device)}
    facts = {**asdict(counters), **asdict(replace(beside, best_file=None)), "optimizer_steps": steps}
    with user_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        best_bytes = beside.best_file.stat().st_size if beside.best_file else 0
    require_room(folder, sum(map(size_of, tensors.values())) + best_bytes)
    with atomic_folder(folder / f"step-{counters.step:09d}") as part:
        for name, found in tensors.items() if not team.shards else [("random", tensors["random"])]:
            write_tensors(part / f"{name}.safetensors", {key: value.cpu() for key, value in found.items()})
        if team.shards:
            team.ask("write", str(part))
            write_share(part, model, optimizer)
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


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a state holds of the model: all of its weights, or this process's part of them."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def moments_of(model: torch.nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """What a state holds of the optimizer beside its numbers of steps, named by parameter and kind."""
    return {f"{name}.{kind}": value.detach() for name, state in _optimizer_states(model, optimizer)
            for kind, value in state.items() if kind != "step"}


def _optimizer_states(model: torch.nn.Module, optimizer: Optimizers) -> Iterator[tuple[str, dict[str, Tensor]]]:
    return ((name, optimizer.state_of(parameter)) for name, parameter in model.named_parameters())


def write_share(part: Path, model: torch.nn.Module, optimizer: Optimizers) -> None:
    """Writes what this process holds of a model that is shared out; all do so at once."""
    sharding.write(part, weights_of(model) | moments_of(model, optimizer))


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
        whole = (self.path / "weights.safetensors").exists() and not optimizer.team.shards
        (self._put_whole if whole else self._put_shares)(model, optimizer)
        for name, parameter in model.named_parameters():
            if name in self.optimizer_steps:
                steps = torch.tensor(self.optimizer_steps[name], device=parameter.device)
                optimizer.state_of(parameter)["step"] = steps
        random = read_tensors(self.path / "random.safetensors")
        here = random_states(next(model.parameters()).device)  # a run may go on elsewhere than where it began
        set_random_states({kind: value for kind, value in random.items() if kind in here})
        return self.counters

    def _put_whole(self, model: torch.nn.Module, optimizer: Optimizers) -> None:
        weights, moments = (read_tensors(self.path / f"{part}.safetensors") for part in ("weights", "optimizer"))
        self._require_names_and_sizes({name: value.shape for name, value in weights.items()}, model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                optimizer.state_of(parameter).update(
                    {key.rpartition(".")[2]: value.to(parameter.device) for key, value in moments.items()
                     if key.rpartition(".")[0] == name})

    def _put_shares(self, model: torch.nn.Module, optimizer: Optimizers) -> None:
        """The same where the state was written by several processes, or is read by several that share out the model."""
        found = sharding.sizes(self.path)
        parameters = dict(model.named_parameters())
        self._require_names_and_sizes({name: size for name, size in found.items() if name in parameters}, model)
        for key, size in found.items():
            name, _, kind = key.rpartition(".")
            if name in parameters and key not in parameters and size == parameters[name].shape:
                optimizer.state_of(parameters[name])[kind] = torch.zeros_like(parameters[name])
        sharding.read(self.path, weights_of(model) | moments_of(model, optimizer))

    def _require_names_and_sizes(self, found: dict[str, torch.Size], model: torch.nn.Module) -> None:
        if found != {name: parameter.shape for name, parameter in model.named_parameters()}:
            raise UserError("is the state of another model", where=str(self.path),
                            hint="recipe.yaml was changed after the save")


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
