"""Windows: each token scored once, with context before it, in spans the model can read."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmcli.text.windows as module
from lmcli.text.windows import windows


@st.composite
def settings_of_windows(draw):
    context = draw(st.integers(1, 40))
    return (draw(st.integers(0, 200)), context, draw(st.integers(1, context)), draw(st.booleans()),
            draw(st.just(0) | st.integers(0, 120)))


@given(settings_of_windows())
def test_every_token_is_scored_exactly_once_in_order(case):
    tokens, _, _, beginning, given = case
    scored = [token for window in windows(*case) for token in range(window.first, window.end)]
    assert scored == list(range(max(given, not beginning), tokens))


@given(settings_of_windows())
def test_each_has_its_context_and_no_window_is_too_large(case):
    """A model reads the beginning token and all in view but the last, which is only predicted."""
    _, context, stride, beginning, _ = case
    for window in windows(*case):
        assert beginning + (window.end - 1 - window.start) <= context
        assert window.start <= window.first < window.end
        read_before_first = beginning + window.first - window.start
        assert window.start == 0 or read_before_first >= context - stride + 1
        assert window.first - window.start >= min(window.first, context - stride)


@given(settings_of_windows())
def test_there_are_no_more_windows_than_strides(case):
    tokens, context, stride, beginning, given = case
    first = max(given, not beginning)
    end = max(context if beginning else context + 1, first + stride)
    expected = 0 if tokens <= first else 1 + max(0, -(-(tokens - end) // stride))
    assert len(list(windows(*case))) == expected


@pytest.mark.parametrize("case, expected", [
    ((5, 8, 4, True), [(0, 0, 5)]), ((5, 8, 4, False), [(0, 1, 5)]), ((0, 8, 4, True), []), ((1, 8, 4, False), []),
    ((10, 4, 4, True), [(0, 0, 4), (4, 4, 8), (6, 8, 10)]),  # the last is filled up from before
    ((10, 4, 2, False), [(0, 1, 5), (2, 5, 7), (4, 7, 9), (5, 9, 10)]),
    ((10, 4, 2, True, 1), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
    ((10, 4, 2, True, 7), [(5, 7, 9), (6, 9, 10)]), ((10, 4, 2, True, 10), [])])
def test_by_hand(case, expected):
    assert [tuple(window) for window in windows(*case)] == expected


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(module) == (0, 2)
