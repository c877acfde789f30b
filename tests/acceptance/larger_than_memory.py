"""Trains on a text larger than memory; measures peak memory and speed from file to model.

python tests/acceptance/larger_than_memory.py [--gigabytes 5] [--limit 2] [--steps 5]
    [--preset tiny] [--documents file] [--seed 0] [--folder DIR] [--kill]

Writes a random text of that size into a temporary folder, which needs twice the space because the
token cache is there too. Then trains a few steps in a process that may hold `limit` GB
(RLIMIT_DATA, so a larger need ends it) and reads its memory four times a second.

Passes if the run succeeds, its peak of resident memory is below the limit, and memory does not
grow: in the second half of the time before the first step, anonymous memory is at most 150 MB above
that in the first half.

With --kill, a first run is killed (SIGKILL) once it has saved the progress of its token cache; the
measured run must continue from there.

The text: 20,000 sentences of words drawn by Zipf's law, in random order, each line with a unique
number.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = 20_000
LINES_PER_WRITE = 20_000
MAX_GROWTH = 150e6  # bytes of anonymous memory


def sentences(seed: int) -> list[str]:
    """Random sentences of 5 to 25 words from a vocabulary of 30,000."""
    generator, letters = random.Random(seed), "etaoinshrdlucmfwypvbgkjqxz"
    words = sorted(
        {
            "".join(
                generator.choices(letters, weights=range(26, 0, -1), k=generator.randint(1, 10))
            )
            for _ in range(30_000)
        },
        key=lambda word: (len(word), word),
    )
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    return [
        " ".join(generator.choices(words, cum_weights=weights, k=generator.randint(5, 25))) + ".\n"
        for _ in range(SENTENCES)
    ]


def write(file: Path, size: float, seed: int) -> None:
    """Writes a text of `size` bytes."""
    pool, generator, number = sentences(seed), np.random.default_rng(seed), 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            chosen = generator.integers(SENTENCES, size=LINES_PER_WRITE).tolist()
            out.write("".join([f"{number + i} {pool[k]}" for i, k in enumerate(chosen)]))
            number += LINES_PER_WRITE


class Sample(NamedTuple):
    """Memory of a process at one moment: seconds since its start, bytes."""

    seconds: float
    resident: int
    anonymous: int


@dataclass
class MemoryWatch:
    """Samples of a process's memory, four a second until it ends."""

    process: subprocess.Popen
    started: float
    samples: list[Sample] = field(default_factory=list)

    def run(self) -> None:
        """Takes samples until the process has ended."""
        while self.process.poll() is None:
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:
                return
            sizes = {
                name: int(value.split()[0]) * 1024
                for name, _, value in (line.partition(":") for line in lines)
                if name in ("VmRSS", "RssAnon")
            }
            if len(sizes) == 2:
                seconds = time.monotonic() - self.started
                self.samples.append(Sample(seconds, sizes["VmRSS"], sizes["RssAnon"]))
            time.sleep(0.25)


@dataclass
class Outcome:
    """What a measured run did; `ready` is the seconds until the run was set up, 0.0 if never."""

    code: int
    samples: list[Sample]
    seconds: float
    ready: float


def command(file: Path, options: argparse.Namespace) -> list[str]:
    """The command line of the run."""
    return [
        *(sys.executable, "-m", "lmcli", "train", str(file)),
        *("-o", str(file.parent / "run"), "--overwrite"),
        *("--preset", options.preset, "--steps", str(options.steps)),
        *("--documents", options.documents),
    ]


def kill(file: Path, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Starts the run and kills it once it has saved the progress of its token cache."""
    process = subprocess.Popen(
        command(file, options),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    cache, pattern = Path(environment["LM_CACHE"]), "corpus/.*.part/progress.json"
    while process.poll() is None and not list(cache.glob(pattern)):
        time.sleep(0.1)
    process.kill()
    process.wait()
    (progress,) = cache.glob(pattern)
    print(f"killed; saved progress: {progress.read_text()}", flush=True)


def train(file: Path, options: argparse.Namespace, environment: dict[str, str]) -> Outcome:
    """Runs lm train under the limit."""
    limit = int(options.limit * 1e9)
    started, ready, continued = time.monotonic(), 0.0, False
    process = subprocess.Popen(
        command(file, options),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    watch = MemoryWatch(process, started)
    thread = threading.Thread(target=watch.run)
    thread.start()
    for line in process.stderr or ():
        seconds = time.monotonic() - started
        continued = continued or "tokenizing continues after" in line
        if not ready and " parameters" in line and "objective" in line:
            ready = seconds
        print(f"{seconds:8.1f} s  {line.rstrip()}", flush=True)
    code = process.wait()
    thread.join()
    if options.kill and not continued:
        print("the run did not continue the token cache of the killed run")
        code = 1
    return Outcome(code, watch.samples, time.monotonic() - started, ready)


def report(outcome: Outcome, size: int, limit: float) -> bool:
    """Prints the memory over time and the result for a text of `size` bytes; True if passed."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = max([children, *(sample.resident for sample in outcome.samples)])
    until = outcome.ready or outcome.seconds
    samples = [sample for sample in outcome.samples if sample.seconds < until]
    # memory before the first step
    first, second = (
        max((x.anonymous for x in samples if (x.seconds < until / 2) == is_first), default=0)
        for is_first in (True, False)
    )
    for sample in samples[:: max(1, len(samples) // 12)]:
        print(
            f"{sample.seconds:8.1f} s  resident {sample.resident / 1e6:6,.0f} MB, "
            f"anonymous {sample.anonymous / 1e6:6,.0f} MB"
        )
    # the result
    passed = outcome.code == 0 and peak < limit * 1e9 and second - first < MAX_GROWTH
    print(
        f"exit code {outcome.code}; {size / 1e6 / until:.1f} MB/s until the first step "
        f"({until:.0f} s of {outcome.seconds:.0f} s); peak {peak / 1e6:,.0f} MB, limit "
        f"{limit * 1e3:,.0f} MB; most anonymous memory {first / 1e6:,.0f} MB in the first half, "
        f"{second / 1e6:,.0f} MB in the second: {'passed' if passed else 'FAILED'}"
    )
    return passed


def main() -> int:
    """Runs the test; 1 if it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--limit", type=float, default=2.0, help="GB")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--documents", default="file", choices=["file", "line"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the temporary folder")
    parser.add_argument(
        "--kill", action="store_true", help="kill a first run and continue its token cache"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file, started = Path(folder) / "text.txt", time.monotonic()
        write(file, options.gigabytes * 1e9, options.seed)
        size = file.stat().st_size
        print(f"{size / 1e9:.2f} GB written in {time.monotonic() - started:.0f} s", flush=True)
        environment = {**os.environ, "LM_CACHE": str(Path(folder) / "cache")}
        if options.kill:
            kill(file, options, environment)
        outcome = train(file, options, environment)
    return 0 if report(outcome, size, options.limit) else 1


if __name__ == "__main__":
    sys.exit(main())
