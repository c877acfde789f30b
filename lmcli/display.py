"""Terminal output: live progress, tables and Markdown on a terminal, plain lines elsewhere.

rich is loaded when it draws something: it takes as long as a short text takes to write.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lmcli.data.output_file import json_line
from lmcli.terminal import progress
from lmcli.terminal.live_region import LiveRegion, can_redraw
from lmcli.terminal.tables import Cell, Column, table
from lmcli.terminal.training_state import Evaluated, Report, SampleText, TrainingState, clock
from lmcli.terminal.wrapping import message_for
from lmcli.text.characters import for_stream, without_surrogates

if TYPE_CHECKING:
    from rich.text import Text

    from lmcli.runs.run import TrainingRun
    from lmcli.training.loop import Due, Validation
    from lmcli.training.train_step import Note, Step

SECONDS_BETWEEN_LINES = 10.0
MARKDOWN_COLUMNS = 100


def note(text: str) -> None:
    """Prints a message on standard error: what was chosen, skipped or changed."""
    print(message_for(sys.stderr, f"lm: {text}"), file=sys.stderr, flush=True)


def markdown(text: str) -> str:
    """Markdown rendered for this terminal, at most MARKDOWN_COLUMNS wide."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=min(MARKDOWN_COLUMNS, Console().width))
    with console.capture() as captured:
        console.print(Markdown(text, code_theme="ansi_dark"))
    return captured.get()


def print_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    readable: Callable[[Mapping[str, Any]], Mapping[str | Column, Cell]] = lambda row: {},
) -> None:
    """Prints rows of figures on standard output.

    JSON Lines (all keys) and TSV (`columns`) are printed as the rows come. A terminal gets a table
    at the end, with the cells that `readable` returns for a row.
    """
    if as_json:
        for row in rows:
            line = json_line(without_surrogates(row))
            print(for_stream(line, sys.stdout), end="", flush=True)
    elif sys.stdout.isatty():
        lines = [readable(row) for row in rows]
        print(table(list(lines[0]), [list(line.values()) for line in lines]), end="")
    else:
        for number, row in enumerate(rows):
            if not number:
                print("\t".join(columns))
            print("\t".join(_cell(row[key]) for key in columns), flush=True)


def _cell(value: Any) -> str:
    """A TSV cell: floats with six significant digits, NA for None."""
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# what is due between steps → how the screen calls it
PHASES = {"evaluation": "evaluating", "save": "saving", "sample": "writing a sample"}


