"""What is worth knowing of examples before anything is trained on them: doubles, overlaps, labels out of balance."""

from collections.abc import Iterator

import numpy as np

from lmcli.text.examples import Examples, Texts

LABELS_TOLD = 10
RARE = 5  # examples of a label, below which it is named


def findings(training: Examples, held_out: Examples, labels: tuple[str, ...]) -> Iterator[str]:
    """Sentences about what was found, each with its count; none where there is nothing to tell but the labels' shares."""
    sources, held = _given(training), _given(held_out)
    others = _digests(training.targets) if training.labels is None else _rows(training.labels)
    whole = _mixed(sources, others)
    distinct = len(np.unique(whole))
    if repeated := len(whole) - distinct:
        yield f"{repeated:,} of {len(whole):,} training examples are repeated word for word"
    if shared := int(np.isin(held, sources).sum()):
        yield (f"{shared:,} of {len(held):,} validation examples have a source that is in the training part too: figures on "
               "them say little about new text")
    if labels:
        if doubtful := distinct - len(np.unique(sources)):
            yield f"{doubtful:,} training texts come with more than one label"
        yield from _balance(training.labels, labels)


def _given(examples: Examples) -> np.ndarray:
    """(N,) int64, equal for examples of which the same is given: the source, or the text or pair of texts with a label."""
    sources = _digests(examples.sources)
    return sources if examples.labels is None or not examples.targets else _mixed(sources, _digests(examples.targets))


def _digests(texts: Texts) -> np.ndarray:
    """(N,) int64, equal for equal texts."""
    return np.fromiter((hash(texts[i].tobytes()) for i in range(len(texts))), dtype=np.int64, count=len(texts))


def _rows(labels: np.ndarray) -> np.ndarray:
    """(N,) int64, equal for equal labels."""
    return np.fromiter((hash(label.tobytes()) for label in labels), dtype=np.int64, count=len(labels))


def _mixed(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) int64, equal where both are."""
    return digests * np.int64(1_000_003) ^ others


def _balance(numbers: np.ndarray, labels: tuple[str, ...]) -> Iterator[str]:
    counts = numbers.sum(0).astype(np.int64) if numbers.ndim == 2 else np.bincount(numbers, minlength=len(labels))
    order = np.argsort(-counts, kind="stable")
    told = ", ".join(f"{labels[i]} {counts[i] / max(1, len(numbers)):.1%}" for i in order[:LABELS_TOLD])
    yield f"{len(labels)} labels: {told}{', …' if len(labels) > LABELS_TOLD else ''}"
    if rare := [f"{labels[i]} ({counts[i]})" for i in order[::-1] if counts[i] < RARE]:
        yield (f"{'labels' if len(rare) > 1 else 'a label'} with hardly an example to learn from: "
               f"{', '.join(rare[:LABELS_TOLD])}{', …' if len(rare) > LABELS_TOLD else ''}")
