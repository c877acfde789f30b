"""What a training run will come to on this machine, before it is run: size, memory, time, and about how good it gets.

Speed is measured, by real training steps of the recipe on random ids; memory is worked out (`model.memory`) on top of
what this process is seen to need; bits per byte come from a small fit to real runs (`expected_bits_per_byte`); what several
devices would make of it is worked out from one's speed with its share of a step (`devices`).
"""

import dataclasses
import lzma
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lmcli.analysis import devices
from lmcli.analysis.benchmark import NEVER, TrainingWorkload, peak_memory
from lmcli.analysis.company import Company
from lmcli.analysis.devices import ALONE, Group, Share
from lmcli.config import ModelConfig, Recipe
from lmcli.errors import UserError
from lmcli.inference.scoring import Scorer
from lmcli.model import cost, kernels, memory
from lmcli.model.device import Placement, dtype_name, machine_memory
from lmcli.text import corpus, documents
from lmcli.text import tokenizer as tokenizers
from lmcli.text.documents import Layout
from lmcli.text.records import shown
from lmcli.text.tokenizer import Tokenizer
from lmcli.training import data, loop
from lmcli.training.stepper import micro_batch_tokens

SAMPLE_BYTES = 1_000_000
SECONDS = 2.0  # of measured steps for a preset
WARM_UP_STEPS = 2
MOST_FLOPS = {"cpu": 2e11}  # of a step that is measured whole: a second or two; on a GPU the same by MOST_FLOPS_ELSEWHERE
MOST_FLOPS_ELSEWHERE = 2e13
FEW_LAYERS, MORE_LAYERS = 1, 3  # larger models are measured with so many layers, and the rest added in proportion
EVALUATED_TOKENS = 4096
# of the fit in `expected_bits_per_byte`
FLOOR, CAPACITY, SLOPE, POWER, SIZE_POWER, REPEATS = 0.615, 0.05, 0.25, 0.5, 0.3, 8.0
DISK = 5e8  # bytes a second that saves come to
SECONDS_OF_SAMPLE = 0.05  # for a layer of the model that writes the sample text
PROGRAM = 4e8  # bytes of a process without a model, before that is measured


@dataclass
class Text:
    """What is to be trained on: bytes and documents of the training part, bytes that are measured, a sample, its bits per
    byte under xz, and the seconds that reading all of it took."""

    layout: Layout
    bytes: int
    documents: int
    validation_bytes: int
    sample: list[str]
    compressed: float
    seconds: float

    @property
    def sample_bytes(self) -> int:
        """UTF-8 bytes of the sample."""
        return sum(len(part.encode("utf-8")) for part in self.sample)


class Vocabulary(NamedTuple):
    """A tokenizer learnt from the sample: ids of the sample, bytes a token, seconds that learning and encoding all of the
    text would take."""

    tokenizer: Tokenizer
    ids: np.ndarray
    bytes_per_token: float
    seconds: float


class Speed(NamedTuple):
    """Seconds: of training a token, of one update of all weights, of evaluating a token."""

    token: float
    update: float
    evaluated: float


@dataclass
class Plan:
    """What a run of one recipe will come to. Memory in bytes, of one device; `process` is the part that is there without a
    model; `bits_per_byte` of the validation part is an estimate, None for what is no decoder; `tokens_per_parameter`
    counts all tokens read; `text_tokens` are those of the text, once, `micro_batch_tokens` those of a forward pass.
    `advice` is one sentence.

    Of several devices `idle_devices` have no row of a step, `sharding` is as in `devices.Spread`, `interconnect` is bytes a
    second between two (None: there is one), `seconds_communicating` are those of the run in which a device only sends and
    waits, and `speedup` compares all with one of them, None where that was not measured."""

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
        """Whether the machine has that much memory."""
        return self.memory <= self.machine_memory


def read(arguments: tuple[str, ...], val: tuple[str, ...], layout: Layout, include: str | None, recipe: Recipe,
         note: Callable[[str], None]) -> Text:
    """Surveys DATA… as `lm train` does, without tokenizing it. `recipe` says how much is measured.

    Raises UserError for empty data, data that is no text, and too little of it.
    """
    started = time.monotonic()
    source = data.find(arguments, val, layout, include, note)
    parts = data.split(source, recipe.train.validation_bytes, lambda text: None)  # the table tells the sizes
    sample = [piece.text for piece in layout.pieces(documents.limit(parts.training, layout, SAMPLE_BYTES))]
    if not "".join(sample).strip():
        raise UserError("no text in it", where=shown(source.files[0]), hint="give a file with text, or pipe some in")
    seconds = time.monotonic() - started
    return Text(layout, parts.training.bytes, len(parts.training), parts.measured.bytes, sample,
                compressed(sample), seconds)


