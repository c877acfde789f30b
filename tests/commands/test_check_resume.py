"""`lm train --check-resume`: one line, success or the first difference; leaves no files."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import lmcli
from lmcli.runs import resume_check
from lmcli.storage import sha256_of, write_tensors

pytestmark = pytest.mark.slow

SMALL = (
    "--preset",
    "tiny",
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "tokenizer.vocab_size=300",
    "--set",
    "train.context=32",
    "--set",
    "train.dropout=0.2",
    "--set",
    "train.sample_every=1000000",
)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text of some rows; temporary files are in a folder of the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20)))
    return path


def test_success_is_one_line_and_leaves_no_files(inside, text, tmp_path):
    done = inside("train", text, *SMALL, "--check-resume", "-o", tmp_path / "run", "--time", "1h")
    assert done.returncode == 0, done.stderr.decode()
    line = done.stdout.decode()
    assert line.startswith(
        "resuming gives the same run to the bit: 20 steps, "
        "and again from step 10 on in a new process; "
    )
    assert (
        line.count("\n") == 1
        and " tensors of weights, " in line
        and "25 lines of metrics, on cpu, " in line
    )
    assert not (tmp_path / "run").exists() and os.listdir(tmp_path / "tmp") == []


def test_the_first_difference_is_named(inside, text, tmp_path, monkeypatch):
    """Other random numbers after resuming, so other dropout."""
    true = resume_check._resume

    def disturbed(folder, device):
        state = folder / "state" / "step-000000010"
        torch.manual_seed(1)
        write_tensors(state / "random.safetensors", {"cpu": torch.get_rng_state()})
        lines = (state / "SHA256SUMS").read_text().splitlines()
        (state / "SHA256SUMS").write_text(
            "".join(
                f"{sha256_of(state / line.split('  ')[1])}  {line.split('  ')[1]}\n"
                for line in lines
            )
        )
        true(folder, device)

    monkeypatch.setattr(resume_check, "_resume", disturbed)
    done = inside("train", text, *SMALL, "--check-resume")
    stderr = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and os.listdir(tmp_path / "tmp") == []
    assert "lm: error: resuming does not give the same run to the bit on cpu, " in stderr
    assert re.search(r"model\.safetensors: \S+, largest difference \d", stderr)


def test_the_error_of_a_failed_process_is_shown(inside, text, monkeypatch):
    failed = subprocess.CompletedProcess((), 1, "", "lm: error: no\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    done = inside("train", text, *SMALL, "--check-resume")
    assert (
        done.returncode == 1
        and b"resuming failed in a new process (exit code 1): lm: error: no" in done.stderr
    )


def test_every_kind_of_difference_is_detected(tmp_path):
    for name in ("one", "other"):
        state = tmp_path / name / "state" / "step-000000020"
        state.mkdir(parents=True)
        write_tensors(
            tmp_path / name / "model.safetensors",
            {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0])},
        )
        write_tensors(state / "weights.safetensors", {"a": torch.tensor([1.0])})
        (state / "counters.json").write_text(
            json.dumps({"rows": 5, "seconds": 1.0 if name == "one" else 2.0})
        )
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "elapsed": 1}\n')
    folders = tmp_path / "one", tmp_path / "other"
    assert list(resume_check.differences(*folders)) == []  # the clock may go on
    other = folders[1]
    state = other / "state" / "step-000000020"
    write_tensors(
        other / "model.safetensors", {"a": torch.tensor([-0.0, 1.5]), "b": torch.tensor([1.0, 1.0])}
    )
    write_tensors(state / "weights.safetensors", {"c": torch.tensor([1.0])})
    (state / "counters.json").write_text('{"rows": 6, "seconds": 2.0}')
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
    differences = list(resume_check.differences(*folders))
    assert differences == [
        "model.safetensors: a, largest difference 0.5",
        "model.safetensors: b is torch.float32 (1,), resumed torch.float32 (2,)",
        "state/step-000000020/weights.safetensors: tensors in only one of the runs: a, c",
        "state/step-000000020/counters.json, line 1: rows is 5, resumed 6",
        "metrics.jsonl: 1 lines in the whole run, 2 resumed",
        "metrics.jsonl, line 1: loss is 2.0, resumed 2.5",
    ]
    # a sign is a bit as well
    write_tensors(
        other / "model.safetensors", {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor([1.0])}
    )
    assert next(resume_check.differences(*folders)) == "model.safetensors: a, largest difference 0"


def test_it_excludes_resume(inside):
    done = inside("train", "--resume", "run", "--check-resume")
    assert done.returncode == 2 and b"--resume and --check-resume exclude each other" in done.stderr


def test_the_new_process_imports_the_same_package(monkeypatch, tmp_path):
    environments = []

    def run(command, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(resume_check.subprocess, "run", run)
    resume_check._resume(tmp_path, "cpu")
    folder = Path(environments[0]["PYTHONPATH"].split(os.pathsep)[0])
    assert (folder / "lmcli" / "__init__.py").samefile(lmcli.__file__)
