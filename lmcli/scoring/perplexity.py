"""Documents → perplexity, bits per byte and related figures, each with its standard error."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from lmcli.data.corpus import EncodedDocument
from lmcli.data.rows import display_name
from lmcli.distributed import work_queue
from lmcli.distributed.work_queue import RemoteTask, array_to_text, text_to_array
from lmcli.errors import UserError
from lmcli.model import finite
from lmcli.scoring.scorer import NATS_PER_BIT, Scorer
from lmcli.scoring.token_logprobs import ScoreFields, ScoreRequest
from lmcli.terminal.notebook import NotebookTable, data_frame
from lmcli.text.splitting import in_batches

MAX_BATCH_TOKENS = 100_000  # small enough that processes finish at about the same time
FORWARDS_PER_BATCH = 8
# what is summed over documents, in the order of the vectors here
COUNTS = ("nats", "tokens", "bytes", "characters", "words")
# figure → (what nats are divided by, True for a perplexity and False for bits)
PERPLEXITY_FIGURES = {
    "perplexity": ("tokens", True),
    "bits_per_byte": ("bytes", False),
    "bits_per_character": ("characters", False),
    "word_perplexity": ("words", True),
}
SHOWN_COUNTS = ("tokens", "bytes", "documents", "context", "stride")


class ScoredDocument(NamedTuple):
    """A document, its sums in the order of COUNTS, its tokens' logprobs (NaN: context only)."""

    document: EncodedDocument
    sums: np.ndarray
    logprobs: np.ndarray

    @property
    def is_finite(self) -> bool:
        """True if all log-probabilities are numbers."""
        return math.isfinite(self.sums[0])


