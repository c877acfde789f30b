"""Systems (models or files of predictions) on the same records: figures, groups, differences.

A metric maps summed counts of records to a figure, which is one number. A hit column counts 0 or 1
for each record, so that its mean is a rate.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from lmcli.data.schema import sort_labels
from lmcli.evaluation import label_metrics
from lmcli.evaluation.bootstrap import (
    FigureTable,
    PairedComparison,
    Statistics,
    SumMetric,
    bootstrap_intervals,
    compare,
    compare_by_samples,
)
from lmcli.evaluation.intervals import Rate
from lmcli.evaluation.label_metrics import FigureKey
from lmcli.evaluation.predictions import EvalRecord
from lmcli.evaluation.sparse_rows import SparseRows
from lmcli.evaluation.tasks import selects
from lmcli.evaluation.text_metrics import TextMetric

ALL_RECORDS = "(all)"  # the group of all records
RECORDS_PER_CHUNK = 128
CLASSES_AT_ONCE = 1000
Labels = Sequence[Sequence[str]]  # for each record its labels, or its texts
# records by (class, predicted label; None without one): only the pairs that occur
Confusion = dict[tuple[str, str | None], int]


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
        """The counts of `label_metrics.label_rows` over these classes."""
        class_index = {label: k for k, label in enumerate(classes)}
        rows = label_metrics.label_rows(self.pairs, class_index)
        return Statistics(rows, np.array(self.index, dtype=np.int64))

    def metrics(self) -> dict[FigureKey, SumMetric]:
        """All metrics but those of single classes."""
        return label_metrics.build_label_metrics(self.multi_label)

    def hits(self) -> dict[FigureKey, int]:
        """The column of each figure that is the mean of a column of 0 and 1."""
        return {("exact_set" if self.multi_label else "accuracy", None): label_metrics.EXACT}

    def _select(self, records: np.ndarray) -> list[tuple[frozenset[str], frozenset[str]]]:
        pairs = list(self.pairs)
        return [pairs[k] for k in np.array(self.index)[records]]

    def confusion(self, records: np.ndarray, classes: Sequence[str]) -> Confusion | None:
        """How often each class got each label, in order; None with several labels a record."""
        if self.multi_label:
            return None
        place: dict[str | None, int] = {label: k for k, label in enumerate((*classes, None))}
        counts = Counter(
            (next(iter(true)), next(iter(predicted), None))
            for true, predicted in self._select(records)
        )
        order = sorted(counts, key=lambda pair: (place[pair[0]], place[pair[1]]))
        return {pair: counts[pair] for pair in order}

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

    def metrics(self) -> dict[FigureKey, SumMetric]:
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
    if isinstance(metric, Rate):
        hits, count = metric.hits, metric.count
        return Rate(lambda sums: hits(sums[:, columns]), lambda sums: count(sums[:, columns]))
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

    `confusion` counts records by class and predicted label. `never_predicted` are the classes that
    some record has and no prediction, `never_true` those that some prediction has and no record.
    """

    system: System
    group: str
    records: int
    empty: int
    classes: list[str]
    values: list[MetricValue]
    confusion: Confusion | None
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
        # how often each class (C,) is predicted and true in this group, for each system
        sums = [each.sums() for each in selected]
        counts = [label_metrics.class_counts(each) for each in sums] if classes else []
        occurring = [(predicted[0] > 0, true[0] > 0) for _, predicted, true in counts]
        shown = np.flatnonzero(np.any([p | t for p, t in occurring], 0) if occurring else [])
        for number, system in enumerate(systems):
            first = selected[0] if number else None
            figures = {
                key: metric
                for key, metric in system.counts.metrics().items()
                if any(selects(metric, key[0]) for metric in metrics)
            }
            values = _values(system, figures, selected[number], first, resamples, seed)
            if classes:
                of_classes = [name for name in label_metrics.CLASS_METRICS if name in metrics]
                values += _class_values(
                    of_classes, classes, shown, selected[number], first, resamples, seed
                )
            predicted, true = occurring[number] if classes else (np.zeros(0), np.zeros(0))
            names = [classes[k] for k in shown]
            yield SystemResult(
                system,
                name,
                len(records),
                int(np.array(system.empty)[records].sum()),
                names,
                values,
                system.counts.confusion(records, names) if "confusion" in metrics else None,
                system.counts.majority_accuracy(records),
                [classes[k] for k in shown if true[k] and not predicted[k]],
                [classes[k] for k in shown if predicted[k] and not true[k]],
            )


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


def _class_values(
    names: Sequence[str],
    classes: Sequence[str],
    shown: np.ndarray,
    statistics: Statistics,
    first: Statistics | None,
    resamples: int,
    seed: int,
) -> list[MetricValue]:
    """The named figures of the `shown` classes (numbers), compared with the `first` system's."""
    figures = label_metrics.class_figures(statistics.sums())
    compared = {}
    if first is not None and names:
        compared = compare_classes(first, statistics, names, shown, len(classes), resamples, seed)
    values = []
    for k in shown.tolist():
        for name in names:
            value, low, high = (_number(array[k]) for array in figures[name])
            if not resamples:
                low = high = None
            values.append(MetricValue(name, classes[k], value, low, high, compared.get((name, k))))
    return values


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def compare_classes(
    first: Statistics,
    second: Statistics,
    names: Sequence[str],
    shown: np.ndarray,
    count: int,
    resamples: int,
    seed: int,
) -> dict[tuple[str, int], PairedComparison]:
    """The comparison of two systems for each (figure, class number), CLASSES_AT_ONCE at a time.

    Memory stays the same for any number of classes; time grows with the records that have them.
    """
    comparisons: dict[tuple[str, int], PairedComparison] = {}
    if len(first) < 2 or not resamples:
        return comparisons
    for start in range(0, len(shown), CLASSES_AT_ONCE):
        block = shown[start : start + CLASSES_AT_ONCE]
        # right, predicted and true of each class, after three columns of the record's own
        columns = np.concatenate([3 + part * count + block for part in range(3)])
        pair = (_select_columns(first, columns), _select_columns(second, columns))
        keys = [(name, k) for name in names for k in block.tolist()]
        table = FigureTable(keys, partial(_figures_of_block, names, len(block)))
        comparisons |= compare_by_samples(*pair, table, resamples, seed)
    return comparisons


def _figures_of_block(names: Sequence[str], size: int, sums: np.ndarray) -> np.ndarray:
    """The named figures of `size` classes (R, names · size) from sums (R, 3 · size)."""
    counts = sums[:, :size], sums[:, size : 2 * size], sums[:, 2 * size :]
    return np.concatenate([label_metrics.CLASS_METRICS[name](*counts) for name in names], 1)


def _select_columns(statistics: Statistics, columns: np.ndarray) -> Statistics:
    """The statistics of these columns; all records that add nothing to them share a row."""
    assert isinstance(statistics.values, SparseRows)  # as LabelCounts makes them
    values, place = statistics.values.select(columns).merged_empty()
    return Statistics(values, place[statistics.index])
