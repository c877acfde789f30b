"""Speed beside what the machine can do: real training steps, and in turns with them the products they are made of."""

import dataclasses
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcli import recipes
from lmcli.config import ModelConfig, Recipe
from lmcli.errors import UsageError
from lmcli.model import cost
from lmcli.model.device import Placement, dtype_name, finish
from lmcli.model.transformer import Transformer
from lmcli.text.batches import Batch, ExampleRows, MaskedRows, Masking, PackedRows
from lmcli.training import loop
from lmcli.training.objectives import OBJECTIVES
from lmcli.training.stepper import micro_batch_tokens

# What speeds are told for where no preset is named, smallest first: the peak of memory is that of the process so far.
# The MLP of S is set so that its products come, within 0.5 %, to those of an ungated one of 4 × 128.
REFERENCES = {
    "S": ("model.hidden_size=128", "model.num_hidden_layers=4", "model.num_attention_heads=4", "model.vocab_size=65",
          "model.intermediate_size=344", "train.context=64", "train.batch_tokens=768"),
    "R": ("model.hidden_size=384", "model.num_hidden_layers=6", "model.num_attention_heads=6", "model.vocab_size=4096",
          "model.intermediate_size=1024", "train.context=256", "train.batch_tokens=4096")}
WARM_UP_STEPS = 3
FEWEST_STEPS = 3
SECONDS_OF_STEPS = 0.3  # so long training goes on before the products have their turn
SECONDS_OF_PRODUCT = 1e-3  # a faster one is repeated, so that the clock does not count
NEVER = 10**9


@dataclass
class Measurement:
    """One measured speed: `achieved` and `limit` in `unit`, `ratio` their quotient; `step_ms` is the median step."""

    name: str
    tokens_per_second: float
    achieved: float
    limit: float
    unit: str
    ratio: float
    dtype: str
    threads: int
    step_ms: float
    steps: int
    flops_per_token: float
    parameters: int
    peak_memory_bytes: int


