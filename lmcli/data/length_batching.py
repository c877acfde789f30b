"""Batches of texts of similar length, with results in input order."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lmcli.terminal import progress

Result = TypeVar("Result")
Item = TypeVar("Item")


def map_by_length(
    lengths: list[int], max_tokens: int, work: Callable[[list[int]], list[Result]]
) -> list[Result]:
    """The results of `work` for every index, in index order.

    `work` gets the groups of `group_by_length` and returns a result for each index.
    """
    results: dict[int, Result] = {}
    with progress.stage(total=sum(lengths)) as stage:
        for group in group_by_length(lengths, max_tokens):
            results.update(zip(group, work(group), strict=True))
            stage.advance(sum([lengths[i] for i in group]))
    return [results[index] for index in range(len(lengths))]


def doubling_batches(
    items: Sequence[Item], first: int = 64, most: int = 4096
) -> Iterator[Sequence[Item]]:
    """Batches that double in size: first results come soon, later batches group better by length.

    >>> [len(batch) for batch in doubling_batches(range(10), first=2, most=4)]
    [2, 4, 4]
    """
    start = 0
    while start < len(items):
        yield items[start : start + first]
        start, first = start + first, min(2 * first, most)


def group_by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups of indices; a group padded to its longest has at most `max_tokens` (or one index).

    >>> list(group_by_length([5, 1, 5, 2], max_tokens=10))
    [[0, 2], [3, 1]]
    """
    group: list[int] = []
    for index in _longest_first(lengths):
        if group and lengths[group[0]] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def group_for_packing(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups of indices; the lengths of a group sum to at most `max_tokens` (or one index).

    >>> list(group_for_packing([5, 1, 5, 2], max_tokens=12))
    [[0, 2, 3], [1]]
    """
    group: list[int] = []
    tokens = 0
    for index in _longest_first(lengths):
        if group and tokens + lengths[index] > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    if group:
        yield group


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def tokens_per_forward(device_type: str, requested: int = 0) -> int:
    """Tokens of a forward pass: as requested, or what uses the device well and fits its memory."""
    return requested or (4096 if device_type == "cpu" else 65536)
