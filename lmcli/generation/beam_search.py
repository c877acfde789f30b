"""Beam search over several prompts at once: one forward pass a step for all beams of all prompts.

The score of a text is its log-probability divided by its length to the power `length_penalty`.
Which beams are kept, and when a search ends, follows transformers: equal models give equal tokens.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmcli.config import GenerateConfig
from lmcli.generation.constraints import Constraints, SequenceState
from lmcli.generation.sampling import Flags, Floats, Integers, log_sum_exp
from lmcli.kernels import build
from lmcli.kernels.decode_step import largest_columns

if TYPE_CHECKING:
    from lmcli.kernels.decoding_state import State

WORST = -1.0e9  # score of a beam that does not exist or has ended, below those that go on
GROUP_COLUMNS = 64  # columns of a group, of which only the largest score is compared at first
NOTHING = -np.inf  # score of a finished text that does not exist, below all that do


class Hypothesis(NamedTuple):
    """A finished text; `logprobs` are the model's own, the search ranks by `score`."""

    tokens: list[int]
    logprobs: list[float]
    score: float


class _Scored(NamedTuple):
    """Logits of the next token of each beam (P · K, V), and what ranks them: allowed − shift."""

    logits: Floats
    sums: Floats  # (P · K, 1): logits − sums are log-probabilities
    allowed: Floats  # of forbidden tokens −∞
    shift: Floats  # (P · K, 1)


UNDEFINED = Hypothesis([], [], math.nan)


@dataclass
class _Beams:
    """K beams of each of P prompts, best first; `valid` (P, K) is False for those that are none.

    That is places without a beam, copies of the first one before the first step, beams that have
    ended, and beams with a forbidden token.

    `scores` (P, K): log-probabilities of open beams, ranking scores of finished ones. `tokens` and
    `logprobs` (P, K, n); tokens are −1 after the end.
    """

    scores: Floats
    tokens: Integers
    logprobs: Floats
    valid: Flags

    def take(self, scores: Floats, indices: Integers) -> "_Beams":
        """The beams at `indices` (P, k) of each prompt, with new scores (P, k)."""
        rows = np.arange(len(indices))[:, None]
        tokens, logprobs = self.tokens[rows, indices], self.logprobs[rows, indices]
        return _Beams(scores, tokens, logprobs, self.valid[rows, indices])

    def extend(self, tokens: Integers, logprobs: Floats) -> "_Beams":
        """The beams with one more token (P, K) each."""
        tokens = np.concatenate([self.tokens, tokens[:, :, None]], 2)
        logprobs = np.concatenate([self.logprobs, logprobs[:, :, None]], 2)
        return _Beams(self.scores, tokens, logprobs, self.valid)

    def best(self, others: "_Beams", count: int) -> "_Beams":
        """The best `count` of these beams and others."""
        pairs = zip(vars(self).values(), vars(others).values())
        both = _Beams(*(np.concatenate(pair, 1) for pair in pairs))
        return both.take(*_largest(both.scores, count))

    def prompts(self, rows: Integers) -> "_Beams":
        """The beams of these prompts (P', int64)."""
        return _Beams(*(array[rows] for array in vars(self).values()))

    def hypotheses(self, prompt: int) -> list[Hypothesis]:
        """The finished texts of a prompt, best first."""
        texts = []
        rows = zip(*(array[prompt].tolist() for array in vars(self).values()))
        for score, tokens, logprobs, valid in rows:
            length = tokens.index(-1) if -1 in tokens else len(tokens)
            if valid:
                texts.append(Hypothesis(tokens[:length], logprobs[:length], score))
        return texts


