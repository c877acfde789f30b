"""Adapter folders: round trips, the names in them, export, and errors that name the fault."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcli.checkpoints import adapter_base, adapter_folder, export, folder
from lmcli.config import GenerateConfig, TrainConfig
from lmcli.errors import UsageError, UserError
from lmcli.evaluation import signature
from lmcli.model.lora import LoraEmbedding, adapters_of
from lmcli.output import info
from lmcli.runs.initial_model import set_trainable

GPT2 = {
    "norm": "layer",
    "gated_mlp": False,
    "mlp_bias": True,
    "attention_bias": "all",
    "positions": "learned",
    "query_key_norm": False,
    "hidden_act": "gelu_new",
    "num_key_value_heads": 4,
}

UNTIED = {"tie_word_embeddings": False}
EVERYWHERE = ("all", "embedding", "head")


@pytest.fixture
def make(small_model, small_tokenizer, tmp_path):
    """make(**TrainConfig): (a model with adapters that are not zero, the adapter's folder).

    The base model is in the folder `base` next to it.
    """

    def build(options=None, **train):
        (tmp_path / "base").mkdir()
        (tmp_path / "adapter").mkdir()
        folder.save(
            tmp_path / "base", small_model(**(options or {})), small_tokenizer, GenerateConfig()
        )
        model = folder.load(tmp_path / "base").model
        set_trainable(model, TrainConfig(**{"lora_rank": 3, **train}))
        with torch.no_grad():
            for adapter in adapters_of(model).values():
                zero = adapter.lora_a if isinstance(adapter, LoraEmbedding) else adapter.lora_b
                zero.normal_(generator=torch.Generator().manual_seed(len(zero)))
        folder.save(
            tmp_path / "adapter",
            model.eval(),
            small_tokenizer,
            GenerateConfig(temperature=0.3),
            str(tmp_path / "base"),
        )
        return model, tmp_path / "adapter"

    return build


def options(path) -> dict:
    return json.loads((path / adapter_folder.ADAPTER_CONFIG).read_text())


def change(path, **values) -> None:
    (path / adapter_folder.ADAPTER_CONFIG).write_text(json.dumps({**options(path), **values}))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(20)[None])


@pytest.mark.parametrize("targets", [("all",), EVERYWHERE, ("embedding",)], ids=str)
@pytest.mark.parametrize("shape", [{}, GPT2], ids=["qwen3", "gpt2"])
def test_a_saved_adapter_loads_as_the_same_model(make, shape, targets):
    """To the bit, so a run's evaluations equal those of its folder."""
    model, path = make(
        {**shape, **(UNTIED if "embedding" in targets else {})}, lora_targets=targets
    )
    loaded = folder.load(path)
    assert torch.equal(logits(loaded.model), logits(model)) and not adapters_of(loaded.model)
    assert loaded.generate.temperature == 0.3
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "shape, train, names",
    [
        ({}, {}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ({}, {"lora_targets": ("query",)}, ["q_proj"]),
        (
            {},
            {"lora_targets": ("query", "down"), "frozen_layers": 1},
            ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"],
        ),
        (GPT2, {}, ["c_attn", "c_fc", "c_proj"]),
        (GPT2, {"lora_targets": ("down",)}, ["mlp.c_proj"]),
        (GPT2, {"lora_targets": ("query", "value")}, ["c_attn"]),
        (
            UNTIED,
            {"lora_targets": ("embedding", "head", "query")},
            ["embed_tokens", "lm_head", "q_proj"],
        ),
        (
            {**GPT2, **UNTIED},
            {"lora_targets": ("all", "embedding", "head")},
            ["c_attn", "c_fc", "c_proj", "lm_head", "wte"],
        ),
        (
            UNTIED,
            {"lora_targets": ("embedding", "head", "query"), "frozen_layers": 1},
            ["lm_head", "model.layers.1.self_attn.q_proj"],
        ),
    ],
    ids=str,
)
def test_targets_have_the_names_of_the_family(make, shape, train, names):
    model, path = make(shape, **train)
    assert options(path)["target_modules"] == names
    assert (
        options(path)["fan_in_fan_out"] == ("norm" in shape)
        and options(path)["task_type"] == "CAUSAL_LM"
    )
    assert torch.equal(logits(folder.load(path).model), logits(model))


def test_embedding_and_head_have_the_names_of_peft(make):
    _, path = make(UNTIED, lora_targets=("embedding", "head"), lora_dropout=0.1)
    assert {
        name: tuple(tensor.shape)
        for name, tensor in load_file(path / adapter_folder.ADAPTER_WEIGHTS).items()
    } == {
        "base_model.model.model.embed_tokens.lora_embedding_A": (3, 401),
        "base_model.model.model.embed_tokens.lora_embedding_B": (32, 3),
        "base_model.model.lm_head.lora_A.weight": (3, 32),
        "base_model.model.lm_head.lora_B.weight": (401, 3),
    }
    assert options(path)["lora_dropout"] == 0.1


def test_base_layers_stored_by_peft_replace_those_of_the_base(make):
    """With adapters of embedding and head PEFT also stores the matrices that they add to."""
    model, path = make(UNTIED, lora_targets=("embedding",))
    stored, matrix = (
        load_file(path / adapter_folder.ADAPTER_WEIGHTS),
        model.embedding.weight.detach() + 1,
    )
    save_file(
        {**stored, "base_model.model.model.embed_tokens.base_layer.weight": matrix},
        path / adapter_folder.ADAPTER_WEIGHTS,
    )
    with torch.no_grad():
        model.embedding.weight += 1
    assert torch.equal(logits(folder.load(path).model), logits(model))
    assert info.describe(path).facts["adapter"]["parameters"] == 3 * (401 + 32)


def test_alpha_is_twice_the_rank_by_default(make):
    _, path = make(lora_dropout=0.25)
    assert (options(path)["r"], options(path)["lora_alpha"], options(path)["lora_dropout"]) == (
        3,
        6,
        0.25,
    )


def test_a_folder_without_a_tokenizer_uses_that_of_the_base(make):
    model, path = make()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).unlink()
    loaded = folder.load(path)
    assert torch.equal(logits(loaded.model), logits(model)) and loaded.generate.temperature == 0.8


