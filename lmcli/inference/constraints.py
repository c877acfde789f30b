"""What a text must or must not say next: scores (B, V) → scores with what is forbidden at −∞, as transformers does it.

The settings are those of `generation_config.json`; their order is that of transformers' processors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.inference.sampling import NEVER, apply_repetition_penalty

NOTHING = -1  # stands in front of a shorter history


@dataclass
class Written:
    """Where texts stand. `count` tokens were written of each, to prompts of `prompts` (B,) tokens; each may have `limits`
    (B,) in all. `history` (B, L) holds prompt and tokens, filled up on the left with NOTHING."""

    count: int
    prompts: Tensor
    limits: Tensor
    history: Tensor

    def rows(self, rows: Tensor, tokens: Tensor | None = None) -> "Written":
        """The same of other rows (B', int64), one token (B',) further if `tokens` are given."""
        history = self.history[rows]
        if tokens is not None:
            history = torch.cat([history, tokens[:, None]], dim=1)
        return Written(self.count + (tokens is not None), self.prompts[rows], self.limits[rows], history)


def written(prompts: list[list[int]], tokens: list[list[int]], limits: list[int], device: torch.device) -> Written:
    """A Written for texts given as lists of ids; all have equally many tokens."""
    texts = [prompt + new for prompt, new in zip(prompts, tokens)]
    width = max(map(len, texts))
    history = [[NOTHING] * (width - len(text)) + text for text in texts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return Written(len(tokens[0]), lengths, torch.tensor(limits, device=device), torch.tensor(history, device=device))


class Constraints:
    """The rules of a GenerateConfig for a vocabulary in which `stops` end a text. `active` is False when there are none."""

    def __init__(self, config: GenerateConfig, stops: list[int], vocab_size: int, device: torch.device):
        self.config, self.device, self.size = config, device, vocab_size
        words = [word for word in config.bad_words_ids if word and tuple(word) not in {(stop,) for stop in stops}]
        self.stops, self.begin = self._mask(stops), self._mask(config.begin_suppress_tokens)
        self.suppressed = self._mask(config.suppress_tokens)
        self.bad_ids = self._mask([word[0] for word in words if len(word) == 1])
        self.bad_words = [torch.tensor(word, device=device) for word in words if len(word) > 1]
        rules: list[tuple[bool, Callable[[Tensor, Written], Tensor]]] = [
            (config.repetition_penalty != 1.0, self._penalize),
            (config.no_repeat_ngram_size > 0, lambda scores, at: without_repeats(
                scores, at.history, config.no_repeat_ngram_size)),
            (bool(words), self._without_bad_words),
            (bool(stops and (config.min_new_tokens or config.min_length)), self._not_yet_over),
            (config.forced_bos_token_id is not None, self._begin_as_forced),
            (config.forced_eos_token_id is not None, self._end_as_forced),
            (bool(config.suppress_tokens), lambda scores, _: scores.masked_fill(self.suppressed, NEVER)),
            (bool(config.begin_suppress_tokens), self._begin_without)]
        self._rules = [rule for holds, rule in rules if holds]

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self._rules)

    def apply(self, scores: Tensor, at: Written) -> Tensor:
        """Scores (B, V), logits or log-probabilities, after all rules."""
        for rule in self._rules:
            scores = rule(scores, at)
        return scores

    def _mask(self, ids: list[int] | tuple[int, ...]) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[[i for i in ids if 0 <= i < self.size]] = True  # what the model cannot write is forbidden already
        return mask

    def _penalize(self, scores: Tensor, at: Written) -> Tensor:
        seen = torch.where(at.history == NOTHING, at.history[:, -1:], at.history)
        return apply_repetition_penalty(scores, seen, self.config.repetition_penalty)

    def _without_bad_words(self, scores: Tensor, at: Written) -> Tensor:
        scores = scores.masked_fill(self.bad_ids, NEVER)
        for word in self.bad_words:
            start = len(word) - 1
            if word[-1] < self.size and start <= at.history.shape[1]:
                begun = (at.history[:, -start:] == word[:-1]).all(-1)  # (B,)
                scores = scores.index_fill(1, word[-1:], NEVER).where(begun[:, None], scores)
        return scores

    def _not_yet_over(self, scores: Tensor, at: Written) -> Tensor:
        if self.config.min_new_tokens:
            return scores.masked_fill(self.stops, NEVER) if at.count < self.config.min_new_tokens else scores
        early = at.prompts + at.count < self.config.min_length  # (B,)
        return scores.masked_fill(early[:, None] & self.stops, NEVER)

    def _only(self, scores: Tensor, rows: Tensor, token: int) -> Tensor:
        forced = torch.full_like(scores, NEVER)
        forced[:, token] = 0
        return torch.where(rows[:, None], forced, scores)

    def _begin_as_forced(self, scores: Tensor, at: Written) -> Tensor:
        return scores if at.count else self._only(scores, at.prompts == 1, self.config.forced_bos_token_id)

    def _end_as_forced(self, scores: Tensor, at: Written) -> Tensor:
        return self._only(scores, at.limits == at.count + 1, self.config.forced_eos_token_id)

    def _begin_without(self, scores: Tensor, at: Written) -> Tensor:
        if at.count > 1:
            return scores
        forced = (at.prompts == 1) & (self.config.forced_bos_token_id is not None)
        return scores.masked_fill((forced == bool(at.count))[:, None] & self.begin, NEVER)


def without_repeats(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Scores (B, V) with −∞ for each id that would make the last `size` ids of a text (history, B × L, filled up on the
    left with NOTHING) stand in it a second time (Paulus et al. 2018).

    With size 2, after "the cat saw the" the id of "cat" is forbidden.
    """
    length = history.shape[1]
    if length < size:
        return scores
    begun = history[:, length + 1 - size:]  # (B, size − 1): what the next token would complete
    rows = history.unfold(1, size, 1)  # (B, L − size + 1, size)
    same = (rows[:, :, :-1] == begun[:, None]).all(-1) & (rows[:, :, -1] != NOTHING)
    size_and_one = scores.new_zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool)
    forbidden = size_and_one.scatter(1, rows[:, :, -1].where(same, scores.shape[1]), True)[:, :-1]
    return scores.masked_fill(forbidden, NEVER)
