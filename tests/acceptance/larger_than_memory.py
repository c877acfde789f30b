"""lm train on a text larger than memory: peak memory, and whether it stays flat; MB/s from file to model.

python tests/acceptance/larger_than_memory.py [--gigabytes 5] [--limit 2] [--steps 5] [--preset tiny] [--documents file]
    [--seed 0] [--folder DIR] [--kill]

Writes a text of that many GB from a seed into a temporary folder (which needs twice its size: the token cache lies there
too), trains a few steps on it in a process that may hold `limit` GB (RLIMIT_DATA, so a larger need ends it), and asks its
memory four times a second. Passes when the run ends well, its peak of resident memory is below the limit, and anonymous
memory in the second half of the time before the first step is no more than 150 MB above that of the first.

With --kill a first run is killed (SIGKILL) once it has noted how far its token cache is, and the one that is measured has to
go on from there.

The text: 20,000 sentences of words drawn by Zipf's law, in random order, each line with a number that occurs nowhere else.
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

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = 20_000
AT_ONCE = 20_000  # lines written together
GROWTH = 150e6


def sentences(seed: int) -> list[str]:
    """Sentences of 5 to 25 of 30,000 words."""
    generator, letters = random.Random(seed), "etaoinshrdlucmfwypvbgkjqxz"
    words = sorted({"".join(generator.choices(letters, weights=range(26, 0, -1), k=generator.randint(1, 10)))
                    for _ in range(30_000)}, key=lambda word: (len(word), word))
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    return [" ".join(generator.choices(words, cum_weights=weights, k=generator.randint(5, 25))) + ".\n"
            for _ in range(SENTENCES)]


def write(file: Path, size: float, seed: int) -> None:
    """A text of `size` bytes."""
    pool, generator, number = sentences(seed), np.random.default_rng(seed), 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            chosen = generator.integers(SENTENCES, size=AT_ONCE).tolist()
            out.write("".join([f"{number + i} {pool[k]}" for i, k in enumerate(chosen)]))
            number += AT_ONCE


@dataclass
class Watch:
    """Seconds, resident and anonymous bytes of a process, asked four times a second until it ends."""

    process: subprocess.Popen
    began: float
    rows: list[tuple[float, int, int]] = field(default_factory=list)

    def run(self) -> None:
        """Asks until the process has ended."""
        while self.process.poll() is None:
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:
                return
            found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
                     if name in ("VmRSS", "RssAnon")}
            if len(found) == 2:
                self.rows.append((time.monotonic() - self.began, found["VmRSS"], found["RssAnon"]))
            time.sleep(0.25)


def command(file: Path, options: argparse.Namespace) -> list[str]:
    """The run, as it is typed."""
    return [sys.executable, "-m", "lmcli", "train", str(file), "-o", str(file.parent / "run"), "--overwrite", "--preset",
            options.preset, "--steps", str(options.steps), "--documents", options.documents]


def kill(file: Path, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Starts the run, and kills it when it could go on from somewhere."""
    process = subprocess.Popen(command(file, options), env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not list(Path(environment["LM_CACHE"]).glob("corpus/.*.part/progress.json")):
        time.sleep(0.1)
    process.kill()
    process.wait()
    (note,) = Path(environment["LM_CACHE"]).glob("corpus/.*.part/progress.json")
    print(f"killed; it had noted {note.read_text()}", flush=True)


def train(file: Path, options: argparse.Namespace, environment: dict[str, str]) -> tuple[int, Watch, float, float]:
    """(exit code, memory, seconds in all, seconds until the run was set up) of lm train under the limit."""
    limit = int(options.limit * 1e9)
    began, ready, gone_on = time.monotonic(), 0.0, False
    process = subprocess.Popen(command(file, options), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    watch = Watch(process, began)
    thread = threading.Thread(target=watch.run)
    thread.start()
    for line in process.stderr:
        passed = time.monotonic() - began
        gone_on = gone_on or "tokenizing goes on after" in line
        if not ready and " parameters" in line and "objective" in line:
            ready = passed
        print(f"{passed:8.1f} s  {line.rstrip()}", flush=True)
    process.wait()
    thread.join()
    if options.kill and not gone_on:
        print("it did not go on from where the killed run was")
        return 1, watch, time.monotonic() - began, ready
    return process.returncode, watch, time.monotonic() - began, ready


def main() -> int:
    """Runs it and says whether it passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--limit", type=float, default=2.0, help="GB")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--documents", default="file", choices=["file", "line"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--kill", action="store_true", help="kill a run first, and go on from its token cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file, began = Path(folder) / "text.txt", time.monotonic()
        write(file, options.gigabytes * 1e9, options.seed)
        size = file.stat().st_size
        print(f"{size / 1e9:.2f} GB written in {time.monotonic() - began:.0f} s", flush=True)
        environment = {**os.environ, "LM_CACHE": str(Path(folder) / "cache")}
        if options.kill:
            kill(file, options, environment)
        code, watch, seconds, ready = train(file, options, environment)
    peak = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, *(row[1] for row in watch.rows))
    until = ready or seconds
    before = [row for row in watch.rows if row[0] < until]
    halves = [max((row[2] for row in before if (row[0] < until / 2) == first), default=0) for first in (True, False)]
    for row in before[::max(1, len(before) // 12)]:
        print(f"{row[0]:8.1f} s  resident {row[1] / 1e6:6,.0f} MB, anonymous {row[2] / 1e6:6,.0f} MB")
    passed = code == 0 and peak < options.limit * 1e9 and halves[1] - halves[0] < GROWTH
    print(f"exit code {code}; {size / 1e6 / until:.1f} MB/s until the first step ({until:.0f} s of {seconds:.0f} s); "
          f"peak {peak / 1e6:,.0f} MB of a limit of {options.limit * 1e3:,.0f} MB; anonymous memory at most "
          f"{halves[0] / 1e6:,.0f} MB in the first half, {halves[1] / 1e6:,.0f} MB in the second: "
          f"{'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
