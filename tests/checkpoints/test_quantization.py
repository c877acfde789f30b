"""Weights in groups of small integers: numpy functions, held against compressed-tensors."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.quantization import (
    dequantize_groups,
    pack,
    packed_matrix,
    quantization_config,
    quantize_groups,
    quantized_bits,
    unpack,
)
from lmcli.commands import run
from lmcli.config import GenerateConfig
from lmcli.errors import UserError
from lmcli.kernels import build

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


# folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(small_model, small_tokenizer, tmp_path_factory):
    """quantized(bits, **options): (folder, its model before), with rows of 32 and of 48 inputs."""

    def build(bits, **options):
        folder = tmp_path_factory.mktemp("quantized")
        model = small_model(**{"intermediate_size": 48, "model_type": "qwen3", **options})
        checkpoints.save(folder, model, small_tokenizer, GenerateConfig(), bits=bits)
        return folder, model

    return build


@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.6)])
def test_a_quantized_folder_is_read_back_as_what_it_holds(bits, most, quantized, difference):
    folder, model = quantized(bits)
    again = checkpoints.load(folder).model
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    matrix = packed_matrix({key: t.numpy() for key, t in tensors.items()}, name, bits, "file")
    weight = again.get_parameter("decoder.layers.1.attention.query.weight")
    assert np.array_equal(matrix.weight(), weight.detach().numpy())
    # embeddings, norms, and rows of 48 inputs stay as they are
    for key in ("embedding.weight", "decoder.norm.weight", "decoder.layers.0.mlp.down.weight"):
        assert torch.equal(again.get_parameter(key), model.get_parameter(key))
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        assert 0 < difference(again(ids), model(ids)) < most
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert config["ignore"] == ["lm_head", *down]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_computes_the_same_logits(bits, quantized, difference):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    folder, _ = quantized(bits, tie_word_embeddings=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        assert difference(checkpoints.load(folder).model(ids), theirs(ids).logits) < 1e-5


def test_a_family_with_transposed_matrices_is_refused(small_model, small_tokenizer, tmp_path):
    plain = {"norm": "layer", "gated_mlp": False, "attention_bias": "all", "mlp_bias": True}
    model = small_model(
        **{**plain, "model_type": "gpt2", "query_key_norm": False, "positions": "learned"},
        hidden_act="gelu_new",
        num_key_value_heads=0,
    )
    with pytest.raises(UserError, match="gpt2 stores its matrices transposed"):
        checkpoints.save(tmp_path, model, small_tokenizer, GenerateConfig(), bits=8)


@pytest.fixture(scope="module")
def source(small_model, small_tokenizer, tmp_path_factory):
    """A folder with a small decoder."""
    folder = tmp_path_factory.mktemp("source")
    checkpoints.save(folder, small_model(), small_tokenizer, GenerateConfig())
    return folder


def test_the_command_prints_the_loss_that_it_measured(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    target, text = tmp_path / "target", tmp_path / "a.txt"
    text.write_text("Once upon a time there was a cat.\n" * 3)
    command = ["export", str(source), "-o", str(target), "--int4", "--measure", str(text)]
    assert run(command) == 0
    out, err = capfd.readouterr()
    assert out == f"{target}\n" and "MB of int4 and float32 weights" in err
    measured = re.findall(rf"lm: {text}: (\d+\.\d{{4}}) bits per byte (.*)", err)
    bits = []
    for model in (source, target):
        done = ["perplexity", "-m", str(model), "--json", "--dtype", "float32", str(text)]
        assert run(done) == 0
        bits.append(json.loads(capfd.readouterr().out)["bits_per_byte"])
    before, stored, *generated = [(float(value), how) for value, how in measured]
    assert before == (round(bits[0], 4), "before")
    change = f"({100 * (bits[1] / bits[0] - 1):+.2f} %)"
    assert stored == (round(bits[1], 4), f"with the stored weights {change}")
    if build.library() is None:
        assert "lm generate --quantize int4 is not measured: " in err and not generated
    else:
        ((value, how),) = generated
        assert "by lm generate --quantize int4 (" in how and value != before[0]
    assert run(["info", "--json", str(target)]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["quantization"] == "int4" and facts["weights"]["missing"] == []
    # a model without the quantization is made of it again
    assert run(["export", str(target), "-o", str(tmp_path / "plain"), "-q"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize(
    ("options", "kernels", "said"),
    [
        (["--dtype", "bfloat16"], True, "bits per byte by lm generate --dtype bfloat16 ("),
        (["--dtype", "bfloat16"], False, "lm generate --dtype bfloat16 is not measured: that "),
        (["--int8"], False, "lm generate --quantize int8 is not measured: that takes a C compiler"),
        (["--dtype", "float16"], True, "bits per byte with the stored weights ("),
    ],
)
def test_what_generates_is_measured_where_it_can_run(
    options, kernels, said, source, tmp_path, capfd, monkeypatch
):
    if not kernels:
        monkeypatch.setattr(build, "library", lambda: None)
    elif build.library() is None:
        pytest.skip(build.problem())
    (text := tmp_path / "a.txt").write_text("Once upon a time there was a cat.\n")
    command = ["export", str(source), "-o", str(tmp_path / "a"), *options]
    assert run([*command, "--measure", str(text)]) == 0
    err = capfd.readouterr().err
    assert said in err.splitlines()[-1]
    assert run([*command, "--overwrite", "-q", "--measure", str(text)]) == 0
    assert not capfd.readouterr().err


def test_a_missing_or_empty_text_leaves_no_folder(tmp_path, capfd):
    (tmp_path / "empty.txt").touch()
    for name, problem in (("missing.txt", "cannot read"), ("empty.txt", "is empty")):
        text = str(tmp_path / name)
        command = ["export", "model", "-o", str(tmp_path / "a"), "--int8", "--measure", text]
        assert run(command) == 1
        assert problem in capfd.readouterr().err and not (tmp_path / "a").exists()


def test_a_model_without_bits_per_byte_leaves_no_folder(
    source, small_model, tmp_path, capfd, monkeypatch
):
    (text := tmp_path / "a.txt").write_text("one\n")
    monkeypatch.setattr(
        "lmcli.catalog.abilities.ABILITIES",
        {("decoder", "lm"): ("a kind of model", {"score": "…"})},
    )
    command = ["export", str(source), "-o", str(tmp_path / "a"), "--measure", str(text)]
    assert run(command) == 1
    assert "a kind of model" in capfd.readouterr().err and not (tmp_path / "a").exists()