def test_a_model_with_an_adapter_in_its_folder_is_its_own_base(make, tmp_path):
    """As in transformers."""
    model, path = make()
    for name in (adapter_folder.ADAPTER_CONFIG, adapter_folder.ADAPTER_WEIGHTS):
        shutil.copy(path / name, tmp_path / "base")
    change(tmp_path / "base", base_model_name_or_path="nowhere/at-all")
    assert torch.equal(logits(folder.load(tmp_path / "base").model), logits(model))


def test_a_model_hash_depends_on_adapter_and_base(make, tmp_path):
    _, path = make()
    first = signature.model_hash(path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        tmp_path / "base" / "model.safetensors",
    )
    second = signature.model_hash(path)
    change(path, lora_alpha=1)
    assert len({first, second, signature.model_hash(path)}) == 3


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"base_model_name_or_path": "/no/such/folder"},
            "its base model is missing: /no/such/folder",
        ),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"revision": "v2"}, "revision 'v2' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"shiny_new_option": 3}, "shiny_new_option 3 is not supported"),
        ({"lora_alpha": "big"}, "lora_alpha: 'big' is not a number"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj: None is not a number"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS is not supported for qwen3"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(make, values, message):
    _, path = make()
    change(path, **values)
    with pytest.raises(UserError, match=message) as caught:
        folder.load(path)
    assert caught.value.where == str(path / adapter_folder.ADAPTER_CONFIG)


def test_a_base_that_is_an_adapter_is_an_error(make, tmp_path):
    _, path = make()
    shutil.copytree(path, tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(path))
    with pytest.raises(
        UserError,
        match=r"is an adapter itself\n  merge it first: lm export .*adapter --merge -o DIR",
    ):
        folder.load(tmp_path / "second")


def test_a_base_of_another_shape_is_an_error(make, small_model, small_tokenizer, tmp_path):
    _, path = make()
    folder.save(tmp_path / "base", small_model(hidden_size=16), small_tokenizer, GenerateConfig())
    with pytest.raises(
        UserError, match=r"of model\.layers\.0\..* do not fit the matrix .* of its base .*base"
    ):
        folder.load(path)
    folder.save(
        tmp_path / "base", small_model(num_hidden_layers=1), small_tokenizer, GenerateConfig()
    )
    with pytest.raises(UserError, match=r"has model\.layers\.1\..*, which its base .*base lacks"):
        folder.load(path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda path: (path / adapter_folder.ADAPTER_WEIGHTS).write_bytes(b"nothing"),
            "is damaged or no safetensors file",
        ),
        (
            lambda path: (path / adapter_folder.ADAPTER_WEIGHTS).unlink(),
            "holds no adapter_model.safetensors",
        ),
        (lambda path: (path / adapter_folder.ADAPTER_CONFIG).write_text("{"), "is not JSON"),
    ],
    ids=["weights", "no weights", "options"],
)
def test_a_damaged_file_is_named(make, damage, message):
    _, path = make()
    damage(path)
    with pytest.raises(UserError, match=message):
        folder.load(path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"x.lora_magnitude_vector": (2, 2)}, "has an unsupported tensor: x.lora_magnitude_vector"),
        (
            {"model.embed_tokens.lora_embedding_A": (2, 2)},
            "has no model.embed_tokens.lora_embedding_B",
        ),
        (
            {
                "model.embed_tokens.lora_embedding_A": (2, 2),
                "model.embed_tokens.lora_embedding_B": (2, 2),
            },
            "of model.embed_tokens do not fit the matrix",
        ),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": None},
            "has no model.layers.0.mlp.up_proj.lora_A.weight",
        ),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": None},
            "has no model.layers.0.mlp.up_proj.lora_B.weight",
        ),
        (
            {"base_model.model.strange.weight": (2,)},
            "has a tensor that qwen3 does not have: strange.weight",
        ),
    ],
    ids=str,
)
def test_unexpected_tensors_are_named(make, tensors, message):
    _, path = make()
    stored = load_file(path / adapter_folder.ADAPTER_WEIGHTS)
    changed = {**stored, **{name: torch.ones(shape) for name, shape in tensors.items() if shape}}
    save_file(
        {name: tensor for name, tensor in changed.items() if tensors.get(name, 1)},
        path / adapter_folder.ADAPTER_WEIGHTS,
    )
    with pytest.raises(UserError, match=message):
        folder.load(path)


