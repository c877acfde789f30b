"""Figures of labels, as pure functions: what one record counts for, and what the sums of that come to."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lmcli.analysis.intervals import Score

# columns that a record of labels adds before those of its classes: itself, whether it is all right, whether it got nothing
RECORDS, EXACT, NOTHING = range(3)
Key = tuple[str, str | None]  # (figure, the class it is for)


def label_row(reference: frozenset[str], predicted: frozenset[str], places: dict[str, int]) -> np.ndarray:
    """What one record counts for (3 + 3C,): itself, whether both sets are the same, whether nothing was predicted; then for
    each of C classes whether it is in both, in the prediction, in the reference. `places` numbers the classes."""
    row, count = np.zeros(3 + 3 * len(places)), len(places)
    row[:3] = 1, reference == predicted, not predicted
    for part, labels in enumerate((reference & predicted, predicted, reference)):
        row[[3 + part * count + places[label] for label in labels]] = 1
    return row


def _classes(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, predicted and true ones of each class, each (R, C)."""
    right, predicted, true = np.split(sums[:, 3:], 3, axis=1)
    return right, predicted, true


def given_and_true(sums: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of `count` classes was given and was right, of sums (3 + 3C,)."""
    return sums[3 + count:3 + 2 * count], sums[3 + 2 * count:3 + 3 * count]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


def precision(right, predicted, true) -> np.ndarray:
    """right / predicted, undefined where nothing was predicted."""
    return _ratio(right, predicted)


def recall(right, predicted, true) -> np.ndarray:
    """right / true, undefined where there is nothing to find."""
    return _ratio(right, true)


def f1(right, predicted, true) -> np.ndarray:
    """2 · right / (predicted + true), the harmonic mean of precision and recall."""
    return _ratio(2 * right, predicted + true)


OF_CLASSES = {"precision": precision, "recall": recall, "f1": f1}


def _macro(figure: Callable) -> Score:
    """The mean over the classes that occur on either side, an undefined figure counted as 0 (as scikit-learn does)."""
    def score(sums: np.ndarray) -> np.ndarray:
        right, predicted, true = _classes(sums)
        occurs = predicted + true > 0
        return _ratio(np.where(occurs, np.nan_to_num(figure(right, predicted, true)), 0).sum(1), occurs.sum(1))
    return score


def _micro(figure: Callable) -> Score:
    return lambda sums: figure(*(part.sum(1) for part in _classes(sums)))


def _of_class(figure: Callable, k: int) -> Score:
    return lambda sums: figure(*(part[:, k] for part in _classes(sums)))


def mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation of several classes, R_K (Gorodkin 2004); undefined where one side has one class only. Records
    that got no label count as a class of their own."""
    _, predicted, true = _classes(sums)
    total, right, nothing = sums[:, RECORDS], sums[:, EXACT], sums[:, NOTHING]
    over = right * total - (predicted * true).sum(1)
    under = (total**2 - (predicted**2).sum(1) - nothing**2) * (total**2 - (true**2).sum(1))
    return _ratio(over, np.sqrt(under))


def label_scores(classes: Sequence[str], several: bool) -> dict[Key, Score]:
    """The figures of `label_row`s that were added up; `several` where a record may have more labels than one."""
    found: dict[Key, Score] = {("exact_set" if several else "accuracy", None): mean_of(EXACT, RECORDS)}
    for name, figure in OF_CLASSES.items():
        found[f"{name}_macro", None] = _macro(figure)
        found[f"{name}_micro", None] = _micro(figure)
    if not several:
        found["mcc", None] = mcc
    return found | {(name, label): _of_class(figure, k) for k, label in enumerate(classes)
                    for name, figure in OF_CLASSES.items()}


def mean_of(column: int, counted: int) -> Score:
    """The score that is one column of sums over another."""
    return lambda sums: _ratio(sums[:, column], sums[:, counted])


def confusion(references: Sequence[str], predictions: Sequence[str | None], classes: Sequence[str]) -> list[list[int]]:
    """How many records of each class (rows) got each label (columns, the last one for none)."""
    counts = Counter(zip(references, predictions))
    return [[counts[true, label] for label in (*classes, None)] for true in classes]
