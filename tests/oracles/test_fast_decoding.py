"""The decoder in C against the PyTorch path, for every family: logits step by step, rows alone."""

import copy
import random

import numpy as np
import pytest
import torch
from random_checkpoints import CASES, pair

from lmcli.checkpoints import folder as checkpoints
from lmcli.generation.sampling import log_sum_exp
from lmcli.kernels import build, fast_decoding
from lmcli.kernels.decoding_state import decoding_state, fast_state, supports, weights_of
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.model.cached_forward import DecodingState

pytestmark = pytest.mark.skipif(build.library() is None, reason=build.problem())
DECODERS = [case for case in CASES if case.shape != "encoder" and case.head == "lm"]
LENGTHS = (7, 3, 31, 1, 30, 30)


@pytest.fixture(autouse=True)
def more_than_one_block(monkeypatch):
    """The 102 tokens of all sequences are read in two blocks."""
    monkeypatch.setattr(fast_decoding, "TOKENS_AT_ONCE", 96)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """model_of(case): the model in float32, cached."""
    models = {}

    def get(case):
        if case not in models:
            models[case] = pair(case, tmp_path_factory.mktemp("case"), checkpoints.load).ours.eval()
        return models[case]

    return get


def inputs(model, seed=0):
    """(sequences, sources or None) of random ids."""
    generator = torch.Generator().manual_seed(seed)

    def rows(lengths):
        size = model.config.vocab_size
        return [torch.randint(3, size, (n,), generator=generator).tolist() for n in lengths]

    return rows(LENGTHS), rows((5, 9, 2, 4, 9, 9)) if model.encoder and model.decoder else None


def walk(state_of, model, dtype=torch.float32):
    """Logits of a prefill and 12 steps, in which sequences are dropped, repeated and reordered."""
    model = copy.deepcopy(model).to(dtype)
    state = state_of(model, *inputs(model), 40)
    logits, rows = [torch.from_numpy(state.logits)], len(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    for step in range(9):
        if step == 3:  # two sequences of one prompt, as beams
            state.keep(np.array([0, 0, 3, 3, 1]))
            rows = 5
        if step == 6:
            state.reorder(np.array([1, 1, 3, 2, 4]), 3)
        if step == 8:
            state.keep(np.array([4, 2]))
            rows = 2
        size = model.config.vocab_size
        state.add(torch.randint(3, size, (rows,), generator=generator).numpy())
        logits.append(torch.from_numpy(state.logits))
    return logits


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_logits_of_every_family_equal_the_pytorch_path(case, model_of, difference):
    model = model_of(case)
    assert supports(model)
    expected, results = walk(DecodingState, model), walk(fast_state, model)
    for step, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert difference(a, b) < 1e-5, f"step {step}"


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_greedy_texts_of_200_prompts_equal_the_pytorch_path(case, model_of):
    model, draw = model_of(case), random.Random(2)

    def rows():
        ids = range(3, model.config.vocab_size)
        return [draw.choices(ids, k=draw.randrange(1, 12)) for _ in range(200)]

    inputs = rows(), rows() if model.encoder else None
    fast, slow = (state(model, *inputs, 20) for state in (fast_state, DecodingState))
    for _ in range(8):
        tokens = fast.logits.argmax(1)
        assert np.array_equal(tokens, slow.logits.argmax(1))
        a, b = (state.logits - log_sum_exp(state.logits)[:, None] for state in (fast, slow))
        # T5's logits are in the hundreds: 1e-4 is a millionth there
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-4)
        fast.add(tokens)
        slow.add(tokens)


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_several_tokens_at_once_give_the_logits_of_each_to_the_bit(case, model_of):
    for dtype, weight_type in ((torch.float32, None), (torch.bfloat16, None), (None, "int8")):
        model = copy.deepcopy(model_of(case)).to(dtype or torch.bfloat16)
        sources = [[5, 9, 2]] if model.encoder else None
        one, several = (fast_state(model, [[4, 7, 9]], sources, 30, weight_type) for _ in "ab")
        for count, right in ((3, 1), (9, 9), (2, 2), (5, 3)):
            tokens = np.arange(count) + 3 * right
            ahead = several.look_ahead(tokens)
            several.accept(right)
            for token, logits in zip(tokens[:right], ahead):
                one.add(np.array([token]))
                assert np.array_equal(one.logits[0], logits)
            assert np.array_equal(several.logits, one.logits) and several.length == one.length


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_bfloat16_is_as_near_to_float32_as_the_pytorch_path(case, model_of, difference):
    model = model_of(case)
    exact = torch.cat([*walk(DecodingState, model)[:3]])
    torch_error, error = (
        difference(torch.cat([*walk(kind, model, torch.bfloat16)[:3]]), exact)
        for kind in (DecodingState, fast_state)
    )
    assert error < 1.25 * torch_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", {case.family: case for case in DECODERS}.values(), ids=str)
def test_a_row_does_not_depend_on_the_others_to_the_bit(case, dtype, model_of):
    model = copy.deepcopy(model_of(case)).to(dtype)
    sequences, sources = inputs(model)
    sources = sources and [sources[0]] * len(sequences)  # the encoder's bits depend on its batch
    tokens = np.arange(len(sequences)) + 3
    together = fast_state(model, sequences, sources, 40)
    first = together.logits
    together.add(tokens)
    for row, sequence in enumerate(sequences):
        alone = fast_state(model, [sequence], sources and [sources[row]], 40)
        assert np.array_equal(alone.logits[0], first[row])
        alone.add(tokens[row : row + 1])
        assert np.array_equal(alone.logits[0], together.logits[row])


def test_two_states_of_a_model_do_not_disturb_each_other(small_model):
    model = small_model()
    first, second = (fast_state(model, [ids], None, 30) for ids in ([1, 2, 3], [9, 8]))
    for state in (first, second):
        state.add(np.array([5]))
    alone = fast_state(model, [[1, 2, 3]], None, 30)
    alone.add(np.array([5]))
    assert np.array_equal(first.logits, alone.logits)


def test_weights_that_change_are_seen(small_model):
    model = copy.deepcopy(small_model())
    before = weights_of(model)
    assert weights_of(model) is before
    with torch.no_grad():
        model.embedding.weight.mul_(1.5)
    assert weights_of(model) is not before
    slow, fast = (state(model, [[1, 2, 3]], None, 30) for state in (DecodingState, decoding_state))
    assert isinstance(fast, FastDecodingState)
    assert np.abs(fast.logits - slow.logits).max() < 1e-5


def test_other_precisions_and_encoders_keep_the_pytorch_path(small_model):
    assert not supports(copy.deepcopy(small_model()).half())
    assert not supports(small_model(shape="encoder"))
