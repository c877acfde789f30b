"""Out of memory in a step: smaller micro-batches, the same run, and the final error."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import make_trainer, tiny_model

from lmcli.config import ModelConfig
from lmcli.data.batches import Batch, ExampleRows, padded
from lmcli.errors import UserError
from lmcli.model import device
from lmcli.training import loop, resume_state
from lmcli.training.loop import Note, Step
from lmcli.training.objective import Objective

TINY = ModelConfig(
    vocab_size=40,
    max_position_embeddings=16,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
).complete()
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate"
)


def make_run(dropout: float = 0.0, rows=None, **config) -> loop.Trainer:
    """A Trainer over 400 tokens in rows of 8, eight rows a step."""
    torch.manual_seed(0)
    options = {"batch_tokens": 64, "steps": 6, **config}
    return make_trainer(model=tiny_model(TINY, dropout), rows=rows, **options)


@pytest.fixture
def room(monkeypatch):
    """room(tokens, recomputed=…, error=…, late=…): a machine that fails on larger forward passes.

    With activation checkpointing it fails above `recomputed` tokens; `late`: in backward passes.
    """
    original = Objective.loss

    def limit(
        tokens: int,
        recomputed: int = 0,
        error: BaseException = torch.OutOfMemoryError("CUDA out of memory."),
        late: bool = False,
    ) -> list[int]:
        read = []

        def full(*_):
            raise error

        def loss(objective, model, batch, smoothing):
            again = any("forward" in vars(block) for block in model.blocks())
            fits = batch.size <= max(tokens, again * recomputed)
            if not fits and not late:
                full()
            read.append(batch.size)
            loss_tensor = original(objective, model, batch, smoothing)
            if not fits:
                loss_tensor.register_hook(full)
            return loss_tensor

        monkeypatch.setattr(Objective, "loss", loss)
        return read

    return limit


def weights(run: loop.Trainer) -> dict:
    return {name: value.clone() for name, value in run.train_step.model.state_dict().items()}


def notes(events) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError(CPU_SAYS),
        RuntimeError("not enough memory: you tried to allocate 16 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=repr,
)
def test_all_out_of_memory_errors_are_recognized(error):
    assert device.ran_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_out_of_memory(error):
    assert not device.ran_out_of_memory(error)


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_SAYS), MemoryError()],
    ids=repr,
)
def test_the_micro_batch_is_halved_until_it_fits(room, error, late):
    read = room(20, error=error, late=late)
    run = make_run()
    events = list(run.events())
    assert notes(events) == [
        f"out of memory with {before} tokens at once: going on with {after}; "
        "the batch of an optimizer step stays 64"
        for before, after in ((64, 32), (32, 16))
    ]
    assert [event.tokens for event in events if isinstance(event, Step)] == [
        64 * step for step in range(1, 7)
    ]
    assert (
        read.count(16) == 4 * 6
        and run.counters.micro_batch_tokens == 16
        and run.counters.rows == 48
    )
    assert not run.train_step.checkpointing


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weights_equal_a_run_with_that_micro_batch_from_the_start(room, dropout, late):
    """To the bit: the step starts again with the same rows and random numbers, and no gradient."""
    small = make_run(dropout, micro_batch_tokens=16)
    losses = [event.loss for event in small.events() if isinstance(event, Step)]
    room(16, late=late)
    run = make_run(dropout)
    events = list(run.events())
    assert notes(events) and [event.loss for event in events if isinstance(event, Step)] == losses
    assert all(torch.equal(value, weights(small)[name]) for name, value in weights(run).items())


def test_weights_equal_the_whole_batch_up_to_rounding(room):
    whole = make_run(optimizer="adamw")
    list(whole.events())
    room(8)
    run = make_run(optimizer="adamw")
    assert len(notes(run.events())) == 3
    for name, value in weights(run).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=1e-5)


def test_memory_that_runs_out_later_changes_the_steps_from_there(room):
    run, events = make_run(), []
    for event in run.events():
        events.append(event)
        if isinstance(event, Step) and event.step == 3:
            room(32)
    events = [event for event in events if isinstance(event, Step | Note)]
    assert [type(event).__name__ for event in events] == ["Step"] * 3 + ["Note"] + ["Step"] * 3
    assert events[3].step == 3 and run.counters.step == 6


def test_a_row_that_does_not_fit_uses_activation_checkpointing(room):
    read = room(4, recomputed=8)
    plain, run = make_run(micro_batch_tokens=8, recompute="on"), make_run()
    loss_tensor = notes(run.events())
    assert len(loss_tensor) == 4
    assert loss_tensor[-1] == (
        "out of memory with one row of 8 tokens: going on with activations calculated again in the "
        "backward pass (train.recompute), slower and in less memory"
    )
    assert read == [8] * 8 * 6 and run.counters.recompute
    list(plain.events())
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(run).items())


@pytest.mark.parametrize(
    "recompute, message, hint",
    [
        (
            "auto",
            "not even one row of 8 tokens fits, even with activations calculated again",
            "lower train.context",
        ),
        (
            "on",
            "not even one row of 8 tokens fits, even with activations calculated again",
            "lower train.context",
        ),
        (
            "off",
            "not even one row of 8 tokens fits",
            "leave train.recompute at auto, or lower train.context",
        ),
    ],
)
def test_nothing_left_to_reduce_is_an_error(room, recompute, message, hint):
    room(4)
    run = make_run(recompute=recompute)
    before = weights(run)
    with pytest.raises(UserError) as caught:
        list(run.events())
    assert caught.value.what.startswith("out of memory at step 1") and message in caught.value.what
    assert caught.value.hint.startswith(hint) and "model.hidden_size" in caught.value.hint
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_examples_of_different_lengths_are_reduced_to_one(room):
    lengths = np.array([3, 9, 4, 12, 7, 12, 5, 2] * 8)
    rows = ExampleRows(
        lengths, lambda chosen: Batch(*[padded([np.arange(lengths[i]) for i in chosen], 0)] * 2), 0
    )
    whole = make_run(rows=rows, batch_tokens=60)
    list(whole.events())
    room(12)
    run = make_run(rows=rows, batch_tokens=60)
    events = list(run.events())
    assert (run.counters.step, run.counters.rows) == (6, whole.counters.rows)
    assert notes(events) and not run.counters.recompute


def test_other_errors_propagate(room):
    room(20, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(make_run().events())


@pytest.mark.parametrize(
    "part, message", [("evaluate", "in an evaluation"), ("step", "in the update of step 1")]
)
def test_out_of_memory_elsewhere_is_an_error(monkeypatch, part, message):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = make_run(evaluate=full) if part == "evaluate" else make_run()
    if part == "step":
        monkeypatch.setattr(run.train_step.optimizer, "step", full)
    with pytest.raises(UserError, match=f"out of memory {message}"):
        list(run.events())


def test_what_fitted_survives_resuming(room, tmp_path):
    room(4, recomputed=16)
    run = make_run(micro_batch_tokens=32, steps=8)
    for _ in run.events():
        if run.counters.step == 6:
            break
    resume_state.save(tmp_path, run.counters, run.train_step.model, run.train_step.optimizer)
    again = make_run(steps=8)
    state = resume_state.newest(tmp_path, print)
    step = again.train_step
    step.begin(state.restore(step.model, step.optimizer))
    events = list(again.events())
    assert not notes(events) and step.micro_batch_tokens == 8 and step.checkpointing
    assert again.counters.step == 8


def test_counters_of_old_states_are_read(tmp_path):
    run = make_run()
    resume_state.save(tmp_path, run.counters, run.train_step.model, run.train_step.optimizer)
    file = tmp_path / "step-000000000" / "counters.json"
    stored = json.loads(file.read_text())
    file.write_text(
        json.dumps({key: stored[key] for key in ("step", "rows", "best", "optimizer_steps")})
    )
    (file.parent / resume_state.CHECKSUMS).unlink()
    assert (
        resume_state.newest(tmp_path, print).restore(run.train_step.model, run.train_step.optimizer)
        == resume_state.Counters()
    )
