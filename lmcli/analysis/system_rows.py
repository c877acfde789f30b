"""Figures of systems as `lm evaluate` writes them: lines of a table, JSON, tables for a terminal, remarks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmcli.analysis.intervals import Compared
from lmcli.analysis.systems import WHOLE, Figure, Row

COMPARED = ("difference", "difference_low", "difference_high", "p", "test")
COSTS = ("parameters", "disk_bytes", "memory_bytes", "records_per_second")
OF_HUNDRED = ("bleu", "chrf")
MOST_CLASSES = 20  # of which a terminal shows the confusion matrix


def columns(labelled: bool, several: bool, grouped: bool) -> tuple[str, ...]:
    """The columns of a line: a figure of a system and group. With `labelled` it may be for a label, or for the records of a
    label that were given another."""
    return (*(("system",) if several else ()), *(("group",) if grouped else ()), "metric",
            *(("label", "given") if labelled else ()), "value", "low", "high", *(COMPARED if several else ()))


def lines(row: Row) -> Iterator[dict[str, Any]]:
    """A line for each figure of a Row, with every column."""
    blank = dict.fromkeys(columns(True, True, True)) | {"system": row.system.name, "group": row.group}
    for name, value in _counts(row).items():
        yield blank | {"metric": name, "value": value}
    for figure in row.figures:
        yield blank | {"metric": figure.name, "label": figure.label, **_facts(figure, True)}
    for label, counts in zip(row.classes, row.confusion or ()):
        for given, count in zip((*row.classes, None), counts):
            if count:
                yield blank | {"metric": "confusion", "label": label, "given": given, "value": count}


def _counts(row: Row) -> dict[str, Any]:
    found = {"records": row.records, "empty": row.empty}
    if row.majority is not None:
        found["majority_accuracy"] = row.majority
    return found | (row.system.facts if row.group == WHOLE else {})


def _facts(figure: Figure, several: bool = False) -> dict[str, Any]:
    """Value, interval and, of one of several systems, how far it lies from the first's."""
    apart = figure.compared or Compared()
    more = dict(zip(COMPARED, (apart.difference, apart.low, apart.high, apart.p, apart.test))) if several else {}
    return {"value": figure.value, "low": figure.low, "high": figure.high, **more}


def document(row: Row, task: str, several: bool, grouped: bool, resamples: int, seed: int) -> dict[str, Any]:
    """A Row as one JSON object."""
    found = {"system": row.system.name, **({"group": row.group} if grouped else {}), "task": task, **_counts(row),
             "figures": {figure.name: _facts(figure, several) for figure in row.figures if figure.label is None}}
    labels: dict[str, dict[str, Any]] = {}
    for figure in row.figures:
        if figure.label is not None:
            labels.setdefault(figure.label, {})[figure.name] = _facts(figure, several)
    found |= {"labels": labels} if labels else {}
    if row.confusion is not None:
        found["confusion"] = {"labels": row.classes, "counts": row.confusion}
    return found | {"signatures": row.system.counts.signatures(), "resamples": resamples, "seed": seed}