def reference(name: str, sets: Iterable[str] = (), train: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """The recipe of reference workload "R" or "S", trained with AdamW; settings on top as in `recipes.resolve`."""
    return recipes.resolve("tiny", (*REFERENCES[name], "train.optimizer=adamw", "train.dropout=0", *sets), train)


class TrainingWorkload:
    """Training by a recipe on random ids, without evaluations and saves. `tokens` and `flops` are those of a step,
    `products` all matrix products in it.

    Raises UsageError for an objective that needs more than ids.
    """

    def __init__(self, recipe: Recipe, placement: Placement):
        config = dataclasses.replace(
            recipe.model, vocab_size=recipe.model.vocab_size or recipe.tokenizer.vocab_size,
            max_position_embeddings=recipe.model.max_position_embeddings or recipe.train.context).complete()
        objective = OBJECTIVES[_objective(recipe, config)]
        self.train = dataclasses.replace(recipe.train, time=0.0, tokens=0, epochs=0.0, steps=NEVER, eval_every=NEVER,
                                         save_every=NEVER, sample_every=NEVER)
        rows = _rows(config, recipe, objective.name)
        batches = rows.step(0, self.train.batch_tokens, micro_batch_tokens(self.train, placement.device))
        passes = [_passes(config, batch) for batch in batches]
        self.config, self.placement = config, placement
        self.tokens = sum(batch.tokens for batch in batches)
        self.flops = sum(cost.training_flops(config, one) for one in passes)
        self.products = [product for one in passes for product in cost.products(config, one)]
        torch.manual_seed(self.train.seed)
        model = Transformer(config, self.train.dropout)
        model.initialize(self.train.seed)
        self.run = loop.Run(model.to(placement.device).train(), rows, self.train, placement,
                            lambda: SimpleNamespace(criterion=0.0), time.monotonic(), objective=objective)
        self._events = self.run.events()

    def step(self) -> float:
        """Seconds of the next training step: batch, forward, backward, clipping and update."""
        return self.timed(lambda: next(self._events))

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of some work, until the device has done it."""
        started = time.perf_counter()
        work()
        finish(self.placement.device)
        return time.perf_counter() - started


class ProductClock:
    """Times the matrix products of a workload, each distinct one by torch's own product in the training precision."""

    def __init__(self, products: Iterable[cost.Product], placement: Placement):
        self.placement = placement
        self.counts: Counter[tuple] = Counter()
        self.flops = 0
        for product in products:
            self.counts[product.transposed, product.batch, product.m, product.k, product.n] += product.count
            self.flops += product.flops
        self.seconds: dict[tuple, list[float]] = defaultdict(list)
        self._noise = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).to(placement.device, placement.dtype)

    def turn(self) -> None:
        """Times every distinct product once more."""
        for key in self.counts:
            transposed, batch, m, k, n = key
            left = self._factor(batch, m, k, transposed == "left")
            right = self._factor(batch, k, n, transposed == "right")
            once = self._time(left, right, 1)  # the first call of a shape also prepares its kernel
            times = max(1, min(100, round(SECONDS_OF_PRODUCT / once)))
            self.seconds[key].append(self._time(left, right, times))

    def rate(self) -> float:
        """FLOP/s of all products together: each at its median, weighted by how often the step needs it."""
        return self.flops / sum(count * statistics.median(self.seconds[key]) for key, count in self.counts.items())

    def _factor(self, batch: int, rows: int, columns: int, transposed: bool) -> Tensor:
        """(rows, columns), or (batch, rows, columns); random, so that no hardware has an easy time."""
        shape = (columns, rows) if transposed else (rows, columns)
        shape = shape if batch == 1 else (batch, *shape)
        size = batch * rows * columns
        made = self._noise.repeat(-(-size // len(self._noise)))[:size].view(shape)
        return made.mT if transposed else made

    def _time(self, left: Tensor, right: Tensor, times: int) -> float:
        multiply = torch.mm if left.ndim == 2 else torch.bmm
        finish(self.placement.device)
        started = time.perf_counter()
        for _ in range(times):
            multiply(left, right)
        finish(self.placement.device)
        return (time.perf_counter() - started) / times


def measure_training(name: str, recipe: Recipe, placement: Placement, seconds: float) -> Measurement:
    """Trains for about `seconds`, warm-up not counted and three steps at least, in turns with the products of a step.

    What else the machine does meanwhile slows both alike, so that their ratio stays.
    """
    workload = TrainingWorkload(recipe, placement)
    clock, steps = ProductClock(workload.products, placement), []
    for _ in range(WARM_UP_STEPS):
        workload.step()
    until = time.perf_counter() + seconds
    while len(steps) < FEWEST_STEPS or time.perf_counter() < until:
        turn = [workload.step()]
        while sum(turn) < SECONDS_OF_STEPS:
            turn.append(workload.step())
        steps += turn
        clock.turn()
    step, limit = statistics.median(steps), clock.rate()
    return Measurement(
        name, workload.tokens / step, workload.flops / step, limit, "FLOP/s", workload.flops / step / limit,
        dtype_name(placement.dtype), torch.get_num_threads(), 1e3 * step, len(steps), workload.flops / workload.tokens,
        cost.parameters(workload.config).total, peak_memory(placement.device))


def measured_rate(recipe: Recipe, placement: Placement, seconds: float) -> float:
    """FLOP/s of training by a recipe, told by some `seconds` of steps on random ids after two to warm up."""
    workload, steps = TrainingWorkload(recipe, placement), []
    for _ in range(2):
        workload.step()
    while sum(steps) < seconds or len(steps) < FEWEST_STEPS:
        steps.append(workload.step())
    return workload.flops / statistics.median(steps)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had resident so far, or on a GPU allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS tells bytes, others KiB


def _objective(recipe: Recipe, config: ModelConfig) -> str:
    by_shape = {known.shape: name for name, known in OBJECTIVES.items() if known.head == "lm"}
    name = by_shape[config.shape] if recipe.train.objective == "auto" else recipe.train.objective
    if config.head != "lm" or by_shape[config.shape] != name:
        raise UsageError(f"objective {name} with shape {config.shape} and head {config.head} is not measured",
                         where="lm bench --train", hint="it measures models that predict words: leave train.objective at "
                         "auto and model.head at lm")
    return name


def _passes(config: ModelConfig, batch: Batch) -> cost.Passes:
    read = batch.ids.shape[1]
    if config.shape == "encoder-decoder":
        return cost.Passes(batch.rows, read, batch.decoder_ids.shape[1], batch.count)
    return cost.Passes(batch.rows, *((read, 0) if config.shape == "encoder" else (0, read)), batch.count)


def _rows(config: ModelConfig, recipe: Recipe, objective: str) -> PackedRows | MaskedRows | ExampleRows:
    """Rows of random ids, full to the context."""
    train, vocabulary = recipe.train, config.vocab_size
    generator = np.random.default_rng(train.seed)
    if objective == "seq2seq":
        def make(chosen: np.ndarray) -> Batch:
            source, target, read = generator.integers(vocabulary, size=(3, len(chosen), train.context))
            return Batch(source, target, decoder_ids=read)
        # as in training, a row counts for its source and its target
        return ExampleRows(np.full(1024, 2 * train.context), make, train.seed)
    ids = generator.integers(vocabulary, size=max(65_536, 2 * train.batch_tokens))
    if objective == "masked":
        masking = Masking(vocabulary - 1, vocabulary, (), train.mask_share)
        return MaskedRows(ids, train.context, ([0], [0]), masking, train.seed)
    return PackedRows(ids, train.context, 0, train.seed)
