"""Kills training runs at many moments, resumes them, and compares them with an untouched run.

python tests/acceptance/killed_runs.py [KILLS] [--seed N] [--folder DIR]

30 kills (SIGKILL) take about five minutes on two cores. The run is limited by steps: a tiny model
with dropout, four micro-batches a step, evaluations and saves at different steps, two and a half
epochs. The kills come at any time, while a state is saved, during an evaluation, while the best
model or the recipe is replaced, and in the second epoch.

Compared to the bit: the best model; weights, optimizer, random states and counters of the last
state; the result in recipe.yaml; and every line of metrics.jsonl. Times are left out. Exits with 1
if anything differs or temporary files are left.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVAL_EVERY, SAVE_EVERY = 60, 7, 5
EPOCH = 24  # steps, about
SETTINGS = (
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "tokenizer.vocab_size=300",
    "train.context=32",
    "train.batch_tokens=256",
    "train.micro_batch_tokens=64",
    "train.dropout=0.1",
    f"train.eval_every={EVAL_EVERY}",
    f"train.save_every={SAVE_EVERY}",
    "train.validation_bytes=2000",
)
TIMES = (
    "seconds",
    "preparation",
    "evaluation_seconds",
    "metrics_bytes",
    "elapsed",
    "tokens_per_second",
)
POLL_SECONDS = 0.0005  # between two looks at a folder


@dataclass
class Kill:
    """One kill: its moment, the last logged step, the saved steps and half-written files."""

    moment: str
    step: int
    states: list[int]
    leftovers: list[str]


@dataclass
class Run:
    """A run that is started, or resumed once its folder allows; `launch` starts an `lm` process."""

    folder: Path
    arguments: tuple[object, ...]
    launch: Callable[..., subprocess.Popen]

    def next_arguments(self) -> tuple[object, ...]:
        """The arguments of `lm` that start or resume the run."""
        if (self.folder / "recipe.yaml").is_file():
            return ("train", "--resume", self.folder, "--threads", "1", "-q")
        return ("train", *self.arguments, "-o", self.folder)

    def kill_at(self, moment: str, generator: random.Random) -> Kill | None:
        """Continues the run and kills it at such a moment; None if it finished before."""
        process = self.launch(*self.next_arguments())
        reached = MOMENTS[moment](self.folder, generator)
        while process.poll() is None and not next(reached):
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.returncode >= 0:
            assert process.returncode == 0, f"lm ended with exit code {process.returncode}"
            return None
        step, saved = last_step(self.folder), states(self.folder)
        return Kill(moment, step, saved, leftovers(self.folder))


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last line that is still being written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder: Path) -> int:
    """The last step logged, 0 before the first."""
    return max((row["step"] for row in rows(folder)), default=0)


def states(folder: Path) -> list[int]:
    """The steps of the saved states."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("state/step-*"))


def leftovers(folder: Path) -> list[str]:
    """Names of half-written files and locks."""
    return sorted(path.name for path in folder.rglob(".*"))


# A moment is a generator: it yields False until the run is to be killed, then True.
Moment = Iterator[bool]


def any_time(folder: Path, generator: random.Random) -> Moment:
    """From the start of the process on; half of the kills come after its first step.

    Otherwise most kills would come while the process starts.
    """
    started, last = time.monotonic(), last_step(folder)
    wait = generator.uniform(0, 4)
    if generator.random() < 0.5:
        yield from _until(folder, last + 1)
        started, wait = time.monotonic(), generator.uniform(0, 0.6)
    while time.monotonic() < started + wait:
        yield False
    yield True


def writing(pattern: str, delay: float) -> Callable[[Path, random.Random], Moment]:
    """While a temporary file that matches exists for the first, second or third time.

    The kill comes up to `delay` seconds later, so some come just after the rename.
    """

    def moment(folder: Path, generator: random.Random) -> Moment:
        before, times = {path.name for path in folder.glob(pattern)}, generator.randint(1, 3)
        for left in reversed(range(times)):
            while not {path.name for path in folder.glob(pattern)} - before:
                yield False
            while left and {path.name for path in folder.glob(pattern)} - before:
                yield False
        time.sleep(generator.uniform(0, delay))
        yield True

    return moment


def evaluating(folder: Path, generator: random.Random) -> Moment:
    """After a step that an evaluation follows, before the evaluation is logged or just then."""
    last, count = last_step(folder), generator.randint(1, 2)
    due = [step for step in range(EVAL_EVERY, STEPS + 1, EVAL_EVERY) if step > last][:count]
    if due:
        yield from _until(folder, due[-1])
    time.sleep(generator.uniform(0, 0.015))
    yield True


def second_epoch(folder: Path, generator: random.Random) -> Moment:
    """At a step of the second or third epoch that is not logged yet."""
    step = max(generator.randint(EPOCH + 2, STEPS - 2), last_step(folder) + 1)
    yield from _until(folder, step)
    yield True


