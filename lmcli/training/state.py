"""What resuming needs: weights, optimizer, counters and random states, written whole, the newest two kept."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lmcli.errors import UserError
from lmcli.model.device import random_states, set_random_states
from lmcli.storage import atomic_folder, read_tensors, write_tensors
from lmcli.training.optimizers import Optimizers

KEPT = 2


@dataclass
class Counters:
    """Where a run stands. `rows` is the position in the data; `seconds` is time spent, all sittings together,
    `preparation` the part of it before the first steps. `best` is the best validation figure so far (what its criterion is),
    reached at `best_step`. `looked` is the share of the budget at which it was last looked whether an evaluation is due.
    `stale` counts the evaluations since the best one. `first_loss` is the loss before the first update. Where memory ran
    out, `micro_batch_tokens` (else 0) and `recompute` are what fitted.
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
    micro_batch_tokens: int = 0
    recompute: bool = False


def save(folder: Path, counters: Counters, model: torch.nn.Module, optimizer: Optimizers) -> None:
    """Writes `folder/step-N` and drops all but the newest two. Raises UserError when the disk refuses; the older
    states are then untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in model.named_parameters()]
    moments, steps = _optimizer_tensors(model, optimizer)
    with atomic_folder(folder / f"step-{counters.step:09d}") as part:
        write_tensors(part / "weights.safetensors", {name: model.get_parameter(name).detach().cpu() for name in names})
        write_tensors(part / "optimizer.safetensors", moments)
        write_tensors(part / "random.safetensors", random_states(next(model.parameters()).device))
        (part / "counters.json").write_text(json.dumps({**asdict(counters), "optimizer_steps": steps}))
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
                moments[f"{name}.{key}"] = value.detach().cpu()
    return moments, steps


def restore(folder: Path, model: torch.nn.Module, optimizer: Optimizers,
            note: Callable[[str], None]) -> Counters:
    """Puts the newest whole state back into model, optimizer and random generators; returns its counters. `note` gets
    what is wrong with a newer one that had to be passed over.

    Raises UserError when there is no state, or none that can be read.
    """
    states = _states(folder)
    if not states:
        raise UserError("holds no state to resume from", where=str(folder),
                        hint="a run can be resumed once it has saved; start again with --overwrite")
    problem = None
    for state in reversed(states):
        try:
            counters = _restore(state, model, optimizer)
        except UserError as error:
            problem = problem or error
            continue
        if problem:
            note(f"{problem.where}: {problem.what}; taking the state before it")
        return counters
    raise problem


def _restore(state: Path, model: torch.nn.Module, optimizer: Optimizers) -> Counters:
    weights, moments = (read_tensors(state / f"{part}.safetensors") for part in ("weights", "optimizer"))
    random = read_tensors(state / "random.safetensors")
    try:
        counters = json.loads((state / "counters.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read counters.json ({error})", where=str(state)) from error
    steps = counters.pop("optimizer_steps")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise UserError("is the state of another model", where=str(state), hint="recipe.yaml was changed after the save")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            found = {key.rpartition(".")[2]: value for key, value in moments.items() if key.rpartition(".")[0] == name}
            if name in steps:
                found["step"] = torch.tensor(steps[name])
            optimizer.state_of(parameter).update({key: value.to(parameter.device) for key, value in found.items()})
    here = random_states(next(model.parameters()).device)  # a run may go on elsewhere than where it began
    set_random_states({kind: value for kind, value in random.items() if kind in here})
    return Counters(**counters)
