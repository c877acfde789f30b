"""Three plans of `lm plan` beside what `lm train` then took: memory within 15 % and time within 20 %, or exit 1.

python tests/benchmarks/plan_against_reality.py [--text FILE] [--scale 1.0] [--nproc 1 --nproc 2]; about three minutes on
two cores. Memory is the most that the process of `lm train` had resident (ru_maxrss), of several the one that had most;
time is its wall clock.
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
MEMORY_WITHIN, TIME_WITHIN = 0.15, 0.20
LARGE = ("model.hidden_size=512", "model.num_hidden_layers=8", "model.num_attention_heads=8", "train.context=512")
# name → (preset, settings, steps): short runs, that evaluate on little text
CASES = {"tiny": ("tiny", (), 240), "small": ("small", (), 50),
         "8 × 512": ("small", (*LARGE, "train.validation_bytes=10000"), 6)}
PEAK_IN = 1 if sys.platform == "darwin" else 1024  # macOS tells ru_maxrss in bytes


def options(case, scale, processes):
    """The options that `lm plan` and `lm train` share."""
    preset, sets, steps = case
    return ["--preset", preset, "--steps", str(max(2, round(scale * steps))), "-q", "--nproc", str(processes),
            *(word for setting in sets for word in ("--set", setting))]


def planned(text, arguments):
    """What lm plan says, as a dict."""
    done = subprocess.run([sys.executable, "-m", "lmcli", "plan", str(text), *arguments, "--json"], check=True,
                          capture_output=True, cwd=ROOT)
    return json.loads(done.stdout)


def happened(text, arguments, folder):
    """(bytes, seconds) that lm train took; its token cache is empty."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lmcli", "train", str(text), "-o", str(folder / "run"), *arguments],
                               stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "LM_CACHE": str(folder)})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"lm train failed ({status})")
    return PEAK_IN * used.ru_maxrss, time.monotonic() - started


def compared(text, name, scale, processes):
    """Prints a row: what was planned for a case, and what came of it. Returns whether that is near enough."""
    arguments = options(CASES[name], scale, processes)
    plan = planned(text, arguments)
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(os.environ.get("LM_CACHE", Path.home() / ".cache" / "lm")) / "kernels"
        if kernels.is_dir():  # those are compiled once a machine, not once a run
            (Path(folder) / "kernels").symlink_to(kernels)
        memory, seconds = happened(text, arguments, Path(folder))
    off = plan["memory"] / memory - 1, plan["seconds"] / seconds - 1
    print(f"{name:8} {processes:9} {plan['memory'] / 1e6:18,.0f} {memory / 1e6:9,.0f} {off[0]:+6.1%} "
          f"{plan['seconds']:17,.1f} {seconds:9,.1f} {off[1]:+6.1%}", flush=True)
    return abs(off[0]) <= MEMORY_WITHIN and abs(off[1]) <= TIME_WITHIN


def main():
    """Prints a row a case and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "stories.txt")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one")
    parser.add_argument("--nproc", type=int, action="append", help="processes that share this machine; 1 unless given")
    chosen = parser.parse_args()
    print("case     processes memory MB: planned  measured   off   seconds: planned  measured   off")
    good = [compared(chosen.text, name, chosen.scale, processes)
            for name in chosen.case or CASES for processes in chosen.nproc or [1]]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
