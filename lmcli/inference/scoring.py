"""Texts → log-probabilities of their tokens, words, records; files → perplexity and bits per byte."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lmcli.inference.ordering import batch_tokens, in_order, pad
from lmcli.model.likelihood import target_logprobs
from lmcli.model.transformer import Transformer
from lmcli.text.corpus import EncodedDocument
from lmcli.text.tokenizer import Encoded, Tokenizer, byte_offsets
from lmcli.text.windows import Window, windows

NATS_PER_BIT = math.log(2)


@dataclass
class Unit:
    """A token or a word of a text: bytes `start` to `end`, natural-log probability (None: context only), bits."""

    piece: str
    start: int
    end: int
    logprob: float | None

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


@dataclass
class Perplexity:
    """Sums over documents, and the figures they give. Everything counts scored text only."""

    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    documents: int = 0
    context: int = 0
    stride: int = 0

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


@dataclass
class Scorer:
    """A model with what scoring needs to know. `beginning` leads every window; [] makes the first token context only.

    `end` is the closing token to score after each text, or None. `context` and `stride` are in tokens; 0 takes the
    model's context, and half of it. `batch` is tokens a forward pass, 0 takes what suits the device.
    """

    model: Transformer
    tokenizer: Tokenizer
    beginning: list[int]
    end: int | None = None
    context: int = 0
    stride: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        most = self.model.config.max_position_embeddings
        self.context = min(self.context or most, most)
        self.stride = min(self.stride or max(1, self.context // 2), self.context)
        self.device = self.model.embedding.weight.device
        self.batch = batch_tokens(self.device, self.batch)

    @torch.inference_mode()
    def token_logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Log-probabilities (nats, float32) of the tokens of each sequence; NaN where a token is context only.

        A sequence longer than the context is scored in windows, each token once. A beginning token that a text spells
        out itself is not added a second time, and not scored. With `end`, it closes each sequence.
        """
        # the closing token of an empty text may have the beginning's id, and is none
        spelt = [list(ids[:len(ids) - (self.end is not None)][:len(self.beginning)]) for ids in sequences]
        skips = [len(self.beginning) if found == self.beginning else 0 for found in spelt]
        # windows() counts one leading token; a template with more of them leaves less room
        room = self.context - max(0, len(self.beginning) - 1)
        jobs = [(i, window) for i, ids in enumerate(sequences)
                for window in windows(len(ids) - skips[i], room, min(self.stride, room), bool(self.beginning))]
        found = [np.full(len(ids), np.nan, dtype=np.float32) for ids in sequences]

        def work(group: list[int]) -> list[None]:
            chosen = [jobs[g] for g in group]
            parts = self._score_windows([(sequences[i][skips[i]:], window) for i, window in chosen])
            for (i, window), part in zip(chosen, parts):
                found[i][skips[i] + window.first:skips[i] + window.end] = part
            return [None] * len(group)

        in_order([window.end - window.start for _, window in jobs], self.batch, work)
        return found

    def _score_windows(self, jobs: list[tuple[list[int], Window]]) -> Iterator[np.ndarray]:
        """Log-probabilities of each window's scored tokens; the head runs on those positions only."""
        lead = len(self.beginning)
        inputs = [self.beginning + list(ids[window.start:window.end - 1]) for ids, window in jobs]
        rows, _ = pad(inputs, 0, left=False, device=self.device)  # what follows a token cannot change it: no mask
        hidden = self.model.hidden(rows)  # (B, T, C)
        wanted = [hidden[b, lead + window.first - window.start - 1:lead + window.end - window.start - 1]
                  for b, (_, window) in enumerate(jobs)]
        targets = [token for ids, window in jobs for token in ids[window.first:window.end]]
        logprobs = target_logprobs(torch.cat(wanted), self.model.head, torch.tensor(targets, device=self.device))
        for part in logprobs.split([len(part) for part in wanted]):
            yield part.cpu().numpy()

    def score(self, texts: list[str], per: str = "record") -> list[Score]:
        """A Score a text; `per` "token" or "word" adds its pieces. An empty text scores 0 with 0 tokens."""
        encoded = self.tokenizer.encode_with_ends(texts)
        closing = [] if self.end is None else [self.end]
        found = self.token_logprobs([[*item.ids, *closing] for item in encoded])
        return [_score(text, item, logprobs, per) for text, item, logprobs in zip(texts, encoded, found)]

    def perplexity(self, documents: Iterable[EncodedDocument]) -> Perplexity:
        """Sums over documents, read as they come, some 100,000 tokens at a time."""
        total = Perplexity(context=self.context, stride=self.stride)
        waiting, tokens = [], 0
        for document in documents:
            waiting.append(document)
            tokens += len(document.ids)
            if tokens > 100_000:
                self._add(total, waiting)
                waiting, tokens = [], 0
        self._add(total, waiting)
        return total

    def _add(self, total: Perplexity, documents: list[EncodedDocument]) -> None:
        closing = [] if self.end is None else [self.end]
        for document, logprobs in zip(documents, self.token_logprobs(
                [[*document.ids.tolist(), *closing] for document in documents])):
            scored = ~np.isnan(logprobs)
            total.logprob += float(logprobs[scored].sum(dtype=np.float64))
            total.tokens += int(scored.sum())
            unseen = self.tokenizer.decode(document.ids[~scored[:len(document.ids)]].tolist())
            total.bytes += document.bytes - len(unseen.encode("utf-8"))
            total.characters += document.characters - len(unseen)
            total.words += document.words
            total.documents += 1


def _score(text: str, encoded: Encoded, logprobs: np.ndarray, per: str) -> Score:
    scored = ~np.isnan(logprobs)
    tokens = int(scored.sum())
    total = float(logprobs[scored].sum(dtype=np.float64)) if tokens or not encoded.ids else None
    starts = [0, *encoded.ends[:-1]]
    size = sum(end - start for start, end, counted in zip(starts, encoded.ends, scored) if counted)
    units = None if per == "record" else _tokens(text, encoded, logprobs) if per == "token" else _words(
        text, encoded, logprobs)
    return Score(total, tokens, size, units)


def _tokens(text: str, encoded: Encoded, logprobs: np.ndarray) -> list[Unit]:
    data, starts = text.encode("utf-8"), [0, *encoded.ends[:-1]]
    return [Unit(data[start:end].decode("utf-8", "backslashreplace"), start, end, _number(logprob))
            for start, end, logprob in zip(starts, encoded.ends, logprobs)]


def _words(text: str, encoded: Encoded, logprobs: np.ndarray) -> list[Unit]:
    """Words (runs of non-space) with the sum over their tokens; space before a word counts as its own, space at the end
    as the last word's. A word with a token that is context only has no log-probability."""
    data = text.encode("utf-8")
    byte_at = byte_offsets(text)
    spans = [(byte_at[match.start()], byte_at[match.end()]) for match in re.finditer(r"\S+", text)]
    sums = [0.0] * len(spans)
    word = 0
    for start, logprob in zip([0, *encoded.ends[:-1]], logprobs):
        while word < len(spans) - 1 and start >= spans[word][1]:
            word += 1
        if spans:
            sums[word] += float(logprob)
    return [Unit(data[start:end].decode("utf-8"), start, end, _number(total)) for (start, end), total in zip(spans, sums)]


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else float(logprob)
