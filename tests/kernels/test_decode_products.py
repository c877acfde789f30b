"""decode_products.h: matrices in each type, and rows that do not depend on their neighbors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig, ModelConfig
from lmcli.errors import UsageError
from lmcli.kernels import build, decode_step
from lmcli.kernels.decode_step import BLOCK_OUTPUTS, WEIGHT_GROUP, DecoderWeights
from lmcli.kernels.decoding_state import weights_of
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.kernels.fast_path import FastTransformer, build_model

pytestmark = pytest.mark.skipif(build.library() is None, reason="needs the compiled kernels")

# no size is a multiple of a block of outputs, or of what a thread takes, but for the inputs
CONFIG = ModelConfig(
    vocab_size=203,
    hidden_size=96,
    intermediate_size=224,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=64,
).complete()
GEMMA = replace(
    CONFIG,
    sandwich_norm=True,
    scale_embedding=True,
    hidden_act="gelu_pytorch_tanh",
    sliding_window=3,
    layer_types=("sliding_attention", "full_attention"),
    local_rope_theta=100.0,
)
BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="module", params=[CONFIG, GEMMA], ids=["plain", "gemma"])
def model(request: pytest.FixtureRequest) -> FastTransformer:
    torch.manual_seed(0)
    model = build_model(request.param).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert isinstance(model, FastTransformer)
    return model


def weights(model: FastTransformer, kind: str) -> DecoderWeights:
    parameters = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    return DecoderWeights(model.config, parameters, weight_type=kind)


def logits(weights: DecoderWeights, prompts: list[list[int]]) -> np.ndarray:
    """The logits after each prompt and 3 more tokens."""
    state = FastDecodingState(weights, prompts, 64)
    for token in (5, 9, 11):
        state.add(np.full(len(prompts), token))
    return state.logits


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_is_the_same_to_the_bit_among_any_others(model: FastTransformer, kind: str) -> None:
    packed = weights(model, kind)
    prompts = [[3 + i, 7, 20 + i][: 1 + i % 3] for i in range(70)]
    alone = [logits(packed, [prompt])[0] for prompt in prompts[:18]]
    for rows in (2, 3, 4, 5, 9, 16, 17, 31, 33, 70):
        together = logits(packed, prompts[:rows])
        for row, expected in zip(together, alone):
            assert row.tobytes() == expected.tobytes(), rows


@pytest.mark.parametrize("kind, bound", [("bfloat16", 2e-2), ("int8", 3e-2), ("int4", 0.3)])
def test_fewer_bits_are_near_float32(model: FastTransformer, kind: str, bound: float) -> None:
    prompts = [[3, 7, 100], [50], [9, 9]]
    expected, result = (logits(weights(model, name), prompts) for name in ("float32", kind))
    difference = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < bound


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_the_nearest_ones(kind: str) -> None:
    matrix = np.random.default_rng(0).normal(0, 1, (37, 96)).astype(np.float32)
    matrix[5, 32:64] = 0
    numbers, scales = decode_step.interleave(matrix, kind, decode_step.Arena())
    values, factors = deinterleave(numbers, scales, 37, 96, BITS[kind])
    largest = np.abs(matrix.reshape(37, 3, WEIGHT_GROUP)).max(2)
    exact = largest / (127 if kind == "int8" else 7)
    assert (factors >= exact).all() and (factors <= exact * (1 + 2**-7)).all()
    each = factors.repeat(WEIGHT_GROUP, axis=1)
    np.testing.assert_array_equal(values, np.rint(matrix / np.where(each, each, 1)))


def deinterleave(
    numbers: np.ndarray, scales: np.ndarray, outputs: int, inputs: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integers (O, I) and scales (O, groups), from the layout that decode_products.h describes."""
    blocks, fours = -(-outputs // BLOCK_OUTPUTS), inputs // 4
    if bits == 8:
        vectors = numbers.view(np.int8).reshape(blocks, fours, BLOCK_OUTPUTS, 4)
    else:
        pairs = numbers.reshape(blocks, fours // 2, 1, BLOCK_OUTPUTS, 4)
        halves = np.concatenate([pairs & 15, pairs >> 4], axis=2).astype(np.int8) - 8
        vectors = halves.reshape(blocks, fours, BLOCK_OUTPUTS, 4)
    values = vectors.transpose(0, 2, 1, 3).reshape(blocks * BLOCK_OUTPUTS, inputs)
    floats = (scales.astype(np.uint32) << 16).view(np.float32)
    factors = floats.reshape(blocks, inputs // WEIGHT_GROUP, BLOCK_OUTPUTS).transpose(0, 2, 1)
    return values[:outputs], factors.reshape(blocks * BLOCK_OUTPUTS, -1)[:outputs]


def test_infinite_weights_are_not_hidden(model: FastTransformer) -> None:
    parameters = {
        name: weight.detach().clone().numpy() for name, weight in model.named_parameters()
    }
    parameters["decoder.layers.0.mlp.up.weight"][3, 3] = np.nan
    for kind in ("float32", "bfloat16", "int8", "int4"):
        broken = DecoderWeights(model.config, parameters, weight_type=kind)
        assert np.isnan(logits(broken, [[3, 7]])).any(), kind


def test_the_state_of_a_model_takes_the_type_of_its_weights(model: FastTransformer) -> None:
    assert weights_of(model).weight_type == "float32"


class TestQuantize:
    @pytest.fixture(scope="class")
    def path(self, small_model, small_tokenizer, tmp_path_factory):
        folder = tmp_path_factory.mktemp("model")
        model = small_model(vocab_size=small_tokenizer.size, max_position_embeddings=64)
        checkpoints.save(folder, model, small_tokenizer, GenerateConfig(temperature=0.0))
        return folder

    def test_log_probabilities_stay_near(self, path):
        exact = lmcli.load(path, dtype="float32").generate(["Once upon a"], max_new_tokens=1)[0]
        model = lmcli.load(path, dtype="float32", quantize="int8")
        assert "int8" in model.runs_on
        near = model.generate(["Once upon a"], max_new_tokens=1)[0]
        assert near.tokens == exact.tokens
        assert 0 < abs(near.token_logprobs[0] - exact.token_logprobs[0]) < 0.1

    def test_a_model_that_pytorch_runs_is_refused(self, path, monkeypatch):
        monkeypatch.setattr("lmcli.kernels.build.library", lambda: None)
        monkeypatch.setattr("lmcli.kernels.processor.cpu_precision", lambda *_: "")
        with pytest.raises(UsageError, match=r"in int8 here"):
            lmcli.load(path, quantize="int8").generate(["x"])
