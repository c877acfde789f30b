"""Systems, which are models or files of predictions, on the same labelled records: figures, groups, differences."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcli.analysis import metrics
from lmcli.analysis.intervals import Compared, Score, Statistics, compare, intervals
from lmcli.analysis.metrics import Key
from lmcli.analysis.text_metrics import TextMetric
from lmcli.text.labelled import Labelled

WHOLE = "(all)"  # the group of all records, beside those of --by


class LabelCounts:
    """What records of labels count for. Of a record only the number of its kind is kept: right labels and those given."""

    def __init__(self, several: bool):
        self.several = several
        self.kinds: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        self.index: list[int] = []

    def add(self, references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> None:
        """Counts more records."""
        for right, given in zip(references, predictions):
            self.index.append(self.kinds.setdefault((frozenset(right), frozenset(given)), len(self.kinds)))

    def classes(self) -> set[str]:
        """All labels that occur, right or given."""
        return {label for kind in self.kinds for labels in kind for label in labels}

    def statistics(self, classes: Sequence[str]) -> Statistics:
        """The rows of `metrics.label_row`, over these classes."""
        places = {label: k for k, label in enumerate(classes)}
        return Statistics(np.array([metrics.label_row(*kind, places) for kind in self.kinds]), np.array(self.index))

    def scores(self, classes: Sequence[str]) -> dict[Key, Score]:
        """Every figure, those of classes included."""
        return metrics.label_scores(classes, self.several)

    def hits(self) -> dict[Key, int]:
        """The rates of a column of 0 and 1."""
        return {("exact_set" if self.several else "accuracy", None): metrics.EXACT}

    def confusion(self, records: np.ndarray, classes: Sequence[str]) -> list[list[int]] | None:
        """The confusion matrix of some records, see `metrics.confusion`; None where a record has several labels."""
        if self.several:
            return None
        kinds = [(next(iter(right)), next(iter(given), None)) for right, given in self.kinds]
        chosen = np.array(self.index)[records]
        return metrics.confusion([kinds[k][0] for k in chosen], [kinds[k][1] for k in chosen], classes)

    def majority(self, records: np.ndarray) -> float:
        """The accuracy of giving every one of these records what most of them have."""
        kinds = [right for right, _ in self.kinds]
        chosen = np.array(self.index)[records]
        return Counter(kinds[k] for k in chosen).most_common(1)[0][1] / len(chosen)

    def signatures(self) -> dict[str, str]:
        """Nothing: labels are counted in one way only."""
        return {}


class TextCounts:
    """What records of texts count for: the columns of several metrics beside each other, a row a record."""

    def __init__(self, chosen: dict[str, TextMetric]):
        self.metrics = chosen
        self.rows: list[np.ndarray] = []
        self.widths: list[int] = []

    def add(self, references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> None:
        """Counts more records; where nothing was predicted the text is empty."""
        texts = [given[0] if given else "" for given in predictions]
        parts = [metric.rows(references, texts) for metric in self.metrics.values()]
        self.rows.append(np.concatenate(parts, axis=1))
        self.widths = [part.shape[1] for part in parts]

    def classes(self) -> set[str]:
        """None."""
        return set()

    def statistics(self, classes: Sequence[str]) -> Statistics:
        """All rows."""
        rows = np.concatenate(self.rows)
        return Statistics(rows, np.arange(len(rows)))

    def _starts(self) -> Iterator[tuple[TextMetric, int, int]]:
        ends = np.cumsum(self.widths).tolist()
        return zip(self.metrics.values(), [0, *ends], ends)

    def scores(self, classes: Sequence[str]) -> dict[Key, Score]:
        """Every figure."""
        return {(name, None): lambda sums, score=score, start=start, end=end: score(sums[:, start:end])
                for metric, start, end in self._starts() for name, score in metric.scores.items()}

    def hits(self) -> dict[Key, int]:
        """As of `LabelCounts`."""
        return {(name, None): start + column for metric, start, _ in self._starts() for name, column in metric.hits.items()}

    def confusion(self, records: np.ndarray, classes: Sequence[str]) -> None:
        """None: texts have no classes."""

    def majority(self, records: np.ndarray) -> None:
        """None: texts have no classes."""

    def signatures(self) -> dict[str, str]:
        """How each metric counts."""
        return {name: signature for name, metric in self.metrics.items() if (signature := metric.signature())}


@dataclass
class System:
    """A model or a file of predictions; `counts` and `empty` are of its records in order, `facts` what it costs."""

    name: str
    counts: LabelCounts | TextCounts
    empty: list[bool] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def take(self, pairs: Iterable[tuple[Labelled, tuple[str, ...]]], at_once: int = 128) -> Iterator[int]:
        """Counts records with what was predicted for them; yields how many it has."""
        part: list[tuple[Labelled, tuple[str, ...]]] = []
        for pair in pairs:
            part.append(pair)
            if len(part) == at_once:
                yield self._add(part)
                part = []
        if part:
            yield self._add(part)

    def _add(self, part: list[tuple[Labelled, tuple[str, ...]]]) -> int:
        self.counts.add([record.references for record, _ in part], [given for _, given in part])
        self.empty += [not any(given) for _, given in part]
        return len(self.empty)


@dataclass
class Figure:
    """A figure of a system; `label` is the class it is for. With a system before it, how far it lies from that one's."""

    name: str
    label: str | None
    value: float | None
    low: float | None
    high: float | None
    compared: Compared | None = None


