"""The lines at the bottom of a terminal that are drawn again in place while work goes on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from lmcli.terminal.wrapping import moves_cursor
from lmcli.text.characters import visible

if TYPE_CHECKING:
    from rich.text import Text

SHORTEST_PAUSE = 0.25  # seconds between two drawings
DRAWING_SHARE = 0.004  # of the time that drawing may take
HIDE_CURSOR, SHOW_CURSOR, ERASE_BELOW, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[J", "\x1b[K"
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"  # a terminal that knows them draws at once

Draw = Callable[[int, int], "Sequence[Text]"]  # (columns, rows) → lines that fit


def can_redraw(stream: TextIO) -> bool:
    """True for a terminal in UTF-8 that can move its cursor."""
    if not moves_cursor(stream) or "utf" not in (stream.encoding or "").lower():
        return False
    from rich.console import Console

    console = Console(file=stream)
    return not (console.is_dumb_terminal or console.legacy_windows)


class LiveRegion(io.TextIOBase):
    """Lines that a thread of its own draws again, in at most DRAWING_SHARE of the time.

    Stands for standard error meanwhile: what is written there is printed above the lines. Keys that
    are typed are not shown, since they would move the cursor. `draw` must not block. Ctrl-Z gives
    the terminal back, and nothing is drawn until this process is in the foreground again.
    """

    def __init__(self, stream: TextIO, draw: Draw):
        from rich.console import Console

        self.stream, self._draw = stream, draw
        self.console = Console(file=stream, highlight=False, emoji=False, markup=False)
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._widths: list[int] = []  # of the lines on the screen
        self._columns = 0  # of the terminal then
        self._pending = ""  # written, but no whole line yet
        self._echo: Any = None
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    @property
    def columns(self) -> int:
        """How many columns may be filled."""
        return self._size()[0]

    # -- as a stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the terminal."""
        return self.stream.encoding

    def isatty(self) -> bool:
        """True: it is a terminal."""
        return True

    def fileno(self) -> int:
        """The terminal's."""
        return self.stream.fileno()

    def write(self, text: str) -> int:
        """Prints whole lines above the region."""
        with self._lock:
            self._pending += text
            whole, newline, self._pending = self._pending.rpartition("\n")
            if newline:
                self._send(self._home() + ERASE_BELOW + visible(whole) + "\n")
                self._widths = []
                self.refresh()
        return len(text)

    # -- drawing

    def __enter__(self) -> LiveRegion:
        self._echo = _hide_keys(self.stream)
        self._stderr, sys.stderr = sys.stderr, self
        self._watch_suspension()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, last: Sequence[Text] = ()) -> None:
        """Erases the lines and prints the `last` ones instead; does nothing the second time."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        try:
            self._thread.join()
            sys.stderr = self._stderr
            text = "".join(f"{line}\n" for line in self._rendered(last))
            self._send(self._home() + ERASE_BELOW + text + self._pending)
        finally:  # also after Ctrl-C amid this: the terminal must not stay without cursor and echo
            sys.stderr = self._stderr
            self._watch_suspension(ends=True)
            self._send(SHOW_CURSOR)
            _show_keys(self.stream, self._echo)

    def refresh(self) -> None:
        """Draws the lines where they stand."""
        with self._lock:
            if _in_background(self.stream):
                self._widths = []
                return
            size = self._size()
            lines = [line.copy() for line in self._draw(*size)][: size[1]]
            for line in lines:
                line.rstrip()  # a narrower window would wrap spaces, too
            text = "\n".join(f"{line}{ERASE_LINE}" for line in self._rendered(lines))
            start = f"{BEGIN_UPDATE}{HIDE_CURSOR}{self._home()}"
            self._send(f"{start}{text}{ERASE_BELOW}{END_UPDATE}")
            self._widths, self._columns = [line.cell_len for line in lines], size[0]

    # -- Ctrl-Z

    def _watch_suspension(self, ends: bool = False) -> None:
        """Calls `_suspend` for Ctrl-Z from now on, or no longer; in the main thread only."""
        if not hasattr(signal, "SIGTSTP"):  # Windows
            return
        handlers: list[Any] = [signal.SIG_DFL, self._suspend]
        before, after = reversed(handlers) if ends else handlers
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTSTP) == before:
            signal.signal(signal.SIGTSTP, after)

    def _suspend(self, number: int, _: object) -> None:
        """Gives the terminal back and stops; when it goes on the lines are drawn anew below."""
        with self._lock:
            # not through the stream, in which this signal may have come
            with contextlib.suppress(OSError):
                end = "\r\n" if self._widths else ""
                os.write(self.stream.fileno(), f"{end}{SHOW_CURSOR}".encode())
            _show_keys(self.stream, self._echo)
            self._widths = []
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # returns when the process goes on
            signal.signal(number, self._suspend)
            self._echo = _hide_keys(self.stream)

    def _redraw(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            started = time.thread_time()
            self.refresh()
            pause = max(SHORTEST_PAUSE, (time.thread_time() - started) / DRAWING_SHARE)

    def _home(self) -> str:
        """Moves the cursor from the end of the lines to their start.

        In a window that is narrower now the terminal has wrapped them.
        """
        columns, rows = self._size()
        height = len(self._widths)
        if columns < self._columns:
            height = sum(max(1, -(-width // (columns + 1))) for width in self._widths)
        up = min(height - 1, rows - 1)
        return f"\r\x1b[{up}A" if up > 0 else "\r"

    def _rendered(self, lines: Sequence[Text]) -> list[str]:
        """The lines with escape codes for their styles, as many as the terminal has colors."""
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(line, soft_wrap=True)
        return captured.get().split("\n")[: len(lines)]

    def _size(self) -> tuple[int, int]:
        """(columns, rows) that may be filled: a full last column would wrap on some terminals."""
        try:
            size = os.get_terminal_size(self.stream.fileno())
        except (OSError, ValueError):
            return 79, 23
        return max(1, (size.columns or 80) - 1), max(1, (size.lines or 24) - 1)

    def _send(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _hide_keys(stream: TextIO) -> Any:
    """Turns off the echo of keys; returns the settings before, None if they are not ours to change.

    A process in the background that changes them would be stopped.
    """
    try:
        import termios
    except ImportError:  # Windows
        return None
    try:
        if _in_background(stream):
            return None
        number = stream.fileno()
        before = termios.tcgetattr(number)
        flags = before[3] & ~termios.ECHO
        termios.tcsetattr(number, termios.TCSANOW, [*before[:3], flags, *before[4:]])
    except (OSError, ValueError, termios.error):
        return None
    return before


def _in_background(stream: TextIO) -> bool:
    """True if the terminal controls this process, and another one has it at the moment."""
    try:
        return os.tcgetpgrp(stream.fileno()) != os.getpgrp()
    except (OSError, ValueError, AttributeError):  # it does not control it, or this is Windows
        return False


def _show_keys(stream: TextIO, before: Any) -> None:
    if before is None:
        return
    import termios

    with contextlib.suppress(OSError, termios.error):
        if not _in_background(stream):
            termios.tcsetattr(stream.fileno(), termios.TCSANOW, before)


def terminal_modes(stream: TextIO) -> Any:
    """The settings of a terminal; None if it is none."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    try:
        return termios.tcgetattr(stream.fileno())
    except (OSError, ValueError, termios.error):
        return None


def give_back(stream: TextIO, modes: Any) -> None:
    """Restores a terminal after a process was killed that has drawn a region on it."""
    if modes is not None and moves_cursor(stream):
        _show_keys(stream, modes)
        print(SHOW_CURSOR, file=stream, flush=True)
