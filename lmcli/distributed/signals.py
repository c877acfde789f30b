"""Signals that end a command."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM and SIGHUP; the last one unless it is ignored, as under nohup.

    SIGHUP comes when a terminal is closed or a connection is lost; Windows does not have it.
    """
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hangup


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets `handler` handle the `stop_signals` in the block."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt_once() -> None:
    """Lets the first SIGTERM or SIGHUP raise KeyboardInterrupt, as Ctrl-C does, and no later one.

    Both often arrive twice: from a supervisor and as a member of a process group. A second
    KeyboardInterrupt would end what saves the work.
    """
    numbers = [number for number in stop_signals() if number != signal.SIGINT]

    def interrupt(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
