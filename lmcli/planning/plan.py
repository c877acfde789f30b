"""Predicts a training run on this machine: model size, memory, time, and expected quality.

Speed is measured with real training steps of the recipe on random ids. Memory is calculated
(`model.memory`) and added to what the process needs without a model. Bits per byte come from a fit
to measured runs (`expected_quality`). Several devices are calculated from the speed of one device
with its share of a step (`cluster`).
"""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.data import corpus, documents, splits
from lmcli.data.documents import DocumentFormat
from lmcli.data.rows import display_name
from lmcli.errors import UserError
from lmcli.kernels import build
from lmcli.model import flops, memory
from lmcli.model.device import DeviceConfig, dtype_name, machine_memory, peak_memory
from lmcli.planning import cluster
from lmcli.planning.background_load import BackgroundLoad
from lmcli.planning.benchmark import MANY_STEPS, TrainingWorkload, predicting_tokens
from lmcli.planning.cluster import SINGLE_DEVICE, DeviceGroup, DeviceShare
from lmcli.planning.expected_quality import expected_bits_per_byte, xz_bits_per_byte
from lmcli.scoring.scorer import Scorer
from lmcli.text import tokenizer as tokenizers
from lmcli.text.tokenizer import Tokenizer
from lmcli.training import datasets, loop, objectives, schedules
from lmcli.training.train_step import micro_batch_tokens

SAMPLE_BYTES = 1_000_000
SECONDS = 2.0  # of measured steps for a preset
PROBE_WARM_UP_STEPS = 2
# FLOPs of the largest step that is measured with all layers: a second or two
MAX_CPU_FLOPS, MAX_GPU_FLOPS = 2e11, 2e13
# larger models are measured with these numbers of layers and extrapolated
FEW_LAYERS, MORE_LAYERS = 1, 3
EVALUATED_TOKENS = 4096
DISK_BYTES_PER_SECOND = 5e8  # of saves
SAMPLE_SECONDS = 0.05  # for each layer of the model that writes the sample text
PROCESS_BYTES = 4e8  # of a process without a model, until that is measured


@dataclass
class PlannedText:
    """The text to train on.

    bytes, documents: of the training set; validation_bytes: what evaluations read;
    xz_bits: bits per byte of the sample under xz; seconds: how long reading all of it took.
    has_examples: rows have many lengths.
    """

    doc_format: DocumentFormat
    bytes: int
    documents: int
    validation_bytes: int
    sample: list[str]
    xz_bits: float
    seconds: float
    has_examples: bool = False


class LearnedVocabulary(NamedTuple):
    """A tokenizer learned from the sample, and the sample's ids.

    `seconds` is the estimated time to learn it and to encode the whole text.
    """

    tokenizer: Tokenizer
    ids: np.ndarray
    bytes_per_token: float
    seconds: float


class Speed(NamedTuple):
    """Seconds to train a token, to update all weights once, and to evaluate a token."""

    token: float
    update: float
    evaluated: float


class Pauses(NamedTuple):
    """What interrupts training: `times` evaluations; seconds of each, and of what follows it."""

    times: int
    evaluation: float
    rest: float


@dataclass
class Plan:
    """The prediction for one recipe; memory in bytes, of one device.

    text_tokens: tokens of the text, read once. tokens: all tokens that training reads.
    micro_batch_tokens: tokens of a forward pass. process: memory of the program without a model.
    bits_per_byte: estimated for the validation set; None unless the model is a decoder.
    idle_devices: devices without a row of a step. sharding: as in `cluster.DeviceLayout`.
    interconnect: bytes/s between two devices; None for one device.
    seconds_communicating: those of the run in which a device only communicates.
    speedup: all devices compared with one of them; None if not measured.
    advice: one sentence.
    """

    preset: str
    parameters: int
    vocabulary: int
    context: int
    batch_tokens: int
    micro_batch_tokens: int
    text_bytes: int
    text_tokens: int
    steps: int
    tokens: int
    epochs: float
    tokens_per_parameter: float
    flops: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int
    memory: int
    machine_memory: int
    tokens_per_second: float
    seconds: float
    bits_per_byte: float | None
    devices: int = 1
    idle_devices: int = 0
    sharding: str = "none"
    interconnect: float | None = None
    seconds_communicating: float = 0.0
    speedup: float | None = 1.0
    advice: str = ""

    @property
    def fits(self) -> bool:
        """True if the machine has enough memory."""
        return self.memory <= self.machine_memory


