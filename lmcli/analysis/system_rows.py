"""Figures of systems as `lm evaluate` writes them: lines of a table, JSON, tables for a terminal, remarks."""

from collections.abc import Iterator, Sequence
from typing import Any

from lmcli.analysis.systems import WHOLE, Figure, Row

COMPARED = ("difference", "difference_low", "difference_high", "p", "test")
COSTS = ("parameters", "disk_bytes", "memory_bytes", "records_per_second")
COUNTS = ("records", "empty", "majority_accuracy")
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
        yield blank | {"metric": figure.name, "label": figure.label, **_facts(figure)}
    for label, counts in zip(row.classes, row.confusion or ()):
        for given, count in zip((*row.classes, None), counts):
            if count:
                yield blank | {"metric": "confusion", "label": label, "given": given, "value": count}


def _counts(row: Row) -> dict[str, Any]:
    found = {"records": row.records, "empty": row.empty}
    if row.majority is not None:
        found["majority_accuracy"] = row.majority
    return found | (row.system.facts if row.group == WHOLE else {})


def _facts(figure: Figure) -> dict[str, Any]:
    apart = figure.compared
    more = dict(zip(COMPARED, (apart.difference, apart.low, apart.high, apart.p, apart.test))) if apart else {}
    return {"value": figure.value, "low": figure.low, "high": figure.high, **more}


def document(row: Row, task: str, several: bool, grouped: bool, resamples: int, seed: int) -> dict[str, Any]:
    """A Row as one JSON object."""
    blank = dict.fromkeys(COMPARED) if several else {}
    found = {"system": row.system.name, **({"group": row.group} if grouped else {}), "task": task, **_counts(row),
             "figures": {figure.name: {**blank, **_facts(figure)} for figure in row.figures if figure.label is None}}
    labels: dict[str, dict[str, Any]] = {}
    for figure in row.figures:
        if figure.label is not None:
            labels.setdefault(figure.label, {})[figure.name] = {**blank, **_facts(figure)}
    found |= {"labels": labels} if labels else {}
    if row.confusion is not None:
        found["confusion"] = {"labels": row.classes, "counts": row.confusion}
    return found | {"signatures": row.system.counts.signatures(), "resamples": resamples, "seed": seed}


def tables(rows: Sequence[Row], several: bool, grouped: bool) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(header, lines) of each table that a terminal shows: the figures; those of labels and who was taken for whom, of all
    records; and what models cost."""
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
        yield _costs(whole)


def _figures(rows: Sequence[Row], several: bool, grouped: bool) -> tuple[list[str], list[list[str]]]:
    header = [*(["group"] if grouped else []), "metric", *(["system"] if several else []), "value", "95 % interval",
              *(["less the first", "p"] if several else [])]
    groups = list(dict.fromkeys(row.group for row in rows))
    found = []
    for group in groups:
        own = [row for row in rows if row.group == group]
        names = [figure.name for figure in own[0].figures if figure.label is None]
        for name in names:
            for row in own:
                figure = next(one for one in row.figures if (one.name, one.label) == (name, None))
                found.append([*([group] if grouped else []), name, *([row.system.name] if several else []),
                              *_shown(figure), *(_apart(figure) if several else [])])
        for name in COUNTS:
            values = [_counts(row).get(name) for row in own]
            for row, value in zip(own, values if name == "empty" else values[:1]):
                if value is not None and (value or name != "empty"):
                    found.append([*([group] if grouped else []), name,
                                  *([row.system.name if name == "empty" else ""] if several else []),
                                  f"{value:,}" if isinstance(value, int) else f"{value:.4f}", *([""] * (3 if several else 1))])
    return header, found


def _shown(figure: Figure) -> list[str]:
    return [_number(figure.value, figure.name),
            "" if figure.low is None else f"{_number(figure.low, figure.name)} to {_number(figure.high, figure.name)}"]


def _apart(figure: Figure) -> list[str]:
    apart = figure.compared
    if apart is None or apart.difference is None:
        return ["", ""]
    between = "" if apart.low is None else f" [{_number(apart.low, figure.name, '+')}, {_number(apart.high, figure.name, '+')}]"
    return [f"{_number(apart.difference, figure.name, '+')}{between}", "" if apart.p is None else f"{apart.p:.3g}"]


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


def _costs(whole: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Which model? The first figure beside what it takes."""
    first = next(figure.name for figure in whole[0].figures)
    found = []
    for row in whole:
        figure, costs = row.figures[0], row.system.facts
        value, between = _shown(figure)
        found.append([row.system.name, f"{value} [{between}]" if between else value,
                      *(_cost(name, costs.get(name)) for name in COSTS)])
    return ["model", first, "parameters", "MB on disk", "MB of memory", "records/s"], found


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
        undefined = {part: [figure.label for figure in row.figures if figure.label is not None and figure.value is None
                            and figure.name == part] for part in ("precision", "recall")}
        for part, why in (("precision", "never given"), ("recall", "in no record")):
            if undefined[part]:
                yield (f"{name}: {_some(undefined[part])} {why}, so the {part} is undefined (NA); averages count it as 0")
    first = next(row for row in rows if row.group == WHOLE)
    for metric, signature in first.system.counts.signatures().items():
        yield f"{metric}: {signature}"


def _some(labels: Sequence[str | None], most: int = 5) -> str:
    told = ", ".join(map(repr, labels[:most])) + (f" and {len(labels) - most} more" if len(labels) > most else "")
    return f"{'label' if len(labels) == 1 else 'labels'} {told}"
