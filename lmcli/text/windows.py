"""Windows over a long text, from context and stride: pure arithmetic."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `start` to `end` of a text are visible; those from `first` on are scored here."""

    start: int
    first: int
    end: int


def windows(
    tokens: int, context: int, stride: int, has_bos: bool, unscored: int = 0
) -> Iterator[Window]:
    """Windows that score each of a text's `tokens` once, for a model that reads `context` at once.

    With `has_bos` every window begins with the bos token, so the first token is scored. Without it
    the first token is context only, and so are the first `unscored` ones. Each scored token has at
    least `context - stride` tokens of the text before it (fewer only at the start). The caller
    makes sure that 1 ≤ stride ≤ context.

    >>> list(windows(8, context=4, stride=2, has_bos=True))[:2]
    [Window(start=0, first=0, end=4), Window(start=2, first=4, end=6)]
    """
    # the last visible token is predicted, never read
    span = context if has_bos else context + 1
    first = max(unscored, 0 if has_bos else 1)
    end = min(max(span, first + stride), tokens)
    while first < tokens:
        yield Window(max(0, end - span), first, end)
        first, end = end, min(end + stride, tokens)


def overlapping_windows(tokens: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of windows of `size` tokens, each `stride` tokens after the one before.

    The last one ends with the text. The caller makes sure that 1 ≤ stride ≤ size.

    >>> overlapping_windows(9, size=4, stride=3), overlapping_windows(2, size=4, stride=3)
    ([(0, 4), (3, 7), (6, 9)], [(0, 2)])
    """
    starts = range(0, max(1, tokens - size + stride), stride)
    return [(start, min(start + size, tokens)) for start in starts]
