"""Draws a TrainingState: lines that fit a terminal, live and when the run has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len
from rich.text import Text

from lmcli.terminal import curve
from lmcli.terminal.progress_line import line_text
from lmcli.terminal.training_state import Comparison, Report, SampleText, TrainingState, clock
from lmcli.terminal.wrapping import WordWrap
from lmcli.text.characters import visible

TRAINING, VALIDATION, BEST, QUIET = "cyan", "magenta", "bold green", "dim"
MARK, BEST_MARK = "●", "◆"
MOST_COLUMNS = 118  # a line of text that is longer reads badly
MOST_BOX_COLUMNS = 88
MOST_CURVE_ROWS, LOW_CURVE_ROWS, FEWEST_CURVE_ROWS, FINAL_CURVE_ROWS = 14, 6, 4, 8
FEWEST_CURVE_COLUMNS = 20
MOST_SAMPLES, FINAL_SAMPLES = 8, 6
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def live_lines(state: TrainingState, columns: int, rows: int, now: float) -> list[Text]:
    """The screen of a run under way, at most `rows` lines of at most `columns`."""
    state, columns = state.copy(), min(columns, MOST_COLUMNS)
    if not state.step and not state.losses.points:
        return [_phase_line(state, columns, now)] if state.phase else []
    lines = [_bar_line(state, columns, now), *_figure_lines(state, columns, now)]
    room = rows - len(lines)
    texts = 0
    if state.samples:
        newest = len(_sample_lines(state.samples[-1:], columns, rows, 1))
        texts = 1 + newest + min(MOST_SAMPLES, len(state.samples)) - 1
    height = min(MOST_CURVE_ROWS, max(room - 2 - texts, min((room - 2) // 2, LOW_CURVE_ROWS)))
    if height >= FEWEST_CURVE_ROWS and (drawn := curve_lines(state, columns, height)):
        lines += [Text(), *drawn]
    room = rows - len(lines)
    if state.samples and room > 2:
        lines += [Text(), *_sample_lines(state.samples, columns, room - 1, MOST_SAMPLES)]
    elif state.samples and room > 0:
        lines += _sample_lines(state.samples[-1:], columns, 1, 1)
    return lines[:rows]


def final_lines(state: TrainingState, columns: int) -> list[Text]:
    """What stays on the terminal when a run has ended: figures, curve and samples, a line each."""
    columns = min(columns, MOST_COLUMNS)
    if not state.step:
        return []
    lines = [_bar_line(state, columns, 0.0), *_figure_lines(state, columns, 0.0)]
    lines += [Text(), *curve_lines(state, columns, FINAL_CURVE_ROWS)]
    if state.samples:
        lines += [Text(), *_sample_lines(state.samples, columns, 16, FINAL_SAMPLES)]
    return lines


def report_lines(report: Report, columns: int) -> list[Text]:
    """A box with what a run has reached and what that means; below it the commands to try."""
    columns = min(columns, MOST_BOX_COLUMNS)
    inner = columns - 4
    first, *rest = (Text(visible(figure)) for figure in report.figures)
    first.stylize(BEST)
    lines = flow([first, *rest], inner)
    if report.comparison:
        lines += [Text(), *_comparison_lines(report.comparison, inner)]
    name = shorten(visible(report.name, keep=""), inner - 2)
    top = Text("╭─ ", style=QUIET).append(name, style="bold")
    top.append(f" {'─' * (columns - 5 - cell_len(name))}╮", style=QUIET)
    boxed = [top]
    for line in lines:
        boxed.append(Text("│ ", style=QUIET).append_text(line))
        boxed[-1].append(" " * (inner - line.cell_len)).append(" │", style=QUIET)
    boxed.append(Text(f"╰{'─' * (columns - 2)}╯", style=QUIET))
    commands = [Text(f"  {visible(command)}") for command in report.commands]
    return [*boxed, Text("Try next:", style="bold"), *commands]


def _comparison_lines(comparison: Comparison, columns: int) -> list[Text]:
    """A bar for each value, as long as it is large."""
    top = max((value for value in comparison.values.values() if math.isfinite(value)), default=0.0)
    names = max(map(len, comparison.values))
    figures = [f"{value:7.3f}" for value in comparison.values.values()]
    room = max(1, columns - names - max(map(len, figures)) - 2)
    lines = []
    for number, (name, value) in enumerate(comparison.values.items()):
        line = Text(f"{name:{names}} {figures[number]} ", style="" if number else "bold")
        size = round(room * value / top) if top > 0 and math.isfinite(value) else 0
        lines.append(line.append("━" * size, style=QUIET if number else TRAINING))
    texts = [comparison.unit, comparison.remark]
    return [*lines, *(Text(line, QUIET) for text in texts for line in _wrapped(text, columns))]


# -- figures


def _phase_line(state: TrainingState, columns: int, now: float) -> Text:
    """What happens before the first step, and for how long already."""
    assert state.phase is not None
    spinner = SPINNER[int(now * 10) % len(SPINNER)]
    text = f"{spinner} {line_text(state.phase, state.phase.stage.age(now), columns - 2)}"
    return Text(text[:columns], style=TRAINING, no_wrap=True)


def _bar_line(state: TrainingState, columns: int, now: float) -> Text:
    """The share of the budget that is used, and the time that is left."""
    figures = f" {state.share:4.0%} "
    time = state.ended or f"{clock(state.seconds_left(now))} left"
    size = max(4, columns - len(figures) - len(time) - 1)
    halves = round(2 * size * min(1.0, state.share))
    full, half = divmod(halves, 2)
    bar = Text().append("━" * full + "╸" * half, style=TRAINING)
    bar.append("━" * (size - full - half), style=QUIET)
    return bar.append(figures).append(time, style="bold")


def _figure_lines(state: TrainingState, columns: int, now: float) -> list[Text]:
    """The figures of the last step and of the last evaluations, as many lines as they need."""
    speed = Text(f"{state.tokens_per_second or 0:,.0f} tokens/s ")
    speed.append(curve.sparkline([y for _, y in state.speeds.points[1:]], 12), style=TRAINING)
    items = [Text(f"step {state.step:,}"), Text(f"epoch {state.epoch:.2f}"), speed]
    items.append(Text(f"rate {state.learning_rate:.2g}"))
    if memory := state.memory():
        items.append(Text(size_text(memory)))
    if state.stopping() and not state.ended:
        items.insert(0, Text("stopping", style="bold"))
    if state.phase and not state.ended:
        stage = state.phase.stage
        passed = f"{visible(stage.label, keep='')} {clock(stage.age(now))}"
        items.insert(0, Text(passed, style="bold"))
    loss = Text().append("⠒⠤ training ", style=TRAINING)
    loss.append(f"{(state.loss or 0.0) / state.nats_per_unit:.3f} {state.unit}")
    losses = [loss]
    if state.nats_per_unit != 1.0:
        losses.append(Text(f"{state.loss or 0.0:.3f} nats/{state.target}", style=QUIET))
    lines = [*flow(items, columns), *flow(losses, columns)]
    if state.evaluations:
        lines += _evaluation_lines(state, columns)
    return lines


def _evaluation_lines(state: TrainingState, columns: int) -> list[Text]:
    last, best = state.evaluations[-1], state.best
    head, *rest = [visible(figure) for figure in last.headline.split(" · ")]
    style, mark = (BEST, BEST_MARK) if last.best else (VALIDATION, MARK)
    first = Text().append(f"{mark}  validation ", style=style).append(head)
    items = [first, *map(Text, rest), Text(_when(last.step) + (", best" if last.best else ""))]
    if best and best is not last:
        by_loss = state.selection == "lowest loss"
        figure = f"{best.value:.3f}" if by_loss else f"({state.selection})"
        items.append(Text(f"{BEST_MARK} best {figure} at {_when(best.step)}", style=BEST))
    return flow(items, columns)


def _when(step: int) -> str:
    return f"step {step:,}" if step else "before the first step"


def size_text(size: float) -> str:
    """Bytes as "512 MB" or "1.4 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def flow(items: Iterable[Text], columns: int, between: str = " · ") -> list[Text]:
    """The items one after the other, in as many lines as needed; none is cut unless it must be."""
    lines: list[Text] = []
    for item in items:
        if item.cell_len > columns:
            item.truncate(columns, overflow="ellipsis")
        if lines and lines[-1].cell_len + len(between) + item.cell_len <= columns:
            lines[-1].append(between, style=QUIET).append_text(item)
        else:
            lines.append(item.copy())
    return lines


