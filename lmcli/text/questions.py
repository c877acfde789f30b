"""Questions about contexts → token ids, windows over long contexts, where answers start and end; and back (Devlin et al.
2019, §4.2).

A row that a model reads is a question and a window of its context in the tokenizer's template for pairs. Its first token,
[CLS] in most vocabularies, stands for "no answer in this window".
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmcli.errors import UsageError
from lmcli.storage import cached
from lmcli.text.answers import Posed
from lmcli.text.batches import Batch, padded, real_tokens
from lmcli.text.documents import Layout
from lmcli.text.examples import Texts, fingerprint
from lmcli.text.ranges import Document
from lmcli.text.tokenizer import Tokenizer, byte_offsets
from lmcli.text.windows import overlapping

ROWS_AT_ONCE = 512
MAX_ANSWER_TOKENS = 30  # as in BERT's own script
NONE = (-1, -1)


@dataclass
class Questions:
    """Ids of `questions` and of `contexts`, for each token of these the byte where it ends, and `answers` (N, 2): the first
    and the last token of each one's answer, NONE where there is none. `bytes` counts the text of both."""

    contexts: Texts
    ends: Texts
    questions: Texts
    answers: np.ndarray
    bytes: int

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def tokens(self) -> int:
        """Ids of both."""
        return len(self.contexts.ids) + len(self.questions.ids)


def posed_by(documents: Sequence[Document], layout: Layout) -> list[Posed]:
    """What rows pose, in their order."""
    return [layout.posed(row) for _, row in layout.raw_rows(documents)]


def build(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer) -> Questions:
    """The questions of these rows, from the cache when they are there. Of several answers the first is learnt.

    `hashes` is the SHA-256 of each file's content. Raises UserError when the cache folder cannot be written.
    """
    key = fingerprint(documents, hashes, (1, tokenizer.hash, layout.fields, layout.answers, layout.format))
    folder = cached("questions", key, lambda part: _write(part, documents, layout, tokenizer))
    facts = json.loads((folder / "facts.json").read_text())
    return Questions(*(Texts.load(folder, name) for name in ("contexts", "places", "questions")),
                     np.load(folder / "answers.npy"), facts["bytes"])


def _write(folder: Path, documents: Sequence[Document], layout: Layout, tokenizer: Tokenizer) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    contexts, places, questions, answers, size = [], [], [], [], 0
    rows = (layout.posed(row) for _, row in layout.raw_rows(documents))
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        encoded = tokenizer.encode_with_ends([row.context for row in batch])
        contexts += [np.asarray(found.ids, dtype=dtype) for found in encoded]
        places += [np.asarray(found.ends, dtype=np.uint32) for found in encoded]
        questions += [np.asarray(ids, dtype=dtype) for ids in tokenizer.encode_batch([row.question for row in batch])]
        answers += [answer_tokens(row, found.ends) for row, found in zip(batch, encoded)]
        size += sum(len(text.encode("utf-8")) for row in batch for text in (row.context, row.question))
    for name, texts, kind in (("contexts", contexts, dtype), ("places", places, np.uint32), ("questions", questions, dtype)):
        Texts.save(folder, name, texts, kind)
    np.save(folder / "answers.npy", np.asarray(answers, dtype=np.int64).reshape(-1, 2))
    (folder / "facts.json").write_text(json.dumps({"bytes": size}))


def answer_tokens(row: Posed, ends: list[int]) -> tuple[int, int]:
    """(first, last) token of the context that the first answer lies in, given where each token ends; NONE without one."""
    if not row.answers:
        return NONE
    bytes_at = byte_offsets(row.context)
    first = np.searchsorted(ends, bytes_at[row.answers[0].start], side="right")
    return int(first), int(np.searchsorted(ends, bytes_at[row.answers[0].end], side="left"))


class Framed(NamedTuple):
    """A row that a model reads: its ids, their types, and which of them is the first of the context."""

    ids: list[int]
    types: list[int]
    lead: int


