"""Extractive question answering (Devlin et al. 2019, §4.2): rows → windows of ids, logits → spans.

A feature, which a model reads, is a question and a window of its context in the tokenizer's
template for pairs. Its first token, mostly [CLS], stands for "no answer in this window".
"""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmcli.data.batches import Batch, padded, token_mask
from lmcli.data.byte_ranges import Document
from lmcli.data.corpus import fingerprint, id_type
from lmcli.data.documents import DocumentFormat, read_rows
from lmcli.data.examples import ArrayWriter, Texts
from lmcli.data.schema import SquadExample
from lmcli.errors import UsageError
from lmcli.storage import cached
from lmcli.text.characters import byte_offsets
from lmcli.text.tokenizer import Tokenizer
from lmcli.text.windows import overlapping_windows

CONTEXTS_AT_ONCE = 512
MAX_ANSWER_TOKENS = 30  # as in BERT's own script
NO_ANSWER = (-1, -1)


# -- rows to ids


@dataclass
class Questions:
    """Encoded questions and contexts, and for each token of a context the byte where it ends.

    answers: (N, 2) first and last token of the answer in the context, or NO_ANSWER. `bytes` is the
    UTF-8 size of questions and contexts.
    """

    contexts: Texts
    ends: Texts
    questions: Texts
    answers: np.ndarray
    bytes: int

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def tokens(self) -> int:
        """Number of ids of questions and contexts."""
        return len(self.contexts.ids) + len(self.questions.ids)


def build(
    documents: Sequence[Document],
    hashes: dict[str, str],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
) -> Questions:
    """The questions of these rows, from the cache when they are there; of answers the first.

    hashes: the SHA-256 of each file's content. Raises UserError when the cache cannot be written.
    """
    settings = (1, tokenizer.hash, doc_format.fields, doc_format.answers, doc_format.format)
    folder = cached(
        "questions",
        fingerprint(documents, hashes, settings),
        lambda part: _write(part, documents, doc_format, tokenizer),
    )
    return Questions(
        Texts.load(folder, "contexts"),
        Texts.load(folder, "places"),
        Texts.load(folder, "questions"),
        np.load(folder / "answers.npy"),
        json.loads((folder / "facts.json").read_text())["bytes"],
    )


def _write(
    folder: Path, documents: Sequence[Document], doc_format: DocumentFormat, tokenizer: Tokenizer
) -> None:
    rows, size = (doc_format.squad_example(row) for _, row in read_rows(documents, doc_format)), 0
    with ExitStack() as stack:
        add_contexts = Texts.writer(stack, folder, "contexts", id_type(tokenizer))
        add_ends = Texts.writer(stack, folder, "places", np.uint32)
        add_questions = Texts.writer(stack, folder, "questions", id_type(tokenizer))
        answers = stack.enter_context(ArrayWriter(folder / "answers.npy", np.int64, 2))
        while batch := list(islice(rows, CONTEXTS_AT_ONCE)):
            encoded = tokenizer.encode_with_ends([row.context for row in batch])
            add_contexts(context.ids for context in encoded)
            add_ends(context.ends for context in encoded)
            add_questions(tokenizer.encode_batch([row.question for row in batch]))
            pairs = zip(batch, encoded)
            answers.extend([answer_tokens(row, context.ends) for row, context in pairs])
            size += sum(len((row.context + row.question).encode("utf-8")) for row in batch)
    (folder / "facts.json").write_text(json.dumps({"bytes": size}))


def answer_tokens(example: SquadExample, ends: list[int]) -> tuple[int, int]:
    """(first, last) token of the context with the first answer, given where tokens end."""
    if not example.answers:
        return NO_ANSWER
    bytes_at = byte_offsets(example.context)
    first = np.searchsorted(ends, bytes_at[example.answers[0].start], side="right")
    last = np.searchsorted(ends, bytes_at[example.answers[0].end], side="left")
    return int(first), int(last)


# -- ids to batches


class QaFeature(NamedTuple):
    """A row that a model reads: ids, token types, and the position where the context begins."""

    ids: list[int]
    types: list[int]
    context_start: int


