"""Beam search over several prompts at once: one forward pass a step for all beams of all of them.

A text's score is its log-probability divided by its length to the power `length_penalty`. What is kept, and when a search
ends, is as in transformers, so that the same model writes the same tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.inference.constraints import Constraints, Written
from lmcli.inference.reading import Reading

WORST = -1.0e9  # of a beam that is not there yet


class Found(NamedTuple):
    """A text that a search has found; `logprobs` are the model's own, `score` is what it was ranked by."""

    tokens: list[int]
    logprobs: list[float]
    score: float


@dataclass
class _Beams:
    """Beams of P prompts, best first. `scores` (P, K) are log-probabilities of open beams, or what finished ones are
    ranked by; `tokens` (P, K, n) is −1 behind the end; `whole` (P, K) tells beams that are there."""

    scores: Tensor
    tokens: Tensor
    logprobs: Tensor
    whole: Tensor

    def take(self, scores: Tensor, places: Tensor) -> "_Beams":
        """The beams at `places` (P, k) of each prompt, with new scores (P, k)."""
        at = places[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(scores, self.tokens.gather(1, at), self.logprobs.gather(1, at), self.whole.gather(1, places))

    def longer(self, tokens: Tensor, logprobs: Tensor) -> "_Beams":
        """The same with one more token (P, K) each."""
        return _Beams(self.scores, torch.cat([self.tokens, tokens[:, :, None]], 2),
                      torch.cat([self.logprobs, logprobs[:, :, None]], 2), self.whole)

    def best(self, others: "_Beams", count: int) -> "_Beams":
        """The best `count` of these and others."""
        both = _Beams(*(torch.cat(pair, 1) for pair in zip(vars(self).values(), vars(others).values())))
        return both.take(*both.scores.topk(count))

    def rows(self, rows: Tensor) -> "_Beams":
        """The beams of these prompts (P', int64)."""
        return _Beams(*(part[rows] for part in vars(self).values()))

    def found(self, prompt: int) -> list[Found]:
        """The finished texts of a prompt, best first."""
        texts = []
        for score, tokens, logprobs, whole in zip(*(part[prompt].tolist() for part in vars(self).values())):
            length = tokens.index(-1) if -1 in tokens else len(tokens)
            if whole:
                texts.append(Found(tokens[:length], logprobs[:length], score))
        return texts


def search(reading: Reading, at: Written, config: GenerateConfig, stops: list[int]) -> list[list[Found]]:
    """The texts found for each prompt of a fresh Reading, best first, `config.num_beams` where there are so many.

    `at` tells prompts and limits. Rows of the reading are prompts first, then prompts × beams.
    """
    width, device = config.num_beams, reading.logits.device
    kept = max(2, 1 + len(stops)) * width  # so many candidates leave `width` that go on
    rules = Constraints(config, stops, reading.logits.shape[1], device)
    ends = torch.tensor(stops, dtype=torch.long, device=device)
    results: dict[int, list[Found]] = {}
    numbers, since, limits = torch.arange(len(at.limits), device=device), reading.length, at.limits
    none = torch.zeros(len(numbers), width, 0, device=device)
    there = torch.ones(len(numbers), width, dtype=torch.bool, device=device)
    scores = torch.full((len(numbers), width), WORST, device=device)
    finished = _Beams(scores, none.long(), none, ~there)
    running = _Beams(scores.clone(), none.long(), none, there)
    running.scores[:, 0] = 0  # beams of a prompt begin alike: only the first may branch
    while True:
        logprobs = reading.logits.log_softmax(-1)  # (rows, V)
        allowed = rules.apply(logprobs, at) if rules.active else logprobs
        if not at.count:
            repeated = torch.arange(len(numbers), device=device).repeat_interleave(width)
            logprobs, allowed, at = logprobs[repeated], allowed[repeated], at.rows(repeated)
            reading.keep(repeated)
        parents, candidates = _candidates(running, allowed, logprobs, kept)
        final = torch.isin(candidates.tokens[:, :, -1], ends) | (at.count + 1 >= limits)[:, None]  # (P, kept)
        places = (candidates.scores + final * WORST).topk(width)
        running = candidates.take(*places)
        finished = _with_finished(finished, candidates, final, at.count + 1, config, width)
        over = _over(running, finished, final, at.count + 1, limits, config)
        for row in over.nonzero()[:, 0].tolist():
            results[numbers[row].item()] = finished.found(row)
        if over.all():
            return [results[i] for i in range(len(results))]
        source = torch.arange(len(numbers), device=device)[:, None] * width + parents.gather(1, places.indices)  # (P, K)
        if over.any():
            going = (~over).nonzero()[:, 0]
            running, finished, source = running.rows(going), finished.rows(going), source[going]
            numbers, limits = numbers[going], limits[going]
            reading.keep(source.flatten())
        else:
            reading.reorder(source.flatten(), since)
        last = running.tokens[:, :, -1].flatten()
        at = at.rows(source.flatten(), last)
        reading.add(last)


def _candidates(running: _Beams, allowed: Tensor, logprobs: Tensor, count: int) -> tuple[Tensor, _Beams]:
    """(beam continued, beams) of the best `count` continuations of each prompt; `allowed` and `logprobs` are
    (P · K, V), what counts and what the model says."""
    size = allowed.shape[1]
    prompts, width = running.scores.shape
    totals = (running.scores[:, :, None] + allowed.view(prompts, width, size)).flatten(1)  # (P, K · V)
    scores, index = totals.topk(min(count, totals.shape[1]))
    parents, tokens = index // size, index % size
    own = logprobs.view(prompts, -1).gather(1, index)
    return parents, running.take(scores, parents).longer(tokens, own)


def _with_finished(finished: _Beams, candidates: _Beams, final: Tensor, length: int, config: GenerateConfig,
                   width: int) -> _Beams:
    """The best finished texts, those among the best `width` candidates that end here included."""
    ended = final.clone()
    ended[:, width:] = False
    scores = candidates.scores / length ** config.length_penalty + ~ended * WORST
    new = _Beams(scores, candidates.tokens, candidates.logprobs, ended)
    empty = torch.full_like(finished.scores, -1, dtype=torch.long)
    return finished.longer(empty, empty.float()).best(new, width)


def _over(running: _Beams, finished: _Beams, final: Tensor, length: int, limits: Tensor,
          config: GenerateConfig) -> Tensor:
    """Which prompts are done (P,): nothing is left to continue, or by what `early_stopping` says."""
    power, full = config.length_penalty, finished.whole.all(1)
    if config.early_stopping == "never" and power > 0:  # the longest text a beam could become
        longest = torch.tensor([limit ** power for limit in limits.tolist()], device=limits.device)
        reachable = running.scores[:, 0] / longest
    else:
        reachable = running.scores[:, 0] / length ** power
    beaten = full & ~(reachable > finished.scores.amin(1))
    return beaten | final.all(1) | (full & (config.early_stopping == "true"))
