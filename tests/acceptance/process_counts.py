"""The same training run by 1, 2 and 4 processes, gone on with by other numbers of them, and with one killed under torchrun;
by processes that hold all of the model each (data parallel), and by such that share it out (FSDP2).

python tests/acceptance/process_counts.py TEXT [--steps 50] [--keep FOLDER]

In float32, with AdamW; compared are the losses of all steps, as the largest relative difference from one process's. Muon
makes its updates orthogonal in bfloat16, which turns differences of the last digit into such of 1e-3 after 50 steps; where
one process adds up micro-batches of the size that two have, these are equal to the bit with it, too.
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
SETTINGS = ("--preset", "tiny", "--dtype", "float32", "--set", "tokenizer.vocab_size=512", "--set", "train.dropout=0",
            "--set", "train.save_every=10", "--set", "train.eval_every=25")
ADAMW = ("--set", "train.optimizer=adamw", "--set", "train.learning_rate=1e-3")
SHARED = ("--shard",)
MOST = 1e-5


def main() -> int:
    """Prints a row a case; 1 when one is further off than MOST."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", metavar="FOLDER", help="where runs are left; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        cases = Cases(Path(options.keep or room), options.text, options.steps)
        return 0 if cases.all() else 1


class Cases:
    """Runs, and how far each is from that of one process."""

    def __init__(self, room: Path, text: str, steps: int):
        self.room, self.text, self.steps, self.good = room, text, steps, True
        room.mkdir(parents=True, exist_ok=True)

    def all(self) -> bool:
        """Every case; whether all are good."""
        print(f"{'case':44}{'largest relative difference':>30}{'seconds':>9}")
        self.run("1 process", ADAMW)
        for count in (2, 4):
            self.told(f"{count} processes", self.run(f"{count}", ADAMW, count), "1 process")
            self.told(f"{count} processes, shared out", self.run(f"{count} shared", (*ADAMW, *SHARED), count), "1 process")
        again = ("--set", "train.recompute=on")
        self.told("2, shared out, activations again", self.run("2 again", (*ADAMW, *SHARED, *again), 2), "1 process")
        self.run("1 process, Muon", ("--set", f"train.micro_batch_tokens={2048 // 2}"))
        self.told("2 processes, Muon", self.run("2 Muon", (), 2), "1 process, Muon")
        for before, after in (((2,), (1,)), ((1,), (4,)), ((2, *SHARED), (1,)), ((1,), (4, *SHARED)), ((4, *SHARED), (2,)),
                              ((2, *SHARED), (3, *SHARED))):
            case = " then ".join(f"{count}{', shared out,' if how else ''}" for count, *how in (before, after))
            self.told(case.removesuffix(","), self.stopped(before, after), "1 process")
        self.told("2 under torchrun, one killed", self.killed(), "1 process")
        self.told("the same, shared out", self.killed(SHARED), "1 process")
        return self.good

    def run(self, name: str, settings: tuple[str, ...], count: int = 1) -> float:
        """Seconds of a whole run into the folder `name`."""
        started = time.monotonic()
        subprocess.run([*LM, *self.command(name, settings), "--nproc", str(count)], check=True, stdout=subprocess.DEVNULL)
        self.latest = name
        return time.monotonic() - started

    def command(self, name: str, settings: tuple[str, ...]) -> list[str]:
        """The arguments of lm."""
        return ["train", self.text, "-q", "-o", str(self.room / name), *SETTINGS, *settings, "--steps", str(self.steps)]

    def stopped(self, before: tuple, after: tuple) -> float:
        """A run by `before` processes (how many, and how), told to stop after its first save, that `after` go on with."""
        name, started = " to ".join("".join(map(str, one)) for one in (before, after)), time.monotonic()
        process = subprocess.Popen([*LM, *self.command(name, ADAMW), "--nproc", *map(str, before)], start_new_session=True)
        self.wait_for_a_state(name, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        subprocess.run([*LM, "train", "-q", "--resume", str(self.room / name), "--nproc", *map(str, after)],
                       check=True, stdout=subprocess.DEVNULL)
        self.latest = name
        return time.monotonic() - started

    def killed(self, how: tuple[str, ...] = ()) -> float:
        """A run under torch's elastic launcher, of which the second process is killed after the first save."""
        name, started = f"killed{''.join(how)}", time.monotonic()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2",
                    "-m", "lmcli"]
        process = subprocess.Popen([*launcher, *self.command(name, (*ADAMW, *how))],
                                   stdout=subprocess.DEVNULL)
        self.wait_for_a_state(name, process)
        os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]), signal.SIGKILL)
        assert process.wait(300) == 0
        self.latest = name
        return time.monotonic() - started

    def wait_for_a_state(self, name: str, process: subprocess.Popen) -> None:
        """Waits for the first save after a step."""
        while not any((self.room / name).glob("state/step-*[1-9]*")):
            assert process.poll() is None, "it ended before its first save"
            time.sleep(0.02)

    def told(self, case: str, seconds: float, reference: str) -> None:
        """Prints how far the losses of the latest run are from those of another."""
        ours, theirs = (self.losses(name) for name in (self.latest, reference))
        assert len(ours) == len(theirs) == self.steps, f"{len(ours)} steps are logged"
        apart = max(abs(one - other) / other for one, other in zip(ours, theirs))
        self.good = self.good and apart <= MOST
        print(f"{case:44}{apart:>30.1e}{seconds:>9.0f}{'' if apart <= MOST else '   too far'}", flush=True)

    def losses(self, name: str) -> list[float]:
        """Those of all steps, each logged once and in order."""
        rows = map(json.loads, (self.room / name / "metrics.jsonl").read_text().splitlines())
        steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        assert [step for step, _ in steps] == list(range(1, len(steps) + 1)), "steps are missing or logged twice"
        return [loss for _, loss in steps]


if __name__ == "__main__":
    sys.exit(main())
