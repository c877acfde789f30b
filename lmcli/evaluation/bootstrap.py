"""How sure a figure is: its interval, paired differences and their tests.

A figure is a function of sums over records, so a resample needs only how often it drew each
record. Records that count the same share a row of `Statistics`, which keeps this fast.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lmcli.evaluation.intervals import (
    Interval,
    Rate,
    bca_interval,
    newcombe_interval,
    wilson_interval,
)
from lmcli.evaluation.sparse_rows import Rows, SparseRows, take, weighted

JACKKNIFE_SAMPLES = 500
WEIGHTS_PER_CHUNK = 1 << 20  # weights of a chunk of resamples: they stay in the processor's cache
SumMetric = Callable[[np.ndarray], np.ndarray]  # sums (R, K) → figures (R,), NaN where undefined
FigureName = TypeVar("FigureName", bound=Hashable)


@dataclass
class Statistics:
    """What records add to the sums: record i adds row `index[i]` of `values` (D, K)."""

    values: Rows
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, records: np.ndarray) -> "Statistics":
        """The statistics of some records (indices, or a mask)."""
        return Statistics(self.values, self.index[records])

    def column(self, k: int) -> np.ndarray:
        """Column k for each record (N,)."""
        if isinstance(self.values, SparseRows):
            return self.values.column(k)[self.index]
        return self.values[self.index, k]

    def sums(self) -> np.ndarray:
        """The sums over all records (1, K)."""
        distinct, counts = np.unique(self.index, return_counts=True)
        return weighted(counts[None].astype(np.float64), take(self.values, distinct))


def bootstrap_weights(
    counts: np.ndarray, resamples: int, seed: int, width: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap samples in chunks (R, D): how often each distinct record was drawn.

    `counts` (D,) says how often each distinct record occurs; `width` is the number of sums, for the
    size of the chunks.
    """
    generator, total, distinct = np.random.default_rng(seed), int(counts.sum()), len(counts)
    # with few distinct records a multinomial draw is faster than drawing every record
    record = np.repeat(np.arange(distinct), counts) if 8 * distinct >= total else None
    for size in _chunks(resamples, max(distinct, width)):
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


