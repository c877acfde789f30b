"""Models on the same documents: figures of each group, and differences from the first model."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np

from lmcli.data.byte_ranges import Document
from lmcli.data.corpus import encode_documents
from lmcli.data.documents import DocumentFormat, read_rows
from lmcli.distributed.work_queue import LOCAL_POOL, WorkerPool
from lmcli.evaluation.bootstrap import bootstrap_weights
from lmcli.evaluation.intervals import bca_interval
from lmcli.scoring.perplexity import Perplexity, ScoredDocument, not_finite, score_documents
from lmcli.scoring.scorer import NATS_PER_BIT, Scorer

DOCUMENT_BINS = 4096  # more documents than this share bins, so memory stays flat
INTERVAL_RESAMPLES = 2000


class DifferingLine(NamedTuple):
    """A line on which two models differ: its file, start (byte) and text, and the bits of each."""

    file: str
    start: int
    text: str
    first: float
    second: float


@dataclass
class PairedDifference:
    """The difference in bits per byte of a second model from a first one on the same documents.

    The tokenizers may differ. `max_lines` of the lines that differ most are kept.
    """

    max_lines: int = 0
    documents: int = 0
    # for each bin of documents the nats and bytes of the first model, then of the second
    bins: np.ndarray = field(default_factory=lambda: np.zeros((DOCUMENT_BINS, 4)))
    # (bits, minus the order of arrival, …): of equally different lines the earlier one stays
    _heap: list[tuple[float, int, DifferingLine]] = field(default_factory=list)
    _lines_seen: int = 0

    def add(self, first: ScoredDocument, second: ScoredDocument) -> None:
        """Counts one more document."""
        sums = (*first.sums[[0, 2]], *second.sums[[0, 2]])
        self.bins[self.documents % DOCUMENT_BINS] += sums
        self.documents += 1
        if self.max_lines:
            self._add_lines(first, second)

    def _add_lines(self, first: ScoredDocument, second: ScoredDocument) -> None:
        bits_a, bits_b = bits_of_lines(first), bits_of_lines(second)
        differences = np.abs(bits_b - bits_a)
        text, document = first.document.text, first.document.document
        lines, ends = text.split("\n"), line_ends(text)
        for k in np.argsort(-differences, kind="stable")[: self.max_lines]:
            self._lines_seen += 1
            # for a document in a row (JSON Lines, TSV) this is within the row as well
            start = document.start + int(ends[k]) - len(lines[k].encode("utf-8")) - 1
            line = DifferingLine(document.file, start, lines[k], float(bits_a[k]), float(bits_b[k]))
            push = heapq.heappush if len(self._heap) < self.max_lines else heapq.heappushpop
            push(self._heap, (float(differences[k]), -self._lines_seen, line))

    @property
    def difference(self) -> float:
        """Bits per byte of the second model minus the first model's."""
        return float(_difference(self.bins.sum(axis=0)))

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference, None below two documents. The same in every run.

        By the BCa bootstrap over documents; None where all samples agree (see `intervals`).
        """
        used = self.bins[: min(self.documents, DOCUMENT_BINS)]
        if len(used) < 2:
            return None
        counts = np.ones(len(used), dtype=np.int64)
        samples = bootstrap_weights(counts, INTERVAL_RESAMPLES, seed=0)
        sums = np.concatenate([weights @ used for weights in samples])
        without = _difference(used.sum(axis=0) - used)
        return bca_interval(self.difference, _difference(sums), without, np.ones(len(used)))

    def lines(self) -> list[DifferingLine]:
        """The lines whose bits differ most, the most different first."""
        items = sorted(self._heap, key=lambda item: item[:2], reverse=True)
        return [line for _, _, line in items]


def _difference(sums: np.ndarray) -> np.ndarray:
    return (sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]) / NATS_PER_BIT


def line_ends(text: str) -> np.ndarray:
    """The byte after each line of a text and its \\n (also after a last line without one)."""
    return np.cumsum([len(line.encode("utf-8")) + 1 for line in text.split("\n")])


def bits_of_lines(scored: ScoredDocument) -> np.ndarray:
    """The bits of each line of a document: of the tokens that start in it.

    The document must have been encoded with the byte offsets of its tokens.
    """
    text, ends = scored.document.text, scored.document.ends
    assert ends is not None  # encode_documents(with_ends=True)
    starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
    line = np.searchsorted(line_ends(text), starts, side="right")
    bits = -np.nan_to_num(scored.logprobs[: len(ends)].astype(np.float64)) / NATS_PER_BIT
    return np.bincount(line, bits, minlength=text.count("\n") + 1)


@dataclass
class DocumentGroup:
    """Documents measured together: a file, or the rows that have the same value of a field.

    `figures` has one entry for each model, `pairs` one for each model after the first.
    """

    name: str
    figures: list[Perplexity]
    pairs: list[PairedDifference]
    _texts: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        """The SHA-256 of the documents' SHA-256, in order."""
        return self._texts.hexdigest()

    def add(self, scored: Sequence[ScoredDocument]) -> None:
        """Counts one more document, as each model scored it."""
        self._texts.update(scored[0].document.digest)
        for figures, document in zip(self.figures, scored):
            figures.add(document.sums)
        for pair, second in zip(self.pairs, scored[1:]):
            pair.add(scored[0], second)


def compare_models(
    scorers: Sequence[Scorer],
    name: str,
    documents: Callable[[], Iterable[Document]],
    document_format: DocumentFormat,
    by: str = "",
    max_lines: int = 0,
    pool: WorkerPool = LOCAL_POOL,
    keys: Sequence[int] = (),
) -> list[DocumentGroup]:
    """The groups of some documents, in the order of each one's first document.

    There is one group called `name`, or with `by` one for each value of this field of their rows.
    `documents` gives the same documents at each call; `max_lines` is how many differing lines to
    keep for each pair of models. Memory does not grow with the documents: all models read them side
    by side. `keys` are the numbers of the scorers' tasks in the pool.
    """
    groups: dict[str, DocumentGroup] = {}
    streams = []
    for scorer, key in zip(scorers, keys or repeat(0)):
        encoded = encode_documents(documents(), document_format, scorer.tokenizer, max_lines > 0)
        streams.append(score_documents(scorer, encoded, pool, key))
    names: Iterable[str] = repeat(name)
    if by:
        values = (row.get(by) for _, row in read_rows(documents(), document_format))
        names = ("NA" if value is None else str(value) for value in values)
    for group_name, *scored in zip(names, *streams):
        if group_name not in groups:
            groups[group_name] = DocumentGroup(
                group_name,
                [Perplexity(context=scorer.context, stride=scorer.stride) for scorer in scorers],
                [PairedDifference(max_lines) for _ in scorers[1:]],
            )
        for scorer, document in zip(scorers, scored):
            if not document.is_finite:
                raise not_finite(scorer, document, name)
        groups[group_name].add(scored)
    return list(groups.values())
