"""Metrics of labels as pure functions: what one record adds to the sums, and figures of the sums.

The sums of C classes have 3 + 3C columns: records, exact matches and records without a prediction;
then for each class how often it was predicted rightly, predicted, and true.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lmcli.evaluation.bootstrap import SumMetric

RECORDS, EXACT, UNPREDICTED = range(3)
FigureKey = tuple[str, str | None]  # (metric, the class it is for)


def label_counts(
    reference: frozenset[str], predicted: frozenset[str], class_index: dict[str, int]
) -> np.ndarray:
    """What one record adds to the sums (3 + 3C,); `class_index` numbers the classes."""
    row, count = np.zeros(3 + 3 * len(class_index)), len(class_index)
    row[:3] = 1, reference == predicted, not predicted
    for block, labels in enumerate((reference & predicted, predicted, reference)):
        row[[3 + block * count + class_index[label] for label in labels]] = 1
    return row


def class_counts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each class was predicted rightly, predicted, and true: each (R, C)."""
    right, predicted, true = np.split(sums[:, 3:], 3, axis=1)
    return right, predicted, true


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio, NaN where the denominator is 0."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)


def precision(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """right / predicted; undefined (NaN) for a class that was never predicted."""
    return _ratio(right, predicted)


def recall(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """right / true; undefined (NaN) for a class that no record has."""
    return _ratio(right, true)


def f1(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """2 · right / (predicted + true), the harmonic mean of precision and recall."""
    return _ratio(2 * right, predicted + true)


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
        return _ratio(values.sum(1), occurs.sum(1))

    return average


def _micro(metric: ClassMetric) -> SumMetric:
    return lambda sums: metric(*(counts.sum(1) for counts in class_counts(sums)))


def _of_class(metric: ClassMetric, k: int) -> SumMetric:
    return lambda sums: metric(*(counts[:, k] for counts in class_counts(sums)))


def mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation of several classes, R_K (Gorodkin 2004); NaN if a side has one class.

    Records without a prediction count as a class of their own.
    """
    _, predicted, true = class_counts(sums)
    total, right, nothing = sums[:, RECORDS], sums[:, EXACT], sums[:, UNPREDICTED]
    over = right * total - (predicted * true).sum(1)
    under = (total**2 - (predicted**2).sum(1) - nothing**2) * (total**2 - (true**2).sum(1))
    return _ratio(over, np.sqrt(under))


def build_label_metrics(classes: Sequence[str], multi_label: bool) -> dict[FigureKey, SumMetric]:
    """The metrics of sums of `label_counts`; `multi_label`: a record may have many labels."""
    metrics: dict[FigureKey, SumMetric] = {
        ("exact_set" if multi_label else "accuracy", None): column_mean(EXACT, RECORDS)
    }
    for name, metric in CLASS_METRICS.items():
        metrics[f"{name}_macro", None] = _macro(metric)
        metrics[f"{name}_micro", None] = _micro(metric)
    if not multi_label:
        metrics["mcc", None] = mcc
    for k, label in enumerate(classes):
        for name, metric in CLASS_METRICS.items():
            metrics[name, label] = _of_class(metric, k)
    return metrics


def column_mean(column: int, count_column: int) -> SumMetric:
    """The metric that divides one column of sums by another."""
    return lambda sums: _ratio(sums[:, column], sums[:, count_column])


def confusion_matrix(
    references: Sequence[str], predictions: Sequence[str | None], classes: Sequence[str]
) -> list[list[int]]:
    """How many records of each class (rows) got each label (columns; the last one: no label)."""
    counts = Counter(zip(references, predictions))
    return [[counts[true, label] for label in (*classes, None)] for true in classes]
