"""Everything drawn: live progress and tables on a terminal, plain lines elsewhere. It is handed records and prints them."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


def note(text: str) -> None:
    """One line on standard error: what was chosen, left out, changed."""
    print(f"lm: {text}", file=sys.stderr, flush=True)


def clock(seconds: float | None) -> str:
    """"1:05" or "2:03:04"; "–" while unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, columns right-aligned but the first, as text."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        drawn.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        drawn.add_row(*map(Text, row))
    wide = Console(width=1 << 14)
    needed = Measurement.get(wide, wide.options, drawn).minimum  # a number is never cut off, whatever the terminal's width
    console = Console(width=max(80, Console().width, needed))
    with console.capture() as captured:
        console.print(drawn)
    return captured.get()


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool,
               readable: Callable[[Mapping[str, Any]], dict[str, str]] | None = None) -> None:
    """Rows of figures on standard output: JSON Lines (all of a row) or TSV (its `columns`) as they come, on a terminal a
    table when all are there, of what `readable` makes of a row."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    elif sys.stdout.isatty():
        lines = [readable(row) if readable else {key: _cell(row[key]) for key in columns} for row in rows]
        print(table(list(lines[0]), [list(line.values()) for line in lines]), end="")
    else:
        for number, row in enumerate(rows):
            if not number:
                print("\t".join(columns))
            print("\t".join(_cell(row[key]) for key in columns), flush=True)


def _cell(value: Any) -> str:
    """A value as TSV has it: six figures of a fraction, NA for None."""
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class TrainingView:
    """The progress of a run. On a terminal a live panel; otherwise a line every ten seconds; with `quiet` nothing.

    `target` is what a loss is told for; `bytes_per_token`, unless 0, turns nats per token into bits per byte.
    """

    def __init__(self, quiet: bool, bytes_per_token: float = 0.0, target: str = "token"):
        self.console = Console(stderr=True, highlight=False)
        self.quiet, self.bytes_per_token, self.target = quiet, bytes_per_token, target
        self.live = None
        self.loss = self.speed = self.last = None
        self.figures = self.sample_text = ""
        self._printed = time.monotonic()

    def __enter__(self) -> "TrainingView":
        if self.console.is_terminal and not self.quiet:
            self.live = Live(console=self.console, refresh_per_second=8, transient=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def step(self, step) -> None:
        """Shows a training step (smoothed over about 20)."""
        self.loss = step.loss if self.loss is None else 0.95 * self.loss + 0.05 * step.loss
        self.speed = step.tokens_per_second if self.speed is None else 0.9 * self.speed + 0.1 * step.tokens_per_second
        self.last = step
        if self.live:
            self._draw()
        elif not self.quiet and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(self._line(step), file=sys.stderr, flush=True)

    def _draw(self) -> None:
        if self.live and self.last:
            self.live.update(self._panel(self.last))

    def _line(self, step) -> str:
        return (f"step {step.step:,} · {step.share:.0%} · epoch {step.epoch:.2f} · loss {self._loss()} "
                f"· {self.speed:,.0f} tokens/s · {clock(step.remaining)} left")

    def _loss(self, mark: str = "", end: str = "") -> str:
        told = f"{mark}{self.loss:.3f}{end} nats/{self.target}"
        if not self.bytes_per_token:
            return told
        return f"{told} = {mark}{self.loss / math.log(2) / self.bytes_per_token:.3f}{end} bits/byte"

    def _panel(self, step) -> Table:
        grid = Table.grid(padding=(0, 1))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=step.share, width=30), f"{step.share:.0%}",
                    f"[bold]{clock(step.remaining)}[/bold] left", f"step {step.step:,}", f"epoch {step.epoch:.2f}")
        grid.add_row(bar)
        grid.add_row(f"training   loss {self._loss('[bold]', '[/bold]')} · {self.speed:,.0f} tokens/s "
                     f"· rate {step.learning_rate:.2g}")
        if self.figures:
            grid.add_row(Text(self.figures))
        if self.sample_text:
            grid.add_row(Text(self.sample_text, style="italic dim", overflow="fold"))
        return grid

    def validation(self, event) -> None:
        """Shows an evaluation."""
        when = f"step {event.step:,}" if event.step else "before the first step"
        self.figures = f"validation {event.figures.headline()} ({when}{', best' if event.best else ''})"
        self._draw()
        if not self.live and not self.quiet:
            print(self.figures, file=sys.stderr, flush=True)

    def sample(self, text: str) -> None:
        """Shows a sample text, on one line outside a terminal."""
        self.sample_text = " ".join(text.split())
        self._draw()
        if not self.live and not self.quiet:
            print(f"sample     {self.sample_text}", file=sys.stderr, flush=True)

    def note(self, event) -> None:
        """Shows one line that stays: what the run changed by itself."""
        if self.live:
            self.console.print(f"lm: {event.text}", markup=False)
        elif not self.quiet:
            note(event.text)
