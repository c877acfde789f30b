"""Rules on the next token: scores (B, V) → scores with forbidden tokens at −∞, as in transformers.

The settings are those of `generation_config.json`, in the order of transformers' processors.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lmcli.config import GenerateConfig
from lmcli.generation.sampling import FORBIDDEN, Flags, Floats, Integers, log_sum_exp

PADDING = -1  # left padding of shorter histories


@dataclass
class SequenceState:
    """`counts` (B,) new tokens of each text, of at most `limits` (B,), after `prompt_lengths` (B,).

    `history` (B, L) holds prompts and new tokens, left-padded with PADDING; `sources` are the ids
    that the encoder has read, or the prompts.
    """

    counts: Integers
    prompt_lengths: Integers
    limits: Integers
    history: Integers
    sources: list[list[int]]

    def select(self, rows: Integers, tokens: Integers | None = None) -> "SequenceState":
        """The state of these rows (B', int64), extended by one token (B',) each if given."""
        counts, history = self.counts[rows], self.history[rows]
        if tokens is not None:
            counts, history = counts + 1, np.concatenate([history, tokens[:, None]], 1)
        sources = [self.sources[row] for row in rows.tolist()]
        return SequenceState(counts, self.prompt_lengths[rows], self.limits[rows], history, sources)


def sequence_state(
    prompts: list[list[int]],
    tokens: list[list[int]],
    limits: list[int],
    sources: list[list[int]] | None = None,
) -> SequenceState:
    """The SequenceState of prompts, new tokens and sources (None: the prompts) given as ids."""
    texts = [prompt + new for prompt, new in zip(prompts, tokens)]
    width = max(map(len, texts))
    return SequenceState(
        np.array([len(new) for new in tokens]),
        np.array([len(prompt) for prompt in prompts]),
        np.array(limits),
        np.array([[PADDING] * (width - len(text)) + text for text in texts], np.int64),
        prompts if sources is None else sources,
    )


class Constraints:
    """The rules that a GenerateConfig sets, for a vocabulary in which `stop_ids` end a text.

    `token_bytes` are the bytes of each id, for `ban` (see text/stream_decoder.py).
    """

    def __init__(
        self,
        config: GenerateConfig,
        stop_ids: list[int],
        vocab_size: int,
        token_bytes: Sequence[bytes] = (),
    ):
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
        self.biases = [(np.array(ids), value) for ids, value in config.sequence_bias if ids]
        self.banned = BannedTexts(config.ban, token_bytes[:vocab_size])
        has_minimum = bool(stop_ids and (config.min_new_tokens or config.min_length))
        rules: list[tuple[bool, Callable[[Floats, SequenceState], None]]] = [
            (bool(self.biases), self._add_biases),
            (config.encoder_repetition_penalty != 1.0, self._prefer_source),
            (config.repetition_penalty != 1.0, self._penalize_repetition),
            (bool(config.presence_penalty or config.frequency_penalty), self._penalize_new_tokens),
            (config.no_repeat_ngram_size > 0, self._block_repeated_ngrams),
            (config.encoder_no_repeat_ngram_size > 0, self._block_ngrams_of_source),
            (bool(words), self._block_bad_words),
            (bool(config.ban), self._block_banned),
            (has_minimum, self._require_minimum_length),
            (config.forced_bos_token_id is not None, self._force_first_token),
            (config.forced_eos_token_id is not None, self._force_last_token),
            (config.exponential_decay_length_penalty is not None, self._raise_end),
            (bool(config.suppress_tokens), self._suppress),
            (bool(config.begin_suppress_tokens), self._suppress_first),
            (config.renormalize_logits, self._renormalize),
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

    def _add_biases(self, scores: Floats, state: SequenceState) -> None:
        for ids, value in self.biases:
            length = len(ids) - 1
            if ids.max() < self.size and length <= state.history.shape[1]:
                started = state.history[:, state.history.shape[1] - length :] == ids[:-1]
                scores[started.all(-1), ids[-1]] += np.float32(value)

    def _prefer_source(self, scores: Floats, state: SequenceState) -> None:
        for row, source in enumerate(state.sources):
            seen, penalty = np.array([source], np.int64), 1 / self.config.encoder_repetition_penalty
            penalize_repetition(scores[row : row + 1], seen, penalty)

    def _penalize_new_tokens(self, scores: Floats, state: SequenceState) -> None:
        for row, count in enumerate(state.counts.tolist()):
            new = state.history[row, state.history.shape[1] - count :]
            ids, times = np.unique(new, return_counts=True)
            penalty = self.config.frequency_penalty * times + self.config.presence_penalty
            scores[row, ids] -= penalty.astype(np.float32)

    def _block_ngrams_of_source(self, scores: Floats, state: SequenceState) -> None:
        size = self.config.encoder_no_repeat_ngram_size
        for row, source in enumerate(state.sources):
            if state.history.shape[1] + 1 < size:
                continue
            last = state.history[row, state.history.shape[1] + 1 - size :].tolist()
            ngrams = zip(*(source[i:] for i in range(size)))
            scores[row, [ngram[-1] for ngram in ngrams if list(ngram[:-1]) == last]] = FORBIDDEN

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

    def _block_banned(self, scores: Floats, state: SequenceState) -> None:
        self.banned.block(scores, state.history)

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

    def _raise_end(self, scores: Floats, state: SequenceState) -> None:
        start, factor = self.config.exponential_decay_length_penalty or (0, 1.0)
        steps = np.maximum(state.counts - start, 0)[:, None]
        ends = scores[:, self.stop_ids]
        with np.errstate(all="ignore"):
            raised = ends + np.abs(ends) * (np.power(np.float64(factor), steps) - 1)
        # more than 1e30 is as certain, and no sum of it is infinite
        scores[:, self.stop_ids] = np.where(np.isfinite(ends), np.minimum(raised, 1e30), ends)

    def _renormalize(self, scores: Floats, _: SequenceState) -> None:
        totals = log_sum_exp(scores).astype(np.float32)
        scores -= np.where(np.isfinite(totals), totals, 0)[:, None]

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


class BannedTexts:
    """Texts that no sequence of tokens may spell, however it is split; by bytes of each id."""

    def __init__(self, texts: Sequence[str], token_bytes: Sequence[bytes]):
        self.token_bytes = token_bytes
        words = [text.encode() for text in texts]
        self.always = np.array(
            [i for i, own in enumerate(token_bytes) if any(word in own for word in words)], np.int64
        )
        order = sorted(range(len(token_bytes)), key=token_bytes.__getitem__)
        ordered = [token_bytes[i] for i in order]
        # the beginning of a text → the ids that complete it
        self.completing: dict[bytes, list[int]] = {}
        for word in words:
            for cut in range(1, len(word)):
                end = word[cut:]
                low = bisect_left(ordered, end)
                high = bisect_left(ordered, end + b"\xff" * 64, low)
                ids = [i for i in order[low:high] if token_bytes[i].startswith(end)]
                self.completing.setdefault(word[:cut], []).extend(ids)
        self.longest = max(map(len, words), default=0)

    def block(self, scores: Floats, history: Integers) -> None:
        """Forbids in scores (B, V) what would complete one of the texts after history (B, L)."""
        scores[:, self.always] = FORBIDDEN
        for row, ids in enumerate(history[:, -4 * self.longest :].tolist()):
            known = (self.token_bytes[i] for i in ids if 0 <= i < len(self.token_bytes))
            written = b"".join(known)
            for start, completing in self.completing.items():
                if written.endswith(start):
                    scores[row, completing] = FORBIDDEN
