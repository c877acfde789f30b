"""Token ids → the log-probability of each token and, where asked for, more of its distribution.

A decoder conditions on the tokens before, an encoder–decoder on a source as well. An encoder gives
pseudo-log-likelihoods: each token is masked and predicted from all others (Salazar et al. 2020).
With `within_word` the rest of its word is masked too, which would give the token away (Kauf &
Ivanova 2023).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcli.data.length_batching import group_by_length, group_for_packing
from lmcli.kernels.fast_path import can_pack, packed_hidden
from lmcli.model.attention import KeyValueCache
from lmcli.model.cached_forward import encode_sources, pad
from lmcli.model.likelihood import TokenDistribution, token_distributions
from lmcli.model.transformer import Transformer
from lmcli.terminal import progress
from lmcli.text.windows import Window, windows

# tokens that need not be read again, from which the cache of a common prefix is shared
WORTH_SHARING = 64


class ScoreRequest(NamedTuple):
    """The tokens of a text, with its closing token if that is scored.

    The first `leading_bos` tokens are a bos that the text spells out: read as bos, not scored. The
    first `context_only` are not scored either; requests with an equal `key` share that prefix.
    An encoder–decoder reads `source`. `words` holds the word number of each token.
    """

    ids: Sequence[int]
    leading_bos: int = 0
    context_only: int = 0
    key: Hashable = None
    source: Sequence[int] = ()
    words: Sequence[int | None] = ()


class ScoreFields(NamedTuple):
    """What to compute besides log-probabilities.

    With `token_set` (V,) bool the log-probability that a token of the set comes next. With
    `alternatives` above 0 entropy, rank and that many of the likeliest tokens.
    """

    token_set: Tensor | None = None
    alternatives: int = 0


@dataclass
class TokenScores:
    """Scores of n tokens: `logprobs` (n,) float32 in nats, NaN where a token is context only.

    Where asked for: `set_logprobs` (n + 1,) of the token set before each token and after the last;
    `entropy` (n,) in nats, `ranks` (n,), the likeliest `tokens` (n, K) and their `best` (n, K). A
    NaN of the model is stored as infinity, which no log-probability is.
    """

    logprobs: np.ndarray
    set_logprobs: np.ndarray | None = None
    entropy: np.ndarray | None = None
    ranks: np.ndarray | None = None
    tokens: np.ndarray | None = None
    best: np.ndarray | None = None

    @classmethod
    def empty(cls, size: int, fields: ScoreFields, vocab_size: int) -> "TokenScores":
        """Arrays for `size` tokens, filled with NaN."""
        scores = cls(_nan(size))
        if fields.token_set is not None:
            scores.set_logprobs = _nan(size + 1)
        if count := min(fields.alternatives, vocab_size):
            scores.entropy, scores.best = _nan(size), _nan(size, count)
            scores.ranks = np.zeros(size, dtype=np.int64)
            scores.tokens = np.zeros((size, count), dtype=np.int64)
        return scores

    def put(self, first: int, distribution: TokenDistribution) -> None:
        """Writes the scores of tokens from `first` on; after the last only `set_logprobs`."""
        for name, values in distribution._asdict().items():
            if values is not None:
                array, new = getattr(self, name), values.numpy()
                if new.dtype == np.float32:
                    new = np.where(np.isnan(new), np.float32(np.inf), new)
                array[first : first + len(new)] = new[: len(array) - first]


def _nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, dtype=np.float32)


class WindowJob(NamedTuple):
    """A window over the text of a request, counted after its leading bos token."""

    request: ScoreRequest
    scores: TokenScores
    window: Window

    @property
    def size(self) -> int:
        """Tokens to score."""
        return self.window.end - self.window.first

    def targets(self) -> list[int]:
        """The tokens to score; 0 after the last token of the text."""
        ids, offset = self.request.ids, self.request.leading_bos
        first, end = offset + self.window.first, offset + self.window.end
        return [*ids[first:end], *[0] * (end - len(ids))]


@dataclass
class CausalLogprobs:
    """Scores texts from left to right by a decoder, or the decoder of an encoder–decoder.

    `bos` leads each window. `context`, `stride` are in tokens, `batch` is tokens per forward pass.
    """

    model: Transformer
    bos: list[int]
    context: int
    stride: int
    batch: int

    @torch.inference_mode()
    def compute(self, requests: Sequence[ScoreRequest], fields: ScoreFields) -> list[TokenScores]:
        """The TokenScores of each request; in windows of long texts, each token scored once."""
        with progress.stage(total=sum([len(request.ids) for request in requests])):
            return self._compute(requests, fields)

    def _compute(self, requests: Sequence[ScoreRequest], fields: ScoreFields) -> list[TokenScores]:
        scores, jobs = self._jobs(requests, fields)
        shared: set[int] = set()
        for common, sharing in self._sharing_prefix(jobs):
            self._compute_after_prefix(common, sharing, fields)
            shared.update(map(id, sharing))
        rest = [job for job in jobs if id(job) not in shared]
        packable = can_pack(self.model)
        lengths = [job.window.end - job.window.start + len(job.request.source) for job in rest]
        for group in (group_for_packing if packable else group_by_length)(lengths, self.batch):
            chosen = [rest[i] for i in group]
            rows = self._rows(chosen)
            # no scored token before this column of any row
            query_start = min(len(row) - job.size for row, job in zip(rows, chosen))
            if packable and (not query_start or len({len(row) for row in rows}) > 1):
                hidden = packed_hidden(self.model, rows)  # (1, N, C)
                ends = [(0, end) for end in accumulate(map(len, rows))]
            else:
                ids = pad(rows, 0, left=False, device=self._device)[0]
                # needs no mask: padding on the right cannot change a token
                source = None
                if self.model.config.shape == "encoder-decoder":
                    sources = [list(job.request.source) for job in chosen]
                    source = encode_sources(self.model, sources)
                hidden = self.model.hidden(ids, encoder_output=source, query_start=query_start)
                ends = [(i, len(row) - query_start) for i, row in enumerate(rows)]
            self._store(chosen, ends, hidden, fields)
            progress.current().advance(sum([job.size for job in chosen]))
        return scores

    def _jobs(
        self, requests: Sequence[ScoreRequest], fields: ScoreFields
    ) -> tuple[list[TokenScores], list[WindowJob]]:
        """Empty scores of each request, and the windows that fill them."""
        vocab_size = self.model.config.vocab_size
        scores = [TokenScores.empty(len(request.ids), fields, vocab_size) for request in requests]
        jobs = [
            WindowJob(request, result, window)
            for request, result in zip(requests, scores)
            for window in self._windows(request, fields)
        ]
        return scores, jobs

    def slices(self, size: int, leading_bos: int, most: int) -> Iterator[tuple[int, int, int, int]]:
        """Slices of about `most` tokens of a text: (start, end, leading_bos, context_only).

        Each is a run of the text's windows, and starts with what its first window sees of the text
        before. The slices together score the same tokens as the whole text.
        """
        if size <= most:
            yield 0, size, leading_bos, 0
            return
        first, end, bos, context_only = 0, 0, leading_bos, 0
        for window in self._plain_windows(size - leading_bos, 0):
            start = leading_bos + window.start
            if end and leading_bos + window.end - (first + bos) > most:
                yield first, end, bos, context_only
                first, bos, context_only = start, 0, window.first - window.start
            end = leading_bos + window.end
        yield first, end or leading_bos, bos, context_only

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def _room(self) -> int:
        """Tokens that a window predicts: windows() counts one leading token, bos may have more."""
        return self.context - max(0, len(self.bos) - 1)

    def _plain_windows(self, size: int, context_only: int) -> Iterator[Window]:
        return windows(size, self._room, min(self.stride, self._room), bool(self.bos), context_only)

    def _windows(self, request: ScoreRequest, fields: ScoreFields) -> list[Window]:
        """The windows over a text; with a token set, the last one reads the last token too."""
        size = len(request.ids) - request.leading_bos
        context_only = max(0, request.context_only - request.leading_bos)
        result = list(self._plain_windows(size, context_only))
        if fields.token_set is not None and size + len(self.bos):
            span = self._room + (not self.bos)
            if not result or result[-1].end - result[-1].start == span:  # the last window is full
                result.append(Window(max(0, size + 1 - span), size, size))
            result[-1] = result[-1]._replace(end=size + 1)
        return result

    def _rows(self, jobs: list[WindowJob], start: int = 0) -> list[list[int]]:
        """The tokens to read for each job, without those before `start`; the last is not read."""
        rows = []
        for request, _, window in jobs:
            offset = request.leading_bos
            first, end = offset + max(window.start, start), offset + window.end - 1
            rows.append([*([] if start else self.bos), *request.ids[first:end]])
        return rows

    def _store(
        self,
        jobs: list[WindowJob],
        ends: list[tuple[int, int]],
        hidden: Tensor,
        fields: ScoreFields,
    ) -> None:
        """Stores the scores of each job; its states end at `ends` (row, column) of `hidden`."""
        sizes = [job.size for job in jobs]
        states = torch.cat([hidden[b, end - size : end] for (b, end), size in zip(ends, sizes)])
        targets = [token for job in jobs for token in job.targets()]
        distributions = _distributions(self.model, states, targets, fields, sizes)
        for (request, scores, window), distribution in zip(jobs, distributions):
            scores.put(request.leading_bos + window.first, distribution)

    def _sharing_prefix(self, jobs: list[WindowJob]) -> Iterator[tuple[int, list[WindowJob]]]:
        """Yields (common tokens, jobs) of texts in one window after an equal prefix, if it pays."""
        by_key: dict[Hashable, list[WindowJob]] = {}
        for job in jobs:
            request, _, window = job
            whole = window.start == 0 and window.end >= len(request.ids) and not request.leading_bos
            if request.key is not None and whole and self.model.config.shape == "decoder":
                by_key.setdefault(request.key, []).append(job)
        for group in by_key.values():
            texts = [job.request.ids for job in group]
            most = min(min(job.request.context_only, job.window.end - 1) for job in group)
            common = next((k for k in range(most) if len({text[k] for text in texts}) > 1), most)
            if common * (len(group) - 1) >= WORTH_SHARING:
                yield common, group

    def _compute_after_prefix(
        self, common: int, sharing: list[WindowJob], fields: ScoreFields
    ) -> None:
        """As `compute`, but reads the first `common` tokens of these texts, and bos, only once."""
        prefix = [*self.bos, *sharing[0].request.ids[:common]]
        prefix_cache = self._cache(1, len(prefix))
        prefix_ids = torch.tensor([prefix], device=self._device)
        last_state = self.model.hidden(prefix_ids, cache=prefix_cache)[:, -1:]  # (1, 1, C)
        # each row has its copy of the prefix's keys and values, so count all of its tokens
        lengths = [len(self.bos) + job.window.end for job in sharing]
        for group in group_by_length(lengths, 4 * self.batch):
            jobs = [sharing[i] for i in group]
            rows = self._rows(jobs, start=common)
            ids = pad(rows, 0, left=False, device=self._device)[0]
            progress.current().advance(sum([job.size for job in jobs]))
            hidden = last_state.expand(len(jobs), 1, -1)
            if ids.shape[1]:
                cache = self._cache(len(jobs), len(prefix) + ids.shape[1])
                cache.keys[:, :, :, : len(prefix)] = prefix_cache.keys
                cache.values[:, :, :, : len(prefix)] = prefix_cache.values
                cache.length = len(prefix)
                hidden = torch.cat([hidden, self.model.hidden(ids, cache=cache)], dim=1)
            ends = [(i, 1 + len(row)) for i, row in enumerate(rows)]
            self._store(jobs, ends, hidden, fields)

    def _cache(self, rows: int, capacity: int) -> KeyValueCache:
        dtype = self.model.embedding.weight.dtype
        return KeyValueCache(self.model.config, rows, capacity, self._device, dtype)


def _distributions(
    model: Transformer, states: Tensor, targets: list[int], fields: ScoreFields, sizes: list[int]
) -> Iterator[TokenDistribution]:
    """The distributions at states (N, C) for N targets, split by `sizes`, on the CPU."""
    target_ids = torch.tensor(targets, device=states.device)
    whole = token_distributions(states, model.head, target_ids, *fields)
    # one transfer for all: a GPU is slow with many
    splits = (
        [None] * len(sizes) if values is None else values.cpu().split(sizes) for values in whole
    )
    return map(TokenDistribution._make, zip(*splits))


class MaskJob(NamedTuple):
    """An encoder's forward pass with tokens `position` to `end` masked; it predicts the first."""

    request: ScoreRequest
    scores: TokenScores
    window: Window
    position: int
    end: int


