"""Metrics of labels by hand, undefined values, and metrics whose library is missing."""

import sys

import numpy as np
import pytest

from lmcli.errors import UserError
from lmcli.evaluation import label_metrics, text_metrics
from lmcli.evaluation.label_metrics import build_label_metrics, label_counts

CLASSES = ("a", "b", "c")


def figures(pairs: list[tuple[str, str]], multi_label: bool = False) -> dict:
    """{(metric, class): value} of pairs (true, predicted); each letter is a label."""
    class_index = {label: k for k, label in enumerate(CLASSES)}
    counts = [
        label_counts(frozenset(true), frozenset(predicted), class_index)
        for true, predicted in pairs
    ]
    metrics, sums = build_label_metrics(CLASSES, multi_label), sum(counts)[None]
    return {key: float(metric(sums)[0]) for key, metric in metrics.items()}


def test_label_metrics_by_hand():
    values = figures([("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")])
    assert values["accuracy", None] == 0.75
    assert (values["precision", "a"], values["recall", "a"]) == (1, 0.5) and values[
        "f1", "a"
    ] == pytest.approx(2 / 3)
    assert (
        values["precision", "b"] == pytest.approx(2 / 3)
        and values["recall", "b"] == 1
        and values["f1", "b"] == 0.8
    )
    assert values["f1_macro", None] == pytest.approx((2 / 3 + 0.8) / 2)  # c does not occur
    assert (
        values["precision_micro", None]
        == values["recall_micro", None]
        == values["f1_micro", None]
        == 0.75
    )
    # covariances by hand: (3·4 − (1·2 + 3·2)) / √((16 − 10)(16 − 8))
    assert values["mcc", None] == pytest.approx(4 / np.sqrt(48))


def test_undefined_metrics_are_nan_and_count_as_0_in_averages():
    values = figures([("a", "b"), ("b", "b")])  # a is never predicted, c neither true nor predicted
    assert np.isnan(values["precision", "a"]) and values["recall", "a"] == values["f1", "a"] == 0
    assert values["precision_macro", None] == 0.25
    assert all(np.isnan(values[name, "c"]) for name in ("precision", "recall", "f1"))
    assert np.isnan(values["mcc", None])  # only one class was predicted
    values = figures([("a", "c")])
    assert np.isnan(values["recall", "c"]) and values["recall_macro", None] == 0


def test_a_record_without_a_prediction_is_wrong_but_lowers_no_precision():
    values = figures([("a", "a"), ("b", ""), ("b", "b"), ("a", "b")])
    assert values["accuracy", None] == 0.5 and values["precision_micro", None] == pytest.approx(
        2 / 3
    )
    assert values["recall", "b"] == 0.5 and values["precision", "b"] == 0.5
    # no prediction counts as a class of its own: (2·4 − (1·2 + 2·2)) / √((16 − 1 − 4 − 1)(16 − 8))
    assert values["mcc", None] == pytest.approx(2 / np.sqrt(80))


def test_multi_label_metrics_by_hand():
    values = figures([("ab", "a"), ("c", "c"), ("", ""), ("a", "bc")], multi_label=True)
    assert (
        values["exact_set", None] == 0.5
        and ("mcc", None) not in values
        and ("accuracy", None) not in values
    )
    assert values["precision_micro", None] == pytest.approx(2 / 4) and values[
        "recall_micro", None
    ] == pytest.approx(2 / 4)


def test_the_confusion_matrix_has_a_last_column_for_no_prediction():
    assert label_metrics.confusion_matrix(["a", "a", "b"], ["b", None, "b"], ["a", "b"]) == [
        [0, 1, 1],
        [0, 1, 0],
    ]


def test_bleu_and_chrf_are_100_for_a_copy_and_0_for_empty_texts():
    pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    texts = ["Ein Mann mit einem orangefarbenen Hut.", "Zwei Hunde laufen."]
    for metric in (text_metrics.bleu(), text_metrics.chrf()):
        (score,) = metric.figures.values()
        assert score(metric.rows([[text] for text in texts], texts).sum(0)[None])[
            0
        ] == pytest.approx(100)
        assert score(metric.rows([[text] for text in texts], ["", ""]).sum(0)[None])[0] == 0


def test_the_rate_of_pairs_ignores_pairs_without_a_figure():
    metric = text_metrics.first_likelier()
    sums = metric.rows([()] * 4, ["true", "false", "", "true"]).sum(0)[None]
    assert metric.figures["first_likelier"](sums)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "figure, module", [("bleu", "sacrebleu.metrics"), ("rouge1", "rouge_score.rouge_scorer")]
)
def test_a_missing_library_is_named_with_its_extra(figure, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="not installed") as error:
        text_metrics.select_text_metrics([figure], "13a", False, 1)
    assert (
        "pip install 'lmcli[eval]'" in error.value.hint and module.split(".")[0] in error.value.what
    )
