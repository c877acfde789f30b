"""Questions and contexts → the span of the context that answers, its probability, and that of there being no answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp

import torch

from lmcli.inference.ordering import batch_tokens, in_order, pad
from lmcli.model.transformer import Transformer
from lmcli.text.questions import MAX_ANSWER_TOKENS, Framed, Framing, Read, Span, best_spans, text_of
from lmcli.text.tokenizer import Encoded, Tokenizer


@dataclass
class Candidate:
    """A span that may be the answer: `text` is bytes `start` to `end` of the context, `score` its probability."""

    text: str
    score: float
    start: int
    end: int


@dataclass
class Answer:
    """What a model says to one question. `text` is None when there is no answer, or nothing to read; `score` is its
    probability, `start` and `end` its bytes in the context, `no_answer` the probability that there is none (None where
    nothing was read). `candidates` are the likeliest spans, best first, whether one is the answer or not; `truncated` tells
    that the question was too long to be read whole.
    """

    text: str | None = None
    score: float | None = None
    start: int | None = None
    end: int | None = None
    no_answer: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    truncated: bool = False


@dataclass
class Answerer:
    """A model with what answering needs to know. Probabilities are those of `questions.best_spans`: that of the start times
    that of the end, over all windows of a context and one place for no answer. There is no answer where the share of
    `no_answer` in its sum with the best span's is above `threshold`: 0.5 gives one unless none is likelier, 1 always.
    (SQuAD 2.0's null_score_diff_threshold is ln(threshold / (1 − threshold)).)

    Contexts longer than the model's are read in windows `stride` tokens apart (0: half a window). `longest` is tokens of an
    answer, `count` how many candidates are kept, `batch` tokens a forward pass (0: what suits the device).
    """

    model: Transformer
    tokenizer: Tokenizer
    threshold: float = 0.5
    longest: int = MAX_ANSWER_TOKENS
    count: int = 1
    stride: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.device = self.model.embedding.weight.device
        self.batch = batch_tokens(self.device, self.batch)
        self.framing = Framing(self.tokenizer, config.max_position_embeddings, self.stride, config.pad_token_id or 0)

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], contexts: Sequence[str]) -> list[Answer]:
        """An Answer for each question about its context, in order; windows of like length are worked on together."""
        asked = self.tokenizer.encode_batch(list(questions))
        given = self.tokenizer.encode_with_ends(list(contexts))
        kept = [ids[:self.framing.kept(len(ids), len(found.ids))] for ids, found in zip(asked, given)]
        jobs = [(i, start, end) for i, (ids, (tokens, _)) in enumerate(zip(kept, given)) if ids and tokens
                for start, end in self.framing.windows(len(ids), len(tokens))]
        rows = [self.framing.row(kept[i], given[i].ids[start:end]) for i, start, end in jobs]
        logits = in_order([len(row.ids) for row in rows], self.batch, lambda group: self._logits([rows[g] for g in group]))
        read: list[list[Read]] = [[] for _ in asked]
        for (i, start, end), row, both in zip(jobs, rows, logits):
            chosen = [0, *range(row.lead, row.lead + end - start)]
            read[i].append(Read(start, *both[chosen].T.numpy()))
        found = [self._answer(windows, context, encoded) if windows else Answer()
                 for windows, context, encoded in zip(read, contexts, given)]
        for answer, whole, ids in zip(found, asked, kept):
            answer.truncated = whole != ids
        return found

    def _logits(self, rows: list[Framed]) -> list[torch.Tensor]:
        """Logits (T, 2) of start and end, padding counted, for each row."""
        ids, real = pad([row.ids for row in rows], self.framing.padding, left=False, device=self.device)
        types = pad([row.types for row in rows], 0, left=False, device=self.device)[0]
        has_types = self.model.config.type_vocab_size > 1
        return list(self.model(ids, real, token_type_ids=types if has_types else None).float().cpu())

    def _answer(self, windows: list[Read], context: str, encoded: Encoded) -> Answer:
        spans, none = best_spans(windows, self.longest, self.count)
        candidates = [_candidate(context.encode("utf-8"), encoded.ends, span) for span in spans]
        answer = Answer(no_answer=exp(none), candidates=candidates)
        if 1 / (1 + exp(min(700.0, spans[0].logprob - none))) <= self.threshold:
            best = candidates[0]
            answer.text, answer.score, answer.start, answer.end = best.text, best.score, best.start, best.end
        return answer


def _candidate(context: bytes, ends: list[int], span: Span) -> Candidate:
    start, end = text_of(context, ends, span)
    return Candidate(context[start:end].decode("utf-8"), exp(span.logprob), start, end)
