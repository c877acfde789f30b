"""`lm perplexity` output: columns, rows, cells of a table for a terminal, and remarks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmcli.data.documents import line_number
from lmcli.evaluation.intervals import FEW_RECORDS
from lmcli.evaluation.model_comparison import PairedDifference
from lmcli.scoring.perplexity import PERPLEXITY_FIGURES, Perplexity

COUNT_COLUMNS = (
    *("logprob", "tokens", "bytes", "characters", "words", "documents", "context", "stride"),
)
DIFFERENCE_COLUMNS = ("difference", "difference_low", "difference_high")
TITLES = ("perplexity", "bits/byte", "bits/char", "word ppl")  # of PERPLEXITY_FIGURES
MAX_LINE_CHARACTERS = 80


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


def readable(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Title → cell of a table that fits a terminal, for a row with the columns `names`."""
    cells = {name: row[name] for name in ("model", "file", "group") if name in names}
    for name, title in zip(PERPLEXITY_FIGURES, TITLES):
        error = row[f"{name}_se"]
        value = "NA" if row[name] is None else f"{row[name]:.5g}"
        cells[title] = value + ("" if error is None else f" ± {error:.2g}")
    if "difference" in names:
        value, low, high = (row[name] for name in DIFFERENCE_COLUMNS)
        interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
        cells["difference from first"] = "" if value is None else f"{value:+.4f}{interval}"
    return {**cells, **{name: f"{row[name]:,}" for name in ("tokens", "bytes", "documents")}}


def remarks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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
    for row in compared:
        for line in row["differing"]:
            number = line_number(line["file"], line["start"])
            change = line["second"] - line["first"]
            yield (
                f"{line['file']}, line {number}: {change:+.1f} bits with {row['model']} "
                f"({line['first']:.1f} to {line['second']:.1f}): "
                f"{line['text'][:MAX_LINE_CHARACTERS]}"
            )
