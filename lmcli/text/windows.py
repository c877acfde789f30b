"""Context and stride → windows: in which every token is scored exactly once, or that overlap. Pure arithmetic."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `start` to `end` of a text are in view; those from `first` on are scored here."""

    start: int
    first: int
    end: int


def windows(tokens: int, context: int, stride: int, beginning: bool, given: int = 0) -> Iterator[Window]:
    """Windows over a text of `tokens` tokens for a model that reads `context` of them at once.

    With `beginning` every window is led by the beginning token, so the text's first token is scored; without it the
    first token is context only, and so are the first `given` ones. Each token from there on is scored once, with at least
    `context - stride` tokens of the text before it (fewer only at the start). 1 ≤ stride ≤ context is the caller's to see
    to.

    >>> list(windows(10, context=4, stride=2, beginning=True))[:3]
    [Window(start=0, first=0, end=4), Window(start=2, first=4, end=6), Window(start=4, first=6, end=8)]
    """
    span = context if beginning else context + 1  # the last token in view is only predicted, never read
    first = max(given, 0 if beginning else 1)
    end = min(max(span, first + stride), tokens)
    while first < tokens:
        yield Window(max(0, end - span), first, end)
        first, end = end, min(end + stride, tokens)


def overlapping(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of windows of `room` tokens over a text, each `stride` tokens behind the one before, until one ends with
    the text. 1 ≤ stride ≤ room is the caller's to see to.

    >>> overlapping(9, room=4, stride=3), overlapping(2, room=4, stride=3)
    ([(0, 4), (3, 7), (6, 9)], [(0, 2)])
    """
    starts = range(0, max(1, tokens - room + stride), stride)
    return [(start, min(start + room, tokens)) for start in starts]
