"""Rules on the next token: scores (B, V) → scores with forbidden tokens at −∞, as in transformers.

The settings are those of `generation_config.json`, in the order of transformers' processors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcli.config import GenerateConfig
from lmcli.generation.sampling import FORBIDDEN, apply_repetition_penalty

PADDING = -1  # left padding of shorter histories


@dataclass
class SequenceState:
    """`count` new tokens of each sequence, of at most `limits` (B,), after `prompt_lengths` (B,).

    `history` (B, L) holds prompts and new tokens, left-padded with PADDING.
    """

    count: int
    prompt_lengths: Tensor
    limits: Tensor
    history: Tensor

    def select(self, rows: Tensor, tokens: Tensor | None = None) -> "SequenceState":
        """The state of these rows (B', int64), extended by one token (B',) each if given."""
        history = self.history[rows]
        if tokens is not None:
            history = torch.cat([history, tokens[:, None]], dim=1)
        count = self.count + (tokens is not None)
        return SequenceState(count, self.prompt_lengths[rows], self.limits[rows], history)


def sequence_state(
    prompts: list[list[int]], tokens: list[list[int]], limits: list[int], device: torch.device
) -> SequenceState:
    """The SequenceState of prompts and new tokens given as ids."""
    texts = [prompt + new for prompt, new in zip(prompts, tokens)]
    width = max(map(len, texts))
    history = [[PADDING] * (width - len(text)) + text for text in texts]
    return SequenceState(
        len(tokens[0]),
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor(limits, device=device),
        torch.tensor(history, device=device),
    )


class Constraints:
    """The rules that a GenerateConfig sets, for a vocabulary in which `stop_ids` end a text."""

    def __init__(
        self, config: GenerateConfig, stop_ids: list[int], vocab_size: int, device: torch.device
    ):
        self.config, self.device, self.size = config, device, vocab_size
        # an id that the model does not have is in no text
        known = range(vocab_size)
        words = [word for word in config.bad_words_ids if word and all(i in known for i in word)]
        words = [word for word in words if len(word) > 1 or word[0] not in stop_ids]
        self.stop_ids = self._mask(stop_ids)
        self.begin_suppressed = self._mask(config.begin_suppress_tokens)
        self.suppressed = self._mask(config.suppress_tokens)
        self.bad_ids = self._mask([word[0] for word in words if len(word) == 1])
        self.bad_words = [torch.tensor(word, device=device) for word in words if len(word) > 1]
        has_minimum = bool(stop_ids and (config.min_new_tokens or config.min_length))
        rules: list[tuple[bool, Callable[[Tensor, SequenceState], Tensor]]] = [
            (config.repetition_penalty != 1.0, self._penalize_repetition),
            (config.no_repeat_ngram_size > 0, self._block_repeated_ngrams),
            (bool(words), self._block_bad_words),
            (has_minimum, self._require_minimum_length),
            (config.forced_bos_token_id is not None, self._force_first_token),
            (config.forced_eos_token_id is not None, self._force_last_token),
            (bool(config.suppress_tokens), lambda x, _: x.masked_fill(self.suppressed, FORBIDDEN)),
            (bool(config.begin_suppress_tokens), self._suppress_first),
        ]
        self._rules = [rule for applies, rule in rules if applies]

    @property
    def active(self) -> bool:
        """True if there is any rule."""
        return bool(self._rules)

    def apply(self, scores: Tensor, state: SequenceState) -> Tensor:
        """Scores (B, V), logits or log-probabilities, after all rules."""
        for rule in self._rules:
            scores = rule(scores, state)
        return scores

    def _mask(self, ids: Sequence[int]) -> Tensor:
        """(V,) bool, True for `ids`; ids outside the model's vocabulary are ignored."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[[i for i in ids if 0 <= i < self.size]] = True
        return mask

    def _penalize_repetition(self, scores: Tensor, state: SequenceState) -> Tensor:
        seen = torch.where(state.history == PADDING, state.history[:, -1:], state.history)
        return apply_repetition_penalty(scores, seen, self.config.repetition_penalty)

    def _block_repeated_ngrams(self, scores: Tensor, state: SequenceState) -> Tensor:
        return block_repeated_ngrams(scores, state.history, self.config.no_repeat_ngram_size)

    def _block_bad_words(self, scores: Tensor, state: SequenceState) -> Tensor:
        scores = scores.masked_fill(self.bad_ids, FORBIDDEN)
        for word in self.bad_words:
            length = len(word) - 1
            if word[-1] < self.size and length <= state.history.shape[1]:
                started = (state.history[:, -length:] == word[:-1]).all(-1)  # (B,)
                blocked = scores.index_fill(1, word[-1:], FORBIDDEN)
                scores = torch.where(started[:, None], blocked, scores)
        return scores

    def _require_minimum_length(self, scores: Tensor, state: SequenceState) -> Tensor:
        if least := self.config.min_new_tokens:
            too_short = torch.full_like(state.limits, state.count) < least  # (B,)
        else:
            too_short = state.prompt_lengths + state.count < self.config.min_length
        return scores.masked_fill(too_short[:, None] & self.stop_ids, FORBIDDEN)

    def _force(self, scores: Tensor, rows: Tensor, token: int | None) -> Tensor:
        """Allows only `token` in the rows (B,) that are True."""
        forced = torch.full_like(scores, FORBIDDEN)
        forced[:, token] = 0
        return torch.where(rows[:, None], forced, scores)

    def _force_first_token(self, scores: Tensor, state: SequenceState) -> Tensor:
        if state.count:
            return scores
        return self._force(scores, state.prompt_lengths == 1, self.config.forced_bos_token_id)

    def _force_last_token(self, scores: Tensor, state: SequenceState) -> Tensor:
        last = state.limits == state.count + 1
        return self._force(scores, last, self.config.forced_eos_token_id)

    def _suppress_first(self, scores: Tensor, state: SequenceState) -> Tensor:
        if state.count > 1:
            return scores
        # after a forced first token the rule applies to the second
        forced = (state.prompt_lengths == 1) & (self.config.forced_bos_token_id is not None)
        rows = forced == bool(state.count)
        return scores.masked_fill(rows[:, None] & self.begin_suppressed, FORBIDDEN)


def block_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Forbids ids that would repeat an n-gram of `size` ids in the history (Paulus et al. 2018).

    `scores` are (B, V), `history` (B, L) is left-padded with PADDING. With size 2, after "the cat
    saw the" the id of "cat" is forbidden.
    """
    length = history.shape[1]
    if length < size:
        return scores
    started = history[:, length + 1 - size :]  # (B, size − 1): the next token would complete it
    ngrams = history.unfold(1, size, 1)  # (B, L − size + 1, size)
    same = (ngrams[:, :, :-1] == started[:, None]).all(-1) & (ngrams[:, :, -1] != PADDING)
    # n-grams that do not match are scattered to an extra column, which is cut off
    columns = scores.new_zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool)
    ends = ngrams[:, :, -1].where(same, scores.shape[1])
    return scores.masked_fill(columns.scatter(1, ends, True)[:, :-1], FORBIDDEN)
