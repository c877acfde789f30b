"""Texts → log-probabilities of records, words, tokens, continuations and choices."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcli.data.length_batching import tokens_per_forward
from lmcli.errors import UserError
from lmcli.model import finite
from lmcli.model.transformer import Transformer
from lmcli.scoring.token_logprobs import (
    CausalLogprobs,
    MaskedLogprobs,
    ScoreFields,
    ScoreRequest,
    TokenScores,
)
from lmcli.terminal.notebook import NotebookTable, painted_html
from lmcli.terminal.painted_text import Segment, segments
from lmcli.text.characters import byte_offsets
from lmcli.text.tokenizer import Encoded, Tokenizer

NATS_PER_BIT = math.log(2)
METHODS = {"decoder": "causal", "encoder-decoder": "conditional", "encoder": "pseudo"}


class ScoringInput(NamedTuple):
    """A text to score after its `prefix` (context only), or given a `source`."""

    text: str
    prefix: str = ""
    source: str = ""


class Alternative(NamedTuple):
    """A token that could have come next, and its log-probability (nats)."""

    piece: str
    logprob: float


@dataclass
class Unit:
    """A token or word: bytes `start` to `end` of the text, `logprob` in nats (None: context only).

    For tokens, where asked for: `entropy` (bits), `rank` (1: likeliest), likeliest `alternatives`.
    """

    piece: str
    start: int
    end: int
    logprob: float | None
    entropy: float | None = None
    rank: int | None = None
    alternatives: list[Alternative] | None = None

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the piece."""
        return self.end - self.start

    @property
    def surprisal(self) -> float | None:
        """−log₂ of the probability, in bits."""
        return None if self.logprob is None else -self.logprob / NATS_PER_BIT