@dataclass(frozen=True)
class Framing:
    """How a question is put before a window of its context: `context` tokens at most. Where they are too few for both, the
    question has half of them at most. Windows are `stride` tokens apart, but half a window at most, which 0 stands for.

    Raises UsageError for a context without room for both.
    """

    tokenizer: Tokenizer
    context: int
    stride: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.room < 2:
            raise UsageError(f"a context of {self.context} tokens has no room for a question and a text")

    @cached_property
    def room(self) -> int:
        """Tokens that a question and a window of its context may have together."""
        return self.context - len(self.tokenizer.with_template([], [])[0])

    def kept(self, question: int, tokens: int) -> int:
        """How many tokens of a question of so many are read before a context of so many."""
        return min(question, max(self.room // 2, self.room - tokens))

    def windows(self, question: int, tokens: int) -> list[tuple[int, int]]:
        """(start, end) of the windows over a context of so many tokens, behind so many of a question that are kept."""
        room = self.room - question
        half = max(1, room // 2)
        return overlapping(tokens, room, min(self.stride or half, half))

    def row(self, question: list[int], window: list[int]) -> Framed:
        """A question, as much of it as is kept, before a window of its context."""
        return Framed(*self.tokenizer.with_template(question, window), self.tokenizer.before_second(len(question)))


class Windows:
    """The windows over the contexts of questions as examples to learn from. `places` (M, 3) are question, start and end of
    each, `lengths` (M,) the tokens of its row; `kept` (N,) tokens of each question are read."""

    def __init__(self, found: Questions, framing: Framing):
        self.found, self.framing = found, framing
        tokens = found.contexts.lengths.tolist()
        self.kept = np.asarray(list(map(framing.kept, found.questions.lengths.tolist(), tokens)), dtype=np.int64)
        self.places = np.asarray([(i, start, end) for i, sizes in enumerate(zip(self.kept.tolist(), tokens))
                                  for start, end in framing.windows(*sizes)], dtype=np.int64).reshape(-1, 3)
        numbers, starts, ends = self.places.T
        self.lengths = framing.context - framing.room + self.kept[numbers] + ends - starts

    def __len__(self) -> int:
        return len(self.places)

    def framed(self, i: int) -> Framed:
        """The row of window i."""
        number, start, end = self.places[i]
        question, context = self.found.questions[number][:self.kept[number]], self.found.contexts[number][start:end]
        return self.framing.row(question.tolist(), context.tolist())

    def batch(self, chosen: np.ndarray) -> Batch:
        """The Batch of these windows. Targets are the positions of the first and the last token of the answer; 0 and 0 where
        not all of it lies in the window. Candidates are the positions of the window, and 0."""
        rows = [self.framed(i) for i in chosen]
        ids = [np.asarray(row.ids, dtype=np.int64) for row in rows]
        types = padded([np.asarray(row.types, dtype=np.int64) for row in rows], 0)
        candidates, targets = np.zeros(types.shape, dtype=bool), np.zeros((len(rows), 2), dtype=np.int64)
        candidates[:, 0] = True
        for row, (question, start, end), may, target in zip(rows, self.places[chosen].tolist(), candidates, targets):
            may[row.lead:row.lead + end - start] = True
            first, last = self.found.answers[question].tolist()
            if start <= first and last < end:
                target[:] = row.lead + first - start, row.lead + last - start
        return Batch(padded(ids, self.framing.padding), targets, real_tokens(ids), types=types, candidates=candidates)


class Read(NamedTuple):
    """What a model says of a window: logits of start and end, (1 + tokens,) each, those of position 0 first; `start` is the
    window's first token in the context."""

    start: int
    starts: np.ndarray
    ends: np.ndarray


class Span(NamedTuple):
    """Tokens `first` to `last` of a context and the natural-log probability that they are the answer."""

    first: int
    last: int
    logprob: float


def best_spans(windows: Sequence[Read], most: int = MAX_ANSWER_TOKENS, count: int = 1) -> tuple[list[Span], float]:
    """(the likeliest spans of at most `most` tokens, none of which overlaps a likelier one; log-probability of no answer).

    log p(i, j) = log softmax(starts)[i] + log softmax(ends)[j], over the positions of all windows of a context and one for
    no answer: that of the window which says "none here" with the lowest sum of logits, since there is no answer only where
    no window has one. With one window that is the distribution that training makes likely. Both ends of a span lie in
    one window; of spans that several windows have, the likelier one counts.
    """
    none = min(windows, key=lambda read: read.starts[0] + read.ends[0])
    totals = [np.logaddexp.reduce(np.concatenate([side(none)[:1], *(side(read)[1:] for read in windows)]).astype(np.float64))
              for side in (lambda read: read.starts, lambda read: read.ends)]
    total = float(sum(totals))
    bands = [_band(read, most) - total for read in windows]  # (tokens, most): where a span starts, how much longer it is
    found: list[Span] = []
    while len(found) < count:
        best = max(range(len(bands)), key=lambda i: bands[i].max(initial=-np.inf))
        if not bands[best].size or (logprob := bands[best].max()) == -np.inf:
            break
        at, longer = np.unravel_index(bands[best].argmax(), bands[best].shape)
        first = windows[best].start + int(at)
        found.append(Span(first, first + int(longer), float(logprob)))
        for read, band in zip(windows, bands):
            _cover(band, found[-1].first - read.start, found[-1].last - read.start)
    return found, float(none.starts[0]) + float(none.ends[0]) - total


def _band(read: Read, most: int) -> np.ndarray:
    """(tokens, most) float64: the sum of the logits of each start and the ends 0 … most − 1 tokens on; −inf outside."""
    ends = np.concatenate([read.ends[1:].astype(np.float64), np.full(most, -np.inf)])
    return read.starts[1:, None].astype(np.float64) + np.lib.stride_tricks.sliding_window_view(ends, most)[:-1]


def _cover(band: np.ndarray, first: int, last: int) -> None:
    """Takes out the spans that overlap tokens `first` to `last` of the window."""
    starts = np.arange(len(band))[:, None]
    band[(starts <= last) & (starts + np.arange(band.shape[1]) >= first)] = -np.inf


def text_of(context: bytes, ends: Sequence[int], span: Span) -> tuple[int, int]:
    """(start, end) in bytes of what a span's tokens stand for: whole characters, without white space around them."""
    start, end = (int(ends[span.first - 1]) if span.first else 0), int(ends[span.last])
    while start and context[start] & 0xC0 == 0x80:  # a token may begin, or end, inside a character
        start -= 1
    while end < len(context) and context[end] & 0xC0 == 0x80:
        end += 1
    text = context[start:end].decode("utf-8")
    start += len(text[:len(text) - len(text.lstrip())].encode("utf-8"))
    return start, start + len(text.strip().encode("utf-8"))
