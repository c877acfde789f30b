"""Figures of answers: by what the best ones are told."""

from lmcli.training.span_evaluation import SpanFigures


def test_the_best_figures_are_told_by_loss_or_by_f1():
    figures = SpanFigures("position", logprob=-6.0, targets=4, questions=2, f1=1.5)
    assert figures.criterion == figures.loss == 1.5
    figures.by = "accuracy"
    assert figures.criterion == 0.25 and figures.metrics()["val_loss"] == 1.5
