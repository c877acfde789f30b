"""One setting under two keys of config.json: the value that transformers takes, or a refusal."""

import json
from pathlib import Path

import pytest
import torch

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import read_config
from lmcli.errors import UserError

transformers = pytest.importorskip("transformers")
CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
SIZES = {
    "vocab_size": 409,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 7.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BART = {"d_model": 8, "decoder_attention_heads": 2, "decoder_layers": 3}
T5 = {"vocab_size": 409, "d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 40}
BERT = {**SIZES, "architectures": ["BertForSequenceClassification"], "num_key_value_heads": 4}
QWEN = {**SIZES, "sliding_window": 4, "max_window_layers": 1}
# model type, keys of config.json; our option → where transformers has it
BOTH = [
    ("gpt2", {"hidden_size": 96, "n_embd": 32}, {"hidden_size": "n_embd"}),
    ("gpt2", {"num_attention_heads": 2, "n_head": 4}, {"num_attention_heads": "n_head"}),
    ("gpt2", {"num_hidden_layers": 2}, {"num_hidden_layers": "n_layer"}),
    (
        "gpt2",
        {"max_position_embeddings": 44, "n_positions": 55, "n_ctx": 66},
        {"max_position_embeddings": "n_positions"},
    ),
    ("distilbert", {"hidden_size": 48, "dim": 96}, {"hidden_size": "dim"}),
    ("distilbert", {"num_hidden_layers": 3, "n_layers": 2}, {"num_hidden_layers": "n_layers"}),
    ("distilbert", {"num_attention_heads": 6, "n_heads": 2}, {"num_attention_heads": "n_heads"}),
    (
        "t5",
        {**T5, "num_hidden_layers": 3},
        {"num_encoder_layers": "num_layers", "num_hidden_layers": "num_decoder_layers"},
    ),
    ("t5", {**T5, "head_dim": 8, "d_kv": 4}, {"head_dim": "d_kv"}),
    ("t5", {**T5, "hidden_size": 48}, {"hidden_size": "d_model"}),
    (
        "bart",
        {**BART, "num_hidden_layers": 4, "encoder_layers": 2},
        {"num_encoder_layers": "encoder_layers", "num_hidden_layers": "decoder_layers"},
    ),
    (
        "marian",
        {**BART, "num_attention_heads": 4, "encoder_attention_heads": 2},
        {
            "encoder_attention_heads": "encoder_attention_heads",
            "num_attention_heads": "decoder_attention_heads",
        },
    ),
    ("bart", {**BART, "hidden_size": 16}, {"hidden_size": "d_model"}),
    ("mistral", {**SIZES, "sliding_window": 4, "use_sliding_window": False}, {}),
    ("qwen2", {**QWEN, "use_sliding_window": False}, {}),
    ("qwen2", {**QWEN, "use_sliding_window": True}, {"layer_types": "layer_types"}),
    (
        "qwen3",
        {
            **QWEN,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"layer_types": "layer_types"},
    ),
    ("llama", {**SIZES, "hidden_act": "relu", "activation_function": "gelu"}, {}),
    ("bert", {**BERT, "num_labels": 3, "id2label": {"0": "a", "1": "b"}}, {}),
    ("bert", {**BERT, "num_labels": 2, "id2label": {"0": "a", "1": "b"}}, {}),
    ("bert", {**BERT, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"z": 0}}, {}),
    ("bert", {**BERT, "layer_norm_epsilon": 0.1, "layer_norm_eps": 0.2}, {}),
    ("bert", {**BERT, "layer_norm_epsilon": 0.1}, {}),
]


@pytest.mark.parametrize(("model_type", "document", "options"), BOTH, ids=str)
def test_the_value_is_that_of_transformers(model_type, document, options):
    theirs = type(transformers.AutoConfig.for_model(model_type)).from_dict(dict(document))
    ours = read_config({**document, "model_type": model_type}, "here")[1]
    for option, key in options.items():
        expected = getattr(theirs, key)
        found = getattr(ours, option)
        assert (list(found) if isinstance(found, tuple) else found) == expected, option
    if hasattr(theirs, "sliding_window"):
        assert (ours.sliding_window or None) == theirs.sliding_window
    if model_type in ("llama", "mistral", "qwen2", "qwen3"):
        assert ours.hidden_act == theirs.hidden_act
    if model_type == "bert":
        assert list(ours.labels) == list(theirs.id2label.values())
        assert ours.norm_eps == theirs.layer_norm_eps


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": LINEAR, "rope_parameters": ROPE},
        {"rope_scaling": LINEAR, "rope_parameters": ROPE, "rope_theta": 5.0},
        {"rope_scaling": YARN, "rope_parameters": ROPE, "rope_theta": 5.0},
        {"rope_scaling": {}, "rope_parameters": ROPE, "rope_theta": 5.0},
        {"rope_scaling": None, "rope_parameters": ROPE, "rope_theta": 5.0},
        {"rope_scaling": {**LINEAR, "type": "dynamic"}},
        {"rope_scaling": ROPE, "rope_parameters": {**ROPE, **LINEAR}},
        {"rope_theta": 5.0, "rope_parameters": ROPE},
        {"rope_theta": 5.0, "rope_parameters": LINEAR},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_rotary_positions(model_type, rope, small_tokenizer, randomize, tmp_path, difference):
    extra = {"rotary_pct": 0.5, "rotary_emb_base": 9.0} if model_type == "gpt_neox" else {}
    document = {**SIZES, **extra, **rope}
    theirs = randomize(
        transformers.AutoModelForCausalLM.from_config(
            type(transformers.AutoConfig.for_model(model_type)).from_dict(
                json.loads(json.dumps(document))
            )
        )
    )
    theirs.save_pretrained(tmp_path)
    small_tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta"):
        saved.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**saved, **extra, **rope}))
    ids = torch.arange(40)[None] * 7 % 400
    with torch.inference_mode():
        found = checkpoints.load(tmp_path).model(ids)
        assert difference(found, theirs(ids).logits) < 1e-5


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases at {CASES}")
def test_rope_scaling_that_a_card_tells_people_to_add(
    small_tokenizer, randomize, tmp_path, difference
):
    document = json.loads((CASES / "rope-both.config.json").read_text())
    config = transformers.LlamaConfig.from_dict(dict(document))
    theirs = randomize(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    small_tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(document))
    ids = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = checkpoints.load(tmp_path).model(ids)
        assert difference(found, theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "document", "message"),
    [
        (
            "t5",
            {**T5, "feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"},
            "dense_act_fn 'relu' contradicts feed_forward_proj 'gated-gelu'",
        ),
        (
            "t5",
            {**T5, "feed_forward_proj": "gated-gelu", "is_gated_act": False},
            "is_gated_act False contradicts feed_forward_proj 'gated-gelu'",
        ),
        ("llama", {**SIZES, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        (
            "qwen2",
            {**SIZES, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not",
        ),
        (
            "modernbert",
            {**SIZES, "rope_scaling": LINEAR},
            "rope type 'linear' of sliding_attention is not supported",
        ),
        (
            "modernbert",
            {**SIZES, "rope_parameters": ROPE},
            "rope_parameters holds no object for each type of layer",
        ),
    ],
    ids=str,
)
def test_what_is_refused(model_type, document, message):
    with pytest.raises(UserError, match=message):
        read_config({**document, "model_type": model_type}, "here")


def test_modernbert_takes_the_window_of_one_side(tmp_path):
    document = {**SIZES, "local_attention": 10, "sliding_window": 33}
    theirs = transformers.ModernBertConfig.from_dict(dict(document))
    ours = read_config({**document, "model_type": "modernbert"}, "here")[1]
    assert 2 * ours.sliding_window == theirs.local_attention == 66


def test_t5_may_repeat_its_activation():
    for proj, act, gated in (("gated-gelu", "gelu_new", True), ("relu", "relu", False)):
        document = {"feed_forward_proj": proj, "dense_act_fn": act, "is_gated_act": gated}
        config = read_config({**T5, **document, "model_type": "t5"}, "here")[1]
        assert (config.hidden_act, config.gated_mlp) == (act, gated)