def search(
    decoding: "State", state: SequenceState, rules: Constraints, stop_ids: list[int]
) -> list[list[Hypothesis]]:
    """The best texts of each prompt, best first, at most `config.num_beams`.

    `decoding` has read the prompts, a row each; the search turns it into prompts × beams. A text
    after which no token is allowed ends there. There are fewer texts only if no more exist: a
    vocabulary of 3 has 3 texts of one token. A prompt for which the model's numbers are NaN has
    the text UNDEFINED.
    """
    config, width = rules.config, rules.config.num_beams
    candidate_count = max(2, 1 + len(stop_ids)) * width  # enough that `width` of them continue
    results: dict[int, list[Hypothesis]] = {}
    prompts, limits = np.arange(len(state.limits)), state.limits
    running, finished = _first_beams(len(prompts), width)
    while True:
        logits, sums = decoding.logits, log_sum_exp(decoding.logits).astype(np.float32)[:, None]
        scored = _Scored(logits, sums, logits, sums)
        if rules.active:
            scored = _Scored(logits, sums, rules.apply(logits - sums, state), np.zeros_like(sums))
        written = int(state.counts[0])
        if not written:  # the first step: from a row per prompt to a row per beam
            repeated = np.arange(len(prompts)).repeat(width)
            scored, state = _Scored(*(each[repeated] for each in scored)), state.select(repeated)
            decoding.keep(repeated)
        if rules.active:
            finished = _with_dead_ends(finished, running, scored.allowed, written, config)
        # extend the beams; candidates that end here become finished texts
        length = written + 1
        parents, candidates = _candidates(running, scored, candidate_count)
        final = np.isin(candidates.tokens[:, :, -1], stop_ids)  # (P, candidates)
        final |= (length >= limits)[:, None]
        open_scores = np.where(final, candidates.scores + WORST, candidates.scores)
        scores, best = _largest(open_scores, width)
        running = candidates.take(scores, best)
        running.valid &= ~np.take_along_axis(final, best, 1)
        finished = _with_finished(finished, candidates, final, length, config)
        # collect the prompts that are done
        undefined: Flags = np.asarray(np.isnan(candidates.scores).any(1))
        done = undefined | ~np.asarray(running.valid.any(1))
        done |= _unbeatable(running, finished, length, limits, config)
        for row in np.nonzero(done)[0].tolist():
            texts = [UNDEFINED] if undefined[row] else finished.hypotheses(row)
            results[int(prompts[row])] = texts
        if done.all():
            return [results[i] for i in range(len(results))]
        # move cache rows to the beams that continue, then read their new tokens
        source = np.take_along_axis(parents, best, 1)  # (P, K): beams of the same prompt
        if done.any():
            open_rows = np.nonzero(~done)[0]
            running, finished = running.prompts(open_rows), finished.prompts(open_rows)
            prompts, limits, source = prompts[open_rows], limits[open_rows], source[open_rows]
            open_beams = (open_rows[:, None] * width + np.arange(width)).flatten()
            decoding.keep(open_beams)
            state = state.select(open_beams)
        source = (source + np.arange(len(prompts))[:, None] * width).flatten()
        decoding.reorder(source, written)
        tokens = running.tokens[:, :, -1].flatten()
        state = state.select(source, tokens)
        decoding.add(tokens)


def _largest(scores: Floats, count: int) -> tuple[Floats, Integers]:
    """(values, indices), each (P, count), of the largest scores (P, N), NaN first; descending."""
    indices = np.arange(count)[None].repeat(len(scores), 0)
    if count < scores.shape[1]:
        indices = np.argpartition(scores, -count, 1)[:, -count:]
    values = np.take_along_axis(scores, indices, 1)
    order = np.argsort(values, 1, kind="stable")[:, ::-1]
    return np.take_along_axis(values, order, 1), np.take_along_axis(indices, order, 1)


def _best_columns(scores: Floats, count: int) -> Integers:
    """Columns (R, n) among which are those of the `count` largest scores (R, V) of each row.

    Without the kernels they are the columns of the `count` groups with the largest maximum, and
    those in no group. Group i of G has the columns i, i + G, i + 2 G and so on.
    """
    if build.is_loaded():
        return largest_columns(scores, count)
    size = scores.shape[1]
    groups = size // GROUP_COLUMNS
    if groups <= 2 * count:
        return np.arange(size)[None].repeat(len(scores), 0)
    maxima = scores[:, : groups * GROUP_COLUMNS].reshape(-1, GROUP_COLUMNS, groups).max(1)
    best = np.argpartition(maxima, -count, 1)[:, None, -count:]  # NaN is the largest
    columns = (best + groups * np.arange(GROUP_COLUMNS)[:, None]).reshape(len(scores), -1)
    ungrouped = np.arange(groups * GROUP_COLUMNS, size)[None].repeat(len(scores), 0)
    return np.concatenate([columns, ungrouped], 1)


