"""What the program is doing now, told to the screen that shows it, if there is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_screens: list[Callable[[str], None]] = []


def now(name: str) -> None:
    """Tells the screen what begins, such as "learning the tokenizer"."""
    for show in _screens[-1:]:
        show(name)


@contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Lets `show` be told meanwhile."""
    _screens.append(show)
    try:
        yield
    finally:
        _screens.remove(show)
