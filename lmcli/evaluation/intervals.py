"""Intervals of 95 %: of rates by a formula, of other figures from bootstrap samples.

Pure functions of numbers. The interval of a rate has a width even where all records are right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
FEW_RECORDS = 30  # fewer have bootstrap intervals that are too narrow
ONE_SIDED = 0.005  # share of bootstrap samples below a figure that is too small to correct for
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """A figure that is a share of records: `hits` of `count`, both from sums (R, K)."""

    hits: Callable[[np.ndarray], np.ndarray]
    count: Callable[[np.ndarray], np.ndarray]

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """The rates (R,); NaN where the count is 0."""
        return ratio(self.hits(sums), self.count(sums))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio, NaN where the denominator is 0."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)


def wilson_interval(hits: float, count: float, z: float = Z) -> Interval:
    """The interval of a rate (Wilson 1927), 95 % by default; within 0 and 1 for any count.

    Its coverage, averaged over rates, is 95 % from 10 records on, where the bootstrap has 80 %.
    """
    low, high = wilson_intervals(np.array([hits]), np.array([count]), z)
    return float(low[0]), float(high[0])


def wilson_intervals(
    hits: np.ndarray, count: np.ndarray, z: float = Z
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of many rates; NaN where the count is 0."""
    count = np.where(count > 0, count, np.nan)
    rate, spread = hits / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    width = z * np.sqrt(rate * (1 - rate) / count + spread / (4 * count)) / (1 + spread)
    # rounding must not leave 0 or 1 outside
    low = np.where(rate == 0, 0.0, np.maximum(0.0, middle - width))
    return low, np.where(rate == 1, 1.0, np.minimum(1.0, middle + width))


def newcombe_interval(both: int, first: int, second: int, neither: int) -> Interval:
    """The interval of the second rate minus the first of the same records (Newcombe 1998, no. 10).

    Records that both systems, only one of them or neither have right. It joins Wilson's intervals
    of both rates by the correlation of the systems, and is never [0, 0].
    """
    n = both + first + second + neither
    rates = (both + second) / n, (both + first) / n
    (low_2, high_2), (low_1, high_1) = (
        wilson_interval(both + second, n),
        wilson_interval(both + first, n),
    )
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    agreement = float(both * neither - first * second)
    if agreement > 0:  # Newcombe's correction for continuity
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(product) if product else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = rates[0] - rates[1]
    return (
        difference - distance(rates[0] - low_2, high_1 - rates[1]),
        difference + distance(high_2 - rates[0], rates[1] - low_1),
    )


def bca_interval(
    figure: float, resampled: np.ndarray, jackknife: np.ndarray, weights: np.ndarray
) -> Interval | None:
    """The bias-corrected and accelerated interval (Efron 1987; Efron & Tibshirani 1993, §14.3).

    `resampled` (R,) are figures of bootstrap samples, `jackknife` (J,) those without a record or a
    group of records, with how often each occurs (`weights`). Undefined ones are left out. None if
    the samples say nothing about the spread: all have the same figure, or (of many rare classes)
    all but one in 200 lie on one side of it.
    """
    resampled = np.sort(resampled[~np.isnan(resampled)])
    if math.isnan(figure) or not len(resampled) or resampled[0] == resampled[-1]:
        return None
    normal, size = NormalDist(), len(resampled)
    # half of the equal ones, as figures of few records are discrete
    slack = 1e-12 * max(1.0, abs(figure))
    below = np.searchsorted(resampled, [figure - slack, figure + slack]).mean() / size
    if not ONE_SIDED < below < 1 - ONE_SIDED:
        return None
    bias = normal.inv_cdf(below)
    known = ~np.isnan(jackknife)
    weights, jackknife = weights[known], jackknife[known]
    deviations = np.average(jackknife, weights=weights) - jackknife if len(jackknife) else jackknife
    squares = float((weights * deviations**2).sum())
    cubes = float((weights * deviations**3).sum())
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0

    def level(z: float) -> float:
        divisor = 1 - acceleration * (bias + z)
        return normal.cdf(bias + (bias + z) / divisor) if divisor > 0 else float(z > 0)

    low, high = np.quantile(resampled, (level(-Z), level(Z)))
    return float(low), float(high)
