"""Every checkpoint family and head against transformers: hidden states, logits, saved folders."""

import json
import re

import pytest
import torch
import transformers
from random_checkpoints import (
    CASES,
    FAMILIES,
    Case,
    batch,
    differences,
    fill,
    forward,
    pair,
    steps,
    write,
)
from safetensors.torch import load_file, save_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import read_config
from lmcli.errors import UserError
from lmcli.model.attention import KeyValueCache
from lmcli.model.transformer import Transformer

BOUND = 1e-5
# each family's first head with its first options
FIRST = {case.family: case for case in reversed(CASES)}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """checkpoint_of(case): the checkpoint of a case, loaded by lm and transformers; cached."""
    pairs = {}

    def get(case: Case):
        if case not in pairs:
            pairs[case] = pair(case, tmp_path_factory.mktemp("case"), checkpoints.load)
        return pairs[case]

    return get


def assert_same(case, ours, theirs, paddings=None) -> None:
    for padding in paddings or case.paddings:
        for layer, error in differences(case, ours, theirs, padding).items():
            assert error <= BOUND, (
                f"{case}, padding {padding}: first differs at {layer}, by {error:.1e}"
            )


def change(folder, **values) -> None:
    """Sets keys of config.json; `...` deletes one."""
    document = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in document.items() if value is not ...})
    )


