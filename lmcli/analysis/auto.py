"""The choice behind preset `auto`: from text, budget and machine to vocabulary, shape, batch and dropout, with reasons; of
a model that is trained further, the preset and the learning rate.

The constants were fitted to runs of 8 seconds to 15 minutes on two cores; README's table tells how near the choice comes to
the best of a grid. Beyond that range they are carried on towards the 20 tokens a parameter of Hoffmann et al. (2022).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from lmcli.analysis.benchmark import measured_rate
from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.model import cost
from lmcli.model.device import Placement

SAMPLE_CHARACTERS = 1 << 20
MEASURING_SECONDS = 1.0  # of each of the two designs that may be tried; a sixtieth of the budget at most
SECONDS_BESIDE_STEPS = 5.0  # starting, reading, choosing, the last evaluation: what a run by time cannot train in
GUESSED_RATE = 1.5e11  # FLOP/s of a small model on two cores, to choose the shape that is then measured
KNOWN_FLOPS, KNOWN_RATIO, KNOWN_BATCH = 9e12, 2.2, 2048  # a minute on two cores: tokens for each parameter of the blocks
FAR_FLOPS, FAR_RATIO = 1e19, 20.0
BATCH_POWER = 0.35
WIDE = 384  # hidden size from which heads are 64 wide instead of 32
PARAMETERS_A_TOKEN = 5.0  # of different text: a larger model only learns it by heart
TOKENS_AN_ENTRY, PASSES_COUNTED = 700, 1.5  # read for each entry of the vocabulary; reading again helps little
# up to so many parameters in the blocks so many layers, and so long a context; below so many epochs so much dropout
DEPTHS = ((0.5e6, 3), (2.4e6, 4), (9e6, 6), (3e7, 8), (math.inf, 12))
CONTEXTS = ((0.5e6, 64), (3e6, 128), (2e7, 256), (6e7, 512), (math.inf, 1024))
DROPOUTS = ((5.0, 0.0), (7.0, 0.1), (math.inf, 0.2))
DECAYS = ((2.5, 0.1), (math.inf, 0.5))  # likewise weight decay
# the preset by which a model is trained further, by what it learns; all else goes by AS_TEXT, and tries RATES, of LoRA's
# factors so many times as high ones
FURTHER = {"classification": "finetune-classify", "span": "qa"}
AS_TEXT, RATES, OF_ADAPTERS = "finetune", (5e-5, 2.5e-4, 1.25e-3), 10
OFTEN = 6.0  # epochs from which half the vocabulary, so more and shorter tokens, is learnt by heart less


@dataclass(frozen=True)
class Text:
    """What the choice needs to know of the training part: UTF-8 bytes, and how many characters make up 99.8 %."""

    bytes: int
    characters: int
    bytes_per_character: float


@dataclass(frozen=True)
class Budget:
    """What a run may use: training FLOPs by time or, where tokens are counted instead, tokens."""

    seconds: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Design:
    """A shape and how it is trained: `tokens` are those that training comes to, `epochs` how often it reads the text."""

    layers: int
    hidden: int
    vocabulary: int
    context: int
    batch: int
    tokens: float
    epochs: float

    @property
    def heads(self) -> int:
        """Attention heads: of width 32 in small models, 64 in others."""
        return self.hidden // (64 if self.hidden >= WIDE else 32)

    @property
    def model(self) -> ModelConfig:
        """The complete configuration."""
        return ModelConfig(hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                           vocab_size=self.vocabulary, max_position_embeddings=self.context).complete()

    @property
    def dropout(self) -> float:
        """None unless text is read so often that it would be learnt by heart."""
        return next(share for most, share in DROPOUTS if self.epochs < most)

    @property
    def weight_decay(self) -> float:
        """Strong where text is read again: weights then forget what only one text said."""
        return next(decay for most, decay in DECAYS if self.epochs < most)

    @property
    def settings(self) -> dict[str, float]:
        """What a recipe says of it: section.key and value."""
        rate = 1e-2 * min(1.0, 256 / self.hidden) ** 0.5
        return {"tokenizer.vocab_size": self.vocabulary, "model.hidden_size": self.hidden,
                "model.num_hidden_layers": self.layers, "model.num_attention_heads": self.heads,
                "train.context": self.context, "train.batch_tokens": self.batch, "train.dropout": self.dropout,
                "train.weight_decay": self.weight_decay, "train.learning_rate": float(f"{rate:.2g}")}


@dataclass(frozen=True)
class Choice:
    """A design, the FLOP/s it was made for (0: no time budget, so nothing was measured), and why, in three lines."""

    design: Design
    rate: float
    reasons: tuple[str, ...]


def describe(texts: Iterable[str], size: int) -> Text:
    """The Text of training documents of `size` bytes, given as pieces of text; reads about a million characters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
        if counts.total() >= SAMPLE_CHARACTERS:
            break
    total, seen, needed = counts.total(), 0, 0
    for _, count in counts.most_common():
        if seen >= 0.998 * total:
            break
        seen, needed = seen + count, needed + 1
    encoded = sum(len(character.encode()) * count for character, count in counts.items())
    return Text(size, needed, encoded / max(1, total))


