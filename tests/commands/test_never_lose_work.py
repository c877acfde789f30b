"""What keeps a run's work, as a shell sees it: its own folder, its best model, and nothing changed behind its back."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from lmcli import runs
from lmcli.storage import sha256_of
from lmcli.training import state

SMALL = ("--preset", "tiny", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1",
         "--set", "tokenizer.vocab_size=300", "--set", "train.context=32", "--set", "train.batch_tokens=128")


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
    found = file.read_text()
    assert old in found
    file.write_text(found.replace(old, new, 1))


def test_what_changed_is_named_and_refused_until_it_is_allowed(inside, text, tmp_path):
    folder = tmp_path / "run"
    data = trained(inside, text, folder, "--steps", 4)
    replaced(data, "baker", "miller")
    replaced(folder / "recipe.yaml", "  steps: 4\n", "  steps: 6\n")
    replaced(folder / "recipe.yaml", "  learning_rate: 0.01\n", "  learning_rate: 0.02\n")
    torch = re.search(r"\n  torch: (.*)\n", (folder / "recipe.yaml").read_text())[1]
    replaced(folder / "recipe.yaml", f"  torch: {torch}\n", "  torch: 1.2.3\n")
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    done = inside("train", "--resume", folder)
    told = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert told[-2].startswith(f"lm: error: {folder}: is not as it was when it was saved: train.steps 4 → 6; ")
    sums = r" \(SHA-256\) \w{12} → \w{12}; "
    assert re.search(f"; {re.escape(str(data))}{sums}tokenizer.json{sums}", told[-2])
    assert told[-2].endswith(f"; torch 1.2.3 → {torch}") and "learning_rate" not in told[-2]
    assert "--allow-changes" in told[-1]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    done = inside("train", "--resume", folder, "--allow-changes")
    told = done.stderr.decode()
    assert done.returncode == 0, told
    for what in ("train.steps 4 → 6", f"torch 1.2.3 → {torch}", "train.learning_rate 0.01 → 0.02"):
        assert f"changed: {what}" in told
    assert sorted(path.name for path in (folder / "state").iterdir())[-1] == "step-000000006"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row or "val_bits_per_byte" in row] == [1, 2, 3, 4, 5, 6]
    done = inside("train", "--resume", folder)  # now it is that run
    assert done.returncode == 0 and b"changed: " not in done.stderr


def test_a_state_does_not_fit_another_model_whatever_is_allowed(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    replaced(tmp_path / "run" / "recipe.yaml", "  hidden_size: 32\n", "  hidden_size: 64\n")
    done = inside("train", "--resume", tmp_path / "run", "--allow-changes")
    assert done.returncode == 1 and b"its state is not one of model.hidden_size 32 \xe2\x86\x92 64" in done.stderr


def test_a_finished_run_goes_on_when_it_is_given_more_steps(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    done = inside("train", "--resume", tmp_path / "run", "--allow-changes", "--set", "train.steps=3")
    assert done.returncode == 0 and "changed: train.steps 2 → 3" in done.stderr.decode()
    assert "at step 3 of 3" in done.stderr.decode()
    done = inside("train", "--resume", tmp_path / "run", "--allow-changes", "--set", "train.optimizer=adamw")
    assert done.returncode == 1 and b"its state is not one of train.optimizer" in done.stderr


def test_allow_changes_goes_with_resume(inside, text):
    done = inside("train", text, "--allow-changes")
    assert done.returncode == 2 and b"--allow-changes goes with --resume" in done.stderr


def test_other_threads_are_told_and_go_on(inside, text, tmp_path):
    trained(inside, text, tmp_path / "run", "--steps", 2)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(re.sub(r"cpu, \d+ threads", "cpu, 77 threads", recipe.read_text()))
    done = inside("train", "--resume", tmp_path / "run")
    assert done.returncode == 0 and b"goes on elsewhere, so not the same to the bit: cpu, 77 threads" in done.stderr


def test_the_best_model_is_that_of_the_state_that_is_gone_on_from(inside, text, tmp_path, monkeypatch):
    """Killed after an evaluation and before the next state: the weights there are of a step that is yet to be made."""
    options = ("--steps", 10, "--set", "train.eval_every=2", "--set", "train.save_every=5")
    folder, true = tmp_path / "run", runs.TrainingRun._save

    def killed(run):
        if run.step == 10:
            raise KeyboardInterrupt
        true(run)
    with monkeypatch.context() as patched:
        patched.setattr(runs.TrainingRun, "_save", killed)
        done = inside("train", text, *SMALL, *options, "-o", folder)
    assert done.returncode == 130
    saved = state.newest(folder / "state", pytest.fail)
    assert (saved.counters.step, saved.counters.best_step) == (5, 4)
    assert sha256_of(folder / "model.safetensors") != saved.beside.best_sha256 == sha256_of(saved.best)
    assert "best_step: 10" in (folder / "recipe.yaml").read_text()

    run = runs.resume(str(folder), "cpu", 0, time.monotonic(), lambda text: None)
    run.place.release()
    assert sha256_of(folder / "model.safetensors") == saved.beside.best_sha256
    assert "best_step: 4" in (folder / "recipe.yaml").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]


def test_a_run_in_use_is_refused_in_one_line_and_a_dead_ones_lock_is_not(inside, environment, text, tmp_path):
    folder = tmp_path / "run"
    trained(inside, text, folder, "--steps", 2)
    assert not (folder / ".lock").exists()
    holding = "import sys, pathlib\nfrom lmcli.training.lock import Lock\nheld = Lock(pathlib.Path(sys.argv[1]))\n" \
              "print(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holding, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=environment) as process:
        process.stdout.readline()
        for arguments in (("--resume", folder), (text, *SMALL, "--steps", 2, "-o", folder, "--overwrite")):
            done = inside("train", *arguments)
            assert done.returncode == 1 and len(done.stderr.decode().splitlines()) == 1
            assert f"{folder}: process {process.pid} on " in done.stderr.decode()
        assert inside("perplexity", "-m", folder, "--validation").returncode == 0  # reading is free
        process.kill()
    assert (folder / ".lock").exists()
    assert inside("train", "--resume", folder).returncode == 0
    assert not (folder / ".lock").exists()


def test_a_disk_that_is_full_is_told_once_and_what_was_saved_goes_on(inside, text, tmp_path, monkeypatch):
    options = ("--steps", 20, "--set", "train.dropout=0.1")
    assert inside("train", text, *SMALL, *options, "-o", tmp_path / "whole").returncode == 0
    folder, true = tmp_path / "run", state.require_room

    def full(path, needed):
        true(path, needed if not any(path.glob("step-*8")) else 1 << 60)
    with monkeypatch.context() as patched:
        patched.setattr(state, "require_room", full)
        done = inside("train", text, *SMALL, *options, "-o", folder)
    told = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and told.count("lm: error: ") == 1 and "no room on the disk" in told
    assert f"lm train --resume {folder} goes on from it" in told.splitlines()[-1]
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-000000005", "step-000000008"]
    assert not (folder / ".lock").exists() and not list(folder.rglob("*.part"))
    assert inside("train", "--resume", folder).returncode == 0
    for name in ("model.safetensors", "state/step-000000020/weights.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(folder)