def change_tensors(folder, edit) -> None:
    """Replaces the tensors of a folder by edit(tensors)."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


@pytest.fixture
def reread(tmp_path):
    """reread(case, edit, **values): (checkpoint, model of transformers) from an edited folder.

    `edit` changes the tensors, `values` keys of config.json. The class in transformers is the
    case's, whatever config.json says.
    """

    def read(case: Case, edit=None, **values):
        theirs = case.model()
        write(tmp_path, theirs)
        change(tmp_path, **values)
        if edit is not None:
            change_tensors(tmp_path, edit)
        return checkpoints.load(tmp_path), type(theirs).from_pretrained(
            tmp_path, dtype=torch.float32
        ).eval()

    return read


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEachFamilyAndHead:
    def test_hidden_states_and_logits_equal_those_of_transformers(self, case, checkpoint_of):
        both = checkpoint_of(case)
        assert both.checkpoint.unused == []
        assert_same(case, both.ours, both.theirs)

    def test_transformers_loads_what_we_save(self, case, checkpoint_of, tmp_path):
        both = checkpoint_of(case)
        checkpoint = both.checkpoint
        checkpoints.save(tmp_path, both.ours, checkpoint.tokenizer, checkpoint.generate)
        theirs, loading = type(both.theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values()), loading
        assert theirs.config.architectures == both.theirs.config.architectures
        assert_same(case, both.ours, theirs.eval())

    def test_saving_and_loading_gives_identical_bits(self, case, checkpoint_of, tmp_path):
        both = checkpoint_of(case)
        checkpoint = both.checkpoint
        checkpoints.save(tmp_path, both.ours, checkpoint.tokenizer, checkpoint.generate)
        again = checkpoints.load(tmp_path)
        assert again.model.config == both.ours.config
        assert again.unused == []
        before, after = both.ours.state_dict(), again.model.state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )

    def test_the_plain_attention_gives_the_same(self, case, checkpoint_of):
        ours = checkpoint_of(case).ours
        plain = Transformer(ours.config).eval()
        plain.load_state_dict(ours.state_dict())
        for padding in case.paddings:
            inputs = batch(case, padding, checkpoint_of(case).theirs.config)
            token_mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            with torch.inference_mode():
                fast = forward(ours, inputs)
                slow = forward(plain, inputs)
            by_token = fast.ndim == 3 and case.shape != "encoder-decoder"
            torch.testing.assert_close(
                slow[token_mask] if by_token else slow,
                fast[token_mask] if by_token else fast,
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 3]], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("case", [case for case in CASES if case.shape != "encoder"], ids=str)
def test_decoding_with_a_cache_equals_one_forward_pass(case, sizes, checkpoint_of, difference):
    both = checkpoint_of(case)
    for padding in case.paddings:
        inputs = batch(case, padding, both.theirs.config)
        ids = inputs.get("decoder_input_ids", inputs["input_ids"])
        length = ids.shape[1]
        chunks = sizes * length if sizes == [1] else [*sizes, length - sum(sizes)]
        cache = KeyValueCache(
            both.ours.config, len(ids), length, torch.device("cpu"), torch.float32
        )
        cached = torch.cat(list(steps(both.ours, inputs, chunks, cache)), dim=1)
        with torch.inference_mode():
            whole = forward(both.ours, inputs)
        token_mask = (
            inputs["attention_mask"].bool()
            if case.shape == "decoder" and padding != "none"
            else ...
        )
        assert difference(cached[token_mask], whole[token_mask]) < BOUND, padding


def test_a_difference_is_reported_with_its_first_layer(checkpoint_of):
    """Shows that the bounds above can fail, and say where."""
    case = FIRST["qwen3"]
    both = checkpoint_of(case)
    wrong = checkpoints.load(both.folder).model
    with torch.no_grad():
        wrong.decoder.layers[1].mlp.up.weight[:2] *= 1.01
    with pytest.raises(AssertionError, match="first differs at decoder layer 2"):
        assert_same(case, wrong, both.theirs)


class TestFiles:
    @pytest.mark.parametrize("case", FIRST.values(), ids=str)
    def test_shards_in_an_index(self, case, tmp_path):
        theirs = case.model()
        write(tmp_path, theirs, max_shard_size="8KB")
        assert (
            not (tmp_path / "model.safetensors").exists()
            and len(list(tmp_path.glob("model-*"))) > 2
        )
        assert_same(case, checkpoints.load(tmp_path).model, theirs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", FIRST.values(), ids=str)
    def test_half_precision_files_are_loaded_in_float32(self, case, dtype, tmp_path):
        theirs = case.model().to(dtype)
        write(tmp_path, theirs)
        assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
            dtype
        }
        ours = checkpoints.load(tmp_path).model
        assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
        assert_same(case, ours, type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval())

    @pytest.mark.parametrize(
        "case",
        [case for case in CASES if case == FIRST[case.family] or case.variant == "tied"],
        ids=str,
    )
    def test_a_tied_head_may_be_in_the_file_alone_or_twice_or_differ(self, case, reread):
        row = FAMILIES[case.family]
        head, embedding = (
            f"{row.file_module('head.output')}.weight",
            f"{row.file_module('embedding')}.weight",
        )
        edits = {
            "as well": lambda all: {**all, head: all[embedding]},
            "alone": lambda all: {(head if name == embedding else name): all[name] for name in all},
            "of its own": lambda all: {**all, head: all[embedding].flip(0)},
        }
        for name, edit in edits.items():
            checkpoint, theirs = reread(
                case,
                lambda all, edit=edit: edit({k: v for k, v in all.items() if k != head}),
                tie_word_embeddings=True,
            )
            assert checkpoint.model.config.tie_word_embeddings is (name != "of its own")
            assert checkpoint.unused == []
            assert_same(case, checkpoint.model, theirs, ["right"])

    def test_names_from_tensorflow(self, reread):
        def old(tensors):
            names = {
                name: re.sub(
                    r"(LayerNorm\.)weight$",
                    r"\1gamma",
                    re.sub(r"(LayerNorm\.)bias$", r"\1beta", name),
                )
                for name in tensors
            }
            assert sum(name.endswith(("gamma", "beta")) for name in names.values()) == 16
            return {names[name]: tensor for name, tensor in tensors.items()}

        case = FIRST["bert"]
        assert_same(case, *_models(reread(case, old)))

    def test_gpt2_as_first_published(self, reread):
        def old(tensors):
            bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            triangle = torch.ones(40, 40).tril()[None, None]
            return (
                bare
                | {f"h.{i}.attn.bias": triangle for i in range(3)}
                | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
            )

        case = FIRST["gpt2"]
        checkpoint, theirs = reread(case, old)
        assert checkpoint.unused == []
        assert_same(case, checkpoint.model, theirs)

    def test_gpt_neox_with_its_old_buffers(self, reread):
        def old(tensors):
            return tensors | {
                "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 9, 9).tril(),
                "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
            }

        checkpoint, theirs = reread(FIRST["gpt_neox"], old)
        assert checkpoint.unused == []
        assert_same(FIRST["gpt_neox"], checkpoint.model, theirs)

    @pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
    def test_bert_with_its_pretraining_heads(self, architecture, tmp_path):
        case = Case("bert", "lm", "plain")
        theirs = fill(transformers.BertForPreTraining(transformers.BertConfig(**case.options())))
        write(tmp_path, theirs)
        change(tmp_path, architectures=[architecture])
        change_tensors(
            tmp_path, lambda all: all | {"bert.embeddings.position_ids": torch.arange(40)[None]}
        )
        checkpoint = checkpoints.load(tmp_path)
        assert sorted(checkpoint.unused) == [
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "cls.seq_relationship.bias",
            "cls.seq_relationship.weight",
        ]
        assert_same(
            case, checkpoint.model, transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
        )

    @pytest.mark.parametrize(
        "case",
        [
            case
            for case in CASES
            if case.head == "none"
            and "pooler" in str(FAMILIES[case.family].head_tensors.get("none"))
        ],
        ids=str,
    )
    def test_a_bare_encoder_without_pooler(self, case, tmp_path):
        kind = getattr(transformers, FAMILIES[case.family].heads["none"])
        theirs = fill(kind(kind.config_class(**case.options()), add_pooling_layer=False))
        write(tmp_path, theirs)
        checkpoint = checkpoints.load(tmp_path)
        assert_same(case, checkpoint.model, theirs)
        checkpoints.save(tmp_path, checkpoint.model, checkpoint.tokenizer, checkpoint.generate)
        again, loading = kind.from_pretrained(
            tmp_path, add_pooling_layer=False, output_loading_info=True
        )
        assert not any(loading.values()), loading
        assert_same(case, checkpoint.model, again.eval())

    @pytest.mark.parametrize("case", [case for case in CASES if case.head == "none"], ids=str)
    def test_a_bare_encoder_may_have_the_prefix_of_other_heads(self, case, checkpoint_of, tmp_path):
        both = checkpoint_of(case)
        write(tmp_path, both.theirs)
        prefix = FAMILIES[case.family].prefix
        change_tensors(
            tmp_path, lambda all: {f"{prefix}{name}": tensor for name, tensor in all.items()}
        )
        assert_same(case, checkpoints.load(tmp_path).model, both.theirs)

    @pytest.mark.parametrize("family", ["t5", "bart", "marian"])
    @pytest.mark.parametrize("stacks", [("encoder", "decoder"), ("decoder",)], ids=str)
    def test_the_embedding_may_have_the_names_of_its_copies(self, family, stacks, reread):
        row = FAMILIES[family]
        shared, names = (
            f"{row.file_module('embedding')}.weight",
            [f"{name}.weight" for name in row.embedding_copies],
        )

        def copied(tensors):
            table = tensors.pop(shared)
            return tensors | {name: table for name in names if name.split(".")[-3] in stacks}

        checkpoint, theirs = reread(FIRST[family], copied)
        assert checkpoint.unused == []
        if len(stacks) == 1:  # transformers needs the name under which it shares the embedding
            theirs.set_input_embeddings(
                torch.nn.Embedding.from_pretrained(checkpoint.model.embedding.weight)
            )
            theirs.lm_head.weight = theirs.get_input_embeddings().weight
            theirs.get_encoder().embed_tokens.weight = theirs.get_decoder().embed_tokens.weight = (
                theirs.lm_head.weight
            )
        assert_same(FIRST[family], checkpoint.model, theirs)

    @pytest.mark.parametrize("family", ["t5", "bart", "marian"])
    def test_a_separate_embedding_for_a_stack_is_an_error(self, family, reread):
        row = FAMILIES[family]
        shared, copy = f"{row.file_module('embedding')}.weight", f"{row.embedding_copies[0]}.weight"
        with pytest.raises(UserError) as caught:
            reread(FIRST[family], lambda all: {**all, copy: all[shared].flip(0)})
        assert caught.value.what == f"{copy} differs from {shared}"

    def test_bart_without_a_head(self, tmp_path):
        case = FIRST["bart"]
        bare = fill(transformers.BartModel(transformers.BartConfig(**case.options())))
        write(tmp_path, bare)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BartModel"]
        theirs = transformers.BartForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert_same(case, checkpoints.load(tmp_path).model, theirs)

    def test_t5_1_1_as_transformers_5_saves_it_with_an_untied_head(self, tmp_path):
        case = Case("t5", "lm", "1.1")
        theirs = case.model()
        theirs.lm_head.weight = torch.nn.Parameter(theirs.shared.weight.detach().flip(0))
        write(tmp_path, theirs)
        document = json.loads((tmp_path / "config.json").read_text())
        assert (document["tie_word_embeddings"], document["scale_decoder_outputs"]) == (True, False)
        assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
        checkpoint = checkpoints.load(tmp_path)
        assert (
            not checkpoint.model.config.tie_word_embeddings
            and not checkpoint.model.config.scale_logits
        )
        assert_same(case, checkpoint.model, theirs)
        checkpoints.save(tmp_path, checkpoint.model, checkpoint.tokenizer, checkpoint.generate)
        assert_same(
            case, checkpoints.load(tmp_path).model, type(theirs).from_pretrained(tmp_path).eval()
        )

    def test_t5_1_1_as_published(self, reread):
        case = Case("t5", "lm", "1.1")
        checkpoint, theirs = reread(
            case,
            lambda all: {**all, "lm_head.weight": all["shared.weight"].flip(0)},
            tie_word_embeddings=False,
            scale_decoder_outputs=...,
        )
        assert (
            not checkpoint.model.config.tie_word_embeddings
            and not checkpoint.model.config.scale_logits
        )
        assert_same(case, checkpoint.model, theirs)


def _models(pair):
    checkpoint, theirs = pair
    return checkpoint.model, theirs


class TestConfigurations:
    @pytest.mark.parametrize("case", FIRST.values(), ids=str)
    def test_without_architectures_the_first_head_is_used(self, case, reread):
        assert_same(case, *_models(reread(case, architectures=...)), ["right"])

    @pytest.mark.parametrize(
        ("family", "variant", "old"),
        [
            (
                "llama",
                "linear",
                {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
            ),
            ("llama", "grouped", {"rope_theta": 50.0}),
            ("llama", "grouped", {"rope_theta": 50.0, "rope_scaling": None}),
            (
                "llama",
                "llama3",
                {
                    "rope_theta": 50.0,
                    "rope_scaling": {
                        "type": "llama3",
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 16,
                    },
                },
            ),
            (
                "llama",
                "yarn",
                {
                    "rope_theta": 50.0,
                    "rope_scaling": {
                        "type": "yarn",
                        "factor": 3.0,
                        "original_max_position_embeddings": 16,
                    },
                },
            ),
            (
                "llama",
                "yarn",
                {
                    "rope_parameters": {
                        "rope_type": "yarn",
                        "factor": 3.0,
                        "rope_theta": 9.0,
                        "beta_fast": 32.0,
                    }
                },
            ),
            (
                "gemma3_text",
                "scaled",
                {
                    "rope_parameters": ...,
                    "rope_theta": 50.0,
                    "rope_local_base_freq": 20.0,
                    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
                },
            ),
            (
                "qwen2",
                "window",
                {
                    "layer_types": ...,
                    "max_window_layers": 2,
                    "rope_parameters": ...,
                    "rope_theta": 50.0,
                },
            ),
            ("qwen2", "window", {"layer_types": ..., "max_window_layers": ...}),
            ("qwen2", "window", {"layer_types": ..., "use_sliding_window": False}),
            ("qwen3", "window", {"layer_types": ..., "max_window_layers": 0}),
            ("mistral", "window", {"sliding_window": None}),
            ("mistral", "window", {"sliding_window": ...}),
            ("mistral", "window", {"layer_types": ["full_attention"] * 3}),
            (
                "gpt_neox",
                "part",
                {"rope_parameters": ..., "rotary_pct": 0.67, "rotary_emb_base": 50},
            ),
            (
                "gpt_neox",
                "part",
                {"rope_parameters": ..., "rotary_pct": ..., "num_attention_heads": 3},
            ),
            (
                "gpt_neox",
                "sequential",
                {
                    "rope_parameters": ...,
                    "rotary_pct": 1.0,
                    "rope_scaling": {"type": "linear", "factor": 2.0},
                },
            ),
            (
                "modernbert",
                "window",
                {
                    "rope_parameters": ...,
                    "layer_types": ...,
                    "global_attn_every_n_layers": 2,
                    "global_rope_theta": 300.0,
                    "local_rope_theta": 20.0,
                },
            ),
            ("modernbert", "window", {"rope_parameters": ..., "layer_types": ...}),
            (
                "modernbert",
                "window",
                {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            ),
            (
                "modernbert",
                "window",
                {"classifier_pooling": "mean", "position_embedding_type": "absolute"},
            ),
            (
                "t5",
                "1.0",
                {
                    "num_layers": 3,
                    "num_decoder_layers": ...,
                    "scale_decoder_outputs": ...,
                    "n_positions": ...,
                },
            ),
            (
                "bert",
                "plain",
                {"position_embedding_type": "absolute", "gradient_checkpointing": False},
            ),
            ("bert", "plain", {"hidden_act": "gelu_python"}),
            ("distilbert", "plain", {"tie_weights_": True, "sinusoidal_pos_embds": ...}),
            (
                "marian",
                "swish",
                {
                    "decoder_vocab_size": 41,
                    "normalize_embedding": False,
                    "static_position_embeddings": True,
                },
            ),
        ],
        ids=str,
    )
    def test_older_keys(self, family, variant, old, reread):
        case = Case(family, "lm", variant)
        values = {"rope_parameters": ...} if "rope_theta" in old else {}

        def same_depth(tensors):
            third = {
                name: tensors[name.replace("encoder.block.2", "encoder.block.1")]
                for name in (
                    name.replace("encoder.block.1", "encoder.block.2")
                    for name in tensors
                    if "encoder.block.1" in name
                )
            }
            return tensors | third

        assert_same(
            case,
            *_models(reread(case, same_depth if family == "t5" else None, **{**values, **old})),
        )

    @pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "bart", "marian"])
    def test_missing_keys_have_the_defaults_of_transformers(self, family):
        row = FAMILIES[family]
        theirs = getattr(transformers, row.heads["lm"]).config_class()
        ours = read_config({"model_type": family}, "here")[1]
        for our_key, their_key in row.keys.items():
            default = getattr(theirs, their_key)
            if our_key == "max_position_embeddings" and row.padding_first:
                default -= ours.position_offset
            # bos and eos come from the tokenizer
            if default is not None and our_key not in ("bos_token_id", "eos_token_id"):
                assert getattr(ours, our_key) == default, their_key
