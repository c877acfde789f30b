"""One optimizer step: gradients in micro-batches that fit memory, then the update."""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.config import TrainConfig
from lmcli.data.batches import Batch, ExampleRows
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup
from lmcli.errors import UserError
from lmcli.kernels.fast_path import compile_blocks
from lmcli.model import device
from lmcli.model.activation_checkpointing import set_activation_checkpointing
from lmcli.model.device import DeviceConfig
from lmcli.model.transformer import Transformer
from lmcli.training import divergence, optimizers, schedules
from lmcli.training.divergence import Diverged
from lmcli.training.objective import BatchSource, Objective
from lmcli.training.resume_state import Counters

MICRO_BATCH_TOKENS = {"cpu": 16_384, "mps": 16_384, "cuda": 65_536}  # of one forward pass at most
ROWS_NAMED = 4  # in an error
# bfloat16 batches of many shapes leave holes between blocks of memory; to give them back takes at
# most this share of the time, and to take them again a little more
TRIM_SHARE = 0.005
SMALLER = "lower train.context, model.hidden_size, model.num_hidden_layers or tokenizer.vocab_size"


@dataclass
class Step:
    """One optimizer step.

    `loss` is nats per target, `share` how much of the budget is used, `elapsed` and `remaining`
    seconds of the run (remaining: None while unknown).
    """

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
    """Something that the run changed by itself after `step`, as one line of text."""

    step: int
    text: str


class Gradients(NamedTuple):
    """The gradients of a step, which lie in the parameters: `loss` is nats per target.

    `tokens` were read in rows from `first_row` on; `started` is the clock before.
    """

    loss: float
    tokens: int
    first_row: int
    started: float


def micro_batch_tokens(config: TrainConfig, device: torch.device) -> int:
    """The most tokens of one forward pass, as configured."""
    return config.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]


