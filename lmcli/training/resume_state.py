"""Resumable states: weights, optimizer, counters, random states and checksums."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmcli.distributed import sharding
from lmcli.errors import UserError
from lmcli.model.device import random_states, set_random_states
from lmcli.storage import (
    atomic_folder,
    read_json,
    read_tensors,
    require_disk_space,
    sha256_of,
    tensor_bytes,
    user_errors,
    write_tensors,
)
from lmcli.training.optimizers import Optimizers

STATES_KEPT = 2
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes and reads it
BEST = "best.safetensors"


@dataclass
class Counters:
    """Where a run stands; the names are the keys of counters.json.

    rows: position in the data. seconds: time spent, that before a resume included.
    preparation: seconds before the first step. best, best_loss, best_step: the lowest criterion of
    an evaluation so far, its loss and its step. stale: evaluations since then.
    looked: the share of the budget at which it was last checked what is due.
    first_loss, losses: the loss before the first update, and the last ones.
    evaluation_seconds: duration of the last evaluation.
    micro_batch_tokens, recompute: what fitted after memory ran out (else 0, False).
    averaged: how many steps the averaged weights cover.
    look_first: an evaluation is due before the first step.
    stage_*: where the present budget begins, after more training of a finished run.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    preparation: float = 0.0
    best: float = float("inf")
    best_loss: float = float("inf")
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
    stage_step: int = 0
    stage_rows: int = 0
    stage_tokens: int = 0
    stage_seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """True if the budget is used up and the result measured."""
        return self.looked >= 1.0

    @property
    def begins_stage(self) -> bool:
        """True before the first step of more training."""
        return self.step == self.stage_step > 0

    def begin_stage(self) -> None:
        """Begins a new budget here; the best model so far remains the one to better."""
        self.stage_step, self.stage_rows = self.step, self.rows
        self.stage_tokens, self.stage_seconds = self.tokens, self.seconds
        self.preparation, self.looked, self.stale = 0.0, 0.0, 0


@dataclass
class RunMetadata:
    """What a state records of its run's folder; the names are keys of counters.json.

    The `result` so far and its `headline`, the size of metrics.jsonl in bytes (None: unknown), the
    recipe, the SHA-256 of the best model's weights, and the `stages` before the present budget.
    `best_file` holds the best weights, to be copied into the state; None if they are the state's
    own, or if there are none yet.
    """

    result: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    metrics_bytes: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    best_sha256: str = ""
    best_file: Path | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)


