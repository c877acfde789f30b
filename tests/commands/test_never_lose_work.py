"""No work is lost: run folders, locks, the best model, and changes that resuming refuses."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from small_runs import SMALL

from lmcli.runs.resume import ResumeRequest, resume
from lmcli.runs.run_record import RunRecord
from lmcli.storage import sha256_of
from lmcli.training import resume_state


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20)))
    return path


def trained(inside, text, folder, *options):
    copy = folder.with_suffix(".txt")
    copy.write_bytes(text.read_bytes())
    done = inside("train", copy, *SMALL, "-o", folder, *options)
    assert done.returncode == 0, done.stderr.decode()
    return copy


def replaced(file, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


def test_changes_are_named_and_refused_without_allow_changes(inside, text, tmp_path):
    folder = tmp_path / "run"
    data = trained(inside, text, folder, "--steps", 4, "--set", "train.eval_every=1")
    replaced(data, "baker", "miller")
    replaced(folder / "recipe.yaml", "  steps: 4\n", "  steps: 6\n")
    replaced(folder / "recipe.yaml", "  learning_rate: 0.01\n", "  learning_rate: 0.02\n")
    torch = re.search(r"\n  torch: (.*)\n", (folder / "recipe.yaml").read_text())[1]
    replaced(folder / "recipe.yaml", f"  torch: {torch}\n", "  torch: 1.2.3\n")
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    done = inside("train", "--resume", folder)
    stderr = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert stderr[-2].startswith(
        f"lm: error: {folder}: has changed since it was saved: train.steps 4 → 6; "
    )
    sums = r" \(SHA-256\) \w{12} → \w{12}; "
    assert re.search(f"; {re.escape(str(data))}{sums}tokenizer.json{sums}", stderr[-2])
    assert stderr[-2].endswith(f"; torch 1.2.3 → {torch}") and "learning_rate" not in stderr[-2]
    assert "--allow-changes" in stderr[-1]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    done = inside("train", "--resume", folder, "--allow-changes")
    stderr = done.stderr.decode()
    assert done.returncode == 0, stderr
    for what in ("train.steps 4 → 6", f"torch 1.2.3 → {torch}", "train.learning_rate 0.01 → 0.02"):
        assert f"changed: {what}" in stderr
    assert sorted(path.name for path in (folder / "state").iterdir())[-1] == "step-000000006"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row or "val_bits_per_byte" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    done = inside("train", "--resume", folder)  # now it is that run
    assert done.returncode == 0 and b"changed: " not in done.stderr


def test_a_state_never_fits_another_model(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    replaced(tmp_path / "run" / "recipe.yaml", "  hidden_size: 32\n", "  hidden_size: 64\n")
    done = inside("train", "--resume", tmp_path / "run", "--allow-changes")
    assert (
        done.returncode == 1
        and b"this state was saved with other settings: model.hidden_size 32 \xe2\x86\x92 64"
        in done.stderr
    )


def test_a_finished_run_continues_with_more_steps(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    done = inside(
        "train", "--resume", tmp_path / "run", "--allow-changes", "--set", "train.steps=3"
    )
    assert done.returncode == 0 and "changed: train.steps 2 → 3" in done.stderr.decode()
    assert "at step 3 of 3" in done.stderr.decode()
    done = inside(
        "train", "--resume", tmp_path / "run", "--allow-changes", "--set", "train.optimizer=adamw"
    )
    assert (
        done.returncode == 1
        and b"this state was saved with other settings: train.optimizer" in done.stderr
    )


def test_allow_changes_needs_resume(inside, text):
    done = inside("train", text, "--allow-changes")
    assert done.returncode == 2 and b"--allow-changes needs --resume" in done.stderr


def test_another_number_of_threads_only_has_a_note(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(re.sub(r"cpu, \d+ threads?", "cpu, 77 threads", recipe.read_text()))
    done = inside("train", "--resume", tmp_path / "run")
    assert (
        done.returncode == 0
        and b"goes on elsewhere, so not the same to the bit: cpu, 77 threads" in done.stderr
    )


def test_the_best_model_is_that_of_the_resumed_state(inside, text, tmp_path, monkeypatch):
    """Killed after an evaluation and before the next state: the weights are ahead of the state."""
    options = ("--steps", 10, "--set", "train.eval_every=2", "--set", "train.save_every=5")
    folder, true = tmp_path / "run", RunRecord.save_state

    def killed(record, train_step):
        if train_step.counters.step == 10:
            raise KeyboardInterrupt
        true(record, train_step)

    with monkeypatch.context() as patched:
        patched.setattr(RunRecord, "save_state", killed)
        done = inside("train", text, *SMALL, *options, "-o", folder)
    assert done.returncode == 130
    saved = resume_state.newest(folder / "state", pytest.fail)
    assert (saved.counters.step, saved.counters.best_step) == (5, 4)
    assert (
        sha256_of(folder / "model.safetensors")
        != saved.metadata.best_sha256
        == sha256_of(saved.best_weights)
    )
    assert "best_step: 10" in (folder / "recipe.yaml").read_text()

    run = resume(ResumeRequest(folder, "cpu", 0), time.monotonic(), lambda text: None)
    run.record.folder.release()
    assert sha256_of(folder / "model.safetensors") == saved.metadata.best_sha256
    assert "best_step: 4" in (folder / "recipe.yaml").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]


def test_a_run_in_use_is_refused_and_a_dead_lock_is_not(inside, environment, text, tmp_path):
    folder = tmp_path / "run"
    trained(inside, text, folder, "--steps", 2)
    assert not (folder / ".lock").exists()
    holding = (
        "import sys, pathlib\nfrom lmcli.runs.run_folder import Lock\n"
        "lock = Lock(pathlib.Path(sys.argv[1]))\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        process.stdout.readline()
        for arguments in (
            ("--resume", folder),
            (text, *SMALL, "--steps", 2, "-o", folder, "--overwrite"),
        ):
            done = inside("train", *arguments)
            assert done.returncode == 1 and len(done.stderr.decode().splitlines()) == 1
            assert f"{folder}: process {process.pid} on " in done.stderr.decode()
        assert inside("perplexity", "-m", folder, "--validation").returncode == 0  # reading is free
        process.kill()
    assert (folder / ".lock").exists()
    assert inside("train", "--resume", folder).returncode == 0
    assert not (folder / ".lock").exists()


def test_a_full_disk_is_reported_once_and_the_run_can_be_resumed(
    inside, text, tmp_path, monkeypatch
):
    options = ("--steps", 20, "--set", "train.dropout=0.1")
    assert inside("train", text, *SMALL, *options, "-o", tmp_path / "whole").returncode == 0
    folder, true = tmp_path / "run", resume_state.require_disk_space

    def full(path, needed):
        true(path, needed if not any(path.glob("step-*8")) else 1 << 60)

    with monkeypatch.context() as patched:
        patched.setattr(resume_state, "require_disk_space", full)
        done = inside("train", text, *SMALL, *options, "-o", folder)
    stderr = done.stderr.decode()
    assert (
        done.returncode == 1
        and done.stdout == b""
        and stderr.count("lm: error: ") == 1
        and "the disk is full" in stderr
    )
    assert f"lm train --resume {folder} goes on from them" in stderr.splitlines()[-1]
    assert sorted(path.name for path in (folder / "state").iterdir()) == [
        "step-000000005",
        "step-000000008",
    ]
    assert not (folder / ".lock").exists() and not list(folder.rglob("*.part"))
    assert inside("train", "--resume", folder).returncode == 0
    for name in ("model.safetensors", "state/step-000000020/weights.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(folder)
