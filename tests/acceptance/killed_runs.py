"""Kills a training run by SIGKILL at many moments, resumes it each time, and compares the end with a run left in peace.

python tests/acceptance/killed_runs.py [KILLS] [--seed N] [--folder DIR]      30 kills take some five minutes on two cores

The run goes by steps: a tiny model with dropout, four micro-batches a step, evaluations and states at steps of their own,
two and a half epochs. Kills are aimed: at any moment after the start, while a state is written, during an evaluation, while
the best model or the recipe is replaced, in the second epoch. Compared, to the bit, are the best model, weights, optimizer
and random states of the last state, its counters, the result in recipe.yaml and every line of metrics.jsonl, times aside.
Ends with exit code 1 where anything differs or is left over.
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
STEPS, EVALUATED, SAVED = 60, 7, 5
EPOCH = 24  # steps, about
OPTIONS = ("--preset", "tiny", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1", "--threads", "1",
           "--set", "tokenizer.vocab_size=300", "--set", "train.context=32", "--set", "train.batch_tokens=256",
           "--set", "train.micro_batch_tokens=64", "--set", "train.dropout=0.1", "--set", f"train.eval_every={EVALUATED}",
           "--set", f"train.save_every={SAVED}", "--set", "train.validation_bytes=2000")
TIMES = ("seconds", "preparation", "evaluation_seconds", "metrics_bytes", "elapsed", "tokens_per_second")
POLLED = 0.0005  # seconds between two looks at a folder


@dataclass
class Strike:
    """One kill: what it was aimed at, the last step logged then, the steps of the states on disk, what was half written."""

    aim: str
    step: int
    states: list[int]
    leftovers: list[str]


@dataclass
class Run:
    """A run that is started or, once its folder can be resumed, gone on with; `launch` makes a process of `lm`."""

    folder: Path
    arguments: tuple[object, ...]
    launch: Callable[..., subprocess.Popen]

    def next_arguments(self) -> tuple[object, ...]:
        """What `lm` is to be called with next."""
        if (self.folder / "recipe.yaml").is_file():
            return ("train", "--resume", self.folder, "--threads", "1", "-q")
        return ("train", *self.arguments, "-o", self.folder)

    def strike(self, aim: str, chance: random.Random) -> Strike | None:
        """Has it go on, and kills it at a moment of this kind; None where it came to its end before."""
        process = self.launch(*self.next_arguments())
        moment = AIMS[aim](self.folder, chance)
        while process.poll() is None and not next(moment):
            time.sleep(POLLED)
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.returncode >= 0:
            assert process.returncode == 0, f"lm ended with exit code {process.returncode}"
            return None
        return Strike(aim, last_step(self.folder), states(self.folder), leftovers(self.folder))


def rows(folder: Path) -> list[dict]:
    """What metrics.jsonl holds; a last line that is still being written left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder: Path) -> int:
    """The last step logged, 0 before the first."""
    return max((row["step"] for row in rows(folder)), default=0)


