"""lm train --nproc: several processes train the same model, also after kills and stops; --shard."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = (
    "--preset",
    "tiny",
    "--dtype",
    "float32",
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "tokenizer.vocab_size=300",
    "--set",
    "train.context=32",
    "--set",
    "train.batch_tokens=256",
    "--set",
    "train.dropout=0",
    "--set",
    "train.optimizer=adamw",
    "--set",
    "train.save_every=4",
    "--set",
    "train.eval_every=8",
    "--set",
    "train.averaging=0.6",
    "--set",
    "train.sample_every=1000000",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("team") / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def alone(lm, text, tmp_path_factory) -> list[float]:
    """The losses of 24 steps with one process, and of averaged weights on the validation set."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert lm("train", text, "-o", folder, *SMALL, "--steps", 24).returncode == 0
    return losses(folder)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))  # no gap, none twice
    return [row["loss"] for row in steps] + [row["val_loss"] for row in rows if "val_loss" in row]


@pytest.fixture
def started(environment):
    """started(*arguments): `lm` in its own session, so a signal to its group acts as Ctrl-C."""
    processes = []

    def start(*arguments) -> subprocess.Popen:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "lmcli", *map(str, arguments)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_a_state(folder: Path, process: subprocess.Popen) -> None:
    """Waits until a state has been saved after the first steps."""
    until = time.monotonic() + 90
    while not any(folder.glob("state/step-*[1-9]*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def members(process: subprocess.Popen) -> list[int]:
    """The process ids of the group, the leader's first."""
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
@pytest.mark.parametrize(
    "which, how", [(0, ()), (1, ()), (1, ("--shard",))], ids=["leader", "worker", "sharded worker"]
)
def test_a_run_restarts_from_the_last_state_when_a_process_is_killed(
    started, text, tmp_path, alone, which, how
):
    process = started(
        "train", text, "-o", tmp_path / "run", *SMALL, "--steps", 24, "--nproc", 2, *how
    )
    wait_for_a_state(tmp_path / "run", process)
    os.kill(members(process)[which], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (
        f"process {which} of 2 was killed by SIGKILL: restarting all from the last state (1 of 3)"
        in err
    )
    assert "going on after step" in err and out == f"{tmp_path / 'run'}\n"
    assert "error" not in err and "--resume" not in err  # nothing is left to do
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    "how, onward",
    [((), ()), (("--shard",), ()), ((), ("--nproc", 3, "--shard"))],
    ids=["replicated to one", "sharded to one", "replicated to three shards"],
)
def test_ctrl_c_saves_and_another_number_of_processes_resumes(
    started, lm, inside, text, tmp_path, alone, how, onward
):
    process = started(
        "train", text, "-o", tmp_path / "run", *SMALL, "--steps", 24, "--nproc", 2, *how
    )
    wait_for_a_state(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and f"lm train --resume {tmp_path / 'run'}" in err
    assert "Traceback" not in err and 0 < len(losses(tmp_path / "run")) < 24
    shards = list(tmp_path.glob("run/state/step-*[1-9]*/shard-*.safetensors"))
    assert bool(shards) == bool(how)
    assert (lm if onward else inside)(
        "train", "--resume", tmp_path / "run", *onward
    ).returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    assert inside("perplexity", "-m", tmp_path / "run", text).returncode == 0


@pytest.mark.parametrize("how", [(), ("--shard",)], ids=["replicated", "sharded"])
def test_divergence_is_reported_once(lm, text, tmp_path, how):
    done = lm(
        "train",
        text,
        "-o",
        tmp_path / "run",
        *SMALL,
        "--steps",
        30,
        "--set",
        "train.learning_rate=1e4",
        "--set",
        "train.gradient_clip=0",
        "--set",
        "train.warmup=0",
        "--nproc",
        2,
        *how,
    )
    assert done.returncode == 1 and done.stderr.decode().count("has exploded") == 1
    assert "Traceback" not in done.stderr.decode()


def test_shard_needs_several_processes(inside, text, tmp_path):
    done = inside("train", text, "-o", tmp_path / "run", *SMALL, "--steps", 1, "--shard")
    assert done.returncode == 2 and b"--nproc" in done.stderr and not (tmp_path / "run").exists()


def test_a_user_error_is_printed_once_and_not_retried(lm, inside, tmp_path):
    done = lm("train", tmp_path / "nothing.txt", "-o", tmp_path / "run", "--nproc", 2)
    assert (
        done.returncode
        == inside("train", tmp_path / "nothing.txt", "-o", tmp_path / "run").returncode
    )
    assert (
        done.stderr.decode().count("nothing.txt") == 1 and "Traceback" not in done.stderr.decode()
    )
    assert not (tmp_path / "run").exists()
