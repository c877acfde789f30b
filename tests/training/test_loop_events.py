"""The events of the training loop, with a clock that tests set by hand."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import make_trainer

from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.training import loop, train_step


class Clock:
    """A time.monotonic that tests move; each reading takes a microsecond."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch):
    trainer = Clock()
    for module in (loop, train_step):
        monkeypatch.setattr(module, "time", trainer)
    return trainer


@pytest.fixture
def run(clock):
    """run(bits=…, **config): a Trainer, four rows of 8 tokens a step; `bits` are its criteria."""

    def make(
        bits=(), evaluation_seconds=0.0, evaluation_tokens=0, losses=(), **config
    ) -> loop.Trainer:
        criteria = itertools.chain(bits, itertools.repeat(9.0))
        losses = itertools.chain(losses, itertools.repeat(9.0))

        def evaluate():
            clock.now += evaluation_seconds
            return SimpleNamespace(criterion=next(criteria), loss=next(losses))

        return make_trainer(evaluate, evaluation_tokens, clock.now, **config)

    return make


def steps_of(run: loop.Trainer) -> list[loop.Step]:
    return [event for event in run.events() if isinstance(event, loop.Step)]


def kinds(events) -> list[str]:
    names = {loop.Step: "step", loop.Validation: "validation", loop.Note: "note"}
    return [f"{names.get(type(event)) or event.what} {event.step}" for event in events]


def test_events_of_a_run_by_steps(run):
    events = list(run(steps=6, eval_every=2, save_every=3, sample_every=4).events())
    assert kinds(events) == [
        "step 1",
        "step 2",
        "validation 2",
        "step 3",
        "save 3",
        "step 4",
        "validation 4",
        "sample 4",
        "step 5",
        "step 6",
        "validation 6",
        "save 6",
    ]
    validations = [event for event in events if isinstance(event, loop.Validation)]
    assert [event.final for event in validations] == [False, False, True]


def test_an_evaluation_is_announced(run):
    trainer = run(steps=3, eval_every=1)
    trainer.counters.look_first = True
    announced = kinds(loop.Trainer.events(trainer))
    for step in range(4):
        assert announced[announced.index(f"validation {step}") - 1] == f"evaluation {step}"


def test_by_default_a_run_is_evaluated_eight_times(run):
    steps = [event.step for event in run(steps=16).events() if isinstance(event, loop.Validation)]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16]


