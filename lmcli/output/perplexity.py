"""`lm perplexity` output: columns, rows, cells of a table for a terminal, and remarks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmcli.data.documents import location
from lmcli.evaluation.intervals import FEW_RECORDS
from lmcli.evaluation.model_comparison import PairedDifference
from lmcli.scoring.perplexity import PERPLEXITY_FIGURES, Perplexity
from lmcli.terminal.tables import Cell, Column, digits, shortened

COUNT_COLUMNS = (
    *("logprob", "tokens", "bytes", "characters", "words", "documents", "context", "stride"),
)
DIFFERENCE_COLUMNS = ("difference", "difference_low", "difference_high")
HUGE = 1e7  # from here on a perplexity is written as 1.3e+17
# figure → title and rank of its column on a terminal
TITLES = dict(
    zip(
        PERPLEXITY_FIGURES, (("perplexity", 2), ("bits/byte", 0), ("bits/char", 5), ("word ppl", 6))
    )
)
MAX_LINE_COLUMNS = 80


def columns(group: str, many: bool) -> tuple[str, ...]:
    """The columns of a row: `group` names what it is for; `many` for several models."""
    return (
        *(("model",) if many else ()),
        group,
        *PERPLEXITY_FIGURES,
        *COUNT_COLUMNS,
        *(f"{name}_se" for name in PERPLEXITY_FIGURES),
        *(DIFFERENCE_COLUMNS if many else ()),
        "signature",
    )


def figures(perplexity: Perplexity) -> dict[str, Any]:
    """The figures, the counts behind them, and their standard errors."""
    counts = {name: getattr(perplexity, name) for name in COUNT_COLUMNS}
    values = {name: getattr(perplexity, name) for name in PERPLEXITY_FIGURES}
    errors = {f"{name}_se": perplexity.standard_error(name) for name in PERPLEXITY_FIGURES}
    return _without({**values, **counts, **errors}, math.isnan)


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without infinities, which JSON cannot hold: a perplexity above 1.8e308."""
    return _without(row, math.isinf)


def _without(row: Mapping[str, Any], excluded: Callable[[float], bool]) -> dict[str, Any]:
    """The row, None in place of the floats that are excluded."""
    return {
        name: None if isinstance(value, float) and excluded(value) else value
        for name, value in row.items()
    }


def difference(pair: PairedDifference | None) -> dict[str, Any]:
    """How a model differs from the first one; None for the first model itself."""
    if pair is None:
        return {**dict.fromkeys(DIFFERENCE_COLUMNS), "differing": None}
    cells = (pair.difference, *(pair.interval() or (None, None)))
    return {
        **dict(zip(DIFFERENCE_COLUMNS, cells)),
        "differing": [line._asdict() for line in pair.lines()],
    }


def readable(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str | Column, Cell]:
    """Column → cell of a table for a terminal; `names` has the model's short name."""
    cells: dict[str | Column, Cell] = {
        Column(name, kind="name"): names.get(row[name], row[name])
        for name in ("model", "file", "group")
        if name in row
    }
    for name, (title, rank) in TITLES.items():
        cells[Column(title, rank)] = _with_error(row[name], row[f"{name}_se"])
    if "difference" in row:
        column = Column(("difference from first", "difference"), 1)
        cells[column] = _difference_cell(*(row[name] for name in DIFFERENCE_COLUMNS))
    for name, rank in (("tokens", 3), ("bytes", 7), ("documents", 4)):
        cells[Column(name, rank)] = f"{row[name]:,}"
    return cells


def _with_error(value: float | None, error: float | None) -> Cell:
    """A figure in five significant digits or fewer, its standard error in as many decimals."""
    if value is None or not math.isfinite(value):
        return "NA" if value is None else str(value)

    def write(count: int) -> str:
        if abs(value) >= HUGE:
            return f"{value:.{count}g}" + ("" if error is None else f" ± {error:.2g}")
        whole = len(str(int(abs(value))))
        decimals = max(0, count - whole)
        return f"{value:,.{decimals}f}" + ("" if error is None else f" ± {error:,.{decimals}f}")

    return digits(5, 3, write)


def _difference_cell(value: float | None, low: float | None, high: float | None) -> Cell:
    if value is None:
        return ""
    if low is None:
        return digits(4, 2, lambda count: f"{value:+.{count}f}")
    return digits(4, 2, lambda count: f"{value:+.{count}f} [{low:+.{count}f}, {high:+.{count}f}]")


def remarks(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Iterator[str]:
    """What a reader of these rows should know, a line each."""
    if len({row["tokenizer"] for row in rows}) > 1:
        yield (
            "these models have different vocabularies: compare bits per byte or per word, "
            "not perplexity"
        )
    compared = [row for row in rows if row.get("difference") is not None]
    if any(row["documents"] == 1 for row in compared):
        yield (
            "one document has no interval: use --documents line or blank to split a file into more"
        )
    few = [row["documents"] for row in compared if 1 < row["documents"] < FEW_RECORDS]
    if few:
        yield (
            f"the intervals of differences are by the bootstrap, which is too narrow below "
            f"{FEW_RECORDS} documents (here {min(few)})"
        )
    differing = [(row["model"], line) for row in compared for line in row["differing"]]
    differing.sort(key=lambda pair: -abs(pair[1]["second"] - pair[1]["first"]))
    most = max((len(row["differing"]) for row in compared), default=0)  # as was asked for
    for model, line in differing[:most]:
        change, where = line["second"] - line["first"], location(line["file"], line["start"])
        if abs(change) < 0.05:  # would be written as 0.0
            break
        yield (
            f"{where}: {change:+.1f} bits with {names[model]} "
            f"({line['first']:.1f} to {line['second']:.1f}): "
            f"{shortened(line['text'], MAX_LINE_COLUMNS)}"
        )
