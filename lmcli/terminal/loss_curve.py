"""metrics.jsonl → loss.svg: training loss and validation on one axis, against minutes."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from xml.sax.saxutils import escape

from lmcli.terminal.curve import Point, focus, means, round_ticks, smoothed, tick_labels
from lmcli.text.characters import visible

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 20, 64, 46
POINTS = 400  # of a curve at most
# a pause so many times as long as a usual one between two steps is a gap in the curve
GAP_PAUSES = 8.0
COLORS = """
.page { fill: #ffffff } .text { fill: #30363d } .quiet { fill: #6e7781 }
.grid { stroke: #e4e7eb } .raw { stroke: #9ec5e8 } .training { stroke: #1f6fb2 }
.validation { stroke: #b3417a } .dot { fill: #b3417a } .best { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } .text { fill: #d7dde4 } .quiet { fill: #8b949e }
.grid { stroke: #262c34 } .raw { stroke: #2b4c6b } .training { stroke: #62aef0 }
.validation { stroke: #e87fb4 } .dot { fill: #e87fb4 } .best { fill: #4ac26b } }
"""


def draw(
    metrics: Sequence[dict],
    name: str,
    target: str,
    bytes_per_token: float = 0.0,
    best_step: int | None = None,
) -> str:
    """An SVG of a run's logged objects; `name` is its title, the best was after `best_step` steps.

    Losses are in bits per byte, or in nats per `target` where `bytes_per_token` is 0.
    """
    unit, plotted, nats = f"nats per {target}", "val_loss", 1.0
    if bytes_per_token:
        unit, plotted, nats = "bits per byte", "val_bits_per_byte", math.log(2) * bytes_per_token
    losses = [(m["elapsed"], m["loss"] / nats) for m in metrics if _is_number(m, "loss")]
    evaluated = [m for m in metrics if _is_number(m, plotted)]
    evaluations = [(m["elapsed"], m[plotted]) for m in evaluated]
    best = [k for k, m in enumerate(evaluated) if m["step"] == best_step]
    starts, losses, evaluations = _minutes(losses, evaluations)
    smooth = smoothed(losses, 0.05)
    curves = _parts(smooth, starts)
    shown = [y for part in curves for _, y in part]
    low, high = focus(shown or [y for _, y in evaluations] or [0.0, 1.0])
    inside = [y for _, y in evaluations if y <= high] + [y for _, y in evaluations[-1:]]
    low, high = min([low, *inside]), max([high, *inside])
    axes = _Axes(max([x for x, _ in losses + evaluations], default=1.0) or 1.0, low, high)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<style>{COLORS}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="text" x="{LEFT}" y="24" font-size="15" font-weight="600">'
        f"{escape(visible(name, keep=''))}</text>",
        *_legend(unit),
        *axes.grid(),
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath><g clip-path="url(#plot)">',
        *(axes.line(part, "raw", 1.0) for part in _parts(losses, starts)),
        *(axes.line(part, "training", 2.0) for part in curves),
        axes.line(evaluations, "validation", 2.0),
        "</g>",
        *axes.marks(evaluations, best[-1] if best else None),
    ]
    return "\n".join(filter(None, [*elements, "</svg>"])) + "\n"


def _is_number(row: dict, key: str) -> bool:
    return row.get(key) is not None and row.get("elapsed") is not None


def _minutes(
    losses: list[Point], evaluations: list[Point]
) -> tuple[list[float], list[Point], list[Point]]:
    """(where a part begins, losses, evaluations), in minutes after the beginning of training."""
    times = [x for x, _ in losses]
    pauses = [b - a for a, b in pairwise(times)]
    usual = median(pauses) if pauses else 0.0
    begin = min([*times[:1], *(x for x, _ in evaluations[:1])], default=0.0)
    begin = max(0.0, begin - usual) if times[:1] == [begin] else begin
    starts = [
        (b - begin) / 60
        for a, b in pairwise(times)
        if b - a > GAP_PAUSES * usual and any(a < x <= b for x, _ in evaluations)
    ]
    losses, evaluations = (
        [((x - begin) / 60, y) for x, y in points] for points in (losses, evaluations)
    )
    return starts, losses, evaluations


def _parts(points: Sequence[Point], starts: Sequence[float]) -> list[list[Point]]:
    """The points between the gaps, few enough that the picture of a long run is small."""
    parts: list[list[Point]] = [[]]
    size = -(-len(points) // POINTS)
    borders = iter([*starts, math.inf])
    border = next(borders)
    for point in points:
        if point[0] >= border:
            parts.append([])
            border = next(borders)
        parts[-1].append(point)
    return [means(part, size) for part in parts if part]


def _legend(unit: str) -> list[str]:
    """What the colors mean, in a line below the title."""
    entries = (("training", f"training, {unit}", 150), ("validation", "validation", 100))
    x, elements = LEFT, []
    for name, text, space in entries:
        elements.append(
            f'<line class="{name}" x1="{x}" y1="42" x2="{x + 18}" y2="42" stroke-width="2.5"/>'
            f'<text class="text" x="{x + 24}" y="46">{escape(text)}</text>'
        )
        x += 24 + space + 7 * max(0, len(text) - 22)
    elements.append(
        f'<circle class="best" cx="{x + 6}" cy="42" r="5"/>'
        f'<text class="text" x="{x + 18}" y="46">best</text>'
    )
    return elements


class _Axes:
    """Minutes from 0 to `end`, and losses from `low` to `high`, as places in the picture."""

    def __init__(self, end: float, low: float, high: float):
        self.end, self.low, self.high = end, low, high
        self.seconds = end < 3  # short runs are in seconds
        self.bottom = HEIGHT - BOTTOM

    def x(self, minutes: float) -> float:
        """Where a time is."""
        return LEFT + (WIDTH - LEFT - RIGHT) * minutes / self.end

    def y(self, value: float) -> float:
        """Where a loss is."""
        extent = (self.high - self.low) or 1.0
        return TOP + (self.bottom - TOP) * (self.high - value) / extent

    def grid(self) -> list[str]:
        """Lines at round values with their labels."""
        factor, name = (60.0, "seconds") if self.seconds else (1.0, "minutes")
        times, losses = round_ticks(0, self.end * factor, 9), round_ticks(self.low, self.high, 7)
        elements = [
            f'<text class="quiet" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">'
            f"{name} of training</text>"
        ]
        for value, label in zip(losses, tick_labels(losses)):
            y = self.y(value)
            elements.append(
                f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
                f'<text class="quiet" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{label}</text>"
            )
        for value, label in zip(times, tick_labels(times)):
            x = self.x(value / factor)
            elements.append(
                f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{self.bottom}"/>'
                f'<text class="quiet" x="{x:.1f}" y="{self.bottom + 17}" text-anchor="middle">'
                f"{label}</text>"
            )
        return elements

    def line(self, points: Sequence[Point], name: str, width: float) -> str:
        """A curve; a single point is a short line, which can be seen."""
        if not points:
            return ""
        places = [(self.x(x), self.y(y)) for x, y in points]
        if len(places) == 1:
            places.append((places[0][0] + 1, places[0][1]))
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return (
            f'<polyline class="{name}" points="{text}" fill="none" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )

    def marks(self, evaluations: Sequence[Point], number: int | None) -> list[str]:
        """A dot for each evaluation in the picture; the best, of this number, with its value."""
        best = None if number is None else evaluations[number]
        elements = [
            f'<circle class="dot" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>'
            for x, y in evaluations
            if y <= self.high and (x, y) != best and len(evaluations) <= 50
        ]
        if best is None:
            return elements
        x, y = self.x(best[0]), self.y(best[1])
        anchor = "end" if x > WIDTH / 2 else "start"
        return [
            *elements,
            f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text class="best" x="{x:.1f}" y="{y - 10:.1f}" text-anchor="{anchor}" '
            f'font-weight="600">{best[1]:.3f}</text>',
        ]
