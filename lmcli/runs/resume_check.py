"""`lm train --check-resume`: proves that a resumed run is the same to the bit, on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.runs import start
from lmcli.runs.run_folder import LOCK_NAME
from lmcli.storage import read_tensors
from lmcli.training.train_step import Step

STEPS, EVAL_EVERY, SAVE_EVERY = 20, 4, 5
# the kill comes after an evaluation that follows the newest state: what was logged and kept since
# then has to be made again
KILLED_AT = 13
RESUMED_FROM = KILLED_AT // SAVE_EVERY * SAVE_EVERY
VALIDATION_BYTES = 4000
NOT_COMPARED = (  # times, and what depends on them
    "seconds",
    "preparation",
    "evaluation_seconds",
    "metrics_bytes",
    "elapsed",
    "tokens_per_second",
)


def check(request: start.Request, note: Callable[[str], None]) -> str:
    """Trains 20 short steps in a temporary folder; repeats those after step 10 in a new process.

    The new process resumes from what was on the disk at step 13. Returns a line about how much was
    compared; nothing is left behind. Raises UserError naming the first tensor, counter or line of
    metrics that differs; also raises what `runs.start.start` raises.
    """
    note(
        f"{STEPS} short steps in a temporary folder, and those after step {RESUMED_FROM} again in "
        "a new process"
    )
    with tempfile.TemporaryDirectory(prefix="lm-check-resume-") as folder:
        whole, resumed = Path(folder) / "undisturbed", Path(folder) / "resumed"
        run = start.start(_short_request(request, whole), time.monotonic(), lambda text: None)
        device = str(run.record.device_config)
        for _, event in run.events():
            # a copy as a kill would leave it
            if isinstance(event, Step) and event.step == KILLED_AT:
                shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(LOCK_NAME))
        del run, event  # the new process needs as much memory
        _resume(resumed, request.device)
        if difference := next(differences(whole, resumed), ""):
            raise UserError(
                f"resuming does not give the same run to the bit on {device}: {difference}",
                hint="a resumed run continues here, but not bit for bit like an uninterrupted one",
            )
        files = sorted((whole / "state").glob(f"*{STEPS}/*.safetensors"))
        counts = {file.stem: len(read_tensors(file)) for file in files}
        lines = (whole / "metrics.jsonl").read_text().count("\n")
    return (
        f"resuming gives the same run to the bit: {STEPS} steps, and again from step "
        f"{RESUMED_FROM} on in a new process; {counts['weights']} tensors of weights, "
        f"{counts['optimizer']} of the optimizer, {lines} lines of metrics, on {device}"
    )


def _short_request(request: start.Request, folder: Path) -> start.Request:
    return replace(
        request,
        recipe=_short_recipe(request.recipe),
        output=str(folder),
        remember=(),
        overwrite=False,
        auto=request.auto.adjusted(_short_recipe) if request.auto else None,
    )


def _short_recipe(recipe: Recipe) -> Recipe:
    """The recipe with a few small steps of two micro-batches, evaluations, samples and saves."""
    train = replace(
        recipe.train,
        steps=STEPS,
        time=0.0,
        tokens=0,
        epochs=0.0,
        patience=0,
        eval_every=EVAL_EVERY,
        save_every=SAVE_EVERY,
        sample_every=STEPS // 2,
        batch_tokens=2 * recipe.train.context,
        micro_batch_tokens=recipe.train.context,
        validation_bytes=min(recipe.train.validation_bytes or VALIDATION_BYTES, VALIDATION_BYTES),
        # compiling alone takes a minute
        compile="off" if recipe.train.compile == "auto" else recipe.train.compile,
    )
    return replace(recipe, train=train)


def _resume(folder: Path, device: str) -> None:
    """Resumes a run in a new process. Raises UserError with its messages if it fails."""
    command = [sys.executable, "-P", "-m", "lmcli", "train", "--resume", str(folder), "-q"]
    command += ["--device", device, "--threads", str(torch.get_num_threads())]
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        raise UserError(
            f"resuming failed in a new process (exit code {done.returncode}): {done.stderr.strip()}"
        )


def differences(whole: Path, resumed: Path) -> Iterator[str]:
    """What differs between two finished runs, to the bit, but for NOT_COMPARED.

    Compares the weights of the best model and of the newest state, optimizer, random states,
    counters and metrics.
    """
    newest = max(path.name for path in (whole / "state").iterdir())
    state_files = sorted((whole / "state" / newest).glob("*.safetensors"))
    names = [path.name for path in whole.glob("*.safetensors")]
    names += [f"state/{newest}/{path.name}" for path in state_files]
    for name in names:
        tensors = [read_tensors(folder / name) for folder in (whole, resumed)]
        yield from _tensor_differences(name, *tensors)
    for name in (f"state/{newest}/counters.json", "metrics.jsonl"):
        expected, found = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for folder in (whole, resumed)
        )
        if len(expected) != len(found):
            yield f"{name}: {len(expected):,} lines in the whole run, {len(found):,} resumed"
        for number, (old, new) in enumerate(zip(expected, found), start=1):
            for key in sorted((old.keys() | new.keys()) - set(NOT_COMPARED)):
                if old.get(key) != new.get(key):
                    yield f"{name}, line {number}: {key} is {old.get(key)}, resumed {new.get(key)}"


def _tensor_differences(
    name: str, whole: dict[str, torch.Tensor], resumed: dict[str, torch.Tensor]
) -> Iterator[str]:
    if whole.keys() != resumed.keys():
        others = sorted(whole.keys() ^ resumed.keys())
        yield f"{name}: tensors in only one of the runs: {', '.join(others)}"
    for key in sorted(whole.keys() & resumed.keys()):
        old, new = whole[key], resumed[key]
        if old.shape != new.shape or old.dtype != new.dtype:
            yield (
                f"{name}: {key} is {old.dtype} {tuple(old.shape)}, "
                f"resumed {new.dtype} {tuple(new.shape)}"
            )
        elif not _bytes(old).equal(_bytes(new)):
            gap = (old.double() - new.double()).abs().max().item()
            yield f"{name}: {key}, largest difference {gap:.2g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