@dataclass
class TrainStep:
    """A model with its data, its optimizer and its counters: makes one step after the other.

    The configuration is fixed; `dataclasses.replace` gives a step with another configuration and
    a new optimizer.
    """

    model: Transformer
    rows: BatchSource
    config: TrainConfig
    device_config: DeviceConfig
    objective: Objective
    counters: Counters = field(default_factory=Counters)
    replicas: ReplicaGroup = SINGLE_PROCESS
    tokens_per_second: float = field(default=0.0, init=False)  # the best so far
    compiled: bool = field(default=False, init=False)
    _warm: bool = field(default=False, init=False)
    _next_trim: float = field(default=0.0, init=False)  # when to give memory back

    def __post_init__(self) -> None:
        self.model.set_training_dtype(self.device_config.dtype)
        self.optimizer = optimizers.build(self.model, self.config, self.replicas)
        self._uniform_loss = self.objective.uniform_loss(self.model.config, self.config)

    def compile_if_worthwhile(self) -> None:
        """Compiles the model's blocks; with "auto" on a GPU, in a run of 10 minutes or more.

        On a CPU it gains nothing at 6 × 384 and below, and takes 23 s.
        """
        long = not 0 < self.config.time < 600
        auto = long and device.compiles(self.device_config.device)
        if self.config.compile == "on" or (self.config.compile == "auto" and auto):
            compile_blocks(self.model)
            self.compiled = True

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens of one forward pass: what fitted after memory ran out, or the setting."""
        return self.counters.micro_batch_tokens or micro_batch_tokens(
            self.config, self.device_config.device
        )

    @property
    def checkpointing(self) -> bool:
        """True if backward passes calculate activations again (activation checkpointing)."""
        return self.config.recompute == "on" or (
            self.config.recompute == "auto" and self.counters.recompute
        )

    def begin(self, counters: Counters) -> None:
        """Sets where the run stands, before its next step."""
        self.counters = counters
        set_activation_checkpointing(self.model, self.checkpointing)

    def gradients(self) -> Generator[Note, None, Gradients]:
        """Makes the gradients of the next step.

        If memory runs out they are made again in smaller parts, from the same rows and random
        numbers, after a Note. Raises UserError if not even one row fits.
        """
        started, counters = time.monotonic(), self.counters
        self.replicas.seed(self.config.seed, counters.step)
        first_row, states = counters.rows, device.random_states(self.device_config.device)
        while True:
            sums = None
            try:
                with self.replicas.peer_errors():
                    sums = self._accumulate()
            except (RuntimeError, MemoryError) as error:
                if not device.ran_out_of_memory(error):
                    raise
                # the other processes are in the middle of a step and cannot start it again
                if self.replicas.sharded:
                    raise self._out_of_memory(f"step {counters.step + 1}") from error
            failed = self.replicas.any_rank(sums is None)
            if sums is not None and not failed:
                loss, targets, tokens = sums
                return Gradients(self._mean_loss(loss, targets), tokens, first_row, started)
            # memory is free only here, where the error no longer holds its frames
            self.optimizer.zero_grad()
            device.free_memory(self.device_config.device)
            counters.rows = first_row
            yield Note(counters.step, self._reduce_memory())
            device.set_random_states(states)

    def first_gradients(self) -> Iterator[Note]:
        """Makes the gradients of the first step; the next step reads the same rows again."""
        yield from self.gradients()
        self.counters.rows = 0

    def _accumulate(self) -> tuple[Tensor, int, int]:
        """Adds up the gradients of this process's micro-batches.

        Returns their loss in nats, and the targets and tokens of the whole step.
        """
        config, batches = self.config, self._batches()
        targets = sum(batch.count for batch in batches)
        total = torch.zeros((), device=self.device_config.device)
        self.optimizer.zero_grad()
        for batch, counts in self.replicas.shard(batches):
            loss = self.objective.loss(self.model, batch, config.label_smoothing)
            loss = loss if counts else 0.0 * loss
            (loss / targets).backward()
            total += loss.detach()
        self.counters.rows += sum(batch.rows for batch in batches)
        return total, targets, sum(batch.tokens for batch in batches)

    def _batches(self) -> list[Batch]:
        """The micro-batches of the next step, at least one for each process."""
        most = min(self.micro_batch_tokens, self.config.batch_tokens // self.replicas.size)
        return self.rows.step(self.counters.rows, self.config.batch_tokens, max(1, most))

    def _mean_loss(self, loss: Tensor, targets: int) -> float:
        """The step's loss in nats per target; adds up the gradients of all processes."""
        return float(self.replicas.add_gradients(self.model.parameters(), loss)) / targets

    def _reduce_memory(self) -> str:
        """Makes the next attempt need less memory; returns how. Raises UserError if it cannot."""
        counters, config = self.counters, self.config
        batches = self._batches()
        largest = max(batch.size for batch in batches)
        # smaller micro-batches
        if max(batch.rows for batch in batches) > 1:
            tokens = min(self.micro_batch_tokens, largest)
            counters.micro_batch_tokens = max(1, tokens // 2)
            return (
                f"out of memory with {tokens:,} tokens at once: going on with "
                f"{counters.micro_batch_tokens:,}; the batch of an optimizer step stays "
                f"{config.batch_tokens:,}"
            )
        # activation checkpointing
        if config.recompute == "auto" and not counters.recompute:
            counters.recompute = True
            set_activation_checkpointing(self.model, True)
            return (
                f"out of memory with one row of {largest:,} tokens: going on with activations "
                "calculated again in the backward pass (train.recompute), slower and in less memory"
            )
        again, hint = "", f"leave train.recompute at auto, or {SMALLER}"
        if self.checkpointing:
            again, hint = ", even with activations calculated again in the backward pass", SMALLER
        raise UserError(
            f"out of memory at step {counters.step + 1}: not even one row of {largest:,} tokens "
            f"fits{again}",
            where="training",
            hint=hint,
        )

    def _trim_memory(self) -> None:
        """Gives freed memory back now and then, if batches have many shapes."""
        on_cpu = self.device_config.device.type == "cpu"
        varied = isinstance(self.rows, ExampleRows) and self.device_config.dtype == torch.bfloat16
        started = time.monotonic()
        if on_cpu and varied and started >= self._next_trim:
            device.trim_memory()
            ended = time.monotonic()
            self._next_trim = ended + (ended - started) / TRIM_SHARE

    def update(self, gradients: Gradients, share: float) -> Step:
        """Updates the weights at `share` of the budget.

        Raises Diverged, before any weight has changed, if loss or gradient are not finite or the
        loss explodes; UserError if memory runs out.
        """
        config, counters = self.config, self.counters
        # the very first step, at share 0, would have rate 0
        factor = schedules.factor(config.schedule, max(share, config.warmup / 100), config.warmup)
        rate = factor * config.learning_rate
        norm = self.optimizer.clip(config.gradient_clip)
        self._require_sound(gradients, norm, rate)
        self.optimizer.set_factor(factor)
        with self.enough_memory(f"the update of step {counters.step + 1}"):
            self.optimizer.step()
            before = counters.averaged if counters.step > counters.stage_step else 0
            counters.averaged = before + 1 if share >= 1 - config.averaging else 0
            if counters.averaged:
                self.optimizer.average(counters.averaged)
        counters.step += 1
        counters.tokens += gradients.tokens
        self._trim_memory()
        speed = gradients.tokens / (time.monotonic() - gradients.started)
        # the first step is not counted: it may take many times as long as the others
        if self._warm:
            self.tokens_per_second = max(self.tokens_per_second, speed)
        self._warm = True
        return Step(
            counters.step,
            counters.tokens,
            0.0,
            gradients.loss,
            rate,
            norm,
            speed,
            share,
            counters.rows / self.rows.rows_per_epoch,
            None,
        )

    @contextmanager
    def enough_memory(self, what: str) -> Iterator[None]:
        """Raises UserError if memory runs out in work that cannot be made smaller."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not device.ran_out_of_memory(error):
                raise
            raise self._out_of_memory(what) from error

    def _out_of_memory(self, what: str) -> UserError:
        hint = SMALLER
        if self.replicas.sharded:
            hint = f"lower train.micro_batch_tokens or {SMALLER.removeprefix('lower ')}"
        return UserError(f"out of memory in {what}", where="training", hint=hint)

    def _require_sound(self, gradients: Gradients, norm: float, rate: float) -> None:
        """Raises Diverged if training cannot recover from this loss or gradient norm."""
        counters, before, loss = self.counters, self.steps_above_limit(), gradients.loss
        if not counters.step:
            counters.first_loss = loss
        counters.losses = [*counters.losses, loss][-divergence.STEPS_ABOVE :]
        if not math.isfinite(loss):
            what = f"loss is {loss:.4g}"
        elif not math.isfinite(norm):
            what = f"gradient norm is {norm:.3g}"
        elif divergence.exploded(counters.losses, self._loss_limit()):
            what = (
                f"the loss has exploded: {loss:.4g} nats/{self.objective.target}, where guessing "
                f"costs {self._uniform_loss:.3g},"
            )
        else:
            return
        step = counters.step + 1
        raise Diverged(
            f"{what} at step {step} (loss {loss:.4g}, gradient norm {norm:.3g}, learning rate "
            f"{rate:.2g}, {self.device_config}; {self._row_names(gradients.first_row)})",
            self.remedy(),
            step - before,
        )

    def _loss_limit(self) -> float:
        return divergence.highest_sound_loss(self._uniform_loss, self.counters.first_loss)

    def steps_above_limit(self) -> int:
        """How many of the last steps in a row had a loss that is too high."""
        return divergence.steps_above(self.counters.losses, self._loss_limit())

    def _row_names(self, first_row: int) -> str:
        """Which rows of the data the gradients are from."""
        count = self.counters.rows - first_row
        unit, starts = self.rows.locations(first_row, count)
        names = ", ".join(f"{start:,}" for start in starts[:ROWS_NAMED])
        return (
            f"{divergence.row_range(first_row, count, self.rows.rows_per_epoch)}, from {unit} "
            f"{names}{', …' if count > ROWS_NAMED else ''} of the training part"
        )

    def remedy(self) -> str:
        """Options to try after the run has diverged."""
        return divergence.remedy(self.config, self.device_config.dtype == torch.float32)
