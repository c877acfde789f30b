"""Packed rows: a position is all that resuming needs, and an epoch takes each token once."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.text.batches import PackedRows

BEGINNING = 60_000
cases = st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(0, 3), st.sampled_from([None, BEGINNING]))


def rows_of(case):
    tokens, context, seed, beginning = case
    return PackedRows(np.arange(tokens, dtype=np.uint16), context, beginning, seed)


@given(cases, st.data())
def test_a_position_determines_the_row(case, data):
    """In whatever order, by whatever object: as after a resume."""
    positions = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    straight = rows_of(case).batch(0, 31)
    other = rows_of(case)
    for position in positions:
        assert np.array_equal(other.batch(position, 1)[0], straight[position])
    assert np.array_equal(rows_of(case).batch(7, 5), straight[7:12])


@given(cases)
def test_rows_have_the_shape_and_begin_with_the_beginning(case):
    _, context, _, beginning = case
    batch = rows_of(case).batch(3, 4)
    assert batch.shape == (4, context + 1) and batch.dtype == np.int64
    if beginning is not None:
        assert (batch[:, 0] == beginning).all() and (batch[:, 1:] != beginning).all()


@given(cases)
def test_a_row_is_a_stretch_of_the_ring(case):
    tokens, _, _, beginning = case
    for row in rows_of(case).batch(0, 5):
        stretch = row if beginning is None else row[1:]
        assert (np.diff(stretch) % tokens == 1 % tokens).all()


@given(cases)
def test_an_epoch_predicts_no_token_twice_and_leaves_out_less_than_a_row(case):
    tokens, context, _, _ = case
    rows = rows_of(case)
    predicted = Counter(rows.batch(rows.rows_per_epoch, rows.rows_per_epoch)[:, 1:].flatten().tolist())
    if tokens >= context:
        assert max(predicted.values()) == 1 and tokens - len(predicted) < context
    else:
        assert rows.rows_per_epoch == 1


@pytest.mark.parametrize("beginning", [None, BEGINNING])
def test_epochs_and_seeds_differ(beginning):
    rows = PackedRows(np.arange(1000), 10, beginning, seed=1)
    first, second = rows.batch(0, 100), rows.batch(100, 100)
    other = PackedRows(np.arange(1000), 10, beginning, seed=2).batch(0, 100)
    for one, two in ((first, second), (first, other)):
        assert not np.array_equal(one, two)
        assert not np.array_equal(np.sort(one[:, 1] % 10), np.sort(two[:, 1] % 10))  # other cuts, not only another order


def test_rows_come_in_random_order():
    firsts = PackedRows(np.arange(1000), 10, None, seed=0).batch(0, 100)[:, 0]
    neighbours = sum((later - earlier) % 1000 in (10, 990) for earlier, later in pairwise(firsts))
    assert neighbours < 10  # of 99; two are expected


def test_the_array_is_left_as_it_is():
    ids = np.arange(50, dtype=np.uint16)
    ids.setflags(write=False)  # as a memory-mapped file
    PackedRows(ids, 8, 0, 0).batch(0, 20)
    assert ids.dtype == np.uint16 and ids.tolist() == list(range(50))
