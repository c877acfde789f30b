"""Divergence: the rule, what it must and must not stop, the messages, and what is kept."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_trainer

from lmcli.config import TrainConfig
from lmcli.data.batches import Batch, ExampleRows, padded
from lmcli.distributed.data_parallel import ReplicaGroup
from lmcli.training import loop, optimizers, resume_state
from lmcli.training.divergence import (
    STEPS_ABOVE,
    Diverged,
    exploded,
    highest_sound_loss,
    remedy,
    row_range,
    steps_above,
)
from lmcli.training.train_step import TrainStep

GUESSING = math.log(40)


class TestDivergenceRule:
    def test_the_limit_is_twice_what_a_run_can_begin_with_and_five_nats(self):
        assert highest_sound_loss(uniform=6.0, first=6.1) == pytest.approx(17.2)
        assert highest_sound_loss(uniform=6.0, first=1.2) == 17.0  # a model that is trained further
        assert (
            highest_sound_loss(uniform=6.0, first=15.0) == 35.0
        )  # the same, on text that it finds unlikely

    # runs as they were seen, guessing at 6.2 nats: (losses, whether they come to nothing)
    @pytest.mark.parametrize(
        "losses, diverges",
        [
            (
                [6.2, 12.5, 8.2, 7.5, 6.8, 7.3, 6.2, 6.2, 5.7],
                False,
            ),  # Muon at thirty times a good rate, without warm-up
            (
                [6.2, 6.1, 7.4, 15.5, 12.4, 28.5, 12.1, 9.0, 7.1, 5.9],
                False,
            ),  # AdamW at the same, in bfloat16
            (
                [6.2, 31.0, 29.3, 30.5, 25.3, 31.8, 33.4, 31.0],
                False,
            ),  # a hundred times: not yet certain …
            ([6.2, 31.0, 29.3, 30.5, 25.3, 31.8, 33.4, 31.0, 26.6], True),  # … but now
            ([2.0, 2.1] + [17.5] * 20, True),
            ([2.0, 2.1] + [17.5] * 7 + [17.3] + [17.5] * 7, False),
            ([6.2, 31.0, 8e4], True),  # ten thousand times: at once
            ([6.2, 2e9], True),
        ],
    )
    def test_observed_runs(self, losses, diverges):
        assert exploded(losses, highest_sound_loss(math.log(512), losses[0])) == diverges

    @given(st.lists(st.floats(0, 30), min_size=1, max_size=30), st.floats(math.log(2), 12))
    def test_losses_below_the_limit_never_diverge(self, losses, uniform):
        limit = highest_sound_loss(uniform, losses[0])
        assert not exploded([min(loss, limit) for loss in losses], limit)

    @given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(math.log(2), 12))
    def test_a_spike_shorter_than_eight_steps_never_diverges(self, losses, uniform):
        limit = highest_sound_loss(uniform, 0)
        spiky = [loss if i % STEPS_ABOVE else 1.0 for i, loss in enumerate(losses)]
        assert not any(exploded(spiky[:i], limit) for i in range(1, len(spiky) + 1))

    def test_two_labels_may_be_wrong_with_confidence(self):
        # a classifier that was always right, on a batch of noise: half of it is wrong by 8 nats
        assert not exploded([0.001] + [4.0] * 50, highest_sound_loss(math.log(2), 0.001))

    def test_steps_above_counts_from_the_last_sound_one(self):
        assert [
            steps_above(losses, 5.0)
            for losses in ([], [4.0], [9.0], [9.0, 4.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0])
        ] == [0, 0, 1, 0, 2, 3]
        assert steps_above([9.0, math.nan], 5.0) == 0


@pytest.mark.parametrize(
    "position, count, message",
    [
        (0, 1, "row 1 of epoch 1"),
        (36, 4, "rows 37–40 of epoch 1"),
        (50, 4, "rows 1–4 of epoch 2"),
        (1249, 1, "row 50 of epoch 25"),
        (48, 4, "row 49 of epoch 1 to row 2 of epoch 2"),
        (7, 0, "row 8 of epoch 1"),
    ],
)
def test_rows_are_counted_from_one_in_their_epoch(position, count, message):
    assert row_range(position, count, 50) == message


def test_the_remedy_is_a_lower_rate_at_most_the_usual_one():
    assert (
        remedy(TrainConfig(), full_precision=True)
        == "--set train.learning_rate=0.003 --set train.matrix_learning_rate=0.007"
    )
    assert (
        remedy(TrainConfig(optimizer="adamw", learning_rate=1e9), full_precision=False)
        == "--set train.learning_rate=0.01 or --set train.precision=float32"
    )


def make_run(**options) -> loop.Trainer:
    """A Trainer over 400 tokens in rows of 8, four rows a step."""
    torch.manual_seed(0)
    return make_trainer(**{"steps": 40, "optimizer": "adamw", **options})


@pytest.fixture
def losses(monkeypatch):
    """losses(values): training sees these losses, one a step, with the true gradients."""
    original = TrainStep._mean_loss

    def give(values) -> None:
        left = list(values)

        def mean_loss(step, loss, targets):
            loss = original(step, loss, targets)
            return left.pop(0) if left else loss

        monkeypatch.setattr(TrainStep, "_mean_loss", mean_loss)

    return give


def restore(run, folder) -> None:
    step = run.train_step
    step.begin(resume_state.newest(folder, print).restore(step.model, step.optimizer))


def ends(run) -> tuple[list, Diverged]:
    events = []
    with pytest.raises(Diverged) as caught:
        for event in run.events():
            events.append(event)
    return events, caught.value


def saves(events) -> list[int]:
    return [event.step for event in events if isinstance(event, loop.Due) and event.what == "save"]


def test_eight_losses_in_a_row_far_above_guessing_end_the_run(losses):
    losses([3.7, 3.6, 3.5] + [13.0] * 20)
    run = make_run(save_every=1)
    events, error = ends(run)
    assert run.counters.step == 10 and error.since == 4
    assert (
        "the loss has exploded: 13 nats/token, where guessing costs 3.69, at step 11" in error.what
    )
    assert saves(events) == [1, 2, 3]  # none of the doubtful ones


def test_a_spike_does_not_end_the_run_and_saving_resumes_after_it(losses):
    losses([3.7, 3.6] + [13.0] * 7 + [3.9])
    run = make_run(save_every=1, steps=20)
    events = list(run.events())
    assert run.counters.step == 20 and saves(events)[:4] == [1, 2, 10, 11]


def test_a_model_trained_further_may_begin_high(losses):
    losses([14.0] * 30)
    list(make_run().events())


def test_the_first_loss_survives_resuming(losses, tmp_path):
    losses([14.0] * 5)
    run = make_run(steps=5)
    list(run.events())
    resume_state.save(tmp_path, run.counters, run.train_step.model, run.train_step.optimizer)
    again = make_run(steps=30)
    restore(again, tmp_path)
    losses([14.0] * 30)
    list(again.events())
    assert again.counters.first_loss == 14.0


def test_losses_before_a_stop_count_after_it(losses, tmp_path):
    """Five in a row above the limit, then three: the run ends as without the stop."""
    losses([3.7] + [13.0] * 20)
    run = make_run(steps=30)
    for event in run.events():
        run.stop = isinstance(event, loop.Step) and event.step >= 6
    resume_state.save(tmp_path, run.counters, run.train_step.model, run.train_step.optimizer)
    again = make_run(steps=30)
    restore(again, tmp_path)
    _, error = ends(again)
    assert "the loss has exploded" in error.what and "at step 9" in error.what


@pytest.mark.parametrize(
    "loss, message",
    [
        (math.nan, "loss is nan at step 3"),
        (math.inf, "loss is inf at step 3"),
        (1e6, "exploded: 1e+06 nats/token"),
    ],
)
def test_the_error_names_step_rate_norm_precision_and_rows(losses, loss, message):
    losses([3.7, 3.6, loss])
    run = make_run(learning_rate=0.3, warmup=0.0, schedule="constant", dtype=torch.bfloat16)
    events = run.events()
    while run.counters.step < 2:
        next(events)
    weights = {name: value.clone() for name, value in run.train_step.model.state_dict().items()}
    with pytest.raises(Diverged) as caught:
        list(events)
    error = caught.value
    assert message in error.what and "at step 3" in error.what and "learning rate 0.3" in error.what
    assert "gradient norm " in error.what and "cpu" in error.what and "bfloat16" in error.what
    assert "rows 9–12 of epoch 1" in error.what
    places = [run.train_step.rows.sampler.start(position) for position in (8, 9, 10, 11)]
    assert f"from token {', '.join(map(str, places))} of the training part" in error.what
    assert (
        error.hint == "try --set train.learning_rate=0.01 or --set train.precision=float32"
        and error.since == 3
    )
    assert all(
        torch.equal(value, weights[name])
        for name, value in run.train_step.model.state_dict().items()
    )


def test_the_error_names_a_gradient_that_is_not_finite(monkeypatch):
    monkeypatch.setattr(optimizers.Optimizers, "clip", lambda *_: math.nan)
    _, error = ends(make_run())
    assert error.what.startswith("gradient norm is nan at step 1 (loss 3.")


def test_the_error_names_examples_by_number(losses):
    lengths, taken = np.array([3, 9, 4, 12, 7, 12, 5, 2] * 4), []

    def make(chosen):
        taken.append(chosen.tolist())
        return Batch(*[padded([np.arange(lengths[i]) for i in chosen], 0)] * 2)

    losses([3.7, math.nan])
    _, error = ends(make_run(rows=ExampleRows(lengths, make, 0)))
    first, second = taken
    assert f"rows {len(first) + 1}–{len(first + second)} of epoch 1, from example " in error.what
    assert f"from example {', '.join(map(str, second[:4]))}" in error.what


def broken_update(monkeypatch, at: int, value: float) -> None:
    """Makes the update of step `at` put `value` into a weight."""
    original, steps = optimizers.Optimizers.step, []

    def step(self):
        original(self)
        steps.append(1)
        if len(steps) == at:
            with torch.no_grad():
                self.groups[0].parameters[0].view(-1)[0] = value

    monkeypatch.setattr(optimizers.Optimizers, "step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_best_nor_saved(monkeypatch, value):
    broken_update(monkeypatch, 4, value)
    better = iter(range(100, 0, -1))
    run = make_run(
        evaluate=lambda: SimpleNamespace(criterion=next(better), loss=1.0),
        save_every=2,
        eval_every=1,
    )
    events, error = ends(run)
    assert "weights are NaN or infinite after step 4" in error.what and error.since == 5
    assert saves(events) == [2] and run.counters.best_step == 3


def test_the_last_update_is_checked_too(monkeypatch):
    broken_update(monkeypatch, 40, math.nan)
    events, error = ends(make_run(eval_every=10, save_every=10))
    assert "after step 40" in error.what and saves(events) == [10, 20, 30]


def test_a_run_without_a_finite_evaluation_is_an_error():
    _, error = ends(
        make_run(evaluate=lambda: SimpleNamespace(criterion=math.nan, loss=math.nan), steps=5)
    )
    assert "no evaluation gave a number after step 5" in error.what


def test_weights_are_not_checked_in_every_step(monkeypatch):
    looked, original = [], ReplicaGroup.all_finite
    monkeypatch.setattr(
        ReplicaGroup,
        "all_finite",
        lambda replicas, model: looked.append(1) or original(replicas, model),
    )
    list(make_run(steps=40, eval_every=20, save_every=20).events())
    assert len(looked) <= 4


def test_broken_states_are_removed_if_there_is_an_older_one(tmp_path):
    run = make_run()
    for step in (3, 6):
        run.counters.step = step
        resume_state.save(tmp_path, run.counters, run.train_step.model, run.train_step.optimizer)
    assert (
        resume_state.drop_from(tmp_path, 3) is None and len(list(tmp_path.iterdir())) == 2
    )  # better than nothing
    assert resume_state.drop_from(tmp_path, 7) == 6 and len(list(tmp_path.iterdir())) == 2
    assert resume_state.drop_from(tmp_path, 6) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
    assert resume_state.drop_from(tmp_path / "missing", 6) is None


# from a tenth of a good rate to ten times it; with and without warm-up
@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("rate", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sound_runs_finish(optimizer, rate, warmup):
    run = make_run(
        optimizer=optimizer,
        learning_rate=rate,
        matrix_learning_rate=2 * rate,
        warmup=warmup,
        batch_tokens=8,
    )
    list(run.events())
    assert run.counters.step == 40
