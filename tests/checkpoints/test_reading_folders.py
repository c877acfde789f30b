"""Folders that transformers wrote give the same hidden states, layer by layer, and logits here."""

import json

import pytest
import torch

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints import weights
from lmcli.config import GenerateConfig

IDS = torch.randint(0, 409, (3, 17), generator=torch.Generator().manual_seed(1))


def hidden_states(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states as in transformers: embeddings, outputs of blocks, the last one normalized."""
    states, hooks = [model.embedding(ids)], []
    for layer in model.decoder.layers[:-1]:
        hooks.append(
            layer.register_forward_hook(lambda _layer, _inputs, output: states.append(output))
        )
    states.append(model.hidden(ids))
    for hook in hooks:
        hook.remove()
    return states


def assert_same(ours, theirs, difference, bound: float = 1e-5) -> None:
    with torch.inference_mode():
        expected = theirs(IDS, output_hidden_states=True)
        states = zip(hidden_states(ours, IDS), expected.hidden_states, strict=True)
        errors = [difference(a, b) for a, b in states]
        assert max(errors) < bound, (
            f"first differs after layer {next(i for i, e in enumerate(errors) if e >= bound)}"
        )
        assert difference(ours(IDS), expected.logits) < bound


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 0.1},
        {"head_dim": 4},
        {"num_hidden_layers": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_and_hidden_states_equal_those_of_transformers(
    kind, options, reference, tmp_path, difference
):
    theirs = reference(tmp_path, kind, **options)
    assert_same(checkpoints.load(tmp_path).model, theirs, difference)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_left_padding_gives_what_transformers_gives(kind, reference, tmp_path, difference):
    theirs, mask = reference(tmp_path, kind), torch.ones_like(IDS)
    mask[0, :5] = mask[2, :16] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = theirs(IDS, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        found = checkpoints.load(tmp_path).model(IDS, mask)[mask.bool()]
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_shards_in_an_index(kind, reference, tmp_path, difference):
    theirs = reference(tmp_path, kind, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(checkpoints.load(tmp_path).model, theirs, difference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_in_float32(dtype, reference, tmp_path, difference):
    theirs = reference(tmp_path, "qwen3", dtype=dtype)
    ours = checkpoints.load(tmp_path).model
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    assert_same(ours, type(theirs).from_pretrained(tmp_path, dtype=torch.float32), difference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_is_loaded_in_the_dtype_asked_for(dtype, reference, tmp_path, difference):
    theirs = reference(tmp_path, "qwen3")
    ours = checkpoints.load(tmp_path, dtype=dtype).model
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    with torch.inference_mode():
        # rounding of three layers with eight bits
        assert difference(ours(IDS), theirs(IDS).logits) < (
            0.05 if dtype == torch.bfloat16 else 0.005
        )


@pytest.mark.parametrize("key", ["rope_parameters", "rope_theta", "rope_scaling"])
def test_the_rotary_base_is_read_from_each_of_its_keys(key, reference, tmp_path, difference):
    theirs = reference(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    document = json.loads((tmp_path / "config.json").read_text())
    del document["rope_parameters"]
    document.update(
        {"rope_theta": 77.0}
        if key == "rope_theta"
        else {key: {"type": "default", "rope_theta": 77.0}}
    )
    (tmp_path / "config.json").write_text(json.dumps(document))
    ours = checkpoints.load(tmp_path).model
    assert ours.config.rope_theta == 77.0
    assert_same(ours, theirs, difference)


def test_changed_weights_give_different_logits(reference, tmp_path, difference):
    """Shows that the bounds above can fail: a changed query or norm is far outside them."""
    theirs, ours = reference(tmp_path, "qwen3"), checkpoints.load(tmp_path).model
    for name in (
        "decoder.layers.2.attention.query.weight",
        "decoder.layers.0.attention_norm.weight",
        "decoder.layers.1.attention.key_norm.weight",
        "decoder.norm.weight",
    ):
        ours.load_state_dict(checkpoints.load(tmp_path).model.state_dict())
        with torch.inference_mode():
            ours.get_parameter(name)[:5] *= 1.01
            assert difference(ours(IDS), theirs(IDS).logits) > 1e-4, name


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_tensors_that_no_forward_pass_needs_are_ignored(name, reference, tmp_path, difference):
    from safetensors.torch import load_file, save_file

    theirs = reference(tmp_path)
    save_file(
        {**load_file(tmp_path / "model.safetensors"), name: torch.ones(5)},
        tmp_path / "model.safetensors",
    )
    assert_same(checkpoints.load(tmp_path).model, theirs, difference)


def test_a_tied_folder_may_hold_the_head_as_well(reference, tmp_path, difference):
    from safetensors.torch import load_file, save_file

    theirs = reference(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(checkpoints.load(tmp_path).model, theirs, difference)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, GenerateConfig()),
        ({}, GenerateConfig()),
        ({"eos_token_id": 3}, GenerateConfig()),
        ({"do_sample": True}, GenerateConfig(temperature=1.0, top_k=50, top_p=1.0)),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.9,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
            },
            GenerateConfig(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
        ),
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
            GenerateConfig(temperature=0.0, top_k=0, top_p=0.9),
        ),
        (
            {"do_sample": False, "num_beams": 4, "length_penalty": 0.5, "max_new_tokens": 9},
            GenerateConfig(
                temperature=0.0, top_p=1.0, num_beams=4, length_penalty=0.5, max_new_tokens=9
            ),
        ),
        (
            {"do_sample": True, "top_k": None, "temperature": None},
            GenerateConfig(temperature=1.0, top_k=50, top_p=1.0),
        ),
    ],
)
def test_generation_defaults_have_the_meaning_of_transformers(
    document, expected, reference, tmp_path
):
    reference(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if document is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(document))
    assert checkpoints.load(tmp_path).generate == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, [5]),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 6}, [5, 7]),
        ({}, {"eos_token_id": 6}, [6]),
        ({}, {"eos_token_id": [6, 8]}, [6, 8]),
        ({}, {"eos_token_id": None}, [0]),  # from tokenizer_config.json
    ],
)
def test_stop_ids(generation, config, expected, reference, tmp_path):
    reference(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, **config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoints.load(tmp_path).stop_ids == expected


def test_bos_follows_the_template(reference, tmp_path):
    reference(tmp_path)
    assert checkpoints.load(tmp_path).bos == [0]
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "add_bos_token": False})
    )
    assert checkpoints.load(tmp_path).bos == []


@pytest.mark.parametrize("layout", ["plain", "flat", "columns", "rows", "heads"])
@pytest.mark.parametrize("size", [(8, 3), (8,)])
def test_the_shape_of_a_stored_tensor_is_that_of_its_parameters_joined(layout, size):
    count = 2 if layout in ("rows", "heads") else 1
    parameters = [torch.zeros(size)] * count
    joined = weights.join_tensors(parameters, layout, heads=4)
    assert weights.joined_shape([size] * count, layout) == tuple(joined.shape)