class Jackknife(NamedTuple):
    """Which distinct records each of J samples leaves out, and how often there is such a sample."""

    left_out: list[np.ndarray]
    counts: np.ndarray

    def sums(self, rows: Rows, totals: np.ndarray) -> Iterator[np.ndarray]:
        """Chunks (r, K) of the sums of all samples; `totals` (1, K) are those of all records."""
        size = max(1, WEIGHTS_PER_CHUNK // max(len(rows), totals.size))
        for first in range(0, len(self.left_out), size):
            chunk = self.left_out[first : first + size]
            weights = np.stack([np.bincount(records, minlength=len(rows)) for records in chunk])
            yield totals - weighted(weights.astype(np.float64), rows)


def jackknife_of(counts: np.ndarray, seed: int) -> Jackknife:
    """Samples without one record; of more than JACKKNIFE_SAMPLES records without a group each."""
    distinct = np.arange(len(counts))
    if len(counts) <= JACKKNIFE_SAMPLES:
        return Jackknife(list(distinct[:, None]), counts.astype(np.float64))
    records = np.random.default_rng([seed, 2]).permutation(np.repeat(distinct, counts))
    return Jackknife(np.array_split(records, JACKKNIFE_SAMPLES), np.ones(JACKKNIFE_SAMPLES))


def bootstrap_intervals(
    statistics: Statistics, metrics: Mapping[FigureName, SumMetric], resamples: int, seed: int
) -> dict[FigureName, Interval | None]:
    """The 95 % interval of each figure: Wilson's of a Rate, else BCa over records (`intervals`).

    All figures use the same samples. None below two records, and where all samples agree.
    """
    totals = statistics.sums()
    intervals: dict[FigureName, Interval | None] = dict.fromkeys(metrics)
    if not resamples:
        return intervals
    others = dict(metrics)
    for name, metric in metrics.items():
        if isinstance(metric, Rate):
            hits, count = float(metric.hits(totals)[0]), float(metric.count(totals)[0])
            intervals[name] = wilson_interval(hits, count) if count else None
            del others[name]
    if len(statistics) < 2 or not others:
        return intervals
    distinct, counts = np.unique(statistics.index, return_counts=True)
    rows = take(statistics.values, distinct)

    def figures(sums: np.ndarray) -> np.ndarray:
        return np.stack([metric(sums) for metric in others.values()], 1)

    samples = (weighted(w, rows) for w in bootstrap_weights(counts, resamples, seed, totals.size))
    resampled = np.concatenate([figures(sums) for sums in samples])
    without = jackknife_of(counts, seed)
    jackknife = np.concatenate([figures(sums) for sums in without.sums(rows, totals)])
    for i, name in enumerate(others):
        value = float(figures(totals)[0, i])
        intervals[name] = bca_interval(value, resampled[:, i], jackknife[:, i], without.counts)
    return intervals


class FigureTable(NamedTuple):
    """Several figures at once: their names, and sums (R, K) → figures (R, F)."""

    names: list[Any]
    compute: SumMetric


def figure_table(metrics: Mapping[FigureName, SumMetric]) -> FigureTable:
    """The table of metrics that are computed one by one."""
    functions = list(metrics.values())
    return FigureTable(list(metrics), lambda sums: np.stack([f(sums) for f in functions], 1))


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
    exact test and Newcombe's interval, other figures approximate randomization and BCa.
    """
    if len(first) != len(second):
        raise ValueError(f"cannot pair {len(first)} with {len(second)} records")
    totals = first.sums(), second.sums()
    comparisons = {}
    for name, metric in metrics.items():
        difference = float((metric(totals[1]) - metric(totals[0]))[0])
        comparisons[name] = PairedComparison(None if math.isnan(difference) else difference)
    if len(first) < 2 or not resamples:
        return comparisons
    rates = {name for name in hits if _same_records(metrics[name], *totals)}
    for name in rates:
        count = int(metrics[name].count(totals[0])[0])  # type: ignore[attr-defined]  # a Rate
        columns = first.column(hits[name]), second.column(hits[name])
        _compare_rates(comparisons[name], *columns, count)
    others = {name: metric for name, metric in metrics.items() if name not in rates}
    for name, each in compare_by_samples(first, second, figure_table(others), resamples, seed):
        comparisons[name] = each
        if name in hits and each.difference is not None:
            each.p = mcnemar(first.column(hits[name]), second.column(hits[name]))
            each.test = "mcnemar"
    return comparisons


def compare_by_samples(
    first: Statistics, second: Statistics, figures: FigureTable, resamples: int, seed: int
) -> Iterator[tuple[Any, PairedComparison]]:
    """The comparison of each figure by BCa and approximate randomization, with its name."""
    if not figures.names:
        return
    # distinct pairs of rows: a, b (D, K) with their counts (D,)
    width = len(second.values)
    codes, counts = np.unique(first.index * np.int64(width) + second.index, return_counts=True)
    a, b = take(first.values, codes // width), take(second.values, codes % width)
    totals = first.sums(), second.sums()

    def difference(sums_a: np.ndarray, sums_b: np.ndarray) -> np.ndarray:
        return figures.compute(sums_b) - figures.compute(sums_a)

    weights = bootstrap_weights(counts, resamples, seed, totals[0].size)
    resampled = np.concatenate([difference(weighted(w, a), weighted(w, b)) for w in weights])
    without = jackknife_of(counts, seed)
    both = zip(without.sums(a, totals[0]), without.sums(b, totals[1]))
    jackknife = np.concatenate([difference(*sums) for sums in both])
    p_values = approximate_randomization(a, b, counts, figures, resamples, seed)
    for i, value in enumerate(difference(*totals)[0].tolist()):
        each = PairedComparison(None if math.isnan(value) else value)
        if each.difference is not None:
            columns = resampled[:, i], jackknife[:, i]
            each.low, each.high = bca_interval(value, *columns, without.counts) or (None, None)
            each.p, each.test = float(p_values[i]), "randomization"
        yield figures.names[i], each


def _same_records(metric: SumMetric, first: np.ndarray, second: np.ndarray) -> bool:
    """True for a rate of the same number of records in both sums."""
    return isinstance(metric, Rate) and metric.count(first)[0] == metric.count(second)[0] > 0


def _compare_rates(
    each: PairedComparison, first: np.ndarray, second: np.ndarray, count: int
) -> None:
    """Adds interval and test of the rates of two systems, given the hits of each record (N,)."""
    both, only_first = int((first * second).sum()), int((first > second).sum())
    only_second = int((second > first).sum())
    neither = count - both - only_first - only_second
    each.low, each.high = newcombe_interval(both, only_first, only_second, max(0, neither))
    each.p, each.test = mcnemar(first, second), "mcnemar"


def approximate_randomization(
    first: Rows, second: Rows, counts: np.ndarray, figures: FigureTable, trials: int, seed: int
) -> np.ndarray:
    """The p-value (F,) of each difference by approximate randomization (Noreen 1989).

    That is the share of trials, the observed one included, whose difference is at least as large
    when the outputs of both systems are swapped at random for each record. `first` and `second`
    (D, K) are the statistics of D distinct pairs of records, `counts` (D,) how often each occurs.
    """
    generator = np.random.default_rng([seed, 1])  # not the numbers of the bootstrap
    all_records = counts[None].astype(np.float64)
    totals = weighted(all_records, first), weighted(all_records, second)

    def difference(sums_a: np.ndarray, sums_b: np.ndarray) -> np.ndarray:
        return abs(figures.compute(sums_b) - figures.compute(sums_a))

    observed = difference(*totals)[0]
    as_large = np.ones(len(figures.names))
    for size in _chunks(trials, max(len(counts), totals[0].size)):
        swaps = generator.binomial(counts, 0.5, size=(size, len(counts))).astype(np.float64)
        if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
            moved = swaps @ (second - first)
        else:
            moved = weighted(swaps, second) - weighted(swaps, first)
        smaller = difference(totals[0] + moved, totals[1] - moved) < observed - 1e-12
        as_large += (~smaller).sum(0)  # an undefined difference counts as large
    return as_large / (trials + 1)


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
