"""States on disk: whole, checked when they are read, two of them; what a damaged one or a full disk does."""

import os
import subprocess
import sys

import pytest
import torch

from lmcli import storage
from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.model.transformer import Transformer
from lmcli.training import optimizers, state

TINY = ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16, num_hidden_layers=1,
                   num_attention_heads=2).complete()


@pytest.fixture
def parts():
    """(model, optimizer) after one update, so that there are moments."""
    model = Transformer(TINY)
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
        state.save(tmp_path, state.Counters(step=step), *parts)
    return tmp_path


def damage(file, how: str) -> None:
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-10])
    else:  # one bit
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def test_the_checksums_are_those_that_sha256sum_reads(states):
    newest = states / "step-000000002"
    listed = dict(reversed(line.split("  ")) for line in (newest / state.CHECKSUMS).read_text().splitlines())
    assert listed.keys() == {"weights.safetensors", "optimizer.safetensors", "random.safetensors", "counters.json"}
    assert all(storage.sha256_of(newest / name) == known for name, known in listed.items())


@pytest.mark.parametrize("how", ["cut", "bit", "gone"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "counters.json",
                                  state.CHECKSUMS])
def test_any_damage_to_the_newest_is_named_and_the_one_before_is_taken(states, name, how):
    damage(states / "step-000000002" / name, how)
    notes = []
    assert state.newest(states, notes.append).counters.step == 1
    (told,) = notes
    assert told.startswith(f"{states}/step-000000002: ") and name in told and told.endswith("the state before it is taken")


def test_a_file_too_many_is_damage_too(states):
    (states / "step-000000002" / "best.safetensors").write_bytes(b"of another state")
    notes = []
    assert state.newest(states, notes.append).counters.step == 1 and "best.safetensors is damaged" in notes[0]


def test_when_all_are_damaged_each_is_named(states):
    damage(states / "step-000000002" / "weights.safetensors", "bit")
    damage(states / "step-000000001" / "optimizer.safetensors", "gone")
    with pytest.raises(UserError) as caught:
        state.newest(states, pytest.fail)
    first, hint = str(caught.value).splitlines()
    assert "step-000000002: weights.safetensors is damaged: its SHA-256 is not" in first
    assert "step-000000001: optimizer.safetensors, which SHA256SUMS names, is missing; no other state is left" in first
    assert "--from" in hint and "--overwrite" in hint


def test_what_lies_beside_a_state_comes_back(tmp_path, parts):
    best = tmp_path / "model.safetensors"
    best.write_bytes(b"the best")
    beside = state.Beside({"best_step": 3, "val_loss": 0.1 + 0.2}, "fine", 77, {"train": {"steps": 5}}, "5a", best)
    counters = state.Counters(step=4, best_step=3, best=1 / 3, losses=[1.0, float("inf")])
    state.save(tmp_path / "state", counters, *parts, beside)
    best.unlink()
    saved = state.newest(tmp_path / "state", print)
    assert saved.counters == counters and saved.best.read_bytes() == b"the best"
    assert (saved.beside.result, saved.beside.metrics_bytes, saved.beside.headline) == (beside.result, 77, "fine")


def test_the_state_of_a_model_of_another_width_is_refused(states, parts):
    import dataclasses
    wider = Transformer(dataclasses.replace(TINY, intermediate_size=2 * TINY.intermediate_size))
    with pytest.raises(UserError, match="is the state of another model"):
        state.newest(states, print).restore(wider, optimizers.build(wider, TrainConfig()))


def test_room_is_looked_for_all_files_together_before_any_is_written(states, parts, monkeypatch):
    model, optimizer = parts
    weights = list(model.parameters())
    moments = [value for weight in weights for key, value in optimizer.state_of(weight).items() if key != "step"]
    beside = state.Beside(best_file=states / "step-000000001" / "weights.safetensors")
    needed = beside.best_file.stat().st_size + sum(
        value.numel() * value.element_size() for value in (*weights, *moments, torch.get_rng_state()))
    monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + needed - 1)
    before = sorted(os.listdir(states))
    with pytest.raises(UserError, match="no room on the disk"):
        state.save(states, state.Counters(step=3), model, optimizer, beside)
    assert sorted(os.listdir(states)) == before
    monkeypatch.setattr(storage, "free_bytes", lambda path: (1 << 20) + needed)
    state.save(states, state.Counters(step=3), model, optimizer, beside)
    assert sorted(os.listdir(states)) == ["step-000000002", "step-000000003"]


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.model.transformer import Transformer
from lmcli.training import optimizers, state
model = Transformer(ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16, num_hidden_layers=1,
                                num_attention_heads=2).complete())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    state.save(Path(sys.argv[1]), state.Counters(step=3), model, optimizers.build(model, TrainConfig()))
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="safetensors may write through memory that is mapped elsewhere")
def test_a_disk_that_fills_up_while_writing_leaves_the_older_states_and_nothing_half(states):
    """A limit on the size of files stands in for a full disk."""
    before = sorted(os.listdir(states))
    done = subprocess.run([sys.executable, "-c", FULL, states, "6000"], capture_output=True, text=True, timeout=60)
    assert "cannot write" in done.stdout and done.stderr == "" and done.returncode == 0
    assert sorted(os.listdir(states)) == before and state.newest(states, pytest.fail).counters.step == 2


def test_all_of_a_state_goes_where_the_weights_are(states):
    """On a device with no memory of its own, which stands for one that this machine has not."""
    with torch.device("meta"):
        elsewhere = Transformer(TINY)
    optimizer = optimizers.build(elsewhere, TrainConfig(optimizer="adamw"))
    state.newest(states, pytest.fail).restore(elsewhere, optimizer)
    held = [(name, kind, value.device.type) for name, parameter in elsewhere.named_parameters()
            for kind, value in optimizer.state_of(parameter).items()]
    assert {kind for _, kind, _ in held} >= {"step", "exp_avg", "exp_avg_sq"}
    assert [part for part in held if part[-1] != "meta"] == []
