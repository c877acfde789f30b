"""Prompts → text, one token at a time: a prefill, then steps over a key–value cache, in batches, as a stream.

A text may grow past the model's context: the window then slides, keeping the beginning token and the newer half.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.inference import sampling
from lmcli.inference.ordering import pad
from lmcli.model.attention import KeyValueCache
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Generated:
    """One continuation. `token_logprobs` are natural logs under the model itself, before temperature and filters."""

    text: str
    finish_reason: str  # "stop": an end token or a stop string; "length": max_new_tokens
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
    """A model with all that decoding needs to know. `beginning` starts a context, `stops` end a text."""

    model: Transformer
    tokenizer: Tokenizer
    beginning: list[int]
    stops: list[int]
    config: GenerateConfig
    stop_strings: tuple[str, ...] = ()
    use_cache: bool = True

    @property
    def context(self) -> int:
        """Tokens the model can see at once."""
        return self.model.config.max_position_embeddings

    @torch.inference_mode()
    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[Piece]:
        """Continuations of prompts (ids, beginning included), a Piece a row and step, row `i` drawn from `seeds[i]`.

        A row's text depends on its prompt and seed alone, not on the rows beside it (up to rounding).
        """
        rows = [_Row(i, list(prompt), seed, self) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        cache = real = None
        while rows:
            # full when the longest text reaches the context, or when it did and has ended since
            if cache is None or cache.length == cache.capacity:
                cache, real, logits = self._prefill(rows)
            else:
                last = torch.tensor([row.window[-1:] for row in rows], device=self._device)  # (B, 1)
                if real is not None:
                    real = torch.cat([real, torch.ones_like(last)], dim=1)
                logits = self.model.head(self.model.hidden(last, real, cache)[:, -1])
            yield from self._choose(rows, logits.float())
            going = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not self.use_cache:
                cache = None
            elif 0 < len(going) < len(rows):
                kept = torch.tensor(going, device=self._device)
                cache.keep_rows(kept)
                real = real[kept] if real is not None else None
            rows = [rows[i] for i in going]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _prefill(self, rows: list["_Row"]) -> tuple[KeyValueCache, Tensor | None, Tensor]:
        for row in rows:
            row.window = self._view(row.window)
        longest = max(len(row.window) for row in rows)
        capacity = min(self.context, longest + max(self.config.max_new_tokens - len(row.tokens) for row in rows))
        cache = KeyValueCache(self.model.config, len(rows), capacity, self._device, self.model.embedding.weight.dtype)
        ids, real = pad([row.window for row in rows], 0, left=True, device=self._device)
        return cache, real, self.model.head(self.model.hidden(ids, real, cache)[:, -1])

    def _view(self, ids: list[int]) -> list[int]:
        """The part of a text that the model looks at: all of it, or the beginning and the last half context."""
        if len(ids) <= self.context:
            return ids
        return self.beginning + ids[-max(1, self.context // 2 - len(self.beginning)):]

    def _choose(self, rows: list["_Row"], logits: Tensor) -> Iterator[Piece]:
        """Draws the next token of every row from logits (B, V)."""
        seen = None
        if self.config.repetition_penalty != 1.0:
            width = max(len(row.seen) for row in rows)  # short rows repeat an id of theirs: once more changes nothing
            seen = torch.tensor([(list(row.seen) * width)[:width] for row in rows], device=logits.device)
        allowed = sampling.filtered(logits, self.config, seen)
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
    def beams(self, prompt: list[int], count: int) -> list[Generated]:
        """The `count` best continuations of one prompt by beam search, best first: by log-probability of the tokens,
        divided by their number to the power `length_penalty`. Deterministic; temperature and filters play no part.

        Ends when no open beam can still beat the worst finished one, judged by the length reached, as transformers does.
        """
        config, width = self.config, self.config.num_beams
        window = self.beginning + prompt[len(self.beginning):][-self.context // 2:] \
            if len(prompt) >= self.context else prompt
        steps = min(config.max_new_tokens, self.context - len(window))
        cache = KeyValueCache(self.model.config, 1, len(window) + steps, self._device, self.model.embedding.weight.dtype)
        ids = torch.tensor([window], device=self._device)
        open_beams, finished = [_Beam([], [])], []
        for step in range(1, steps + 1):
            logits = self.model.head(self.model.hidden(ids, None, cache)[:, -1]).float()
            candidates = _best_candidates(open_beams, logits.log_softmax(-1), max(2, 1 + len(self.stops)) * width)
            going = []
            for rank, (parent, beam) in enumerate(candidates):
                if beam.tokens[-1] in self.stops or step == steps:  # out of room, open beams count as they are
                    finished += [beam] if rank < width else []
                elif len(going) < width:
                    going.append((parent, beam))
            finished = sorted(finished, key=self._beam_score, reverse=True)[:width]
            if not going:
                break
            cache.keep_rows(torch.tensor([parent for parent, _ in going], device=self._device))
            open_beams = [beam for _, beam in going]
            ids = torch.tensor([[beam.tokens[-1]] for beam in open_beams], device=self._device)
            if len(finished) == width and self._beam_score(finished[-1]) >= self._beam_score(open_beams[0]):
                break
        return [self._beam_result(beam, prompt) for beam in finished[:count]]

    def _beam_score(self, beam: "_Beam") -> float:
        return sum(beam.logprobs) / len(beam.tokens) ** self.config.length_penalty

    def _beam_result(self, beam: "_Beam", prompt: list[int]) -> Generated:
        row = _Row(0, list(prompt), 0, self)
        for token, logprob in zip(beam.tokens, beam.logprobs):
            if row.finish_reason is None:
                row.add(token, logprob)
        row.finish_reason = row.finish_reason or "length"
        return row.result()


class _Beam(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


def _best_candidates(beams: list[_Beam], logprobs: Tensor, count: int) -> list[tuple[int, _Beam]]:
    """The best `count` one-token extensions as (parent, beam), best first; logprobs is (beams, V)."""
    sums = torch.tensor([sum(beam.logprobs) for beam in beams], device=logprobs.device)
    best = (sums[:, None] + logprobs).flatten().topk(min(count, logprobs.numel())).indices.tolist()
    places = [divmod(index, logprobs.shape[-1]) for index in best]
    return [(parent, _Beam([*beams[parent].tokens, token],
                           [*beams[parent].logprobs, logprobs[parent, token].item()])) for parent, token in places]


@dataclass
class _Row:
    """One prompt while it is being continued."""

    number: int
    window: list[int]  # ids in the model's view
    seed: int
    decoder: Decoder
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.seen = dict.fromkeys(self.window)  # in order, each once
        self._stream = StreamDecoder(self.decoder.tokenizer, self.window)
        self._given = 0  # characters of `text` handed out

    def add(self, token: int, logprob: float) -> str:
        """Takes one token; returns the text that has become certain with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.window.append(token)
        self.seen[token] = None
        if token in self.decoder.stops:
            self.finish_reason = "stop"
            return self._give("")
        if len(self.tokens) == self.decoder.config.max_new_tokens:
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
