"""The training loop: a generator that yields what happened, so that its caller shows, saves and stops."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from lmcli.training import schedules
from lmcli.training.divergence import Diverged
from lmcli.training.state import Counters
from lmcli.training.stepper import Note, Step, Stepper

EVALUATIONS = 8  # of a run, unless eval_every says otherwise; and so many saves and sample texts


@dataclass
class Validation:
    """An evaluation after `step` steps (0: of the weights that a run begins with): whatever `evaluate` returned; `best` when
    its criterion is the lowest so far."""

    step: int
    figures: object
    best: bool
    final: bool


@dataclass
class Due:
    """Something the caller may do now, between two steps: "save" the resumable state, or draw a "sample"."""

    what: str
    step: int


def evaluations(budget: float, cost: float) -> int:
    """How many evaluations a run has, the one at its end included: of a run of `budget` seconds (0: by steps) all of them,
    each `cost` seconds, take a fifteenth."""
    return min(EVALUATIONS, max(1, int(budget / 15 / max(cost, 1e-9)))) if budget else EVALUATIONS


@dataclass
class Run(Stepper):
    """A training run. `elapsed()` is seconds since its start; set `stop` to end it after the current step.

    `evaluate()` returns figures with a `criterion` and reads `evaluation_tokens` tokens for it; `began` is the clock
    (time.monotonic) when the command started.
    """

    evaluate: Callable[[], object]
    began: float
    evaluation_tokens: int = 0
    stop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._before = self._sampled_at = 0.0
        self._sample_seconds = 0.3  # until one has been timed

    def elapsed(self) -> float:
        """Seconds spent on this run, earlier sittings included."""
        return self._before + time.monotonic() - self.began

    def events(self) -> Iterator[Step | Validation | Due | Note]:
        """Steps until a budget is used up or `stop` is set, with what is due between them; at the end a final Validation.
        With `counters.look_first` the first event is a Validation as well.

        Where memory runs out a step is made again in smaller parts, after a Note. Raises UserError when not even a row
        fits, and Diverged when loss or gradient become NaN or infinite or the loss explodes; weights are then as before
        that step. Nothing is to be saved from weights that are not finite: that is Diverged as well. Processes that `follow`
        make the same steps.
        """
        self.team.tell(["begin", asdict(self.counters)])
        yield from self._led_events()
        self.team.tell(None)

    def follow(self) -> Iterator[list]:
        """Makes the leader's steps, and what else takes all processes, until it says that the run is over; what it asks for
        that is not the loop's is handed on. Raises what `events` raises in a step."""
        while (heard := self.team.hear()) is not None:
            match heard:
                case ["begin", counters]:
                    self.counters = Counters(**counters)
                    self.model.set_recompute(self.recompute)
                case ["step", share]:
                    for _ in self.step(share):
                        pass  # the leader tells what there is to note
                case ["measure"]:
                    self._measured()
                case ["finite"]:
                    self.team.finite(self.model)
                case ["swap"]:
                    self.optimizer.swap_averages()
                case ["whole"]:
                    self.team.whole(self.model)
                case _:
                    yield heard

    def _led_events(self) -> Iterator[Step | Validation | Due | Note]:
        counters = self.counters
        self.model.set_recompute(self.recompute)
        self._before = counters.seconds
        if counters.look_first:
            counters.look_first = False
            yield from self._validated(final=False)
        counters.preparation += self.elapsed() - counters.seconds
        start = self.elapsed()
        share = first = self._share()
        if counters.step and share < 1.0:  # resumed: the step before the stop may have left something due
            yield from self._between(share)
        while share < 1.0 and not self.stop and not self._patience_is_over():
            self.team.tell(["step", share])
            step = yield from self.step(share)
            share = self._share()
            counters.seconds = step.elapsed = self.elapsed()
            step.share = share
            step.remaining = (1 - share) / (share - first) * (step.elapsed - start) if share > first else None
            yield step
            if share >= 1.0 or self.stop:
                break
            yield from self._between(share)
            counters.looked = share = max(share, self._share())
        if self._patience_is_over() and counters.looked < 1.0:
            yield Note(counters.step, f"{counters.stale} evaluations in a row were no better than step "
                       f"{counters.best_step:,}: ended at {share:.0%} of the budget (train.patience)")
            counters.looked = share = 1.0
        ended = share >= 1.0 and not self.stop
        if ended and (counters.looked < 1.0 or counters.best == math.inf):
            counters.looked = share
            yield from self._with_averages(self._validated(final=True))
        counters.seconds = self.elapsed()
        self._require_finite()
        if ended and counters.best == math.inf:
            raise self._diverged("no evaluation gave a number")
        yield Due("save", counters.step)
        if counters.best == math.inf:  # no run is left with the weights it began with
            yield Note(counters.step, "saved; stopped before any evaluation, it is measured now (Ctrl-C leaves that out)")
            # the state knows nothing of this one, so that the run goes on as if never stopped
            yield from self._with_averages(self._validated(final=False))

    def _between(self, share: float) -> Iterator[Validation | Due]:
        """What is due after a step that brought the run to `share`: at most once there, however often the run is stopped."""
        counters, config = self.counters, self.config
        last, counters.looked = counters.looked, max(counters.looked, share)
        if share <= last:
            return
        if self._due(config.eval_every, last, share, evaluations(config.time, self._evaluation_cost())):
            yield from self._with_averages(self._validated(final=False))
        if self._due(config.sample_every, last, share) and self._worth_a_sample():
            started = time.monotonic()
            yield from self._with_averages([Due("sample", counters.step)])
            self._sampled_at, self._sample_seconds = time.monotonic(), time.monotonic() - started
        if self._due(config.save_every, last, share) and not self._above():  # else the good ones would be pushed out
            counters.seconds = self.elapsed()
            self._require_finite()
            yield Due("save", counters.step)

    def budget_has_changed(self) -> None:
        """To be called where a resumed run has another budget: it was looked at up to here, whatever share that is now."""
        self._before = self.counters.seconds
        if (share := self._share()) < 1.0:
            self.counters.looked = share

    def _patience_is_over(self) -> bool:
        return 0 < self.config.patience <= self.counters.stale

    def _share(self) -> float:
        c = self.counters
        progress = schedules.Progress(c.step, c.tokens, c.rows / self.rows.rows_per_epoch, self.elapsed())
        return progress.share(self.config, c.preparation, 1.1 * self._evaluation_cost() + 0.3)

    def _evaluation_cost(self) -> float:
        """Seconds of an evaluation: as timed, else by the speed of training, whose backward pass costs twice a forward; an
        evaluation is float32, which takes twice as long as bfloat16."""
        if self.counters.evaluation_seconds:
            return self.counters.evaluation_seconds
        if self.evaluation_tokens and self._speed:
            return self.evaluation_tokens / ((3 if self.placement.dtype == torch.float32 else 1.5) * self._speed)
        return 0.04 * self.config.time

    def _due(self, every: int, last: float, share: float, times: int = EVALUATIONS) -> bool:
        if every:
            return self.counters.step % every == 0
        return math.floor(last * times) < math.floor(share * times)

    def _worth_a_sample(self) -> bool:
        """In a run by time, samples keep to a fiftieth of it."""
        if self.config.sample_every or not self.config.time:
            return True
        return time.monotonic() - (self._sampled_at or self.began) >= 50 * self._sample_seconds

    def _with_averages(self, events: Iterable[Validation | Due]) -> Iterator[Validation | Due]:
        """Events while which the model has the mean of its weights, where there is one (Izmailov et al. 2018)."""
        if self.counters.averaged:
            self._swap()
        yield from events
        if self.counters.averaged:
            self._swap()

    def _swap(self) -> None:
        self.team.ask("swap")
        self.optimizer.swap_averages()

    def _validated(self, final: bool) -> Iterator[Validation]:
        counters, started = self.counters, time.monotonic()
        figures = self._measured()
        counters.evaluation_seconds = time.monotonic() - started
        best = figures.criterion < counters.best and self.team.finite(self.model)
        counters.stale = 0 if best else counters.stale + 1
        if best:
            counters.best, counters.best_step = figures.criterion, counters.step
        yield Validation(counters.step, figures, best, final)

    def _measured(self) -> object:
        self.team.ask("measure")
        self.model.eval()
        with self._enough_memory("an evaluation"), self.team.working():
            figures = self.evaluate()
        self.model.train()
        self.team.settle(self.model)
        return figures

    def _require_finite(self) -> None:
        if not self.team.finite(self.model):
            raise self._diverged("weights are NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        step = self.counters.step
        return Diverged(f"{what} after step {step} ({self.placement})", self._remedy(), step + 1)
