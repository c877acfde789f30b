"""How sure a figure is: bootstrap intervals over records, paired differences, McNemar's and the randomization test."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
CELLS_AT_ONCE = 1 << 20  # of a part of resamples: weights that stay in a processor's cache
Score = Callable[[np.ndarray], np.ndarray]  # sums (R, K) → figures (R,), NaN where there is none


@dataclass
class Statistics:
    """What records add up to figures: record i adds row `index[i]` of `values` (D, K). Records that add the same may share
    a row, as those of the same label that were given the same label do."""

    values: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def of(self, records: np.ndarray) -> "Statistics":
        """Those of some records (their places, or a mask)."""
        return Statistics(self.values, self.index[records])

    def column(self, k: int) -> np.ndarray:
        """Column k of each record (N,)."""
        return self.values[self.index, k]

    def sums(self) -> np.ndarray:
        """What all records add up to (1, K)."""
        return np.bincount(self.index, minlength=len(self.values))[None].astype(np.float64) @ self.values


def resampled(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples in parts (R, D): how often each of D kinds of record is drawn, of which there are `counts` (D,)."""
    generator, total, kinds = np.random.default_rng(seed), int(counts.sum()), len(counts)
    few = 8 * kinds < total  # drawing all records and counting them is the faster one otherwise
    kind = None if few else np.repeat(np.arange(kinds), counts)
    for size in _parts(resamples, kinds):
        if few:
            drawn = generator.multinomial(total, counts / total, size=size)
        else:
            drawn = np.stack([np.bincount(kind[generator.integers(total, size=total)], minlength=kinds)
                              for _ in range(size)])
        yield drawn.astype(np.float64)  # products of whole numbers do not go through BLAS


def _parts(resamples: int, width: int) -> Iterator[int]:
    size = max(1, min(100, CELLS_AT_ONCE // max(1, width)))
    while resamples > 0:
        yield min(size, resamples)
        resamples -= size


def percentiles(found: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled figures, those that are undefined left out; None when all are."""
    found = found[~np.isnan(found)]
    if not len(found):
        return None
    low, high = np.quantile(found, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def intervals(statistics: Statistics, scores: Mapping[Hashable, Score], resamples: int,
              seed: int) -> dict[Hashable, tuple[float, float] | None]:
    """The 95 % interval of each figure by the percentile bootstrap over records (Efron & Tibshirani 1993, §13); None below
    two records. All figures are of the same samples."""
    kinds, counts = np.unique(statistics.index, return_counts=True)
    if len(statistics) < 2 or not resamples:
        return dict.fromkeys(scores)
    values = statistics.values[kinds]
    found: dict[Hashable, list[np.ndarray]] = {key: [] for key in scores}
    for weights in resampled(counts, resamples, seed):
        sums = weights @ values
        for key, score in scores.items():
            found[key].append(score(sums))
    return {key: percentiles(np.concatenate(parts)) for key, parts in found.items()}


@dataclass
class Compared:
    """How far a second system's figure lies from the first's, the 95 % interval of that by the bootstrap over records in
    pairs, and the two-sided p-value of `test`."""

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: str | None = None


def compare(first: Statistics, second: Statistics, scores: Mapping[Hashable, Score], hits: Mapping[Hashable, int],
            resamples: int, seed: int) -> dict[Hashable, Compared]:
    """Two systems on the same records, for each figure. Those in `hits` are the rate of a column of 0 and 1 and get
    McNemar's exact test, others approximate randomization."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} records are no pairs")
    codes, counts = np.unique(first.index * np.int64(len(second.values)) + second.index, return_counts=True)
    a, b = first.values[codes // len(second.values)], second.values[codes % len(second.values)]
    one, two = first.sums(), second.sums()
    apart = {key: float((score(two) - score(one))[0]) for key, score in scores.items()}
    found = {key: Compared(None if math.isnan(value) else value) for key, value in apart.items()}
    if len(first) < 2 or not resamples:
        return found
    sampled: dict[Hashable, list[np.ndarray]] = {key: [] for key in scores}
    for weights in resampled(counts, resamples, seed):
        one, two = weights @ a, weights @ b
        for key, score in scores.items():
            sampled[key].append(score(two) - score(one))
    tested = randomization(a, b, counts, {key: scores[key] for key in scores if key not in hits}, resamples, seed)
    for key, one in found.items():
        one.low, one.high = percentiles(np.concatenate(sampled[key])) or (None, None)
        if one.difference is not None:
            one.p, one.test = (tested[key], "randomization") if key not in hits else (
                mcnemar(first.column(hits[key]), second.column(hits[key])), "mcnemar")
    return found


def randomization(first: np.ndarray, second: np.ndarray, counts: np.ndarray, scores: Mapping[Hashable, Score], trials: int,
                  seed: int) -> dict[Hashable, float]:
    """The p-value of each difference by approximate randomization (Noreen 1989): the share of trials, the real one
    counted, in which the difference is at least as large when each record is given to either system by chance.

    `first` and `second` (D, K) are what both systems have of each of D kinds of record, of which there are `counts`.
    """
    generator = np.random.default_rng([seed, 1])  # not the samples of the bootstrap
    totals = counts @ first, counts @ second
    real = {key: abs(score(totals[1][None]) - score(totals[0][None]))[0] for key, score in scores.items()}
    beyond = dict.fromkeys(scores, 1)
    for size in _parts(trials if scores else 0, len(counts)):
        moved = generator.binomial(counts, 0.5, size=(size, len(counts))).astype(np.float64) @ (second - first)
        one, two = totals[0] + moved, totals[1] - moved
        for key, score in scores.items():
            beyond[key] += int((~(abs(score(two) - score(one)) < real[key] - 1e-12)).sum())  # undefined ones counted too
    return {key: count / (trials + 1) for key, count in beyond.items()}


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p-value of McNemar's exact test: of the records that one system alone has right, whether both have as
    many as a fair coin gives (McNemar 1947).

    >>> mcnemar(np.array([1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0]))  # 2 · (1/2)⁴
    0.125
    """
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    term = total = 1  # n choose 0, in whole numbers: exact however many there are
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)
