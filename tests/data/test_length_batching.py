"""Batches of similar length: every index once, full groups, results in input order."""

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.data import length_batching
from lmcli.data.length_batching import group_by_length, map_by_length, tokens_per_forward

lengths = st.lists(st.integers(0, 60), max_size=60)


def test_the_examples_in_the_docstrings():
    results = doctest.testmod(length_batching)
    assert results.attempted and not results.failed


@given(lengths, st.integers(1, 200))
def test_every_index_once_in_groups_within_the_limit(lengths, most):
    groups = list(group_by_length(lengths, most))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    for group, following in pairwise(groups):  # no group ends before it is full
        assert max(lengths[i] for i in group) * (len(group) + 1) > most
        assert min(lengths[i] for i in group) >= max(lengths[i] for i in following)


@given(lengths, st.integers(1, 200))
def test_results_come_in_input_order(lengths, most):
    assert map_by_length(lengths, most, lambda group: [(i, lengths[i]) for i in group]) == list(
        enumerate(lengths)
    )


def test_a_missing_result_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        map_by_length([1, 1], 10, lambda group: group[:1])


def test_tokens_per_forward_are_as_requested():
    assert tokens_per_forward("cpu", 77) == 77
    assert tokens_per_forward("cuda") > tokens_per_forward("cpu") > 0
