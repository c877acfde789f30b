"""Training speed beside the machine's limit: real steps, alternating with their products."""

import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lmcli import recipes
from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.data.batches import Batch
from lmcli.errors import UsageError
from lmcli.kernels.fast_path import build_model
from lmcli.model import flops
from lmcli.model.device import DeviceConfig, dtype_name, finish, peak_memory
from lmcli.training.loop import Trainer
from lmcli.training.objective import BatchSource, Evaluation, Objective
from lmcli.training.objectives import OBJECTIVES
from lmcli.training.train_step import TrainStep, micro_batch_tokens

# Reference workloads, smallest first, since the peak of memory is that of the process so far.
# The MLP of S has the same products, within 0.5 %, as an ungated one of 4 × 128.
REFERENCES = {
    "S": {
        "model.hidden_size": 128,
        "model.num_hidden_layers": 4,
        "model.num_attention_heads": 4,
        "model.vocab_size": 65,
        "model.intermediate_size": 344,
        "train.context": 64,
        "train.batch_tokens": 768,
    },
    "R": {
        "model.hidden_size": 384,
        "model.num_hidden_layers": 6,
        "model.num_attention_heads": 6,
        "model.vocab_size": 4096,
        "model.intermediate_size": 1024,
        "train.context": 256,
        "train.batch_tokens": 4096,
    },
}
WARM_UP_STEPS = 3
MIN_STEPS = 3
STEPS_SECONDS = 0.3  # of training between two measurements of the products
PRODUCT_SECONDS = 1e-3  # a faster product is repeated, so that the clock does not count
MANY_STEPS = 10**9


@dataclass
class StepSpeed:
    """A measured speed of steps: of training, or of generation.

    achieved, limit: in `unit`; ratio: achieved / limit; step_ms: the median step in milliseconds.
    """

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


@dataclass
class Measurement(StepSpeed):
    """One measured training speed."""

    flops_per_token: float
    parameters: int
    peak_memory_bytes: int


