"""`lm evaluate` output: figures of systems as TSV, JSON Lines or tables, and remarks on them."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmcli.evaluation.bootstrap import PairedComparison
from lmcli.evaluation.intervals import FEW_RECORDS, Rate
from lmcli.evaluation.systems import ALL_RECORDS, Confusion, MetricValue, SystemResult
from lmcli.evaluation.tasks import Task

COMPARISON_COLUMNS = ("difference", "difference_low", "difference_high", "p", "test")
COSTS = ("parameters", "disk_bytes", "memory_bytes", "records_per_second")
PERCENT_FIGURES = ("bleu", "chrf")  # from 0 to 100, others from 0 to 1
MAX_CONFUSION_CLASSES = 20  # of a matrix on a terminal; with more, as many kinds of mistakes
MAX_TABLE_LABELS = 40  # of a table of labels on a terminal
MAX_MATRIX_CLASSES = 200  # of a matrix in JSON, whose size is their square
MAX_LISTED_LABELS = 5
TableData = tuple[list[str], list[list[str]]]  # header and rows


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
            if len(result.classes) <= MAX_CONFUSION_CLASSES:
                yield self._confusion(result, result.confusion)
            elif rows := frequent_mistakes(result.confusion):
                title = f"{result.system.name}: true" if self.many else "true"
                yield [title, "predicted", "records"], rows
        if any(result.system.facts for result in overall):
            yield self._costs(overall)

    def _comparison_header(self, results: Sequence[SystemResult]) -> list[str]:
        return [f"difference from {results[0].system.name}", "p"] if self.many else []

    def _figures(self, results: Sequence[SystemResult]) -> TableData:
        header = [
            *(["group"] if self.grouped else []),
            "metric",
            *(["system"] if self.many else []),
            *("value", "95 % interval"),
            *self._comparison_header(results),
        ]
        rows = []
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
                names = [*([group] if self.grouped else []), name, *([system] if self.many else [])]
                rows.append([*names, *cells, *[""] * (len(header) - len(names) - len(cells))])
        return header, rows

    def _value_cells(self, value: MetricValue) -> list[str]:
        """The value, its interval, and for several systems the difference and p."""
        interval = ""
        if value.low is not None:
            interval = f"{_number(value.low, value.name)} to {_number(value.high, value.name)}"
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
        rows = []
        for label in frequent_labels(overall[0]):
            for values, result in zip(of_label, overall):
                system = [result.system.name] if self.many else []
                cells = (_number(values[label][name], name) for name in names)
                rows.append([label, *system, *cells])
        title, count = "label", len(overall[0].classes)
        if count > MAX_TABLE_LABELS:
            title = f"label ({MAX_TABLE_LABELS} most frequent of {count:,})"
        return [title, *(["system"] if self.many else []), *names], rows

    def _confusion(self, result: SystemResult, confusion: Confusion) -> TableData:
        corner = "true \\ predicted"
        header = [f"{result.system.name}: {corner}" if self.many else corner, *result.classes]
        columns: list[str | None] = [*result.classes]
        if any(predicted is None for _, predicted in confusion):
            header.append("(none)")
            columns.append(None)
        rows = [
            [label, *(f"{confusion.get((label, predicted), 0):,}" for predicted in columns)]
            for label in result.classes
        ]
        return header, rows

    def _costs(self, overall: Sequence[SystemResult]) -> TableData:
        """The first figure of each model next to what the model costs."""
        header = ["model", overall[0].values[0].name, *self._comparison_header(overall)]
        rows = []
        for result in overall:
            value, interval, *comparison = self._value_cells(result.values[0])
            costs = [_cost(name, result.system.facts.get(name)) for name in COSTS]
            figure = f"{value} [{interval}]" if interval else value
            rows.append([result.system.name, figure, *comparison, *costs])
        return [*header, "parameters", "MB on disk", "MB of memory", "records/s"], rows


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
    """The results, each system named by the last part of its path if these parts differ."""
    short = {r.system.name: Path(r.system.name).name or r.system.name for r in results}
    if len(set(short.values())) < len(short):
        return list(results)
    return [replace(r, system=replace(r.system, name=short[r.system.name])) for r in results]


def _comparison_cells(value: MetricValue) -> list[str]:
    comparison = value.comparison
    if comparison is None or comparison.difference is None:
        return ["", ""]
    difference, low, high = (
        _number(each, value.name, "+")
        for each in (comparison.difference, comparison.low, comparison.high)
    )
    interval = "" if comparison.low is None else f" [{low}, {high}]"
    return [difference + interval, "" if comparison.p is None else f"{comparison.p:.2g}"]


def _number(value: float | None, name: str, sign: str = "") -> str:
    digits = 2 if name in PERCENT_FIGURES else 4
    return "NA" if value is None else f"{value:{sign}.{digits}f}"


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