@dataclass(frozen=True)
class QaEncoder:
    """Puts a question before windows of its context, `context` tokens together at most.

    Where both do not fit the question has half of the room. Windows begin `stride` tokens apart, at
    most half a window (0: half). Raises UsageError for a context without room for both.
    """

    tokenizer: Tokenizer
    context: int
    stride: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.room < 2:
            raise UsageError(
                f"a context of {self.context} tokens has no room for a question and a text"
            )

    @cached_property
    def room(self) -> int:
        """Tokens that a question and a window of its context may have together."""
        return self.context - len(self.tokenizer.with_template([], [])[0])

    def question_length(self, question: int, context: int) -> int:
        """How many of `question` tokens are read before a context of `context` tokens."""
        return min(question, max(self.room // 2, self.room - context))

    def windows(self, question: int, context: int) -> list[tuple[int, int]]:
        """(start, end) of the windows over `context` tokens, after `question` tokens in each."""
        room = self.room - question
        half = max(1, room // 2)
        return overlapping_windows(context, room, min(self.stride or half, half))

    def feature(self, question: list[int], window: list[int]) -> QaFeature:
        """A question, already cut, before a window of its context."""
        ids, types = self.tokenizer.with_template(question, window)
        return QaFeature(ids, types, self.tokenizer.second_start(len(question)))


class QuestionWindows:
    """The windows over the contexts of questions, as training examples.

    spans: (M, 3) question, start and end of each window. lengths: (M,) tokens of its feature.
    question_lengths: (N,) tokens of each question that are read.
    """

    def __init__(self, questions: Questions, encoder: QaEncoder):
        self.questions, self.encoder = questions, encoder
        contexts = questions.contexts.lengths.tolist()
        lengths = map(encoder.question_length, questions.questions.lengths.tolist(), contexts)
        self.question_lengths = np.asarray(list(lengths), dtype=np.int64)
        spans = [
            (i, start, end)
            for i, sizes in enumerate(zip(self.question_lengths.tolist(), contexts))
            for start, end in encoder.windows(*sizes)
        ]
        self.spans = np.asarray(spans, dtype=np.int64).reshape(-1, 3)
        numbers, starts, ends = self.spans.T
        template = encoder.context - encoder.room
        self.lengths = template + self.question_lengths[numbers] + ends - starts

    def __len__(self) -> int:
        return len(self.spans)

    def feature(self, i: int) -> QaFeature:
        """The feature of window i."""
        number, start, end = self.spans[i]
        question = self.questions.questions[number][: self.question_lengths[number]]
        window = self.questions.contexts[number][start:end]
        return self.encoder.feature(question.tolist(), window.tolist())

    def batch(self, chosen: np.ndarray) -> Batch:
        """The Batch of these windows.

        Targets are the positions of the answer's first and last token, or 0 and 0 where the window
        does not contain all of it. Candidates are position 0 and those of the window.
        """
        features = [self.feature(i) for i in chosen]
        ids = [np.asarray(feature.ids, dtype=np.int64) for feature in features]
        types = padded([np.asarray(feature.types, dtype=np.int64) for feature in features], 0)
        candidates = np.zeros(types.shape, dtype=bool)
        targets = np.zeros((len(features), 2), dtype=np.int64)
        candidates[:, 0] = True
        for i, (question, start, end) in enumerate(self.spans[chosen].tolist()):
            first_position = features[i].context_start
            candidates[i, first_position : first_position + end - start] = True
            first, last = self.questions.answers[question].tolist()
            if start <= first and last < end:
                targets[i] = first_position + first - start, first_position + last - start
        return Batch(
            padded(ids, self.encoder.padding),
            targets,
            token_mask(ids),
            types=types,
            candidates=candidates,
        )


# -- logits to answers


class WindowLogits(NamedTuple):
    """A model's logits of one window: (1 + tokens,) each, position 0 first.

    `start` is the window's first token in the context; `starts` and `ends` are the logits that the
    answer begins and ends at a token.
    """

    start: int
    starts: np.ndarray
    ends: np.ndarray


class Span(NamedTuple):
    """Tokens `first` to `last` of a context, and the log-probability (nats) that they answer."""

    first: int
    last: int
    logprob: float


def best_spans(
    windows: Sequence[WindowLogits], max_tokens: int = MAX_ANSWER_TOKENS, count: int = 1
) -> tuple[list[Span], float]:
    """(the `count` likeliest spans that do not overlap, the log-probability of no answer).

    log p(i, j) = log softmax(starts)[i] + log softmax(ends)[j], over the positions of all windows
    of a context and one position for no answer. That one is from the window with the lowest sum of
    its logits: there is no answer only where no window has one. For a single window this is the
    distribution that training maximizes. A span lies in one window and has `max_tokens` at most; of
    spans in several windows the likelier one counts.
    """
    none = min(windows, key=lambda window: window.starts[0] + window.ends[0])
    total = sum(
        _log_sum(none_logit, logits)
        for none_logit, logits in (
            (none.starts[:1], [window.starts[1:] for window in windows]),
            (none.ends[:1], [window.ends[1:] for window in windows]),
        )
    )
    # (tokens, max_tokens) each: where a span begins, and how many tokens follow
    scores = [_span_logits(window, max_tokens) - total for window in windows]
    spans: list[Span] = []
    while len(spans) < count:
        best = max(range(len(scores)), key=lambda i: scores[i].max(initial=-np.inf))
        if not scores[best].size or (logprob := scores[best].max()) == -np.inf:
            break
        at, following = np.unravel_index(scores[best].argmax(), scores[best].shape)
        first = windows[best].start + int(at)
        spans.append(Span(first, first + int(following), float(logprob)))
        for window, band in zip(windows, scores):
            _exclude(band, spans[-1].first - window.start, spans[-1].last - window.start)
    return spans, float(none.starts[0]) + float(none.ends[0]) - total


def _log_sum(none_logit: np.ndarray, logits: list[np.ndarray]) -> float:
    return float(np.logaddexp.reduce(np.concatenate([none_logit, *logits]).astype(np.float64)))


def _span_logits(window: WindowLogits, max_tokens: int) -> np.ndarray:
    """(tokens, max_tokens) float64: logit of each start plus those of the next ends, or −inf."""
    ends = np.concatenate([window.ends[1:].astype(np.float64), np.full(max_tokens, -np.inf)])
    bands = np.lib.stride_tricks.sliding_window_view(ends, max_tokens)[:-1]
    return window.starts[1:, None].astype(np.float64) + bands


def _exclude(band: np.ndarray, first: int, last: int) -> None:
    """Sets the spans that overlap tokens `first` to `last` of the window to −inf."""
    starts = np.arange(len(band))[:, None]
    band[(starts <= last) & (starts + np.arange(band.shape[1]) >= first)] = -np.inf


def span_bytes(context: bytes, ends: Sequence[int], span: Span) -> tuple[int, int]:
    """(start, end) of a span's text in bytes: whole characters, without white space around them."""
    start, end = (int(ends[span.first - 1]) if span.first else 0), int(ends[span.last])
    while start and context[start] & 0xC0 == 0x80:  # a token may begin, or end, inside a character
        start -= 1
    while end < len(context) and context[end] & 0xC0 == 0x80:
        end += 1
    text = context[start:end].decode("utf-8")
    start += len(text[: len(text) - len(text.lstrip())].encode("utf-8"))
    return start, start + len(text.strip().encode("utf-8"))


# -- SQuAD's exact match and F1


ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """The text in lower case, without ASCII punctuation, articles and repeated space.

    >>> normalized("The V&A, London")
    'va london'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str | None, answers: Sequence[str], version: int = 2) -> float:
    """1.0 if the normalized prediction is one of the normalized answers, else 0.0.

    By the rules of SQuAD 2.0 None or "" means no answer, which is correct where `answers` is empty;
    `version` 1 has no such questions.
    """
    return float(normalized(prediction or "") in map(normalized, _gold(answers, version)))


def token_f1(prediction: str | None, answers: Sequence[str], version: int = 2) -> float:
    """The best F1 of a prediction's words against an answer's; for no answer 0.0 or 1.0.

    >>> token_f1("the brown fox", ["a quick brown fox"])  # two words of two, two of three
    0.8
    """
    words = normalized(prediction or "").split()
    scores = (_f1(words, normalized(answer).split(), version) for answer in _gold(answers, version))
    return max(scores, default=0.0)


def _gold(answers: Sequence[str], version: int) -> Sequence[str]:
    """The answers with words, [""] if there are none, as in SQuAD's own script; version 1: all."""
    return answers if version == 1 else [answer for answer in answers if normalized(answer)] or [""]


def _f1(prediction: list[str], answer: list[str], version: int) -> float:
    if not prediction or not answer:
        return float(version == 2 and prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