def budget(train: TrainConfig, text: Text) -> Budget:
    """The Budget of a training configuration; of several the one that ends the run first cannot be known, time counts."""
    if train.time:
        return Budget(seconds=max(1.0, train.time - SECONDS_BESIDE_STEPS))
    if train.tokens:
        return Budget(tokens=train.tokens)
    if train.epochs:
        return Budget(tokens=train.epochs * _tokens(text, 1024))
    return Budget(tokens=train.steps * 2.0 * KNOWN_BATCH)


def choose(text: Text, allowed: Budget, vocab_size: int, measure: Callable[[Design], float]) -> Choice:
    """What to train on `text` within `allowed`. `vocab_size` is that of a given tokenizer, or 0; `measure` tells at how many
    FLOP/s this machine trains a design, and is called twice at most."""
    rate = GUESSED_RATE if allowed.seconds else 0.0
    for _ in range(2 if allowed.seconds else 0):
        guessed, rate = rate, measure(_design(text, allowed, rate, vocab_size))
        if 0.85 < rate / guessed < 1.18:
            break
    design = _design(text, allowed, rate, vocab_size)
    return Choice(design, rate, _reasons(text, allowed, rate, design))


def refined(refine: Callable[[Mapping[str, object]], Recipe], text: Text, placement: Placement,
            vocab_size: int = 0) -> tuple[Recipe, list[str]]:
    """(the recipe chosen for this text and machine, why). `refine` gives the recipe with such settings below the user's
    own, which it may hold budgets in; `vocab_size` as in `choose`."""
    train = refine({}).train

    def measure(design: Design) -> float:
        return measured_rate(refine(design.settings), placement, min(MEASURING_SECONDS, train.time / 60))

    choice = choose(text, budget(train, text), vocab_size, measure)
    recipe, reasons = refine(choice.design.settings), list(choice.reasons)
    if own := [key for key, value in choice.design.settings.items() if recipe.value(key) != value]:
        reasons.append(f"but for what you set yourself: {', '.join(own)}")
    return recipe, reasons


def further(objective: str) -> str:
    """The preset by which a model of --from goes on."""
    return FURTHER.get(objective, AS_TEXT)


def rates(train: TrainConfig) -> tuple[float, ...]:
    """The learning rates to try for a model that goes on as preset finetune does; the first is taken where none can be."""
    return tuple(rate * (OF_ADAPTERS if train.lora_rank else 1) for rate in RATES)


def best_rate(losses: Mapping[float, float], target: str, steps: int) -> tuple[float, str]:
    """(the learning rate of the lowest loss, why)."""
    best = min(losses, key=losses.get)
    told = ", ".join(f"{losses[rate]:.3f} at {rate:g}" for rate in losses)
    return best, f"learning rate {best:g}: {steps} steps at each came to {told} nats/{target}"


