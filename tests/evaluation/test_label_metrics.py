"""Metrics of labels by hand, undefined values, and metrics whose library is missing."""

import sys
import time
import tracemalloc

import numpy as np
import pytest

from lmcli.errors import UserError
from lmcli.evaluation import text_metrics
from lmcli.evaluation.intervals import wilson_interval
from lmcli.evaluation.label_metrics import build_label_metrics, class_figures, label_rows
from lmcli.evaluation.systems import LabelCounts, System, evaluate_systems

CLASSES = ("a", "b", "c")


def figures(pairs: list[tuple[str, str]], multi_label: bool = False) -> dict:
    """{(metric, class): value} of pairs (true, predicted); each letter is a label."""
    class_index = {label: k for k, label in enumerate(CLASSES)}
    labels = [(frozenset(true), frozenset(predicted)) for true, predicted in pairs]
    sums = label_rows(labels, class_index).weighted(np.ones((1, len(pairs))))
    values = {
        key: float(metric(sums)[0]) for key, metric in build_label_metrics(multi_label).items()
    }
    of_classes = class_figures(sums)
    return values | {
        (name, label): float(figure.value[k])
        for name, figure in of_classes.items()
        for k, label in enumerate(CLASSES)
    }


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


def test_confusions_are_in_the_order_of_classes_and_no_prediction_is_last():
    counts = LabelCounts(False)
    counts.add([["b"], ["a"], ["a"], ["b"]], [["b"], [], ["b"], ["b"]])
    assert list(counts.confusion(np.arange(4), ["a", "b"]).items()) == [
        (("a", "b"), 1),
        (("a", None), 1),
        (("b", "b"), 2),
    ]


def test_intervals_of_classes_are_wilsons():
    labels = [(frozenset("a"), frozenset("a"))] * 20 + [(frozenset("b"), frozenset("a"))] * 5
    rows = label_rows(labels, {"a": 0, "b": 1})
    of_classes = class_figures(rows.weighted(np.ones((1, 25))))
    known = {"precision": wilson_interval(20, 25), "recall": wilson_interval(20, 20)}
    for name, interval in known.items():
        assert (of_classes[name].low[0], of_classes[name].high[0]) == pytest.approx(interval)
    # F1 40/45; of the 25 records that are a or called a, 20 are both
    low, high = wilson_interval(20, 25)
    assert of_classes["f1"].value[0] == pytest.approx(40 / 45)
    assert (of_classes["f1"].low[0], of_classes["f1"].high[0]) == pytest.approx(
        (2 * low / (1 + low), 2 * high / (1 + high))
    )
    assert np.isnan(of_classes["precision"].low[1]) and of_classes["recall"].low[1] == 0


def test_memory_and_time_grow_with_records_and_labels_not_with_their_square():
    size = 5_000
    counts = LabelCounts(False)
    names = [f"label {k}" for k in range(size)]
    counts.add([[name] for name in names], [[names[k // 2 * 2]] for k in range(size)])
    tracemalloc.start()
    started = time.process_time()
    (result,) = evaluate_systems(
        [System("it", counts, [False] * size)], (), ("accuracy", "f1", "recall", "confusion"), 5, 0
    )
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a matrix of records and labels takes 600 MB, and with 20,000 of each 9.6 GB
    assert peak < 100e6 and seconds < 20
    values = {(value.name, value.label): value.value for value in result.values}
    assert values["accuracy", None] == 0.5 and len(result.confusion) == size
    # of each pair of labels one has recall 1 and precision 1/2, the other has neither
    assert values["f1_macro", None] == pytest.approx(1 / 3)
    assert (values["recall", names[0]], values["recall", names[1]]) == (1, 0)
    assert values["f1", names[0]] == pytest.approx(2 / 3)


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
