"""Compares the losses of a training run by 1, 2 and 4 processes.

python tests/acceptance/process_counts.py TEXT [--steps 50] [--keep FOLDER]

The runs: data parallel and sharded (FSDP2); resumed with another number of processes; with a
process killed under torchrun. Prints the largest relative difference of a step's loss from the run
by one process; exits with 1 if one is above 1e-5.

All runs are in float32, most with AdamW. Muon orthogonalizes its updates in bfloat16, which turns
differences in the last digit into differences of 1e-3 after 50 steps. So the runs with Muon are
compared with one process that accumulates micro-batches of the size that two processes have; these
losses are equal to the bit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LM = [sys.executable, "-m", "lmcli"]
SETTINGS = (
    "tokenizer.vocab_size=512",
    "train.dropout=0",
    "train.save_every=10",
    "train.eval_every=25",
)
ADAMW = ("--set", "train.optimizer=adamw", "--set", "train.learning_rate=1e-3")
SHARD = ("--shard",)
MAX_DIFFERENCE = 1e-5
# (processes and perhaps --shard) before and after a resume
RESUMES = (
    ((2,), (1,)),
    ((1,), (4,)),
    ((2, *SHARD), (1,)),
    ((1,), (4, *SHARD)),
    ((4, *SHARD), (2,)),
    ((2, *SHARD), (3, *SHARD)),
)


def main() -> int:
    """Prints a row per case; 1 if one differs by more than MAX_DIFFERENCE."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", metavar="FOLDER", help="where the runs stay; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cases = Cases(Path(options.keep or temporary), options.text, options.steps)
        return 0 if cases.run_all() else 1


class Cases:
    """Runs in one folder, with their difference from the run by one process."""

    def __init__(self, folder: Path, text: str, steps: int):
        self.folder, self.text, self.steps, self.passed = folder, text, steps, True
        self.latest = ""  # name of the last run
        folder.mkdir(parents=True, exist_ok=True)

    def run_all(self) -> bool:
        """Runs every case; True if all passed."""
        print(f"{'case':44}{'largest relative difference':>30}{'seconds':>9}")
        self.run("1 process", ADAMW)
        # several processes
        for count in (2, 4):
            seconds = self.run(f"{count}", ADAMW, count)
            self.report(f"{count} processes", seconds, "1 process")
            seconds = self.run(f"{count} shared", (*ADAMW, *SHARD), count)
            self.report(f"{count} processes, sharded", seconds, "1 process")
        checkpointing = (*ADAMW, *SHARD, "--set", "train.recompute=on")
        seconds = self.run("2 again", checkpointing, 2)
        self.report("2, sharded, activation checkpointing", seconds, "1 process")
        self.run("1 process, Muon", ("--set", f"train.micro_batch_tokens={2048 // 2}"))
        self.report("2 processes, Muon", self.run("2 Muon", (), 2), "1 process, Muon")
        # resumed with another number
        for before, after in RESUMES:
            case = " then ".join(
                f"{count}{', sharded,' if shard else ''}" for count, *shard in (before, after)
            )
            self.report(case.removesuffix(","), self.resume(before, after), "1 process")
        # a lost process
        self.report("2 under torchrun, one killed", self.kill_one(), "1 process")
        self.report("the same, sharded", self.kill_one(SHARD), "1 process")
        return self.passed

    def run(self, name: str, options: tuple[str, ...], count: int = 1) -> float:
        """Seconds of a whole run into the folder `name`."""
        started = time.monotonic()
        subprocess.run(
            [*LM, *self.arguments(name, options), "--nproc", str(count)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.latest = name
        return time.monotonic() - started

    def arguments(self, name: str, options: tuple[str, ...]) -> list[str]:
        """The arguments of lm."""
        return [
            *("train", self.text, "-q", "-o", str(self.folder / name)),
            *("--preset", "tiny", "--dtype", "float32"),
            *(word for setting in SETTINGS for word in ("--set", setting)),
            *(*options, "--steps", str(self.steps)),
        ]

    def resume(self, before: tuple, after: tuple) -> float:
        """Seconds of a run that is stopped after its first save and resumed with other processes.

        `before` and `after` are the number of processes, then --shard or nothing.
        """
        name = " to ".join("".join(map(str, option)) for option in (before, after))
        started = time.monotonic()
        process = subprocess.Popen(
            [*LM, *self.arguments(name, ADAMW), "--nproc", *map(str, before)],
            start_new_session=True,
        )
        self.wait_for_save(name, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        subprocess.run(
            [*LM, "train", "-q", "--resume", str(self.folder / name), "--nproc", *map(str, after)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.latest = name
        return time.monotonic() - started

    def kill_one(self, options: tuple[str, ...] = ()) -> float:
        """Seconds of a run under torchrun whose second process is killed after the first save."""
        name, started = f"killed{''.join(options)}", time.monotonic()
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        launcher_options = ("--nproc-per-node=2", "--max-restarts=2", "-m", "lmcli")
        arguments = self.arguments(name, (*ADAMW, *options))
        process = subprocess.Popen(
            [*launcher, *launcher_options, *arguments], stdout=subprocess.DEVNULL
        )
        self.wait_for_save(name, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait(300) == 0
        self.latest = name
        return time.monotonic() - started

    def wait_for_save(self, name: str, process: subprocess.Popen) -> None:
        """Waits for the first save after a step."""
        while not any((self.folder / name).glob("state/step-*[1-9]*")):
            assert process.poll() is None, "it ended before its first save"
            time.sleep(0.02)

    def report(self, case: str, seconds: float, reference: str) -> None:
        """Prints how much the losses of the latest run differ from those of the reference."""
        losses, expected = self.losses(self.latest), self.losses(reference)
        assert len(losses) == len(expected) == self.steps, f"{len(losses)} steps are logged"
        difference = max(abs(loss - other) / other for loss, other in zip(losses, expected))
        passed = difference <= MAX_DIFFERENCE
        self.passed = self.passed and passed
        remark = "" if passed else "   too large"
        print(f"{case:44}{difference:>30.1e}{seconds:>9.0f}{remark}", flush=True)

    def losses(self, name: str) -> list[float]:
        """The losses of all steps; fails unless each step is logged once and in order."""
        rows = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        numbers = [step for step, _ in steps]
        assert numbers == list(range(1, len(steps) + 1)), "steps are missing or logged twice"
        return [loss for _, loss in steps]


if __name__ == "__main__":
    sys.exit(main())