def _first_beams(prompts: int, width: int) -> tuple[_Beams, _Beams]:
    """(running, finished) before the first step."""
    tokens = np.zeros((prompts, width, 0), np.int64)
    logprobs = np.zeros((prompts, width, 0), np.float32)
    valid = np.zeros((prompts, width), np.bool_)
    scores = np.full((prompts, width), WORST, np.float32)
    running = _Beams(scores, tokens, logprobs, valid.copy())
    # all beams of a prompt are equal: only the first may branch
    running.scores[:, 0], running.valid[:, 0] = 0, True
    return running, _Beams(np.full_like(scores, NOTHING), tokens, logprobs, valid)


def _candidates(running: _Beams, scored: _Scored, count: int) -> tuple[Integers, _Beams]:
    """(beams continued, new beams) of the best `count` continuations of each prompt."""
    prompts, width = running.scores.shape
    columns = _best_columns(scored.allowed, count)  # (P · K, n)
    added = np.take_along_axis(scored.allowed, columns, 1) - scored.shift
    added = added.reshape(prompts, width, -1)
    totals = (running.scores[:, :, None] + added).reshape(prompts, -1)
    scores, index = _largest(totals, min(count, totals.shape[1]))
    parents = index // columns.shape[1]
    tokens = np.take_along_axis(columns.reshape(prompts, -1), index, 1)
    rows = np.arange(prompts)[:, None] * width + parents
    token_logprobs = scored.logits[rows, tokens] - scored.sums[rows, 0]
    candidates = running.take(scores, parents).extend(tokens, token_logprobs)
    candidates.valid &= scores > -np.inf
    return parents, candidates


def _with_dead_ends(
    finished: _Beams, running: _Beams, allowed: Floats, length: int, config: GenerateConfig
) -> _Beams:
    """The best finished texts, with those of the running ones that no token may follow."""
    shape = running.scores.shape
    ended = running.valid & (allowed.max(-1) == -np.inf).reshape(shape)
    if not ended.any():
        return finished
    scores = np.where(ended, _ranking(running.scores, max(1, length), config), NOTHING)
    return finished.best(_Beams(scores, running.tokens, running.logprobs, ended), shape[1])


def _ranking(scores: Floats, length: int, config: GenerateConfig) -> Floats:
    """Log-probabilities divided by length to the power of `length_penalty`."""
    # a strong penalty may divide by 0; the text is still better than none
    scores = _per_length(scores, length, config.length_penalty)
    return np.maximum(scores, np.finfo(np.float32).min)


def _per_length(scores: Floats, lengths: Integers | int, power: float) -> Floats:
    """Scores divided by lengths to a power, which may be 0 or infinite in float32."""
    with np.errstate(all="ignore"):
        result: Floats = scores / np.power(np.float64(lengths), power).astype(np.float32)
    return result


def _with_finished(
    finished: _Beams, candidates: _Beams, final: Flags, length: int, config: GenerateConfig
) -> _Beams:
    """The best finished texts, with those of the best `width` candidates that end here."""
    width = finished.scores.shape[1]
    ended = final & candidates.valid
    ended[:, width:] = False
    scores = np.where(ended, _ranking(candidates.scores, length, config), NOTHING)
    new = _Beams(scores, candidates.tokens, candidates.logprobs, ended)
    padding = np.full_like(finished.scores, -1, np.int64)
    return finished.extend(padding, padding.astype(np.float32)).best(new, width)


def _unbeatable(
    running: _Beams, finished: _Beams, length: int, limits: Integers, config: GenerateConfig
) -> Flags:
    """(P,) True for prompts whose finished texts are the best by the rule of `early_stopping`."""
    power, full, lengths = config.length_penalty, finished.valid.all(1), limits
    if config.early_stopping != "never" or power <= 0:  # else at the longest text of a beam
        lengths = np.full_like(limits, length)
    reachable = _per_length(running.scores[:, 0], lengths, power)
    beaten = ~(reachable > finished.scores.min(1))
    return full & (beaten | (config.early_stopping == "true"))
