"""Prompts → text, one token at a time: a prefill, then steps over a key–value cache, in batches, as a stream.

A decoder continues its prompt. It may grow past the model's context: the window then slides, keeping the beginning token
and the newer half. An encoder–decoder reads its prompt once as the source, and writes a target from its start token.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.inference import sampling
from lmcli.inference.beams import Found, search
from lmcli.inference.constraints import Constraints, written
from lmcli.inference.reading import Reading
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Generated:
    """One continuation. `token_logprobs` are natural logs under the model itself, before temperature and filters."""

    text: str
    finish_reason: str  # "stop": an end token or a stop string; "length": as long as it may be
    tokens: list[int]
    token_logprobs: list[float]
    seed: int


class Piece(NamedTuple):
    """Text that prompt number `row` has gained, and its result when it is finished."""

    row: int
    text: str
    result: Generated | None


@dataclass
class Decoder:
    """A model with all that decoding needs to know. `beginning` starts a context, `stops` end a text, `start` begins the
    target of an encoder–decoder (None: as config.json says)."""

    model: Transformer
    tokenizer: Tokenizer
    beginning: list[int]
    stops: list[int]
    config: GenerateConfig
    stop_strings: tuple[str, ...] = ()
    use_cache: bool = True
    start: int | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        self.two_stacks = config.shape == "encoder-decoder"
        for known in (config.decoder_start_token_id, config.bos_token_id, 0):
            self.start = known if self.start is None else self.start
        self.rules = Constraints(self.config, self.stops, config.vocab_size, self._device)

    @property
    def context(self) -> int:
        """Tokens the model can see at once."""
        return self.model.config.max_position_embeddings

    @property
    def longest_source(self) -> int | None:
        """Tokens of a source that are read, its special tokens included; relative positions set no limit (None)."""
        return None if self.model.config.positions == "relative" else self.context

    def cost(self, prompt: list[int]) -> int:
        """Tokens that a text will fill, as far as one can tell: a target is seldom twice as long as its source."""
        if self.two_stacks:
            return len(prompt) + min(self._limit(prompt), 2 * len(prompt) + 32)
        return min(len(prompt), self.context) + self._limit(prompt)

    @torch.inference_mode()
    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[Piece]:
        """Continuations of prompts (ids, special tokens included), a Piece a row and step, row `i` drawn from `seeds[i]`.

        A row's text depends on its prompt and seed alone, not on the rows beside it (up to rounding).
        """
        rows = [self._row(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        reading = None
        while rows:
            # full when the longest text reaches the context, or when it did and has ended since
            if reading is None or reading.full:
                reading = self._read(rows)
            else:
                reading.add(torch.tensor([row.window[-1] for row in rows], device=self._device))
            yield from self._choose(rows, reading.logits)
            going = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not self.use_cache:
                reading = None
            elif 0 < len(going) < len(rows):
                reading.keep(torch.tensor(going, device=self._device))
            rows = [rows[i] for i in going]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _row(self, number: int, prompt: list[int], seed: int) -> "_Row":
        if self.two_stacks:
            return _Row(number, [self.start], seed, self, self._limit(prompt), self._source(prompt))
        return _Row(number, list(prompt), seed, self, self._limit(prompt))

    def _limit(self, prompt: list[int]) -> int:
        """Tokens that may be written: an encoder–decoder's target ends at the context, a decoder's window slides."""
        config = self.config
        length = 1 if self.two_stacks else len(prompt)
        limit = max(1, config.max_length - length) if config.max_length else config.max_new_tokens
        return min(limit, self.context) if self.two_stacks and self.longest_source else limit

    def _source(self, ids: list[int]) -> list[int]:
        """The part of a source that is read: its beginning, and the special tokens at its end."""
        most, end = self.longest_source, self.tokenizer.suffix
        return ids if most is None or len(ids) <= most else ids[:most - len(end)] + end

    def _read(self, rows: list["_Row"]) -> Reading:
        for row in rows:
            row.window = self._view(row.window)
        capacity = max(len(row.window) for row in rows) + max(row.limit - len(row.tokens) for row in rows)
        if not self.two_stacks:
            capacity = min(self.context, capacity)
        return self._reading(rows, capacity)

    def _reading(self, rows: list["_Row"], capacity: int) -> Reading:
        sources = [row.source for row in rows] if self.two_stacks else None
        return Reading(self.model, [row.window for row in rows], sources, capacity)

    def _view(self, ids: list[int]) -> list[int]:
        """The part of a text that the model looks at: all of it, or the beginning and the last half context."""
        if len(ids) <= self.context or self.two_stacks:
            return ids
        return self.beginning + ids[-max(1, self.context // 2 - len(self.beginning)):]

    def _choose(self, rows: list["_Row"], logits: Tensor) -> Iterator[Piece]:
        """Draws the next token of every row from logits (B, V)."""
        allowed = logits
        if self.rules.active:
            at = written([row.prompt for row in rows], [row.tokens for row in rows], [row.limit for row in rows],
                         logits.device)
            allowed = self.rules.apply(logits, at)
        allowed = sampling.filtered(allowed, self.config)
        if self.config.temperature:
            chance = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
            chosen = sampling.draw(allowed, chance).to(logits.device)
        else:
            chosen = allowed.argmax(-1)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist()):
            text = row.add(token, logprob)
            yield Piece(row.number, text, row.result() if row.finish_reason else None)

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        """The finished continuations of `stream`, in order."""
        found = {piece.row: piece.result for piece in self.stream(prompts, seeds) if piece.result}
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def beams(self, prompts: list[list[int]], count: int) -> list[list[Generated]]:
        """The `count` best continuations of each prompt by beam search, best first: by log-probability of the tokens,
        divided by their number to the power `length_penalty`. Deterministic; temperature and filters play no part.

        A decoder's text ends at the context.
        """
        rows = [self._row(i, prompt, 0) for i, prompt in enumerate(prompts)]
        for row in rows if not self.two_stacks else ():
            if len(row.window) >= self.context:
                row.window = self.beginning + row.window[len(self.beginning):][-self.context // 2:]
            row.limit = min(row.limit, self.context - len(row.window))
        reading = self._reading(rows, max(len(row.window) for row in rows) + max(row.limit for row in rows))
        at = written([row.prompt for row in rows], [[] for _ in rows], [row.limit for row in rows], self._device)
        found = search(reading, at, self.config, self.stops)
        return [[self._found(prompt, text) for text in texts[:count]] for prompt, texts in zip(prompts, found)]

    def _found(self, prompt: list[int], found: Found) -> Generated:
        row = self._row(0, prompt, 0)
        for token, logprob in zip(found.tokens, found.logprobs):
            if row.finish_reason is None:
                row.add(token, logprob)
        row.finish_reason = row.finish_reason or "length"
        return row.result()


@dataclass
class _Row:
    """One text while it is being written."""

    number: int
    window: list[int]  # ids in the model's view
    seed: int
    decoder: Decoder
    limit: int  # tokens at most
    source: list[int] = field(default_factory=list)  # what an encoder reads
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.prompt = list(self.window)
        self._stream = StreamDecoder(self.decoder.tokenizer, self.window)
        self._given = 0  # characters of `text` handed out

    def add(self, token: int, logprob: float) -> str:
        """Takes one token; returns the text that has become certain with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.window.append(token)
        if token in self.decoder.stops:
            self.finish_reason = "stop"
            return self._give("")
        if len(self.tokens) == self.limit:
            self.finish_reason = "length"
        return self._give(self._stream.push(token))

    def _give(self, new: str) -> str:
        """Appends text, cuts it at a stop string, and holds back an end that may become one."""
        checked = len(self.text)
        self.text += new
        for stop in self.decoder.stop_strings:
            at = self.text.find(stop, max(0, checked - len(stop)))
            if at >= 0:
                self.text, self.finish_reason = self.text[:at], "stop"
        held = 0 if self.finish_reason else max(
            (n for stop in self.decoder.stop_strings for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0)
        start, self._given = self._given, max(self._given, len(self.text) - held)
        return self.text[start:self._given]

    def result(self) -> Generated:
        return Generated(self.text, self.finish_reason, self.tokens, self.logprobs, self.seed)
