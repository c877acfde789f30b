"""How sure a figure is: bootstrap intervals, paired differences and their tests.

A figure is a function of sums over records, so a resample needs only how often it drew each
record. Records that count the same share a row of `Statistics`, which keeps this fast.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

CONFIDENCE = 0.95
WEIGHTS_PER_CHUNK = 1 << 20  # weights of a chunk of resamples: they stay in the processor's cache
SumMetric = Callable[[np.ndarray], np.ndarray]  # sums (R, K) → figures (R,), NaN where undefined
FigureName = TypeVar("FigureName", bound=Hashable)


@dataclass
class Statistics:
    """What records add to the sums: record i adds row `index[i]` of `values` (D, K)."""

    values: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, records: np.ndarray) -> "Statistics":
        """The statistics of some records (indices, or a mask)."""
        return Statistics(self.values, self.index[records])

    def column(self, k: int) -> np.ndarray:
        """Column k for each record (N,)."""
        return self.values[self.index, k]

    def sums(self) -> np.ndarray:
        """The sums over all records (1, K)."""
        counts = np.bincount(self.index, minlength=len(self.values))
        return counts[None].astype(np.float64) @ self.values


def bootstrap_weights(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples in chunks (R, D): how often each distinct record was drawn.

    `counts` (D,) says how often each distinct record occurs.
    """
    generator, total, distinct = np.random.default_rng(seed), int(counts.sum()), len(counts)
    # with few distinct records a multinomial draw is faster than drawing every record
    record = np.repeat(np.arange(distinct), counts) if 8 * distinct >= total else None
    for size in _chunks(resamples, distinct):
        if record is None:
            drawn = generator.multinomial(total, counts / total, size=size)
        else:
            draws = (record[generator.integers(total, size=total)] for _ in range(size))
            drawn = np.stack([np.bincount(draw, minlength=distinct) for draw in draws])
        yield drawn.astype(np.float64)  # BLAS multiplies floats only


def _chunks(resamples: int, width: int) -> Iterator[int]:
    size = max(1, min(100, WEIGHTS_PER_CHUNK // max(1, width)))
    while resamples > 0:
        yield min(size, resamples)
        resamples -= size


def percentile_interval(figures: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled figures without undefined ones; None if all are undefined."""
    figures = figures[~np.isnan(figures)]
    if not len(figures):
        return None
    low, high = np.quantile(figures, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def bootstrap_intervals(
    statistics: Statistics, metrics: Mapping[FigureName, SumMetric], resamples: int, seed: int
) -> dict[FigureName, tuple[float, float] | None]:
    """The 95 % interval of each figure by the percentile bootstrap over records.

    Efron & Tibshirani 1993, §13. All figures use the same samples; None below two records.
    """
    distinct, counts = np.unique(statistics.index, return_counts=True)
    if len(statistics) < 2 or not resamples:
        return dict.fromkeys(metrics)
    values = statistics.values[distinct]
    figures: dict[FigureName, list[np.ndarray]] = {name: [] for name in metrics}
    for weights in bootstrap_weights(counts, resamples, seed):
        sums = weights @ values
        for name, metric in metrics.items():
            figures[name].append(metric(sums))
    return {name: percentile_interval(np.concatenate(chunks)) for name, chunks in figures.items()}


@dataclass
class PairedComparison:
    """The difference of a second system's figure from the first's.

    `low` and `high` bound its 95 % interval by the bootstrap over pairs of records; `p` is the
    two-sided p-value of `test`.
    """

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: str | None = None


def compare(
    first: Statistics,
    second: Statistics,
    metrics: Mapping[FigureName, SumMetric],
    hits: Mapping[FigureName, int],
    resamples: int,
    seed: int,
) -> dict[FigureName, PairedComparison]:
    """Compares two systems on the same records, for each figure.

    `hits` maps figures that are the mean of a column of 0 and 1 to that column. They get McNemar's
    exact test, other figures approximate randomization.
    """
    if len(first) != len(second):
        raise ValueError(f"cannot pair {len(first)} with {len(second)} records")
    comparisons = {}
    for name, metric in metrics.items():
        difference = float((metric(second.sums()) - metric(first.sums()))[0])
        comparisons[name] = PairedComparison(None if math.isnan(difference) else difference)
    if len(first) < 2 or not resamples:
        return comparisons

    # distinct pairs of rows: a, b (D, K) with their counts (D,)
    width = len(second.values)
    codes, counts = np.unique(first.index * np.int64(width) + second.index, return_counts=True)
    a, b = first.values[codes // width], second.values[codes % width]

    differences: dict[FigureName, list[np.ndarray]] = {name: [] for name in metrics}
    for weights in bootstrap_weights(counts, resamples, seed):
        sums_a, sums_b = weights @ a, weights @ b
        for name, metric in metrics.items():
            differences[name].append(metric(sums_b) - metric(sums_a))
    others = {name: metric for name, metric in metrics.items() if name not in hits}
    p_values = approximate_randomization(a, b, counts, others, resamples, seed)
    for name, each in comparisons.items():
        interval = percentile_interval(np.concatenate(differences[name]))
        each.low, each.high = interval or (None, None)
        if each.difference is None:
            continue
        if name in hits:
            each.test = "mcnemar"
            each.p = mcnemar(first.column(hits[name]), second.column(hits[name]))
        else:
            each.test, each.p = "randomization", p_values[name]
    return comparisons


def approximate_randomization(
    first: np.ndarray,
    second: np.ndarray,
    counts: np.ndarray,
    metrics: Mapping[FigureName, SumMetric],
    trials: int,
    seed: int,
) -> dict[FigureName, float]:
    """The p-value of each difference by approximate randomization (Noreen 1989).

    That is the share of trials, the observed one included, whose difference is at least as large
    when the outputs of both systems are swapped at random for each record. `first` and `second`
    (D, K) are the statistics of D distinct pairs of records, `counts` (D,) how often each occurs.
    """
    generator = np.random.default_rng([seed, 1])  # not the numbers of the bootstrap
    totals = counts @ first, counts @ second
    observed = {
        name: abs(metric(totals[1][None]) - metric(totals[0][None]))[0]
        for name, metric in metrics.items()
    }
    as_large = dict.fromkeys(metrics, 1)
    for size in _chunks(trials if metrics else 0, len(counts)):
        swaps = generator.binomial(counts, 0.5, size=(size, len(counts))).astype(np.float64)
        moved = swaps @ (second - first)
        sums_a, sums_b = totals[0] + moved, totals[1] - moved
        for name, metric in metrics.items():
            smaller = abs(metric(sums_b) - metric(sums_a)) < observed[name] - 1e-12
            as_large[name] += int((~smaller).sum())  # an undefined difference counts as large
    return {name: count / (trials + 1) for name, count in as_large.items()}


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p-value of McNemar's exact test (McNemar 1947) on hits of 0 and 1.

    Of the records that only one system has right, each system should have about half.

    >>> mcnemar(np.array([1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0]))  # 2 · (1/2)⁴
    0.125
    """
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    term = total = 1  # n choose 0, in integers: exact for any n
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a rate (Wilson 1927), 95 % by default; within 0 and 1 for any count."""
    rate, spread = hits / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    width = z * math.sqrt(rate * (1 - rate) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - width), min(1.0, middle + width)
