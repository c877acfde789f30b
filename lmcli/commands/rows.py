"""Rows of figures on standard output: JSON Lines and TSV as they come, on a terminal a table when all are there."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool,
               readable: Callable[[Mapping[str, Any]], dict[str, str]] | None = None) -> None:
    """Prints each row: all of it as JSON, else its `columns`; `readable` makes of it what a table shows."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    elif sys.stdout.isatty():
        from lmcli.display import table

        lines = [readable(row) if readable else {key: cell(row[key]) for key in columns} for row in rows]
        print(table(list(lines[0]), [list(line.values()) for line in lines]), end="")
    else:
        for number, row in enumerate(rows):
            if not number:
                print("\t".join(columns))
            print("\t".join(cell(row[key]) for key in columns), flush=True)


def cell(value: Any) -> str:
    """A value as TSV has it: six figures of a fraction, NA for None."""
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
