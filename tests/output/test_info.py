"""Summaries: parts that add up, independent counts, and what is reported on damaged folders."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.errors import UserError
from lmcli.output.info import describe
from lmcli.text import tokenizer as tokenizers

SIZES = {
    "vocab_size": 409,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
BART = {
    "vocab_size": 409,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}
ARCHITECTURES = {  # → (configuration, shape)
    "LlamaForCausalLM": ({**SIZES, "num_key_value_heads": 2}, "decoder"),
    "MistralForCausalLM": (
        {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "sliding_window": 8},
        "decoder",
    ),
    "Qwen2ForCausalLM": ({**SIZES, "num_key_value_heads": 2}, "decoder"),
    "Qwen3ForCausalLM": ({**SIZES, "num_key_value_heads": 2, "head_dim": 6}, "decoder"),
    "GPTNeoXForCausalLM": ({**SIZES, "rotary_pct": 1.0}, "decoder"),
    "GPT2LMHeadModel": (
        {"vocab_size": 409, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "decoder",
    ),
    "BertForSequenceClassification": (SIZES, "encoder"),
    "BertModel": (SIZES, "encoder"),
    "BertForMaskedLM": (SIZES, "encoder"),
    "RobertaForTokenClassification": ({**SIZES, "num_labels": 3}, "encoder"),
    "DistilBertForQuestionAnswering": (
        {
            "vocab_size": 409,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 64,
        },
        "encoder",
    ),
    "ModernBertForMaskedLM": ({**SIZES, "num_hidden_layers": 3, "pad_token_id": 0}, "encoder"),
    "T5ForConditionalGeneration": (
        {"vocab_size": 409, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        "encoder-decoder",
    ),
    "BartForConditionalGeneration": (BART, "encoder-decoder"),
    "MarianMTModel": ({**BART, "pad_token_id": 0, "decoder_start_token_id": 0}, "encoder-decoder"),
}


@pytest.fixture(scope="module")
def random_model(small_tokenizer, tmp_path_factory):
    """random_model(architecture): (model of transformers, its folder with our small tokenizer)."""
    import transformers

    models = {}

    def build(name):
        if name not in models:
            kind, folder = getattr(transformers, name), tmp_path_factory.mktemp(name)
            model = kind(
                kind.config_class(**ARCHITECTURES[name][0], eos_token_id=0, bos_token_id=0)
            )
            model.save_pretrained(folder)
            small_tokenizer.save(folder)
            models[name] = model, folder
        return models[name]

    return build


@pytest.fixture
def copy(random_model, tmp_path):
    """copy(architecture, files={name: content or None}, tensors=change): a changed folder."""

    def build(name="LlamaForCausalLM", files=(), tensors=None):
        folder = shutil.copytree(random_model(name)[1], tmp_path / "copy")
        for file, content in dict(files).items():
            (folder / file).unlink(missing_ok=True)
            if content is not None:
                (folder / file).write_bytes(content)
        if tensors:
            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors")
        return folder

    return build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parameters_of_every_family_add_up(random_model, name):
    model, folder = random_model(name)
    summary = describe(folder)
    facts = summary.facts
    assert summary.damage == [] and (facts["kind"], facts["architecture"], facts["shape"]) == (
        "model",
        name,
        ARCHITECTURES[name][1],
    )
    counts = facts["parameters"]
    # transformers counts computed positions (Marian) and leaves out a bias that is a buffer (BART)
    computed = sum(
        weight.numel()
        for key, weight in model.named_parameters()
        if name.startswith("Marian") and "embed_positions" in key
    )
    buffers = sum(
        buffer.numel() for key, buffer in model.named_buffers() if key == "final_logits_bias"
    )
    assert (
        counts["total"] == sum(weight.numel() for weight in model.parameters()) - computed + buffers
    )
    assert counts["total"] == sum(
        counts.get(part, 0) for part in ("embedding", "encoder", "decoder", "head")
    )
    assert counts["attention"] and counts["mlp"] and counts["norm"] < counts["mlp"]
    assert ("cross_attention" in counts) == (ARCHITECTURES[name][1] == "encoder-decoder")
    assert facts["weights"]["unused"] == facts["weights"]["missing"] == []
    assert (
        facts["weights"]["files"] == ["model.safetensors"]
        and "float32" in facts["weights"]["dtypes"]
    )
    assert facts["weights"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert facts["memory"] == {
        "float32": 4 * counts["total"],
        "bfloat16": 2 * counts["total"],
        "float16": 2 * counts["total"],
    }


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("LlamaForCausalLM", 2 * 2 * 2 * 6),
        ("GPT2LMHeadModel", 2 * 2 * 24),
        ("BartForConditionalGeneration", 2 * 2 * 24),
        ("BertForMaskedLM", None),
    ],
)
def test_the_cache_size_matches_the_allocated_cache(random_model, name, numbers):
    import torch

    from lmcli.model.attention import KeyValueCache

    folder = random_model(name)[1]
    cache_bytes = describe(folder).facts.get("cache_bytes_per_token")
    assert cache_bytes == (
        numbers and {"float32": 4 * numbers, "bfloat16": 2 * numbers, "float16": 2 * numbers}
    )
    if numbers:
        cache = KeyValueCache(
            checkpoints.load(folder).model.config, 1, 10, torch.device("cpu"), torch.float32
        )
        assert (cache.keys.numel() + cache.values.numel()) * 4 == 10 * cache_bytes["float32"]


def test_shards_and_half_precision_are_read_from_their_headers(
    random_model, tmp_path, small_tokenizer
):
    import torch

    random_model("LlamaForCausalLM")[0].to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    random_model("LlamaForCausalLM")[0].float()
    small_tokenizer.save(tmp_path)
    facts = describe(tmp_path).facts
    assert len(facts["weights"]["files"]) > 2 and facts["weights"]["missing"] == []
    assert facts["weights"]["dtypes"] == {"bfloat16": facts["parameters"]["total"]}


def test_the_labels_of_a_classifier_are_listed(random_model):
    facts = describe(random_model("BertForSequenceClassification")[1]).facts
    assert (facts["head"], facts["multi_label"]) == ("a label of the text", False)
    assert facts["labels"] == ["LABEL_0", "LABEL_1"]


class TestTokenizers:
    def test_our_own(self, small_tokenizer, tmp_path):
        small_tokenizer.save(tmp_path)
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            facts = describe(path).facts
            assert facts["kind"] == "tokenizer"
            assert facts["tokenizer"] == {
                "kind": "byte-level BPE",
                "ids": 400,
                "template": "<|endoftext|> …",
                "roles": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
                "special": {"<|endoftext|>": 0},
                "chat_template": False,
            }

    @pytest.mark.parametrize(
        "path, kind, ids, template",
        [
            ("tokenizers/bert-minilm", "WordPiece", 30_522, "[CLS] … [SEP]"),
            ("tokenizers/gpt2", "byte-level BPE", 50_257, "…"),
            ("models/stories260K/tokenizer.json", "BPE with byte fallback", 512, "<s> …"),
        ],
    )
    def test_published_tokenizers(self, shared, path, kind, ids, template):
        if path.endswith("minilm"):
            path += "/tokenizer.json"  # its folder holds a config.json too
        facts = describe(shared / path).facts["tokenizer"]
        assert (facts["kind"], facts["ids"], facts["template"]) == (kind, ids, template)

    def test_a_file_that_is_not_a_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        summary = describe(tmp_path / "tokenizer.json")
        assert "tokenizer" not in summary.facts and "is no tokenizer" in summary.damage[0].what

    def test_no_torch_is_loaded(self, small_tokenizer, tmp_path):
        small_tokenizer.save(tmp_path)
        program = (
            "import sys\nfrom lmcli.commands import run\n"
            f"assert run(['info', {str(tmp_path / 'tokenizer.json')!r}]) == 0\n"
            "assert 'torch' not in sys.modules"
        )
        assert (
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, timeout=60
            ).returncode
            == 0
        )


class TestDamage:
    def test_missing_and_unused_weights_are_all_named(self, copy):
        def change(tensors):
            for name in [name for name in tensors if name.startswith("classifier.")]:
                del tensors[name]
            tensors["cls.predictions.bias"] = tensors["bert.embeddings.LayerNorm.bias"].clone()

        summary = describe(copy("BertForSequenceClassification", tensors=change))
        assert summary.facts["weights"]["missing"] == ["classifier.weight", "classifier.bias"]
        assert summary.facts["weights"]["unused"] == ["cls.predictions.bias"]
        assert [error.what for error in summary.damage] == ["has no tensor classifier.weight"]
        assert summary.facts["parameters"]["total"] and summary.facts["tokenizer"]["ids"] == 400

    def test_an_unused_tensor_is_no_damage(self, copy):
        folder = copy(
            "BertForSequenceClassification",
            tensors=lambda tensors: tensors.update(
                {"cls.predictions.bias": tensors["bert.embeddings.LayerNorm.bias"].clone()}
            ),
        )
        summary = describe(folder)
        assert summary.damage == [] and summary.facts["weights"]["unused"] == [
            "cls.predictions.bias"
        ]
        assert checkpoints.load(folder).unused == ["cls.predictions.bias"]

    def test_a_wrong_shape_is_reported_as_by_loading(self, copy):
        def change(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()

        self.same_as_loading(copy(tensors=change))

    @pytest.mark.parametrize(
        "files",
        [
            {"config.json": None},
            {"config.json": b"{"},
            {"config.json": b'{"model_type": "mamba"}'},
            {"tokenizer.json": None},
            {"tokenizer.json": b"nonsense"},
            {"model.safetensors": None},
            {"model.safetensors": b"nonsense" * 9},
            {"model.safetensors": None, "pytorch_model.bin": b"pickle"},
            {
                "model.safetensors": None,
                "model.safetensors.index.json": b'{"weight_map": {"a": "away.safetensors"}}',
            },
            {
                "model.safetensors": None,
                "model.safetensors.index.json": b'{"weight_map": {"a": "../away.safetensors"}}',
            },
            {"model.safetensors": None, "model.safetensors.index.json": b"{}"},
        ],
        ids=str,
    )
    def test_the_undamaged_parts_are_reported(self, copy, files):
        folder = copy(files=files)
        summary = self.refused(folder)
        # the kind of tokenizer depends on config.json: without a readable one there is none
        assert ("tokenizer" in summary.facts) == (
            "tokenizer.json" not in files and files.get("config.json") != b"{"
        )
        assert ("parameters" in summary.facts) == ("config.json" not in files)
        assert ("weights" in summary.facts and "bytes" in summary.facts["weights"]) == (
            "model.safetensors" not in files
        )

    def test_an_unknown_family_is_named(self, copy):
        summary = self.same_as_loading(
            copy(
                files={
                    "config.json": b'{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}'
                }
            )
        )
        assert (summary.facts["family"], summary.facts["architecture"]) == (
            "mamba",
            ["MambaForCausalLM"],
        )

    def test_a_pickle_is_refused_as_by_loading(self, copy):
        self.same_as_loading(
            copy(files={"model.safetensors": None, "pytorch_model.bin": b"pickle"})
        )

    def test_a_tokenizer_larger_than_the_model(self, copy):
        folder = copy("BertForMaskedLM")
        document = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100}
        (folder / "config.json").write_text(json.dumps(document))
        assert "has 400 ids, the model has 100 rows" in self.refused(folder).damage[-1].what

    def refused(self, folder):
        summary = describe(folder)
        assert summary.damage and all(
            error.where and "\n" not in error.what for error in summary.damage
        )
        with pytest.raises(UserError):
            checkpoints.load(folder)
        return summary

    def same_as_loading(self, folder):
        summary = self.refused(folder)
        with pytest.raises(UserError) as caught:
            checkpoints.load(folder)
        assert [str(error) for error in summary.damage] == [str(caught.value)]
        return summary

    def test_other_paths_are_refused(self, tmp_path):
        for path, message in (
            (tmp_path / "nowhere", "no such file"),
            (tmp_path, "holds neither a model"),
        ):
            with pytest.raises(UserError, match=message):
                describe(path)


TEXTS = [
    "",
    "\n",
    "a",
    "a b\n\nc",
    "Köln \u2028 你好\r\nx\n",
    " spaces  at both ends ",
    "word" * 100_000 + " x\n",
    "é " * 200_000,
]


class TestTexts:
    @pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
    def test_counts(self, tmp_path, text, small_tokenizer):
        file = tmp_path / "a.txt"
        file.write_bytes(text.encode())
        facts = describe(file, small_tokenizer).facts
        assert (facts["bytes"], facts["characters"], facts["words"]) == (
            len(text.encode()),
            len(text),
            len(text.split()),
        )
        assert facts["lines"] == text.count("\n") + bool(text and not text.endswith("\n"))
        if text.strip():
            assert facts["tokens"] == len(small_tokenizer.encode(text.replace("\r\n", "\n")))

    @pytest.mark.parametrize(
        "data, line",
        [
            (b"a\nb\xff\n", 2),
            (b"\xc3", 1),
            (b"a\n" * 200_000 + b"\xff" + b"b\n" * 200_000, 200_001),
        ],
        ids=["two", "open", "long"],
    )
    def test_bytes_that_are_not_utf8(self, tmp_path, data, line):
        (tmp_path / "a").write_bytes(data)
        summary = describe(tmp_path / "a")
        assert summary.facts["bytes"] == len(data) and "words" not in summary.facts
        assert summary.damage[0].what == f"is not text: invalid UTF-8 in line {line}"

    def test_rows(self, tmp_path, small_tokenizer):
        (tmp_path / "a.jsonl").write_text(
            '{"id": 1, "text": "a b"}\n{"id": 2}\n{"id": 3, "text": "c"}\n'
        )
        facts = describe(tmp_path / "a.jsonl", small_tokenizer).facts
        assert (facts["fields"], facts["records"], facts["bad_records"], facts["words"]) == (
            ["id", "text"],
            2,
            1,
            3,
        )
        assert facts["tokens"] == sum(len(small_tokenizer.encode(text)) for text in ("a b", "c"))
        (tmp_path / "b.tsv").write_text("id\tsay\n1\tx y\n")
        facts = describe(tmp_path / "b.tsv", fields=("say",)).facts
        assert (facts["fields"], facts["records"], facts["words"], facts["lines"]) == (
            ["id", "say"],
            1,
            2,
            2,
        )

    def test_a_folder_of_texts(self, tmp_path):
        for name in ("a.txt", "b.md"):
            (tmp_path / name).write_text("one two\n")
        (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
        facts = describe(tmp_path).facts
        assert (
            facts["kind"],
            facts["files"],
            facts["left_out"],
            facts["lines"],
            facts["words"],
        ) == ("corpus", 2, 1, 2, 4)

    def test_tokenizers_and_weights_are_not_texts(self, tmp_path, small_tokenizer, random_model):
        small_tokenizer.save(tmp_path)
        (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
        assert describe(tmp_path / "other.json").facts["kind"] == "tokenizer"
        assert describe(tmp_path / "tokenizer_config.json").facts["kind"] == "text"
        facts = describe(random_model("LlamaForCausalLM")[1] / "model.safetensors").facts
        assert facts["kind"] == "weights" and facts["weights"]["tensors"] > 10


def test_tokens_of_a_text_match_those_of_perplexity(tmp_path, shared, random_model):
    from lmcli import api

    file = tmp_path / "a.txt"
    file.write_text((shared / "text" / "wikitext-2-test.txt").read_text()[:20_000])
    model = api.load(random_model("LlamaForCausalLM")[1], device="cpu")
    tokens = describe(file, tokenizers.load(random_model("LlamaForCausalLM")[1])).facts["tokens"]
    assert tokens == model.perplexity(file.read_text()).tokens
