"""metrics.jsonl → loss.svg: training loss and the validation figure against time, as plain SVG."""

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 56, 28, 40
POINTS = 400


def draw(metrics: list[dict], target: str = "token") -> str:
    """An SVG of the logged objects of a run: loss (nats per `target`, left axis), and on the right axis what validation
    found: bits per byte, or for all but plain tokens the loss."""
    figure, unit = ("val_bits_per_byte", "bits per byte") if target == "token" else ("val_loss", f"nats per {target}")
    steps = [(m["elapsed"], m["loss"]) for m in metrics if "loss" in m]
    checks = [(m["elapsed"], m[figure]) for m in metrics if figure in m]
    end = max([point[0] for point in steps + checks], default=1.0) or 1.0
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="11" fill="#444">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    parts += _time_axis(end)
    parts += _series(_smoothed(steps), end, "#4477aa", f"training loss (nats per {target})", LEFT, "end", marks=False)
    parts += _series(checks, end, "#cc6677", f"validation ({unit})", WIDTH - RIGHT, "start", marks=True)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal runs of points, so that a long run stays a small picture."""
    size = -(-len(points) // POINTS)
    groups = [points[i:i + size] for i in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _x(seconds: float, end: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * seconds / end


def _time_axis(end: float) -> list[str]:
    bottom = HEIGHT - BOTTOM
    lines = [f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" stroke="#999"/>']
    unit, name = (60, "min") if end > 180 else (1, "s")
    return lines + [f'<text x="{_x(end * i / 4, end):.0f}" y="{bottom + 16}" text-anchor="middle">'
                    f'{end * i / 4 / unit:.3g} {name}</text>' for i in range(5)]


def _series(points: list[tuple[float, float]], end: float, color: str, title: str, axis: int, anchor: str,
            marks: bool) -> list[str]:
    if not points:
        return []
    low, high = min(value for _, value in points), max(value for _, value in points)
    room = (high - low) or 1.0

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / room

    shift = -6 if anchor == "end" else 6
    ticks = [f'<text x="{axis + shift}" y="{y(value) + 4:.1f}" text-anchor="{anchor}" fill="{color}">{value:.2f}</text>'
             for value in (low, low + room / 2, low + room)]
    line = " ".join(f"{_x(at, end):.1f},{y(value):.1f}" for at, value in points)
    dots = [f'<circle cx="{_x(at, end):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>' for at, value in points]
    corner = f'<text x="{axis}" y="16" text-anchor="{"start" if anchor == "end" else "end"}" fill="{color}">{title}</text>'
    return [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>', *ticks, corner,
            *(dots if marks else [])]