def _design(text: Text, allowed: Budget, rate: float, vocab_size: int) -> Design:
    flops = allowed.seconds * rate
    blocks = math.sqrt(flops / 6 / _ratio(flops)) if flops else allowed.tokens / KNOWN_RATIO  # parameters
    vocabulary = vocab_size or _vocabulary(text, allowed.tokens or flops / (6 * blocks))
    different = _tokens(text, vocabulary)
    blocks = min(blocks, PARAMETERS_A_TOKEN * different)
    layers = next(depth for most, depth in DEPTHS if blocks < most)
    hidden = math.sqrt(blocks / 12 / layers)
    grain = 32 if hidden < WIDE - 32 else 64  # the width of a head
    hidden = max(64, round(hidden / grain) * grain)
    context = next(size for most, size in CONTEXTS if blocks < most)
    draft = Design(layers, hidden, vocabulary, context, 0, 0.0, 0.0)
    a_token = cost.training_flops_per_token(draft.model, context)
    tokens = flops / a_token or allowed.tokens
    batch = 2 ** round(math.log2(KNOWN_BATCH * (tokens * a_token / KNOWN_FLOPS) ** BATCH_POWER))
    return replace(draft, batch=max(context, batch), tokens=tokens, epochs=tokens / different)


def _ratio(flops: float) -> float:
    """Training tokens for each parameter of the blocks."""
    power = math.log(FAR_RATIO / KNOWN_RATIO) / math.log(FAR_FLOPS / KNOWN_FLOPS)
    return min(FAR_RATIO, KNOWN_RATIO * max(1.0, flops / KNOWN_FLOPS) ** power)


def _tokens(text: Text, vocabulary: int) -> float:
    """About how many tokens a text has: in alphabets 2.4 characters a token with 1,024 entries and 0.3 more with each
    doubling, in scripts of thousands of characters 1.0 with 4,096 and 0.15 more."""
    alphabet = text.bytes_per_character < 2.5
    a_token = 2.4 + 0.3 * math.log2(vocabulary / 1024) if alphabet else 1.0 + 0.15 * math.log2(vocabulary / 4096)
    return max(1.0, text.bytes / text.bytes_per_character / max(0.5, a_token))


def _vocabulary(text: Text, tokens: float) -> int:
    """A power of two: so many that enough tokens are read for each entry, and most characters have one of their own."""
    once = _tokens(text, 1024)
    read = min(tokens, PASSES_COUNTED * once) / (2 if tokens > OFTEN * once else 1)
    by_tokens = 2 ** round(math.log2(max(1.0, read / TOKENS_AN_ENTRY)))
    by_characters = 2 ** round(math.log2(1.5 * max(1, text.characters)))
    return min(32_768, max(512, by_tokens, min(by_characters, 8192)))


def _reasons(text: Text, allowed: Budget, rate: float, design: Design) -> tuple[str, ...]:
    spent = f"{allowed.seconds:.0f} s of steps at {rate / 1e9:,.0f} GFLOP/s, as measured here" if rate else \
        f"{allowed.tokens:,.0f} tokens"
    parameters = 12 * design.layers * design.hidden ** 2
    return (
        f"{design.layers} layers × {design.hidden} and a context of {design.context}: {spent}, are best spent on some "
        f"{parameters / 1e6:.1f}M parameters in blocks",
        f"vocabulary {design.vocabulary:,}: {text.bytes / 1e6:,.1f} MB of text with {text.characters:,} common characters, "
        f"of which training reads about {design.tokens / 1e6:,.1f}M tokens",
        f"batches of {design.batch:,} tokens, some {design.tokens / design.batch:,.0f} steps; dropout {design.dropout:g}, "
        f"weight decay {design.weight_decay:g}: each text is read {design.epochs:.1f} times")
