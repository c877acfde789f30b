"""Folders that we write: transformers reads them, and reading them back gives identical bits."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig

SHAPES = pytest.mark.parametrize(
    "options",
    [
        {"query_key_norm": True, "tie_word_embeddings": True},
        {"query_key_norm": True, "tie_word_embeddings": False},
        {"query_key_norm": False, "tie_word_embeddings": True},
        {"query_key_norm": False, "tie_word_embeddings": False},
        {"head_dim": 6, "num_key_value_heads": 1},
        {"rope_theta": 333.0, "norm_eps": 0.01},
    ],
    ids=str,
)


@pytest.fixture
def saved(tmp_path, small_model, small_tokenizer):
    def save(generate=None, **options):
        model = small_model(**options)
        checkpoints.save(tmp_path, model, small_tokenizer, generate or GenerateConfig())
        return tmp_path, model

    return save


@SHAPES
def test_transformers_computes_the_same_logits(options, saved, difference):
    folder, ours = saved(**options)
    theirs, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == (
        "Qwen3ForCausalLM" if ours.config.query_key_norm else "LlamaForCausalLM"
    )
    ids = torch.randint(0, 401, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert difference(ours(ids), theirs(ids).logits) < 1e-5


@SHAPES
def test_reading_back_gives_identical_bits(options, saved, small_tokenizer):
    folder, model = saved(**options)
    again = checkpoints.load(folder)
    assert again.model.config == dataclasses.replace(
        model.config, model_type=again.model.config.model_type
    )
    before, after = model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (again.bos, again.stop_ids, again.tokenizer.hash) == ([0], [0], small_tokenizer.hash)
    first = (folder / "model.safetensors").read_bytes()
    checkpoints.save(folder, again.model, again.tokenizer, again.generate)
    assert (folder / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_the_head_only_if_it_is_not_tied(tied, saved):
    folder, model = saved(tie_word_embeddings=tied)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert ("lm_head.weight" in names) is not tied
        assert file.metadata()["format"] == "pt"  # older readers need it
        assert {str(file.get_slice(name).get_dtype()) for name in names} == {"F32"}
        assert sum(file.get_tensor(name).numel() for name in names) == sum(
            p.numel() for p in model.parameters()
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Once upon a time",
        "  two  spaces ",
        "a\tb\r\nc\n",
        "日本語 🙂 é",
        "don't",
        "<|endoftext|>",
        "x<|endoftext|>y",
    ],
)
def test_transformers_tokenizes_as_we_do(text, saved, small_tokenizer):
    folder, _ = saved()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text).input_ids == [0, *small_tokenizer.encode(text)]
    assert theirs(text, add_special_tokens=False).input_ids == small_tokenizer.encode(text)
    assert theirs.decode(small_tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (0, 0, 32)


def test_transformers_tokenizes_real_lines_as_we_do(saved, small_tokenizer, shared):
    folder, _ = saved()
    theirs = AutoTokenizer.from_pretrained(folder)
    for name in ("wikitext-2-test.txt", "zh-lunyu.txt"):
        lines = (shared / "text" / name).read_text(encoding="utf-8").split("\n")[:200]
        assert theirs(lines).input_ids == [[0, *small_tokenizer.encode(line)] for line in lines]


@pytest.mark.parametrize(
    "generate",
    [
        GenerateConfig(),
        GenerateConfig(temperature=0.0),
        GenerateConfig(top_k=40, min_p=0.05, repetition_penalty=1.1),
        GenerateConfig(temperature=0.0, num_beams=4, length_penalty=0.5),
        GenerateConfig(
            temperature=0.0,
            num_beams=2,
            early_stopping="never",
            no_repeat_ngram_size=3,
            forced_eos_token_id=0,
            suppress_tokens=(4, 5),
            begin_suppress_tokens=(6,),
            bad_words_ids=((7,), (8, 9)),
        ),
    ],
    ids=str,
)
def test_transformers_accepts_the_generation_defaults(generate, saved, caplog):
    folder, _ = saved(generate)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        theirs = GenerationConfig.from_pretrained(folder)
        theirs.validate(strict=True)  # raises for settings that contradict each other
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([[0, 40, 41]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0
        )
        model.save_pretrained(folder / "again")
    assert [record.getMessage() for record in caplog.records] == []
    assert out.shape[1] <= 8 and out[0, :3].tolist() == [0, 40, 41]
    assert theirs.do_sample is bool(generate.temperature)
    if generate.temperature:
        assert (theirs.temperature, theirs.top_p, theirs.top_k or 0, theirs.min_p or 0) == (
            generate.temperature,
            generate.top_p,
            generate.top_k,
            generate.min_p,
        )
    assert (theirs.num_beams, theirs.repetition_penalty) == (
        generate.num_beams,
        generate.repetition_penalty,
    )


@pytest.mark.parametrize(
    "generate",
    [
        GenerateConfig(),
        GenerateConfig(top_k=40, top_p=0.5, min_p=0.1, max_new_tokens=7),
        GenerateConfig(temperature=1.0, top_p=1.0),
        GenerateConfig(temperature=0.0, top_p=1.0, num_beams=3),
        GenerateConfig(
            temperature=0.0,
            top_p=1.0,
            num_beams=2,
            early_stopping="true",
            min_new_tokens=3,
            max_length=40,
        ),
        GenerateConfig(
            temperature=0.0,
            top_p=1.0,
            forced_bos_token_id=3,
            min_length=2,
            suppress_tokens=(4, 5),
            bad_words_ids=((7,), (8, 9)),
        ),
    ],
    ids=str,
)
def test_generation_defaults_round_trip(generate, saved):
    assert checkpoints.load(saved(generate)[0]).generate == generate


def test_greedy_defaults_round_trip(saved):
    assert checkpoints.load(saved(GenerateConfig(temperature=0.0))[0]).generate.temperature == 0


def test_both_keys_of_the_rotary_base_are_written(saved):
    folder, _ = saved(rope_theta=333.0)
    document = json.loads((folder / "config.json").read_text())
    assert document["rope_theta"] == document["rope_parameters"]["rope_theta"] == 333.0
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 333.0


def test_saving_weights_changes_only_the_weights_file(saved, small_model):
    folder, _ = saved()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    checkpoints.save_weights(folder, small_model(seed=5))
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"model.safetensors"}
    assert before.keys() == after.keys()


def test_a_half_precision_model_is_stored_as_float32(saved, small_model):
    folder, _ = saved()
    model = small_model(seed=5).bfloat16()
    checkpoints.save_weights(folder, model)
    again = checkpoints.load(folder).model
    assert all(
        torch.equal(loaded, saved_weight.float())
        for loaded, saved_weight in zip(again.parameters(), model.parameters(), strict=True)
    )