def tables(rows: Sequence[Row], several: bool, grouped: bool) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(header, lines) of each table that a terminal shows: the figures; those of labels and who was taken for whom, of all
    records; and what models cost."""
    rows = _renamed(rows)
    yield _figures(rows, several, grouped)
    whole = [row for row in rows if row.group == WHOLE]
    if of_labels := _labels(whole, several):
        yield of_labels
    for row in whole:
        if row.confusion and len(row.classes) <= MOST_CLASSES:
            corner = f"{row.system.name}: right, given" if several else "right, given"
            nothing = any(counts[-1] for counts in row.confusion)
            yield [corner, *row.classes, *(["nothing"] if nothing else [])], [
                [label, *(f"{count:,}" for count in (counts if nothing else counts[:-1]))]
                for label, counts in zip(row.classes, row.confusion)]
    if any(row.system.facts for row in whole):
        yield _costs(whole, several)


def _renamed(rows: Sequence[Row]) -> list[Row]:
    """The rows, their systems called by the last part of their paths where these tell them apart."""
    names = {row.system.name: Path(row.system.name).name or row.system.name for row in rows}
    if len(set(names.values())) < len(names):
        return list(rows)
    return [replace(row, system=replace(row.system, name=names[row.system.name])) for row in rows]


def _figures(rows: Sequence[Row], several: bool, grouped: bool) -> tuple[list[str], list[list[str]]]:
    header = [*(["group"] if grouped else []), "metric", *(["system"] if several else []), "value", "95 % interval",
              *(["less the first", "p"] if several else [])]
    found: list[list[str]] = []
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        lines = [(figure.name, row.system.name, [*_shown(figure), *(_apart(figure) if several else [])])
                 for figures in zip(*(_overall(row) for row in own)) for row, figure in zip(own, figures)]
        lines += [("empty", row.system.name, [f"{row.empty:,}"]) for row in own if row.empty]
        lines += [("records", "", [f"{own[0].records:,}"])]
        lines += [("majority_accuracy", "", [f"{own[0].majority:.4f}"])] if own[0].majority is not None else []
        for name, system, cells in lines:
            line = [*([group] if grouped else []), name, *([system] if several else []), *cells]
            found.append(line + [""] * (len(header) - len(line)))
    return header, found


def _overall(row: Row) -> list[Figure]:
    return [figure for figure in row.figures if figure.label is None]


def _shown(figure: Figure) -> list[str]:
    return [_number(figure.value, figure.name),
            "" if figure.low is None else f"{_number(figure.low, figure.name)} to {_number(figure.high, figure.name)}"]


def _apart(figure: Figure) -> list[str]:
    apart = figure.compared
    if apart is None or apart.difference is None:
        return ["", ""]
    apart_by, low, high = (_number(value, figure.name, "+") for value in (apart.difference, apart.low, apart.high))
    return [apart_by if apart.low is None else f"{apart_by} [{low}, {high}]", "" if apart.p is None else f"{apart.p:.2g}"]


def _number(value: float | None, name: str, sign: str = "") -> str:
    return "NA" if value is None else f"{value:{sign}.{2 if name in OF_HUNDRED else 4}f}"


def _labels(whole: Sequence[Row], several: bool) -> tuple[list[str], list[list[str]]] | None:
    names = list(dict.fromkeys(figure.name for row in whole for figure in row.figures if figure.label is not None))
    found = []
    for label in whole[0].classes:
        for row in whole:
            own = {figure.name: figure.value for figure in row.figures if figure.label == label}
            found.append([label, *([row.system.name] if several else []), *(_number(own[name], name) for name in names)])
    return (["label", *(["system"] if several else []), *names], found) if names else None


def _costs(whole: Sequence[Row], several: bool) -> tuple[list[str], list[list[str]]]:
    """Which model? The first figure beside what it takes."""
    found = []
    for row in whole:
        value, between = _shown(row.figures[0])
        found.append([row.system.name, f"{value} [{between}]" if between else value,
                      *(_apart(row.figures[0]) if several else []),
                      *(_cost(name, row.system.facts.get(name)) for name in COSTS)])
    return ["model", whole[0].figures[0].name, *(["less the first", "p"] if several else []), "parameters", "MB on disk",
            "MB of memory", "records/s"], found


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:,.1f}" if name.endswith("bytes") else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader of these rows should know, a line each."""
    for row in (row for row in rows if row.group == WHOLE):
        name = row.system.name
        if row.empty:
            yield f"{name}: {row.empty:,} of {row.records:,} predictions are empty"
        if row.never_given and _has(row, "precision"):
            yield f"{name}: never given, so without a precision, which averages count as 0: {_some(row.never_given)}"
        if row.never_right and _has(row, "recall"):
            yield f"{name}: right for no record, so without a recall, which averages count as 0: {_some(row.never_right)}"
    first = next(row for row in rows if row.group == WHOLE)
    for metric, signature in first.system.counts.signatures().items():
        yield f"{metric}: {signature}"


def _has(row: Row, name: str) -> bool:
    return any(figure.name.startswith(name) for figure in row.figures)


def _some(labels: Sequence[str], most: int = 5) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")
