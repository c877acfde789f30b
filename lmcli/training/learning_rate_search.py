"""Learning-rate search for a model that is trained further: a few steps at each rate."""

import math
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmcli.config import TrainConfig
from lmcli.training.divergence import Diverged
from lmcli.training.train_step import Note, TrainStep

STEPS = 12  # at each rate
COUNTED_STEPS = 6  # the last ones, whose mean loss compares the rates
WARM_UP = 1 / 3  # of these steps
BUDGET_SHARE = 0.1  # of the run's budget, for all rates together at most


def search(
    train_step: TrainStep, rates: Sequence[float]
) -> Generator[Note, None, dict[float, float]]:
    """Loss by learning rate, in nats per target; infinite for a rate that explodes.

    The losses are of rows that no step has learned from yet, so memorizing does not help. Empty if
    the search would take more than a tenth of the budget. Weights and counters are left as they
    were, except for what was found to fit into memory.
    """
    config, counters = train_step.config, train_step.counters
    per_epoch = train_step.rows.rows_per_epoch
    if len(rates) * STEPS > BUDGET_SHARE * _planned_steps(config, per_epoch):
        return {}
    trained: list[Tensor] = [p for p in train_step.model.parameters() if p.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    clock = _Clock(len(rates) * STEPS, BUDGET_SHARE * config.time)
    losses: dict[float, float] = {}
    for rate in rates:
        trial_config = replace(
            config, learning_rate=rate, schedule="constant", warmup=WARM_UP, averaging=0.0
        )
        trial = replace(train_step, config=trial_config, counters=replace(counters, losses=[]))
        trial_losses = yield from _trial_losses(trial, clock)
        with torch.no_grad():
            torch._foreach_copy_(trained, before)
        counters.micro_batch_tokens = trial.counters.micro_batch_tokens
        counters.recompute = trial.counters.recompute
        if not trial_losses:
            return {}
        losses[rate] = statistics.mean(trial_losses[-COUNTED_STEPS:])
    return losses


@dataclass
class _Clock:
    """Estimates whether all steps together take more than `seconds` (0: no limit)."""

    steps: int
    seconds: float
    steps_done: int = 0
    started: float = field(default_factory=time.monotonic)

    def too_slow(self) -> bool:
        self.steps_done += 1
        expected = self.steps / self.steps_done * (time.monotonic() - self.started)
        # the first step has more to do than the others
        return self.seconds > 0 and self.steps_done > 1 and expected > self.seconds


def _trial_losses(trial: TrainStep, clock: _Clock) -> Generator[Note, None, list[float]]:
    """The losses of the steps at one rate: [inf] if they explode, [] if they take too long."""
    losses = []
    try:
        for number in range(STEPS):
            gradients = yield from trial.gradients()
            losses.append(trial.update(gradients, number / STEPS).loss)
            if clock.too_slow():
                return []
    except Diverged:
        return [math.inf]
    return losses


def _planned_steps(config: TrainConfig, rows_per_epoch: int) -> float:
    """How many steps a run has by its budgets; infinite if only time limits it."""
    rows = max(1, config.batch_tokens // config.context)
    budgets = (
        config.steps,
        config.tokens / config.batch_tokens,
        config.epochs * rows_per_epoch / rows,
    )
    return min((budget for budget in budgets if budget), default=math.inf)
