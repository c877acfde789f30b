"""Two files whose lines belong together, as parallel corpora come: written as rows of source and target into the cache."""

import json
from collections.abc import Iterator
from itertools import zip_longest

from lmcli.errors import UsageError, UserError
from lmcli.text.documents import Layout, pinned
from lmcli.text.records import Reader, shown


def pin(sources: list[str], targets: tuple[str, ...], layout: Layout) -> list[str]:
    """Files of rows (JSON Lines), each made of a source and a target file and named by its content; `layout` is set to read
    them.

    Raises UsageError when there are not as many files of each, UserError when one has more lines than the other.
    """
    if len(sources) != len(targets):
        raise UsageError(f"{len(sources)} files of sources and {len(targets)} of targets", where="--target",
                         hint="one --target for each FILE, one --val-target for each --val, in the same order")
    layout.format, layout.fields = "jsonl", ("source", "target")
    rows = ((json.dumps(pair, ensure_ascii=False).encode("utf-8") + b"\n" for pair in _pairs(*both))
            for both in zip(sources, targets))
    return [pinned("aligned", ".jsonl", "keep aligned lines", lines) for lines in rows]


def _pairs(source: str, target: str) -> Iterator[dict[str, str]]:
    for number, (left, right) in enumerate(zip_longest(_lines(source), _lines(target)), 1):
        if left is None or right is None:
            ended, other = (source, target) if left is None else (target, source)
            raise UserError(f"ends after line {number - 1:,}, {shown(other)} goes on", where=shown(ended),
                            hint="line N of one file belongs to line N of the other")
        yield {"source": left, "target": right}


def _lines(file: str) -> Iterator[str]:
    return (record.text for batch in Reader("text").batches([file]) for record in batch)