def save(
    folder: Path,
    counters: Counters,
    model: torch.nn.Module,
    optimizer: Optimizers,
    metadata: RunMetadata | None = None,
) -> None:
    """Writes `folder/step-N`, and removes all states but the newest two.

    With a sharded model every process writes its shard (workers by `write_shard`). Raises
    UserError if the disk is too small or refuses; the older states are then untouched.
    """
    metadata, replicas = metadata or RunMetadata(), optimizer.replicas
    steps = {
        name: float(state["step"])
        for name, state in _optimizer_states(model, optimizer)
        if "step" in state
    }
    tensors = {
        "weights": weight_tensors(model),
        "optimizer": moment_tensors(model, optimizer),
        "random": random_states(next(model.parameters()).device),
    }
    facts = {
        **asdict(counters),
        **asdict(replace(metadata, best_file=None)),
        "optimizer_steps": steps,
    }
    # room for all of it
    with user_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        best_bytes = metadata.best_file.stat().st_size if metadata.best_file else 0
    require_disk_space(folder, sum(map(tensor_bytes, tensors.values())) + best_bytes)
    # the files, the checksums last
    with atomic_folder(folder / f"step-{counters.step:09d}") as partial:
        for name in ["random"] if replicas.sharded else list(tensors):
            on_cpu = {key: value.cpu() for key, value in tensors[name].items()}
            write_tensors(partial / f"{name}.safetensors", on_cpu)
        if replicas.sharded:
            replicas.run_on_all("write", str(partial))
            write_shard(partial, model, optimizer)
        if metadata.best_file:
            shutil.copyfile(metadata.best_file, partial / BEST)
        (partial / "counters.json").write_text(json.dumps(facts))
        files = sorted(partial.iterdir())
        sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
        (partial / CHECKSUMS).write_text(sums)
    for old in _states(folder)[:-STATES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def drop_from(folder: Path, step: int) -> int | None:
    """Removes the states from `step` on if there is an older one; returns the newest step left."""
    states = {int(path.name.removeprefix("step-")): path for path in _states(folder)}
    older = [number for number in states if number < step]
    if not older:
        return None
    for number in states.keys() - set(older):
        shutil.rmtree(states[number], ignore_errors=True)
    return max(older)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def weight_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights in a state, by name: all of them, or this process's shard."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def moment_tensors(model: torch.nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """The optimizer's tensors in a state, by parameter and kind, as "….exp_avg"."""
    return {
        f"{name}.{kind}": value.detach()
        for name, state in _optimizer_states(model, optimizer)
        for kind, value in state.items()
        if kind != "step"
    }


def _optimizer_states(
    model: torch.nn.Module, optimizer: Optimizers
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    return ((name, optimizer.state_of(parameter)) for name, parameter in model.named_parameters())


def write_shard(folder: Path, model: torch.nn.Module, optimizer: Optimizers) -> None:
    """Writes this process's shard of a state; all processes do so at once."""
    sharding.write(folder, weight_tensors(model) | moment_tensors(model, optimizer))


@dataclass
class SavedState:
    """A state on disk whose files are intact."""

    path: Path
    counters: Counters
    metadata: RunMetadata
    optimizer_steps: dict[str, float]

    @property
    def best_weights(self) -> Path | None:
        """The file of the best model's weights; None if they are the state's own."""
        return self.path / BEST if (self.path / BEST).exists() else None

    def restore(self, model: torch.nn.Module, optimizer: Optimizers) -> Counters:
        """Loads the state into model, optimizer and random generators; returns its counters.

        Raises UserError if the state is of another model.
        """
        one_file = (self.path / "weights.safetensors").exists()
        if one_file and not optimizer.replicas.sharded:
            self._load_whole(model, optimizer)
        else:
            self._load_shards(model, optimizer)
        for name, parameter in model.named_parameters():
            if name in self.optimizer_steps:
                steps = torch.tensor(self.optimizer_steps[name], device=parameter.device)
                optimizer.state_of(parameter)["step"] = steps
        # the run may have been on another device before
        kinds = random_states(next(model.parameters()).device)
        saved = read_tensors(self.path / "random.safetensors")
        set_random_states({kind: value for kind, value in saved.items() if kind in kinds})
        return self.counters

    def _load_whole(self, model: torch.nn.Module, optimizer: Optimizers) -> None:
        weights = read_tensors(self.path / "weights.safetensors")
        moments = read_tensors(self.path / "optimizer.safetensors")
        self._require_shapes({name: value.shape for name, value in weights.items()}, model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                state = optimizer.state_of(parameter)
                for key, value in moments.items():
                    of_name, _, kind = key.rpartition(".")
                    if of_name == name:
                        state[kind] = value.to(parameter.device)

    def _load_shards(self, model: torch.nn.Module, optimizer: Optimizers) -> None:
        """Loads a state that several processes wrote, or that several read as shards."""
        shapes = sharding.read_shapes(self.path)
        parameters = dict(model.named_parameters())
        of_weights = {name: shape for name, shape in shapes.items() if name in parameters}
        self._require_shapes(of_weights, model)
        # room for the moments
        for key, shape in shapes.items():
            name, _, kind = key.rpartition(".")
            if name in parameters and key not in parameters and shape == parameters[name].shape:
                optimizer.state_of(parameters[name])[kind] = torch.zeros_like(parameters[name])
        sharding.read(self.path, weight_tensors(model) | moment_tensors(model, optimizer))

    def _require_shapes(self, shapes: dict[str, torch.Size], model: torch.nn.Module) -> None:
        if shapes != {name: parameter.shape for name, parameter in model.named_parameters()}:
            raise UserError(
                "is the state of another model",
                where=str(self.path),
                hint="recipe.yaml was changed after the save",
            )


def newest(folder: Path, note: Callable[[str], None]) -> SavedState:
    """The newest state whose files are intact; `note` gets what is wrong with a newer one.

    Raises UserError if there is no state, or if all are damaged; it says what is wrong with each.
    """
    states = _states(folder)
    problems: list[str] = []
    if not states:
        raise UserError(
            "holds no state to resume from",
            where=str(folder),
            hint="a run can be resumed once it has saved; start again with --overwrite",
        )
    for path in reversed(states):
        problem = _damage(path)
        if not problem:
            for text in problems:
                note(f"{text}; the state before it is taken")
            return _read(path)
        problems.append(f"{path}: {problem}")
    raise UserError(
        f"{'; '.join(problems)}; no other state is left",
        hint=f"lm train --from {folder.parent} uses the best model; --overwrite starts again",
    )


def _damage(state: Path) -> str:
    """What is wrong with the files of a state; "" if they are intact."""
    try:
        # states of the first versions have no checksums
        if not (state / CHECKSUMS).exists() and "metrics_bytes" not in read_json(
            state / "counters.json"
        ):
            return ""
        lines = (state / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
        present = {file.name for file in state.iterdir()} - {CHECKSUMS}
        for name in sorted(present | sums.keys()):
            if name not in present:
                return f"{name}, which {CHECKSUMS} names, is missing"
            if name not in sums or sha256_of(state / name) != sums[name]:
                return f"{name} is damaged: its SHA-256 is not the one in {CHECKSUMS}"
    except (OSError, UserError, ValueError) as error:
        return f"cannot be read ({error})"
    return "" if "counters.json" in sums else f"{CHECKSUMS} is damaged: it names no counters.json"


def _read(state: Path) -> SavedState:
    facts = read_json(state / "counters.json")
    steps = facts.get("optimizer_steps")
    if not isinstance(steps, dict) or not all(
        isinstance(step, int | float) for step in steps.values()
    ):
        raise UserError("holds no steps of the optimizer", where=str(state / "counters.json"))
    return SavedState(
        state, _parse(Counters, facts, state), _parse(RunMetadata, facts, state), steps
    )


Parsed = TypeVar("Parsed", Counters, RunMetadata)


def _parse(kind: type[Parsed], facts: dict[str, Any], state: Path) -> Parsed:
    """Reads one of both from counters.json. Raises UserError for a value of another type."""
    values = {
        each.name: facts[each.name]
        for each in fields(kind)
        if each.name in facts and each.name != "best_file"
    }
    for name, default in asdict(kind()).items():
        allowed = {type(None): int | None, float: float | int}.get(type(default), type(default))
        if name in values and not isinstance(values[name], allowed):
            raise UserError(
                f"{name} cannot be {values[name]!r:.60}", where=str(state / "counters.json")
            )
    return kind(**values)