def _until(folder: Path, step: int) -> Moment:
    """False until the last line of metrics.jsonl is from this step or later."""
    while not ((logged := rows(folder)) and logged[-1]["step"] >= step):
        yield False


MOMENTS = {
    "any time": any_time,
    "saving": writing("state/.step-*.part", 0.03),
    "evaluating": evaluating,
    "second epoch": second_epoch,
    "best model": writing(".model.safetensors.*.part", 0.004),
    "recipe": writing(".recipe.yaml.*.part", 0.004),
}


def untimed(row: dict) -> dict:
    """A row or counters without their times."""
    return {key: value for key, value in row.items() if key not in TIMES}


def differences(reference: Path, folder: Path) -> list[str]:
    """What differs between two finished runs, and what the second should not have left."""
    runs = reference, folder
    # weights, optimizer and random states
    state = f"state/step-{STEPS:09d}"
    tensors = [f"{state}/{path.name}" for path in (reference / state).glob("*.safetensors")]
    names = [
        name
        for name in ("model.safetensors", *tensors)
        if (reference / name).read_bytes() != (folder / name).read_bytes()
    ]
    # counters
    expected, counters = (
        untimed(json.loads((run / state / "counters.json").read_text())) for run in runs
    )
    names += [f"counters.json: {key}" for key in expected if expected[key] != counters.get(key)]
    # metrics and result
    if [*map(untimed, rows(reference))] != [*map(untimed, rows(folder))]:
        names.append("metrics.jsonl")
    expected, result = (
        untimed(yaml.safe_load((run / "recipe.yaml").read_text())["result"]) for run in runs
    )
    return names + ["recipe.yaml: result"] * (expected != result) + leftovers(folder)


def table_row(number: int, kill: Kill) -> str:
    """A row of the table."""
    lost = kill.step - max(kill.states, default=0)
    half_written = ", ".join(name for name in kill.leftovers if name != ".lock") or "-"
    return (
        f"{number:3}  {kill.moment:12}  after step {kill.step:3}  states {kill.states!s:8}  "
        f"{lost:2} steps to repeat  half written: {half_written}"
    )


def kill_repeatedly(
    run: Run, moments: Iterator[str], generator: random.Random, most: int, first: int
) -> int:
    """Kills a run up to `most` times and prints each kill, from number `first`; how many."""
    for count in range(most):
        kill = run.kill_at(next(moments), generator)
        if kill is None:
            return count
        if kill.step:  # the best model so far can be loaded at every moment
            safetensors.torch.load_file(run.folder / "model.safetensors")
        print(table_row(first + count, kill), flush=True)
    return most


def launch(*arguments: object) -> subprocess.Popen:
    """Starts an `lm` process."""
    command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(run: Run) -> None:
    """Continues a run to its end."""
    assert run.launch(*run.next_arguments()).wait() == 0


def arguments_for(folder: Path) -> tuple[object, ...]:
    """The arguments of `lm train` except -o; writes the text into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    stories = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")
    text.write_text(stories[:10_000], encoding="utf-8")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return (text, "--preset", "tiny", "--threads", "1", *settings, "--steps", STEPS, "-q")


def run_kills(folder: Path, kills: int, seed: int) -> int:
    """Trains and kills as many runs as `kills` kills take; returns the exit code."""
    arguments = arguments_for(folder)
    generator, moments = random.Random(seed), itertools.cycle(MOMENTS)
    # the run to compare with
    reference = Run(folder / "whole", arguments, launch)
    finish(reference)
    result = yaml.safe_load((reference.folder / "recipe.yaml").read_text())["result"]
    print(
        f"uninterrupted: {STEPS} steps, {result['epochs']} epochs, "
        f"{len(rows(reference.folder))} lines of metrics.jsonl",
        flush=True,
    )
    # the runs that are killed
    killed = failed = number = 0
    while number == 0 or killed < kills:
        number += 1
        run = Run(folder / f"killed-{number}", arguments, launch)
        killed += kill_repeatedly(run, moments, generator, kills - killed, killed + 1)
        finish(run)
        names = differences(reference.folder, run.folder)
        outcome = f"DIFFERS: {', '.join(names)}" if names else "no difference"
        print(f"run {number}, {killed} kills so far: {outcome}", flush=True)
        failed += bool(names)
    print(f"{killed} kills in {number} runs; {failed} of them differ from the uninterrupted run")
    return 1 if failed else 0


def main() -> int:
    """Runs the test in a temporary folder or in --folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", nargs="?", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where the runs stay; without it they are removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return run_kills(Path(options.folder or temporary), options.kills, options.seed)


if __name__ == "__main__":
    sys.exit(main())
