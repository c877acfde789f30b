"""Work on texts grouped by length, results in the order they came."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Item = TypeVar("Item")


def in_order(lengths: list[int], most_tokens: int, work: Callable[[list[int]], list[Result]],
             packed: bool = False) -> list[Result]:
    """Results of `work` for every index, in index order; `work` gets groups of indices of like length, which hold at most
    `most_tokens` when padded or, if so asked, when `packed`."""
    results: list[Result | None] = [None] * len(lengths)
    for group in (grouped_to_pack if packed else grouped_by_length)(lengths, most_tokens):
        for index, result in zip(group, work(group), strict=True):
            results[index] = result
    return results


def growing(items: Sequence[Item], first: int = 64, most: int = 4096) -> Iterator[Sequence[Item]]:
    """The items in parts that double in size: the first results come soon, later parts hold more of like length.

    >>> [len(part) for part in growing(range(10), first=2, most=4)]
    [2, 4, 4]
    """
    start = 0
    while start < len(items):
        yield items[start:start + first]
        start, first = start + first, min(2 * first, most)


def grouped_by_length(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of like length; a group, padded to its longest, holds at most `most_tokens` (or one index).

    >>> list(grouped_by_length([5, 1, 5, 2], most_tokens=10))
    [[0, 2], [3, 1]]
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > most_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def grouped_to_pack(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of like length, the longest first; a group holds at most `most_tokens` in all (or one index).

    >>> list(grouped_to_pack([5, 1, 5, 2], most_tokens=12))
    [[0, 2, 3], [1]]
    """
    group, tokens = [], 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and tokens + lengths[index] > most_tokens:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    if group:
        yield group


def pad(rows: list[list[int]], value: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(ids, mask), each (len(rows), longest) int64: rows filled up with `value`, and 1 where a token is real.

    The mask is None where nothing had to be filled up.
    """
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    fill = [[value] * gap for gap in gaps]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, fill)]
    if not any(gaps):
        return torch.tensor(ids, device=device), None
    real = [[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps)]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def batch_tokens(device: torch.device, asked: int = 0) -> int:
    """Tokens of one forward pass: as asked, else what fills the device without filling its memory."""
    return asked or (4096 if device.type == "cpu" else 65536)
