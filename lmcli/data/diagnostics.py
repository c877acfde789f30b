"""Remarks on examples before training: duplicates, overlap with validation, label balance."""

from collections.abc import Iterator

import numpy as np

from lmcli.data.examples import Examples, Texts

LISTED_LABELS = 10
FEW = 5  # a label with fewer examples is named


def findings(training: Examples, validation: Examples, labels: tuple[str, ...]) -> Iterator[str]:
    """Sentences about the examples, each with its count; the share of every label."""
    inputs, validation_inputs = _input_hashes(training), _input_hashes(validation)
    if training.labels is not None:
        targets = _hashes(training.labels)
    else:
        targets = _hashes(training.targets) if training.targets else np.zeros(0, dtype=np.int64)
    examples = _combine(inputs, targets)
    distinct = len(np.unique(examples))
    if repeated := len(examples) - distinct:
        yield f"{repeated:,} of {len(examples):,} training examples are repeated word for word"
    if shared := int(np.isin(validation_inputs, inputs).sum()):
        yield (
            f"{shared:,} of {len(validation):,} validation examples have a source that is in the "
            "training set too: their figures say little about new text"
        )
    if training.labels is not None:
        if conflicts := distinct - len(np.unique(inputs)):
            yield f"{conflicts:,} training texts come with more than one label"
        yield from _balance(training.labels, labels)


def _input_hashes(examples: Examples) -> np.ndarray:
    """(N,) int64, equal for equal inputs: the source, or the text or pair of texts with a label."""
    sources = _hashes(examples.sources)
    if examples.labels is None or examples.targets is None:
        return sources
    return _combine(sources, _hashes(examples.targets))


def _hashes(rows: Texts | np.ndarray) -> np.ndarray:
    """(N,) int64, equal for equal texts or labels."""
    values = (hash(rows[i].tobytes()) for i in range(len(rows)))
    return np.fromiter(values, dtype=np.int64, count=len(rows))


def _combine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) int64, equal where both hashes are."""
    return first * np.int64(1_000_003) ^ second


def _balance(indices: np.ndarray, labels: tuple[str, ...]) -> Iterator[str]:
    """The share of each label, and the labels with few examples."""
    if indices.ndim == 2:  # multi-label
        counts = indices.sum(0).astype(np.int64)
    else:
        counts = np.bincount(indices, minlength=len(labels))
    order = np.argsort(-counts, kind="stable")
    total = max(1, len(indices))
    shares = [f"{labels[i]} {counts[i] / total:.1%}" for i in order]
    yield f"{len(labels)} labels: {_listed(shares)}"
    if few := [f"{labels[i]} ({counts[i]})" for i in order[::-1] if counts[i] < FEW]:
        yield f"{'labels' if len(few) > 1 else 'a label'} with few examples: {_listed(few)}"


def _listed(items: list[str]) -> str:
    return ", ".join(items[:LISTED_LABELS]) + (", …" if len(items) > LISTED_LABELS else "")