def read_text(
    arguments: tuple[str, ...],
    val: tuple[str, ...],
    doc_format: DocumentFormat,
    include: str | None,
    recipe: Recipe,
    note: Callable[[str], None],
) -> PlannedText:
    """Surveys DATA… as `lm train` does, without tokenizing it.

    `recipe` limits what evaluations read. Raises UserError for data that is empty or no text.
    """
    started = time.monotonic()
    source = datasets.open_sources(arguments, val, doc_format, include, note)
    command = f"lm plan {' '.join(arguments)}"
    objective, resolved = objectives.resolve_objective(
        source, "auto", ModelConfig(), lambda text: None, command, any_shape=True
    )
    if objective.preset and objective.shape != recipe.model.shape:
        note(
            f"the data are {datasets.kind(resolved)}, for which lm train takes preset "
            f"{objective.preset}; planned is what their text takes"
        )
    if any("=" in field for field in doc_format.fields):
        doc_format = dataclasses.replace(doc_format, fields=resolved.fields)
        source = dataclasses.replace(source, doc_format=doc_format)
    split = datasets.split(source, recipe.train.validation_bytes, lambda text: None)
    sampled = splits.limit(split.training, doc_format, SAMPLE_BYTES)
    sample = [piece.text for piece in documents.read_pieces(sampled, doc_format)]
    if not "".join(sample).strip():
        raise UserError(
            "the data has no text",
            where=display_name(source.files[0]),
            hint="give a file with text, or pipe some in",
        )
    return PlannedText(
        doc_format=doc_format,
        bytes=split.training.bytes,
        documents=len(split.training),
        validation_bytes=split.measured.bytes,
        sample=sample,
        xz_bits=xz_bits_per_byte(sample),
        seconds=time.monotonic() - started,
        has_examples=resolved.has_examples,
    )


