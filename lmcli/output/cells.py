"""Cells and TSV lines, as every command writes them; short names."""

import os
from collections.abc import Sequence
from pathlib import PurePath


def cell(value: float | None) -> str:
    """A number as TSV has it: six significant digits, NA for None."""
    if value is None:
        return "NA"
    return str(value) if isinstance(value, int) else f"{value:.6g}" if value else "0"


def tsv_line(*cells: str) -> str:
    """One line of tab-separated cells, which must be escaped already."""
    return "\t".join(cells) + "\n"


def numbered(names: list[str], count: int | None) -> list[str]:
    """The column names of `count` items, numbered from 1; the names alone without a count."""
    return [f"{name}_{k + 1}" for k in range(count) for name in names] if count else names


def short_names(names: Sequence[str]) -> list[str]:
    """The names of models or files, each with as few of its last parts as tell them apart.

    >>> short_names(["runs/a/best", "runs/b/best", "gpt2"])
    ['a/best', 'b/best', 'gpt2']
    """
    # "." and ".." are called by what they are
    paths = [n if PurePath(n).name.strip(".") else os.path.abspath(n) for n in names]
    parts, counts = [PurePath(path).parts for path in paths], [1] * len(names)
    while True:
        short = ["/".join(each[-n:]) for each, n in zip(parts, counts)]
        longer = [
            n + (n < len(each) and any(s == t and each != other for t, other in zip(short, parts)))
            for each, n, s in zip(parts, counts, short)
        ]
        if longer == counts:
            return [s or name for s, name in zip(short, names)]
        counts = longer
