"""Token ids → what a model says of each: its log-probability and, where asked for, more of the distribution it is from.

A decoder gives the probability of a token after those before it, an encoder–decoder that in the light of a source, an
encoder the pseudo-log-likelihood: of each token masked, given all others (Salazar et al. 2020); with `within_word` the
rest of its word is masked with it, since that would give it away (Kauf & Ivanova 2023).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcli.inference.ordering import in_order, pad
from lmcli.inference.reading import encoded
from lmcli.model.attention import KeyValueCache, Packed
from lmcli.model.likelihood import Readings, readings
from lmcli.model.transformer import Transformer
from lmcli.text.windows import Window, windows

WORTH_SHARING = 64  # tokens that need not be read again, from which a common beginning is kept


class Request(NamedTuple):
    """The tokens of a text, its closing token included where that is scored.

    The first `spelt` are a beginning token that the text spells itself: read as that, not scored. The first `given` are
    context only; texts with an equal `key` have the same text before them. An encoder reads `source`; `words` numbers
    the words that tokens belong to.
    """

    ids: Sequence[int]
    spelt: int = 0
    given: int = 0
    key: Hashable = None
    source: Sequence[int] = ()
    words: Sequence[int | None] = ()


class Wanted(NamedTuple):
    """What is read beside log-probabilities: with `members` (V,) bool that the next token is one of these, before each
    token and behind the last; with a `count` above 0 entropy, rank, and so many of the likeliest tokens."""

    members: Tensor | None = None
    count: int = 0


@dataclass
class TokenScores:
    """For each of n tokens its natural-log probability, `logprobs` (n,) float32, NaN where it is context only.

    Where wanted: `inside` (n + 1,) that of any member before each token and behind the last; `entropy` (n,) in nats,
    `ranks` (n,), and the likeliest `tokens` (n, K) with `best` (n, K).
    """

    logprobs: np.ndarray
    inside: np.ndarray | None = None
    entropy: np.ndarray | None = None
    ranks: np.ndarray | None = None
    tokens: np.ndarray | None = None
    best: np.ndarray | None = None

    @classmethod
    def blank(cls, size: int, wanted: Wanted, vocabulary: int) -> "TokenScores":
        """Of tokens that have not been read."""
        kept = min(wanted.count, vocabulary)
        inside = None if wanted.members is None else _unknown(size + 1)
        if not kept:
            return cls(_unknown(size), inside)
        return cls(_unknown(size), inside, _unknown(size), np.zeros(size, dtype=np.int64),
                   np.zeros((size, kept), dtype=np.int64), _unknown(size, kept))

    def put(self, first: int, part: Readings) -> None:
        """Writes what was read of tokens `first` and on; behind the last there is no token, only `inside`."""
        for name, values in part._asdict().items():
            if values is not None:
                target, found = getattr(self, name), values.numpy()
                target[first:first + len(found)] = found[:len(target) - first]


def _unknown(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, dtype=np.float32)


class Job(NamedTuple):
    """One window over the text of request number `request`, from behind its spelt beginning."""

    request: int
    window: Window


@dataclass
class Causal:
    """Reads texts from left to right, each window led by `beginning`: with a decoder, or the decoder of two stacks.

    `context` and `stride` are in tokens, `batch` is tokens a forward pass.
    """

    model: Transformer
    beginning: list[int]
    context: int
    stride: int
    batch: int

    @torch.inference_mode()
    def read(self, requests: Sequence[Request], wanted: Wanted) -> list[TokenScores]:
        """TokenScores of each request. A text longer than the context is read in windows, each token scored once."""
        vocabulary = self.model.config.vocab_size
        found = [TokenScores.blank(len(request.ids), wanted, vocabulary) for request in requests]
        jobs = [Job(i, window) for i, request in enumerate(requests) for window in self._windows(request, wanted)]
        shared = set()
        for common, group in self._with_common_beginning(requests, jobs):
            self._read_behind(common, group, requests, wanted, found)
            shared.update(job.request for job in group)
        rest = [job for job in jobs if job.request not in shared]

        def work(group: list[int]) -> list[None]:
            chosen = [rest[g] for g in group]
            rows = self._rows(chosen, requests)
            since = min(len(row) - (job.window.end - job.window.first) for row, job in zip(rows, chosen))
            if packs and (not since or len({len(row) for row in rows}) > 1):
                groups = tuple((len(list(same)), length) for length, same in groupby(map(len, rows)))
                ids = torch.tensor([[token for row in rows for token in row]], device=self._device)
                hidden = self.model.hidden(ids, packed=Packed(groups))  # (1, N, C)
                ends = [(0, end) for end in accumulate(map(len, rows))]
            else:
                ids = pad(rows, 0, left=False, device=self._device)[0]
                # (B, T − since, C); needs no mask: what follows a token cannot change it
                hidden = self.model.hidden(ids, memory=self._memory(chosen, requests), since=since)
                ends = [(b, len(row) - since) for b, row in enumerate(rows)]
            self._put(chosen, ends, hidden, requests, wanted, found)
            return [None] * len(group)

        packs = self.model.packs
        in_order([job.window.end - job.window.start + len(requests[job.request].source) for job in rest], self.batch, work,
                 packs)
        return found

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def _room(self) -> int:
        """Tokens of a text that a window may predict; windows() counts one leading token, a template may have more."""
        return self.context - max(0, len(self.beginning) - 1)

    def slices(self, request: Request, most: int) -> Iterator[Request]:
        """A request of up to `most` tokens itself, a longer one as several of about so many: each is windows in a row of
        the whole, what the first of them sees of the text before is given. One after the other, less what is given, their
        tokens are those of the whole.
        """
        if len(request.ids) <= most:
            yield request
            return
        start = end = given = 0
        for window in self._windows(request, Wanted()):
            if end and window.end - start > most:
                yield _slice(request, start, end, given)
                start, given = window.start, window.first - window.start
            end = window.end
        yield _slice(request, start, end, given)

    def _windows(self, request: Request, wanted: Wanted) -> Iterator[Window]:
        """Those over one text; where members are wanted the last one reads the last token too."""
        size, given = len(request.ids) - request.spelt, max(0, request.given - request.spelt)
        *before, last = [None, *windows(size, self._room, min(self.stride, self._room), bool(self.beginning), given)]
        yield from before[1:]
        if wanted.members is not None and size + len(self.beginning):
            span = self._room + (not self.beginning)
            if last is None or last.end - last.start == span:
                yield from () if last is None else (last,)
                last = Window(max(0, size + 1 - span), size, size)
            last = last._replace(end=size + 1)
        if last is not None:
            yield last

    def _rows(self, jobs: list[Job], requests: Sequence[Request], since: int = 0) -> list[list[int]]:
        """The tokens that are read for each job, from `since` on."""
        rows = []
        for i, window in jobs:
            ids, spelt = requests[i].ids, requests[i].spelt
            lead = [] if since else self.beginning
            rows.append([*lead, *ids[spelt + max(window.start, since):spelt + window.end - 1]])
        return rows

    def _put(self, jobs: list[Job], ends: list[tuple[int, int]], hidden: Tensor, requests: Sequence[Request], wanted: Wanted,
             found: list[TokenScores]) -> None:
        """Reads what the states that end at `ends` (row, place) say of each window's scored tokens."""
        sizes = [window.end - window.first for _, window in jobs]
        states = torch.cat([hidden[b, end - size:end] for (b, end), size in zip(ends, sizes)])
        targets = []
        for i, window in jobs:
            request = requests[i]
            targets += request.ids[request.spelt + window.first:request.spelt + window.end]
            targets += [0] * (request.spelt + window.end - len(request.ids))  # behind the last token is none
        said = _read(self.model, states, targets, wanted)
        parts = zip(*(part.split(sizes) if part is not None else [None] * len(sizes) for part in said))
        for (i, window), part in zip(jobs, parts):
            found[i].put(requests[i].spelt + window.first, Readings(*part))

    def _memory(self, jobs: list[Job], requests: Sequence[Request]):
        if self.model.config.shape != "encoder-decoder":
            return None
        return encoded(self.model, [list(requests[job.request].source) for job in jobs], self._device)

    def _with_common_beginning(self, requests: Sequence[Request], jobs: list[Job]) -> Iterator[tuple[int, list[Job]]]:
        """(tokens in common, jobs) for texts of one window behind the same text, where sharing spares enough."""
        by_key: dict[Hashable, list[Job]] = {}
        for job in jobs:
            request = requests[job.request]
            whole = job.window.start == 0 and job.window.end >= len(request.ids) and not request.spelt
            if request.key is not None and whole and self.model.config.shape == "decoder":
                by_key.setdefault(request.key, []).append(job)
        for group in by_key.values():
            texts = [requests[job.request].ids for job in group]
            most = min(min(requests[job.request].given, job.window.end - 1) for job in group)
            common = next((k for k in range(most) if len({text[k] for text in texts}) > 1), most)
            if common * (len(group) - 1) >= WORTH_SHARING:
                yield common, group

    def _read_behind(self, common: int, group: list[Job], requests: Sequence[Request], wanted: Wanted,
                     found: list[TokenScores]) -> None:
        """As `read` does, with the first `common` tokens of all these texts, and the beginning, read once."""
        config, dtype = self.model.config, self.model.embedding.weight.dtype
        start = [*self.beginning, *requests[group[0].request].ids[:common]]
        kept = KeyValueCache(config, 1, len(start), self._device, dtype)
        border = self.model.hidden(torch.tensor([start], device=self._device), cache=kept)[:, -1:]  # (1, 1, C)

        def work(chosen: list[int]) -> list[None]:
            jobs = [group[c] for c in chosen]
            rows = self._rows(jobs, requests, since=common)
            ids = pad(rows, 0, left=False, device=self._device)[0]
            hidden = border.expand(len(jobs), 1, -1)
            if ids.shape[1]:
                cache = KeyValueCache(config, len(jobs), len(start) + ids.shape[1], self._device, dtype)
                cache.keys[:, :, :, :len(start)], cache.values[:, :, :, :len(start)] = kept.keys, kept.values
                cache.length = len(start)
                hidden = torch.cat([hidden, self.model.hidden(ids, cache=cache)], dim=1)
            self._put(jobs, [(b, 1 + len(row)) for b, row in enumerate(rows)], hidden, requests, wanted, found)
            return [None] * len(jobs)

        # keys and values of what they share are there once for each: a row costs memory for all of its tokens
        in_order([len(self.beginning) + job.window.end for job in group], 4 * self.batch, work)


