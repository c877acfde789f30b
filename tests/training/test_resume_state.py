"""States on disk: checksums, damage, full disks, and how many are kept."""

import os
import subprocess
import sys

import pytest
import torch

from lmcli import storage
from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.kernels.fast_path import build_model
from lmcli.training import optimizers, resume_state

TINY = ModelConfig(
    vocab_size=40,
    max_position_embeddings=16,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
).complete()


@pytest.fixture
def parts():
    """(model, optimizer) after one update, so that there are moments."""
    model = build_model(TINY)
    model.initialize(0)
    optimizer = optimizers.build(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def states(tmp_path, parts):
    """A folder with the states of steps 1 and 2."""
    for step in (1, 2):
        resume_state.save(tmp_path, resume_state.Counters(step=step), *parts)
    return tmp_path


def damage(file, how: str) -> None:
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-10])
    else:  # one bit
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def test_sha256sum_reads_the_checksums(states):
    newest = states / "step-000000002"
    sums = dict(
        reversed(line.split("  "))
        for line in (newest / resume_state.CHECKSUMS).read_text().splitlines()
    )
    assert sums.keys() == {
        "weights.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "counters.json",
    }
    assert all(storage.sha256_of(newest / name) == sha256 for name, sha256 in sums.items())


@pytest.mark.parametrize("how", ["cut", "bit", "gone"])
@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "counters.json",
        resume_state.CHECKSUMS,
    ],
)
def test_damage_to_the_newest_is_named_and_the_one_before_is_taken(states, name, how):
    damage(states / "step-000000002" / name, how)
    notes = []
    assert resume_state.newest(states, notes.append).counters.step == 1
    (note,) = notes
    assert (
        note.startswith(f"{states}/step-000000002: ")
        and name in note
        and note.endswith("the state before it is taken")
    )


def test_an_extra_file_is_damage_too(states):
    (states / "step-000000002" / "best.safetensors").write_bytes(b"of another state")
    notes = []
    assert (
        resume_state.newest(states, notes.append).counters.step == 1
        and "best.safetensors is damaged" in notes[0]
    )


def test_when_all_are_damaged_each_is_named(states):
    damage(states / "step-000000002" / "weights.safetensors", "bit")
    damage(states / "step-000000001" / "optimizer.safetensors", "gone")
    with pytest.raises(UserError) as caught:
        resume_state.newest(states, pytest.fail)
    first, hint = str(caught.value).splitlines()
    assert "step-000000002: weights.safetensors is damaged: its SHA-256 is not" in first
    assert (
        "step-000000001: optimizer.safetensors, which SHA256SUMS names, is missing; "
        "no other state is left" in first
    )
    assert "--from" in hint and "--overwrite" in hint


def test_the_metadata_of_a_state_comes_back(tmp_path, parts):
    best = tmp_path / "model.safetensors"
    best.write_bytes(b"the best")
    metadata = resume_state.RunMetadata(
        {"best_step": 3, "val_loss": 0.1 + 0.2}, "fine", 77, {"train": {"steps": 5}}, "5a", best
    )
    counters = resume_state.Counters(step=4, best_step=3, best=1 / 3, losses=[1.0, float("inf")])
    resume_state.save(tmp_path / "state", counters, *parts, metadata)
    best.unlink()
    saved = resume_state.newest(tmp_path / "state", print)
    assert saved.counters == counters and saved.best_weights.read_bytes() == b"the best"
    assert (saved.metadata.result, saved.metadata.metrics_bytes, saved.metadata.headline) == (
        metadata.result,
        77,
        "fine",
    )


def test_the_state_of_a_model_of_another_width_is_refused(states, parts):
    import dataclasses

    wider = build_model(dataclasses.replace(TINY, intermediate_size=2 * TINY.intermediate_size))
    with pytest.raises(UserError, match="is the state of another model"):
        resume_state.newest(states, print).restore(wider, optimizers.build(wider, TrainConfig()))


def test_disk_space_is_required_for_all_files_before_any_is_written(states, parts, monkeypatch):
    model, optimizer = parts
    weights = list(model.parameters())
    moments = [
        value
        for weight in weights
        for key, value in optimizer.state_of(weight).items()
        if key != "step"
    ]
    metadata = resume_state.RunMetadata(best_file=states / "step-000000001" / "weights.safetensors")
    needed = metadata.best_file.stat().st_size + sum(
        value.numel() * value.element_size()
        for value in (*weights, *moments, torch.get_rng_state())
    )
    monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + needed - 1)
    before = sorted(os.listdir(states))
    with pytest.raises(UserError, match="the disk is full"):
        resume_state.save(states, resume_state.Counters(step=3), model, optimizer, metadata)
    assert sorted(os.listdir(states)) == before
    monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + needed)
    resume_state.save(states, resume_state.Counters(step=3), model, optimizer, metadata)
    assert sorted(os.listdir(states)) == ["step-000000002", "step-000000003"]


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.kernels.fast_path import build_model
from lmcli.training import optimizers, resume_state as state
config = ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16,
                     num_hidden_layers=1, num_attention_heads=2)
model = build_model(config.complete())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    optimizer = optimizers.build(model, TrainConfig())
    state.save(Path(sys.argv[1]), state.Counters(step=3), model, optimizer)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="safetensors may write through memory that is mapped elsewhere"
)
def test_a_disk_that_fills_up_leaves_the_older_states_and_no_partial_file(states):
    """A limit on the size of files simulates a full disk."""
    before = sorted(os.listdir(states))
    done = subprocess.run(
        [sys.executable, "-c", FULL, states, "6000"], capture_output=True, text=True, timeout=60
    )
    assert "cannot write" in done.stdout and done.stderr == "" and done.returncode == 0
    assert (
        sorted(os.listdir(states)) == before
        and resume_state.newest(states, pytest.fail).counters.step == 2
    )


def test_a_state_is_restored_to_the_device_of_the_weights(states):
    """The meta device takes the place of a GPU, which this machine may not have."""
    with torch.device("meta"):
        elsewhere = build_model(TINY)
    optimizer = optimizers.build(elsewhere, TrainConfig(optimizer="adamw"))
    resume_state.newest(states, pytest.fail).restore(elsewhere, optimizer)
    states_of = [
        (name, kind, value.device.type)
        for name, parameter in elsewhere.named_parameters()
        for kind, value in optimizer.state_of(parameter).items()
    ]
    assert {kind for _, kind, _ in states_of} >= {"step", "exp_avg", "exp_avg_sq"}
    assert [part for part in states_of if part[-1] != "meta"] == []
