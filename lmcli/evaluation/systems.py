"""Systems (models or files of predictions) on the same records: figures, groups, differences.

A metric maps summed counts of records to a figure, which is one number. A hit column counts 0 or 1
for each record, so that its mean is a rate.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from lmcli.data.schema import sort_labels
from lmcli.evaluation import label_metrics
from lmcli.evaluation.bootstrap import (
    PairedComparison,
    Statistics,
    SumMetric,
    bootstrap_intervals,
    compare,
)
from lmcli.evaluation.label_metrics import FigureKey
from lmcli.evaluation.predictions import EvalRecord
from lmcli.evaluation.text_metrics import TextMetric

ALL_RECORDS = "(all)"  # the group of all records
RECORDS_PER_CHUNK = 128
Labels = Sequence[Sequence[str]]  # for each record its labels, or its texts


class LabelCounts:
    """Labeled records: the distinct pairs (true, predicted), and the pair of each record."""

    def __init__(self, multi_label: bool):
        self.multi_label = multi_label
        self.pairs: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        self.index: list[int] = []

    def add(self, references: Labels, predictions: Labels) -> None:
        """Counts more records."""
        for true, predicted in zip(references, predictions):
            pair = frozenset(true), frozenset(predicted)
            self.index.append(self.pairs.setdefault(pair, len(self.pairs)))

    def classes(self) -> set[str]:
        """All labels that are true or predicted for some record."""
        return {label for pair in self.pairs for labels in pair for label in labels}

    def statistics(self, classes: Sequence[str]) -> Statistics:
        """The counts of `label_metrics.label_counts` over these classes."""
        class_index = {label: k for k, label in enumerate(classes)}
        rows = [label_metrics.label_counts(*pair, class_index) for pair in self.pairs]
        return Statistics(np.array(rows), np.array(self.index))

    def metrics(self, classes: Sequence[str]) -> dict[FigureKey, SumMetric]:
        """All metrics, also of single classes."""
        return label_metrics.build_label_metrics(classes, self.multi_label)

    def hits(self) -> dict[FigureKey, int]:
        """The column of each figure that is the mean of a column of 0 and 1."""
        return {("exact_set" if self.multi_label else "accuracy", None): label_metrics.EXACT}

    def _select(self, records: np.ndarray) -> list[tuple[frozenset[str], frozenset[str]]]:
        pairs = list(self.pairs)
        return [pairs[k] for k in np.array(self.index)[records]]

    def confusion(self, records: np.ndarray, classes: Sequence[str]) -> list[list[int]] | None:
        """The confusion matrix of some records; None with several labels for each record."""
        if self.multi_label:
            return None
        pairs = self._select(records)
        true, predicted = [next(iter(t)) for t, _ in pairs], [next(iter(p), None) for _, p in pairs]
        return label_metrics.confusion_matrix(true, predicted, classes)

    def majority_accuracy(self, records: np.ndarray) -> float | None:
        """The accuracy of predicting the most frequent labels for each of these records."""
        counts = Counter(true for true, _ in self._select(records))
        return max(counts.values()) / len(records)

    def signatures(self) -> dict[str, str]:
        """Nothing: there is one way to count labels."""
        return {}


class TextCounts:
    """Text records: the counts of all metrics, a row for each record."""

    def __init__(self, text_metrics: dict[str, TextMetric]):
        self.text_metrics = text_metrics
        self.rows: list[np.ndarray] = []
        self.columns: dict[str, slice] = {}  # source of metrics → its columns

    def add(self, references: Labels, predictions: Labels) -> None:
        """Counts more records; a missing prediction is an empty text."""
        texts = [predicted[0] if predicted else "" for predicted in predictions]
        blocks, start = [], 0
        for source, metric in self.text_metrics.items():
            blocks.append(metric.rows(references, texts))
            self.columns[source] = slice(start, start + blocks[-1].shape[1])
            start = self.columns[source].stop
        self.rows.append(np.concatenate(blocks, axis=1))

    def classes(self) -> set[str]:
        """Empty: texts have no classes."""
        return set()

    def statistics(self, classes: Sequence[str]) -> Statistics:
        """The rows of all records."""
        rows = np.concatenate(self.rows)
        return Statistics(rows, np.arange(len(rows)))

    def metrics(self, classes: Sequence[str]) -> dict[FigureKey, SumMetric]:
        """All metrics."""
        return {
            (name, None): _of_columns(metric, self.columns[source])
            for source, text_metric in self.text_metrics.items()
            for name, metric in text_metric.figures.items()
        }

    def hits(self) -> dict[FigureKey, int]:
        """The column of each figure that is the mean of a column of 0 and 1."""
        return {
            (name, None): self.columns[source].start + column
            for source, text_metric in self.text_metrics.items()
            for name, column in text_metric.hits.items()
        }

    def confusion(self, records: np.ndarray, classes: Sequence[str]) -> None:
        """None: texts have no classes."""

    def majority_accuracy(self, records: np.ndarray) -> None:
        """None: texts have no classes."""

    def signatures(self) -> dict[str, str]:
        """How each source counts, where there is more than one way."""
        signatures = {source: metric.signature() for source, metric in self.text_metrics.items()}
        return {source: signature for source, signature in signatures.items() if signature}


def _of_columns(metric: SumMetric, columns: slice) -> SumMetric:
    return lambda sums: metric(sums[:, columns])


@dataclass
class System:
    """A model or a file of predictions.

    `empty` says for each record whether nothing was predicted, `facts` what a model costs.
    """

    name: str
    counts: LabelCounts | TextCounts
    empty: list[bool] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, pairs: Iterable[tuple[EvalRecord, Sequence[str]]]) -> Iterator[int]:
        """Counts records with their predictions; yields how many have been counted."""
        pairs = iter(pairs)
        while chunk := list(islice(pairs, RECORDS_PER_CHUNK)):
            predictions = [predicted for _, predicted in chunk]
            self.counts.add([record.references for record, _ in chunk], predictions)
            self.empty += [not any(predicted) for predicted in predictions]
            yield len(self.empty)


@dataclass
class MetricValue:
    """A figure of a system with its 95 % interval.

    `label` is the class it is for, `comparison` the difference from the first system.
    """

    name: str
    label: str | None
    value: float | None
    low: float | None
    high: float | None
    comparison: PairedComparison | None = None


@dataclass
class SystemResult:
    """What was measured for a system on a group of records.

    `confusion` has a row for each class and a last column for records without a prediction.
    `never_predicted` are the classes that some record has and no prediction, `never_true` those
    that some prediction has and no record.
    """

    system: System
    group: str
    records: int
    empty: int
    classes: list[str]
    values: list[MetricValue]
    confusion: list[list[int]] | None
    majority_accuracy: float | None
    never_predicted: list[str]
    never_true: list[str]


def evaluate_systems(
    systems: Sequence[System],
    groups: Sequence[str],
    metrics: Sequence[str],
    resamples: int,
    seed: int,
) -> Iterator[SystemResult]:
    """A result for each group and system, the group of all records last.

    `groups` has the group of each record; () for all records only. `metrics` are names of
    figures; `f1` also selects `f1_macro` and `f1_micro`.
    """
    classes = sort_labels(set().union(*(system.counts.classes() for system in systems)))
    statistics = [system.counts.statistics(classes) for system in systems]
    members: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    by_group = {name: np.array(members[name]) for name in sort_labels(members)}
    for name, records in (*by_group.items(), (ALL_RECORDS, np.arange(len(statistics[0])))):
        selected = [each.select(records) for each in statistics]
        # whether each class (C,) is predicted and true in this group, for each system
        counts = [label_metrics.class_counts(each.sums()) for each in selected] if classes else []
        occurring = [(predicted[0] > 0, true[0] > 0) for _, predicted, true in counts]
        shown = [c for k, c in enumerate(classes) if any(p[k] or t[k] for p, t in occurring)]
        for number, system in enumerate(systems):
            first = selected[0] if number else None
            figures = {
                key: metric
                for key, metric in system.counts.metrics(classes).items()
                if _is_selected(key[0], metrics) and (key[1] is None or key[1] in shown)
            }
            predicted, true = occurring[number] if classes else (np.zeros(0), np.zeros(0))
            yield SystemResult(
                system,
                name,
                len(records),
                int(np.array(system.empty)[records].sum()),
                shown,
                _values(system, figures, selected[number], first, resamples, seed),
                system.counts.confusion(records, shown) if "confusion" in metrics else None,
                system.counts.majority_accuracy(records),
                [label for k, label in enumerate(classes) if true[k] and not predicted[k]],
                [label for k, label in enumerate(classes) if predicted[k] and not true[k]],
            )


def _is_selected(name: str, metrics: Sequence[str]) -> bool:
    return name in metrics or any(name.startswith(f"{metric}_") for metric in metrics)


def _values(
    system: System,
    figures: dict[FigureKey, SumMetric],
    statistics: Statistics,
    first: Statistics | None,
    resamples: int,
    seed: int,
) -> list[MetricValue]:
    """The figures of a system, compared with the `first` system's statistics if given."""
    hits = {key: column for key, column in system.counts.hits().items() if key in figures}
    intervals = bootstrap_intervals(statistics, figures, resamples, seed)
    comparisons = (
        compare(first, statistics, figures, hits, resamples, seed) if first is not None else {}
    )
    sums, values = statistics.sums(), []
    for key, metric in figures.items():
        value = float(metric(sums)[0])
        low, high = intervals[key] or (None, None)
        comparison = comparisons.get(key)
        values.append(MetricValue(*key, None if np.isnan(value) else value, low, high, comparison))
    return values
