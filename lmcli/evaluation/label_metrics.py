"""Metrics of labels as pure functions: what one record adds to the sums, and figures of the sums.

The sums of C classes have 3 + 3C columns: records, exact matches and records without a prediction;
then for each class how often it was predicted rightly, predicted, and true.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np

from lmcli.evaluation.bootstrap import SumMetric
from lmcli.evaluation.intervals import Rate, ratio, wilson_intervals
from lmcli.evaluation.sparse_rows import SparseRows

RECORDS, EXACT, UNPREDICTED = range(3)
FigureKey = tuple[str, str | None]  # (metric, the class it is for)


def label_columns(
    reference: frozenset[str], predicted: frozenset[str], class_index: dict[str, int]
) -> list[int]:
    """The columns of the sums to which one record adds 1; `class_index` numbers the classes."""
    count = len(class_index)
    columns = [RECORDS, *([EXACT] if reference == predicted else ())]
    columns += [] if predicted else [UNPREDICTED]
    for block, labels in enumerate((reference & predicted, predicted, reference)):
        columns += [3 + block * count + class_index[label] for label in labels]
    return columns


def label_rows(
    pairs: Iterable[tuple[frozenset[str], frozenset[str]]], class_index: dict[str, int]
) -> SparseRows:
    """What records with these labels (true, predicted) add to the sums (D, 3 + 3C)."""
    rows = [label_columns(*pair, class_index) for pair in pairs]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    columns = np.fromiter(chain.from_iterable(rows), np.int64, int(starts[-1]))
    return SparseRows(columns, starts, 3 + 3 * len(class_index))


def class_counts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each class was predicted rightly, predicted, and true: each (R, C)."""
    size = (sums.shape[1] - 3) // 3
    return sums[:, 3 : 3 + size], sums[:, 3 + size : 3 + 2 * size], sums[:, 3 + 2 * size :]


def precision(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """right / predicted; undefined (NaN) for a class that was never predicted."""
    return ratio(right, predicted)


def recall(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """right / true; undefined (NaN) for a class that no record has."""
    return ratio(right, true)


def f1(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """2 · right / (predicted + true), the harmonic mean of precision and recall."""
    return ratio(2 * right, predicted + true)


ClassMetric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
CLASS_METRICS: dict[str, ClassMetric] = {"precision": precision, "recall": recall, "f1": f1}


def _macro(metric: ClassMetric) -> SumMetric:
    """The mean over classes that are predicted or true; undefined values count as 0.

    scikit-learn averages the same way.
    """

    def average(sums: np.ndarray) -> np.ndarray:
        right, predicted, true = class_counts(sums)
        occurs = predicted + true > 0
        values = np.where(occurs, np.nan_to_num(metric(right, predicted, true)), 0)
        return ratio(values.sum(1), occurs.sum(1))

    return average


def _micro(metric: ClassMetric) -> SumMetric:
    return lambda sums: metric(*(counts.sum(1) for counts in class_counts(sums)))


def mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation of several classes, R_K (Gorodkin 2004); NaN if a side has one class.

    Records without a prediction count as a class of their own.
    """
    _, predicted, true = class_counts(sums)
    total, right, nothing = sums[:, RECORDS], sums[:, EXACT], sums[:, UNPREDICTED]
    over = right * total - (predicted * true).sum(1)
    under = (total**2 - (predicted**2).sum(1) - nothing**2) * (total**2 - (true**2).sum(1))
    return ratio(over, np.sqrt(under))


def build_label_metrics(multi_label: bool) -> dict[FigureKey, SumMetric]:
    """The metrics over all classes of `label_rows`; `multi_label`: a record may have many labels.

    With one label a record, micro averages are rates of records.
    """
    metrics: dict[FigureKey, SumMetric] = {
        ("exact_set" if multi_label else "accuracy", None): column_rate(EXACT, RECORDS)
    }
    for name, metric in CLASS_METRICS.items():
        metrics[f"{name}_macro", None] = _macro(metric)
        metrics[f"{name}_micro", None] = _micro(metric) if multi_label else _micro_rate(name)
    if not multi_label:
        metrics["mcc", None] = mcc
    return metrics


def _micro_rate(name: str) -> Rate:
    """A micro average as a rate: right records of those predicted, true, or the mean of both."""
    share = {"precision": (1.0, 0.0), "recall": (0.0, 1.0), "f1": (0.5, 0.5)}[name]

    def count(sums: np.ndarray) -> np.ndarray:
        _, predicted, true = class_counts(sums)
        return share[0] * predicted.sum(1) + share[1] * true.sum(1)

    return Rate(lambda sums: class_counts(sums)[0].sum(1), count)


class ClassFigures(NamedTuple):
    """A figure of each class (C,) with its interval; NaN where it is undefined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def class_figures(sums: np.ndarray) -> dict[str, ClassFigures]:
    """Precision, recall and F1 of each class from sums (1, 3 + 3C), with Wilson's intervals.

    Precision and recall are rates. F1 is 2J / (1 + J) for the rate J of the records with the class,
    true or predicted, that have both (Jaccard); so is its interval.
    """
    right, predicted, true = (counts[0] for counts in class_counts(sums))
    low, high = wilson_intervals(right, predicted + true - right)
    return {
        "precision": ClassFigures(
            precision(right, predicted, true), *wilson_intervals(right, predicted)
        ),
        "recall": ClassFigures(recall(right, predicted, true), *wilson_intervals(right, true)),
        "f1": ClassFigures(f1(right, predicted, true), 2 * low / (1 + low), 2 * high / (1 + high)),
    }


def column_mean(column: int, count_column: int) -> SumMetric:
    """The metric that divides one column of sums by another."""
    return lambda sums: ratio(sums[:, column], sums[:, count_column])


def column_rate(column: int, count_column: int) -> Rate:
    """The same for a column of 0 and 1: a rate."""
    return Rate(lambda sums: sums[:, column], lambda sums: sums[:, count_column])