def compressed(sample: list[str]) -> float:
    """Bits that xz needs for a byte of the sample."""
    whole = "".join(sample).encode("utf-8")
    # a dictionary no larger than the sample: by default xz takes 94 MB, which would be counted as this process's own
    packed = lzma.compress(whole, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}])
    return 8 * len(packed) / len(whole)


class Planner:
    """Makes a Plan of one recipe after the other for the same text. `startup` is how long the command took to begin;
    `company` trains beside this process where several are to share the machine."""

    def __init__(self, text: Text, placement: Placement, startup: float = 0.0, company: Company | None = None):
        self.text, self.placement, self.startup, self.company = text, placement, startup, company
        self.process = 0  # bytes; known once a model has been trained
        self._vocabularies: dict[tuple, Vocabulary] = {}
        self._speeds: dict[str, Speed] = {}

    def plan(self, name: str, recipe: Recipe, group: Group = ALONE) -> Plan:
        """The Plan of a recipe with its own budgets (it must have one) on a group of devices, its advice still to be given
        (`advice.advise`).

        Raises UsageError for a recipe whose objective needs labels.
        """
        vocabulary = self._vocabulary(recipe)
        text_tokens = round(self.text.bytes / vocabulary.bytes_per_token) + self.text.documents
        recipe = _complete(recipe, text_tokens, vocabulary.tokenizer.size)
        config, train = recipe.model, recipe.train
        step_tokens = max(1, train.batch_tokens // train.context) * train.context
        share, speed = self._share(recipe, group.count), self._speed(recipe, vocabulary, group.count)
        micro = share.rows_at_once * train.context
        room = machine_memory(self.placement.device) // (group.count if group.here else 1)
        process = self.process + 2 * text_tokens * (self.placement.device.type == "cpu")
        spread = devices.spread(config, self._memory(recipe, micro), share.passes, group.count, room - process)
        step = speed.token * share.rows * train.context + speed.update / spread.parts(group) + spread.seconds(group)
        parameters = cost.parameters(config).total
        before = self.startup + self._reading(group) + vocabulary.seconds + parameters / 1e8
        steps, seconds = _steps(recipe, step, step_tokens, text_tokens, before, self._interlude(config, vocabulary, speed))
        held, tokens = spread.memory, steps * step_tokens
        return Plan(
            name, parameters, config.vocab_size, train.context, step_tokens, micro, self.text.bytes, text_tokens, steps,
            tokens, tokens / text_tokens, tokens / parameters,
            tokens * cost.training_flops_per_token(config, train.context), *held[:3], max(held.activations, held.update),
            process, process + held.total, room, step_tokens / step, seconds,
            self._bits(recipe, config, tokens, vocabulary), devices=group.count, idle_devices=share.idle,
            sharding=spread.sharding, interconnect=group.link.bytes_per_second if group.count > 1 else None,
            seconds_communicating=steps * spread.seconds(group), speedup=self._speedup(recipe, vocabulary, group, step))

    def _share(self, recipe: Recipe, count: int) -> Share:
        train = recipe.train
        most = micro_batch(recipe, self.placement.device) // train.context
        return devices.share(max(1, train.batch_tokens // train.context), most, count)

    def _reading(self, group: Group) -> float:
        """Seconds of reading the text: the processes that do not lead do so after the one that does."""
        return self.text.seconds * (1 if group.count == 1 else 2)

    def _speedup(self, recipe: Recipe, vocabulary: Vocabulary, group: Group, step: float) -> float | None:
        """How many times as fast as one device alone, whose steps are as large, a group is that takes so long for one."""
        if group.count == 1:
            return 1.0
        if group.here:
            return None
        one, rows = self._speed(recipe, vocabulary, 1), self._share(recipe, 1).rows
        return (one.token * rows * recipe.train.context + one.update) / step

    def _vocabulary(self, recipe: Recipe) -> Vocabulary:
        key = (recipe.tokenizer, recipe.model.shape)
        if key not in self._vocabularies:
            self._vocabularies[key] = learnt(self.text, recipe)
        return self._vocabularies[key]

    def _bits(self, recipe: Recipe, config: ModelConfig, tokens: int, vocabulary: Vocabulary) -> float | None:
        if config.shape != "decoder" or not tokens:
            return None
        body = cost.parameters(config).total - config.vocab_size * config.hidden_size
        return expected_bits_per_byte(self.text.compressed, self.text.bytes, tokens * vocabulary.bytes_per_token, body)

    def _memory(self, recipe: Recipe, micro: int) -> memory.Memory:
        device = self.placement.device
        return memory.training_memory(recipe.model, recipe.train, micro, dtype_name(self.placement.dtype),
                                      fused=kernels.serve(device), device=device.type)

    def _interlude(self, config: ModelConfig, vocabulary: Vocabulary, speed: Speed) -> tuple[float, float]:
        """(seconds of an evaluation, of the save and the sample text that go with it)."""
        tokens = self.text.validation_bytes / vocabulary.bytes_per_token
        layers = config.num_hidden_layers * (config.shape == "decoder")
        return tokens * speed.evaluated, 16 * cost.parameters(config).total / DISK + SECONDS_OF_SAMPLE * layers

    def _speed(self, recipe: Recipe, vocabulary: Vocabulary, count: int) -> Speed:
        """The Speed of one of `count` devices with its share of a recipe's steps: a few rows take longer, each, than many.
        Measured with all layers, or, of a large model, with one and with three of them."""
        micro = self._share(recipe, count).rows_at_once * recipe.train.context
        probes = _probes(recipe, micro, MOST_FLOPS.get(self.placement.device.type, MOST_FLOPS_ELSEWHERE))
        for probe in probes:
            if repr(probe) not in self._speeds:
                self._speeds[repr(probe)] = self._measured(probe, vocabulary, SECONDS / len(probes))
        found = [self._speeds[repr(probe)] for probe in probes]
        return found[0] if len(found) == 1 else _extrapolated(*found, recipe.model.num_hidden_layers)

    def _measured(self, recipe: Recipe, vocabulary: Vocabulary, seconds: float) -> Speed:
        workload = TrainingWorkload(recipe, self.placement)
        steps, updates = [], []
        with self._beside(recipe, workload.tokens):
            for _ in range(WARM_UP_STEPS):
                workload.step()
            until = time.perf_counter() + seconds
            while not steps or time.perf_counter() < until:
                steps.append(workload.step())
                updates.append(workload.timed(workload.run.optimizer.step))
        step, update = float(np.median(steps)), float(np.median(updates))
        evaluated = self._evaluated(workload, vocabulary)
        if not self.process:
            needed = self._memory(recipe, workload.tokens).total
            self.process = max(0, peak_memory(self.placement.device) - needed)
        token = max(0.1 * step, step - update) / workload.tokens
        return Speed(token, update, evaluated or token / 2)

    def _beside(self, recipe: Recipe, tokens: int) -> AbstractContextManager[None]:
        """The company at work, unless there would not be memory for all."""
        each = self._memory(recipe, tokens).total + (self.process or PROGRAM)
        if not self.company or each * (1 + self.company.size) > machine_memory(self.placement.device):
            return nullcontext()
        return self.company.working(recipe)

    def _evaluated(self, workload: TrainingWorkload, vocabulary: Vocabulary) -> float:
        """Seconds a token of validating a decoder on the sample; 0 for another shape."""
        model, tokenizer = workload.run.model.eval(), vocabulary.tokenizer
        if model.config.shape != "decoder":
            return 0.0
        ids = vocabulary.ids[:max(EVALUATED_TOKENS, 2 * model.config.max_position_embeddings)].tolist()
        scorer = Scorer(model, tokenizer, tokenizer.prefix)
        scorer.token_logprobs([ids[:scorer.context]])  # the first pass also prepares the kernels of its products
        return workload.timed(lambda: scorer.token_logprobs([ids])) / len(ids)


def learnt(text: Text, recipe: Recipe) -> Vocabulary:
    """A tokenizer as the recipe asks for, learnt from the sample, with what it makes of the text.

    Seconds are scaled by the text's size: learning counts words, of which a longer text has relatively fewer, and reads
    some of a very long one.
    """
    started = time.monotonic()
    tokenizer = tokenizers.learn(text.sample, recipe.tokenizer, recipe.model.shape)
    learning, started = time.monotonic() - started, time.monotonic()
    encoded = corpus.encode_text("".join(text.sample), tokenizer)
    larger = text.bytes / encoded.bytes
    read = min(larger, max(1.0, tokenizers.LEARNT_FROM_BYTES / encoded.bytes))
    seconds = learning * read ** 0.9 + (time.monotonic() - started) * larger
    return Vocabulary(tokenizer, encoded.ids, encoded.bytes / max(1, len(encoded.ids)), seconds)


def _complete(recipe: Recipe, text_tokens: int, vocabulary: int) -> Recipe:
    """The recipe with all sizes, its context no longer than the text."""
    train = dataclasses.replace(recipe.train, context=min(recipe.train.context, max(8, text_tokens)))
    config = dataclasses.replace(
        recipe.model, vocab_size=recipe.model.vocab_size or vocabulary,
        max_position_embeddings=recipe.model.max_position_embeddings or train.context)
    return dataclasses.replace(recipe, model=config.complete(), train=train)


def micro_batch(recipe: Recipe, device: torch.device) -> int:
    """Tokens of one forward pass, as training takes them: whole rows."""
    most = micro_batch_tokens(recipe.train, device)
    return max(1, most // recipe.train.context) * recipe.train.context


def _probes(recipe: Recipe, tokens: int, most_flops: float) -> list[Recipe]:
    """What is measured in a recipe's place: itself with one micro-batch of `tokens` a step; if a step of that is too long,
    the same with few and with more layers, and with fewer rows."""
    config, train = recipe.model, recipe.train

    def probe(layers: int, tokens: int) -> Recipe:
        sizes = {} if layers == config.num_hidden_layers else {"num_hidden_layers": layers, "num_encoder_layers": 0}
        return dataclasses.replace(recipe, model=dataclasses.replace(config, **sizes).complete(), train=dataclasses.replace(
            train, batch_tokens=tokens, micro_batch_tokens=tokens, time=0.0, tokens=0, epochs=0.0, steps=NEVER))

    each = cost.training_flops_per_token(config, train.context)
    if each * tokens <= most_flops:
        return [probe(config.num_hidden_layers, tokens)]
    if config.layer_types or config.shape == "encoder-decoder" or config.num_hidden_layers <= MORE_LAYERS:
        rows = max(1, int(most_flops / each / train.context))
        return [probe(config.num_hidden_layers, min(tokens, rows * train.context))]
    short = cost.training_flops_per_token(probe(MORE_LAYERS, tokens).model, train.context)
    rows = max(1, int(2 * most_flops / short / train.context))
    return [probe(layers, min(tokens, rows * train.context)) for layers in (FEW_LAYERS, MORE_LAYERS)]


def _extrapolated(few: Speed, more: Speed, layers: int) -> Speed:
    """The Speed with so many layers, by those with FEW_LAYERS and with MORE_LAYERS."""
    beyond = (layers - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS)
    return Speed(*(max(a, a + beyond * (b - a)) for a, b in zip(few, more)))


def _steps(recipe: Recipe, step: float, step_tokens: int, text_tokens: int, before: float,
           interlude: tuple[float, float]) -> tuple[int, float]:
    """(steps, seconds) until the first budget is reached; `step` are the seconds of a step, `before` those before the
    first, `interlude` those of an evaluation and of what goes with it."""
    train = recipe.train
    rows = max(1, step_tokens // train.context)
    budgets = [train.steps, math.ceil(train.tokens / step_tokens),
               math.ceil(train.epochs * max(1, text_tokens // train.context) / rows)]
    most = min((budget for budget in budgets if budget), default=0)
    evaluation, rest = interlude
    if most:
        seconds = before + most * step + _times(train, most) * (evaluation + rest)
        if not train.time or seconds <= train.time:
            return most, seconds
    room = train.time - before
    looks = loop.evaluations(train.time, evaluation) if not train.eval_every else 1
    steps = int((room - looks * evaluation - loop.EVALUATIONS * rest) / step)
    return max(0, min(steps, most or steps)), train.time


def _times(train, steps: int) -> int:
    """Evaluations of a run by steps."""
    return max(1, steps // train.eval_every) if train.eval_every else min(loop.EVALUATIONS, steps)


def expected_bits_per_byte(compressed: float, text_bytes: float, read_bytes: float, body: int) -> float:
    """About how many bits per byte a decoder reaches on held-out text like its own.

    `compressed` is what xz makes of the text, `body` the parameters without the embedding. A floor that falls with the
    model's size, and above it what is not learnt yet: less with the bytes read, more for a larger model at the same
    bytes. Reading again counts for less and less (Muennighoff et al. 2023), up to eight further passes.

    Held against 30 runs of 8 to 300 s with 0.3 to 3.2 million parameters in their blocks, 21 of them on tinyshakespeare,
    the others on wikitext-2, two kinds of stories, and a Chinese novel and classic: error 6 % (root mean square), 13 % at
    most. The constants come from a grid search on 28 of these, rounded by hand. With the search repeated without one
    text, that text is met within 18 %, one of 60 kB within 26 %. The fall of the floor with size is an assumption that
    these runs are too small to show (without it the search fits a little better: 4.8 instead of 4.9 %, weighted), but
    without it a larger model would never be worth its time. Beyond those sizes all of it is a guess.
    """
    million = 1e6
    fresh = text_bytes * (1 + REPEATS * (1 - math.exp(-max(0.0, read_bytes / text_bytes - 1) / REPEATS)))
    read = max(1e-3, min(read_bytes, fresh) / million)
    size = body / million
    return min(8.0, compressed * (FLOOR * size ** -CAPACITY + SLOPE * read ** -POWER * size ** SIZE_POWER))


def rounded(bits: float | None) -> float | None:
    """An estimate with no more figures than it has: 2.1."""
    return None if bits is None else round(bits, 1)