def reference(
    name: str, sets: Iterable[str] = (), train: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """The recipe of reference workload "R" or "S", with AdamW; `sets` as in `recipes.resolve`."""
    defaults = {**REFERENCES[name], "train.optimizer": "adamw", "train.dropout": 0}
    return recipes.resolve("tiny", sets, train, defaults)


class TrainingWorkload:
    """Training by a recipe on random ids, without evaluations and saves.

    tokens, flops: of one step; products: all matrix products of one step.
    """

    def __init__(self, recipe: Recipe, device_config: DeviceConfig):
        """Raises UsageError for an objective that needs more than ids."""
        config = dataclasses.replace(
            recipe.model,
            vocab_size=recipe.model.vocab_size or recipe.tokenizer.vocab_size,
            max_position_embeddings=recipe.model.max_position_embeddings or recipe.train.context,
        ).complete()
        objective, make_rows = _objective(recipe, config)
        train = dataclasses.replace(recipe.train, time=0.0, tokens=0, epochs=0.0, steps=MANY_STEPS)
        self.train = dataclasses.replace(
            train, eval_every=MANY_STEPS, save_every=MANY_STEPS, sample_every=MANY_STEPS
        )
        rows = make_rows(config, self.train)
        micro_tokens = micro_batch_tokens(self.train, device_config.device)
        batches = rows.step(0, self.train.batch_tokens, micro_tokens)
        passes = [_forward_pass(config, batch) for batch in batches]
        self.config, self.device_config = config, device_config
        self.tokens = sum(batch.tokens for batch in batches)
        self.flops = sum(flops.training_flops(config, forward) for forward in passes)
        self.products = [
            product for forward in passes for product in flops.products(config, forward)
        ]
        torch.manual_seed(self.train.seed)
        model = build_model(config, self.train.dropout)
        model.initialize(self.train.seed)
        self.train_step = TrainStep(
            model.to(device_config.device).train(), rows, self.train, device_config, objective
        )
        self.train_step.compile_if_worthwhile()
        unmeasured = Evaluation(lambda: SimpleNamespace(criterion=0.0, loss=0.0))
        self._events = Trainer(self.train_step, unmeasured, time.monotonic()).events()

    def step(self) -> float:
        """Seconds of the next training step: batch, forward, backward, clipping and update."""
        return self.timed(lambda: next(self._events))

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of some work, until the device has done it."""
        started = time.perf_counter()
        work()
        finish(self.device_config.device)
        return time.perf_counter() - started


class ProductClock:
    """Times the matrix products of a workload, each distinct one by torch's own product."""

    def __init__(self, products: Iterable[flops.MatrixProduct], device_config: DeviceConfig):
        self.device_config = device_config
        self.counts: Counter[tuple] = Counter()
        self.flops = 0
        for product in products:
            key = (product.transposed, product.batch, product.m, product.k, product.n)
            self.counts[key] += product.count
            self.flops += product.flops
        self.seconds: dict[tuple, list[float]] = defaultdict(list)
        noise = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
        self._noise = noise.to(device_config.device, device_config.dtype)

    def measure(self) -> None:
        """Times every distinct product once more."""
        for key in self.counts:
            transposed, batch, m, k, n = key
            left = self._factor(batch, m, k, transposed == "left")
            right = self._factor(batch, k, n, transposed == "right")
            once = self._time(left, right, 1)  # the first call of a shape also prepares its kernel
            times = max(1, min(100, round(PRODUCT_SECONDS / once)))
            self.seconds[key].append(self._time(left, right, times))

    def rate(self) -> float:
        """FLOP/s of all products together, each at its median, weighted by its count in a step."""
        return self.flops / sum(
            count * statistics.median(self.seconds[key]) for key, count in self.counts.items()
        )

    def _factor(self, batch: int, rows: int, columns: int, transposed: bool) -> Tensor:
        """Random (rows, columns) or (batch, rows, columns); zeros are faster on some devices."""
        shape: tuple[int, ...] = (columns, rows) if transposed else (rows, columns)
        shape = shape if batch == 1 else (batch, *shape)
        size = batch * rows * columns
        factor = self._noise.repeat(-(-size // len(self._noise)))[:size].view(shape)
        return factor.mT if transposed else factor

    def _time(self, left: Tensor, right: Tensor, times: int) -> float:
        multiply = torch.mm if left.ndim == 2 else torch.bmm
        finish(self.device_config.device)
        started = time.perf_counter()
        for _ in range(times):
            multiply(left, right)
        finish(self.device_config.device)
        return (time.perf_counter() - started) / times


def measure_training(
    name: str, recipe: Recipe, device_config: DeviceConfig, seconds: float
) -> Measurement:
    """Trains for about `seconds` after a warm-up, three steps at least, alternating with products.

    Other work on the machine slows both alike, so their ratio is stable.
    """
    workload = TrainingWorkload(recipe, device_config)
    clock = ProductClock(workload.products, device_config)
    steps: list[float] = []
    for _ in range(WARM_UP_STEPS):
        workload.step()
    until = time.perf_counter() + seconds
    while len(steps) < MIN_STEPS or time.perf_counter() < until:
        block = [workload.step()]
        while sum(block) < STEPS_SECONDS:
            block.append(workload.step())
        steps += block
        clock.measure()
    step, limit = statistics.median(steps), clock.rate()
    return Measurement(
        name=name,
        tokens_per_second=workload.tokens / step,
        achieved=workload.flops / step,
        limit=limit,
        unit="FLOP/s",
        ratio=workload.flops / step / limit,
        dtype=dtype_name(device_config.dtype),
        threads=torch.get_num_threads(),
        step_ms=1e3 * step,
        steps=len(steps),
        flops_per_token=workload.flops / workload.tokens,
        parameters=flops.parameters(workload.config).total,
        peak_memory_bytes=peak_memory(device_config.device),
    )


def training_flops_per_second(recipe: Recipe, device_config: DeviceConfig, seconds: float) -> float:
    """FLOP/s of training by a recipe: `seconds` of steps on random ids, after two to warm up."""
    workload = TrainingWorkload(predicting_tokens(recipe), device_config)
    steps: list[float] = []
    for _ in range(2):
        workload.step()
    while sum(steps) < seconds or len(steps) < MIN_STEPS:
        steps.append(workload.step())
    return workload.flops / statistics.median(steps)


def predicting_tokens(recipe: Recipe) -> Recipe:
    """The recipe for measuring its model's speed, whatever it learns: blocks are the same."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, objective="auto"))


def _objective(
    recipe: Recipe, config: ModelConfig
) -> tuple[Objective, Callable[[ModelConfig, TrainConfig], BatchSource]]:
    """(the recipe's objective, its rows of random ids); "auto": the first that predicts tokens.

    Raises UsageError for an objective that is not measured.
    """
    name = recipe.train.objective
    for row in [OBJECTIVES[name]] if name in OBJECTIVES else OBJECTIVES.values():
        if row.random_rows and row.shape == config.shape and row.head == config.head:
            return row, row.random_rows
    raise UsageError(
        f"objective {name} with shape {config.shape} and head {config.head} is not measured",
        where="lm bench --train",
        hint="leave train.objective at auto and model.head at lm",
    )


def _forward_pass(config: ModelConfig, batch: Batch) -> flops.ForwardPass:
    length = batch.ids.shape[1]
    if config.shape == "encoder-decoder":
        decoder_length = 0 if batch.decoder_ids is None else batch.decoder_ids.shape[1]
        return flops.ForwardPass(batch.rows, length, decoder_length, batch.count)
    encoder, decoder = (length, 0) if config.shape == "encoder" else (0, length)
    return flops.ForwardPass(batch.rows, encoder, decoder, batch.count)
