"""The training loop: a generator that yields what happened; its caller shows, saves and stops."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from lmcli.errors import UserError
from lmcli.model.finite import not_finite
from lmcli.training import schedules
from lmcli.training.divergence import Diverged
from lmcli.training.objective import Evaluation, ValidationFigures
from lmcli.training.resume_state import Counters
from lmcli.training.train_step import Note, Step, TrainStep

SECONDS_BETWEEN_SAVES = 600.0  # at most, however long the run is


@dataclass
class Validation:
    """An evaluation after `step` steps; `best` if its criterion is the lowest so far.

    Of equal criteria, such as accuracies, the one with the lower loss is better.
    """

    step: int
    figures: ValidationFigures
    best: bool
    final: bool


@dataclass
class Due:
    """What is due between two steps.

    The caller is to "save" the resume state or to draw a "sample"; an "evaluation" follows.
    `seconds` is what it is expected to take.
    """

    what: str
    step: int
    seconds: float = 0.0


Event = Step | Validation | Due | Note


def evaluated_per_trained(dtype: torch.dtype) -> float:
    """How many tokens are evaluated in the time of training one, in `dtype`.

    A backward pass costs two forward passes; evaluations are float32, half as fast as bfloat16.
    """
    return 3.0 if dtype == torch.float32 else 1.5


@dataclass
class Trainer:
    """Repeats a train step until the budget is used up; evaluates, samples and saves between.

    `started_at` is the clock (time.monotonic) when the command started. `evaluations` is how many
    there are at most, unless eval_every is set. Set `stop` to end after the current step.
    """

    train_step: TrainStep
    evaluation: Evaluation
    started_at: float
    evaluations: int = schedules.EVALUATIONS
    stop: bool = False
    _earlier_seconds: float = field(default=0.0, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _looked_at: float = field(default=0.0, init=False)  # when it was last checked what is due
    _sampled_at: float = field(default=0.0, init=False)
    _sample_seconds: float = field(default=0.3, init=False)  # until one has been timed
    _save_seconds: float = field(default=0.1, init=False)  # likewise

    def __post_init__(self) -> None:
        self.config, self.replicas = self.train_step.config, self.train_step.replicas
        self._time_left = schedules.TimeLeft(self.config)

    @property
    def counters(self) -> Counters:
        """Where the run stands."""
        return self.train_step.counters

    def elapsed(self) -> float:
        """Seconds spent on this run, those before a resume included."""
        return self._earlier_seconds + time.monotonic() - self.started_at

    def events(self) -> Iterator[Event]:
        """Steps until a budget is used up or `stop` is set, and what is due between.

        With `counters.look_first` the initial weights are evaluated first. Raises UserError if
        memory is too small for one row; Diverged if loss, gradient or weights are not finite or
        the loss explodes: the weights are then as before that step.
        """
        counters = self.counters
        self.replicas.broadcast(["begin", asdict(counters)])
        self.train_step.begin(counters)
        self._earlier_seconds = counters.seconds
        self._saved_at = self._looked_at = time.monotonic()
        # the initial model, with --from
        if counters.look_first:
            counters.look_first = False
            yield from self._evaluate(final=False)
        counters.preparation += self.elapsed() - counters.seconds
        share = 1.0 if counters.finished else self._share()
        self._time_left.begin(self._progress())
        # a new budget
        if counters.begins_stage and share < 1.0:
            yield from self._save()
        # resumed: something may be due after the step before the stop
        if counters.step and share < 1.0:
            yield from self._due_events(share)
        # the steps
        while share < 1.0 and not self.stop and not self._out_of_patience():
            started = time.monotonic()
            self.replicas.broadcast(["step", share])
            gradients = yield from self.train_step.gradients()
            step = self.train_step.update(gradients, share)
            share = self._share()
            counters.seconds = step.elapsed = self.elapsed()
            step.share = share
            self._time_left.add_step(self._progress(), time.monotonic() - started)
            step.remaining = self._time_left.estimate(
                self._progress(), self._seconds_between(share)
            )
            yield step
            if share >= 1.0 or self.stop:
                break
            yield from self._due_events(share)
            counters.looked = share = max(share, self._share())
        yield from self._last_events(share)
        self.replicas.broadcast(None)

    def follow(self) -> Iterator[list]:
        """Makes the leader's steps and collective operations until the run is over.

        Yields the commands that are not the loop's. Raises what `events` raises in a step.
        """
        while (command := self.replicas.receive()) is not None:
            match command:
                case ["begin", counters]:
                    self.train_step.begin(Counters(**counters))
                case ["step", share]:
                    self._follow_step(share)
                case ["measure"]:
                    self._measure()
                case ["all_finite"]:
                    self.replicas.all_finite(self.train_step.model)
                case ["swap"]:
                    self.train_step.optimizer.swap_averages()
                case ["gather"]:
                    self.replicas.gather(self.train_step.model)
                case _:
                    yield command

    def _follow_step(self, share: float) -> None:
        making = self.train_step.gradients()
        try:
            while True:
                next(making)  # notes are the leader's to report
        except StopIteration as done:
            self.train_step.update(done.value, share)

    def _due_events(self, share: float) -> Iterator[Validation | Due]:
        """What is due after the step that reached `share` of the budget.

        Nothing is due twice at the same share, however often the run is stopped and resumed.
        """
        counters, config = self.counters, self.config
        last = counters.looked
        if share <= last:
            return
        evaluates = self._is_due(config.eval_every, last, share, self._evaluations())
        # doubtful states are not saved: they would replace sound ones
        doubtful = self.train_step.steps_above_limit()
        # before `looked` changes: a run that resumes there makes the evaluation
        if self._is_save_overdue(evaluates) and not doubtful:
            yield from self._save()
        counters.looked = share
        if evaluates:
            with self._averaged_weights():
                yield from self._evaluate(final=False)
        if self._is_due(config.sample_every, last, share) and self._worth_a_sample():
            started = time.monotonic()
            with self._averaged_weights():
                yield Due("sample", counters.step, self._sample_seconds)
            self._sampled_at, self._sample_seconds = time.monotonic(), time.monotonic() - started
        if self._is_due(config.save_every, last, share) and not doubtful:
            yield from self._save()
        self._looked_at = time.monotonic()

    def _is_save_overdue(self, evaluates: bool) -> bool:
        """True if SECONDS_BETWEEN_SAVES would be over after an evaluation, if any, and a step."""
        now = time.monotonic()
        pause = now - self._looked_at + evaluates * self.counters.evaluation_seconds
        return now - self._saved_at + pause >= SECONDS_BETWEEN_SAVES

    def _evaluations(self) -> int:
        """How many evaluations the run affords, unless eval_every is set."""
        timed = schedules.timed_evaluations(self.config.time, self._evaluation_cost())
        return min(timed, self.evaluations)

    def _save(self) -> Iterator[Due]:
        """The event of a save, for which the counters are made ready; it is timed."""
        self.counters.seconds = self.elapsed()
        self._require_finite()
        self._saved_at = time.monotonic()
        yield Due("save", self.counters.step, self._save_seconds)
        self._save_seconds = time.monotonic() - self._saved_at

    def _last_events(self, share: float) -> Iterator[Event]:
        """The final evaluation and save of a run that has ended at `share` of its budget."""
        counters = self.counters
        if self._out_of_patience() and counters.looked < 1.0:
            yield Note(
                counters.step,
                f"{counters.stale} evaluations in a row were no better than step "
                f"{counters.best_step:,}: ended at {share:.0%} of the budget (train.patience)",
            )
            counters.looked = share = 1.0
        ended = share >= 1.0 and not self.stop
        if ended and (counters.looked < 1.0 or counters.best == math.inf):
            if self._is_save_overdue(True) and not self.train_step.steps_above_limit():
                yield from self._save()
            counters.looked = share
            with self._averaged_weights():
                yield from self._evaluate(final=True)
        self._require_finite()
        if ended and counters.best == math.inf:
            raise self._diverged("no evaluation gave a number")
        yield from self._save()
        # a run stopped before any evaluation is evaluated now, so that it keeps trained weights;
        # the state does not record this, so a resumed run is as if it had never stopped
        if counters.best == math.inf:
            yield Note(
                counters.step,
                "saved; stopped before any evaluation, it is measured now (Ctrl-C leaves that out)",
            )
            with self._averaged_weights():
                yield from self._evaluate(final=False)

    def change_budget(self) -> None:
        """Tells a resumed run that it has another budget: nothing is due at the present share."""
        self._earlier_seconds = self.counters.seconds
        if (share := self._share()) < 1.0:
            self.counters.looked = share

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.counters.stale

    def _progress(self) -> schedules.Progress:
        counters = self.counters
        rows = counters.rows - counters.stage_rows
        return schedules.Progress(
            counters.step - counters.stage_step,
            counters.tokens - counters.stage_tokens,
            rows / self.train_step.rows.rows_per_epoch,
            self.elapsed() - counters.stage_seconds,
        )

    def _share(self) -> float:
        at_the_end = 1.1 * self._evaluation_cost() + 0.3
        return self._progress().share(self.config, self.counters.preparation, at_the_end)

    def _seconds_between(self, share: float) -> float:
        """Seconds of the evaluations, samples and saves that are planned after `share`.

        Samples that the run may leave out take little time.
        """
        config, last = self.config, self.counters.looked
        evaluations = self._count_due(config.eval_every, last, share, self._evaluations())
        samples = config.sample_every and self._count_due(config.sample_every, last, share)
        saves = self._count_due(config.save_every, last, share)
        # the last ones are made in any case
        return (
            max(1, evaluations) * self._evaluation_cost()
            + samples * self._sample_seconds
            + max(1, saves) * self._save_seconds
        )

    def _count_due(
        self, every: int, last: float, share: float, times: int = schedules.EVALUATIONS
    ) -> int:
        """How often something is still due: what is due at `share` is counted with the rest."""
        if not every:
            return times - math.floor(last * times)
        step = self.counters.step
        before = self.counters.stage_step
        planned = before + math.floor((step - before) / share + 1e-6) if share else step
        return planned // every - (step - 1) // every

    def _evaluation_cost(self) -> float:
        """Seconds of an evaluation: of the last one, else estimated from the speed of training."""
        if self.counters.evaluation_seconds:
            return self.counters.evaluation_seconds
        if self.evaluation.tokens and self.train_step.tokens_per_second:
            ratio = evaluated_per_trained(self.train_step.device_config.dtype)
            return self.evaluation.tokens / (ratio * self.train_step.tokens_per_second)
        return 0.04 * self.config.time

    def _is_due(
        self, every: int, last: float, share: float, times: int = schedules.EVALUATIONS
    ) -> bool:
        """True after every so many steps; by default `times` in a run."""
        if every:
            return self.counters.step % every == 0
        return math.floor(last * times) < math.floor(share * times)

    def _worth_a_sample(self) -> bool:
        """False if samples would take more than a fiftieth of the time; they change no result."""
        if self.config.sample_every:
            return True
        since = time.monotonic() - (self._sampled_at or self.started_at)
        return since >= 50 * self._sample_seconds

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Puts the mean of the last weights in place, if there is one (Izmailov et al. 2018)."""
        self._swap_averages()
        yield
        self._swap_averages()

    def _swap_averages(self) -> None:
        if self.counters.averaged:
            self.replicas.run_on_all("swap")
            self.train_step.optimizer.swap_averages()

    def _evaluate(self, final: bool) -> Iterator[Due | Validation]:
        yield Due("evaluation", self.counters.step, self._evaluation_cost())
        yield self._validate(final)

    def _validate(self, final: bool) -> Validation:
        counters, started = self.counters, time.monotonic()
        figures = self._measure()
        counters.evaluation_seconds = time.monotonic() - started
        # later ones may recover: the best model stays, and a save requires finite weights
        if not counters.step and not math.isfinite(figures.criterion):
            raise self._no_number()
        rank = figures.criterion, figures.loss
        best = rank < (counters.best, counters.best_loss)
        best = best and self.replicas.all_finite(self.train_step.model)
        counters.stale = 0 if best else counters.stale + 1
        if best:
            (counters.best, counters.best_loss), counters.best_step = rank, counters.step
        return Validation(counters.step, figures, best, final)

    def _measure(self) -> ValidationFigures:
        model = self.train_step.model
        self.replicas.run_on_all("measure")
        model.eval()
        with self.train_step.enough_memory("an evaluation"), self.replicas.peer_errors():
            figures = self.evaluation.measure()
        model.train()
        self.replicas.reshard(model)
        return figures

    def _no_number(self) -> UserError:
        """The error of a starting model whose loss is NaN or infinite."""
        if self.replicas.sharded:
            return self._diverged("the validation loss is NaN or infinite")
        problem = "the loss of the validation set is NaN or infinite"
        model = self.train_step.model
        return not_finite(model, "the starting model", problem, "before the first step")

    def _require_finite(self) -> None:
        if not self.replicas.all_finite(self.train_step.model):
            raise self._diverged("weights are NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        step, device = self.counters.step, self.train_step.device_config
        return Diverged(f"{what} after step {step} ({device})", self.train_step.remedy(), step + 1)