class TrainingView:
    """Progress of a run: a live screen on a terminal, elsewhere a line every ten seconds.

    Prints nothing with `quiet`. It begins before there is a run, and shows stages of `progress`.
    `live` is True on a terminal.
    """

    def __init__(self, quiet: bool):
        self.quiet, self.state = quiet, TrainingState()
        self._region: LiveRegion | None = None
        self.live = not quiet and can_redraw(sys.stderr)
        self._context = ExitStack()
        self._printed = time.monotonic()
        self._plotted = "val_loss"

    def __enter__(self) -> TrainingView:
        progress.watch(self if self.live else None)
        progress.now("starting")
        if self.live:
            self._region = self._context.enter_context(LiveRegion(sys.stderr, self._lines))
        return self

    def __exit__(self, *_: object) -> None:
        self.end(f"stopped at step {self.state.step:,}")
        progress.watch(None)
        self._context.close()

    def end(self, how: str = "", report: Report | None = None) -> None:
        """Ends the live screen; the final state stays, and the report. Not a second time."""
        if self._region:
            from lmcli.terminal.training_screen import final_lines, report_lines

            self.state.ended = how or "done"
            lines = final_lines(self.state, self._region.columns)
            if report:
                lines += report_lines(report, self._region.columns)
            self._region.close(lines)
            self._region = None

    def begin(self, run: TrainingRun) -> None:
        """Shows this run from now on, with what it has logged before a resume."""
        from lmcli.model.device import peak_memory

        state = self.state
        state.name, state.target = str(run.folder), run.objective.target
        state.unit, self._plotted = f"nats/{state.target}", "val_loss"
        if run.record.data.bytes_per_token:
            state.unit, self._plotted = "bits/byte", "val_bits_per_byte"
            state.nats_per_unit = math.log(2) * run.record.data.bytes_per_token
        state.memory = partial(peak_memory, run.record.device_config.device)
        state.stopping = lambda: run.trainer.stop
        state.selection = run.objective.selection(run.record.recipe.train)
        for row in run.record.folder.metrics() if self.live else ():
            if row.get("loss") is not None:
                state.losses.add(row["step"], row["loss"] / state.nats_per_unit)
            elif row.get(self._plotted) is not None:
                value, step = row[self._plotted], row["step"]
                best, headline = step == run.trainer.counters.best_step, f"{value:.4f} {state.unit}"
                state.evaluations.append(Evaluated(step, value, headline, best))
        compiled = run.trainer.train_step.compiled
        progress.now("compiling the model" if compiled else "making the first step")

    def show(self, kind: str, event: Any) -> None:
        """Shows an event of a run; `kind` is step, due, validation, sample or note."""
        views: dict[str, Callable[[Any], None]] = {
            "step": self.step,
            "due": self.due,
            "validation": self.validation,
            "sample": self.sample,
            "note": self.note,
        }
        views[kind](event)

    def step(self, step: Step) -> None:
        """Shows a training step."""
        progress.now("")
        self.state.add_step(
            step.step,
            step.loss,
            step.tokens_per_second,
            step.share,
            step.epoch,
            step.learning_rate,
            step.elapsed,
            step.remaining,
            time.monotonic(),
        )
        if self._line_is_due():
            self._print(self._line(step))

    def _line(self, step: Step) -> str:
        speed = self.state.tokens_per_second or 0.0
        return (
            f"step {step.step:,} · {step.share:.0%} · epoch {step.epoch:.2f} · loss {self._loss()} "
            f"· {speed:,.0f} tokens/s · {clock(step.remaining)} left"
        )

    def _loss(self) -> str:
        loss, state = self.state.loss or 0.0, self.state
        nats = f"{loss:.3f} nats/{state.target}"
        if state.nats_per_unit == 1.0:
            return nats
        return f"{nats} = {loss / state.nats_per_unit:.3f} {state.unit}"

    def told(self) -> None:
        """Nothing: the live screen looks by itself."""

    def hidden(self, text: bytes) -> AbstractContextManager[None]:
        """Nothing: the live screen moves down by itself."""
        return nullcontext()

    def _lines(self, columns: int, rows: int) -> list[Text]:
        from lmcli.terminal.training_screen import live_lines

        shown = progress.shown()
        state = replace(self.state, phase=shown if shown.stage.label else None)
        return live_lines(state, columns, rows, time.monotonic())

    def due(self, event: Due) -> None:
        """Shows what is done between steps; an evaluation as a line, if there was none lately."""
        progress.now(PHASES[event.what], event.seconds)
        if event.what == "evaluation" and self._line_is_due():
            self._print(f"evaluating after step {event.step:,} …")

    def _line_is_due(self) -> bool:
        """True every SECONDS_BETWEEN_LINES, where lines are printed."""
        if self.quiet or self.live:
            return False
        if time.monotonic() - self._printed < SECONDS_BETWEEN_LINES:
            return False
        self._printed = time.monotonic()
        return True

    def validation(self, event: Validation) -> None:
        """Shows the figures of an evaluation."""
        headline = event.figures.headline()
        value = event.figures.metrics().get(self._plotted, math.nan)
        self.state.evaluations.append(Evaluated(event.step, value, headline, event.best))
        progress.now("")
        when = f"step {event.step:,}" if event.step else "before the first step"
        best = ", best" if event.best else ""
        self._print(f"validation {headline} ({when}{best})")

    def sample(self, sample: SampleText) -> None:
        """Shows a sample text, on one line outside a terminal."""
        self.state.samples.append(sample)
        progress.now("")
        if not sample.finished:
            self._print(f"sample     {' '.join(sample.text.split())}")

    def _print(self, line: str) -> None:
        if not self.live and not self.quiet:
            print(message_for(sys.stderr, line), file=sys.stderr, flush=True)

    def note(self, event: Note) -> None:
        """Shows a message that stays: what the run has changed by itself."""
        if not self.quiet:
            note(event.text)
