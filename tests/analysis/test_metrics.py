"""Figures of labels by hand; what is undefined; texts whose library is missing."""

import sys

import numpy as np
import pytest

from lmcli.analysis import metrics, text_metrics
from lmcli.analysis.metrics import label_row, label_scores
from lmcli.errors import UserError

CLASSES = ("a", "b", "c")


def figures(pairs: list[tuple[str, str]], several: bool = False) -> dict:
    """{(figure, class): value} of pairs of labels that are right and that were given, each letter one."""
    places = {label: k for k, label in enumerate(CLASSES)}
    sums = sum(label_row(frozenset(right), frozenset(given), places) for right, given in pairs)[None]
    return {key: float(score(sums)[0]) for key, score in label_scores(CLASSES, several).items()}


def test_figures_of_labels_by_hand():
    found = figures([("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")])
    assert found["accuracy", None] == 0.75
    assert (found["precision", "a"], found["recall", "a"]) == (1, 0.5) and found["f1", "a"] == pytest.approx(2 / 3)
    assert found["precision", "b"] == pytest.approx(2 / 3) and found["recall", "b"] == 1 and found["f1", "b"] == 0.8
    assert found["f1_macro", None] == pytest.approx((2 / 3 + 0.8) / 2)  # c does not occur
    assert found["precision_micro", None] == found["recall_micro", None] == found["f1_micro", None] == 0.75
    # covariances by hand: (3·4 − (1·2 + 3·2)) / √((16 − 10)(16 − 8))
    assert found["mcc", None] == pytest.approx(4 / np.sqrt(48))


def test_what_is_undefined_is_no_number_and_counts_as_nothing_in_an_average():
    found = figures([("a", "b"), ("b", "b")])  # a is never given, c neither right nor given
    assert np.isnan(found["precision", "a"]) and found["recall", "a"] == found["f1", "a"] == 0
    assert found["precision_macro", None] == 0.25
    assert all(np.isnan(found[name, "c"]) for name in ("precision", "recall", "f1"))
    assert np.isnan(found["mcc", None])  # one class alone was given
    found = figures([("a", "c")])
    assert np.isnan(found["recall", "c"]) and found["recall_macro", None] == 0


def test_a_record_that_got_nothing_is_wrong_and_takes_no_ones_precision():
    found = figures([("a", "a"), ("b", ""), ("b", "b"), ("a", "b")])
    assert found["accuracy", None] == 0.5 and found["precision_micro", None] == pytest.approx(2 / 3)
    assert found["recall", "b"] == 0.5 and found["precision", "b"] == 0.5
    # nothing counts as a class of its own: (2·4 − (1·2 + 2·2)) / √((16 − 1 − 4 − 1)(16 − 8))
    assert found["mcc", None] == pytest.approx(2 / np.sqrt(80))


def test_sets_of_labels_by_hand():
    found = figures([("ab", "a"), ("c", "c"), ("", ""), ("a", "bc")], several=True)
    assert found["exact_set", None] == 0.5 and ("mcc", None) not in found and ("accuracy", None) not in found
    assert found["precision_micro", None] == pytest.approx(2 / 4) and found["recall_micro", None] == pytest.approx(2 / 4)


def test_the_confusion_matrix_has_a_last_column_for_nothing():
    assert metrics.confusion(["a", "a", "b"], ["b", None, "b"], ["a", "b"]) == [[0, 1, 1], [0, 1, 0]]


def test_bleu_and_chrf_of_a_copy_are_100_and_of_nothing_0():
    pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    texts = ["Ein Mann mit einem orangefarbenen Hut.", "Zwei Hunde laufen."]
    for metric in (text_metrics.bleu(), text_metrics.chrf()):
        (score,) = metric.scores.values()
        assert score(metric.rows([[text] for text in texts], texts).sum(0)[None])[0] == pytest.approx(100)
        assert score(metric.rows([[text] for text in texts], ["", ""]).sum(0)[None])[0] == 0


def test_the_rate_of_pairs_leaves_out_those_without_a_figure():
    metric = text_metrics.first_likelier()
    sums = metric.rows([()] * 4, ["true", "false", "", "true"]).sum(0)[None]
    assert metric.scores["first_likelier"](sums)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("figure, module", [("bleu", "sacrebleu.metrics"), ("rouge1", "rouge_score.rouge_scorer")])
def test_a_library_that_is_missing_is_named_with_its_extra(figure, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="not installed") as error:
        text_metrics.chosen([figure], "13a", False, 1)
    assert "pip install 'lmcli[eval]'" in error.value.hint and module.split(".")[0] in error.value.what
