"""One optimizer step: the gradients of a batch in parts that memory holds, refused where nothing sound comes of them."""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
class Note:
    """Something that the run changed by itself, as one line of text. It goes on after `step`."""

    step: int
    text: str


def micro_batch_tokens(config: TrainConfig, device: torch.device) -> int:
    """Tokens of one forward pass at most, where memory allows."""
    return config.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]


@dataclass
class Stepper:
    """A model in training, with its data, its optimizer, and where it has come to: what makes one step after the other."""

    model: Transformer
    rows: PackedRows | MaskedRows | ExampleRows
    config: TrainConfig
    placement: Placement
    objective: Objective = field(default=OBJECTIVES["causal"], kw_only=True)
    counters: Counters = field(default_factory=Counters, kw_only=True)
    team: Team = field(default=ALONE, kw_only=True)

    def __post_init__(self) -> None:
        self.model.training_dtype = self.placement.dtype
        if self.config.compile == "on" or (self.config.compile == "auto" and self._worth_compiling()):
            self.model.compile_blocks()
        self.optimizer = optimizers.build(self.model, self.config)
        self._speed, self._warm = 0.0, False
        config = self.model.config
        choices = {"lm": config.vocab_size, "span": self.config.context}.get(self.objective.head, len(config.labels))
        self._uniform = math.log(max(2, choices))

    def _worth_compiling(self) -> bool:
        # on a CPU it is within noise at 6 × 384 and a loss below, and takes 23 s
        return device.compiles(self.placement.device) and not 0 < self.config.time < 600

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward pass at most: what fitted once memory had run out, else what is configured."""
        return self.counters.micro_batch_tokens or micro_batch_tokens(self.config, self.placement.device)

    @property
    def recompute(self) -> bool:
        """Whether backward passes calculate activations again."""
        return self.config.recompute == "on" or (self.config.recompute == "auto" and self.counters.recompute)

    def join(self, team: Team) -> None:
        """Makes this the run of a team: what each process is to hold of the model is brought to its device. To be called
        before there are moments."""
        self.team = team
        team.distribute(self.model, self.placement.device)
        self.optimizer = optimizers.build(self.model, self.config, team)

    def rehearse(self) -> Iterator[Note]:
        """Leaves the gradients of the first step, which is not made, in the parameters."""
        yield from self._gradients_that_fit()
        self.counters.rows = 0

    def step(self, share: float) -> Generator[Note, None, Step]:
        """Makes the next step, at `share` of the budget; yields what has to be noted. Raises UserError and Diverged as
        `loop.Run.events` says."""
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
        if self._warm:  # of a first step, which may take many times as long as those after it, nothing is concluded
            self._speed = max(self._speed, tokens / seconds)
        self._warm = True
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

    def _batches(self) -> list[Batch]:
        """Those of the next step, as many as there are processes or more."""
        most = min(self.micro_batch_tokens, self.config.batch_tokens // self.team.size)
        return self.rows.step(self.counters.rows, self.config.batch_tokens, max(1, most))

    def _summed(self, loss: Tensor, targets: int, tokens: int) -> tuple[float, int]:
        """The step's loss in nats per target and its tokens, once all processes have added up their gradients."""
        return float(self.team.add_gradients(self.model.parameters(), loss)) / targets, tokens

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
