"""Weights in groups of small integers: numpy functions, held against compressed-tensors."""

import numpy as np
import pytest

from lmcli.checkpoints.quantization import (
    dequantize_groups,
    pack,
    packed_matrix,
    quantization_config,
    quantize_groups,
    quantized_bits,
    unpack,
)
from lmcli.errors import UserError

RNG = np.random.default_rng(0)
# what compressed_tensors 0.20.1's pack_to_int32 makes of the row −8 … 7 (4 bits), and of −128, −1,
# 0, 127 and 5 (8 bits)
PACKED_4, PACKED_8 = [1985229328, -19088744], [-8356096, 133]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [2, 32, 64])
def test_an_error_is_at_most_half_a_scale(bits, group):
    weight = RNG.normal(size=(5, 64)).astype(np.float32)
    values, scales = quantize_groups(weight, bits, group)
    most = 2 ** (bits - 1) - 1
    assert values.dtype == np.int8 and scales.dtype == np.float32
    assert scales.shape == (5, 64 // group) and np.abs(values).max() == most
    largest = np.abs(weight.reshape(5, -1, group)).max(-1)
    np.testing.assert_allclose(scales, largest / most, rtol=1e-6)
    error = np.abs(dequantize_groups(values, scales) - weight).reshape(5, -1, group)
    assert (error <= scales[..., None] / 2 * (1 + 1e-5)).all()


def test_a_group_of_zeros_and_tiny_numbers_stays_finite():
    weight = np.zeros((2, 4), np.float32)
    weight[1, 3] = 1e-45  # the smallest number of float32: its scale would be 0
    values, scales = quantize_groups(weight, 8, 2)
    assert not values.any() and np.isfinite(scales).all() and (scales > 0).all()


def test_words_are_those_of_compressed_tensors():
    row = np.arange(-8, 8, dtype=np.int8)[None]
    assert pack(row, 4).tolist() == [PACKED_4]
    bytes_ = np.array([[-128, -1, 0, 127, 5]], np.int8)
    assert pack(bytes_, 8).tolist() == [PACKED_8]
    assert (unpack(pack(row, 4), 4, 16) == row).all()
    assert (unpack(pack(bytes_, 8), 8, 5) == bytes_).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 3, 7, 8, 32, 33])
def test_packed_is_unpacked_for_every_width(bits, columns):
    most = 2 ** (bits - 1)
    values = RNG.integers(-most, most, size=(3, columns)).astype(np.int8)
    words = pack(values, bits)
    assert words.dtype == np.int32 and words.shape == (3, -(-columns * bits // 32))
    assert (unpack(words, bits, columns) == values).all()


def test_our_own_configuration_is_read():
    for bits in (4, 8):
        document = {"quantization_config": quantization_config(bits, ["lm_head"])}
        assert quantized_bits(document, "config.json") == bits
    assert quantized_bits({}, "config.json") == 0


def changed(**weights):
    config = quantization_config(4, [])
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ("no object", "None"),
        (changed(num_bits=3), "num_bits 3"),
        (changed(symmetric=False), "symmetric False"),
        (changed(type="float"), "type 'float'"),
        (changed(actorder="group"), "actorder 'group'"),
        (changed(strategy=["group"]), r"strategy \['group'\]"),
        ({**changed(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**changed(), "config_groups": {}}, "config_groups 0 schemes"),
        ({**changed(), "config_groups": {"a": None}}, "weights None"),
    ],
)
def test_another_format_is_refused_by_name(config, named):
    with pytest.raises(UserError, match=named) as caught:
        quantized_bits({"quantization_config": config}, "model/config.json")
    assert caught.value.where == "model/config.json" and caught.value.hint


def stored(**changes):
    values, scales = quantize_groups(RNG.normal(size=(3, 64)), 8)
    tensors = {
        "q.weight_packed": pack(values, 8),
        "q.weight_scale": scales,
        "q.weight_shape": np.array([3, 64]),
    }
    return {**tensors, **changes}


def test_a_stored_matrix_is_found_by_its_module():
    matrix = packed_matrix(stored(), "q", 8, "file")
    assert matrix.values().shape == (3, 64) and matrix.weight().dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"q.weight_shape": np.array([3, 60])},
        {"q.weight_shape": np.array([3, -64])},
        {"q.weight_shape": np.array([3])},
        {"q.weight_scale": np.ones((3, 7), np.float32)},
        {"q.weight_scale": np.ones(3, np.float32)},
        {"q.weight_scale": np.ones((3, 0), np.float32)},
        {"q.weight_packed": np.ones((3, 16), np.float32)},
    ],
)
def test_tensors_that_do_not_fit_together_are_an_error(changes):
    with pytest.raises(UserError, match=r"q\.weight_packed"):
        packed_matrix(stored(**changes), "q", 8, "file")
