"""Sampling filters against transformers' processors, and draws against their probabilities."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmcli.config import GenerateConfig
from lmcli.generation import sampling
from lmcli.generation.constraints import Constraints, penalize_repetition, sequence_state
from lmcli.kernels import build

# distinct multiples of 1/64: ties and rounding at a border are tested below, by hand
rows = st.lists(st.integers(-640, 640), min_size=1, max_size=40, unique=True).map(
    lambda values: torch.tensor([values], dtype=torch.float32) / 64
)
probability = st.floats(0.0, 1.0)


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
    _, results = sampling.apply_filters(logits[0].numpy(), config)
    assert_same(torch.from_numpy(results)[None], TemperatureLogitsWarper(temperature)(None, logits))


IDS = st.lists(st.integers(0, 39), min_size=1, max_size=3)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.3, 3.0),
        "top_h": st.floats(0.05, 0.95),
        "top_k": st.integers(0, 41),
        "top_p": probability,
        "min_p": st.floats(0.0, 0.5),
        "typical_p": st.floats(0.05, 0.95),
        "epsilon_cutoff": st.floats(0.001, 0.2),
        "eta_cutoff": st.floats(0.001, 0.2),
        "repetition_penalty": st.floats(0.5, 2.0),
        "encoder_repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(0, 3),
        "encoder_no_repeat_ngram_size": st.integers(0, 3),
        "sequence_bias": st.lists(
            st.tuples(IDS, st.floats(-5, 5)).map(list), min_size=1, unique_by=lambda x: str(x[0])
        ),
        "bad_words_ids": st.lists(IDS, min_size=1),
        "min_new_tokens": st.integers(0, 5),
        "forced_bos_token_id": st.integers(30, 39),
        "forced_eos_token_id": st.integers(30, 39),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 3), st.floats(0.8, 1.5)),
        "suppress_tokens": st.lists(st.integers(0, 29), min_size=1),  # not what is forced
        "begin_suppress_tokens": IDS,
        "renormalize_logits": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def processors():
    """processors(settings, prompt): transformers' list, in the order that its generate() uses."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, **sizes))

    def build(values, prompt):
        config = GenerationConfig(
            do_sample=True, eos_token_id=[1, 2], max_length=len(prompt) + 6, **values
        )
        model._prepare_special_tokens(config)
        return model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt])
        )

    return build


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SETTINGS,
    st.integers(0, 1 << 30),
    st.lists(st.integers(0, 39), min_size=1, max_size=12),
    st.lists(st.integers(0, 39), max_size=5),
)
def test_every_rule_and_filter_in_the_order_of_transformers(
    processors, values, seed, prompt, tokens
):
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    seen = torch.tensor([[*prompt, *tokens]])
    theirs = processors(values, prompt)
    expected = theirs(seen, logits.clone())
    exact = theirs(seen, logits.double())
    kept = expected.isfinite()
    assume(torch.equal(kept, exact.isfinite()))  # else rounding decides at a border
    config = GenerateConfig(**{"temperature": 1.0, "top_p": 1.0, "top_k": 50, **frozen(values)})
    state = sequence_state([prompt], [tokens], [6])
    allowed = Constraints(config, [1, 2], 40).apply(logits.numpy(), state)
    ids, results = sampling.apply_filters(allowed[0], config)
    assert ids.tolist() == kept[0].nonzero()[:, 0].tolist()
    if len(ids):
        difference = torch.from_numpy(results).double().softmax(-1) - exact[0, ids].softmax(-1)
        assert difference.abs().max() < 1e-6


def frozen(value):
    """The value with tuples in place of lists, as `check` makes them."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


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


@pytest.mark.parametrize("by_kernel", [False, True])
def test_log_sum_exp(monkeypatch, by_kernel):
    if by_kernel and build.library() is None:
        pytest.skip(build.problem())
    monkeypatch.setattr(build, "is_loaded", lambda: by_kernel)
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 10
    expected = logits.double().logsumexp(-1)
    results = torch.from_numpy(sampling.log_sum_exp(logits.numpy()))
    assert (results - expected).abs().max() < 1e-6
    assert sampling.log_sum_exp(np.float32([[1e30, -1e30, 0]])) == [np.float32(1e30)]
    nan, inf = float("nan"), float("inf")
    broken = np.array([[0, nan], [inf, 0], [-inf, -inf]], np.float32)
    assert not np.isfinite(sampling.log_sum_exp(broken)).any()


def test_presence_and_frequency_penalty_count_new_tokens_only():
    """OpenAI: logit − frequency · count − presence · (count > 0), over the generated tokens."""
    config = GenerateConfig(presence_penalty=0.5, frequency_penalty=0.25)
    state = sequence_state([[3, 3, 4], [7]], [[5, 5, 6, 5], [7]], [20, 20])
    scores = Constraints(config, [], 8).apply(np.zeros((2, 8), np.float32), state)
    assert scores.tolist() == [[0, 0, 0, 0, 0, -1.25, -0.75, 0], [0, 0, 0, 0, 0, 0, 0, -0.75]]
