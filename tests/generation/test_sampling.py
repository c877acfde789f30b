"""Sampling filters against transformers' processors, and draws against their probabilities."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmcli.config import GenerateConfig
from lmcli.generation import sampling
from lmcli.generation.constraints import Constraints, penalize_repetition, sequence_state

# distinct multiples of 1/64: ties and rounding at a border are tested below, by hand
rows = st.lists(st.integers(-640, 640), min_size=1, max_size=40, unique=True).map(
    lambda values: torch.tensor([values], dtype=torch.float32) / 64
)
probability = st.floats(0.0, 1.0)


def filtered(logits: torch.Tensor, config: GenerateConfig, seen: torch.Tensor) -> torch.Tensor:
    """What a decoder draws from, (1, V): rules, then filters; `seen` (1, n) is the text."""
    state = sequence_state(seen.tolist(), [[]], [20])
    rules = Constraints(config, [], logits.shape[1])
    scores = rules.apply(logits.numpy(), state)
    results = np.full_like(scores, sampling.FORBIDDEN)
    ids, results_of_ids = sampling.apply_filters(scores[0], config)
    results[0, ids] = results_of_ids
    return torch.from_numpy(results)


def kept(keeps, logits: torch.Tensor, value: float) -> torch.Tensor:
    """Logits (1, V) after one filter."""
    keep = torch.from_numpy(keeps(logits[0].numpy(), value))
    return logits.masked_fill(~keep, sampling.FORBIDDEN)


def drawn(logits: torch.Tensor, uniform: float) -> int:
    return sampling.draw(logits.numpy(), uniform)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(logits == sampling.FORBIDDEN, expected == sampling.FORBIDDEN)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=0)


def near_the_border(logits: torch.Tensor, p: float) -> bool:
    """True if a cumulative probability is so close to p that rounding decides."""
    sums = logits.double().sort(descending=True).values.softmax(-1).cumsum(-1)
    return bool((sums - p).abs().min() < 1e-5)


@given(rows, st.integers(1, 50))
def test_top_k(logits, k):
    assert_same(kept(sampling.keep_top_k, logits, k), TopKLogitsWarper(k)(None, logits))


@given(rows, probability)
def test_top_p(logits, p):
    assume(not near_the_border(logits, p))
    assert_same(kept(sampling.keep_top_p, logits, p), TopPLogitsWarper(p)(None, logits))


@given(rows, probability)
def test_min_p(logits, p):
    probabilities = logits.double().softmax(-1)
    assume((probabilities - p * probabilities.max()).abs().min() > 1e-6 * probabilities.max())
    assert_same(kept(sampling.keep_min_p, logits, p), MinPLogitsWarper(p)(None, logits))


@given(rows, st.floats(0.01, 100.0), st.data())
def test_repetition_penalty(logits, penalty, data):
    size = logits.shape[-1]
    seen = torch.tensor(
        [data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=2 * size))]
    )
    penalized = logits.clone()
    penalize_repetition(penalized.numpy(), seen.numpy(), penalty)
    assert_same(penalized, RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()))


@given(rows, st.floats(0.05, 5.0))
def test_temperature(logits, temperature):
    config = GenerateConfig(temperature=temperature, top_p=1.0)
    assert_same(
        filtered(logits, config, torch.tensor([[0]])),
        TemperatureLogitsWarper(temperature)(None, logits),
    )


@settings(max_examples=200)
@given(
    rows,
    st.floats(0.2, 3.0),
    st.integers(0, 10),
    probability,
    st.floats(0.0, 0.5),
    st.floats(0.5, 2.0),
)
def test_all_filters_in_the_order_of_transformers(logits, temperature, k, p, min_p, penalty):
    config = GenerateConfig(
        temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty
    )
    seen = torch.tensor([[0]])
    expected, steps = (
        logits.clone(),
        LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
        ),
    )
    expected = steps(seen, expected)
    assume(all(len(row.unique()) == len(row) for row in expected))  # the order of ties is undefined
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    assume(not near_the_border(expected, p))
    probabilities = expected.double().softmax(-1)
    expected = TopPLogitsWarper(p)(None, expected) if p < 1 else expected
    assume((probabilities - min_p * probabilities.max()).abs().min() > 1e-6)
    assert_same(filtered(logits, config, seen), MinPLogitsWarper(min_p)(None, expected))


def test_the_order_is_the_one_that_generate_of_transformers_uses():
    """Each order of these filters keeps other tokens; transformers builds the list itself."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    options = {
        "temperature": 0.7,
        "top_k": 4,
        "top_p": 0.8,
        "min_p": 0.3,
        "repetition_penalty": 1.5,
    }
    theirs = GenerationConfig(do_sample=True, **options)
    model._prepare_special_tokens(theirs)
    processors = model._get_logits_processor(generation_config=theirs, input_ids_seq_length=1)
    generator = torch.Generator().manual_seed(1)
    sizes = set()
    for _ in range(200):
        logits, seen = (
            2 * torch.randn(1, 8, generator=generator),
            torch.randint(0, 8, (1, 2), generator=generator),
        )
        results = filtered(logits, GenerateConfig(**options), seen)
        assert_same(results, processors(seen, logits.clone()))
        sizes.add(int(results.isfinite().sum()))
    assert len(sizes) > 2