@dataclass
class Row:
    """What was measured of a system on a group of records. `confusion` has a row a class and a last column for records
    that got nothing; `majority` is the accuracy of always giving the most frequent class; `never_given` are the classes
    that some record has and no prediction, `never_right` those that no record has and some prediction."""

    system: System
    group: str
    records: int
    empty: int
    classes: list[str]
    figures: list[Figure]
    confusion: list[list[int]] | None
    majority: float | None
    never_given: list[str]
    never_right: list[str]


def order(classes: Iterable[str]) -> list[str]:
    """Labels sorted, whole numbers by value."""
    return sorted(classes, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def measure(systems: Sequence[System], groups: Sequence[str], chosen: Sequence[str], resamples: int,
            seed: int) -> Iterator[Row]:
    """A Row for each group and system. `groups` has the group of each record, () for one group of all; `chosen` are the
    names of figures to give, for classes and averages by the part before the underscore."""
    classes = order(set().union(*(system.counts.classes() for system in systems)))
    every = [system.counts.statistics(classes) for system in systems]
    members: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    for name, places in (*((name, members[name]) for name in order(members)), (WHOLE, range(len(every[0])))):
        records = np.array(places)
        yield from _group(systems, [one.of(records) for one in every], records, name, classes, chosen, resamples, seed)


def _group(systems: Sequence[System], statistics: Sequence[Statistics], records: np.ndarray, name: str,
           classes: list[str], chosen: Sequence[str], resamples: int, seed: int) -> Iterator[Row]:
    counted = [metrics.given_and_true(one.sums()[0], len(classes)) for one in statistics]
    shown = [label for k, label in enumerate(classes) if any(given[k] or true[k] for given, true in counted)]
    for place, (system, own) in enumerate(zip(systems, statistics)):
        scores = {key: score for key, score in system.counts.scores(classes).items()
                  if _wanted(key[0], chosen) and (key[1] is None or key[1] in shown)}
        hits = {key: column for key, column in system.counts.hits().items() if key in scores}
        between = intervals(own, scores, resamples, seed)
        apart = compare(statistics[0], own, scores, hits, resamples, seed) if place else {}
        sums = own.sums()
        figures = [Figure(*key, _value(score(sums)), *(between[key] or (None, None)), apart.get(key))
                   for key, score in scores.items()]
        given, true = counted[place]
        yield Row(system, name, len(records), int(np.array(system.empty)[records].sum()), shown, figures,
                  system.counts.confusion(records, shown) if "confusion" in chosen else None,
                  system.counts.majority(records),
                  [label for k, label in enumerate(classes) if true[k] and not given[k]],
                  [label for k, label in enumerate(classes) if given[k] and not true[k]])


def _wanted(name: str, chosen: Sequence[str]) -> bool:
    return name in chosen or any(name.startswith(f"{one}_") for one in chosen)


def _value(found: np.ndarray) -> float | None:
    return None if np.isnan(found[0]) else float(found[0])