class Planner:
    """Plans recipes for one text.

    `startup` is how long the command took to start, in seconds. `load` trains in the background
    where several processes are to share the machine.
    """

    def __init__(
        self,
        text: PlannedText,
        device_config: DeviceConfig,
        startup: float = 0.0,
        load: BackgroundLoad | None = None,
    ):
        self.text, self.device_config, self.startup, self.load = text, device_config, startup, load
        self.process = 0  # bytes; known once a model has been trained
        self._vocabularies: dict[tuple, LearnedVocabulary] = {}
        self._speeds: dict[str, Speed] = {}

    def plan(self, name: str, recipe: Recipe, group: DeviceGroup = SINGLE_DEVICE) -> Plan:
        """The plan of a recipe with its own budgets on a group of devices, without advice.

        Raises UsageError for a recipe whose objective needs labels.
        """
        # sizes: vocabulary, context, rows of a step
        vocabulary = self._vocabulary(recipe)
        text_tokens = round(self.text.bytes / vocabulary.bytes_per_token) + self.text.documents
        recipe = _complete(recipe, text_tokens, vocabulary.tokenizer.size)
        config, train = recipe.model, recipe.train
        step_tokens = max(1, train.batch_tokens // train.context) * train.context
        parameters = flops.parameters(config).total
        # one device: its rows, speed and memory
        share = self._share(recipe, group.size)
        speed = self._speed(recipe, vocabulary, group.size)
        micro = share.rows_at_once * train.context
        available = machine_memory(self.device_config.device) // (group.size if group.local else 1)
        process = self._process(text_tokens, needed := self._memory(recipe, micro))
        layout = cluster.choose_layout(
            config, needed, share.passes, group.size, available - process
        )
        # all devices: seconds of a step, steps of the run
        update = speed.update / layout.update_shards(group)
        step = speed.token * share.rows * train.context + update + layout.seconds(group)
        reading = self.text.seconds * (1 if group.size == 1 else 2)  # by the leader, then the rest
        before = self.startup + reading + vocabulary.seconds + parameters / 1e8
        pauses = self._pauses(recipe, vocabulary, speed)
        steps, seconds = _steps(train, step, step_tokens, text_tokens, before, pauses)
        tokens, needed = steps * step_tokens, layout.memory
        return Plan(
            preset=name,
            parameters=parameters,
            vocabulary=config.vocab_size,
            context=train.context,
            batch_tokens=step_tokens,
            micro_batch_tokens=micro,
            text_bytes=self.text.bytes,
            text_tokens=text_tokens,
            steps=steps,
            tokens=tokens,
            epochs=tokens / text_tokens,
            tokens_per_parameter=tokens / parameters,
            flops=tokens * flops.training_flops_per_token(config, train.context),
            weights=needed.weights,
            gradients=needed.gradients,
            optimizer=needed.optimizer,
            activations=max(needed.activations, needed.update),
            process=process,
            memory=process + needed.total,
            machine_memory=available,
            tokens_per_second=step_tokens / step,
            seconds=seconds,
            bits_per_byte=self._bits_per_byte(config, tokens * vocabulary.bytes_per_token),
            devices=group.size,
            idle_devices=share.idle,
            sharding=layout.sharding,
            interconnect=group.link.bytes_per_second if group.size > 1 else None,
            seconds_communicating=steps * layout.seconds(group),
            speedup=self._speedup(recipe, vocabulary, group, step),
        )

    def _share(self, recipe: Recipe, count: int) -> DeviceShare:
        train = recipe.train
        max_rows = micro_batch(recipe, self.device_config.device) // train.context
        return cluster.share_rows(max(1, train.batch_tokens // train.context), max_rows, count)

    def _speedup(
        self, recipe: Recipe, vocabulary: LearnedVocabulary, group: DeviceGroup, step: float
    ) -> float | None:
        """How many times as fast as one device the group is, whose steps take `step` seconds."""
        if group.size == 1:
            return 1.0
        if group.local:
            return None
        speed, rows = self._speed(recipe, vocabulary, 1), self._share(recipe, 1).rows
        return (speed.token * rows * recipe.train.context + speed.update) / step

    def _vocabulary(self, recipe: Recipe) -> LearnedVocabulary:
        key = (recipe.tokenizer, recipe.model.shape)
        if key not in self._vocabularies:
            self._vocabularies[key] = learn_vocabulary(self.text, recipe)
        return self._vocabularies[key]

    def _bits_per_byte(self, config: ModelConfig, read_bytes: float) -> float | None:
        if config.shape != "decoder" or not read_bytes:
            return None
        blocks = flops.parameters(config).total - config.vocab_size * config.hidden_size
        return expected_bits_per_byte(self.text.xz_bits, self.text.bytes, read_bytes, blocks)

    def _memory(self, recipe: Recipe, micro: int) -> memory.Memory:
        device = self.device_config.device
        return memory.training_memory(
            recipe.model,
            recipe.train,
            micro,
            dtype_name(self.device_config.dtype),
            fused=build.serve(device),
            device=device.type,
        )

    def _process(self, text_tokens: int, needed: memory.Memory) -> int:
        """Bytes besides `needed`: the program, the ids, what products of many shapes take."""
        if self.device_config.device.type != "cpu":
            return self.process
        varied = self.text.has_examples and self.device_config.dtype == torch.bfloat16
        return self.process + 2 * text_tokens + memory.many_shapes(needed) * varied

    def _pauses(self, recipe: Recipe, vocabulary: LearnedVocabulary, speed: Speed) -> Pauses:
        """The evaluations of a run, and the save and the sample text that follow each."""
        config, train = recipe.model, recipe.train
        passes = 2.0 if config.shape == "decoder" else 1.0  # its windows overlap by half
        ratio = loop.evaluated_per_trained(self.device_config.dtype)
        size = schedules.validation_bytes(train, self.text.bytes, ratio / passes)
        tokens = min(size, self.text.validation_bytes) / vocabulary.bytes_per_token
        planned = schedules.planned_tokens(train, self.text.bytes / vocabulary.bytes_per_token)
        layers = config.num_hidden_layers * (config.shape == "decoder")
        saving = 16 * flops.parameters(config).total / DISK_BYTES_PER_SECOND
        return Pauses(
            schedules.counted_evaluations(planned, passes * tokens, ratio),
            tokens * speed.evaluated,
            saving + SAMPLE_SECONDS * layers,
        )

    def _speed(self, recipe: Recipe, vocabulary: LearnedVocabulary, count: int) -> Speed:
        """The speed of one of `count` devices with its share of a step.

        A few rows take longer, each, than many. A large model is measured with few layers.
        """
        micro = self._share(recipe, count).rows_at_once * recipe.train.context
        cpu = self.device_config.device.type == "cpu"
        probes = _probes(recipe, micro, MAX_CPU_FLOPS if cpu else MAX_GPU_FLOPS)
        for probe in probes:
            if repr(probe) not in self._speeds:
                self._speeds[repr(probe)] = self._measure(probe, vocabulary, SECONDS / len(probes))
        speeds = [self._speeds[repr(probe)] for probe in probes]
        if len(speeds) == 1:
            return speeds[0]
        return _extrapolate(speeds[0], speeds[1], recipe.model.num_hidden_layers)

    def _measure(self, recipe: Recipe, vocabulary: LearnedVocabulary, seconds: float) -> Speed:
        """Trains for some seconds; also measures the memory of the process once."""
        recipe = predicting_tokens(recipe)
        workload = TrainingWorkload(recipe, self.device_config)
        optimizer = workload.train_step.optimizer
        steps: list[float] = []
        updates: list[float] = []
        with self._background_load(recipe, workload.tokens):
            for _ in range(PROBE_WARM_UP_STEPS):
                workload.step()
            until = time.perf_counter() + seconds
            while not steps or time.perf_counter() < until:
                steps.append(workload.step())
                updates.append(workload.timed(optimizer.step))
        step, update = float(np.median(steps)), float(np.median(updates))
        evaluated = self._seconds_per_evaluated_token(workload, vocabulary)
        if not self.process:
            needed = self._memory(recipe, workload.tokens).total
            self.process = max(0, peak_memory(self.device_config.device) - needed)
        token = max(0.1 * step, step - update) / workload.tokens
        return Speed(token, update, evaluated or token / 2)

    def _background_load(self, recipe: Recipe, tokens: int) -> AbstractContextManager[None]:
        """The background load at work, unless the machine has too little memory for it."""
        if self.load is None:
            return nullcontext()
        needed = self._memory(recipe, tokens).total + (self.process or PROCESS_BYTES)
        if needed * (1 + self.load.size) > machine_memory(self.device_config.device):
            return nullcontext()
        return self.load.training(recipe)

    def _seconds_per_evaluated_token(
        self, workload: TrainingWorkload, vocabulary: LearnedVocabulary
    ) -> float:
        """Seconds a token of evaluating a decoder on the sample; 0 for another shape."""
        model, tokenizer = workload.train_step.model.eval(), vocabulary.tokenizer
        if model.config.shape != "decoder":
            return 0.0
        length = max(EVALUATED_TOKENS, 2 * model.config.max_position_embeddings)
        ids = vocabulary.ids[:length].tolist()
        scorer = Scorer(model, tokenizer, tokenizer.prefix)
        scorer.token_logprobs([ids[: scorer.context]])  # warm-up of the matrix products
        return workload.timed(lambda: scorer.token_logprobs([ids])) / len(ids)


def learn_vocabulary(text: PlannedText, recipe: Recipe) -> LearnedVocabulary:
    """A tokenizer by the recipe, learned from the sample.

    Its time is scaled by the size of the text: learning counts distinct words, which grow slower
    than the text, and reads a sample of a very long text.
    """
    started = time.monotonic()
    tokenizer = tokenizers.learn(text.sample, recipe.tokenizer, recipe.model.shape)
    learning, started = time.monotonic() - started, time.monotonic()
    encoded = corpus.encode_text("".join(text.sample), tokenizer)
    scale = text.bytes / encoded.bytes
    learned_from = min(scale, max(1.0, corpus.TOKENIZER_SAMPLE_BYTES / encoded.bytes))
    seconds = learning * learned_from**0.9 + (time.monotonic() - started) * scale
    bytes_per_token = encoded.bytes / max(1, len(encoded.ids))
    return LearnedVocabulary(tokenizer, encoded.ids, bytes_per_token, seconds)


def _complete(recipe: Recipe, text_tokens: int, vocabulary: int) -> Recipe:
    """The recipe with all sizes, its context no longer than the text."""
    context = min(recipe.train.context, max(8, text_tokens))
    config = dataclasses.replace(
        recipe.model,
        vocab_size=recipe.model.vocab_size or vocabulary,
        max_position_embeddings=recipe.model.max_position_embeddings or context,
    )
    train = dataclasses.replace(recipe.train, context=context)
    return dataclasses.replace(recipe, model=config.complete(), train=train)


def micro_batch(recipe: Recipe, device: torch.device) -> int:
    """Tokens of one forward pass, as training takes them: whole rows."""
    tokens = micro_batch_tokens(recipe.train, device)
    return max(1, tokens // recipe.train.context) * recipe.train.context


def _probes(recipe: Recipe, tokens: int, max_flops: float) -> list[Recipe]:
    """The recipes to measure instead: one micro-batch of `tokens` a step.

    If that takes too long, the same with few and with more layers, and with fewer rows.
    """
    config, context = recipe.model, recipe.train.context

    def probe(layers: int, tokens: int) -> Recipe:
        model, train = config, recipe.train
        if layers != config.num_hidden_layers:
            model = dataclasses.replace(config, num_hidden_layers=layers, num_encoder_layers=0)
        train = dataclasses.replace(train, batch_tokens=tokens, micro_batch_tokens=tokens)
        train = dataclasses.replace(train, time=0.0, tokens=0, epochs=0.0, steps=MANY_STEPS)
        return dataclasses.replace(recipe, model=model.complete(), train=train)

    token_flops = flops.training_flops_per_token(config, context)
    if token_flops * tokens <= max_flops:
        return [probe(config.num_hidden_layers, tokens)]
    uniform = not config.layer_types and config.shape != "encoder-decoder"
    if not uniform or config.num_hidden_layers <= MORE_LAYERS:
        rows = max(1, int(max_flops / token_flops / context))
        return [probe(config.num_hidden_layers, min(tokens, rows * context))]
    token_flops = flops.training_flops_per_token(probe(MORE_LAYERS, tokens).model, context)
    rows = max(1, int(2 * max_flops / token_flops / context))
    return [probe(layers, min(tokens, rows * context)) for layers in (FEW_LAYERS, MORE_LAYERS)]


def _extrapolate(few: Speed, more: Speed, layers: int) -> Speed:
    """The speed with `layers` layers, from those with FEW_LAYERS and with MORE_LAYERS."""
    factor = (layers - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS)
    return Speed(*(max(a, a + factor * (b - a)) for a, b in zip(few, more)))


def _steps(
    train: TrainConfig,
    step: float,
    step_tokens: int,
    text_tokens: int,
    before: float,
    pauses: Pauses,
) -> tuple[int, float]:
    """(steps, seconds) until the first budget is reached.

    Seconds: `step` of one step, `before` until the first step.
    """
    rows = max(1, step_tokens // train.context)
    budgets = [
        train.steps,
        math.ceil(train.tokens / step_tokens),
        math.ceil(train.epochs * max(1, text_tokens // train.context) / rows),
    ]
    max_steps = min((budget for budget in budgets if budget), default=0)
    if max_steps:
        times = min(schedules.EVALUATIONS, max_steps)
        looks = max_steps // train.eval_every if train.eval_every else min(times, pauses.times)
        seconds = before + max_steps * step + max(1, looks) * pauses.evaluation
        seconds += times * pauses.rest
        if not train.time or seconds <= train.time:
            return max_steps, seconds
    timed = schedules.timed_evaluations(train.time, pauses.evaluation)
    count = 1 if train.eval_every else min(timed, pauses.times)
    training = train.time - before - count * pauses.evaluation - schedules.EVALUATIONS * pauses.rest
    steps = int(training / step)
    return max(0, min(steps, max_steps or steps)), train.time