def _read(model: Transformer, states: Tensor, targets: list[int], wanted: Wanted) -> Readings:
    """What states (N, C) say of N tokens, on the processor: a GPU hands it over once for all of them."""
    said = readings(states, model.head, torch.tensor(targets, device=states.device), wanted.members, wanted.count)
    return Readings(*(None if part is None else part.cpu() for part in said))


def _slice(request: Request, start: int, end: int, given: int) -> Request:
    """Tokens `start` to `end` from behind a beginning that the text spells itself, which the first slice has."""
    spelt = request.spelt
    return Request(request.ids[spelt + start if start else 0:spelt + end], 0 if start else spelt, given)


class Masking(NamedTuple):
    """A row of an encoder: token `at` of a request is predicted in a window with the tokens `at` to `end` masked."""

    request: int
    window: Window
    at: int
    end: int


@dataclass
class Masked:
    """Reads texts with an encoder, once for each token, which is masked then; `beginning` and `ending` are put around.

    Of a text longer than the context the windows' tokens are predicted, each in view of its window.
    """

    model: Transformer
    beginning: list[int]
    ending: list[int]
    mask: int
    context: int
    stride: int
    batch: int
    within_word: bool = False

    @torch.inference_mode()
    def read(self, requests: Sequence[Request], wanted: Wanted) -> list[TokenScores]:
        """TokenScores of each request; `wanted.members` has no meaning here."""
        wanted, vocabulary = wanted._replace(members=None), self.model.config.vocab_size
        found = [TokenScores.blank(len(request.ids), wanted, vocabulary) for request in requests]
        rows = [row for i, request in enumerate(requests) for row in self._maskings(i, request)]
        device = self.model.embedding.weight.device

        def work(group: list[int]) -> list[None]:
            chosen = [rows[g] for g in group]
            ids, real = pad([self._masked(row, requests[row.request]) for row in chosen], 0, left=False, device=device)
            hidden = self.model.hidden(ids, real)  # (B, T, C)
            lead, places = len(self.beginning), range(len(chosen))
            states = hidden[list(places), [lead + row.at - row.window.start for row in chosen]]  # (B, C)
            said = _read(self.model, states, [requests[row.request].ids[row.at] for row in chosen], wanted)
            for k, row in enumerate(chosen):
                found[row.request].put(row.at, Readings(*(None if part is None else part[k:k + 1] for part in said)))
            return [None] * len(group)

        in_order([row.window.end - row.window.start for row in rows], self.batch, work)
        return found

    def _maskings(self, i: int, request: Request) -> Iterator[Masking]:
        room = self.context - len(self.beginning) - len(self.ending)
        for window in windows(len(request.ids), room, min(self.stride, room), True, request.given):
            for at in range(window.first, window.end):
                end = at + 1
                while self.within_word and end < window.end and request.words[end] == request.words[at] is not None:
                    end += 1
                yield Masking(i, window, at, end)

    def _masked(self, row: Masking, request: Request) -> list[int]:
        shown, hidden = request.ids, [self.mask] * (row.end - row.at)
        return [*self.beginning, *shown[row.window.start:row.at], *hidden, *shown[row.end:row.window.end], *self.ending]
