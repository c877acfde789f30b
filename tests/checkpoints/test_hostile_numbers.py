"""Numbers and names out of range in a folder's files: refused in one line, asserts on or off."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_numbers import CASES, change_json, change_tokenizer, config, generation, problem
from tokenizers import Tokenizer, models

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.families import FAMILIES
from lmcli.config import GenerateConfig
from lmcli.errors import UserError
from lmcli.text import library_errors, tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    reference(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_each_is_refused_with_a_line(name, original, tmp_path, capfd):
    assert problem(name, original, tmp_path / "a") == ""
    assert capfd.readouterr().err == ""  # nothing of the library's own reports


def test_no_refusal_is_an_assert(original, tmp_path):
    """The same with lm as PYTHONOPTIMIZE=1 loads it, without any assert: in one process."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "checkpoints" / "hostile_numbers.py", original, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith(f"{len(CASES)} folders tried, asserts off\n"), done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_a_beginning_beyond_the_vocabulary_is_refused_where_it_is_used(original, tmp_path):
    """Transformers writes GPT-2's 50256 whatever the vocabulary; no text need begin with it."""
    folder = shutil.copytree(original, tmp_path / "a")
    config(bos_token_id=50_256, pad_token_id=50_257)(folder)
    change_tokenizer(folder, lambda document: {**document, "post_processor": None})
    (folder / "tokenizer_config.json").write_text("{}")
    model = lmcli.load(folder)
    assert model.bos_ids() == []
    with pytest.raises(UserError, match="bos_token_id 50256 is no id of this model"):
        model.bos_ids(True)


def encoder_decoder(folder, small_model, small_tokenizer):
    row = FAMILIES["t5"]
    options = {**row.options_for("lm"), "hidden_act": "relu", "gated_mlp": False}
    model = small_model(
        **{**options, "shape": row.shape, "model_type": "t5", "num_key_value_heads": 4},
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig())


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"decoder_start_token_id": None}, "has neither decoder_start_token_id nor"),
        ("config.json", {"decoder_start_token_id": -1}, "has neither decoder_start_token_id nor"),
        ("config.json", {"decoder_start_token_id": 999}, "decoder_start_token_id uses the id 999"),
        ("config.json", {"pad_token_id": 999}, "pad_token_id uses the id 999"),
        ("generation_config.json", {"decoder_start_token_id": 999}, "uses the id 999"),
    ],
    ids=str,
)
def test_ids_of_an_encoder_decoder(file, values, message, small_model, small_tokenizer, tmp_path):
    encoder_decoder(tmp_path, small_model, small_tokenizer)
    assert checkpoints.load(tmp_path).decoder_start == 0
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / file, lambda document: {**document, **values})
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load(tmp_path)
    assert caught.value.where == str(tmp_path / file)


@pytest.mark.parametrize("count", [10**12, -1, "many", 1.5])
def test_t5_with_an_absurd_number_of_sentinels(count, tmp_path):
    core = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], 2))
    core.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": count}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"extra_ids: {count!r} is not a whole number"):
        tokenizer.load(tmp_path)


def test_bad_words_that_no_text_has(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "a")
    generation(do_sample=False, max_new_tokens=3)(folder)
    expected = lmcli.load(folder).generate(["Once"])[0].tokens
    generation(bad_words_ids=[[10**30, 5], [5, 10**30], [-7, 5], [409]])(folder)
    assert lmcli.load(folder).generate(["Once"])[0].tokens == expected


def test_standard_error_is_back_after_nested_calls(capfd):
    with library_errors.library_errors("a"), library_errors.library_errors("b"):
        os.write(2, b"hidden\n")
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"