@dataclass
class Score(NotebookTable):
    """A text's score: `logprob` of its scored tokens (nats, None without any), tokens and bytes.

    `pieces` holds its tokens or words where asked for. Infinite where a token's is NaN or infinite.
    """

    logprob: float | None
    tokens: int
    bytes: int
    pieces: list[Unit] | None = field(default=None, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Its figures in one row, or a row for each of its pieces."""
        if self.pieces is None:
            figures = self.logprob, self.tokens, self.bytes, self.bits_per_byte
            return [dict(zip(("logprob", "tokens", "bytes", "bits_per_byte"), figures))]
        asked = ("entropy", "rank", "alternatives")
        return [
            {
                "index": i,
                **{k: v for k, v in vars(piece).items() if k not in asked or v is not None},
                "surprisal": piece.surprisal,
            }
            for i, piece in enumerate(self.pieces)
        ]

    def painted(self, text: str) -> str:
        """HTML of the text, its pieces painted by their surprisal; "" without pieces."""
        if self.pieces is None:
            return ""
        places = [(piece.start, piece.end, piece.surprisal) for piece in self.pieces]
        return painted_html(segments(text, places))

    def _repr_html_(self) -> str:
        if self.pieces is None:
            return super()._repr_html_()
        ends = [0, *(piece.end for piece in self.pieces)]
        return painted_html(
            [
                Segment(" " * (piece.start > end) + piece.piece, piece.surprisal)
                for piece, end in zip(self.pieces, ends)
            ]
        )

    @property
    def problem(self) -> str:
        """What is wrong with the score; "" for a number, or if nothing was scored."""
        finite_or_none = self.logprob is None or math.isfinite(self.logprob)
        return "" if finite_or_none else finite.LOGPROB

    @property
    def bits_per_byte(self) -> float | None:
        """−logprob / ln 2 / bytes; None if nothing was scored."""
        if self.logprob is None or not self.bytes:
            return None
        return -self.logprob / NATS_PER_BIT / self.bytes

    def per(self, count: int) -> float | None:
        """logprob / count; None if nothing was scored."""
        return None if self.logprob is None or not count else self.logprob / count


class BestChoice(NamedTuple):
    """The indices of the highest score by sum, per token and per byte; None if no score has it."""

    by_sum: int | None
    by_token: int | None
    by_byte: int | None


def choose(scores: Sequence[Score]) -> BestChoice:
    """The likeliest of several texts; the first of equal ones."""
    return BestChoice(
        _argmax([score.logprob for score in scores]),
        _argmax([score.per(score.tokens) for score in scores]),
        _argmax([score.per(score.bytes) for score in scores]),
    )


def _argmax(values: Sequence[float | None]) -> int | None:
    known = [(value, -i) for i, value in enumerate(values) if value is not None]
    return -max(known)[1] if known else None


@dataclass
class Scorer:
    """A model with its tokenizer and settings for scoring.

    `bos` leads every window; without it the first token is context only. `eos` is the closing
    token to score after each text, or None. `context` and `stride` are in tokens; 0 stands for the
    model's context and half of it. `batch` is tokens per forward pass, 0 for what suits the device.
    With `within_word` an encoder's token is masked with the rest of its word. `name` is for errors.
    """

    model: Transformer
    tokenizer: Tokenizer
    bos: list[int]
    eos: int | None = None
    context: int = 0
    stride: int = 0
    batch: int = 0
    within_word: bool = False
    name: str = "the model"
    backend: CausalLogprobs | MaskedLogprobs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        most = self.model.config.max_position_embeddings
        self.context = min(self.context or most, most)
        self.stride = min(self.stride or max(1, self.context // 2), self.context)
        self.device = self.model.embedding.weight.device
        self.batch = tokens_per_forward(self.device.type, self.batch)
        sizes = self.context, self.stride, self.batch
        # the tokenizer of the texts that are scored
        is_target = self.method == "conditional"
        self.text_tokenizer = self.tokenizer.target if is_target else self.tokenizer
        if self.method.startswith("pseudo"):
            mask, eos = self.tokenizer.special_id("mask_token"), self.tokenizer.suffix
            assert mask is not None  # Model.scorer checks it
            self.backend = MaskedLogprobs(self.model, self.bos, eos, mask, *sizes, self.within_word)
        else:
            self.backend = CausalLogprobs(self.model, self.bos, *sizes)

    @property
    def method(self) -> str:
        """The kind of log-probability: causal, conditional, pseudo or pseudo-within-word."""
        method = METHODS[self.model.config.shape]
        return f"{method}-within-word" if method == "pseudo" and self.within_word else method

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities (nats, float32) of each sequence's tokens; NaN for context only.

        Longer sequences than the context are scored in windows, each token once. A bos token that a
        sequence spells out is not doubled, and not scored. With `eos`, it closes each sequence.
        """
        requests = [self._request(ids) for ids in sequences]
        return [scores.logprobs for scores in self.backend.compute(requests, ScoreFields())]

    def slices(self, ids: np.ndarray, most: int) -> Iterator[ScoreRequest]:
        """The requests of about `most` tokens for a long text; for decoders only."""
        assert isinstance(self.backend, CausalLogprobs)
        leading_bos = self._leading_bos(ids[: len(self.bos)].tolist())
        # the whole text as a list would take much memory
        ids = ids if self.eos is None else np.append(ids, self.eos)
        for start, end, *counts in self.backend.slices(len(ids), leading_bos, most):
            yield ScoreRequest(ids[start:end].tolist(), counts[0], counts[1])

    def _leading_bos(self, ids: Sequence[int]) -> int:
        """The number of bos tokens that the ids spell out themselves."""
        count = len(self.bos) if self.method == "causal" else 0
        return count if count and list(ids[:count]) == self.bos else 0

    def _request(self, ids: Sequence[int], **options: Any) -> ScoreRequest:
        closing = [] if self.eos is None else [self.eos]
        return ScoreRequest([*ids, *closing], self._leading_bos(ids), **options)

    def score(
        self, texts: Iterable[str | ScoringInput], per: str = "record", alternatives: int = 0
    ) -> list[Score]:
        """The Score of each text; `per` "token" or "word" adds its pieces.

        With `alternatives` above 0, each token has that many. An empty text scores 0 with 0 tokens.
        A prefix and its text are tokenized as one; a token across the border belongs to the text.
        """
        inputs = [ScoringInput(text) if isinstance(text, str) else text for text in texts]
        wholes = [item.prefix + item.text for item in inputs]
        encodings = self._encode(wholes, per != "record" or any(item.prefix for item in inputs))
        borders = [len(item.prefix.encode("utf-8")) for item in inputs]
        requests = [
            self._request(
                encoded.ids,
                context_only=sum(end <= border for end in encoded.ends) if border else 0,
                key=item.prefix or None,
                source=self._source(item.source),
                words=self._word_numbers(whole) if self.within_word else (),
            )
            for item, whole, encoded, border in zip(inputs, wholes, encodings, borders)
        ]
        word_ends = None
        if per == "word" and not self.method.startswith("pseudo"):
            word_ends = self._word_end_tokens()
        results = self.backend.compute(requests, ScoreFields(word_ends, alternatives))
        return [
            self._score(item.text, border, encoded, scores, per)
            for item, border, encoded, scores in zip(inputs, borders, encodings, results)
        ]

    def _encode(self, texts: list[str], with_ends: bool) -> list[Encoded]:
        """Ids of texts; with the byte where each token ends if needed, which takes longer."""
        if with_ends or not self.bos or self.within_word:
            return self.text_tokenizer.encode_with_ends(texts)
        return [Encoded(ids, []) for ids in self.text_tokenizer.encode_batch(texts)]

    def _source(self, text: str) -> list[int]:
        if self.method != "conditional":
            return []
        ids = self.tokenizer.with_template(self.tokenizer.encode(text))[0]
        most = self.model.config.max_position_embeddings
        if len(ids) > most:
            raise UserError(
                f"the source has {len(ids)} tokens, more than the model's context of {most}",
                where=repr(text[:40]),
            )
        return ids

    def _word_numbers(self, text: str) -> list[int | None]:
        encoding: Any = self.tokenizer.core.encode(text, add_special_tokens=False)
        return encoding.word_ids

    def _word_end_tokens(self) -> torch.Tensor | None:
        """(V,) bool: tokens before which a word has ended; None if no token has spaces."""
        starts = self.text_tokenizer.word_starts
        if starts is None:
            return None
        padding = [False] * (self.model.config.vocab_size - len(starts))
        return torch.tensor([*starts, *padding], device=self.device)

    def _score(
        self, text: str, border: int, encoded: Encoded, scores: TokenScores, per: str
    ) -> Score:
        """The Score of a text after a prefix of `border` bytes."""
        scored = ~np.isnan(scores.logprobs)
        tokens, size = int(scored.sum()), len(text.encode("utf-8"))
        total = float(scores.logprobs[scored].sum(dtype=np.float64)) if tokens or not text else None
        if not encoded.ends and not scored[: len(encoded.ids)].all():
            # the text spells out the bos token: count the bytes of the others
            encoded = self.text_tokenizer.encode_with_ends([text])[0]
        ends = [max(0, end - border) for end in encoded.ends]
        starts = [0, *ends[:-1]]
        if ends:
            size = sum(end - start for start, end, counts in zip(starts, ends, scored) if counts)
        if per == "record":
            return Score(total, tokens, size)
        placed = _PlacedTokens(text, encoded.ids, starts, ends, scores)
        units = self._token_units(placed) if per == "token" else self._word_units(placed)
        if any(unit.logprob is not None and math.isinf(unit.logprob) for unit in units):
            total = math.inf
        return Score(total, tokens, size, units)

    def _token_units(self, tokens: "_PlacedTokens") -> list[Unit]:
        """The tokens of a text, without those of its prefix."""
        data, scores, units = tokens.text.encode("utf-8"), tokens.scores, []
        for i, (start, end) in enumerate(zip(tokens.starts, tokens.ends)):
            if not end and tokens.text:
                continue
            piece = data[start:end].decode("utf-8", "backslashreplace")
            unit = Unit(piece, start, end, _none_if_nan(scores.logprobs[i]))
            if scores.ranks is not None and unit.logprob is not None:
                assert scores.entropy is not None
                assert scores.tokens is not None and scores.best is not None
                unit.entropy = float(scores.entropy[i]) / NATS_PER_BIT
                unit.rank = int(scores.ranks[i])
                unit.alternatives = [
                    Alternative(self.text_tokenizer.token_texts[token], float(logprob))
                    for token, logprob in zip(scores.tokens[i], scores.best[i])
                    if logprob > -np.inf  # an impossible token is no alternative
                ]
            units.append(unit)
        return units

    def _word_units(self, tokens: "_PlacedTokens") -> list[Unit]:
        """The words (runs of non-space) of a text; a word that shares a token has logprob None.

        p(word) = p(its tokens, with the space before it) · p(the word ends here), given that the
        word before has ended; without the last factor all possible words would sum to more than one
        (Pimentel & Meister 2024; Oh & Schuler 2024).
        """
        data, byte_at = tokens.text.encode("utf-8"), byte_offsets(tokens.text)
        spans = [
            (byte_at[match.start()], byte_at[match.end()])
            for match in re.finditer(r"\S+", tokens.text)
        ]
        next_starts = [*(start for start, _ in spans[1:]), len(data)]
        scores, units, i = tokens.scores, [], 0
        while i < len(tokens.ids) and not tokens.ends[i]:
            i += 1  # the prefix
        for (start, end), next_start in zip(spans, next_starts):
            first = i
            while i < len(tokens.ids) and tokens.starts[i] < end:
                i += 1
            total = math.nan
            # the word has tokens of its own: none begins before it or ends in the next word
            if first < i and tokens.starts[first] <= start and tokens.ends[i - 1] <= next_start:
                total = float(scores.logprobs[first:i].sum(dtype=np.float64))
                total = self._with_ending(total, tokens, first, i, end)
            units.append(Unit(data[start:end].decode("utf-8"), start, end, _none_if_nan(total)))
        return units

    def _with_ending(
        self, total: float, tokens: "_PlacedTokens", first: int, after: int, end: int
    ) -> float:
        """`total` + ln p(the word ends after its tokens) − ln p(the word before had ended)."""
        set_logprobs, starts = tokens.scores.set_logprobs, self.text_tokenizer.word_starts
        if set_logprobs is None or starts is None:
            return total
        # a last token that includes space has ended the word itself
        followed = after == len(tokens.ids) or starts[tokens.ids[after]]
        if tokens.ends[after - 1] == end and followed:
            total += float(set_logprobs[after])
        if first and starts[tokens.ids[first]]:
            total -= float(set_logprobs[first])
            # the difference of two infinities is NaN, which stands for context only
            total = math.inf if math.isinf(set_logprobs[first]) else total
        return total


class _PlacedTokens(NamedTuple):
    """The tokens of a text, the bytes of each, and their scores; tokens of a prefix end at 0."""

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]
    scores: TokenScores


def _none_if_nan(logprob: float) -> float | None:
    return None if math.isnan(logprob) else float(logprob)
