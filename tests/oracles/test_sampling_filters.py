"""Sampling filters against transformers, and draws against their probabilities."""

import pytest
import torch

from lmcli.config import GenerateConfig
from lmcli.generation import sampling
from lmcli.generation.constraints import Constraints, sequence_state

processors = pytest.importorskip("transformers.generation.logits_process")


@pytest.fixture(params=range(4))
def logits(request):
    return 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(request.param))


@pytest.mark.parametrize("value", [1, 3, 49, 50, 80])
def test_top_k(logits, value):
    expected = processors.TopKLogitsWarper(value)(None, logits)
    assert torch.equal(sampling.apply_top_k(logits, value), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_top_p(logits, value):
    expected = processors.TopPLogitsWarper(value)(None, logits)
    assert torch.equal(sampling.apply_top_p(logits, value), expected)


@pytest.mark.parametrize("value", [0.01, 0.1, 0.9, 1.0])
def test_min_p(logits, value):
    expected = processors.MinPLogitsWarper(value)(None, logits)
    assert torch.equal(sampling.apply_min_p(logits, value), expected)


@pytest.mark.parametrize("value", [0.5, 1.2, 3.0])
def test_repetition_penalty(logits, value):
    seen = torch.tensor([[1, 2, 2], [0, 49, 0], [7, 8, 9]])
    expected = processors.RepetitionPenaltyLogitsProcessor(value)(seen, logits)
    torch.testing.assert_close(sampling.apply_repetition_penalty(logits, seen, value), expected)


def test_all_filters_in_transformers_order(logits):
    seen = torch.tensor([[1, 2, 3]] * 3)
    config = GenerateConfig(
        temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3
    )
    steps = [
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.8),
        processors.MinPLogitsWarper(0.05),
    ]
    expected = logits
    for step in steps:
        expected = step(seen, expected)
    state = sequence_state(seen.tolist(), [[]] * 3, [9] * 3, logits.device)
    penalized = Constraints(config, [], 50, logits.device).apply(logits, state)
    torch.testing.assert_close(sampling.apply_filters(penalized, config), expected)


def test_the_draw_is_the_inverse_of_the_cumulative_sum():
    logits = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-12], dtype=torch.float64)
    assert sampling.draw(logits, uniform).tolist() == [1, 1, 2, 2, 4, 4]


def test_frequencies_follow_the_probabilities():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = sampling.draw(logits.expand(40_000, 12), uniform).bincount(minlength=12).double()
    expected = 40_000 * logits.double().softmax(-1)
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 31.3  # chi-square, 11 degrees of freedom, p = 0.001
