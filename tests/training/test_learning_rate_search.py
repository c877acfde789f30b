"""Learning-rate search: its result, and that it leaves no trace."""

import math

import numpy as np
import pytest
import torch
from tiny_runs import make_step, run_step

from lmcli.data.batches import PackedRows
from lmcli.training import learning_rate_search
from lmcli.training.train_step import TrainStep


def make(**config) -> TrainStep:
    """A step over numbers that count up to 40 again and again, which is soon learned."""
    rows = PackedRows(np.arange(4000, dtype=np.uint16) % 40, 8, 0, 0)
    return make_step(rows=rows, **{"optimizer": "adamw", "steps": 1000, **config})


def search(step, rates):
    trial = learning_rate_search.search(step, rates)
    with pytest.raises(StopIteration) as end:
        while True:
            next(trial)
    return end.value.value


def test_the_rate_that_learns_best_has_the_lowest_loss():
    step = make()
    losses = search(step, (1e-6, 3e-2, 1e7))
    assert list(losses) == [1e-6, 3e-2, 1e7] and min(losses, key=losses.get) == 3e-2
    assert losses[1e-6] == pytest.approx(math.log(40), abs=0.05) and losses[1e7] > 2 * losses[1e-6]


def test_the_search_leaves_no_trace():
    untouched, step = make(dropout=0.1), make(dropout=0.1)
    search(step, (1e-3, 1e-2))
    assert step.counters == untouched.counters and step.config == untouched.config
    for one, other in zip(step.model.parameters(), untouched.model.parameters()):
        assert torch.equal(one, other)
    for each in (step, untouched):
        for share in (0.0, 0.1):
            run_step(each, share)
    assert all(
        torch.equal(one, other)
        for one, other in zip(step.model.parameters(), untouched.model.parameters())
    )


@pytest.mark.parametrize(
    "budget",
    [
        {"steps": 359},
        {"steps": 0, "tokens": 359 * 32},
        {"steps": 0, "epochs": 2.8},
        {"steps": 0, "time": 1e-3},
    ],
)
def test_no_search_if_it_takes_more_than_a_tenth_of_the_budget(budget):
    step = make(**budget)
    assert search(step, (1e-4, 1e-3, 1e-2)) == {}
    assert step.config == make(**budget).config and step.counters.step == 0
