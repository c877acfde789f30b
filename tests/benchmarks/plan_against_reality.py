"""Compares plans of `lm plan` with the memory and time that `lm train` then takes.

python tests/benchmarks/plan_against_reality.py [--text FILE] [--scale 1.0] [--case NAME]
    [--nproc 1 --nproc 2]

Three cases, about three minutes on two cores. Memory is the peak that the process of `lm train` has
resident (ru_maxrss), of several processes the largest one; time is the wall clock. Exits with 1
unless memory is within 15 % and time within 20 % of the plan.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.20
LARGE = (
    "model.hidden_size=512",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "train.context=512",
)
# name → (preset, settings, steps): short runs that evaluate on little text
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "tiny": ("tiny", (), 240),
    "small": ("small", (), 50),
    "8 × 512": ("small", (*LARGE, "train.validation_bytes=10000"), 6),
}
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


def case_options(name: str, scale: float, processes: int) -> list[str]:
    """The options that `lm plan` and `lm train` share."""
    preset, settings, steps = CASES[name]
    return [
        *("--preset", preset, "--steps", str(max(2, round(scale * steps))), "-q"),
        *("--nproc", str(processes)),
        *(word for setting in settings for word in ("--set", setting)),
    ]


def plan(text: Path, arguments: list[str]) -> dict:
    """The plan that `lm plan` prints."""
    command = [sys.executable, "-m", "lmcli", "plan", str(text), *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)


def train(text: Path, arguments: list[str], folder: Path) -> tuple[float, float]:
    """(bytes, seconds) that `lm train` takes with an empty token cache."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcli", "train", str(text), "-o", str(folder / "run"), *arguments],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "LM_CACHE": str(folder)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"lm train failed ({status})")
    return MAXRSS_BYTES * usage.ru_maxrss, time.monotonic() - started


def compare(text: Path, name: str, scale: float, processes: int) -> bool:
    """Prints planned and measured figures of a case; True if both are within the tolerance."""
    arguments = case_options(name, scale, processes)
    planned = plan(text, arguments)
    with tempfile.TemporaryDirectory() as folder:
        # kernels are compiled once per machine, not once per run
        kernels = Path(os.environ.get("LM_CACHE", Path.home() / ".cache" / "lm")) / "kernels"
        if kernels.is_dir():
            (Path(folder) / "kernels").symlink_to(kernels)
        memory, seconds = train(text, arguments, Path(folder))
    memory_error, time_error = planned["memory"] / memory - 1, planned["seconds"] / seconds - 1
    print(
        f"{name:8} {processes:9} {planned['memory'] / 1e6:18,.0f} {memory / 1e6:9,.0f} "
        f"{memory_error:+6.1%} {planned['seconds']:17,.1f} {seconds:9,.1f} {time_error:+6.1%}",
        flush=True,
    )
    return abs(memory_error) <= MEMORY_TOLERANCE and abs(time_error) <= TIME_TOLERANCE


def main() -> int:
    """Prints a row per case and number of processes; 1 if a plan is not within the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "stories.txt")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one")
    parser.add_argument(
        "--nproc", type=int, action="append", help="processes on this machine; default 1"
    )
    options = parser.parse_args()
    print(
        "case     processes memory MB: planned  measured error   seconds: planned  measured  error"
    )
    passed = [
        compare(options.text, name, options.scale, processes)
        for name in options.case or CASES
        for processes in options.nproc or [1]
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
