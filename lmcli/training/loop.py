"""The training loop: a generator that yields what happened, so that its caller shows, saves and stops."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer
from lmcli.text.batches import ExampleRows, MaskedRows, PackedRows
from lmcli.training import objectives, optimizers, schedules
from lmcli.training.objectives import OBJECTIVES, Objective
from lmcli.training.state import Counters

MOST_MICRO_BATCH_TOKENS = 16_384
EVALUATIONS = 8  # of a run, unless eval_every says otherwise


@dataclass
class Step:
    """One optimizer step. `loss` is nats per target of its batch, `share` how much of the budget is used,
    `remaining` the seconds the run will still take (None while unknown)."""

    step: int
    tokens: int
    elapsed: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    share: float
    epoch: float
    remaining: float | None


@dataclass
class Validation:
    """An evaluation: whatever `evaluate` returned; `best` when its criterion is the lowest so far."""

    step: int
    figures: object
    best: bool
    final: bool


@dataclass
class Due:
    """Something the caller may do now, between two steps: "save" the resumable state, or draw a "sample"."""

    what: str
    step: int


@dataclass
class Run:
    """A training run. `elapsed()` is seconds since its start; set `stop` to end it after the current step.

    `evaluate()` returns figures with a `criterion` and reads `evaluation_tokens` tokens for it; `began` is the clock
    (time.monotonic) when the command started.
    """

    model: Transformer
    rows: PackedRows | MaskedRows | ExampleRows
    config: TrainConfig
    placement: Placement
    evaluate: Callable[[], object]
    began: float
    evaluation_tokens: int = 0
    objective: Objective = OBJECTIVES["causal"]
    counters: Counters = field(default_factory=Counters)
    stop: bool = False

    def __post_init__(self) -> None:
        self.model.training_dtype = self.placement.dtype
        if self.config.compile == "on" or (self.config.compile == "auto" and self._worth_compiling()):
            self.model.compile_blocks()
        self.optimizer = optimizers.build(self.model, self.config)
        self._evaluation_seconds = self._evaluated_at = self._speed = 0.0
        self._before = self._sampled_at = 0.0
        self._sample_seconds = 0.3  # until one has been timed

    def _worth_compiling(self) -> bool:
        # on a CPU it is within noise at 6 × 384 and a loss below, and takes 23 s
        return self.placement.device.type == "cuda" and not 0 < self.config.time < 600

    def elapsed(self) -> float:
        """Seconds spent on this run, earlier sittings included."""
        return self._before + time.monotonic() - self.began

    def events(self) -> Iterator[Step | Validation | Due]:
        """Steps until a budget is used up or `stop` is set, with what is due between them; at the end a final Validation.

        Raises UserError when loss or gradient become NaN or infinite; weights are then as before that step.
        """
        counters = self.counters
        self._before = counters.seconds
        counters.preparation += self.elapsed() - counters.seconds
        start = self.elapsed()
        share = first = self._share()
        if counters.step and share < 1.0:  # resumed: the step before the stop may have left something due
            yield from self._between(share)
        while share < 1.0 and not self.stop:
            step = self._step(share)
            share = self._share()
            counters.seconds = step.elapsed = self.elapsed()
            step.share = share
            step.remaining = (1 - share) / (share - first) * (step.elapsed - start) if share > first else None
            yield step
            if share >= 1.0 or self.stop:
                break
            yield from self._between(share)
            counters.looked = share = max(share, self._share())
        ended = share >= 1.0 and not self.stop
        if (ended and counters.looked < 1.0) or not counters.best_step:  # no run is left with the weights it began with
            counters.looked = share
            yield self._validate(final=ended)
        counters.seconds = self.elapsed()
        yield Due("save", counters.step)

    def _between(self, share: float) -> Iterator[Validation | Due]:
        """What is due after a step that brought the run to `share`: at most once there, however often the run is stopped."""
        counters, config = self.counters, self.config
        last, counters.looked = counters.looked, max(counters.looked, share)
        if share <= last:
            return
        if self._due(config.eval_every, last, share) and self._affordable():
            yield self._validate(final=False)
        if self._due(config.sample_every, last, share) and self._worth_a_sample():
            started = time.monotonic()
            yield Due("sample", counters.step)
            self._sampled_at, self._sample_seconds = time.monotonic(), time.monotonic() - started
        if self._due(config.save_every, last, share):
            counters.seconds = self.elapsed()
            yield Due("save", counters.step)

    def _share(self) -> float:
        c = self.counters
        progress = schedules.Progress(c.step, c.tokens, c.rows / self.rows.rows_per_epoch, self.elapsed())
        return progress.share(self.config, c.preparation, 1.1 * self._evaluation_cost() + 0.3)

    def _evaluation_cost(self) -> float:
        """Seconds of an evaluation: as timed, else by the speed of training, whose backward pass costs twice a forward."""
        if self._evaluation_seconds:
            return self._evaluation_seconds
        if self.evaluation_tokens and self._speed:
            return self.evaluation_tokens / (3 * self._speed)
        return 0.04 * self.config.time

    def _due(self, every: int, last: float, share: float) -> bool:
        if every:
            return self.counters.step % every == 0
        return math.floor(last * EVALUATIONS) < math.floor(share * EVALUATIONS)

    def _affordable(self) -> bool:
        """In a run by time, evaluations keep to a fifteenth of it; in a run by steps their places are fixed."""
        if self.config.eval_every or not self.config.time:
            return True
        room = time.monotonic() - self._evaluated_at if self._evaluated_at else self.config.time
        return room >= 15 * self._evaluation_cost()

    def _worth_a_sample(self) -> bool:
        """In a run by time, samples keep to a fiftieth of it."""
        if self.config.sample_every or not self.config.time:
            return True
        return time.monotonic() - (self._sampled_at or self.began) >= 50 * self._sample_seconds

    def _validate(self, final: bool) -> Validation:
        counters, started = self.counters, time.monotonic()
        self.model.eval()
        figures = self.evaluate()
        self.model.train()
        self._evaluated_at = time.monotonic()
        self._evaluation_seconds = self._evaluated_at - started
        best = figures.criterion < counters.best
        if best:
            counters.best, counters.best_step = figures.criterion, counters.step
        return Validation(counters.step, figures, best, final)

    def _step(self, share: float) -> Step:
        config, counters, started = self.config, self.counters, time.monotonic()
        # the very first step, at share 0, would have rate 0
        factor = schedules.factor(config.schedule, max(share, config.warmup / 100), config.warmup)
        rate = factor * config.learning_rate
        loss, tokens = self._gradients()
        norm = self.optimizer.clip(config.gradient_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"loss is {loss} and the gradient norm {norm} at step {counters.step + 1} "
                f"(learning rate {rate:.2g}, {self.placement})", where="training",
                hint=f"the best model, of step {counters.best_step}, is kept; try --set train.learning_rate="
                     f"{config.learning_rate / 3:.1g} or --set train.precision=float32")
        self.optimizer.set_factor(factor)
        self.optimizer.step()
        counters.step += 1
        counters.tokens += tokens
        seconds = time.monotonic() - started
        self._speed = max(self._speed, tokens / seconds)  # the first steps are slower than the rest
        return Step(counters.step, counters.tokens, 0.0, loss, rate, norm, tokens / seconds, share,
                    counters.rows / self.rows.rows_per_epoch, None)

    def _gradients(self) -> tuple[float, int]:
        """Adds up the gradients of one optimizer step; returns its loss in nats per target and its tokens."""
        config, counters = self.config, self.counters
        batches = self.rows.step(counters.rows, config.batch_tokens, config.micro_batch_tokens or MOST_MICRO_BATCH_TOKENS)
        targets = sum(batch.count for batch in batches)
        total = torch.zeros((), device=self.placement.device)
        self.optimizer.zero_grad()
        for batch in batches:
            loss = objectives.loss(self.objective, self.model, batch, config.label_smoothing)
            (loss / targets).backward()
            total += loss.detach()
        counters.rows += sum(batch.rows for batch in batches)
        return float(total) / targets, sum(batch.tokens for batch in batches)
