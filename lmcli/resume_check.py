"""Whether a run on these data, with these settings, on this machine, is the same to the bit when it is taken up again: what
`lm train --check-resume` does."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lmcli import runs
from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.storage import read_tensors
from lmcli.training.lock import NAME as LOCK

# a kill after an evaluation that follows the newest state: what was logged and kept since has to be made again
STEPS, EVALUATED, SAVED, KILLED = 20, 4, 5, 13
RESUMED = KILLED // SAVED * SAVED
VALIDATION_BYTES = 4000
BY_THE_CLOCK = ("seconds", "preparation", "evaluation_seconds", "metrics_bytes", "elapsed", "tokens_per_second")


def check(request: runs.Request, note: Callable[[str], None]) -> str:
    """Trains 20 small steps in a temporary folder, and once more the last of them in a new process, from what lay on the
    disk in the middle; returns a line that says how much was compared. Nothing is left behind.

    Raises UserError naming the first tensor, counter or line of metrics that is not the same; and as `runs.start` does.
    """
    note(f"{STEPS} short steps in a temporary folder, and in a new process those after step {RESUMED} again")
    with tempfile.TemporaryDirectory(prefix="lm-check-resume-") as folder:
        whole, again = Path(folder) / "undisturbed", Path(folder) / "resumed"
        run = runs.start(_short(request, whole), time.monotonic(), lambda text: None)
        placement = str(run.placement)
        for kind, event in run.events():
            if kind == "step" and event.step == KILLED:
                shutil.copytree(whole, again, ignore=shutil.ignore_patterns(LOCK))  # as a kill here would leave it
        del run, event  # the new process needs as much memory
        _resume(again, request.device)
        if difference := next(differences(whole, again), ""):
            raise UserError(f"resuming does not give the same run to the bit on {placement}: {difference}",
                            hint="runs here can be resumed, but not repeated exactly")
        files = sorted((whole / "state").glob(f"*{STEPS}/*.safetensors"))
        counts = {file.stem: len(read_tensors(file)) for file in files}
        lines = (whole / "metrics.jsonl").read_text().count("\n")
    return (f"resuming gives the same run to the bit: {STEPS} steps, and again from step {RESUMED} on in a new process; "
            f"{counts['weights']} tensors of weights, {counts['optimizer']} of the optimizer, {lines} lines of metrics, on "
            f"{placement}")


def _short(request: runs.Request, folder: Path) -> runs.Request:
    def refine(below: dict[str, object], *preset: str) -> Recipe:
        return _recipe(request.refine(below, *preset))
    return dataclasses.replace(request, recipe=_recipe(request.recipe), output=str(folder), remember=(), overwrite=False,
                               refine=refine if request.refine else None)


def _recipe(recipe: Recipe) -> Recipe:
    """The recipe with a few small steps: two micro-batches each, evaluations, a sample text and states between them."""
    train = recipe.train
    return dataclasses.replace(recipe, train=dataclasses.replace(
        train, steps=STEPS, time=0.0, tokens=0, epochs=0.0, patience=0, eval_every=EVALUATED, save_every=SAVED,
        sample_every=STEPS // 2, batch_tokens=2 * train.context, micro_batch_tokens=train.context,
        validation_bytes=min(train.validation_bytes, VALIDATION_BYTES),
        compile="off" if train.compile == "auto" else train.compile))  # which takes a minute by itself


def _resume(folder: Path, device: str) -> None:
    """Goes on with the run of a folder in a process of its own. Raises UserError with what that said if it fails."""
    command = [sys.executable, "-P", "-m", "lmcli", "train", "--resume", str(folder), "-q", "--device", device,
               "--threads", str(torch.get_num_threads())]
    known = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(known)})
    if done.returncode:
        raise UserError(f"resuming failed in a new process (exit code {done.returncode}): {done.stderr.strip()}")


def differences(one: Path, other: Path) -> Iterator[str]:
    """What is not the same, to the bit, in two finished runs: weights of the best model and of the newest state, optimizer,
    random states, counters, metrics. Times are left out."""
    newest = max(path.name for path in (one / "state").iterdir())
    names = [*(path.name for path in one.glob("*.safetensors")),
             *(f"state/{newest}/{path.name}" for path in sorted((one / "state" / newest).glob("*.safetensors")))]
    for name in names:
        yield from _tensor_differences(name, *(read_tensors(folder / name) for folder in (one, other)))
    for name in (f"state/{newest}/counters.json", "metrics.jsonl"):
        rows = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (one, other)]
        if len(rows[0]) != len(rows[1]):
            yield f"{name} has {len(rows[0]):,} lines, resumed {len(rows[1]):,}"
        for number, (old, new) in enumerate(zip(*rows), start=1):
            for key in sorted((old.keys() | new.keys()) - {*BY_THE_CLOCK}):
                if old.get(key) != new.get(key):
                    yield f"{name}, line {number}: {key} is {old.get(key)}, resumed {new.get(key)}"


def _tensor_differences(name: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Iterator[str]:
    if one.keys() != other.keys():
        yield f"{name} has other tensors: {', '.join(sorted(one.keys() ^ other.keys()))}"
    for key in sorted(one.keys() & other.keys()):
        old, new = one[key], other[key]
        if old.shape != new.shape or old.dtype != new.dtype:
            yield f"{name}: {key} is {old.dtype} {tuple(old.shape)}, resumed {new.dtype} {tuple(new.shape)}"
        elif not old.contiguous().view(-1).view(torch.uint8).equal(new.contiguous().view(-1).view(torch.uint8)):
            gap = (old.double() - new.double()).abs().max().item()
            yield f"{name}: {key}, largest difference {gap:.2g}"
