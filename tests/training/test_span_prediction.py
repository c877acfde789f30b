"""The figures of question answering: what selects the best model."""

from lmcli.training.span_prediction import SpanFigures


def test_the_criterion_is_loss_or_f1():
    figures = SpanFigures("position", logprob=-6.0, targets=4, questions=2, f1=1.5)
    assert figures.criterion == figures.loss == 1.5
    figures.metric = "accuracy"
    assert figures.criterion == 0.25 and figures.metrics()["val_loss"] == 1.5
