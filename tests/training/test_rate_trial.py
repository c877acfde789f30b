"""Trying learning rates before a model is trained further: what is found, and that nothing of it is left."""

import math

import numpy as np
import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer
from lmcli.text.batches import PackedRows
from lmcli.training import loop, rate_trial

TINY = ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16, num_hidden_layers=1,
                   num_attention_heads=2).complete()


@pytest.fixture
def run():
    """run(**config): a Run over numbers that count up to 40 again and again, which is soon learnt."""
    def make(**config) -> loop.Run:
        model = Transformer(TINY)
        model.initialize(0)
        options = {"context": 8, "batch_tokens": 32, "optimizer": "adamw", "steps": 1000, **config}
        rows = PackedRows(np.arange(4000, dtype=np.uint16) % 40, 8, 0, 0)
        placement = Placement(torch.device("cpu"), torch.float32)
        return loop.Run(model, rows, TrainConfig(**options), placement, lambda: None, 0.0)
    return make


def tried(made, rates):
    trial = rate_trial.tried(made, rates)
    with pytest.raises(StopIteration) as end:
        while True:
            next(trial)
    return end.value.value


def test_the_rate_that_learns_best_has_the_lowest_loss(run):
    made = run()
    losses = tried(made, (1e-6, 3e-2, 1e7))
    assert list(losses) == [1e-6, 3e-2, 1e7] and min(losses, key=losses.get) == 3e-2
    assert losses[1e-6] == pytest.approx(math.log(40), abs=0.05) and losses[1e7] > 2 * losses[1e-6]


def test_the_run_is_as_if_nothing_had_been_tried(run):
    untried, made = run(dropout=0.1), run(dropout=0.1)
    tried(made, (1e-3, 1e-2))
    assert made.counters == untried.counters and made.config == untried.config
    for one, other in zip(made.model.parameters(), untried.model.parameters()):
        assert torch.equal(one, other)
    for each in (made, untried):
        for share in (0.0, 0.1):
            list(each.step(share))
    assert all(torch.equal(one, other) for one, other in zip(made.model.parameters(), untried.model.parameters()))


@pytest.mark.parametrize("budget", [{"steps": 359}, {"steps": 0, "tokens": 359 * 32}, {"steps": 0, "epochs": 2.8},
                                    {"steps": 0, "time": 1e-3}])
def test_nothing_is_tried_where_that_would_take_more_than_a_tenth_of_the_budget(run, budget):
    made = run(**budget)
    assert tried(made, (1e-4, 1e-3, 1e-2)) == {}
    assert made.config == run(**budget).config and made.counters.step == 0
