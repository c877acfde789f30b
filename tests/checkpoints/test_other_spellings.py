"""Valid folders in other spellings: prefixes of wrappers in tensor names, ids that mean none."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import read_config
from lmcli.errors import UserError

IDS = torch.arange(20)[None] * 7 % 400


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, reference(folder)


@pytest.fixture
def renamed(original, tmp_path):
    """renamed(rename) is a copy of the folder whose tensors have the names that `rename` makes."""

    def make(rename):
        for file in original[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(original[0] / "model.safetensors")
        save_file({rename(n): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return make


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_orig_mod.base_model.model.{name}",
        lambda name: f"base_model.model._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}",
        lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: f"_orig_mod.{name}" if "mlp" in name else name,
        lambda name: f"module.{name.removeprefix('model.')}" if "lm_head" not in name else name,
    ],
)
def test_the_prefix_of_a_wrapper_is_taken_off(rename, renamed, original, difference):
    model = checkpoints.load(renamed(rename)).model
    with torch.inference_mode():
        assert difference(model(IDS), original[1](IDS).logits) < 1e-5


@pytest.mark.parametrize("prefix", ["net.", "language_model.", "student.inner."])
def test_another_prefix_is_named(prefix, renamed):
    with pytest.raises(UserError) as caught:
        checkpoints.load(renamed(lambda name: f"{prefix}{name}"))
    assert f", but {prefix}model.embed_tokens.weight" in caught.value.what
    assert f"the prefix {prefix!r}" in caught.value.hint


def test_a_tensor_under_both_names_is_refused(renamed):
    folder = renamed(lambda name: name)
    tensors = load_file(folder / "model.safetensors")
    both = {f"module.{name}": tensor + 1 for name, tensor in tensors.items()}
    save_file({**tensors, **both}, folder / "model.safetensors")
    with pytest.raises(UserError, match="twice, once with the prefix of a wrapper: module"):
        checkpoints.load(folder)


def test_an_adapter_that_is_not_merged_is_named(renamed):
    def rename(name):
        return f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}"

    with pytest.raises(UserError) as caught:
        checkpoints.load(renamed(rename))
    assert "merge_and_unload" in caught.value.hint


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("generation_config.json", "temperature"),
        ("generation_config.json", "top_p"),
        ("generation_config.json", "max_new_tokens"),
        ("generation_config.json", "repetition_penalty"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "rms_norm_eps"),
        ("config.json", "hidden_size"),
        ("config.json", "rope_theta"),
        ("config.json", "bos_token_id"),
    ],
)
def test_a_number_that_is_none_is_a_bad_folder(file, key, value, renamed):
    """Exit code 1: the work failed; 2 would blame the command line."""
    folder = renamed(lambda name: name)
    document = json.loads((folder / file).read_text())
    document.pop("rope_parameters", None)
    text = json.dumps({**document, key: "HERE"}).replace('"HERE"', value)
    (folder / file).write_text(text)
    if key.endswith("token_id") and value.startswith("-"):
        return  # means none
    with pytest.raises(UserError) as caught:
        checkpoints.load(folder)
    assert caught.value.exit_code == 1
    assert key in caught.value.what and str(folder / file) in str(caught.value)


@pytest.mark.parametrize("value", [-1, -100, [], [-1], [None], None])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ids_that_mean_none(file, value, renamed):
    folder = renamed(lambda name: name)
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id")
    change(folder / file, **dict.fromkeys(keys, value))
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    checkpoint = checkpoints.load(folder)
    assert checkpoint.stop_ids == ([] if value is not None else [0])  # null: the tokenizer's
    assert checkpoint.generate.forced_eos_token_id is None
    if file == "config.json":
        config = checkpoint.model.config
        assert config.pad_token_id is config.bos_token_id is config.eos_token_id is None


def test_an_id_of_several_that_means_none(renamed):
    folder = renamed(lambda name: name)
    change(folder / "generation_config.json", eos_token_id=[5, -1, None, 7])
    assert checkpoints.load(folder).stop_ids == [5, 7]


def test_roberta_counts_positions_from_its_padding_id():
    """As transformers: the first position is the padding id and one, so 0 with -1."""
    for padding, offset in ((1, 2), (-1, 0), (5, 6)):
        document = {"model_type": "roberta", "pad_token_id": padding}
        config = read_config({**document, "max_position_embeddings": 40}, "here")[1]
        assert config.position_offset == offset
        assert config.max_position_embeddings == 40 - offset
