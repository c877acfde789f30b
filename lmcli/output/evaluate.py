"""`lm evaluate` output: figures of systems as TSV, JSON Lines or tables, and remarks on them."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcli.evaluation.bootstrap import PairedComparison
from lmcli.evaluation.intervals import FEW_RECORDS, Rate
from lmcli.evaluation.systems import ALL_RECORDS, Confusion, MetricValue, SystemResult
from lmcli.evaluation.tasks import Task
from lmcli.output.cells import short_names
from lmcli.terminal.tables import Cell, Column, digits, fits

COMPARISON_COLUMNS = ("difference", "difference_low", "difference_high", "p", "test")
COSTS: dict[str, tuple[Cell, int]] = {  # title and rank of the column on a terminal
    "parameters": ("parameters", 4),
    "disk_bytes": (("MB on disk", "disk MB"), 6),
    "memory_bytes": (("MB of memory", "memory MB"), 7),
    "records_per_second": ("records/s", 5),
}
PERCENT_FIGURES = ("bleu", "chrf")  # from 0 to 100, others from 0 to 1
MAX_CONFUSION_CLASSES = 20  # of a matrix on a terminal; with more, as many kinds of mistakes
MAX_TABLE_LABELS = 40  # of a table of labels on a terminal
MAX_MATRIX_CLASSES = 200  # of a matrix in JSON, whose size is their square
MAX_LISTED_LABELS = 5
TableData = tuple[list[str | Column], list[list[Cell]]]  # header and rows


def columns(labels: bool, many: bool, grouped: bool) -> tuple[str, ...]:
    """The columns of TSV, which has a line for each figure of a system and group.

    With `labels` a figure may be for a label, or count the records of a label with a prediction.
    """
    return (
        *(("system",) if many else ()),
        *(("group",) if grouped else ()),
        "metric",
        *(("label", "given") if labels else ()),
        *("value", "low", "high"),
        *(COMPARISON_COLUMNS if many else ()),
    )


@dataclass(frozen=True)
class EvaluationFormat:
    """How the results of a task are written; `many` for several systems, `grouped` for --by."""

    task: Task
    many: bool
    grouped: bool
    resamples: int
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of TSV."""
        return columns(self.task.schema.kind == "labels", self.many, self.grouped)

    def rows(
        self, results: Iterable[SystemResult], as_json: bool, printed: list[SystemResult]
    ) -> Iterator[dict[str, Any]]:
        """JSON objects or lines of TSV, as results come; appends each result to `printed`."""
        for result in results:
            printed.append(result)
            if as_json:
                yield self.json_object(result)
            else:
                yield from tsv_rows(result)

    def json_object(self, result: SystemResult) -> dict[str, Any]:
        """One result as JSON."""
        figures: dict[str, Any] = {}
        labels: dict[str, dict[str, Any]] = {}
        for value in result.values:
            of = figures if value.label is None else labels.setdefault(value.label, {})
            of[value.name] = _value_fields(value, self.many)
        fields: dict[str, Any] = {"system": result.system.name}
        if self.grouped:
            fields["group"] = result.group
        fields = {**fields, "task": self.task.name, **_counts(result), "figures": figures}
        if labels:
            fields["labels"] = labels
        if result.confusion is not None:
            fields["confusion"] = _confusion_fields(result.classes, result.confusion)
        signatures = result.system.counts.signatures()
        return {**fields, "signatures": signatures, "resamples": self.resamples, "seed": self.seed}

    def tables(self, results: Sequence[SystemResult]) -> Iterator[TableData]:
        """The tables for a terminal: figures; figures of labels; confusion matrices; costs.

        All but the first are for all records.
        """
        results = _with_short_names(results)
        yield self._figures(results)
        overall = [result for result in results if result.group == ALL_RECORDS]
        if any(value.label is not None for value in overall[0].values):
            yield self._labels(overall)
        for result in overall:
            if not result.confusion:
                continue
            matrix = self._confusion(result, result.confusion)
            if len(result.classes) <= MAX_CONFUSION_CLASSES and fits(*matrix):
                yield matrix
            elif rows := frequent_mistakes(result.confusion):
                title = f"{result.system.name}: true" if self.many else "true"
                names = (Column(name, kind="name") for name in (title, "predicted"))
                yield [*names, "records"], [[*row] for row in rows]
        if any(result.system.facts for result in overall):
            yield self._costs(overall)

    def _comparison_header(self, results: Sequence[SystemResult]) -> list[str | Column]:
        title = (f"difference from {results[0].system.name}", "difference")
        return [Column(title, 1), Column("p", 2)] if self.many else []

    def _figures(self, results: Sequence[SystemResult]) -> TableData:
        names = [*(["group"] if self.grouped else []), "metric", *(["system"] if self.many else [])]
        header = [
            *(Column(name, kind="name") for name in names),
            *("value", Column("95 % interval", 3)),
            *self._comparison_header(results),
        ]
        rows: list[list[Cell]] = []
        for group in dict.fromkeys(result.group for result in results):
            members = [result for result in results if result.group == group]
            # the figures of all systems next to each other, then their counts
            lines = [
                (value.name, result.system.name, self._value_cells(value))
                for values in zip(*([v for v in r.values if v.label is None] for r in members))
                for result, value in zip(members, values)
            ]
            lines += [("empty", r.system.name, [f"{r.empty:,}"]) for r in members if r.empty]
            lines.append(("records", "", [f"{members[0].records:,}"]))
            if members[0].majority_accuracy is not None:
                lines.append(("majority_accuracy", "", [f"{members[0].majority_accuracy:.4f}"]))
            for name, system, cells in lines:
                named = [*([group] if self.grouped else []), name, *([system] if self.many else [])]
                rows.append([*named, *cells, *[""] * (len(header) - len(named) - len(cells))])
        return header, rows

    def _value_cells(self, value: MetricValue) -> list[Cell]:
        """The value, its interval, and for several systems the difference and p."""
        low, high = value.low, value.high
        interval: Cell = ""
        if low is not None and high is not None:
            interval = _figure(value.name, lambda n: f"{low:.{n}f} to {high:.{n}f}")
        cells = [_number(value.value, value.name), interval]
        return cells + (_comparison_cells(value) if self.many else [])

    def _labels(self, overall: Sequence[SystemResult]) -> TableData:
        names = list(
            dict.fromkeys(v.name for r in overall for v in r.values if v.label is not None)
        )
        of_label: list[dict[str, dict[str, float | None]]] = [{} for _ in overall]
        for values, result in zip(of_label, overall):
            for value in result.values:
                if value.label is not None:
                    values.setdefault(value.label, {})[value.name] = value.value
        rows: list[list[Cell]] = []
        for label in frequent_labels(overall[0]):
            for values, result in zip(of_label, overall):
                system = [result.system.name] if self.many else []
                cells = (_number(values[label][name], name) for name in names)
                rows.append([label, *system, *cells])
        title, count = "label", len(overall[0].classes)
        if count > MAX_TABLE_LABELS:
            title = f"label ({MAX_TABLE_LABELS} most frequent of {count:,})"
        system_column = [Column("system", kind="name")] if self.many else []
        return [Column(title, kind="name"), *system_column, *names], rows

    def _confusion(self, result: SystemResult, confusion: Confusion) -> TableData:
        corner = "true \\ predicted"
        title = f"{result.system.name}: {corner}" if self.many else corner
        header: list[str | Column] = [Column(title, kind="name"), *result.classes]
        columns: list[str | None] = [*result.classes]
        if any(predicted is None for _, predicted in confusion):
            header.append("(none)")
            columns.append(None)
        rows: list[list[Cell]] = [
            [label, *(f"{confusion.get((label, predicted), 0):,}" for predicted in columns)]
            for label in result.classes
        ]
        return header, rows

    def _costs(self, overall: Sequence[SystemResult]) -> TableData:
        """The first figure of each model next to what the model costs."""
        header = [
            *(Column("model", kind="name"), overall[0].values[0].name, Column("95 % interval", 3)),
            *self._comparison_header(overall),
            *(Column(title, rank) for title, rank in COSTS.values()),
        ]
        rows: list[list[Cell]] = []
        for result in overall:
            costs = [_cost(name, result.system.facts.get(name)) for name in COSTS]
            rows.append([result.system.name, *self._value_cells(result.values[0]), *costs])
        return header, rows


