"""What a person sees: `lm` run in a pseudo-terminal, and its screen as pyte draws it."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
import unicodedata

import pyte


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
        return [line.rstrip() for line in self.pyte.display]

    @property
    def lines(self) -> list[str]:
        """All lines, also those that were scrolled out, without empty ones at the end."""
        above = [
            "".join(row[i].data for i in range(self.columns)).rstrip()
            for row in self.pyte.history.top
        ]
        lines = above + self.display
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        """All lines as one text."""
        return "\n".join(self.lines)

    def color(self, line: int, column: int) -> tuple[str, str]:
        """Foreground and background of a visible cell, as pyte names them."""
        cell = self.pyte.buffer[line][column]
        return cell.fg, cell.bg


def printable(lines: list[str]) -> bool:
    """True if no line has a control character, or one that changes the direction of text."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in "".join(lines))


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

    def read(self, seconds: float = 60.0, until: str | None = None) -> Screen:
        """Draws what comes until `until` is on the screen or the program has ended.

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
            if until is not None and until in self.screen.text:
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
