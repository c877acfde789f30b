"""Documents → perplexity, bits per byte and their like: sums over scored text, each figure with its standard error."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lmcli.inference.scoring import NATS_PER_BIT, Scorer
from lmcli.text.corpus import EncodedDocument

TOKENS_AT_ONCE = 100_000
# what is summed over documents, in the order of the vectors here
COUNTED = ("nats", "tokens", "bytes", "characters", "words")
# figure → (what it is nats per, whether it is a perplexity rather than bits)
FIGURES = {"perplexity": ("tokens", True), "bits_per_byte": ("bytes", False), "bits_per_character": ("characters", False),
           "word_perplexity": ("words", True)}


class Measured(NamedTuple):
    """One document: its sums as COUNTED names them, and its tokens' log-probabilities (NaN: context only)."""

    document: EncodedDocument
    sums: np.ndarray
    logprobs: np.ndarray


@dataclass
class Perplexity:
    """Sums over documents, and the figures they give. Everything counts scored text only; `products` sums the products of
    each two counts of a document (5, 5), of which standard errors are made."""

    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    documents: int = 0
    context: int = 0
    stride: int = 0
    products: np.ndarray = field(default_factory=lambda: np.zeros((len(COUNTED), len(COUNTED))), repr=False, compare=False)

    def add(self, sums: np.ndarray) -> None:
        """Counts one more document."""
        self.logprob -= float(sums[0])
        self.tokens, self.bytes, self.characters, self.words = (
            int(own + new) for own, new in zip((self.tokens, self.bytes, self.characters, self.words), sums[1:]))
        self.documents += 1
        self.products += np.outer(sums, sums)

    @property
    def perplexity(self) -> float:
        """exp(−logprob / tokens); NaN when nothing was scored."""
        return _exp_per(-self.logprob, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """−logprob / ln 2 / UTF-8 bytes: comparable between tokenizers."""
        return self._bits_per(self.bytes)

    @property
    def bits_per_character(self) -> float:
        """−logprob / ln 2 / characters."""
        return self._bits_per(self.characters)

    @property
    def word_perplexity(self) -> float:
        """exp(−logprob / words), words being runs of non-space."""
        return _exp_per(-self.logprob, self.words)

    def standard_error(self, figure: str) -> float | None:
        """The standard error of a figure of FIGURES over documents, taken as drawn independently; None below two.

        That of a ratio of sums by linearization (Cochran 1977, §6.5): √(D/(D−1) · Σ(nats − r·count)²) / Σ count; that of
        a perplexity is its own size times that of its exponent.
        """
        name, exponential = FIGURES[figure]
        count = getattr(self, name)
        if self.documents < 2 or not count:
            return None
        ratio, k = -self.logprob / count, COUNTED.index(name)
        squares = self.products[0, 0] - 2 * ratio * self.products[0, k] + ratio ** 2 * self.products[k, k]
        error = math.sqrt(max(0.0, squares) * self.documents / (self.documents - 1)) / count
        return getattr(self, figure) * error if exponential else error / NATS_PER_BIT

    @property
    def criterion(self) -> float:
        """Bits per byte: what tells the best model of a run."""
        return self.bits_per_byte

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl."""
        return {"val_loss": -self.logprob / max(1, self.tokens), "val_bits_per_byte": self.bits_per_byte}

    def facts(self) -> dict[str, float]:
        """Plain values for recipe.yaml: the figures with their counts and how they were measured."""
        return {"val_bits_per_byte": self.bits_per_byte, "val_bits_per_character": self.bits_per_character,
                "val_perplexity": self.perplexity, "val_bytes": self.bytes, "val_tokens": self.tokens,
                "context": self.context, "stride": self.stride}

    def headline(self) -> str:
        """The figures on one line; bits per character where characters and bytes differ."""
        several = f" · {self.bits_per_character:.4f} bits/character" if self.bytes > 1.1 * self.characters else ""
        return f"{self.bits_per_byte:.4f} bits/byte{several} · perplexity {self.perplexity:.2f}"

    def _bits_per(self, count: int) -> float:
        return -self.logprob / NATS_PER_BIT / count if count else math.nan


def _exp_per(nats: float, count: int) -> float:
    """exp(nats / count): infinite where a float ends, NaN where there is nothing to divide by."""
    if not count:
        return math.nan
    return math.exp(nats / count) if nats / count < 709 else math.inf


def measured(scorer: Scorer, documents: Iterable[EncodedDocument]) -> Perplexity:
    """The sums over documents, which are read as they come."""
    total = Perplexity(context=scorer.context, stride=scorer.stride)
    for one in each_measured(scorer, documents):
        total.add(one.sums)
    return total


def each_measured(scorer: Scorer, documents: Iterable[EncodedDocument]) -> Iterator[Measured]:
    """The documents in their order, worked on some 100,000 tokens at a time."""
    waiting, tokens = [], 0
    for document in documents:
        waiting.append(document)
        tokens += len(document.ids)
        if tokens > TOKENS_AT_ONCE:
            yield from _measured(scorer, waiting)
            waiting, tokens = [], 0
    yield from _measured(scorer, waiting)


def _measured(scorer: Scorer, documents: list[EncodedDocument]) -> Iterator[Measured]:
    for document, logprobs in zip(documents, scorer.token_logprobs([document.ids.tolist() for document in documents])):
        scored = ~np.isnan(logprobs)
        unseen = document.ids[~scored[:len(document.ids)]].tolist()
        hidden = scorer.tokenizer.decode(unseen) if unseen else ""
        sums = (-float(logprobs[scored].sum(dtype=np.float64)), scored.sum(),
                document.bytes - scorer.tokenizer.count_bytes(unseen), document.characters - len(hidden), document.words)
        yield Measured(document, np.array(sums, dtype=np.float64), logprobs)
