"""Groups of like length: everything once, nothing wasted, results in the order of the input."""

import doctest
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcli.inference import ordering
from lmcli.inference.ordering import batch_tokens, grouped_by_length, in_order, pad

lengths = st.lists(st.integers(0, 60), max_size=60)


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(ordering)
    assert found.attempted and not found.failed


@given(lengths, st.integers(1, 200))
def test_every_index_once_within_the_cost(lengths, most):
    groups = list(grouped_by_length(lengths, most))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    for group, following in pairwise(groups):  # no group ends before it is full
        assert max(lengths[i] for i in group) * (len(group) + 1) > most
        assert min(lengths[i] for i in group) >= max(lengths[i] for i in following)


@given(lengths, st.integers(1, 200))
def test_results_come_in_the_order_of_the_input(lengths, most):
    assert in_order(lengths, most, lambda group: [(i, lengths[i]) for i in group]) == list(enumerate(lengths))


def test_work_that_loses_a_result_is_no_success():
    with pytest.raises(ValueError, match="zip"):
        in_order([1, 1], 10, lambda group: group[:1])


@pytest.mark.parametrize(("left", "ids", "mask"), [
    (True, [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]), (False, [[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])])
def test_padding_by_hand(left, ids, mask):
    found, real = pad([[1, 2, 3], [4]], 9, left, torch.device("cpu"))
    assert (found.tolist(), real.tolist()) == (ids, mask)


def test_rows_of_one_length_need_no_mask():
    found, real = pad([[1, 2], [3, 4]], 9, True, torch.device("cpu"))
    assert (found.tolist(), real) == ([[1, 2], [3, 4]], None)


def test_tokens_of_a_batch_are_as_asked():
    assert batch_tokens(torch.device("cpu"), 77) == 77
    assert batch_tokens(torch.device("cuda")) > batch_tokens(torch.device("cpu")) > 0
