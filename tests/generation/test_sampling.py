"""Sampling filters against transformers' processors, and draws against their probabilities."""

import math

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
from lmcli.generation.constraints import Constraints, sequence_state

# distinct multiples of 1/64: ties and rounding at a border are tested below, by hand
rows = st.lists(st.integers(-640, 640), min_size=1, max_size=40, unique=True).map(
    lambda values: torch.tensor([values], dtype=torch.float32) / 64
)
probability = st.floats(0.0, 1.0)


def filtered(logits: torch.Tensor, config: GenerateConfig, seen: torch.Tensor) -> torch.Tensor:
    """What a decoder draws from: rules, then filters; `seen` (B, n) is the text."""
    state = sequence_state(seen.tolist(), [[]] * len(seen), [20] * len(seen), logits.device)
    rules = Constraints(config, [], logits.shape[1], logits.device)
    return sampling.apply_filters(rules.apply(logits, state), config)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(logits == sampling.FORBIDDEN, expected == sampling.FORBIDDEN)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=0)


def near_the_border(logits: torch.Tensor, p: float) -> bool:
    """True if a cumulative probability is so close to p that rounding decides."""
    sums = logits.double().sort(descending=True).values.softmax(-1).cumsum(-1)
    return bool((sums - p).abs().min() < 1e-5)


@given(rows, st.integers(1, 50))
def test_top_k(logits, k):
    assert_same(sampling.apply_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@given(rows, probability)
def test_top_p(logits, p):
    assume(not near_the_border(logits, p))
    assert_same(sampling.apply_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@given(rows, probability)
def test_min_p(logits, p):
    probabilities = logits.double().softmax(-1)
    assume((probabilities - p * probabilities.max()).abs().min() > 1e-6 * probabilities.max())
    assert_same(sampling.apply_min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@given(rows, st.floats(0.01, 100.0), st.data())
def test_repetition_penalty(logits, penalty, data):
    size = logits.shape[-1]
    seen = torch.tensor(
        [data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=2 * size))]
    )
    before = logits.clone()
    assert_same(
        sampling.apply_repetition_penalty(logits, seen, penalty),
        RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()),
    )
    assert torch.equal(logits, before)


@given(rows, st.floats(0.05, 5.0))
def test_temperature(logits, temperature):
    config = GenerateConfig(temperature=temperature, top_p=1.0)
    assert_same(
        sampling.apply_filters(logits, config), TemperatureLogitsWarper(temperature)(None, logits)
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
    ("apply", "value", "count"),
    [
        # probabilities 1/2, 1/4, 1/8, 1/8
        (sampling.apply_top_p, 0.0, 1),
        (sampling.apply_top_p, 0.5, 1),
        (sampling.apply_top_p, 0.51, 2),
        (sampling.apply_top_p, 0.75, 2),
        (sampling.apply_top_p, 0.8, 3),
        (sampling.apply_top_p, 0.9, 4),
        (sampling.apply_min_p, 0.0, 4),
        (sampling.apply_min_p, 0.25, 4),
        (sampling.apply_min_p, 0.26, 2),
        (sampling.apply_min_p, 0.51, 1),
        (sampling.apply_min_p, 1.0, 1),
        (sampling.apply_top_k, 1, 1),
        (sampling.apply_top_k, 2, 2),
        (sampling.apply_top_k, 3, 4),  # a tie at the border stays
        (sampling.apply_top_k, 9, 4),
    ],
)
def test_filters_by_hand(apply, value, count):
    logits = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log2() * math.log(2)
    assert int(apply(logits, value).isfinite().sum()) == count


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest(temperature):
    logits = sampling.apply_filters(
        torch.tensor([[3.0, 50.0, 2.0]]), GenerateConfig(temperature=temperature)
    )
    assert [
        sampling.draw(logits, torch.tensor([uniform], dtype=torch.float64)).item()
        for uniform in (0, 0.9)
    ] == [1, 1]


def test_temperature_0_applies_the_penalty_but_no_filter():
    logits = torch.tensor([[2.0, 1.9]])
    config = GenerateConfig(temperature=0.0, top_k=1, repetition_penalty=2.0)
    assert filtered(logits, config, torch.tensor([[0]])).tolist() == [[1.0, pytest.approx(1.9)]]


def test_the_draw_by_hand():
    # cumulative sums 0, 1/4, 1/4, 3/4, 1, 1
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]]).log()
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
        assert sampling.draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [
            expected
        ], uniform


@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-50, 50)), min_size=1, max_size=30).filter(
        lambda row: max(row) > -math.inf
    ),
    st.one_of(st.just(0.0), st.just(math.nextafter(1.0, 0.0)), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_of_probability_0_is_never_drawn(row, uniform):
    logits = torch.tensor([row])
    index = sampling.draw(logits, torch.tensor([uniform], dtype=torch.float64)).item()
    assert logits.double().softmax(-1)[0, index] > 0


def test_frequencies_follow_the_probabilities():
    generator = torch.Generator().manual_seed(1)
    logits, draws = torch.randn(1, 12, generator=generator), 20_000
    logits[0, 5] = -math.inf
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    counts = sampling.draw(logits.expand(draws, -1), uniform).bincount(minlength=12).double()
    expected = draws * logits.double().softmax(-1)[0]
    assert counts[5] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 29.6  # ten degrees of freedom: 1 in 1,000 is larger


def test_the_draw_of_a_row_does_not_depend_on_other_rows():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 20, generator=generator)
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    together = sampling.draw(logits, uniform)
    alone = [sampling.draw(logits[i : i + 1], uniform[i : i + 1]).item() for i in range(50)]
    assert together.tolist() == alone
    assert len(set(alone)) > 5
