"""Windows: each token is scored once, with context before it, in spans that fit the model."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmcli.text.windows as module
from lmcli.text.windows import windows


@st.composite
def settings_of_windows(draw):
    context = draw(st.integers(1, 40))
    return (
        draw(st.integers(0, 200)),
        context,
        draw(st.integers(1, context)),
        draw(st.booleans()),
        draw(st.just(0) | st.integers(0, 120)),
    )


@given(settings_of_windows())
def test_every_token_is_scored_exactly_once_in_order(case):
    tokens, _, _, has_bos, unscored = case
    scored = [token for window in windows(*case) for token in range(window.first, window.end)]
    assert scored == list(range(max(unscored, not has_bos), tokens))


@given(settings_of_windows())
def test_each_token_has_its_context_and_every_window_fits(case):
    """A model reads the bos token and all visible tokens but the last, which is only predicted."""
    _, context, stride, has_bos, _ = case
    for window in windows(*case):
        assert has_bos + (window.end - 1 - window.start) <= context
        assert window.start <= window.first < window.end
        read_before_first = has_bos + window.first - window.start
        assert window.start == 0 or read_before_first >= context - stride + 1
        assert window.first - window.start >= min(window.first, context - stride)


@given(settings_of_windows())
def test_there_are_no_more_windows_than_strides(case):
    tokens, context, stride, has_bos, unscored = case
    first = max(unscored, not has_bos)
    end = max(context if has_bos else context + 1, first + stride)
    expected = 0 if tokens <= first else 1 + max(0, -(-(tokens - end) // stride))
    assert len(list(windows(*case))) == expected


@pytest.mark.parametrize(
    "case, expected",
    [
        ((5, 8, 4, True), [(0, 0, 5)]),
        ((5, 8, 4, False), [(0, 1, 5)]),
        ((0, 8, 4, True), []),
        ((1, 8, 4, False), []),
        ((10, 4, 4, True), [(0, 0, 4), (4, 4, 8), (6, 8, 10)]),  # the last reaches back
        ((10, 4, 2, False), [(0, 1, 5), (2, 5, 7), (4, 7, 9), (5, 9, 10)]),
        ((10, 4, 2, True, 1), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        ((10, 4, 2, True, 7), [(5, 7, 9), (6, 9, 10)]),
        ((10, 4, 2, True, 10), []),
    ],
)
def test_windows_computed_by_hand(case, expected):
    assert [tuple(window) for window in windows(*case)] == expected


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(module) == (0, 2)
