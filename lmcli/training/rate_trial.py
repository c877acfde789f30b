"""Which learning rate suits a model that is trained further: a few steps at each, all from the same weights."""

import dataclasses
import math
import statistics
import time
from collections.abc import Generator, Sequence

import torch

from lmcli.config import TrainConfig
from lmcli.training import optimizers
from lmcli.training.divergence import Diverged
from lmcli.training.stepper import Note, Stepper

STEPS, COUNTED = 12, 6  # at each rate, and how many of them, the last, tell how well it does
WARM_UP = 1 / 3  # of these steps
MOST = 0.1  # of the run's budget, for all rates together


def tried(run: Stepper, rates: Sequence[float]) -> Generator[Note, None, dict[float, float]]:
    """Loss by learning rate, in nats per target: of rows that no step had learnt from yet, so none gains by learning them by
    heart; infinite where it explodes. Empty where that would take more than a tenth of the budget.

    The run is left as it was, but for what its steps have found to fit into memory.
    """
    config, counters = run.config, run.counters
    if len(rates) * STEPS > MOST * _steps(config, run.rows.rows_per_epoch):
        return {}
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    before, found = [parameter.detach().clone() for parameter in trained], {}
    pace = _Pace(len(rates) * STEPS, MOST * config.time)
    for rate in rates:
        run.config = dataclasses.replace(config, learning_rate=rate, schedule="constant", warmup=WARM_UP, averaging=0.0)
        run.optimizer = optimizers.build(run.model, run.config, run.team)
        run.counters = dataclasses.replace(counters, losses=[])
        losses = yield from _losses(run, pace)
        with torch.no_grad():
            torch._foreach_copy_(trained, before)
        counters.micro_batch_tokens, counters.recompute = run.counters.micro_batch_tokens, run.counters.recompute
        if not losses:
            found = {}
            break
        found[rate] = statistics.mean(losses[-COUNTED:])
    run.config, run.counters = config, counters
    run.optimizer = optimizers.build(run.model, config, run.team)
    return found


@dataclasses.dataclass
class _Pace:
    """Whether so many steps take more than so many seconds (0: they may), by those made so far."""

    steps: int
    seconds: float
    made: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    def too_slow(self) -> bool:
        self.made += 1
        expected = self.steps / self.made * (time.monotonic() - self.started)
        return bool(self.seconds) and self.made > 1 and expected > self.seconds  # the first step has more to do than others


def _losses(run: Stepper, pace: _Pace) -> Generator[Note, None, list[float]]:
    """Those of the steps at one rate; one that is infinite where it explodes, none where steps take too long."""
    losses = []
    try:
        for number in range(STEPS):
            losses.append((yield from run.step(number / STEPS)).loss)
            if pace.too_slow():
                return []
    except Diverged:
        return [math.inf]
    return losses


def _steps(config: TrainConfig, rows_per_epoch: int) -> float:
    """How many steps a run has by what it counts; without end where time alone ends it."""
    rows = max(1, config.batch_tokens // config.context)
    budgets = (config.steps, config.tokens / config.batch_tokens, config.epochs * rows_per_epoch / rows)
    return min((budget for budget in budgets if budget), default=math.inf)
