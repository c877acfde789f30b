"""Damaged model folders: a UserError names the file and the fault at once; never a traceback."""

import json
import resource
import shlex
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import read_config
from lmcli.checkpoints.families import FAMILIES
from lmcli.config import GenerateConfig
from lmcli.errors import UserError

INDEX = "model.safetensors.index.json"
SMALL = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention"] * 3,
}


@pytest.fixture(scope="module")
def originals(reference, tmp_path_factory):
    """Complete folders of two families, and one in shards."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama", "qwen3", "shards")}
    reference(folders["llama"], "llama")
    reference(folders["qwen3"], "qwen3")
    reference(folders["shards"], "llama", max_shard_size="20KB")
    return folders


@pytest.fixture
def copy(originals, tmp_path):
    def make(name: str = "llama"):
        return shutil.copytree(originals[name], tmp_path / name)

    return make


def load_error(folder) -> UserError:
    with pytest.raises(UserError) as caught:
        checkpoints.load(folder)
    assert "\n" not in caught.value.what
    return caught.value


def change(file, **values) -> None:
    document = json.loads(file.read_text())
    document.update(values)
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_folder(tmp_path):
    error = load_error(tmp_path / "nowhere")
    assert (error.where, error.what) == (str(tmp_path / "nowhere"), "no such model folder")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no model.safetensors"),
        ("tokenizer.json", "holds no tokenizer"),
    ],
)
def test_a_missing_file(file, message, copy):
    folder = copy()
    (folder / file).unlink()
    error = load_error(folder)
    assert (error.where, error.what) == (str(folder), message)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null"],
    ids=["empty", "open", "no UTF-8", "list", "null"],
)
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX]
)
def test_a_file_that_is_no_json_object(file, content, copy):
    folder = copy("shards")
    (folder / file).write_bytes(content)
    error = load_error(folder)
    assert error.where == str(folder / file)
    assert error.what.startswith("is not")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_a_file_that_is_nested_too_deep(file, copy):
    folder = copy("shards")
    (folder / file).write_bytes(b"[" * 100_000)
    assert load_error(folder).where == str(folder / file)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "llama",
            {"model_type": "gpt_neo"},
            "is not supported; the nearest supported family is 'gpt_neox'",
        ),
        (
            "llama",
            {"model_type": "gpt_neox"},
            "architecture 'LlamaForCausalLM' is not supported for gpt_neox",
        ),
        (
            "llama",
            {"model_type": "chatglm", "auto_map": {"AutoModel": "x.py"}},
            "comes with its own code, which lm never",
        ),
        (
            "llama",
            {"architectures": ["LlamaForTokenClassification"]},
            "architecture 'LlamaForTokenClassification' is not",
        ),
        ("llama", {"model_type": ...}, "model_type None is not supported"),
        ("llama", {"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ("llama", {"attention_bias": True}, "has no tensor model.layers.0.self_attn.q_proj.bias"),
        ("llama", {"attention_bias": "some"}, "attention_bias 'some' is not supported for llama"),
        ("llama", {"mlp_bias": True}, "has no tensor model.layers.0.mlp.gate_proj.bias"),
        ("llama", {"hidden_act": "swish2"}, "hidden_act: 'swish2' is not one of"),
        (
            "qwen3",
            {**SLIDING, "sliding_window": "wide"},
            "sliding_window: 'wide' is not a whole number",
        ),
        (
            "qwen3",
            {**SLIDING, "layer_types": ["linear_attention"] * 3},
            "layer_types ['linear_attention']",
        ),
        ("qwen3", {**SLIDING, "layer_types": ["sliding_attention"]}, "layer_types names 1 layers"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}},
            "rope type 'dynamic' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear"}},
            "rope type 'linear' without a factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "mscale 0.7 of rope type 'yarn'",
        ),
        ("llama", {"rope_parameters": "default"}, "rope_parameters is not an object"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": "wide"}},
            "rope_theta: 'wide' is not a number",
        ),
        ("llama", {"hidden_size": ...}, "has no hidden_size"),
        ("llama", {"hidden_size": None}, "has no hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size: 'wide' is not a whole number"),
        ("llama", {"hidden_size": 36.5}, "hidden_size: 36.5 is not a whole number"),
        ("llama", {"hidden_size": [36]}, "hidden_size: [36] is not a whole number"),
        ("llama", {"hidden_size": -1}, "hidden_size: -1 is outside 1 to"),
        ("llama", {"vocab_size": 0}, "vocab_size: 0 is outside 1 to"),
        (
            "llama",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers: 1000000000 is outside 1 to 1024",
        ),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0 is outside 1 to 1024"),
        ("llama", {"vocab_size": 10**18}, "vocab_size: 1000000000000000000 is outside 1 to"),
        ("llama", {"hidden_size": 10**30}, "hidden_size: 1"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings: 0 is outside"),
        (
            "llama",
            {"num_key_value_heads": 4},
            "num_key_value_heads 4 does not divide num_attention_heads 6",
        ),
        ("llama", {"head_dim": 9}, "head_dim 9 is odd"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is outside"),
        ("llama", {"eos_token_id": "end"}, "eos_token_id: 'end' is not a whole number"),
    ],
    ids=str,
)
def test_config_json_with_impossible_or_unsupported_values(kind, values, message, copy):
    folder = copy(kind)
    change(folder / "config.json", **values)
    error = load_error(folder)
    assert message in error.what
    assert str(folder) in str(error)


def test_a_list_of_ids_may_be_empty(copy):
    folder = copy()
    change(folder / "config.json", eos_token_id=[])
    (folder / "generation_config.json").unlink()
    assert checkpoints.load(folder).stop_ids == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature: -1"),
        ({"top_p": "all"}, "top_p: 'all' is not a number"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"eos_token_id": [1, {}]}, "eos_token_id"),
    ],
    ids=str,
)
def test_generation_config_with_impossible_values(values, message, copy):
    folder = copy()
    change(folder / "generation_config.json", **values)
    error = load_error(folder)
    assert message in error.what
    assert error.where == str(folder / "generation_config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 20},
        {"vocab_size": 1 << 28, "hidden_size": 1 << 17},
        {"num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 4096},
        {"max_position_embeddings": 1 << 24},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [*FAMILIES])
def test_absurd_sizes_fail_at_once_without_using_memory(family, values, copy):
    folder, row = copy(), FAMILIES[family]
    document = {
        "model_type": family,
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 409,
    }
    keys = {**{key: key for key in document}, "vocab_size": "vocab_size", **row.keys}
    document = {keys.get(key, key): value for key, value in {**document, **values}.items()}
    (folder / "config.json").write_text(json.dumps(document))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_error(folder)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_labels": 10**9}, "num_labels: 1000000000 is outside 1 to"),
        ({"num_labels": "two"}, "num_labels: 'two' is not a whole number from 1"),
        ({"num_labels": 0}, "num_labels: 0 is not a whole number from 1"),
        ({"id2label": ["a", "b"]}, "id2label is no object of names for 0, 1, 2"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is no object of names for 0, 1, 2"),
        ({"num_labels": 1}, "regression (one number instead of labels) is not supported"),
        (
            {"problem_type": "regression"},
            "regression (one number instead of labels) is not supported",
        ),
    ],
    ids=str,
)
def test_impossible_labels(values, message):
    with pytest.raises(UserError) as caught:
        read_config(
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **values},
            "here",
        )
    assert message in caught.value.what


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder True is not supported for bert"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        (
            "bert",
            {"architectures": [["BertModel"]]},
            "architecture ['BertModel'] is not supported for bert",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True is not supported",
        ),
        (
            "marian",
            {"share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings False is not supported",
        ),
        ("t5", {"vocab_size": 9, "d_model": 8, "num_heads": 2}, "has no num_decoder_layers"),
        (
            "t5",
            {
                "d_model": 8,
                "num_heads": 2,
                "vocab_size": 9,
                "num_layers": 2,
                "feed_forward_proj": "gated-mish",
            },
            "feed_forward_proj 'gated-mish' is not supported for t5",
        ),
        (
            "modernbert",
            {"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "max"},
            "classifier_pooling 'max' is not supported for modernbert",
        ),
        *(
            ("modernbert", {**SMALL, **values}, message)
            for values, message in [
                (
                    {"global_attn_every_n_layers": 0},
                    "global_attn_every_n_layers: 0 is not a whole number from 1",
                ),
                (
                    {"global_attn_every_n_layers": "3"},
                    "global_attn_every_n_layers: '3' is not a whole number from 1",
                ),
                (
                    {"rope_parameters": {"full_attention": 3}},
                    "rope_parameters holds no object for each type of layer",
                ),
                (
                    {
                        "rope_parameters": {
                            "sliding_attention": {"rope_type": "linear", "factor": 2}
                        }
                    },
                    "rope type 'linear' of sliding_attention is not supported",
                ),
            ]
        ),
        (
            "qwen2",
            {
                **SMALL,
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "max_window_layers": None,
            },
            "max_window_layers: None is not a whole number from 0",
        ),
    ],
    ids=str,
)
def test_unsupported_options_of_a_family(family, values, message):
    with pytest.raises(UserError) as caught:
        read_config({"model_type": family, **values}, "here")
    assert message in caught.value.what and caught.value.where == "here"


@pytest.mark.parametrize(
    ("head", "foreign"),
    [
        ("lm", "bert.pooler.dense.weight"),
        ("lm", "cls.seq_relationship.weight"),
        ("lm", "classifier.weight"),
        ("lm", "qa_outputs.bias"),
        ("sequence", "cls.predictions.bias"),
        ("token", "pooler.dense.bias"),
    ],
)
def test_a_tensor_of_another_head_is_reported_as_unused(
    head, foreign, small_model, small_tokenizer, tmp_path
):
    labels = {} if head == "lm" else {"labels": ("a", "b")}
    options = {
        **FAMILIES["bert"].options_for(head),
        **labels,
        "shape": "encoder",
        "head": head,
        "model_type": "bert",
        "num_key_value_heads": 4,
        "type_vocab_size": 2,
    }
    checkpoints.save(tmp_path, small_model(**options), small_tokenizer, GenerateConfig())
    change_tensors(tmp_path, lambda tensors: tensors.update({foreign: torch.zeros(3)}))
    assert checkpoints.load(tmp_path).unused == [foreign]


@pytest.mark.parametrize(
    "foreign",
    [
        "bert.embeddings.extra",
        "classifiers.weight",
        "bert.encoder.layer.2.output.dense.weight",
        "cls.predictions.transform.second.weight",
        "lm_head.weight",
    ],
)
def test_any_other_tensor_is_an_error(foreign, small_model, small_tokenizer, tmp_path):
    options = {
        **FAMILIES["bert"].options_for("lm"),
        "shape": "encoder",
        "head": "lm",
        "model_type": "bert",
        "num_key_value_heads": 4,
    }
    checkpoints.save(tmp_path, small_model(**options), small_tokenizer, GenerateConfig())
    change_tensors(tmp_path, lambda tensors: tensors.update({foreign: torch.zeros(3)}))
    assert load_error(tmp_path).what == f"has a tensor that bert does not have: {foreign}"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_missing_tensor_is_named(kind, copy):
    folder = copy(kind)
    for name in load_file(folder / "model.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / "whole")
        change_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        error = load_error(folder)
        assert (error.where, error.what) == (
            str(folder / "model.safetensors"),
            f"has no tensor {name}",
        )
        shutil.move(folder / "whole", folder / "model.safetensors")


def test_a_missing_tensor_in_shards_names_their_index(copy):
    folder = copy("shards")
    shard = next(
        file for file in sorted(folder.glob("model-*")) if "model.norm.weight" in load_file(file)
    )
    save_file(
        {name: tensor for name, tensor in load_file(shard).items() if name != "model.norm.weight"},
        shard,
    )
    error = load_error(folder)
    assert (error.where, error.what) == (str(folder / INDEX), "has no tensor model.norm.weight")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (408, 36)),
        ("model.layers.1.self_attn.k_proj.weight", (60, 36)),
        ("model.layers.2.mlp.down_proj.weight", (50, 36)),
        ("model.norm.weight", (36, 1)),
        ("lm_head.weight", ()),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(name, shape, copy):
    folder = copy()
    right = tuple(load_file(folder / "model.safetensors")[name].shape)
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    error = load_error(folder)
    assert error.where == str(folder / "model.safetensors")
    assert error.what == f"{name} has shape {shape}, config.json says {right}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (
            "llama",
            "model.layers.0.self_attn.q_norm.weight",
        ),  # a Qwen3 that calls itself Llama must not load without it
        ("llama", "model.layers.3.mlp.up_proj.weight"),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "x"),
    ],
)
def test_an_additional_tensor_is_named(kind, name, copy):
    folder = copy(kind)
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    error = load_error(folder)
    assert error.where == str(folder / "model.safetensors")
    assert error.what == f"has a tensor that {kind} does not have: {name}"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_integer_weights_are_an_error(name, copy):
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    error = load_error(folder)
    assert error.where == str(folder / "model.safetensors")
    assert name in error.what and "int8" in error.what


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, 0.5, 0.99, -1])
@pytest.mark.parametrize("kind", ["llama", "shards"])
def test_a_truncated_file_is_named(left, kind, copy):
    folder = copy(kind)
    file = sorted(folder.glob("model*.safetensors"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    error = load_error(folder)
    assert error.where == str(file)
    assert error.what.startswith("is damaged or no safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 40,
        b"[" * 40,
        b"{}",
        b'{"a": 1}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    ],
    ids=lambda header: header[:60].decode("latin1"),
)
@pytest.mark.parametrize("length", [None, 1 << 40, (1 << 64) - 1])
def test_a_garbage_header_is_an_error(header, length, copy):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(8))
    assert load_error(folder).where == str(file)


def test_flipped_bits_in_the_header_never_give_a_traceback(copy):
    folder = copy()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for at in range(0, 8 + length, 37):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            checkpoints.load(folder)
        except UserError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "."]
)
def test_an_index_with_a_path_outside_the_folder_is_an_error(name, copy):
    folder = copy("shards")
    shutil.copy(next(folder.glob("model-*")), folder.parent / "outside.safetensors")
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map={**places, "model.norm.weight": name})
    error = load_error(folder)
    assert (error.where, error.what) == (
        str(folder / INDEX),
        f"names a file outside the folder: {name!r}",
    )


@pytest.mark.parametrize("weight_map", [..., None, [], "model"], ids=str)
def test_an_index_without_a_weight_map_is_an_error(weight_map, copy):
    folder = copy("shards")
    change(folder / INDEX, weight_map=weight_map)
    error = load_error(folder)
    assert (error.where, error.what) == (str(folder / INDEX), "has no weight_map")


def test_a_missing_shard_is_named(copy):
    folder = copy("shards")
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    assert load_error(folder).where == str(shard)


def test_a_tokenizer_with_more_ids_than_the_model(copy):
    folder = copy()
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] += [
        {**document["added_tokens"][0], "id": 400 + i, "content": f"<{i}>"} for i in range(50)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    error = load_error(folder)
    assert (error.where, error.what) == (
        str(folder / "tokenizer.json"),
        "has 450 ids, but the model's vocabulary has 409",
    )


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "None"}}'])
def test_a_broken_tokenizer_is_named(content, copy):
    folder = copy()
    (folder / "tokenizer.json").write_bytes(content)
    error = load_error(folder)
    assert error.where == str(folder / "tokenizer.json")


def test_pickled_weights_are_never_opened_and_the_hint_converts_them(copy, difference):
    folder = copy()
    expected = checkpoints.load(folder).model
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = load_error(folder)
    assert error.where == str(folder)
    assert error.what == "holds no model.safetensors, only pytorch_model.bin, which lm never opens"
    python, option, code = shlex.split(error.hint.partition(": ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    loaded = checkpoints.load(folder).model
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_of_garbage_are_not_opened_either(name, copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"rm -rf")
    assert "LlamaForCausalLM" in load_error(folder).hint
