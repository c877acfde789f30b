"""Beam search over several prompts at once: one forward pass a step for all beams of all prompts.

The score of a text is its log-probability divided by its length to the power `length_penalty`.
Which beams are kept, and when a search ends, follows transformers: equal models give equal tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.generation.constraints import Constraints, SequenceState
from lmcli.kernels.fast_decoding import State

WORST = -1.0e9  # score of a beam that does not exist or has ended, below those that go on
NOTHING = -torch.inf  # score of a finished text that does not exist, below all that do


class Hypothesis(NamedTuple):
    """A finished text; `logprobs` are the model's own, the search ranks by `score`."""

    tokens: list[int]
    logprobs: list[float]
    score: float


UNDEFINED = Hypothesis([], [], math.nan)


@dataclass
class _Beams:
    """K beams of each of P prompts, best first; `valid` (P, K) is False for those that are none.

    That is places without a beam, copies of the first one before the first step, beams that have
    ended, and beams with a forbidden token.

    `scores` (P, K): log-probabilities of open beams, ranking scores of finished ones. `tokens` and
    `logprobs` (P, K, n); tokens are −1 after the end.
    """

    scores: Tensor
    tokens: Tensor
    logprobs: Tensor
    valid: Tensor

    def take(self, scores: Tensor, indices: Tensor) -> "_Beams":
        """The beams at `indices` (P, k) of each prompt, with new scores (P, k)."""
        columns = indices[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(
            scores,
            self.tokens.gather(1, columns),
            self.logprobs.gather(1, columns),
            self.valid.gather(1, indices),
        )

    def extend(self, tokens: Tensor, logprobs: Tensor) -> "_Beams":
        """The beams with one more token (P, K) each."""
        tokens = torch.cat([self.tokens, tokens[:, :, None]], 2)
        logprobs = torch.cat([self.logprobs, logprobs[:, :, None]], 2)
        return _Beams(self.scores, tokens, logprobs, self.valid)

    def best(self, others: "_Beams", count: int) -> "_Beams":
        """The best `count` of these beams and others."""
        pairs = zip(vars(self).values(), vars(others).values())
        both = _Beams(*(torch.cat(pair, 1) for pair in pairs))
        return both.take(*both.scores.topk(count))

    def prompts(self, rows: Tensor) -> "_Beams":
        """The beams of these prompts (P', int64)."""
        return _Beams(*(tensor[rows] for tensor in vars(self).values()))

    def hypotheses(self, prompt: int) -> list[Hypothesis]:
        """The finished texts of a prompt, best first."""
        texts = []
        rows = zip(*(tensor[prompt].tolist() for tensor in vars(self).values()))
        for score, tokens, logprobs, valid in rows:
            length = tokens.index(-1) if -1 in tokens else len(tokens)
            if valid:
                texts.append(Hypothesis(tokens[:length], logprobs[:length], score))
        return texts


def search(
    decoding: State, state: SequenceState, config: GenerateConfig, stop_ids: list[int]
) -> list[list[Hypothesis]]:
    """The best texts of each prompt, best first, at most `config.num_beams`.

    `decoding` has read the prompts, a row each; the search turns it into prompts × beams. A text
    after which no token is allowed ends there. There are fewer texts only if no more exist: a
    vocabulary of 3 has 3 texts of one token. A prompt for which the model's numbers are NaN has
    the text UNDEFINED.
    """
    width, device = config.num_beams, decoding.logits.device
    candidate_count = max(2, 1 + len(stop_ids)) * width  # enough that `width` of them continue
    rules = Constraints(config, stop_ids, decoding.logits.shape[1], device)
    ends = torch.tensor(stop_ids, dtype=torch.long, device=device)
    results: dict[int, list[Hypothesis]] = {}
    prompts, limits = torch.arange(len(state.limits), device=device), state.limits
    prompt_columns = decoding.length
    running, finished = _first_beams(len(prompts), width, device)
    while True:
        logprobs = decoding.logits.log_softmax(-1)  # (rows, V)
        allowed = rules.apply(logprobs, state) if rules.active else logprobs
        if not state.count:  # the first step: from a row per prompt to a row per beam
            repeated = torch.arange(len(prompts), device=device).repeat_interleave(width)
            logprobs, allowed, state = logprobs[repeated], allowed[repeated], state.select(repeated)
            decoding.keep(repeated)
        if rules.active:
            finished = _with_dead_ends(finished, running, allowed, state.count, config)
        # extend the beams; candidates that end here become finished texts
        length = state.count + 1
        parents, candidates = _candidates(running, allowed, logprobs, candidate_count)
        final = torch.isin(candidates.tokens[:, :, -1], ends)  # (P, candidates)
        final |= (length >= limits)[:, None]
        best = (candidates.scores + final * WORST).topk(width)
        running = candidates.take(*best)
        running.valid &= ~final.gather(1, best.indices)
        finished = _with_finished(finished, candidates, final, length, config)
        # collect the prompts that are done
        undefined = candidates.scores.isnan().any(1)
        done = undefined | ~running.valid.any(1)
        done |= _unbeatable(running, finished, length, limits, config)
        for row in done.nonzero()[:, 0].tolist():
            texts = [UNDEFINED] if undefined[row] else finished.hypotheses(row)
            results[int(prompts[row])] = texts
        if done.all():
            return [results[i] for i in range(len(results))]
        # move cache rows to the beams that continue, then read their new tokens
        first_rows = torch.arange(len(prompts), device=device)[:, None] * width
        source = first_rows + parents.gather(1, best.indices)  # (P, K)
        if done.any():
            open_rows = (~done).nonzero()[:, 0]
            running, finished = running.prompts(open_rows), finished.prompts(open_rows)
            prompts, limits, source = prompts[open_rows], limits[open_rows], source[open_rows]
            decoding.keep(source.flatten())
        else:
            decoding.reorder(source.flatten(), prompt_columns)
        tokens = running.tokens[:, :, -1].flatten()
        state = state.select(source.flatten(), tokens)
        decoding.add(tokens)


def _first_beams(prompts: int, width: int, device: torch.device) -> tuple[_Beams, _Beams]:
    """(running, finished) before the first step."""
    empty = torch.zeros(prompts, width, 0, device=device)
    valid = torch.zeros(prompts, width, dtype=torch.bool, device=device)
    scores = torch.full((prompts, width), WORST, device=device)
    running = _Beams(scores, empty.long(), empty, valid.clone())
    # all beams of a prompt are equal: only the first may branch
    running.scores[:, 0], running.valid[:, 0] = 0, True
    return running, _Beams(torch.full_like(scores, NOTHING), empty.long(), empty, valid)


def _candidates(
    running: _Beams, allowed: Tensor, logprobs: Tensor, count: int
) -> tuple[Tensor, _Beams]:
    """(beams continued, new beams) of the best `count` continuations of each prompt.

    `allowed` (P · K, V) ranks them; `logprobs` (P · K, V) are the model's.
    """
    size = allowed.shape[1]
    prompts, width = running.scores.shape
    totals = (running.scores[:, :, None] + allowed.view(prompts, width, size)).flatten(1)
    scores, index = totals.topk(min(count, totals.shape[1]))
    parents, tokens = index // size, index % size
    token_logprobs = logprobs.view(prompts, -1).gather(1, index)
    candidates = running.take(scores, parents).extend(tokens, token_logprobs)
    candidates.valid &= scores > -torch.inf
    return parents, candidates


def _with_dead_ends(
    finished: _Beams, running: _Beams, allowed: Tensor, length: int, config: GenerateConfig
) -> _Beams:
    """The best finished texts, with those of the running ones that no token may follow."""
    shape = running.scores.shape
    ended = running.valid & (allowed.amax(-1) == -torch.inf).view(shape)
    if not ended.any():
        return finished
    scores = _ranking(running.scores, max(1, length), config).masked_fill(~ended, NOTHING)
    return finished.best(_Beams(scores, running.tokens, running.logprobs, ended), shape[1])


def _ranking(scores: Tensor, length: int, config: GenerateConfig) -> Tensor:
    """Log-probabilities divided by length to the power of `length_penalty`."""
    # a strong penalty may divide by 0; the text is still better than none
    return (scores / length**config.length_penalty).clamp(min=torch.finfo(scores.dtype).min)


def _with_finished(
    finished: _Beams, candidates: _Beams, final: Tensor, length: int, config: GenerateConfig
) -> _Beams:
    """The best finished texts, with those of the best `width` candidates that end here."""
    width = finished.scores.shape[1]
    ended = final & candidates.valid
    ended[:, width:] = False
    scores = _ranking(candidates.scores, length, config).masked_fill(~ended, NOTHING)
    new = _Beams(scores, candidates.tokens, candidates.logprobs, ended)
    padding = torch.full_like(finished.scores, -1, dtype=torch.long)
    return finished.extend(padding, padding.float()).best(new, width)


def _unbeatable(
    running: _Beams, finished: _Beams, length: int, limits: Tensor, config: GenerateConfig
) -> Tensor:
    """(P,) True for prompts whose finished texts are the best by the rule of `early_stopping`."""
    power, full = config.length_penalty, finished.valid.all(1)
    if config.early_stopping == "never" and power > 0:  # at the longest text a beam could become
        divisors = torch.tensor([limit**power for limit in limits.tolist()], device=limits.device)
        reachable = running.scores[:, 0] / divisors
    else:
        reachable = running.scores[:, 0] / length**power
    beaten = ~(reachable > finished.scores.amin(1))
    return full & (beaten | (config.early_stopping == "true"))
