"""Prompts → text, token by token: a prefill, then steps with a key–value cache, in batches.

A decoder continues its prompt. Past the model's context the window slides: it keeps the bos token
and the newer half. An encoder–decoder reads its prompt as the source and generates a target.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from lmcli.config import GenerateConfig, ModelConfig
from lmcli.generation import sampling
from lmcli.generation.beam_search import UNDEFINED, Hypothesis, search
from lmcli.generation.constraints import Constraints, SequenceState, sequence_state
from lmcli.generation.prompt_lookup import PromptLookup
from lmcli.generation.prompts import too_long
from lmcli.generation.sampling import Floats
from lmcli.generation.structure import Structure, form_of
from lmcli.model import finite
from lmcli.terminal.notebook import NotebookTable
from lmcli.text.stream_decoder import StreamDecoder, token_bytes
from lmcli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmcli.kernels.decoding_state import State
    from lmcli.kernels.fast_decoding import FastDecodingState

# (sequences, sources of an encoder–decoder, capacity) → the state after reading them
DecodingStates = Callable[[list[list[int]], list[list[int]] | None, int], "State"]

NO_TOKEN = "no token of the vocabulary that the options allow continues the form of the text"


@dataclass
class Generated(NotebookTable):
    """One continuation; `token_logprobs` are natural logs under the model, before any filter.

    `finish_reason` is "stop" after a stop token, a stop string, or where no token is allowed;
    "length" where the limit was reached. With a `problem` there is no such text. With `logprobs`
    there are `alternatives`: for each token the likeliest (token, text, logprob), likeliest first.
    """

    text: str
    finish_reason: str
    tokens: list[int] = field(repr=False)
    token_logprobs: list[float] = field(repr=False)
    seed: int
    problem: str = ""
    alternatives: list[list[dict[str, Any]]] = field(default_factory=list, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One row: the text, why it ended, its tokens and their log-probability."""
        tokens, logprob = len(self.tokens), sum(self.token_logprobs)
        ended = {"finish_reason": self.finish_reason, "tokens": tokens, "logprob": logprob}
        return [{"text": self.text, **ended, "seed": self.seed}]


def slid(config: ModelConfig, prompt: list[int], result: Generated) -> bool:
    """True if a decoder's window left the beginning of the prompt (ids) or of its text behind."""
    # the last token is not read
    tokens = len(prompt) + len(result.tokens) - 1
    return config.shape == "decoder" and tokens > config.max_position_embeddings


class PromptRow(NamedTuple):
    """A prompt (ids), and the seeds of the results that one row gives.

    Where sources enter while others go on, the sources of its `group` are encoded at once.
    """

    prompt: list[int]
    seeds: list[int]
    group: "Sequence[PromptRow]" = ()


class TextChunk(NamedTuple):
    """New text of prompt number `row`, with its result once it is finished."""

    row: int
    text: str
    result: Generated | None


