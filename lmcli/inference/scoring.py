"""Texts → how likely a model finds them: records, their words and tokens, continuations of what is given, choices."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lmcli.errors import UserError
from lmcli.inference.ordering import batch_tokens
from lmcli.inference.token_scores import Causal, Masked, Request, TokenScores, Wanted
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import Encoded, Tokenizer, byte_offsets

NATS_PER_BIT = math.log(2)
METHODS = {"decoder": "causal", "encoder-decoder": "conditional", "encoder": "pseudo"}


class Question(NamedTuple):
    """A text to be scored; `given` stands before it and is context only, `source` is what an encoder–decoder reads."""

    text: str
    given: str = ""
    source: str = ""


class Alternative(NamedTuple):
    """A token that could have stood there, and its natural-log probability."""

    piece: str
    logprob: float


@dataclass
class Unit:
    """A token or a word of a text: bytes `start` to `end`, natural-log probability (None: context only), bits.

    Of a token, where asked for: the `entropy` of what could have stood there, in bits, its own `rank` (1: the likeliest)
    and the likeliest `alternatives`.
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
class Score:
    """One text: the natural-log probability of its scored tokens (None when there are none), their number and bytes.

    `pieces` holds the tokens or words where they were asked for.
    """

    logprob: float | None
    tokens: int
    bytes: int
    pieces: list[Unit] | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """−logprob / ln 2 / bytes, or None where nothing was scored."""
        return None if self.logprob is None or not self.bytes else -self.logprob / NATS_PER_BIT / self.bytes

    @property
    def per_token(self) -> float | None:
        """logprob / tokens, or None where nothing was scored."""
        return None if self.logprob is None or not self.tokens else self.logprob / self.tokens

    @property
    def per_byte(self) -> float | None:
        """logprob / bytes, or None where nothing was scored."""
        return None if self.logprob is None or not self.bytes else self.logprob / self.bytes


class Choice(NamedTuple):
    """Which of several scores is the highest, by its sum, per token and per byte: places, None where none has a figure."""

    by_sum: int | None
    by_token: int | None
    by_byte: int | None


def choose(scores: Sequence[Score]) -> Choice:
    """The likeliest of several texts; of equal ones the first."""
    return Choice(*(_highest([getattr(score, name) for score in scores]) for name in ("logprob", "per_token", "per_byte")))


def _highest(values: Sequence[float | None]) -> int | None:
    places = [i for i, value in enumerate(values) if value is not None]
    return max(places, key=lambda i: (values[i], -i), default=None)