def tsv_rows(result: SystemResult) -> Iterator[dict[str, Any]]:
    """The lines of TSV for a result, each with every column."""
    blank: dict[str, Any] = dict.fromkeys(columns(True, True, True))
    blank |= {"system": result.system.name, "group": result.group}
    for name, count in _counts(result).items():
        yield blank | {"metric": name, "value": count}
    for value in result.values:
        yield blank | {"metric": value.name, "label": value.label, **_value_fields(value, True)}
    for (label, predicted), count in (result.confusion or {}).items():
        cells = {"metric": "confusion", "label": label, "given": predicted, "value": count}
        yield blank | cells


def _confusion_fields(classes: Sequence[str], confusion: Confusion) -> dict[str, Any]:
    """Labels and `counts`, a row for each label with a last column for no prediction.

    With over MAX_MATRIX_CLASSES labels `cells` instead: [label, predicted, records] of the pairs
    that occur, by the labels' numbers (null: no prediction).
    """
    if len(classes) <= MAX_MATRIX_CLASSES:
        counts = [[confusion.get((true, p), 0) for p in (*classes, None)] for true in classes]
        return {"labels": classes, "counts": counts}
    number: dict[str | None, int | None] = {label: k for k, label in enumerate(classes)}
    number[None] = None
    cells = [[number[true], number[p], count] for (true, p), count in confusion.items()]
    return {"labels": classes, "cells": cells}