@dataclass
class Perplexity(NotebookTable):
    """Sums over the scored text of documents, and the figures they give.

    `products` (5, 5) sums the products of each two counts of a document, for standard errors.
    """

    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    documents: int = 0
    context: int = 0
    stride: int = 0
    products: np.ndarray = field(
        default_factory=lambda: np.zeros((len(COUNTS), len(COUNTS))), repr=False, compare=False
    )

    def rows(self) -> list[dict[str, Any]]:
        """One row of figures and counts."""
        return [{name: getattr(self, name) for name in (*PERPLEXITY_FIGURES, *SHOWN_COUNTS)}]

    def to_pandas(self) -> Any:
        """The row as a pandas.DataFrame. Raises UserError without pandas."""
        return data_frame(self.rows())

    def __repr__(self) -> str:
        figures = f"{self.bits_per_byte:.4f} bits/byte, perplexity {self.perplexity:.4g}"
        return f"<Perplexity: {figures}, {self.tokens:,} tokens of {self.bytes:,} bytes>"

    def add(self, sums: np.ndarray) -> None:
        """Adds a document by its sums, in the order of COUNTS."""
        nats, *counts = sums
        self.logprob -= float(nats)
        for name, count in zip(COUNTS[1:], counts):
            setattr(self, name, int(getattr(self, name) + count))
        self.documents += 1
        if math.isfinite(nats):
            self.products += np.outer(sums, sums)

    @property
    def problem(self) -> str:
        """What is wrong with the sums; "" if they are numbers."""
        return "" if math.isfinite(self.logprob) else finite.LOGPROB

    @property
    def perplexity(self) -> float:
        """exp(−logprob / tokens); NaN if nothing was scored."""
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
        """exp(−logprob / words); words are runs of non-space."""
        return _exp_per(-self.logprob, self.words)

    def standard_error(self, figure: str) -> float | None:
        """The standard error of a figure over documents drawn independently; None below two.

        Of a ratio of sums, √(D/(D−1) · Σ(nats − r·count)²) / Σ count (Cochran 1977, §6.5); of a
        perplexity, its size times the error of its exponent.
        """
        name, exponential = PERPLEXITY_FIGURES[figure]
        count = getattr(self, name)
        if self.documents < 2 or not count:
            return None
        ratio, k = -self.logprob / count, COUNTS.index(name)
        products = self.products
        squares = products[0, 0] - 2 * ratio * products[0, k] + ratio**2 * products[k, k]
        error = math.sqrt(max(0.0, squares) * self.documents / (self.documents - 1)) / count
        return getattr(self, figure) * error if exponential else error / NATS_PER_BIT

    @property
    def criterion(self) -> float:
        """Bits per byte: the best model of a run has the lowest."""
        return self.bits_per_byte

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.logprob / max(1, self.tokens)

    def metrics(self) -> dict[str, float]:
        """The values for metrics.jsonl."""
        return {"val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}

    def facts(self) -> dict[str, float]:
        """The values for recipe.yaml: figures, counts, and how they were measured."""
        return {
            "val_bits_per_byte": self.bits_per_byte,
            "val_bits_per_character": self.bits_per_character,
            "val_perplexity": self.perplexity,
            "val_bytes": self.bytes,
            "val_tokens": self.tokens,
            "context": self.context,
            "stride": self.stride,
        }

    def headline(self) -> str:
        """The figures on one line; with bits per character if these differ from bytes."""
        figures = f"{self.bits_per_byte:.4f} bits/byte"
        if self.bytes > 1.1 * self.characters:
            figures += f" · {self.bits_per_character:.4f} bits/character"
        return f"{figures} · perplexity {self.perplexity:.2f}"

    def _bits_per(self, count: int) -> float:
        return -self.logprob / NATS_PER_BIT / count if count else math.nan


def _exp_per(nats: float, count: int) -> float:
    """exp(nats / count); infinity above the largest float, NaN for a count of 0."""
    if not count:
        return math.nan
    return math.exp(nats / count) if nats / count < 709 else math.inf


def not_finite(scorer: Scorer, scored: ScoredDocument, source: str) -> UserError:
    """The error of a document of `source` with a log-probability that is NaN or infinite.

    It names the byte; of a row of JSON Lines or a table the byte where the row starts.
    """
    (file, start, end), ids = scored.document.document, scored.document.ids
    if scored.document.bytes == end - start:  # plain text
        before = ids[: int(np.isinf(scored.logprobs).argmax())].tolist()
        start += scorer.tokenizer.count_bytes(before)
    name = display_name(file)
    where = f"{name if source == name else f'{source}, {name}'}, byte {start:,}"
    return finite.not_finite(scorer.model, scorer.name, finite.LOGPROB, where)


def measure_perplexity(scorer: Scorer, documents: Iterable[EncodedDocument]) -> Perplexity:
    """The Perplexity of documents, which are read one after the other."""
    total = Perplexity(context=scorer.context, stride=scorer.stride)
    for scored in score_documents(scorer, documents):
        total.add(scored.sums)
    return total


class DocumentSlice(NamedTuple):
    """Tokens to score, and the document that ends with them; None if more of it follows."""

    request: ScoreRequest
    document: EncodedDocument | None
    bytes: float  # of the document's range, by its share of the tokens


def remote_task(scorer: Scorer) -> RemoteTask:
    """The scoring of DocumentSlices: the log-probabilities of each, without context-only tokens."""

    def work(slices: list[DocumentSlice]) -> list[np.ndarray]:
        requests = [part.request for part in slices]
        results = scorer.backend.compute(requests, ScoreFields())
        return [row.logprobs[request.context_only :] for request, row in zip(requests, results)]

    def decode(ids: str, leading_bos: int, context_only: int) -> DocumentSlice:
        numbers = text_to_array(ids, np.int32).tolist()
        return DocumentSlice(ScoreRequest(numbers, leading_bos, context_only), None, 0.0)

    return RemoteTask(
        work,
        encode=lambda slices: [
            (array_to_text(np.asarray(ids, np.int32)), leading_bos, context_only)
            for (ids, leading_bos, context_only, *_), *_ in slices
        ],
        decode=lambda values: [decode(*each) for each in values],
        encode_result=lambda results: [array_to_text(logprobs) for logprobs in results],
        decode_result=lambda texts: [text_to_array(text, np.float32) for text in texts],
        size=lambda slices: sum([part.bytes for part in slices]),
    )


def score_documents(
    scorer: Scorer,
    documents: Iterable[EncodedDocument],
    pool: work_queue.WorkerPool = work_queue.LOCAL_POOL,
    task_index: int = 0,
) -> Iterator[ScoredDocument]:
    """Yields the documents in order, scored by a pool; `task_index` as in `map_in_order`."""
    collected: list[np.ndarray] = []  # the log-probabilities of one document
    most = min(MAX_BATCH_TOKENS, FORWARDS_PER_BATCH * scorer.batch)
    slices = _slices(scorer, documents, most)
    batches = in_batches(slices, most, lambda each: len(each.request.ids))
    for batch, results in pool.map_in_order(batches, remote_task(scorer), task_index):
        for (_, document, _), logprobs in zip(batch, results):
            collected.append(logprobs)
            if document is not None:
                yield _scored(scorer, document, np.concatenate(collected))
                collected = []


def _slices(
    scorer: Scorer, documents: Iterable[EncodedDocument], most: int
) -> Iterator[DocumentSlice]:
    for document in documents:
        _, start, end = document.document
        bytes_per_token = (end - start) / max(1, len(document.ids))
        for request, following in pairwise(chain(scorer.slices(document.ids, most), (None,))):
            assert request is not None  # only the last of the chain is None
            size = bytes_per_token * (len(request.ids) - request.context_only)
            yield DocumentSlice(request, None if following else document, size)


def _scored(scorer: Scorer, document: EncodedDocument, logprobs: np.ndarray) -> ScoredDocument:
    scored = ~np.isnan(logprobs)
    context_only = document.ids[~scored[: len(document.ids)]].tolist()
    text = scorer.tokenizer.decode(context_only) if context_only else ""
    sums = (
        -float(logprobs[scored].sum(dtype=np.float64)),
        scored.sum(),
        document.bytes - scorer.tokenizer.count_bytes(context_only),
        document.characters - len(text),
        document.words,
    )
    return ScoredDocument(document, np.array(sums, dtype=np.float64), logprobs)
