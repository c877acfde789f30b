"""Curves in braille and as SVG: points where they belong, round ticks, nothing outside."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcli.terminal import curve, loss_curve

SVG = "{http://www.w3.org/2000/svg}"


def dots(cells) -> set[tuple[int, int]]:
    """(x, y from the top) of each dot, by the numbering of Unicode 15, table 21-2 (dots 1 to 8)."""
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return {
        (2 * column + x, 4 * row + y)
        for row, line in enumerate(cells)
        for column, bits in enumerate(line)
        for number, (x, y) in enumerate(places)
        if bits >> number & 1
    }


def test_a_line_goes_from_corner_to_corner():
    cells = curve.braille([(0.0, 0.0), (1.0, 1.0)], 4, 2, (0.0, 1.0), (0.0, 1.0))
    assert dots(cells) == {(i, 7 - i) for i in range(8)}


def test_a_steep_line_has_no_holes_and_what_is_outside_is_left_out():
    points = [(0.0, 0.0), (0.5, 9.0), (1.0, 0.0)]
    shown = dots(curve.braille(points, 8, 4, (0.0, 1.0), (0.0, 2.0)))
    assert {y for x, y in shown if x < 3} == set(range(16)) == {y for x, y in shown if x > 12}
    assert not [x for x, y in shown if 5 <= x <= 10]


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-9, 9)), max_size=40), st.integers(1, 9))
def test_every_dot_is_inside(points, size):
    cells = curve.braille(points, size, size, (0.0, 5.0), (-2.0, 2.0))
    assert [len(line) for line in cells] == [size] * size
    assert all(0 <= bits < 256 for line in cells for bits in line)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 12))
def test_ticks_are_round_few_and_inside(low, extent, most):
    high = low + extent
    assume(extent > 1e-6 * abs(low))  # else doubles have too few digits
    ticks = curve.round_ticks(low, high, most)
    assert len(ticks) <= max(1, most)
    assert all(low - 1e-6 * extent <= tick <= high + 1e-6 * extent for tick in ticks)
    gaps = {f"{b - a:.1e}" for a, b in pairwise(ticks)}
    if extent > 1e-3 * abs(high):
        assert len({gap[0] for gap in gaps}) <= 1 and {gap[0] for gap in gaps} <= set("125")


@pytest.mark.parametrize(
    "low, high, most, labels",
    [
        (2.13, 2.48, 4, ["2.2", "2.3", "2.4"]),
        (0, 5000, 6, ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
        (0, 0.003, 4, ["0.000", "0.001", "0.002", "0.003"]),
        (3, 3, 4, ["3"]),
    ],
)
def test_labels_have_the_decimals_they_need(low, high, most, labels):
    assert curve.tick_labels(curve.round_ticks(low, high, most)) == labels


def test_a_series_is_bounded_and_keeps_its_mean():
    series = curve.Series()
    for i in range(100_000):
        series.add(i, math.nan if i % 1000 == 7 else float(i))
    assert curve.MOST_POINTS / 2 - 1 <= len(series.points) < curve.MOST_POINTS
    assert all(abs(x - y) < 1e-6 and b[0] > x for (x, y), b in pairwise(series.points))


def test_smoothing_keeps_a_straight_line_and_the_ends():
    line = [(float(i), 3.0 * i) for i in range(100)]
    smooth = curve.smoothed(line, 0.3)
    assert [x for x, _ in smooth] == [x for x, _ in line]
    assert [y for _, y in smooth] == pytest.approx([y for _, y in line])


def test_a_sparkline_is_measured_from_zero():
    assert curve.sparkline([100, 50, 25, 0], 9) == "█▅▃▁"
    assert len(curve.sparkline([1.0] * 100, 12)) == 12
    assert curve.sparkline([], 5) == curve.sparkline([0.0], 5) == ""


def metrics(steps: int, evaluations: int = 0, every: int = 10) -> list[dict]:
    """A step each half second; an evaluation of 20 s after each `every` steps."""
    rows, seconds = [], 30.0
    for i in range(steps):
        seconds += 0.5
        rows.append({"step": i + 1, "elapsed": seconds, "loss": 2 + 8.0 / (i + 1)})
        if (i + 1) % every == 0 and (i + 1) // every <= evaluations:
            seconds += 20.0
            value = {"val_loss": 9.0, "val_bits_per_byte": 3.0 + 1 / (i + 1)}
            rows.append({"step": i + 1, "elapsed": seconds, **value})
    return rows


def draw(*arguments, name="runs/a", target="token", bytes_per_token=2.0, best_step=None):
    return ElementTree.fromstring(
        loss_curve.draw(metrics(*arguments), name, target, bytes_per_token, best_step)
    )


def lines(svg, kind: str) -> list[list[tuple[float, float]]]:
    """The points of each curve of this class."""
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter(SVG + "polyline")
        if line.get("class") == kind
    ]


def texts(svg) -> list[str]:
    return [text.text for text in svg.iter(SVG + "text")]


@pytest.mark.parametrize("steps, evaluations", [(0, 0), (1, 0), (10, 1), (50, 4), (5000, 9)])
def test_every_run_gives_well_formed_svg_inside_its_frame(steps, evaluations):
    svg = draw(steps, evaluations)
    for kind in ("training", "raw", "validation"):
        for line in lines(svg, kind):
            assert all(
                loss_curve.LEFT <= x <= loss_curve.WIDTH - loss_curve.RIGHT + 1 for x, _ in line
            )
    # a steep beginning is cut off by the frame, the end is not
    for line in lines(svg, "validation") + lines(svg, "training")[-1:]:
        assert loss_curve.TOP <= line[-1][1] <= loss_curve.HEIGHT - loss_curve.BOTTOM
    assert len(lines(svg, "validation")) == (evaluations > 0)


def test_one_axis_in_one_unit_by_hand():
    """2 nats a token of 2 bytes are 1.4427 bits a byte, at the height of such a validation."""
    rows = [{"step": i, "elapsed": float(i), "loss": 2.0 if i > 5 else 2.5} for i in range(1, 20)]
    rows.append(
        {"step": 19, "elapsed": 20.0, "val_loss": 7.0, "val_bits_per_byte": 1 / math.log(2)}
    )
    svg = ElementTree.fromstring(loss_curve.draw(rows, "a", "token", 2.0, 19))
    (validation,) = lines(svg, "validation")
    assert lines(svg, "raw")[-1][-1][1] == pytest.approx(validation[0][1], abs=0.2)
    assert "training, bits per byte" in texts(svg) and "1.443" in texts(svg)
    nats = ElementTree.fromstring(loss_curve.draw(rows, "a", "text", 0.0, 19))
    assert "training, nats per text" in texts(nats) and "7.000" in texts(nats)


def test_there_is_a_gap_where_an_evaluation_was_and_none_elsewhere():
    svg = draw(50, 4)
    assert len(lines(svg, "training")) == len(lines(svg, "raw")) == 5
    assert len(lines(draw(50), "training")) == 1
    ends = [(line[0][0], line[-1][0]) for line in lines(svg, "training")]
    for (_, end), (begin, _) in pairwise(ends):
        assert begin - end > 50  # 20 of 105 s


def test_the_axis_begins_with_training_and_its_ticks_are_round():
    svg = draw(1201)  # 10 minutes after 30 s of preparation
    shown = texts(svg)
    assert {"0", "2", "4", "6", "8", "10", "minutes of training"} <= set(shown)
    assert lines(svg, "raw")[0][0][0] == pytest.approx(loss_curve.LEFT, abs=2)
    assert "seconds of training" in texts(draw(100))


def test_the_best_is_marked_and_the_title_is_the_name():
    svg = draw(50, 4, name="a <b> & c", best_step=40)
    assert texts(svg)[0] == "a <b> & c" and "3.025" in texts(svg)
    best = [circle for circle in svg.iter(SVG + "circle") if circle.get("class") == "best"]
    x, y = lines(svg, "validation")[0][-1]
    assert (float(best[-1].get("cx")), float(best[-1].get("cy"))) == (x, y)
    # the best by accuracy is not the one with the lowest loss
    *_, marked = draw(50, 4, best_step=20).iter(SVG + "circle")
    assert float(marked.get("cx")) == lines(svg, "validation")[0][1][0]
    assert "best" not in [circle.get("class") for circle in draw(50, 4).iter(SVG + "circle")][1:]


def test_the_picture_of_a_long_run_is_small():
    text = loss_curve.draw(metrics(100_000), "a", "token", 2.0)
    assert len(text) < 40_000 and len(lines(ElementTree.fromstring(text), "raw")[0]) <= 400


def test_values_that_are_no_numbers_are_left_out():
    rows = [*metrics(20, 1), {"step": 21, "elapsed": 80.0, "loss": None}]
    rows.append({"step": 21, "elapsed": 81.0, "val_loss": None, "val_bits_per_byte": None})
    assert "None" not in loss_curve.draw(rows, "a", "token", 2.0)


def luminance(color: str) -> float:
    """Relative luminance as in WCAG 2.1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_have_the_contrast_that_the_web_asks_for_in_light_and_dark():
    light, dark = loss_curve.COLORS.split("@media")
    for rules in (light, dark):
        colors = dict(re.findall(r"\.(\w+) \{ \w+: (#\w{6})", rules))
        page = luminance(colors["page"])
        for name, least in (("text", 4.5), ("quiet", 4.5), ("training", 3), ("validation", 3)):
            high, low = sorted((page, luminance(colors[name])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (name, rules)


def test_a_title_with_control_characters_leaves_the_picture_valid():
    svg = loss_curve.draw([{"elapsed": 1.0, "loss": 2.0}], "a\x1b[31m<b>", "token")
    ElementTree.fromstring(svg)
    assert "␛[31m&lt;b&gt;" in svg