@pytest.mark.parametrize(
    ("keeps", "value", "count"),
    [
        # probabilities 1/2, 1/4, 1/8, 1/8
        (sampling.keep_top_p, 0.0, 1),
        (sampling.keep_top_p, 0.5, 1),
        (sampling.keep_top_p, 0.51, 2),
        (sampling.keep_top_p, 0.75, 2),
        (sampling.keep_top_p, 0.8, 3),
        (sampling.keep_top_p, 0.9, 4),
        (sampling.keep_min_p, 0.0, 4),
        (sampling.keep_min_p, 0.25, 4),
        (sampling.keep_min_p, 0.26, 2),
        (sampling.keep_min_p, 0.51, 1),
        (sampling.keep_min_p, 1.0, 1),
        (sampling.keep_top_k, 1, 1),
        (sampling.keep_top_k, 2, 2),
        (sampling.keep_top_k, 3, 4),  # a tie at the border stays
        (sampling.keep_top_k, 9, 4),
    ],
)
def test_filters_by_hand(keeps, value, count):
    logits = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log2() * math.log(2)
    assert kept(keeps, logits, value).isfinite().tolist() == [[i < count for i in range(4)]]


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("p", [0.3, 0.97, 1.0 - 1e-6])
def test_top_p_of_a_large_vocabulary_with_ties(scale, p):
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1))
    logits = (64 * logits).round() / 64 * scale
    order = logits.double()[0].sort(descending=True, stable=True)
    before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
    count = int(kept(sampling.keep_top_p, logits, p).isfinite().sum())
    assert abs(count - int((before < p).sum())) <= 1
    keep = kept(sampling.keep_top_p, logits, p)[0].isfinite().nonzero()[:, 0]
    assert keep.tolist() == order.indices[:count].sort().values.tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest(temperature):
    config, logits = GenerateConfig(temperature=temperature), np.array([3, 50, 2], np.float32)
    choices = [sampling.choose(logits, config, random.Random(seed)) for seed in range(20)]
    assert choices == [1] * 20


def test_temperature_0_takes_the_likeliest_that_is_allowed():
    greedy = GenerateConfig(temperature=0.0)
    assert sampling.choose(np.array([1, 3, 2], np.float32), greedy, random.Random(0)) == 1
    forbidden = np.full(3, -np.inf, np.float32)
    for config in (greedy, GenerateConfig()):
        assert sampling.choose(forbidden, config, random.Random(0)) is None


def test_the_draw_by_hand():
    # cumulative sums 0, 1/4, 1/4, 3/4, 1, 1
    logits = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0]).log()
    for uniform, expected in [
        (0.0, 1),
        (0.1, 1),
        (0.2499, 1),
        (0.2501, 3),
        (0.5, 3),
        (0.7499, 3),
        (0.7501, 4),
        (0.99, 4),
    ]:
        assert drawn(logits, uniform) == expected, uniform


@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-50, 50)), min_size=1, max_size=30).filter(
        lambda row: max(row) > -math.inf
    ),
    st.one_of(st.just(0.0), st.just(math.nextafter(1.0, 0.0)), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_of_probability_0_is_never_drawn(row, uniform):
    logits = torch.tensor(row)
    assert logits.double().softmax(-1)[drawn(logits, uniform)] > 0


def test_frequencies_follow_the_probabilities():
    generator = np.random.default_rng(1)
    logits, draws = generator.standard_normal(12).astype(np.float32), 20_000
    logits[5] = -np.inf
    counts = np.bincount(
        [sampling.draw(logits, uniform) for uniform in generator.random(draws)], minlength=12
    )
    expected = draws * np.exp(logits) / np.exp(logits).sum()
    assert counts[5] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 29.6  # ten degrees of freedom: 1 in 1,000 is larger


def test_log_sum_exp():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 10
    expected = logits.double().logsumexp(-1)
    results = torch.from_numpy(sampling.log_sum_exp(logits.numpy()))
    assert (results - expected).abs().max() < 1e-6
    nan, inf = float("nan"), float("inf")
    broken = np.array([[0, nan], [inf, 0], [-inf, -inf]], np.float32)
    assert not np.isfinite(sampling.log_sum_exp(broken)).any()
