"""Rules on the next token: scores (B, V) → scores with forbidden tokens at −∞, as in transformers.

The settings are those of `generation_config.json`, in the order of transformers' processors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lmcli.config import GenerateConfig
from lmcli.generation.sampling import FORBIDDEN, Flags, Floats, Integers

PADDING = -1  # left padding of shorter histories


@dataclass
class SequenceState:
    """`counts` (B,) new tokens of each text, of at most `limits` (B,), after `prompt_lengths` (B,).

    `history` (B, L) holds prompts and new tokens, left-padded with PADDING.
    """

    counts: Integers
    prompt_lengths: Integers
    limits: Integers
    history: Integers

    def select(self, rows: Integers, tokens: Integers | None = None) -> "SequenceState":
        """The state of these rows (B', int64), extended by one token (B',) each if given."""
        counts, history = self.counts[rows], self.history[rows]
        if tokens is not None:
            counts, history = counts + 1, np.concatenate([history, tokens[:, None]], 1)
        return SequenceState(counts, self.prompt_lengths[rows], self.limits[rows], history)


def sequence_state(
    prompts: list[list[int]], tokens: list[list[int]], limits: list[int]
) -> SequenceState:
    """The SequenceState of prompts and new tokens given as ids."""
    texts = [prompt + new for prompt, new in zip(prompts, tokens)]
    width = max(map(len, texts))
    return SequenceState(
        np.array([len(new) for new in tokens]),
        np.array([len(prompt) for prompt in prompts]),
        np.array(limits),
        np.array([[PADDING] * (width - len(text)) + text for text in texts], np.int64),
    )


class Constraints:
    """The rules that a GenerateConfig sets, for a vocabulary in which `stop_ids` end a text."""

    def __init__(self, config: GenerateConfig, stop_ids: list[int], vocab_size: int):
        self.config, self.size = config, vocab_size
        # an id that the model does not have is in no text
        known = range(vocab_size)
        words = [word for word in config.bad_words_ids if word and all(i in known for i in word)]
        words = [word for word in words if len(word) > 1 or word[0] not in stop_ids]
        self.stop_ids = self._known(stop_ids)
        self.begin_suppressed = self._known(config.begin_suppress_tokens)
        self.suppressed = self._known(config.suppress_tokens)
        self.bad_ids = self._known([word[0] for word in words if len(word) == 1])
        self.bad_words = [np.array(word) for word in words if len(word) > 1]
        has_minimum = bool(stop_ids and (config.min_new_tokens or config.min_length))
        rules: list[tuple[bool, Callable[[Floats, SequenceState], None]]] = [
            (config.repetition_penalty != 1.0, self._penalize_repetition),
            (config.no_repeat_ngram_size > 0, self._block_repeated_ngrams),
            (bool(words), self._block_bad_words),
            (has_minimum, self._require_minimum_length),
            (config.forced_bos_token_id is not None, self._force_first_token),
            (config.forced_eos_token_id is not None, self._force_last_token),
            (bool(config.suppress_tokens), self._suppress),
            (bool(config.begin_suppress_tokens), self._suppress_first),
        ]
        self._rules = [rule for applies, rule in rules if applies]

    @property
    def active(self) -> bool:
        """True if there is any rule."""
        return bool(self._rules)

    def apply(self, scores: Floats, state: SequenceState) -> Floats:
        """Scores (B, V), logits or log-probabilities, after all rules."""
        scores = scores.copy()
        for rule in self._rules:
            rule(scores, state)
        return scores

    def _known(self, ids: Sequence[int]) -> Integers:
        """The ids that the model has, each once."""
        return np.array(sorted({i for i in ids if 0 <= i < self.size}), np.int64)

    def _penalize_repetition(self, scores: Floats, state: SequenceState) -> None:
        seen = np.where(state.history == PADDING, state.history[:, -1:], state.history)
        penalize_repetition(scores, seen, self.config.repetition_penalty)

    def _block_repeated_ngrams(self, scores: Floats, state: SequenceState) -> None:
        block_repeated_ngrams(scores, state.history, self.config.no_repeat_ngram_size)

    def _block_bad_words(self, scores: Floats, state: SequenceState) -> None:
        scores[:, self.bad_ids] = FORBIDDEN
        for word in self.bad_words:
            length = len(word) - 1
            if length <= state.history.shape[1]:
                started = (state.history[:, -length:] == word[:-1]).all(-1)  # (B,)
                scores[started, word[-1]] = FORBIDDEN

    def _require_minimum_length(self, scores: Floats, state: SequenceState) -> None:
        if least := self.config.min_new_tokens:
            too_short = state.counts < least
        else:
            too_short = state.prompt_lengths + state.counts < self.config.min_length
        _forbid(scores, too_short, self.stop_ids)

    def _force(self, scores: Floats, rows: Flags, token: int | None) -> None:
        """Allows only `token` in the rows (B,) that are True."""
        scores[rows] = FORBIDDEN
        scores[rows, token] = 0

    def _force_first_token(self, scores: Floats, state: SequenceState) -> None:
        rows = (state.counts == 0) & (state.prompt_lengths == 1)
        self._force(scores, rows, self.config.forced_bos_token_id)

    def _force_last_token(self, scores: Floats, state: SequenceState) -> None:
        self._force(scores, state.limits == state.counts + 1, self.config.forced_eos_token_id)

    def _suppress(self, scores: Floats, _: SequenceState) -> None:
        scores[:, self.suppressed] = FORBIDDEN

    def _suppress_first(self, scores: Floats, state: SequenceState) -> None:
        # after a forced first token the rule applies to the second
        forced = (state.prompt_lengths == 1) & (self.config.forced_bos_token_id is not None)
        _forbid(scores, state.counts == forced, self.begin_suppressed)


def _forbid(scores: Floats, rows: Flags, ids: Integers) -> None:
    """Forbids `ids` in the rows (B,) that are True."""
    scores[np.ix_(rows, ids)] = FORBIDDEN


def penalize_repetition(scores: Floats, seen: Integers, penalty: float) -> None:
    """Makes the ids `seen` (B, n) less likely by a factor on their logits (Keskar et al. 2019)."""
    values = np.take_along_axis(scores, seen, 1)
    penalized = np.where(values > 0, values / penalty, values * penalty)
    np.put_along_axis(scores, seen, penalized, 1)


def block_repeated_ngrams(scores: Floats, history: Integers, size: int) -> None:
    """Forbids ids that would repeat an n-gram of `size` ids in the history (Paulus et al. 2018).

    `scores` are (B, V), `history` (B, L) is left-padded with PADDING. With size 2, after "the cat
    saw the" the id of "cat" is forbidden.
    """
    length = history.shape[1]
    if length < size:
        return
    started = history[:, length + 1 - size :]  # (B, size − 1): the next token would complete it
    ngrams = sliding_window_view(history, size, 1)  # (B, L − size + 1, size)
    same = (ngrams[:, :, :-1] == started[:, None]).all(-1) & (ngrams[:, :, -1] != PADDING)
    rows, columns = np.nonzero(same)
    scores[rows, ngrams[rows, columns, -1]] = FORBIDDEN
