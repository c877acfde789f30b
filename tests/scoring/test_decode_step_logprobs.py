"""Scores by the decoder in C are the log-probabilities with which it generates."""

import functools

import numpy as np
import pytest
import torch

from lmcli.kernels import build
from lmcli.kernels.decoding_state import fast_state
from lmcli.scoring.decode_step_logprobs import as_generated

pytestmark = pytest.mark.skipif(build.library() is None, reason=build.problem())
TYPES = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture
def scored(scorer, twin):
    """scored(ids, weight_type, **options): the log-probability of each token by the C decoder."""

    def score(ids, weight_type, **options):
        states = functools.partial(fast_state, twin[0], weight_type=weight_type)
        return as_generated(scorer(**options), states).token_logprobs([ids])[0]

    return score


@pytest.mark.parametrize("weight_type", TYPES)
def test_scores_are_the_logprobs_of_generated_tokens(weight_type, scored, decoder, twin):
    lm = decoder(twin[0], max_new_tokens=24, temperature=1.0)
    lm.decoding_state = functools.partial(fast_state, twin[0], weight_type=weight_type)
    prompt = [0, 5, 77, 300]
    (result,) = lm.generate([prompt], [3])
    logprobs = scored([*prompt[1:], *result.tokens], weight_type)
    np.testing.assert_allclose(logprobs[3:], result.token_logprobs, rtol=1e-5)


@pytest.mark.parametrize("bos", [(0,), ()])
def test_windows_are_those_of_lm_perplexity(bos, scored, scorer, twin):
    ids = torch.arange(5, 200).tolist()  # 195 tokens, a context of 32
    exact = scorer(bos, stride=12).token_logprobs([ids])[0]
    for weight_type, most in zip(TYPES, (1e-4, 0.1, 0.5, 4)):
        found = scored(ids, weight_type, bos=bos, stride=12)
        assert (np.isnan(found) == np.isnan(exact)).all() and np.isnan(exact).sum() == 1 - len(bos)
        error = np.nanmax(np.abs(found - exact))
        assert (0 if weight_type == "float32" else 1e-3) < error < most


def test_scores_in_float32_are_those_of_transformers(scored, twin):
    ids = [7, 300, 12, 12, 99, 250, 8]
    with torch.inference_mode():
        logprobs = twin[1](torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
    expected = logprobs[range(len(ids)), ids]
    np.testing.assert_allclose(scored(ids, "float32"), expected, atol=1e-4)


def test_long_windows_are_read_in_blocks(scored, scorer, small_model, small_tokenizer, twin):
    from lmcli.scoring.scorer import Scorer

    model = small_model(max_position_embeddings=512, vocab_size=small_tokenizer.size)
    ids, plain = (torch.arange(700) % 390 + 5).tolist(), Scorer(model, small_tokenizer, [0])
    exact = plain.token_logprobs([ids])[0]
    states = functools.partial(fast_state, model, weight_type="float32")
    found = as_generated(Scorer(model, small_tokenizer, [0]), states).token_logprobs([ids])[0]
    np.testing.assert_allclose(found, exact, atol=1e-3)