@dataclass
class MaskedLogprobs:
    """Scores texts by an encoder, with a forward pass for each token, which is masked in it.

    `bos` and `eos` surround each window; a token is predicted from the window that scores it.
    """

    model: Transformer
    bos: list[int]
    eos: list[int]
    mask: int
    context: int
    stride: int
    batch: int
    within_word: bool = False

    @torch.inference_mode()
    def compute(self, requests: Sequence[ScoreRequest], fields: ScoreFields) -> list[TokenScores]:
        """The TokenScores of each request; there is no token set with an encoder."""
        fields, vocab_size = fields._replace(token_set=None), self.model.config.vocab_size
        scores = [TokenScores.empty(len(request.ids), fields, vocab_size) for request in requests]
        jobs = [
            job for request, row in zip(requests, scores) for job in self._mask_jobs(request, row)
        ]
        with progress.stage(total=len(jobs)) as stage:
            self._compute(jobs, fields, stage)
        return scores

    def _compute(self, jobs: list[MaskJob], fields: ScoreFields, stage: progress.Stage) -> None:
        device = self.model.embedding.weight.device
        lengths = [job.window.end - job.window.start for job in jobs]
        for group in group_by_length(lengths, self.batch):
            chosen = [jobs[i] for i in group]
            ids, mask = pad([self._masked(job) for job in chosen], 0, left=False, device=device)
            hidden = self.model.hidden(ids, mask)  # (B, T, C)
            columns = [len(self.bos) + job.position - job.window.start for job in chosen]
            states = hidden[list(range(len(chosen))), columns]  # (B, C)
            targets = [job.request.ids[job.position] for job in chosen]
            distributions = _distributions(self.model, states, targets, fields, [1] * len(chosen))
            for job, distribution in zip(chosen, distributions):
                job.scores.put(job.position, distribution)
            stage.advance(len(chosen))

    def _mask_jobs(self, request: ScoreRequest, scores: TokenScores) -> Iterator[MaskJob]:
        room = self.context - len(self.bos) - len(self.eos)
        stride = min(self.stride, room)
        for window in windows(len(request.ids), room, stride, True, request.context_only):
            for position in range(window.first, window.end):
                end = position + 1
                if self.within_word and (word := request.words[position]) is not None:
                    while end < window.end and request.words[end] == word:
                        end += 1
                yield MaskJob(request, scores, window, position, end)

    def _masked(self, job: MaskJob) -> list[int]:
        """The ids of a window with the job's tokens masked."""
        ids, masks = job.request.ids, [self.mask] * (job.end - job.position)
        before, after = ids[job.window.start : job.position], ids[job.end : job.window.end]
        return [*self.bos, *before, *masks, *after, *self.eos]
