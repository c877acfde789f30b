"""Questions and contexts → answer spans with their probability, and the probability of none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
import torch

from lmcli.data.length_batching import map_by_length, tokens_per_forward
from lmcli.data.squad import MAX_ANSWER_TOKENS, QaEncoder, WindowLogits, best_spans, span_bytes
from lmcli.model import finite
from lmcli.model.cached_forward import padded_logits
from lmcli.model.transformer import Transformer
from lmcli.terminal.notebook import NotebookTable
from lmcli.text.tokenizer import Encoded, Tokenizer


@dataclass
class Candidate:
    """A possible answer: bytes `start` to `end` of the context; `score` is its probability."""

    text: str
    score: float
    start: int
    end: int


@dataclass
class Answer(NotebookTable):
    """The answer to a question: bytes `start` to `end` of the context; `score` is its probability.

    `text` is None without an answer. `no_answer` is the probability of that (None if there was
    nothing to read), `candidates` are the likeliest spans. `truncated`: the question was cut. With
    a `problem` the model gave no numbers.
    """

    text: str | None = None
    score: float | None = None
    start: int | None = None
    end: int | None = None
    no_answer: float | None = None
    candidates: list[Candidate] = field(default_factory=list, repr=False)
    truncated: bool = False
    problem: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """One row: the answer, its probability and place, and the probability of none."""
        names = ("score", "start", "end", "no_answer")
        return [{"answer": self.text, **{name: getattr(self, name) for name in names}}]


@dataclass
class QuestionAnswerer:
    """A question-answering model with its tokenizer and settings.

    A span's probability is p(start) · p(end), over all windows of a context
    and "no answer" (see squad.best_spans). There is no answer if the share of `no_answer` in its
    sum with the best span's is above `threshold`: 0.5 takes the likelier one, 1 always answers.
    (SQuAD 2.0's null_score_diff_threshold is ln(threshold / (1 − threshold)).)

    Long contexts are read in windows `stride` tokens apart (0: half a window). `count` is the
    number of candidates, `batch` tokens per forward pass (0: what suits the device).
    """

    model: Transformer
    tokenizer: Tokenizer
    threshold: float = 0.5
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    count: int = 1
    stride: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.batch = tokens_per_forward(self.model.embedding.weight.device.type, self.batch)
        self.encoder = QaEncoder(
            self.tokenizer, config.max_position_embeddings, self.stride, config.pad_token_id or 0
        )

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], contexts: Sequence[str]) -> list[Answer]:
        """The Answer to each question in its context, in order."""
        # tokenize, cut questions, and lay windows over contexts
        question_ids = self.tokenizer.encode_batch(list(questions))
        encodings = self.tokenizer.encode_with_ends(list(contexts))
        cut = [
            ids[: self.encoder.question_length(len(ids), len(encoded.ids))]
            for ids, encoded in zip(question_ids, encodings)
        ]
        windows = [
            (i, start, end)
            for i, (ids, encoded) in enumerate(zip(cut, encodings))
            if ids and encoded.ids
            for start, end in self.encoder.windows(len(ids), len(encoded.ids))
        ]
        # read the windows in batches of similar length
        rows = [
            self.encoder.feature(cut[i], encodings[i].ids[start:end]) for i, start, end in windows
        ]
        logits = map_by_length(
            [len(row.ids) for row in rows],
            self.batch,
            lambda group: padded_logits(
                self.model, [(rows[g].ids, rows[g].types) for g in group], self.encoder.padding
            ),
        )
        window_logits: list[list[WindowLogits]] = [[] for _ in question_ids]
        for (i, start, end), row, values in zip(windows, rows, logits):
            columns = [
                0,
                *range(row.context_start, row.context_start + end - start),
            ]  # "no answer" and the context
            window_logits[i].append(WindowLogits(start, *values[columns].T.numpy()))
        # choose the best spans
        answers = [
            self._answer(of_question, context, encoded) if of_question else Answer()
            for of_question, context, encoded in zip(window_logits, contexts, encodings)
        ]
        for answer, whole, ids in zip(answers, question_ids, cut):
            answer.truncated = whole != ids
        return answers

    def _answer(self, windows: list[WindowLogits], context: str, encoded: Encoded) -> Answer:
        if not all(np.isfinite(logits).all() for w in windows for logits in (w.starts, w.ends)):
            return Answer(problem=finite.LOGIT)
        spans, no_answer = best_spans(windows, self.max_answer_tokens, self.count)
        data, candidates = context.encode("utf-8"), []
        for span in spans:
            start, end = span_bytes(data, encoded.ends, span)
            text = data[start:end].decode("utf-8")
            candidates.append(Candidate(text, exp(span.logprob), start, end))
        answer = Answer(no_answer=exp(no_answer), candidates=candidates)
        if 1 / (1 + exp(min(700.0, spans[0].logprob - no_answer))) <= self.threshold:
            best = candidates[0]
            answer.text, answer.score = best.text, best.score
            answer.start, answer.end = best.start, best.end
        return answer
