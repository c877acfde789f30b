"""Long calls into a library, during which signals are still handled."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LOOKS = 1.0  # at signals that another thread received
Result = TypeVar("Result")
Item = TypeVar("Item")


class DeadlineExceeded(Exception):
    """The work was not done in time."""


def run_in_thread(
    work: Callable[[Iterator[Item]], Result], items: Iterable[Item], deadline: float | None = None
) -> Result:
    """The result of `work(items)`, which a thread of its own does.

    So Ctrl-C, SIGTERM and the deadline (of `time.monotonic`) end the wait while a library works
    without Python. The thread gets no further items then; it ends with the process at the latest.
    Raises DeadlineExceeded, and what `work` raises.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    stopped = threading.Event()

    def feed() -> Iterator[Item]:
        for item in items:
            if stopped.is_set():
                return
            yield item

    def run() -> None:
        try:
            results.append(work(feed()))
        except BaseException as error:  # raised again where the result is awaited
            errors.append(error)

    if deadline is not None and deadline <= time.monotonic():
        raise DeadlineExceeded  # also where the work would be done before the first look
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        end = math.inf if deadline is None else deadline
        while thread.is_alive() and (remaining := end - time.monotonic()) > 0:
            thread.join(min(remaining, SECONDS_BETWEEN_LOOKS))
    finally:
        stopped.set()
    if errors:
        raise errors[0]
    if not results:
        raise DeadlineExceeded
    return results[0]