def frequent_mistakes(confusion: Confusion) -> list[list[str]]:
    """[true, predicted, records] of the wrong predictions that occur most."""
    wrong = [(count, pair) for pair, count in confusion.items() if pair[0] != pair[1]]
    wrong = heapq.nlargest(MAX_CONFUSION_CLASSES, wrong, key=lambda item: item[0])
    return [[true, given or "(none)", f"{count:,}"] for count, (true, given) in wrong]


def frequent_labels(result: SystemResult) -> list[str]:
    """The labels of a table, in order: all, or the most frequent of over MAX_TABLE_LABELS."""
    if len(result.classes) <= MAX_TABLE_LABELS:
        return result.classes
    records: Counter[str] = Counter()
    for (true, _), count in (result.confusion or {}).items():
        records[true] += count
    most = {label for label, _ in records.most_common(MAX_TABLE_LABELS)}
    most |= set(result.classes[: MAX_TABLE_LABELS - len(most)])
    return [label for label in result.classes if label in most]


def _counts(result: SystemResult) -> dict[str, Any]:
    counts: dict[str, Any] = {"records": result.records, "empty": result.empty}
    if result.majority_accuracy is not None:
        counts["majority_accuracy"] = result.majority_accuracy
    return counts | (result.system.facts if result.group == ALL_RECORDS else {})


def _value_fields(value: MetricValue, many: bool) -> dict[str, Any]:
    """Value, interval and, for several systems, the difference from the first."""
    fields: dict[str, Any] = {"value": value.value, "low": value.low, "high": value.high}
    if many:
        each = value.comparison or PairedComparison()
        comparison = (each.difference, each.low, each.high, each.p, each.test)
        fields |= dict(zip(COMPARISON_COLUMNS, comparison))
    return fields


def _with_short_names(results: Sequence[SystemResult]) -> list[SystemResult]:
    """The results, each system by a short name that is its own."""
    names = list(dict.fromkeys(result.system.name for result in results))
    short = dict(zip(names, short_names(names)))
    return [replace(r, system=replace(r.system, name=short[r.system.name])) for r in results]


def _comparison_cells(value: MetricValue) -> list[Cell]:
    each = value.comparison
    if each is None or each.difference is None:
        return ["", ""]
    difference, low, high = each.difference, each.low, each.high

    def write(count: int) -> str:
        interval = "" if low is None else f" [{low:+.{count}f}, {high:+.{count}f}]"
        return f"{difference:+.{count}f}{interval}"

    return [_figure(value.name, write), "" if each.p is None else f"{each.p:.2g}"]


def _number(value: float | None, name: str) -> Cell:
    return "NA" if value is None else _figure(name, lambda count: f"{value:.{count}f}")


def _figure(name: str, write: Callable[[int], str]) -> Cell:
    """A cell with the decimals that suit a metric, or one fewer."""
    most = 2 if name in PERCENT_FIGURES else 4
    return digits(most, most - 1, write)


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def remarks(results: Sequence[SystemResult]) -> Iterator[str]:
    """What a reader of these results should know, a line each."""
    overall = [result for result in results if result.group == ALL_RECORDS]
    for result in overall:
        name, figures = result.system.name, [value.name for value in result.values]
        if result.empty:
            yield f"{name}: {result.empty:,} of {result.records:,} predictions are empty"
        for labels, state, figure in (
            (result.never_predicted, "never predicted", "precision"),
            (result.never_true, "never true", "recall"),
        ):
            if labels and any(each.startswith(figure) for each in figures):
                yield (
                    f"{name}: {state}, so {figure} is undefined and averages count as 0: "
                    f"{_first_labels(labels)}"
                )
    if few := [r for r in results if r.records < FEW_RECORDS and _bootstrapped(r)]:
        names = ", ".join(_bootstrapped(few[0])[:MAX_LISTED_LABELS])
        yield (
            f"the intervals of {names} are by the bootstrap, which is too narrow below "
            f"{FEW_RECORDS} records (here {min(result.records for result in few)})"
        )
    for metric, signature in overall[0].system.counts.signatures().items():
        yield f"{metric}: {signature}"


def _bootstrapped(result: SystemResult) -> list[str]:
    """The figures of all records whose interval or difference is by the bootstrap."""
    metrics = result.system.counts.metrics()
    return [
        value.name
        for value in result.values
        if value.label is None
        and value.low is not None
        and not isinstance(metrics[value.name, None], Rate)
    ]


def _first_labels(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_LISTED_LABELS
    return ", ".join(labels[:MAX_LISTED_LABELS]) + (f" and {more} more" if more > 0 else "")
