"""How far a command is: one line at the bottom of a terminal, gone when the command ends."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lmcli.terminal import progress
from lmcli.terminal.tables import fit
from lmcli.terminal.training_state import clock
from lmcli.terminal.wrapping import moves_cursor
from lmcli.text.characters import visible

SECONDS_BEFORE = 1.0  # that a stage takes before it is shown
SECONDS_BETWEEN = 0.25  # two drawings
SECONDS_AFTER_TEXT = 1.0  # on the same terminal
BAR_COLUMNS = 20
ASCII = str.maketrans("━─·–…", "#-,-~")


@contextmanager
def progress_line(quiet: bool = False) -> Iterator[None]:
    """Shows the stages of the command that runs inside, if standard error is a terminal."""
    stream = sys.stderr
    if quiet or not stream or not moves_cursor(stream):
        yield
        return
    output, line = sys.stdout, ProgressLine(stream.fileno(), stream.encoding)
    if output and output.isatty() and isinstance(output, io.TextIOWrapper):
        output.flush()
        terminal = progress.TerminalFile(output.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(terminal), output.encoding, output.errors, line_buffering=True
        )
    progress.watch(line)
    line.start()
    try:
        yield
    finally:
        progress.watch(None)
        line.stop()


class ProgressLine:
    """Draws the line from a thread, so that the work is not slowed and time goes on."""

    def __init__(self, terminal: int, encoding: str = "utf-8"):
        self.terminal, self.encoding = terminal, encoding
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._drawn = ""
        self._free_at, self._new_line = 0.0, True  # whether the cursor is where a line starts
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begins to look at the stages."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, and clears the line."""
        self._ended.set()
        with self._lock:
            self._erase()

    def told(self) -> None:
        """Nothing: the thread looks by itself."""

    @contextmanager
    def hidden(self, text: bytes) -> Iterator[None]:
        """Clears the line while text that ends so is written; it comes back a little later."""
        with self._lock:
            self._erase()
            self._new_line = text.endswith((b"\n", b"\r"))
            self._free_at = time.monotonic() + SECONDS_AFTER_TEXT
            yield

    def _run(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()

    def _draw(self) -> None:
        now, shown = time.monotonic(), progress.shown()
        begun = shown.stage.begun
        if begun is None or not progress.is_watched_by(self):
            return self._erase()
        if now - begun < SECONDS_BEFORE or now < self._free_at or not self._new_line:
            return
        text = line_text(shown, now - begun, self._columns() - 1)
        try:
            text.encode(self.encoding)
        except UnicodeError:
            text = text.translate(ASCII).encode("ascii", "replace").decode()
        if text != self._drawn:
            self._erase()
            self._write(text)
            self._drawn = text

    def _columns(self) -> int:
        with suppress(OSError):
            return os.get_terminal_size(self.terminal).columns or 80
        return 80

    def _erase(self) -> None:
        """Clears the line, also one that a smaller window has wrapped."""
        if self._drawn:
            rows = (_width(self._drawn) - 1) // self._columns()
            self._write("\r" + (f"\x1b[{rows}A" if rows else "") + "\x1b[J")
            self._drawn = ""

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone
            os.write(self.terminal, text.encode(self.encoding, "replace"))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def amounts(unit: str, done: float, rate: float) -> tuple[str, str]:
    """What is done and the rate, for people.

    >>> amounts("records", 1234, 56.78), amounts("bytes", 1234567, 98765)
    (('1,234 records', '56.8/s'), ('1.2 MB', '98.8 kB/s'))
    """
    if unit == "bytes":
        return _bytes(done), f"{_bytes(rate)}/s"
    digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
    unit = unit.removesuffix("s") if int(done) == 1 else unit
    return f"{int(done):,} {unit}", f"{rate:,.{digits}f}/s"


def _bytes(count: float) -> str:
    name, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / size:,.1f} {name}"


def line_text(shown: progress.Shown, seconds: float, columns: int) -> str:
    """What is done of a stage after some seconds, in so many columns: less of it in fewer.

    >>> stage = progress.Stage("reading", total=200)
    >>> line_text(progress.Shown(stage, 50, 0.25), 10, 79)
    'reading  ━━━━━───────────────  25 %  50 records  5.00/s  0:30 left'
    """
    stage, done, share = shown
    label, count, rate, percent, bar = visible(stage.label, keep=""), "", "", "", ""
    time_text = clock(seconds)
    new = done - stage.skipped
    room = columns // 3 if share is not None or new > 0 else columns - len(time_text) - 2
    if _width(label) > room:
        label = fit(label, room)
    if new > 0:
        count, rate = amounts(stage.unit, done, new / seconds)
    if share is not None and 0 <= share < 1:
        filled = int(BAR_COLUMNS * share)
        bar = "━" * filled + "─" * (BAR_COLUMNS - filled)
        percent = f"{int(1000 * share) / 10 if share < 0.1 else int(100 * share)} %"
        gained = share * new / done if done else share
        if gained > 0:
            time_text = f"{clock(seconds * (1 - share) / gained)} left"
    for parts in (
        (label, bar, percent, count, rate, time_text),
        (label, bar, percent, rate, time_text),
        (label, percent, rate, time_text),
        (label, percent, time_text),
        (percent, time_text),
        (percent or time_text,),
    ):
        text = "  ".join(field for field in parts if field)
        if _width(text) <= columns:
            return text
    return ""
