"""The training loop: a generator that yields what happened, so that its caller shows, saves and stops."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.model import device
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer
from lmcli.text.batches import Batch, ExampleRows, MaskedRows, PackedRows
from lmcli.training import divergence, objectives, optimizers, schedules
from lmcli.training.divergence import Diverged
from lmcli.training.objectives import OBJECTIVES, Objective
from lmcli.training.parallel import ALONE, Team
from lmcli.training.state import Counters

MICRO_BATCH_TOKENS = {"cpu": 16_384, "mps": 16_384, "cuda": 65_536}  # of one forward pass at most
EVALUATIONS = 8  # of a run, unless eval_every says otherwise; and so many saves and sample texts
PLACES_TOLD = 4  # of the rows that an error names
SMALLER = "lower train.context, model.hidden_size, model.num_hidden_layers or tokenizer.vocab_size"


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
class Note:
    """Something that the run changed by itself, as one line of text. It goes on after `step`."""

    step: int
    text: str


def evaluations(budget: float, cost: float) -> int:
    """How many evaluations a run has, the one at its end included: of a run of `budget` seconds (0: by steps) all of them,
    each `cost` seconds, take a fifteenth."""
    return min(EVALUATIONS, max(1, int(budget / 15 / max(cost, 1e-9)))) if budget else EVALUATIONS


def micro_batch_tokens(config: TrainConfig, device: torch.device) -> int:
    """Tokens of one forward pass at most, where memory allows."""
    return config.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]


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
    team: Team = ALONE

    def __post_init__(self) -> None:
        self.model.training_dtype = self.placement.dtype
        if self.config.compile == "on" or (self.config.compile == "auto" and self._worth_compiling()):
            self.model.compile_blocks()
        self.optimizer = optimizers.build(self.model, self.config)
        self._speed = self._before = self._sampled_at = 0.0
        self._sample_seconds = 0.3  # until one has been timed
        config = self.model.config
        choices = {"lm": config.vocab_size, "span": self.config.context}.get(self.objective.head, len(config.labels))
        self._uniform = math.log(max(2, choices))

    def _worth_compiling(self) -> bool:
        # on a CPU it is within noise at 6 × 384 and a loss below, and takes 23 s
        return self.placement.device.type == "cuda" and not 0 < self.config.time < 600

    def elapsed(self) -> float:
        """Seconds spent on this run, earlier sittings included."""
        return self._before + time.monotonic() - self.began

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward pass at most: what fitted once memory had run out, else what is configured."""
        return self.counters.micro_batch_tokens or micro_batch_tokens(self.config, self.placement.device)

    @property
    def recompute(self) -> bool:
        """Whether backward passes calculate activations again."""
        return self.config.recompute == "on" or (self.config.recompute == "auto" and self.counters.recompute)

    def events(self) -> Iterator[Step | Validation | Due | Note]:
        """Steps until a budget is used up or `stop` is set, with what is due between them; at the end a final Validation.

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
                    for _ in self._step(share):
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

    def rehearse(self) -> Iterator[Note]:
        """Leaves the gradients of the first step, which is not made, in the parameters."""
        yield from self._gradients_that_fit()
        self.counters.rows = 0

    def join(self, team: Team) -> None:
        """Makes this the run of a team: what each process is to hold of the model is brought to its device. To be called
        before there are moments."""
        self.team = team
        team.distribute(self.model, self.placement.device)
        self.optimizer = optimizers.build(self.model, self.config, team)

    def _led_events(self) -> Iterator[Step | Validation | Due | Note]:
        counters = self.counters
        self.model.set_recompute(self.recompute)
        self._before = counters.seconds
        counters.preparation += self.elapsed() - counters.seconds
        start = self.elapsed()
        share = first = self._share()
        if counters.step and share < 1.0:  # resumed: the step before the stop may have left something due
            yield from self._between(share)
        while share < 1.0 and not self.stop and not self._patience_is_over():
            self.team.tell(["step", share])
            step = yield from self._step(share)
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
        if counters.best == math.inf:  # no run is left with the weights it began with; the state knows nothing of this one,
            yield from self._with_averages(self._validated(final=False))  # so that the run goes on as if never stopped

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

    def _step(self, share: float) -> Generator[Note, None, Step]:
        config, counters, started = self.config, self.counters, time.monotonic()
        # the very first step, at share 0, would have rate 0
        factor = schedules.factor(config.schedule, max(share, config.warmup / 100), config.warmup)
        rate, position = factor * config.learning_rate, counters.rows
        self.team.seed(config.seed, counters.step)
        loss, tokens = yield from self._gradients_that_fit()
        norm = self.optimizer.clip(config.gradient_clip)
        self._require_sound(loss, norm, rate, position)
        self.optimizer.set_factor(factor)
        with self._enough_memory(f"the update of step {counters.step + 1}"):
            self.optimizer.step()
            counters.averaged = counters.averaged + 1 if share >= 1 - config.averaging else 0
            if counters.averaged:
                self.optimizer.average(counters.averaged)
        counters.step += 1
        counters.tokens += tokens
        seconds = time.monotonic() - started
        self._speed = max(self._speed, tokens / seconds)  # the first steps are slower than the rest
        return Step(counters.step, counters.tokens, 0.0, loss, rate, norm, tokens / seconds, share,
                    counters.rows / self.rows.rows_per_epoch, None)

    def _gradients_that_fit(self) -> Generator[Note, None, tuple[float, int]]:
        """`_gradients`; where memory runs out, again in smaller parts, from the same place in data and random numbers."""
        position, states = self.counters.rows, device.random_states(self.placement.device)
        while True:
            made = None
            try:
                with self.team.working():
                    made = self._gradients()
            except (RuntimeError, MemoryError) as error:
                if not device.ran_out_of_memory(error):
                    raise
                if self.team.shards:  # the others are in the middle of a step, and cannot be told
                    raise self._out_of_memory(f"step {self.counters.step + 1}") from error
            if not self.team.any(made is None):
                return self._summed(*made)
            # only here, where the error no longer holds the frames it came through, is their memory free
            self.optimizer.zero_grad()
            device.free_memory(self.placement.device)
            self.counters.rows = position
            yield Note(self.counters.step, self._made_smaller())
            device.set_random_states(states)

    def _made_smaller(self) -> str:
        """Changes what the next try has in memory at once, and says how; UserError when nothing is left to change."""
        counters, config = self.counters, self.config
        batches = self._batches()
        largest = max(batch.size for batch in batches)
        if max(batch.rows for batch in batches) > 1:
            tried = min(self.micro_batch_tokens, largest)
            counters.micro_batch_tokens = max(1, tried // 2)
            return (f"out of memory with {tried:,} tokens at once: going on with {counters.micro_batch_tokens:,}; the batch "
                    f"of an optimizer step stays {config.batch_tokens:,}")
        if config.recompute == "auto" and not counters.recompute:
            counters.recompute = True
            self.model.set_recompute(True)
            return (f"out of memory with one row of {largest:,} tokens: going on with activations calculated again in the "
                    "backward pass (train.recompute), slower and in less memory")
        again = ", even with activations calculated again in the backward pass" if self.recompute else ""
        hint = SMALLER if self.recompute else f"leave train.recompute at auto, or {SMALLER}"
        raise UserError(f"out of memory at step {counters.step + 1}: not even one row of {largest:,} tokens fits{again}",
                        where="training", hint=hint)

    @contextmanager
    def _enough_memory(self, what: str) -> Iterator[None]:
        """UserError when memory runs out in what cannot be made smaller."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not device.ran_out_of_memory(error):
                raise
            raise self._out_of_memory(what) from error

    def _out_of_memory(self, what: str) -> UserError:
        smaller = f"lower train.micro_batch_tokens or {SMALLER.removeprefix('lower ')}" if self.team.shards else SMALLER
        return UserError(f"out of memory in {what}", where="training", hint=smaller)

    def _require_sound(self, loss: float, norm: float, rate: float, position: int) -> None:
        """Diverged when the next update would go on from a loss or gradient that there is no coming back from."""
        counters, before = self.counters, self._above()
        if not counters.step:
            counters.first_loss = loss
        counters.losses = [*counters.losses, loss][-divergence.STEPS_ABOVE:]
        if math.isfinite(loss) and math.isfinite(norm):
            if not divergence.exploded(counters.losses, self._limit()):
                return
            what = (f"the loss has exploded: {loss:.4g} nats/{self.objective.target}, where guessing costs "
                    f"{self._uniform:.3g},")
        else:
            what = f"loss is {loss:.4g}" if not math.isfinite(loss) else f"gradient norm is {norm:.3g}"
        step = counters.step + 1
        raise Diverged(f"{what} at step {step} (loss {loss:.4g}, gradient norm {norm:.3g}, learning rate {rate:.2g}, "
                       f"{self.placement}; {self._rows_told(position)})", self._remedy(), step - before)

    def _limit(self) -> float:
        return divergence.highest_sound_loss(self._uniform, self.counters.first_loss)

    def _above(self) -> int:
        """How many steps in a row the loss has been higher than it should ever be."""
        return divergence.steps_above(self.counters.losses, self._limit())

    def _rows_told(self, position: int) -> str:
        """Which rows of the data the gradients just made are from."""
        count = self.counters.rows - position
        kind, places = self.rows.places(position, count)
        told = ", ".join(f"{place:,}" for place in places[:PLACES_TOLD])
        return (f"{divergence.rows_told(position, count, self.rows.rows_per_epoch)}, from {kind} "
                f"{told}{', …' if count > PLACES_TOLD else ''} of the training part")

    def _remedy(self) -> str:
        return divergence.remedy(self.config, self.placement.dtype == torch.float32)

    def _require_finite(self) -> None:
        if not self.team.finite(self.model):
            raise self._diverged("weights are NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        step = self.counters.step
        return Diverged(f"{what} after step {step} ({self.placement})", self._remedy(), step + 1)

    def _batches(self) -> list[Batch]:
        """Those of the next step, as many as there are processes or more."""
        most = min(self.micro_batch_tokens, self.config.batch_tokens // self.team.size)
        return self.rows.step(self.counters.rows, self.config.batch_tokens, max(1, most))

    def _gradients(self) -> tuple[Tensor, int, int]:
        """Adds up the gradients of this process's share of an optimizer step; returns the loss of the share in nats, and
        targets and tokens of the whole step."""
        config, batches = self.config, self._batches()
        targets = sum(batch.count for batch in batches)
        total = torch.zeros((), device=self.placement.device)
        self.optimizer.zero_grad()
        for batch, counts in self.team.share(batches):
            loss = objectives.loss(self.objective, self.model, batch, config.label_smoothing)
            loss = loss if counts else 0.0 * loss
            (loss / targets).backward()
            total += loss.detach()
        self.counters.rows += sum(batch.rows for batch in batches)
        return total, targets, sum(batch.tokens for batch in batches)

    def _summed(self, loss: Tensor, targets: int, tokens: int) -> tuple[float, int]:
        """The step's loss in nats per target and its tokens, once all processes have added up their gradients."""
        return float(self.team.add_gradients(self.model.parameters(), loss)) / targets, tokens
