"""Measures the memory of training on texts of many lengths, to show whether it grows.

python tests/benchmarks/memory_of_many_shapes.py PAIRS.jsonl [--preset translate] [--steps 200]

Linux only. Wanted: as much in the last quarter of the run as in the second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident(process: int) -> float:
    """MB that a process holds now."""
    fields = Path(f"/proc/{process}/status").read_text(encoding="utf-8").split("VmRSS:")[1]
    return int(fields.split()[0]) / 1000


def measure(pairs: Path, preset: str, steps: int, folder: Path) -> tuple[list[float], float]:
    """(MB held at every second, seconds) of a run of so many steps."""
    command = [
        *(sys.executable, "-m", "lmcli", "train", str(pairs), "--preset", preset),
        *("--steps", str(steps), "-q", "-o", str(folder / "model"), "--overwrite"),
    ]
    held, started = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(1)
            try:
                held.append(resident(process.pid))
            except (OSError, IndexError):  # it has ended
                break
        if process.wait():
            sys.exit(f"failed: {' '.join(command)}")
    return held, time.monotonic() - started


def main() -> None:
    """Prints the most that was held in each quarter of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--preset", default="translate")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        held, seconds = measure(arguments.pairs, arguments.preset, arguments.steps, Path(name))
    print(f"{arguments.steps} steps, {seconds:.0f} s")
    for quarter in range(4):
        part = held[len(held) * quarter // 4 : len(held) * (quarter + 1) // 4]
        print(f"quarter {quarter + 1}: at most {max(part, default=0):,.0f} MB")


if __name__ == "__main__":
    main()
