"""What resuming needs: weights, optimizer, counters and random states, written whole, the newest two kept."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lmcli.errors import UserError
from lmcli.storage import atomic_folder, read_tensors, write_tensors

KEPT = 2


@dataclass
class Counters:
    """Where a run stands. `rows` is the position in the data; `seconds` is time spent, all sittings together,
    `preparation` the part of it before the first steps. `best` is the best validation figure so far (bits per byte), reached at `best_step`.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    preparation: float = 0.0
    best: float = float("inf")
    best_step: int = 0


def save(folder: Path, counters: Counters, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes `folder/step-N` and drops all but the newest two. Raises UserError when the disk refuses; the older
    states are then untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in model.named_parameters()]
    moments, steps = _optimizer_tensors(model, optimizer)
    with atomic_folder(folder / f"step-{counters.step:09d}") as part:
        write_tensors(part / "weights.safetensors", {name: model.get_parameter(name).detach().cpu() for name in names})
        write_tensors(part / "optimizer.safetensors", moments)
        random_states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_states["cuda"] = torch.cuda.get_rng_state()
        write_tensors(part / "random.safetensors", random_states)
        (part / "counters.json").write_text(json.dumps({**asdict(counters), "optimizer_steps": steps}))
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    moments, steps = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                steps[name] = float(value)
            else:
                moments[f"{name}.{key}"] = value.detach().cpu()
    return moments, steps


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
    """Puts the newest whole state back into model, optimizer and random generators; returns its counters.

    Raises UserError when there is no state, or none that can be read.
    """
    states = _states(folder)
    if not states:
        raise UserError("holds no state to resume from", where=str(folder),
                        hint="a run can be resumed once it has saved; start again with --overwrite")
    problem = None
    for state in reversed(states):
        try:
            return _restore(state, model, optimizer)
        except UserError as error:
            problem = problem or error
    raise problem


def _restore(state: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
    weights, moments = (read_tensors(state / f"{part}.safetensors") for part in ("weights", "optimizer"))
    random_states = read_tensors(state / "random.safetensors")
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
            if name in steps:
                keys = [key for key in moments if key.rpartition(".")[0] == name]
                optimizer.state[parameter] = {
                    "step": torch.tensor(steps[name], device=parameter.device),
                    **{key.rpartition(".")[2]: moments[key].to(parameter.device) for key in keys}}
    torch.set_rng_state(random_states["cpu"])
    if "cuda" in random_states and torch.cuda.is_available():
        torch.cuda.set_rng_state(random_states["cuda"])
    return Counters(**counters)
