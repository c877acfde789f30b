"""The figures of documents as `lm perplexity` writes them: columns, a table for a terminal, remarks on what they mean."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmcli.analysis.comparison import Paired
from lmcli.inference.perplexity import FIGURES, Perplexity
from lmcli.text.documents import line_number

SUMS = ("logprob", "tokens", "bytes", "characters", "words", "documents", "context", "stride")
PAIRED = ("difference", "difference_low", "difference_high")


def columns(group: str, several: bool) -> tuple[str, ...]:
    """The columns of a row: `group` names what it is for, with `several` models it tells which and how they differ."""
    return (*(("model",) if several else ()), group, *FIGURES, *SUMS, *(f"{name}_se" for name in FIGURES),
            *(PAIRED if several else ()), "signature")


def figures(found: Perplexity) -> dict[str, Any]:
    """The figures, what they are made of, and their standard errors."""
    return {**{name: getattr(found, name) for name in (*FIGURES, *SUMS)},
            **{f"{name}_se": found.standard_error(name) for name in FIGURES}}


def difference(pair: Paired | None) -> dict[str, Any]:
    """How a model differs from the first one; None for the first itself."""
    low, high = (pair.interval() if pair else None) or (None, None)
    return {**dict(zip(PAIRED, (pair and pair.difference, low, high))),
            "differing": pair and [line._asdict() for line in pair.lines()]}


def readable(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Column → cell of a table that fits on a terminal, of a row with the columns `names`."""
    shown = {name: row[name] for name in ("model", "file", "group") if name in names}
    for name, title in zip(FIGURES, ("perplexity", "bits/byte", "bits/char", "word ppl")):
        error = row[f"{name}_se"]
        shown[title] = f"{row[name]:.5g}" + ("" if error is None else f" ± {error:.2g}")
    if PAIRED[0] in names:
        apart, low, high = (row[name] for name in PAIRED)
        shown["less the first"] = "" if apart is None else f"{apart:+.4f}" + (
            "" if low is None else f" [{low:+.4f}, {high:+.4f}]")
    return {**shown, **{name: f"{row[name]:,}" for name in ("tokens", "bytes", "documents")}}


def remarks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader of these rows should know, a line each."""
    if len({row["tokenizer"] for row in rows}) > 1:
        yield "these models have different vocabularies: compare bits per byte or per word, not perplexity"
    compared = [row for row in rows if row.get("difference") is not None]
    if any(row["difference_low"] is None for row in compared):
        yield "one document has no interval: --documents line or blank makes more of a file"
    for row in compared:
        for line in row["differing"]:
            yield (f"{line['file']}, line {line_number(line['file'], line['start'])}: {line['second'] - line['first']:+.1f} "
                   f"bits with {row['model']} ({line['first']:.1f} to {line['second']:.1f}): {line['text'][:80]}")