# -- the curve


def curve_lines(state: TrainingState, columns: int, rows: int) -> list[Text]:
    """Training loss and evaluations over the steps on one axis; nothing for fewer than two steps.

    The last line are the steps.
    """
    points = curve.smoothed(state.losses.points)
    evaluations = [
        (float(each.step), each.value) for each in state.evaluations if math.isfinite(each.value)
    ]
    if len(points) < 2 or columns < FEWEST_CURVE_COLUMNS:
        return []
    low, high = curve.focus([y for _, y in points])
    within = [y for _, y in evaluations if y <= high]
    low, high = min([low, *within]), max([high, *(y for _, y in evaluations[-1:])])
    ticks = curve.round_ticks(low, high, max(2, rows // 2))
    labels = dict(zip((_row(tick, low, high, rows) for tick in ticks), curve.tick_labels(ticks)))
    margin = max(map(len, labels.values()))
    columns -= margin + 2
    x_range = 0.0, max(points[-1][0], *(each.step for each in state.evaluations), 1.0)
    cells = _cells(points, evaluations, state, columns, rows, x_range, (low, high))
    lines = []
    for row in range(rows):
        text = Text(f"{labels.get(row, ''):>{margin}} ", style=QUIET)
        text.append("┤" if row in labels else "│", style=QUIET)
        for style, run in groupby(cells[row], key=itemgetter(1)):
            text.append("".join(character for character, _ in run), style=style)
        lines.append(text)
    steps = [x for x in curve.round_ticks(*x_range, max(2, columns // 14)) if x.is_integer()]
    return [*lines, _step_labels(steps, x_range[1], margin + 2, columns)]


def _row(value: float, low: float, high: float, rows: int) -> int:
    return min(rows - 1, max(0, int((high - value) / ((high - low) or 1.0) * rows)))


def _cells(
    points: Sequence[curve.Point],
    evaluations: Sequence[curve.Point],
    state: TrainingState,
    columns: int,
    rows: int,
    x_range: curve.Point,
    y_range: curve.Point,
) -> list[list[tuple[str, str]]]:
    """(character, style) of each cell of the curve's rows: validation is drawn over training."""
    size = columns, rows, x_range, y_range
    layers = [(curve.braille(points, *size), TRAINING)]
    layers.append((curve.braille(evaluations, *size), VALIDATION))
    cells = [[(" ", "")] * columns for _ in range(rows)]
    for dots, style in layers:
        for row, line in zip(cells, dots):
            row[:] = [
                (chr(0x2800 + bits), style) if bits else cell for bits, cell in zip(line, row)
            ]
    # marks
    best = state.best
    marked = state.evaluations if len(evaluations) <= columns // 4 else []
    for each in [*marked, *([best] if best else [])]:
        if y_range[0] <= each.value <= y_range[1]:
            column = round(each.step / x_range[1] * (columns - 1))
            style, mark = (BEST, BEST_MARK) if each is best else (VALIDATION, MARK)
            cells[_row(each.value, *y_range, rows)][column] = mark, style
    return cells


def _step_labels(ticks: Sequence[float], end: float, margin: int, columns: int) -> Text:
    """The steps below a curve, each label in the middle below its step."""
    line, name = "", "step"
    room = margin + columns - len(name) - 1
    for tick, label in zip(ticks, curve.tick_labels(ticks)):
        start = margin + round(tick / end * (columns - 1)) - len(label) // 2
        if start > len(line) and start + len(label) <= room:
            line = line.ljust(start) + label
    return Text(f"{line:{room}} {name}", style=QUIET)


# -- samples


def _sample_lines(samples: Sequence[SampleText], columns: int, rows: int, most: int) -> list[Text]:
    """The newest sample whole below older ones, a line each; in at most `rows` lines."""
    newest = samples[-1]
    width = max(len(f"{sample.step:,}") for sample in samples)
    columns -= width + 2
    whole = _wrapped(newest.text, columns)
    older = samples[:-1]
    room = min(most - 1, max(0, rows - min(len(whole), max(2, rows // 2))))
    if len(older) > room:  # the first one, and the last ones
        older = [*older[:1], *older[len(older) - room + 1 :]] if room > 0 else []
    shown = whole[: rows - len(older)]
    if len(shown) < len(whole):
        shown[-1] = shorten(f"{shown[-1]} …", columns)
    lines = [
        _labeled(f"{sample.step:,}", shorten(_one_line(sample.text), columns), width, QUIET)
        for sample in older
    ]
    for number, line in enumerate(shown):
        lines.append(_labeled("" if number else f"{newest.step:,}", line, width, "italic"))
    return lines


def _labeled(label: str, text: str, width: int, style: str) -> Text:
    return Text(f"{label:>{width}}  ", style=QUIET).append(text, style=style)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()), keep="")


def _wrapped(text: str, columns: int) -> list[str]:
    """The text's lines, wrapped at words where there are any, without blank ones."""
    wrap = WordWrap(lambda: max(1, columns))
    lines = wrap.push(f"{visible(text.expandtabs(4))}\n").splitlines()
    return [line.strip() for line in lines if line.strip()] or [""]


def shorten(text: str, columns: int) -> str:
    """The text, cut after a word and with "…" if it is too wide."""
    if cell_len(text) <= columns:
        return text
    return f"{_wrapped(text, columns - 2)[0].rstrip(' …')} …"
