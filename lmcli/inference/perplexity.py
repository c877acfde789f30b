"""Documents → perplexity, bits per byte and their like: sums over scored text, each figure with its standard error."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from lmcli.inference.crew import ALONE, Crew, Errand, packed, unpacked
from lmcli.inference.scoring import NATS_PER_BIT, Scorer
from lmcli.inference.token_scores import Request, Wanted
from lmcli.text.corpus import EncodedDocument

TOKENS_AT_ONCE = 100_000  # at most: parts of like size come out even between processes
BATCHES_AT_ONCE = 8
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


class Part(NamedTuple):
    """Tokens to read, with the document that ends with them, None where more of it follows."""

    request: Request
    document: EncodedDocument | None


def errand(scorer: Scorer) -> Errand:
    """The reading of Parts: of each the packed log-probabilities of its tokens, less what is given."""
    def work(parts: list[Part]) -> list[str]:
        found = scorer.reader.read([part.request for part in parts], Wanted())
        return [packed(one.logprobs[part.request.given:]) for part, one in zip(parts, found)]

    return Errand(work, lambda parts: [(packed(np.asarray(request.ids, dtype=np.int32)), request.spelt, request.given)
                                       for request, _ in parts],
                  lambda words: [Part(Request(unpacked(ids, np.int32).tolist(), spelt, given), None)
                                 for ids, spelt, given in words])


def each_measured(scorer: Scorer, documents: Iterable[EncodedDocument], crew: Crew = ALONE,
                  key: int = 0) -> Iterator[Measured]:
    """The documents in their order, worked on some thousand tokens at a time, by all of a crew: `key` is the place of this
    scorer's errand."""
    read: list[np.ndarray] = []  # of a document that goes on
    for parts, found in crew.in_order(_parts(scorer, documents), errand(scorer), key):
        for (_, document), logprobs in zip(parts, found):
            read.append(unpacked(logprobs, np.float32))
            if document is not None:
                yield _measured(scorer, document, np.concatenate(read))
                read = []


def _parts(scorer: Scorer, documents: Iterable[EncodedDocument]) -> Iterator[list[Part]]:
    waiting: list[Part] = []
    tokens, most = 0, min(TOKENS_AT_ONCE, BATCHES_AT_ONCE * scorer.batch)
    for document in documents:
        for request, following in pairwise(chain(scorer.slices(document.ids, most), (None,))):
            waiting.append(Part(request, None if following else document))
            tokens += len(request.ids)
            if tokens >= most:
                yield waiting
                waiting, tokens = [], 0
    if waiting:
        yield waiting


def _measured(scorer: Scorer, document: EncodedDocument, logprobs: np.ndarray) -> Measured:
    scored = ~np.isnan(logprobs)
    unseen = document.ids[~scored[:len(document.ids)]].tolist()
    hidden = scorer.tokenizer.decode(unseen) if unseen else ""
    sums = (-float(logprobs[scored].sum(dtype=np.float64)), scored.sum(),
            document.bytes - scorer.tokenizer.count_bytes(unseen), document.characters - len(hidden), document.words)
    return Measured(document, np.array(sums, dtype=np.float64), logprobs)
