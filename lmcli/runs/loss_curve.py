"""metrics.jsonl → loss.svg: training loss and the validation figure against time, as plain SVG."""

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 56, 28, 40
POINTS = 400


def draw(metrics: list[dict], target: str, plotted: str) -> str:
    """An SVG of a run's logged objects: the training loss (left axis), in nats per `target`.

    The right axis is the validation metric `plotted`: val_bits_per_byte or val_loss.
    """
    unit = "bits per byte" if plotted == "val_bits_per_byte" else f"nats per {target}"
    losses = [(m["elapsed"], m["loss"]) for m in metrics if "loss" in m]
    validations = [(m["elapsed"], m[plotted]) for m in metrics if plotted in m]
    end = max([seconds for seconds, _ in losses + validations], default=1.0) or 1.0
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    elements += _time_axis(end)
    title = f"training loss (nats per {target})"
    elements += _series(_smoothed(losses), end, "#4477aa", title, LEFT, "end", marks=False)
    title, right = f"validation ({unit})", WIDTH - RIGHT
    elements += _series(validations, end, "#cc6677", title, right, "start", marks=True)
    return "\n".join([*elements, "</svg>"]) + "\n"


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over groups of equal size, so that the picture of a long run stays small."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _x(seconds: float, end: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * seconds / end


def _time_axis(end: float) -> list[str]:
    bottom = HEIGHT - BOTTOM
    lines = [f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" stroke="#999"/>']
    unit, name = (60, "min") if end > 180 else (1, "s")
    return lines + [
        f'<text x="{_x(end * i / 4, end):.0f}" y="{bottom + 16}" text-anchor="middle">'
        f"{end * i / 4 / unit:.3g} {name}</text>"
        for i in range(5)
    ]


def _series(
    points: list[tuple[float, float]],
    end: float,
    color: str,
    title: str,
    axis: int,
    anchor: str,
    marks: bool,
) -> list[str]:
    if not points:
        return []
    low, high = min(value for _, value in points), max(value for _, value in points)
    extent = (high - low) or 1.0

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / extent

    shift = -6 if anchor == "end" else 6
    ticks = [
        f'<text x="{axis + shift}" y="{y(value) + 4:.1f}" text-anchor="{anchor}" '
        f'fill="{color}">{value:.2f}</text>'
        for value in (low, low + extent / 2, low + extent)
    ]
    line = " ".join(f"{_x(at, end):.1f},{y(value):.1f}" for at, value in points)
    dots = [
        f'<circle cx="{_x(at, end):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>'
        for at, value in points
    ]
    inward = "start" if anchor == "end" else "end"
    heading = f'<text x="{axis}" y="16" text-anchor="{inward}" fill="{color}">{title}</text>'
    return [
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>',
        *ticks,
        heading,
        *(dots if marks else []),
    ]