@dataclass
class Scorer:
    """A model with what scoring needs to know. `beginning` leads every window; [] makes the first token context only.

    `end` is the closing token to score after each text, or None. `context` and `stride` are in tokens; 0 takes the
    model's context, and half of it. `batch` is tokens a forward pass, 0 takes what suits the device. With `within_word`
    an encoder's token is masked together with the rest of its word.
    """

    model: Transformer
    tokenizer: Tokenizer
    beginning: list[int]
    end: int | None = None
    context: int = 0
    stride: int = 0
    batch: int = 0
    within_word: bool = False
    reader: Causal | Masked = field(init=False, repr=False)

    def __post_init__(self) -> None:
        most = self.model.config.max_position_embeddings
        self.context = min(self.context or most, most)
        self.stride = min(self.stride or max(1, self.context // 2), self.context)
        self.device = self.model.embedding.weight.device
        self.batch = batch_tokens(self.device, self.batch)
        self.texts = self.tokenizer  # what cuts the texts that are scored
        if self.method.startswith("pseudo"):
            self.reader = Masked(self.model, self.beginning, self.tokenizer.suffix, self.tokenizer.special("mask_token"),
                                 self.context, self.stride, self.batch, self.within_word)
        else:
            self.reader = Causal(self.model, self.beginning, self.context, self.stride, self.batch)
        if self.method == "conditional":
            self.texts = self.tokenizer.target

    @property
    def method(self) -> str:
        """What the log-probabilities are: causal, conditional (on a source), pseudo or pseudo-within-word."""
        found = METHODS[self.model.config.shape]
        return f"{found}-within-word" if found == "pseudo" and self.within_word else found

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities (nats, float32) of the tokens of each sequence; NaN where a token is context only.

        A sequence longer than the context is scored in windows, each token once. A beginning token that a text spells
        out itself is not added a second time, and not scored. With `end`, it closes each sequence.
        """
        return [found.logprobs for found in self.reader.read([self._request(ids) for ids in sequences], Wanted())]

    def slices(self, ids: np.ndarray, most: int) -> Iterator[Request]:
        """What there is to read of a text, in requests of about `most` tokens: see Causal.slices. Only with a decoder."""
        spelt = self._request(ids[:len(self.beginning)].tolist()).spelt
        whole = ids if self.end is None else np.append(ids, self.end)  # a long text as a list would take much memory
        for part in self.reader.slices(Request(whole, spelt), most):
            yield part._replace(ids=part.ids.tolist())

    def _request(self, ids: Sequence[int], **more) -> Request:
        closing = [] if self.end is None else [self.end]
        lead = len(self.beginning) if self.method == "causal" else 0
        spelt = lead if lead and list(ids[:lead]) == self.beginning else 0
        return Request([*ids, *closing], spelt, **more)

    def score(self, texts: Iterable[str | Question], per: str = "record", alternatives: int = 0) -> list[Score]:
        """A Score a text; `per` "token" or "word" adds its pieces, `alternatives` above 0 so many to each token.

        An empty text scores 0 with 0 tokens. With text given before it, both are tokenized as one, and a token that
        straddles the border belongs to the text.
        """
        questions = [Question(text) if isinstance(text, str) else text for text in texts]
        wholes = [question.given + question.text for question in questions]
        exact = per != "record" or not self.beginning or self.within_word or any(question.given for question in questions)
        encoded = self.texts.encode_with_ends(wholes) if exact else [
            Encoded(ids, []) for ids in self.texts.encode_batch(wholes)]
        borders = [len(question.given.encode("utf-8")) for question in questions]
        requests = [self._request(
            item.ids, given=sum(end <= border for end in item.ends) if border else 0, key=question.given or None,
            source=self._source(question.source), words=self._words_of(whole) if self.within_word else ())
            for question, whole, item, border in zip(questions, wholes, encoded, borders)]
        words = per == "word" and self.method != "pseudo" and not self.within_word and self.texts.word_starts is not None
        members = torch.tensor(self._starts, device=self.device) if words else None
        found = self.reader.read(requests, Wanted(members, alternatives))
        return [self._score(question.text, border, item, scores, per)
                for question, border, item, scores in zip(questions, borders, encoded, found)]

    def _source(self, text: str) -> list[int]:
        if self.method != "conditional":
            return []
        ids = self.tokenizer.with_template(self.tokenizer.encode(text))[0]
        if len(ids) > self.model.config.max_position_embeddings:
            raise UserError(f"a source of {len(ids)} tokens is more than the model's context of "
                            f"{self.model.config.max_position_embeddings}", where=repr(text[:40]))
        return ids

    def _words_of(self, text: str) -> list[int | None]:
        return self.tokenizer.core.encode(text, add_special_tokens=False).word_ids

    @property
    def _starts(self) -> list[bool]:
        """For each row of the model's vocabulary whether a word before it has ended."""
        known = self.texts.word_starts
        return [*known, *[False] * (self.model.config.vocab_size - len(known))]

    def _score(self, text: str, border: int, encoded: Encoded, found: TokenScores, per: str) -> Score:
        scored = ~np.isnan(found.logprobs)
        tokens, size = int(scored.sum()), len(text.encode("utf-8"))
        total = float(found.logprobs[scored].sum(dtype=np.float64)) if tokens or not text else None
        if not encoded.ends and not scored[:len(encoded.ids)].all():  # the text spells the beginning token
            encoded = self.texts.encode_with_ends([text])[0]
        ends = [max(0, end - border) for end in encoded.ends]
        if ends:
            size = sum(end - start for start, end, counted in zip([0, *ends], ends, scored) if counted)
        if per == "record":
            return Score(total, tokens, size)
        tokens_of = _Tokens(text, encoded.ids, [0, *ends[:-1]], ends, found)
        units = self._tokens(tokens_of) if per == "token" else self._words(tokens_of)
        return Score(total, tokens, size, units)

    def _tokens(self, tokens: "_Tokens") -> list[Unit]:
        data, units, found = tokens.text.encode("utf-8"), [], tokens.scores
        for i, (start, end) in enumerate(zip(tokens.starts, tokens.ends)):
            if end or not tokens.text:  # else it lies in what was given
                unit = Unit(data[start:end].decode("utf-8", "backslashreplace"), start, end, _number(found.logprobs[i]))
                if found.ranks is not None and unit.logprob is not None:
                    unit.entropy, unit.rank = float(found.entropy[i]) / NATS_PER_BIT, int(found.ranks[i])
                    unit.alternatives = [Alternative(self.texts.token_texts[token], float(logprob))
                                         for token, logprob in zip(found.tokens[i], found.best[i])]
                units.append(unit)
        return units

    def _words(self, tokens: "_Tokens") -> list[Unit]:
        """Words (runs of non-space) with their log-probability; None for a word that has no token of its own, or one that
        is context only.

        A word's probability is that of its tokens, and the space before it, times that of its ending here: that a word
        before it had ended is given, that it ends itself is not (Pimentel & Meister 2024; Oh & Schuler 2024). Without it
        the probabilities of all words that could follow would not sum to one.
        """
        data, byte_at = tokens.text.encode("utf-8"), byte_offsets(tokens.text)
        spans = [(byte_at[match.start()], byte_at[match.end()]) for match in re.finditer(r"\S+", tokens.text)]
        logprobs, inside, units, place = tokens.scores.logprobs, tokens.scores.inside, [], 0
        starts = None if inside is None else self.texts.word_starts
        while place < len(tokens.ids) and not tokens.ends[place]:
            place += 1  # what was given
        for (start, end), (following, _) in zip(spans, [*spans[1:], (len(data), 0)]):
            first = place
            while place < len(tokens.ids) and tokens.starts[place] < end:
                place += 1
            whole = first < place and tokens.ends[place - 1] <= following and tokens.starts[first] <= start
            total = float(logprobs[first:place].sum(dtype=np.float64)) if whole else math.nan
            if starts and whole:
                open_end = tokens.ends[place - 1] == end  # else the last token has space in it, so it ends the word
                if open_end and (place == len(tokens.ids) or starts[tokens.ids[place]]):
                    total += float(inside[place])
                if first and starts[tokens.ids[first]]:
                    total -= float(inside[first])
            units.append(Unit(data[start:end].decode("utf-8"), start, end, _number(total)))
        return units


class _Tokens(NamedTuple):
    """The tokens of a text, where each lies in it, and what was read of them; those of what was given end at 0."""

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]
    scores: TokenScores


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else float(logprob)