class TestExport:
    def test_a_merged_model_equals_the_adapted_one(self, make, tmp_path):
        model, path = make()
        export.export(path, tmp_path / "whole", torch.float32, merge=True)
        loaded = folder.load(tmp_path / "whole")
        assert (
            torch.equal(logits(loaded.model), logits(model)) and loaded.generate.temperature == 0.3
        )
        assert not adapter_base.is_adapter(tmp_path / "whole")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_weights_have_the_dtype(self, make, tmp_path, dtype):
        make()
        export.export(tmp_path / "base", tmp_path / "half", dtype, merge=False)
        stored, whole = (
            load_file(tmp_path / name / "model.safetensors") for name in ("half", "base")
        )
        assert all(torch.equal(tensor, whole[name].to(dtype)) for name, tensor in stored.items())
        assert (
            json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"]
            == str(dtype)[6:]
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / "half" / name).read_bytes() == (
                tmp_path / "base" / name
            ).read_bytes()

    def test_chat_templates_travel_along(self, make, tmp_path):
        from transformers import AutoTokenizer

        _, path = make()
        more = tmp_path / "base" / "additional_chat_templates"
        more.mkdir()
        (more / "tools.jinja").write_text("tools")
        (tmp_path / "base" / "chat_template.jinja").write_text("of the base")
        export.export(tmp_path / "base", tmp_path / "half", torch.float16, merge=False)
        assert AutoTokenizer.from_pretrained(tmp_path / "half").chat_template == {
            "default": "of the base",
            "tools": "tools",
        }
        (path / "chat_template.jinja").write_text("of the adapter")
        export.export(path, tmp_path / "whole", torch.float32, merge=True)
        whole = folder.load(tmp_path / "whole").tokenizer
        assert whole.settings["chat_template"] == "of the adapter"

    def test_numbers_too_large_for_float16_are_named(self, make, tmp_path):
        make()
        weights = load_file(tmp_path / "base" / "model.safetensors")
        weights["model.norm.weight"][0] = 1e5
        save_file(weights, tmp_path / "base" / "model.safetensors")
        with pytest.raises(
            UserError, match=r"decoder\.norm\.weight holds 1e\+05, more than float16 can \(65,504\)"
        ):
            export.export(tmp_path / "base", tmp_path / "half", torch.float16, merge=False)
        assert not (tmp_path / "half").exists()

    def test_merge_needs_an_adapter_and_an_adapter_needs_merge(self, make, tmp_path):
        _, path = make()
        with pytest.raises(UsageError, match="holds no adapter to merge"):
            export.export(tmp_path / "base", tmp_path / "out", torch.float32, merge=True)
        with pytest.raises(UsageError, match=r"is an adapter.*\n  --merge makes one model of both"):
            export.export(path, tmp_path / "out", torch.float32, merge=False)

    @pytest.mark.parametrize("name", ["base", "adapter", "."])
    def test_export_never_replaces_a_folder_it_reads(self, make, tmp_path, name):
        _, path = make()
        with pytest.raises(UsageError, match="is where the model is read from"):
            export.export(path, tmp_path / name, torch.float32, merge=True)
        assert folder.load(path)