def test_best_is_the_lowest_so_far(run):
    trainer = run(bits=(3.0, 2.0, 2.5, float("nan"), 1.9), steps=5, eval_every=1)
    assert [event.best for event in trainer.events() if isinstance(event, loop.Validation)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (trainer.counters.best, trainer.counters.best_step) == (1.9, 5)


def test_of_equal_accuracies_the_lowest_loss_is_best(run):
    trainer = run(
        bits=(0.2, 0.1, 0.1, 0.1, 0.2), losses=(0.5, 0.4, 0.3, 0.6, 0.1), steps=5, eval_every=1
    )
    best = [event.best for event in trainer.events() if isinstance(event, loop.Validation)]
    assert best == [True, True, True, False, False]
    assert (trainer.counters.best_loss, trainer.counters.best_step) == (0.3, 3)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_the_mean_of_the_last_weights_is_evaluated_and_kept(run, rule):
    trainer = run(
        steps=8, eval_every=2, sample_every=8, save_every=8, averaging=0.5, optimizer=rule
    )
    after, shown = [], {}
    for event in trainer.events():
        weights = {
            name: weight.detach().clone()
            for name, weight in trainer.train_step.model.named_parameters()
        }
        if isinstance(event, loop.Step):
            after.append(weights)
        else:
            shown.setdefault(event.step, []).append((type(event), weights))
    for (
        step,
        events,
    ) in shown.items():  # weights count from the step that began at half of the budget
        chosen = after[4:step] if step > 4 else after[step - 1 : step]
        for kind, weights in events:
            last = (
                chosen[-1:] if kind is loop.Due else chosen
            )  # a state has the weights that are trained
            for name, weight in weights.items():
                torch.testing.assert_close(weight, torch.stack([one[name] for one in last]).mean(0))
    assert sorted(shown) == [2, 4, 6, 8] and len(shown[8]) == 2


def test_a_longer_budget_restarts_the_mean(run):
    trainer = run(steps=8, averaging=0.5)
    for event in trainer.events():
        trainer.stop = isinstance(event, loop.Step) and event.step == 6
    assert trainer.counters.averaged == 2
    longer = dataclasses.replace(trainer.train_step.config, steps=20)
    trainer = make_trainer(step=dataclasses.replace(trainer.train_step, config=longer))
    counts = [
        trainer.counters.averaged for event in trainer.events() if isinstance(event, loop.Step)
    ]
    assert counts == [*[0] * 4, *range(1, 11)]


def test_patience_ends_a_run_that_gets_no_better_and_keeps_the_best(run):
    trainer = run(bits=(3.0, 2.0, 2.5, 2.0), steps=50, eval_every=1, patience=2)
    events = list(trainer.events())
    assert kinds(events[-4:-2]) == ["step 4", "validation 4"] and kinds(events[-1:]) == ["save 4"]
    assert (
        "2 evaluations in a row were no better than step 2: ended at 8% of the budget"
        in events[-2].text
    )
    assert trainer.counters.best_step == 2 and trainer.counters.looked == 1.0
    again = run(steps=50, patience=2)
    again.train_step.begin(trainer.counters)
    assert kinds(again.events()) == ["save 4"]  # resumed, it has ended


def test_steps_count_tokens_rows_epochs_and_share(run):
    *_, last = steps_of(run(steps=5))
    assert (last.tokens, last.share) == (5 * 32, 1.0)
    assert last.epoch == pytest.approx(5 * 4 / 50)
    assert len(steps_of(run(epochs=0.4))) == 5


def test_losses_are_nats_per_token_whatever_the_micro_batch(run):
    losses = []
    for most in (0, 8, 24):
        torch.manual_seed(0)
        losses.append([step.loss for step in steps_of(run(steps=4, micro_batch_tokens=most))])
    assert losses[0][0] == pytest.approx(np.log(40), abs=0.05)  # a fresh model knows nothing
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(
        losses[0], rel=1e-5
    )


def test_the_first_rate_is_above_0_and_the_last_near_0(run):
    rates = [step.learning_rate for step in steps_of(run(steps=50, learning_rate=1.0, warmup=0.1))]
    assert 0 < rates[0] < rates[1] < max(rates) <= 1.0 and rates[-1] < 0.05


def test_look_first_evaluates_the_initial_model_outside_the_schedule(run, clock):
    trainer = run(bits=[2.0, 3.0, 2.5], evaluation_seconds=7.0, time=60, eval_every=4)
    trainer.counters.look_first = True
    first, *events = itertools.islice(trainer.events(), 12)
    assert isinstance(first, loop.Validation) and (first.step, first.best, first.final) == (
        0,
        True,
        False,
    )
    assert trainer.counters.preparation >= 7.0 and not trainer.counters.look_first
    steps, looks = (
        [event for event in events if isinstance(event, kind)]
        for kind in (loop.Step, loop.Validation)
    )
    assert steps[0].step == 1 and steps[0].share < 0.01
    assert [(look.step, look.best) for look in looks] == [(4, False), (8, False)]
    assert (trainer.counters.best, trainer.counters.best_step, trainer.counters.stale) == (
        2.0,
        0,
        2,
    )


def timed(run, clock, seconds, **options):
    """(events, seconds in all) of a run by time whose steps take `seconds` each."""
    trainer, events = run(**options), []
    began = clock.now
    clock.now += 2.0  # before the first step: tokenizing and so on
    for event in trainer.events():
        events.append(event)
        clock.now += seconds if isinstance(event, loop.Step) else 0
    return events, clock.now - began


@pytest.mark.parametrize("step, evaluation", [(0.1, 0.0), (0.2, 0.5), (0.5, 2.0)])
def test_a_run_by_time_ends_on_time_with_its_schedule_at_the_end(run, clock, step, evaluation):
    events, took = timed(run, clock, step, time=30, evaluation_seconds=evaluation)
    assert 30 * 0.8 <= took <= 30 + step + evaluation
    *_, last = [event for event in events if isinstance(event, loop.Step)]
    assert last.learning_rate < 0.1 * TrainConfig().learning_rate
    assert isinstance(events[-2], loop.Validation) and events[-2].final


def test_evaluations_take_a_small_part_of_a_run_by_time(run, clock):
    events, _ = timed(run, clock, 0.2, time=60, evaluation_seconds=3.0)
    assert sum(isinstance(event, loop.Validation) for event in events) <= 3


def test_an_evaluation_too_slow_for_the_time_is_made_once_and_still_in_time(
    run, clock, monkeypatch
):
    original = train_step.TrainStep._accumulate

    def slow(
        trainer,
    ):  # 32 tokens in 0.1 s, so about a third of that forward only: 9,600 tokens are 10 s
        clock.now += 0.1
        return original(trainer)

    monkeypatch.setattr(train_step.TrainStep, "_accumulate", slow)
    events, took = timed(run, clock, 0.0, time=30, evaluation_seconds=10.0, evaluation_tokens=9600)
    assert sum(isinstance(event, loop.Validation) for event in events) == 1
    assert 26 <= took <= 31
    assert sum(isinstance(event, loop.Step) for event in events) > 120


def test_a_slow_first_step_does_not_count_in_the_cost_of_an_evaluation(run, clock, monkeypatch):
    original = train_step.TrainStep._accumulate

    def slow_at_first(trainer):  # 16 tokens/s: 1,000 of them would be an evaluation of 21 s
        clock.now += 0.1 if trainer.counters.step else 2.0
        return original(trainer)

    monkeypatch.setattr(train_step.TrainStep, "_accumulate", slow_at_first)
    events, took = timed(run, clock, 0.0, time=12, evaluation_seconds=1.0, evaluation_tokens=1000)
    assert sum(isinstance(event, loop.Step) for event in events) > 40
    assert 9 <= took <= 13


def test_without_time_for_a_step_the_model_is_still_evaluated(run, clock):
    events, _ = timed(run, clock, 1.0, time=1)
    assert kinds(events) == ["validation 0", "save 0"]


def test_a_stop_before_any_evaluation_saves_and_then_evaluates(run):
    trainer, events = run(steps=100), []
    for event in trainer.events():
        events.append(event)
        trainer.stop = isinstance(event, loop.Step) and event.step == 2
    assert (
        kinds(events) == ["step 1", "step 2", "save 2", "note 2", "validation 2"]
        and not events[4].final
    )
    assert "is measured now" in events[3].text


def test_an_infinite_gradient_stops_the_run_before_the_update(run):
    trainer = run(steps=10)
    events = trainer.events()
    next(events)
    before = {name: value.clone() for name, value in trainer.train_step.model.state_dict().items()}
    with torch.no_grad():
        trainer.train_step.model.decoder.norm.weight[0] = float("inf")
    before["decoder.norm.weight"] = trainer.train_step.model.decoder.norm.weight.clone()
    with pytest.raises(UserError, match="at step 2") as caught:
        list(events)
    assert "train.learning_rate=" in caught.value.hint
    assert all(
        torch.equal(value, before[name])
        for name, value in trainer.train_step.model.state_dict().items()
    )
    assert trainer.counters.step == 1


def test_saves_are_never_more_than_ten_minutes_apart(run, clock):
    """2.5 hours in steps of 50 s; an eighth of the budget is 19 minutes."""
    trainer, saved = run(steps=180, evaluation_seconds=200.0), [clock.now]
    for event in trainer.events():
        if isinstance(event, loop.Step):
            clock.now += 50.0
        elif isinstance(event, loop.Due) and event.what == "save":
            saved.append(clock.now)
    apart = np.diff(saved)
    assert apart.max() <= 600.0 + 1 and len(saved) < 40
    assert np.median(apart) > 250.0  # and not much closer, although each eighth is saved as well


def test_a_state_saved_by_the_clock_resumes_with_the_evaluation_that_was_due(run, clock):
    """An evaluation that lasts longer than the pause between saves is made after a save."""
    whole = [event.step for event in run(steps=16).events() if isinstance(event, loop.Validation)]
    trainer = run(steps=16, evaluation_seconds=1000.0, save_every=100)
    for event in trainer.events():
        if isinstance(event, loop.Due) and event.what == "save" and event.step == 4:
            break
    assert trainer.counters.looked == 3 / 16
    again = run(steps=16, save_every=100)
    again.train_step.begin(trainer.counters)
    events = [event for event in again.events() if isinstance(event, loop.Validation)]
    assert [event.step for event in events] == [step for step in whole if step > 2]


def test_the_time_left_counts_what_is_planned_and_hardly_rises(run, clock):
    """80 steps of a second, 4 evaluations of 10 s, saves of 2 s: nothing is a surprise."""
    trainer = run(steps=80, eval_every=20, evaluation_seconds=10.0, save_every=40)
    trainer.counters.evaluation_seconds = 10.0  # as once measured
    step = trainer.train_step.update

    def slow_step(*arguments):
        clock.now += 1.0
        return step(*arguments)

    trainer.train_step.update = slow_step
    left, seconds = [], []
    for event in trainer.events():
        if isinstance(event, loop.Due) and event.what == "save":
            clock.now += 2.0
        elif isinstance(event, loop.Step):
            left.append(event.remaining)
            seconds.append(clock.now)
    expected = [clock.now - now for now in seconds]
    assert left == pytest.approx(expected, abs=4.0)  # a save is known once it was made
    assert all(b <= 1.1 * a for a, b in itertools.pairwise(left))
