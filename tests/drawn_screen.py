"""What a person sees: `lm` run in a pseudo-terminal, and its screen as pyte draws it."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from contextlib import suppress

import pyte
from rich.cells import cell_len

from lmcli.terminal.wrapping import COMMAND_TO_COPY
from lmcli.text.characters import visible


class Screen:
    """A terminal of `columns` × `rows` with the lines that were scrolled out at its top."""

    def __init__(self, columns: int = 80, rows: int = 24):
        self.columns = columns
        self.pyte = pyte.HistoryScreen(columns, rows, history=100_000, ratio=0.5)
        self.pyte.set_mode(pyte.modes.LNM)
        self.stream = pyte.ByteStream(self.pyte)
        self.raw = b""
        self.code: int | None = None

    def feed(self, data: bytes) -> None:
        """Draws what a program wrote."""
        self.raw += data
        self.stream.feed(data)

    @property
    def display(self) -> list[str]:
        """The visible lines, without spaces at their ends."""
        return [_text(self.pyte.buffer[number]) for number in range(self.pyte.lines)]

    @property
    def lines(self) -> list[str]:
        """All lines, also those that were scrolled out, without empty ones at the end."""
        lines = [_text(row) for row in self.pyte.history.top] + self.display
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def written(self) -> list[str]:
        """The lines as they were written, before the terminal broke those that have no room."""
        wide = Screen(2000, 100)
        wide.feed(self.raw)
        return wide.lines

    @property
    def text(self) -> str:
        """All lines as one text."""
        return "\n".join(self.lines)

    def color(self, line: int, column: int) -> tuple[str, str]:
        """Foreground and background of a visible cell, as pyte names them."""
        cell = self.pyte.buffer[line][column]
        return cell.fg, cell.bg


def _text(row) -> str:
    """The cells of a line that were drawn, without spaces at its end."""
    return "".join(row[column].data for column in range(max(row, default=-1) + 1)).rstrip()


class InProcess:
    """`lm ARGUMENTS` in this process, drawn on a pseudo-terminal: standard output and error.

    Many times as fast as a `Terminal`, but nothing can be typed. Standard input is this terminal.
    """

    def __init__(self, run, columns: int = 80, rows: int = 24):
        self.run, self.screen = run, Screen(columns, rows)

    def draw(self, *arguments) -> Screen:
        """The screen when `run(arguments)` has returned its exit code."""
        master, slave = os.openpty()
        size = struct.pack("HHHH", self.screen.pyte.lines, self.screen.columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        reader = threading.Thread(target=self._read, args=(master,))
        reader.start()
        saved = [os.dup(number) for number in (1, 2)]
        streams = sys.stdin, sys.stdout, sys.stderr
        for stream in streams[1:]:
            stream.flush()
        try:
            for number in (1, 2):
                os.dup2(slave, number)
            sys.stdin = os.fdopen(os.dup(slave), "r")
            sys.stdout, sys.stderr = (
                os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False)
                for number in (1, 2)
            )
            self.screen.code = self.run([*map(str, arguments)])
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            sys.stdin.close()
            sys.stdin, sys.stdout, sys.stderr = streams
            for number, copy in zip((1, 2), saved):
                os.dup2(copy, number)
                os.close(copy)
            os.close(slave)
            reader.join(10)
            os.close(master)
        return self.screen

    def _read(self, master: int) -> None:
        with suppress(OSError):  # how Linux tells the end of a terminal
            while data := os.read(master, 1 << 16):
                self.screen.feed(data)


def printable(lines: list[str]) -> bool:
    """True if no line has a control character, or one that changes the direction of text."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in "".join(lines))


def assert_whole(screen: Screen, reference: str = "") -> None:
    """Nothing is cut: no line has more than its columns, unless it has a command to copy.

    With a `reference`, the same in a pipe or on a wide screen, all words and numbers are in it.
    """
    lines = screen.written
    assert printable(lines) and lines, lines
    wide = [line for line in lines if cell_len(line) > screen.columns]
    assert all(COMMAND_TO_COPY.search(line) or len(line.split()) == 1 for line in wide), wide
    words = set(visible(reference).split())
    cut = [word for line in lines for word in line.split() if words and word not in words | {"…"}]
    assert not cut, (cut, lines)


class Terminal:
    """A running `lm ARGUMENTS` on a pseudo-terminal: standard input, output and error.

    `piped` names the streams that are no terminal: "stdin" (empty), "stdout" (kept in `output`).
    """

    def __init__(self, arguments, environment, columns=80, rows=24, piped=(), folder=None):
        self.screen = Screen(columns, rows)
        self.master, slave = os.openpty()
        self.resize(columns, rows)
        sizes = ("COLUMNS", "LINES")  # they would override the terminal's own
        environment = {k: v for k, v in environment.items() if k not in sizes}
        environment.setdefault("TERM", "xterm-256color")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmcli", *map(str, arguments)],
            stdin=subprocess.DEVNULL if "stdin" in piped else slave,
            stdout=subprocess.PIPE if "stdout" in piped else slave,
            stderr=slave,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        """Changes the size of the terminal, for the program and for the drawn screen."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.columns = columns
        self.screen.pyte.resize(rows, columns)

    def type(self, text: str) -> None:
        """Types keys."""
        os.write(self.master, text.encode())

    def read(self, seconds: float = 60.0, until: str | None = None, times: int = 1) -> Screen:
        """Draws what comes until `until` is there so many times or the program has ended.

        Raises:
            TimeoutError: neither happened within `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ready, _, _ = select.select([self.master], [], [], 0.05)
            if ready:
                try:
                    data = os.read(self.master, 1 << 16)
                except OSError:  # the last writer is gone
                    data = b""
                if not data:
                    self.screen.code = self.process.wait(10)
                    return self.screen
                self.screen.feed(data)
            elif self.process.poll() is not None:
                self.screen.code = self.process.returncode
                return self.screen
            if until is not None and self.screen.text.count(until) >= times:
                return self.screen
        raise TimeoutError(f"no {until!r} within {seconds} s on this screen:\n{self.screen.text}")

    def close(self) -> None:
        """Ends the program, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdout:
            self.process.stdout.close()
        os.close(self.master)