@dataclass
class Decoder:
    """A decoder or encoder–decoder: `bos` starts a context, `stop_ids`, `stop_strings` end a text.

    `decoding_state` reads texts with the model that `model_config` describes. `decoder_start`
    begins the target of an encoder–decoder (None: as config.json says). With `extendable` states
    prompts enter while others go on. `first_token_at` is when (`time.perf_counter`) a first token
    was chosen, but for beams.
    """

    model_config: ModelConfig
    decoding_state: DecodingStates
    tokenizer: Tokenizer
    bos: list[int]
    stop_ids: list[int]
    config: GenerateConfig
    stop_strings: tuple[str, ...] = ()
    use_cache: bool = True
    decoder_start: int | None = None
    device_type: str = "cpu"
    extendable: bool = False
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        config = self.model_config
        self.has_encoder = config.shape == "encoder-decoder"
        starts = (self.decoder_start, config.decoder_start_token_id, config.bos_token_id, 0)
        self.target_start = next(token for token in starts if token is not None)
        texts = token_bytes(self.tokenizer) if self.config.ban else ()
        self.structure = None
        if form_of(self.config):
            self.structure = Structure(
                self.config, self.tokenizer, config.vocab_size, self.stop_ids
            )
        self.rules = Constraints(self.config, self.stop_ids, config.vocab_size, texts)

    @property
    def context(self) -> int:
        """Tokens the model attends to."""
        return self.model_config.max_position_embeddings

    @property
    def max_source(self) -> int | None:
        """Tokens read of a source, special tokens included; None (no limit): relative positions."""
        return None if self.model_config.positions == "relative" else self.context

    @property
    def one_row_per_sample(self) -> bool:
        """True if each sample is drawn by itself, token by token; a beam search finds several."""
        return self.config.num_beams == 1

    def fit(self, prompt: list[int]) -> list[int]:
        """A prompt (ids), cut if it is longer than the context and `on_long` is "truncate".

        A decoder then keeps the end, and room for new tokens; a source keeps its beginning. Raises
        UserError with "error"; with "slide" a decoder's window starts with the newer half.
        """
        most, how = self.max_source if self.has_encoder else self.context, self.config.on_long
        if most is None or len(prompt) <= most or (how == "slide" and not self.has_encoder):
            return prompt
        if how == "truncate" and self.has_encoder:
            return self._source(prompt)
        if how == "truncate":
            room = min(self.config.max_new_tokens, most // 2) + len(self.bos)
            return self.bos + prompt[-max(1, most - room) :]
        part, ways = ("beginning", "") if self.has_encoder else ("end", " or slide")
        hint = f"shorten it, or read its {part} alone with --on-long truncate{ways}"
        raise too_long(prompt, most, hint)

    def cost(self, prompt: list[int], num_samples: int) -> int:
        """Tokens that a row may fill; a target is rarely twice as long as its source."""
        tokens, limit = len(prompt), self._limit(prompt)
        if self.has_encoder:
            return (tokens + min(limit, 2 * tokens + 32)) * self.config.num_beams
        return min(tokens + limit, self.context) * self.config.num_beams

    def complete(self, prompts: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """The results of each prompt (ids): one for its only seed, or with beams one per seed."""
        if not self.one_row_per_sample:
            return self.beams(prompts, len(seeds[0]))
        return [[result] for result in self.generate(prompts, [seed for (seed,) in seeds])]

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[TextChunk]:
        """Yields a chunk per row and step; row i continues `prompts[i]` (ids), drawn by `seeds[i]`.

        The text of a row depends on its prompt and seed only, not on other rows (up to rounding).
        """
        pairs = list(zip(prompts, seeds, strict=True))
        rows = (PromptRow(prompt, [seed]) for prompt, seed in pairs)
        return self.flow(lambda: next(rows, None), math.inf)

    def flow(self, take: Callable[[], PromptRow | None], max_tokens: float) -> Iterator[TextChunk]:
        """`stream` for prompts that enter as others end; row i is the i-th that `take` returns.

        As many are taken as rows times the longest `cost` fit `max_tokens`, at least one. `take`
        returns None if there is none at present; if no row is left then, the flow ends.
        """
        rows: list[_Row] = []
        state, number, waiting = None, 0, take()
        group: Sequence[PromptRow] | None = None
        sources: Iterator[int] = iter(())  # their numbers in the state
        while rows or waiting:
            entering: list[_Row] = []
            longest = max((self.cost(row.prompt, 1) for row in rows), default=0) if waiting else 0
            while waiting and (self.extendable or not rows):
                longest = max(longest, self.cost(waiting.prompt, 1))
                others = len(rows) + len(entering)
                if others and longest * (others + 1) > max_tokens:
                    break
                if waiting.group is not group:
                    if entering:
                        break
                    group = waiting.group
                    if state and self.has_encoder:
                        encoded = [self._source(row.prompt) for row in group]
                        sources = iter(cast("FastDecodingState", state).read_sources(encoded))
                entering.append(self._row(number, waiting.prompt, waiting.seeds[0]))
                if state and self.has_encoder:
                    entering[-1].source_number = next(sources)
                number, waiting = number + 1, take()
            can_guess = self.extendable and not self.has_encoder and not entering
            alone = rows[0] if len(rows) == 1 and can_guess else None
            if state and alone and (guess := alone.guess()):
                yield from self._verify(cast("FastDecodingState", state), alone, guess)
            else:
                state, rows = self._advance(state, rows, entering)
                self.first_token_at = self.first_token_at or time.perf_counter()
                yield from self._choose(rows, state.logits)
            unfinished = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not self.use_cache or not (unfinished or self.extendable):
                state = None
            elif len(unfinished) < len(rows):
                state.keep(np.array(unfinished, np.int64))
            rows = [rows[i] for i in unfinished]
            waiting = waiting or take()

    def _verify(
        self, state: "FastDecodingState", row: "_Row", guess: list[int]
    ) -> Iterator[TextChunk]:
        """Reads a guess with the newest token, and chooses tokens as long as they are the guess.

        The one after them is chosen too: all are what `_choose` gives one by one, to the bit.
        """
        ahead = state.look_ahead(np.array([row.window[-1], *guess], np.int64))
        for right in range(len(guess) + 1):
            yield from self._choose([row], ahead[right : right + 1])
            if row.finish_reason or row.tokens[-1:] != guess[right : right + 1]:
                break
        state.accept(right + 1)
        row.lookup.learn(len(guess), right)

    def _advance(
        self, state: "State | None", rows: list["_Row"], entering: list["_Row"]
    ) -> tuple["State", list["_Row"]]:
        """Reads the newest token of all rows, and those that enter: they are the last rows then."""
        # full: the longest row reaches the context, or did so before it ended
        if state is None or (not self.extendable and state.full):
            rows = rows + entering
            capacity = self._fit_windows(rows)
            return self._state(rows, capacity), rows
        staying = [i for i, row in enumerate(rows) if len(row.window) <= self.context]
        if self.extendable and not self.has_encoder and len(staying) < len(rows):
            entering = [row for row in rows if len(row.window) > self.context] + entering
            state.keep(np.array(staying, np.int64))
            rows = [rows[i] for i in staying]
        tokens = np.array([row.window[-1] for row in rows], np.int64)
        if entering:
            capacity = self._fit_windows(entering)
            windows = [row.window for row in entering]
            sources = [row.source_number for row in entering] if self.has_encoder else None
            cast("FastDecodingState", state).extend(tokens, windows, capacity, sources)
        else:
            state.add(tokens)
        return state, rows + entering

    def _row(self, number: int, prompt: list[int], seed: int) -> "_Row":
        window, source = list(prompt), []
        if self.has_encoder:
            window, source = [self.target_start], self._source(prompt)
        return _Row(number, window, seed, self, self._limit(prompt), source)

    def _limit(self, prompt: list[int]) -> int:
        """The most new tokens; a target ends at the context too, a decoder's window slides."""
        config = self.config
        length = 1 if self.has_encoder else len(prompt)
        limit = max(1, config.max_length - length) if config.max_length else config.max_new_tokens
        return min(limit, self.context) if self.has_encoder and self.max_source else limit

    def _source(self, ids: list[int]) -> list[int]:
        """A source cut to `max_source` tokens; its last special tokens stay."""
        most, end = self.max_source, self.tokenizer.suffix
        return ids if most is None or len(ids) <= most else ids[: most - len(end)] + end

    def _fit_windows(self, rows: list["_Row"]) -> int:
        """Slides windows beyond the context; returns the most tokens that a row will have."""
        for row in rows:
            if len(row.window) > self.context and not self.has_encoder:
                newest = max(1, self.context // 2 - len(self.bos))
                row.window = self.bos + row.window[-newest:]
        new_tokens = max(row.limit - len(row.tokens) for row in rows)
        capacity = max(len(row.window) for row in rows) + new_tokens
        return capacity if self.has_encoder else min(self.context, capacity)

    def _state(self, rows: list["_Row"], capacity: int) -> "State":
        """The state after the windows of all rows; equal ones are read once."""
        texts = [(tuple(row.window), tuple(row.source)) for row in rows]
        number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        windows, sources = ([list(ids) for ids in column] for column in zip(*number_of))
        state = self.decoding_state(windows, sources if self.has_encoder else None, capacity)
        if len(number_of) < len(texts):  # several samples of a prompt
            state.keep(np.array([number_of[text] for text in texts]))
        return state

    def _sequence_state(
        self, rows: list["_Row"], tokens: list[list[int]], limits: list[int]
    ) -> SequenceState:
        sources = [row.source for row in rows] if self.has_encoder else None
        return sequence_state([row.prompt for row in rows], tokens, limits, sources)

    def _choose(self, rows: list["_Row"], logits: Floats) -> Iterator[TextChunk]:
        """Chooses the next token of every row from logits (B, V)."""
        allowed = logits
        if self.structure:
            allowed = logits.copy()
            for row, scores in zip(rows, allowed):
                row.forbid_by_form(scores)
        if self.rules.active:
            tokens, limits = [row.tokens for row in rows], [row.limit for row in rows]
            allowed = self.rules.apply(allowed, self._sequence_state(rows, tokens, limits))
        normalizers = sampling.log_sum_exp(logits).tolist()
        for row, own, scores, normalizer in zip(rows, logits, allowed, normalizers, strict=True):
            if not math.isfinite(normalizer):
                text = row.end(finite.LOGPROB)
            elif (token := sampling.choose(scores, self.config, row.random)) is None:
                text = row.end()
            else:
                logprob = float(own[token]) - normalizer
                text = row.add(token, logprob, self._alternatives(own, normalizer))
            yield TextChunk(row.number, text, row.result() if row.finish_reason else None)

    def _alternatives(self, logits: Floats, normalizer: float) -> list[dict[str, Any]]:
        """The likeliest tokens by logits (V,); none without `logprobs`."""
        ids = sampling.likeliest(logits, self.config.logprobs) if self.config.logprobs else ()
        logprobs = [(int(token), float(logits[token]) - normalizer) for token in ids]
        text = self.tokenizer.token_text
        return [
            {"token": token, "text": text(token), "logprob": logprob}
            for token, logprob in logprobs
            if logprob > -math.inf  # an impossible token is no alternative
        ]

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        """The finished continuations of `stream`, in order."""
        results = {chunk.row: chunk.result for chunk in self.stream(prompts, seeds) if chunk.result}
        return [results[i] for i in range(len(prompts))]

    def beams(self, prompts: list[list[int]], count: int) -> list[list[Generated]]:
        """The `count` best continuations of each prompt by beam search, best first.

        Deterministic: temperature and filters are not used. A decoder's text ends at the context.
        """
        rows = [self._row(i, prompt, 0) for i, prompt in enumerate(prompts)]
        for row in rows if not self.has_encoder else ():
            if len(row.window) >= self.context:
                kept = min((self.context + 1) // 2, self.context - len(self.bos) - 1)
                row.window = self.bos + row.window[len(self.bos) :][-max(1, kept) :]
            row.limit = min(row.limit, self.context - len(row.window))
        limits = [row.limit for row in rows]
        state = self._state(rows, max(len(row.window) for row in rows) + max(limits))
        written: list[list[int]] = [[] for _ in rows]
        sequences = self._sequence_state(rows, written, limits)
        by_prompt = search(state, sequences, self.rules, self.stop_ids)
        return [
            [self._result(prompt, row, hypothesis) for hypothesis in hypotheses[:count]]
            for prompt, row, hypotheses in zip(prompts, rows, by_prompt)
        ]

    def _result(self, prompt: list[int], searched: "_Row", hypothesis: Hypothesis) -> Generated:
        row = self._row(0, prompt, 0)
        alternatives = self._read_again(searched, hypothesis.tokens)
        for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs):
            if row.finish_reason is None:
                row.add(token, logprob, next(alternatives, []))
        if hypothesis is UNDEFINED:
            row.end(finite.LOGPROB)
        elif len(row.tokens) < searched.limit:
            row.end()
        return row.result()

    def _read_again(self, row: "_Row", tokens: list[int]) -> Iterator[list[dict[str, Any]]]:
        """The alternatives of each token after the window of a row; nothing without `logprobs`."""
        if self.config.logprobs:
            state = self._state([row], len(row.window) + len(tokens))
            for token in tokens:
                (logits,), (normalizer,) = state.logits, sampling.log_sum_exp(state.logits)
                yield self._alternatives(logits, float(normalizer))
                state.add(np.array([token], np.int64))


@dataclass
class _Row:
    """One text while it is generated."""

    number: int
    window: list[int]  # ids the model attends to
    seed: int
    decoder: Decoder
    limit: int  # most new tokens
    source: list[int] = field(default_factory=list)  # ids for the encoder
    source_number: int = 0  # of the source in a state that sources enter
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[dict[str, Any]]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    problem: str = ""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.prompt = list(self.window)
        self._stream = StreamDecoder(self.decoder.tokenizer, self.window)
        structure = self.decoder.structure
        self._form = structure.start(self.window) if structure else None
        self._recent = self._end_of_prompt()
        self._emitted = 0  # characters of `text` returned so far

    def add(self, token: int, logprob: float, alternatives: list[dict[str, Any]]) -> str:
        """Adds one token; returns the text that is certain with it."""
        if not math.isfinite(logprob):
            return self.end(finite.LOGPROB)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.alternatives += [alternatives] if alternatives else []
        self.window.append(token)
        at_limit = len(self.tokens) == self.limit
        if token in self.decoder.stop_ids:
            self.finish_reason = "stop" if self._form is None or self._form.complete else "length"
            return self._emit("")
        if self._form:
            self._form.add(token)
            if self._form.ended or (at_limit and self._form.complete):
                self.finish_reason = "stop"
        if at_limit:
            self.finish_reason = self.finish_reason or "length"
        new = self._stream.push(token)
        if self.decoder.config.stop_strings and self._completes_a_stop_string(token):
            self.finish_reason = "stop"
        return self._emit(new)

    def guess(self) -> list[int]:
        """Tokens that may follow, as far as the text and the context have room for them."""
        room = min(self.limit - len(self.tokens), self.decoder.context - len(self.window) + 1)
        return self.lookup.guess(self.tokens, room - 1) if room > 1 else []

    @cached_property
    def lookup(self) -> PromptLookup:
        """Guesses of the next tokens; made for a text that is alone."""
        return PromptLookup(self.prompt)

    def forbid_by_form(self, scores: Floats) -> None:
        """Sets the scores (V,) of tokens that the form of the text does not allow to −∞."""
        if self._form:
            self._form.forbid(scores)

    def _end_of_prompt(self) -> str:
        """The end of the prompt, in which a stop string of the folder may begin."""
        longest = max(map(len, self.decoder.config.stop_strings), default=0)
        ids = self.window[-longest:] if longest else []
        return "".join(self.decoder.tokenizer.token_text(index) for index in ids)

    def _completes_a_stop_string(self, token: int) -> bool:
        """True if a stop string of the folder ends within the text of this token.

        As in transformers it may begin in the prompt, and a special token counts as its spelling.
        """
        stop_strings = self.decoder.config.stop_strings
        old, new = self._recent, self.decoder.tokenizer.token_text(token)
        self._recent = (old + new)[-max(map(len, stop_strings)) :]
        starts = ((stop, max(0, len(old) - len(stop) + 1)) for stop in stop_strings)
        return any((old + new).find(stop, start) >= 0 for stop, start in starts)

    def end(self, problem: str = "") -> str:
        """Ends the text where no token can follow; returns what was held back."""
        if not problem and self._form and not self._form.complete:
            problem = NO_TOKEN
        self.finish_reason, self.problem = self.finish_reason or "stop", problem
        return self._emit("")

    def _emit(self, new: str) -> str:
        """Appends text and cuts it at a stop string; an end that may become one is held back."""
        checked = len(self.text)
        self.text += new
        for stop in self.decoder.stop_strings:
            at = self.text.find(stop, max(0, checked - len(stop)))
            if at >= 0:
                self.text, self.finish_reason = self.text[:at], "stop"
        held_back = 0 if self.finish_reason else self._partial_stop()
        start, self._emitted = self._emitted, max(self._emitted, len(self.text) - held_back)
        return self.text[start : self._emitted]

    def _partial_stop(self) -> int:
        """Characters of the longest end of the text that begins a stop string."""
        starts = (stop[:n] for stop in self.decoder.stop_strings for n in range(1, len(stop)))
        return max((len(start) for start in starts if self.text.endswith(start)), default=0)

    def result(self) -> Generated:
        """The finished text."""
        reason = self.finish_reason or "length"
        numbers = self.tokens, self.logprobs, self.seed, self.problem, self.alternatives
        return Generated(self.text, reason, *numbers)
