"""Curves: what they share on a terminal and as SVG, and how a terminal draws them in braille."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Point = tuple[float, float]
MOST_POINTS = 800  # that a Series remembers
SPARKS = "▁▂▃▄▅▆▇█"
# the dots of a braille character: its left and its right column, from the top (Unicode 15, U+2800)
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
STEEP = 1.3  # a beginning that is so many times as high as the rest leaves the picture


@dataclass
class Series:
    """A curve in little memory, however many points are added: neighbors become their mean."""

    points: list[Point] = field(default_factory=list)
    _size: int = 1  # added points for each remembered one
    _sums: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, x: float, y: float) -> None:
        """Adds a point; one whose y is no number is left out."""
        if not math.isfinite(y):
            return
        sum_x, sum_y, count = self._sums
        sum_x, sum_y, count = sum_x + x, sum_y + y, count + 1
        if count < self._size:
            self._sums = sum_x, sum_y, count
            return
        self._sums = 0.0, 0.0, 0
        self.points.append((sum_x / count, sum_y / count))
        if len(self.points) >= MOST_POINTS:
            self.points, self._size = means(self.points, 2), 2 * self._size


def means(points: Sequence[Point], size: int) -> list[Point]:
    """The mean point of each `size` neighbors, the last ones of fewer."""
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(math.fsum(x) / len(x), math.fsum(y) / len(y)) for x, y in (zip(*g) for g in groups)]


def smoothed(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """Each point's y averaged with its neighbors, within this share of the points around it."""
    reach = int(len(points) * share / 2)
    total, sums = 0.0, [0.0]
    for _, y in points:
        sums.append(total := total + y)
    return [
        (x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
        for i, (x, _) in enumerate(points)
        for near in [min(reach, i, len(points) - 1 - i)]  # symmetric, so the ends do not lag
    ]


def focus(values: Iterable[float]) -> tuple[float, float]:
    """(lowest, highest) to draw, in the order of time; a steep beginning is left out at the top."""
    shown = list(values)
    rest = shown[len(shown) // 12 :]
    low, high, top = min(shown), max(shown), max(rest)
    if len(shown) >= 20 and high - low > STEEP * (top - low):
        high = top
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten between `low` and `high`.

    >>> round_ticks(0.13, 1.1, 5)
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    exponent = math.floor(math.log10((high - low) / max(1, most)))
    for step in (
        factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 5)
    ):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with the decimals that tell them apart, and commas between thousands."""
    gap = min((b - a for a, b in pairwise(ticks)), default=abs(ticks[0]) if ticks else 1.0) or 1.0
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def sparkline(values: Sequence[float], columns: int) -> str:
    """The last values as bars from 0 to the highest one, at most `columns` of them."""
    if not values:
        return ""
    size = -(-len(values) // columns)
    bars = [y for _, y in means([(0.0, value) for value in values], size)]
    top = max(bars)
    if not top > 0:
        return ""
    return "".join(SPARKS[min(7, int(8 * max(0.0, bar) / top))] for bar in bars)


def braille(
    points: Sequence[Point], columns: int, rows: int, x_range: Point, y_range: Point
) -> list[list[int]]:
    """The dots of a line through the points, as bits of braille characters: [row][column].

    Each of the 2 × columns columns of dots shows the mean of its points. What lies outside the
    ranges is left out.
    """
    cells = [[0] * columns for _ in range(rows)]
    (left, right), (low, high) = x_range, y_range
    # the mean of each column of dots
    sums: dict[int, list[float]] = {}
    for x, y in points:
        column = round((x - left) / ((right - left) or 1.0) * (2 * columns - 1))
        if 0 <= column < 2 * columns:
            sums.setdefault(column, []).append(y)
    known = sorted((column, math.fsum(ys) / len(ys)) for column, ys in sums.items())
    heights = [
        (a + i, y + (z - y) * i / (b - a))
        for (a, y), (b, z) in pairwise(known)
        for i in range(b - a)
    ] + known[-1:]
    # dots from the height of the column before to its own
    levels = [(x, (4 * rows - 1) * (high - y) / ((high - low) or 1.0)) for x, y in heights]
    before: int | None = None
    for x, level in levels:
        row = round(level)
        other = row if before in (None, row) else before + (1 if row > before else -1)
        for y in range(max(0, min(row, other)), min(4 * rows - 1, max(row, other)) + 1):
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
        before = row
    return cells
