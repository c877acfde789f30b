"""Memory that runs out in a step: smaller parts, the same step, the same run; and what is said when nothing is left."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.model import device
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer
from lmcli.text.batches import Batch, ExampleRows, PackedRows, padded
from lmcli.training import loop, objectives, state
from lmcli.training.loop import Note, Step

CPU = Placement(torch.device("cpu"), torch.float32)
TINY = ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16, num_hidden_layers=2,
                   num_attention_heads=2).complete()
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def made(dropout: float = 0.0, rows=None, **config) -> loop.Run:
    """A Run over 400 tokens in rows of 8, eight rows a step."""
    torch.manual_seed(0)
    model = Transformer(TINY, dropout)
    model.initialize(0)
    rows = rows or PackedRows(np.arange(400, dtype=np.uint16) % 40, 8, 0, 0)
    options = {"context": 8, "batch_tokens": 64, "steps": 6, **config}
    return loop.Run(model.train(), rows, TrainConfig(**options), CPU, lambda: SimpleNamespace(criterion=9.0),
                    time.monotonic())


@pytest.fixture
def room(monkeypatch):
    """room(tokens, recomputed=…, error=…, late=…): a machine on which a forward pass of more tokens (with activations
    calculated again: of more than `recomputed`) fails; `late` lets it fail in the backward pass of such a one."""
    true = objectives.loss

    def limit(tokens: int, recomputed: int = 0, error: BaseException = torch.OutOfMemoryError("CUDA out of memory."),
              late: bool = False) -> list[int]:
        read = []

        def full(*_):
            raise error

        def loss(objective, model, batch, smoothing):
            again = any(block.recompute for block in model.blocks())
            fits = batch.size <= max(tokens, again * recomputed)
            if not fits and not late:
                full()
            read.append(batch.size)
            found = true(objective, model, batch, smoothing)
            if not fits:
                found.register_hook(full)
            return found
        monkeypatch.setattr(objectives, "loss", loss)
        return read
    return limit


def weights(run: loop.Run) -> dict:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def notes(events) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(), RuntimeError(CPU_SAYS),
    RuntimeError("not enough memory: you tried to allocate 16 bytes."), RuntimeError("std::bad_alloc"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], ids=repr)
def test_all_ways_to_say_it_are_understood(error):
    assert device.ran_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"),
                                   KeyboardInterrupt()], ids=repr)
def test_other_errors_are_not_taken_for_it(error):
    assert not device.ran_out_of_memory(error)


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_SAYS), MemoryError()],
                         ids=repr)
def test_the_micro_batch_is_halved_until_it_fits(room, error, late):
    read = room(20, error=error, late=late)
    run = made()
    events = list(run.events())
    assert notes(events) == [
        "out of memory with 64 tokens at once: going on with 32; the batch of an optimizer step stays 64",
        "out of memory with 32 tokens at once: going on with 16; the batch of an optimizer step stays 64"]
    assert [event.tokens for event in events if isinstance(event, Step)] == [64 * step for step in range(1, 7)]
    assert read.count(16) == 4 * 6 and run.counters.micro_batch_tokens == 16 and run.counters.rows == 48
    assert not run.recompute


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weights_are_those_of_a_run_with_that_micro_batch_from_the_start(room, dropout, late):
    """To the bit: the step begins again with the same rows, no gradient left over, and the same random numbers."""
    small = made(dropout, micro_batch_tokens=16)
    losses = [event.loss for event in small.events() if isinstance(event, Step)]
    room(16, late=late)
    run = made(dropout)
    events = list(run.events())
    assert notes(events) and [event.loss for event in events if isinstance(event, Step)] == losses
    assert all(torch.equal(value, weights(small)[name]) for name, value in weights(run).items())


def test_weights_are_those_of_the_whole_batch_but_for_rounding(room):
    whole = made(optimizer="adamw")
    list(whole.events())
    room(8)
    run = made(optimizer="adamw")
    assert len(notes(run.events())) == 3
    for name, value in weights(run).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=1e-5)


def test_memory_that_runs_out_later_changes_the_steps_from_there(room):
    run, events = made(), []
    for event in run.events():
        events.append(event)
        if isinstance(event, Step) and event.step == 3:
            room(32)
    events = [event for event in events if isinstance(event, Step | Note)]
    assert [type(event).__name__ for event in events] == ["Step"] * 3 + ["Note"] + ["Step"] * 3
    assert events[3].step == 3 and run.counters.step == 6


def test_a_row_that_does_not_fit_is_calculated_again_in_the_backward_pass(room):
    read = room(4, recomputed=8)
    plain, run = made(micro_batch_tokens=8, recompute="on"), made()
    found = notes(run.events())
    assert len(found) == 4
    assert found[-1] == ("out of memory with one row of 8 tokens: going on with activations calculated again in the "
                         "backward pass (train.recompute), slower and in less memory")
    assert read == [8] * 8 * 6 and run.counters.recompute
    list(plain.events())
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(run).items())


@pytest.mark.parametrize("recompute, told, hint", [
    ("auto", "not even one row of 8 tokens fits, even with activations calculated again", "lower train.context"),
    ("on", "not even one row of 8 tokens fits, even with activations calculated again", "lower train.context"),
    ("off", "not even one row of 8 tokens fits", "leave train.recompute at auto, or lower train.context")])
def test_nothing_left_to_make_smaller_is_an_error(room, recompute, told, hint):
    room(4)
    run = made(recompute=recompute)
    before = weights(run)
    with pytest.raises(UserError) as caught:
        list(run.events())
    assert caught.value.what.startswith("out of memory at step 1") and told in caught.value.what
    assert caught.value.hint.startswith(hint) and "model.hidden_size" in caught.value.hint
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_examples_of_different_lengths_come_down_to_one(room):
    lengths = np.array([3, 9, 4, 12, 7, 12, 5, 2] * 8)
    rows = ExampleRows(lengths, lambda chosen: Batch(*[padded([np.arange(lengths[i]) for i in chosen], 0)] * 2), 0)
    whole = made(rows=rows, batch_tokens=60)
    list(whole.events())
    room(12)
    run = made(rows=rows, batch_tokens=60)
    events = list(run.events())
    assert (run.counters.step, run.counters.rows) == (6, whole.counters.rows)
    assert notes(events) and not run.counters.recompute


def test_other_errors_go_through(room):
    room(20, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(made().events())


@pytest.mark.parametrize("part, told", [("evaluate", "in an evaluation"), ("step", "in the update of step 1")])
def test_memory_for_what_cannot_be_made_smaller_is_an_error(monkeypatch, part, told):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    run = made()
    monkeypatch.setattr(*((run, "evaluate") if part == "evaluate" else (run.optimizer, "step")), full)
    with pytest.raises(UserError, match=f"out of memory {told}"):
        list(run.events())


def test_what_fitted_is_known_after_resuming(room, tmp_path):
    room(4, recomputed=16)
    run = made(micro_batch_tokens=32)
    list(run.events())
    state.save(tmp_path, run.counters, run.model, run.optimizer)
    again = made(steps=8)
    again.counters = state.newest(tmp_path, print).restore(again.model, again.optimizer)
    events = list(again.events())
    assert not notes(events) and again.micro_batch_tokens == 8 and again.recompute
    assert again.counters.step == 8


def test_counters_of_a_state_from_before_this_was_stored_are_read(tmp_path):
    run = made()
    state.save(tmp_path, run.counters, run.model, run.optimizer)
    file = tmp_path / "step-000000000" / "counters.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: stored[key] for key in ("step", "rows", "best", "optimizer_steps")}))
    (file.parent / state.CHECKSUMS).unlink()
    assert state.newest(tmp_path, print).restore(run.model, run.optimizer) == state.Counters()
