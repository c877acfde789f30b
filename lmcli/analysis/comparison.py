"""Models on the same documents: figures of each group of them, and how models differ, with an interval and the lines."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from lmcli.analysis.intervals import percentiles, resampled
from lmcli.inference.crew import ALONE, Crew
from lmcli.inference.perplexity import Measured, Perplexity, each_measured
from lmcli.inference.scoring import NATS_PER_BIT, Scorer
from lmcli.text.corpus import encode_documents
from lmcli.text.documents import Layout
from lmcli.text.ranges import Document

BINS = 4096  # documents beyond so many share bins, in turn, so that memory stays flat
RESAMPLES = 2000


class Line(NamedTuple):
    """A line that two models find unlike: where it starts in its file (bytes), its text, and the bits of each model."""

    file: str
    start: int
    text: str
    first: float
    second: float


@dataclass
class Paired:
    """The difference in bits per byte of a second model from a first one over the same documents, whatever their
    tokenizers; `most` of the lines that make it are kept."""

    most: int = 0
    documents: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros((BINS, 4)))  # nats and bytes of the first, of the second
    _lines: list[tuple[float, int, Line]] = field(default_factory=list)
    _seen: int = 0

    def add(self, first: Measured, second: Measured) -> None:
        """Counts one more document."""
        self.bins[self.documents % BINS] += (*first.sums[[0, 2]], *second.sums[[0, 2]])
        self.documents += 1
        if self.most:
            self._keep_lines(first, second)

    def _keep_lines(self, first: Measured, second: Measured) -> None:
        bits = bits_of_lines(first), bits_of_lines(second)
        apart = np.abs(bits[1] - bits[0])
        text, file, begin = first.document.text, first.document.document.file, first.document.document.start
        lines, ends = text.split("\n"), line_ends(text)
        for k in np.argsort(-apart, kind="stable")[:self.most]:
            self._seen += 1
            line = lines[k]
            start = begin + int(ends[k]) - len(line.encode("utf-8")) - 1  # for a row it lies within that, too
            one = (float(apart[k]), -self._seen, Line(file, start, line, float(bits[0][k]), float(bits[1][k])))
            (heapq.heappush if len(self._lines) < self.most else heapq.heappushpop)(self._lines, one)

    @property
    def difference(self) -> float:
        """Bits per byte of the second model less those of the first."""
        return float(_difference(self.bins.sum(axis=0)))

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference by the percentile bootstrap over documents (Efron & Tibshirani 1993, §13);
        None below two documents. The same in every run."""
        used = self.bins[:min(self.documents, BINS)]
        if len(used) < 2:
            return None
        samples = resampled(np.ones(len(used), dtype=np.int64), RESAMPLES, seed=0)
        return percentiles(_difference(np.concatenate([weights @ used for weights in samples])))

    def lines(self) -> list[Line]:
        """The lines whose bits differ most, the most different first."""
        return [line for _, _, line in sorted(self._lines, key=lambda one: one[:2], reverse=True)]


def _difference(sums: np.ndarray) -> np.ndarray:
    return (sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]) / NATS_PER_BIT


def line_ends(text: str) -> np.ndarray:
    """The byte behind each line of a text, its \\n counted (behind the last line as if it had one)."""
    return np.cumsum([len(line.encode("utf-8")) + 1 for line in text.split("\n")])


def bits_of_lines(measured: Measured) -> np.ndarray:
    """Bits of each line of a placed document: of the tokens that start in it."""
    ends, document = measured.document.ends, measured.document
    line = np.searchsorted(line_ends(document.text), np.concatenate([[0], ends[:-1]])[:len(ends)], side="right")
    bits = -np.nan_to_num(measured.logprobs[:len(ends)].astype(np.float64)) / NATS_PER_BIT
    return np.bincount(line, bits, minlength=document.text.count("\n") + 1)


@dataclass
class Group:
    """Documents measured together: a file, or the rows that have the same value of a field. `figures` has one for each
    model, `pairs` one for each model after the first; `digest` is that of the texts, in order."""

    name: str
    figures: list[Perplexity]
    pairs: list[Paired]
    _texts: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        """The SHA-256 of the documents' own."""
        return self._texts.hexdigest()

    def add(self, found: tuple[Measured, ...]) -> None:
        """Counts one more document, as each model has it."""
        self._texts.update(found[0].document.digest)
        for figures, measured in zip(self.figures, found):
            figures.add(measured.sums)
        for pair, second in zip(self.pairs, found[1:]):
            pair.add(found[0], second)


def measure(scorers: list[Scorer], name: str, documents: Callable[[], Iterable[Document]], layout: Layout, by: str = "",
            lines: int = 0, crew: Crew = ALONE, keys: Sequence[int] = ()) -> list[Group]:
    """The Groups of some documents, one called `name` unless `by` names a field of their rows to group by, in the order
    of their first document. `documents` gives the same ones at each call, `lines` is how many to keep of each pair.

    All models go through the documents side by side, so memory does not grow with them. A crew that works on them knows
    the errands of the scorers by `keys`.
    """
    groups: dict[str, Group] = {}
    streams = [each_measured(scorer, encode_documents(documents(), layout, scorer.tokenizer, lines > 0), crew, key)
               for scorer, key in zip_longest(scorers, keys, fillvalue=0)]
    for group, *found in zip(_names(name, documents, layout, by), *streams):
        if group not in groups:
            groups[group] = Group(group, [Perplexity(context=scorer.context, stride=scorer.stride) for scorer in scorers],
                                  [Paired(lines) for _ in scorers[1:]])
        groups[group].add(tuple(found))
    return list(groups.values())


def _names(name: str, documents: Callable[[], Iterable[Document]], layout: Layout, by: str) -> Iterator[str]:
    if not by:
        while True:
            yield name
    for _, row in layout.raw_rows(documents()):
        yield "NA" if row.get(by) is None else str(row[by])
