"""Padding of a batch; the key–value cache is tested in tests/generation."""

import pytest
import torch

from lmcli.model.cached_forward import pad


@pytest.mark.parametrize(
    ("left", "ids", "mask"),
    [
        (True, [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]),
        (False, [[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_padding_by_hand(left, ids, mask):
    padded, padded_mask = pad([[1, 2, 3], [4]], 9, left, torch.device("cpu"))
    assert (padded.tolist(), padded_mask.tolist()) == (ids, mask)


def test_rows_of_one_length_need_no_mask():
    padded, padded_mask = pad([[1, 2], [3, 4]], 9, True, torch.device("cpu"))
    assert (padded.tolist(), padded_mask) == ([[1, 2], [3, 4]], None)
