"""SQuAD's exact match and F1, on cases worked out by hand."""

import pytest

from lmcli.text.answers import exact_match, normalized, token_f1


@pytest.mark.parametrize(("text", "plain"), [
    ("The V&A, London", "va london"), ("an  Answer.", "answer"), ("theatre a", "theatre"),
    ("«Zürich»", "«zürich»"), ("the", "")])
def test_normalized_drops_case_punctuation_articles_and_space(text, plain):
    assert normalized(text) == plain


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), [
    ("the brown fox", ["a quick brown fox"], 0.0, 0.8),
    ("London", ["Paris", "london."], 1.0, 1.0),
    ("in in London", ["London in"], 0.0, 0.8),  # a word counts as often as both have it
    ("Rome", ["Paris"], 0.0, 0.0),
    (None, [], 1.0, 1.0), ("", [], 1.0, 1.0), ("Rome", [], 0.0, 0.0), (None, ["Rome"], 0.0, 0.0),
    ("Rome", ["the", "Rome"], 1.0, 1.0), ("the", ["the"], 1.0, 1.0)])
def test_the_best_of_the_right_answers_counts(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert token_f1(prediction, answers) == pytest.approx(f1)


def test_the_rules_of_both_versions():
    answers = ["the"]  # without a word when normalized
    assert (exact_match("a", answers, 1), token_f1("a", answers, 1)) == (1, 0)
    assert (exact_match("a", answers, 2), token_f1("a", answers, 2)) == (1, 1)
    assert (exact_match("", [], 1), token_f1("", [], 1)) == (0, 0)
    assert (exact_match("", [], 2), token_f1("", [], 2)) == (1, 1)
