"""Preset `auto`: chooses vocabulary, shape, batch and dropout from text, budget and machine.

For a model of --from it chooses the preset and the learning rate. The constants were fitted to runs
of 8 seconds to 15 minutes on two cores; tests/benchmarks/RESULTS.md compares the choices with a
grid. Beyond that range they approach the 20 tokens per parameter of Hoffmann et al. (2022).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.model import flops
from lmcli.model.device import DeviceConfig
from lmcli.planning.benchmark import training_flops_per_second

SAMPLE_CHARACTERS = 1 << 20
# for each of the two designs that may be measured; at most a sixtieth of the budget
MEASURING_SECONDS = 1.0
# starting, reading, choosing, the last evaluation: time in which a run does not train
OTHER_SECONDS = 5.0
# FLOP/s of a small model on two cores: the guess that chooses the first shape to measure
GUESSED_RATE = 1.5e11
# a minute on two cores: training FLOPs, tokens per parameter of the blocks, tokens of a batch
KNOWN_FLOPS, KNOWN_RATIO, KNOWN_BATCH = 9e12, 2.2, 2048
FAR_FLOPS, FAR_RATIO = 1e19, 20.0
BATCH_POWER = 0.35
WIDE = 384  # hidden size from which heads are 64 wide instead of 32
PARAMETERS_PER_TOKEN = 5.0  # of distinct text; a larger model overfits
TOKENS_PER_ENTRY = 700  # tokens read for each entry of the vocabulary
COUNTED_EPOCHS = 1.5  # further epochs help the vocabulary little
# (up to this number of parameters in the blocks, layers) and (…, context)
DEPTHS = ((0.5e6, 3), (2.4e6, 4), (9e6, 6), (3e7, 8), (math.inf, 12))
CONTEXT_SIZES = ((0.5e6, 64), (3e6, 128), (2e7, 256), (6e7, 512), (math.inf, 1024))
# (below this number of epochs, dropout) and (…, weight decay)
DROPOUTS = ((5.0, 0.0), (7.0, 0.1), (math.inf, 0.2))
DECAYS = ((2.5, 0.1), (math.inf, 0.5))
# learning rates to try for a model of --from, by preset; LoRA multiplies them
LEARNING_RATES = {"finetune": (5e-5, 2.5e-4, 1.25e-3)}
LORA_RATE_FACTOR = 10
# epochs from which half the vocabulary is better: shorter tokens are harder to memorize
MANY_READS = 6.0


@dataclass(frozen=True)
class TextStatistics:
    """UTF-8 bytes of the training set, and how many characters make up 99.8 % of it."""

    bytes: int
    characters: int
    bytes_per_character: float


@dataclass(frozen=True)
class ComputeBudget:
    """Seconds of training or, where tokens are counted instead, tokens."""

    seconds: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Design:
    """A model shape and its training: `tokens` it will read, `epochs` of the text these are."""

    layers: int
    hidden: int
    vocabulary: int
    context: int
    batch: int
    tokens: float
    epochs: float

    @property
    def heads(self) -> int:
        """Attention heads: 32 wide in small models, 64 in others."""
        return self.hidden // (64 if self.hidden >= WIDE else 32)

    @property
    def model(self) -> ModelConfig:
        """The complete configuration."""
        return ModelConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
        ).complete()

    @property
    def dropout(self) -> float:
        """0 unless the text is read so often that the model would overfit."""
        return next(dropout for epochs, dropout in DROPOUTS if self.epochs < epochs)

    @property
    def weight_decay(self) -> float:
        """Strong if the text is read more than once."""
        return next(decay for epochs, decay in DECAYS if self.epochs < epochs)

    @property
    def settings(self) -> dict[str, float]:
        """The design as recipe settings: "section.key" → value."""
        rate = 1e-2 * min(1.0, 256 / self.hidden) ** 0.5
        return {
            "tokenizer.vocab_size": self.vocabulary,
            "model.hidden_size": self.hidden,
            "model.num_hidden_layers": self.layers,
            "model.num_attention_heads": self.heads,
            "train.context": self.context,
            "train.batch_tokens": self.batch,
            "train.dropout": self.dropout,
            "train.weight_decay": self.weight_decay,
            "train.learning_rate": float(f"{rate:.2g}"),
        }


@dataclass(frozen=True)
class AutoChoice:
    """A design, the FLOP/s it was made for (0: not measured), and the reasons, a line each."""

    design: Design
    rate: float
    reasons: tuple[str, ...]


def text_statistics(texts: Iterable[str], size: int) -> TextStatistics:
    """The statistics of a text of `size` bytes, from about a million characters of `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
        if counts.total() >= SAMPLE_CHARACTERS:
            break
    total, seen, common = counts.total(), 0, 0
    for _, count in counts.most_common():
        if seen >= 0.998 * total:
            break
        seen, common = seen + count, common + 1
    encoded = sum(len(character.encode()) * count for character, count in counts.items())
    return TextStatistics(size, common, encoded / max(1, total))


def compute_budget(train: TrainConfig, text: TextStatistics) -> ComputeBudget:
    """The budget of a training configuration; with several budgets, time decides."""
    if train.time:
        return ComputeBudget(seconds=max(1.0, train.time - OTHER_SECONDS))
    if train.tokens:
        return ComputeBudget(tokens=train.tokens)
    if train.epochs:
        return ComputeBudget(tokens=train.epochs * _tokens(text, 1024))
    return ComputeBudget(tokens=train.steps * 2.0 * KNOWN_BATCH)


def _budget_name(train: TrainConfig) -> str:
    """The budget beside the time that `compute_budget` goes by, as its option."""
    name = next(name for name in ("tokens", "epochs", "steps") if getattr(train, name))
    return f"--{name} {getattr(train, name):g}"


def choose(
    text: TextStatistics, budget: ComputeBudget, vocab_size: int, measure: Callable[[Design], float]
) -> AutoChoice:
    """The design to train on `text` within `budget`.

    `vocab_size` is that of a given tokenizer, or 0. `measure` returns the FLOP/s at which this
    machine trains a design; it is called twice at most.
    """
    rate = GUESSED_RATE if budget.seconds else 0.0
    for _ in range(2 if budget.seconds else 0):
        guess, rate = rate, measure(_design(text, budget, rate, vocab_size))
        if 0.85 < rate / guess < 1.18:
            break
    design = _design(text, budget, rate, vocab_size)
    return AutoChoice(design, rate, _reasons(text, budget, rate, design))


@dataclass(frozen=True)
class AutoPreset:
    """The choices of preset `auto`.

    `resolve(defaults, preset)` returns the recipe with these defaults ("section.key": value) below
    the user's settings; the preset may be left out.
    """

    resolve: Callable[..., Recipe]

    def for_text(
        self, texts: Iterable[str], size: int, device_config: DeviceConfig, vocab_size: int = 0
    ) -> tuple[Recipe, list[str]]:
        """(recipe, reasons) for a text of `size` bytes; `vocab_size`: a given tokenizer's, or 0."""
        train = self.resolve({}).train
        seconds = min(MEASURING_SECONDS, train.time / 60)

        def measure(design: Design) -> float:
            return training_flops_per_second(self.resolve(design.settings), device_config, seconds)

        text = text_statistics(texts, size)
        choice = choose(text, compute_budget(train, text), vocab_size, measure)
        reasons = []
        if train.time and (train.tokens or train.epochs or train.steps):
            other = compute_budget(replace(train, time=0), text)
            if other.tokens < choice.design.tokens:
                choice = choose(text, other, vocab_size, measure)
                reasons = [f"sized for {_budget_name(train)}, which ends the run before --time"]
        settings = choice.design.settings
        reasons += choice.reasons
        recipe = self.resolve(settings)
        overridden = [key for key, value in settings.items() if recipe.value(key) != value]
        if overridden:
            reasons.append(f"overridden by your settings: {', '.join(overridden)}")
        return recipe, reasons

    def learning_rates(self, preset: str, train: TrainConfig) -> tuple[float, ...]:
        """The learning rates to try, the default first; () if the user set one or none is known."""
        scale = LORA_RATE_FACTOR if train.lora_rank else 1
        rates = tuple(rate * scale for rate in LEARNING_RATES.get(preset, ()))
        chosen = [self.resolve({"train.learning_rate": rate}, preset).train for rate in rates]
        fixed = any(train.learning_rate != rate for train, rate in zip(chosen, rates))
        return () if fixed else rates

    def best_rate(
        self, losses: Mapping[float, float], target: str, steps: int
    ) -> tuple[float, str]:
        """(the learning rate of the lowest loss, the reason)."""
        best = min(losses, key=lambda rate: losses[rate])
        results = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in losses.items())
        reason = f"learning rate {best:g}: {steps} steps at each gave {results} nats/{target}"
        return best, reason

    def adjusted(self, adjust: Callable[[Recipe], Recipe]) -> "AutoPreset":
        """A chooser whose recipes are adjusted."""
        return AutoPreset(lambda *arguments: adjust(self.resolve(*arguments)))


def _design(text: TextStatistics, budget: ComputeBudget, rate: float, vocab_size: int) -> Design:
    # parameters of the blocks, by FLOPs or tokens; no more than the text has tokens for
    total = budget.seconds * rate
    blocks = math.sqrt(total / 6 / _ratio(total)) if total else budget.tokens / KNOWN_RATIO
    vocabulary = vocab_size or _vocabulary(text, budget.tokens or total / (6 * blocks))
    distinct = _tokens(text, vocabulary)
    blocks = min(blocks, PARAMETERS_PER_TOKEN * distinct)
    # shape: depth by size, width a multiple of a head's
    layers = next(depth for size, depth in DEPTHS if blocks < size)
    hidden = math.sqrt(blocks / 12 / layers)
    head = 32 if hidden < WIDE - 32 else 64
    hidden = max(64, round(hidden / head) * head)
    context = next(context for size, context in CONTEXT_SIZES if blocks < size)
    # what training it comes to
    draft = Design(layers, hidden, vocabulary, context, 0, 0.0, 0.0)
    token_flops = flops.training_flops_per_token(draft.model, context)
    tokens = total / token_flops or budget.tokens
    batch = 2 ** round(math.log2(KNOWN_BATCH * (tokens * token_flops / KNOWN_FLOPS) ** BATCH_POWER))
    return replace(draft, batch=max(context, batch), tokens=tokens, epochs=tokens / distinct)


def _ratio(total_flops: float) -> float:
    """Training tokens for each parameter of the blocks."""
    power = math.log(FAR_RATIO / KNOWN_RATIO) / math.log(FAR_FLOPS / KNOWN_FLOPS)
    return min(FAR_RATIO, KNOWN_RATIO * max(1.0, total_flops / KNOWN_FLOPS) ** power)


def _tokens(text: TextStatistics, vocabulary: int) -> float:
    """About how many tokens a text has.

    In alphabets 2.4 characters a token with 1,024 entries and 0.3 more with each doubling, in
    scripts of thousands of characters 1.0 with 4,096 entries and 0.15 more.
    """
    if text.bytes_per_character < 2.5:
        characters_per_token = 2.4 + 0.3 * math.log2(vocabulary / 1024)
    else:
        characters_per_token = 1.0 + 0.15 * math.log2(vocabulary / 4096)
    return max(1.0, text.bytes / text.bytes_per_character / max(0.5, characters_per_token))


def _vocabulary(text: TextStatistics, tokens: float) -> int:
    """A power of two: enough tokens are read for each entry, most characters have their own."""
    once = _tokens(text, 1024)
    read = min(tokens, COUNTED_EPOCHS * once) / (2 if tokens > MANY_READS * once else 1)
    by_tokens = 2 ** round(math.log2(max(1.0, read / TOKENS_PER_ENTRY)))
    by_characters = 2 ** round(math.log2(1.5 * max(1, text.characters)))
    return min(32_768, max(512, by_tokens, min(by_characters, 8192)))


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,.0f} bytes"


def _count(count: float) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,.0f}"


def _reasons(
    text: TextStatistics, budget: ComputeBudget, rate: float, design: Design
) -> tuple[str, ...]:
    spent = f"{budget.tokens:,.0f} tokens"
    if rate:
        spent = f"{budget.seconds:.0f} s of steps at {rate / 1e9:,.0f} GFLOP/s (measured)"
    parameters = 12 * design.layers * design.hidden**2
    return (
        f"{design.layers} layers × {design.hidden}, context {design.context}: "
        f"{parameters / 1e6:.1f}M parameters in the blocks suit {spent}",
        f"vocabulary {design.vocabulary:,}: {_size(text.bytes)} of text with "
        f"{text.characters:,} common characters; training reads about "
        f"{_count(design.tokens)} tokens",
        f"batches of {design.batch:,} tokens, about {design.tokens / design.batch:,.0f} steps, "
        f"{design.epochs:.1f} epochs; dropout {design.dropout:g}, "
        f"weight decay {design.weight_decay:g}",
    )