def states(folder: Path) -> list[int]:
    """The steps of the states there are."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("state/step-*"))


def leftovers(folder: Path) -> list[str]:
    """Names of what is half written or a lock."""
    return sorted(path.name for path in folder.rglob(".*"))


# A moment is a generator that is asked again and again and says True once.
Moment = Iterator[bool]


def any_time(folder: Path, chance: random.Random) -> Moment:
    """From the start of the process on, half of the times after its first step: starting takes most of a sitting."""
    begin, seen = time.monotonic(), last_step(folder)
    wait = chance.uniform(0, 4)
    if chance.random() < 0.5:
        yield from logged(folder, lambda found: len(found) and found[-1]["step"] > seen)
        begin, wait = time.monotonic(), chance.uniform(0, 0.6)
    while time.monotonic() < begin + wait:
        yield False
    yield True


def writing(pattern: str, most: float) -> Callable[[Path, random.Random], Moment]:
    """While something whose temporary name matches is there for the first, second or third time; `most` seconds later at
    most, so that some kills come just after the rename."""
    def moment(folder: Path, chance: random.Random) -> Moment:
        before, times = {path.name for path in folder.glob(pattern)}, chance.randint(1, 3)
        for left in reversed(range(times)):
            while not {path.name for path in folder.glob(pattern)} - before:
                yield False
            while left and {path.name for path in folder.glob(pattern)} - before:
                yield False
        time.sleep(chance.uniform(0, most))
        yield True
    return moment


def evaluating(folder: Path, chance: random.Random) -> Moment:
    """After a step that an evaluation follows, before that is logged, or just then."""
    seen, which = last_step(folder), chance.randint(1, 2)
    due = [step for step in range(EVALUATED, STEPS + 1, EVALUATED) if step > seen][:which]
    if due:
        yield from logged(folder, lambda found: len(found) and found[-1]["step"] >= due[-1])
    time.sleep(chance.uniform(0, 0.015))
    yield True


def second_epoch(folder: Path, chance: random.Random) -> Moment:
    """At a step of the second epoch, or of the third, that is not logged yet."""
    step = max(chance.randint(EPOCH + 2, STEPS - 2), last_step(folder) + 1)
    yield from logged(folder, lambda found: len(found) and found[-1]["step"] >= step)
    yield True


def logged(folder: Path, reached: Callable[[list[dict]], bool]) -> Moment:
    """False until what is logged is as asked for."""
    while not reached(rows(folder)):
        yield False


AIMS = {"any time": any_time, "saving": writing("state/.step-*.part", 0.03), "evaluating": evaluating,
        "second epoch": second_epoch, "best model": writing(".model.safetensors.*.part", 0.004),
        "recipe": writing(".recipe.yaml.*.part", 0.004)}


def untimed(found: dict) -> dict:
    """A row or counters without what goes by the clock."""
    return {key: value for key, value in found.items() if key not in TIMES}


def differences(whole: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same to the bit, and what a finished run should not have left."""
    state = f"state/step-{STEPS:09d}"
    names = ["model.safetensors", *(f"{state}/{path.name}" for path in (whole / state).glob("*.safetensors"))]
    found = [name for name in names if (whole / name).read_bytes() != (other / name).read_bytes()]
    counters = [untimed(json.loads((folder / state / "counters.json").read_text())) for folder in (whole, other)]
    found += [f"counters.json: {key}" for key in counters[0] if counters[0][key] != counters[1].get(key)]
    if [*map(untimed, rows(whole))] != [*map(untimed, rows(other))]:
        found.append("metrics.jsonl")
    results = [untimed(yaml.safe_load((folder / "recipe.yaml").read_text())["result"]) for folder in (whole, other)]
    return found + ["recipe.yaml: result"] * (results[0] != results[1]) + leftovers(other)


def told(number: int, strike: Strike) -> str:
    """A row of the table."""
    again = strike.step - max(strike.states, default=0)
    written = ", ".join(name for name in strike.leftovers if name != ".lock") or "-"
    return (f"{number:3}  {strike.aim:12}  after step {strike.step:3}  states {strike.states!s:8}  "
            f"{again:2} steps to make again  half written: {written}")


def kill(run: Run, aims: Iterator[str], chance: random.Random, most: int, first: int) -> int:
    """Kills a run up to `most` times, and tells each; returns how often it was."""
    for number in range(most):
        strike = run.strike(next(aims), chance)
        if strike is None:
            return number
        if strike.step:  # the best so far is there, and loads, at every moment
            safetensors.torch.load_file(run.folder / "model.safetensors")
        print(told(first + number, strike), flush=True)
    return most


def launched(*arguments: object) -> subprocess.Popen:
    """A process of `lm`."""
    return subprocess.Popen([sys.executable, "-m", "lmcli", *map(str, arguments)], stdout=subprocess.DEVNULL)


def finish(run: Run) -> None:
    """Has a run go on to its end."""
    assert run.launch(*run.next_arguments()).wait() == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", nargs="?", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where runs are kept; without it they are removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        sys.exit(trial(folder, arguments_for(folder), options.kills, options.seed))


def arguments_for(folder: Path) -> tuple[object, ...]:
    """What `lm train` is called with, but for -o; its text is written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text((ROOT / "data" / "stories.txt").read_text(encoding="utf-8")[:10_000], encoding="utf-8")
    return (text, *OPTIONS, "--steps", STEPS, "-q")


def trial(folder: Path, arguments: tuple[object, ...], kills: int, seed: int) -> int:
    """Runs as many runs as it takes to be killed so often; the exit code."""
    chance, aims, struck, bad = random.Random(seed), itertools.cycle(AIMS), 0, 0
    whole = Run(folder / "whole", arguments, launched)
    finish(whole)
    epochs = yaml.safe_load((whole.folder / "recipe.yaml").read_text())["result"]["epochs"]
    print(f"undisturbed: {STEPS} steps, {epochs} epochs, {len(rows(whole.folder))} lines of metrics.jsonl", flush=True)
    for number in itertools.count(1):
        run = Run(folder / f"killed-{number}", arguments, launched)
        struck += kill(run, aims, chance, kills - struck, struck + 1)
        finish(run)
        found = differences(whole.folder, run.folder)
        print(f"run {number}, killed {struck} times so far: {'DIFFERS: ' + ', '.join(found) if found else 'lost: nothing'}",
              flush=True)
        bad += bool(found)
        if struck >= kills:
            break
    print(f"{struck} kills in {number} runs; {bad} of these differ from the one left in peace")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
