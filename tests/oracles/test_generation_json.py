"""Every key of generation_config.json is followed, without effect, or named; stop strings."""

import json
import re

import pytest
import torch

import lmcli
from lmcli import commands
from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.generation_json import (
    GENERATE_KEYS,
    IDS_AND_MODES,
    NOT_SUPPORTED,
    WITHOUT_EFFECT,
    ignored_keys,
)
from lmcli.config import GenerateConfig
from lmcli.errors import UsageError, UserError

transformers = pytest.importorskip("transformers")
CLASSES = ({*GENERATE_KEYS}, IDS_AND_MODES, WITHOUT_EFFECT, {*NOT_SUPPORTED})


def test_each_key_of_transformers_is_in_one_class():
    keys = vars(transformers.GenerationConfig()).keys()
    for key in keys:
        assert sum(key in names for names in CLASSES) == 1, key


def test_the_defaults_of_transformers_are_followed():
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert ignored_keys({**defaults, "typical_p": 1.0}, {}) == ""
    assert ignored_keys(dict.fromkeys(NOT_SUPPORTED), {}) == ""


@pytest.mark.parametrize(
    ("generation", "config", "line"),
    [
        (
            {"guidance_scale": 1.9},
            {},
            "generation_config.json: guidance_scale is not supported and is ignored",
        ),
        (
            {"max_time": 9, "guidance_scale": 3.0, "top_k": 5, "typical_p": 0.9},
            {},
            "generation_config.json: guidance_scale, max_time are not supported and are ignored",
        ),
        (
            {"watermarking_config": {"bias": 2}, "temprature": 2},
            {},
            "generation_config.json: watermarking_config is not supported "
            "and is ignored; temprature is not known and is ignored",
        ),
        ({"guidance_scale": 1.5}, {"typical_p": 0.3}, "generation_config.json: guidance_scale is"),
        (None, {"num_beam_groups": 2, "diversity_penalty": 0.5}, "config.json: diversity_penalty"),
        (None, {"hidden_size": 3, "num_beam_groups": 1, "typical_p": 1.0}, ""),
        ({"cache_implementation": "static", "output_scores": True, "eta_cutoff": 0.0}, {}, ""),
        ({"num_return_sequences": 3}, {}, "generation_config.json: num_return_sequences is not"),
    ],
    ids=str,
)
def test_keys_that_change_the_text_are_named_in_one_line(generation, config, line):
    found = ignored_keys(generation, config)
    assert found.startswith(line) and "\n" not in found and bool(found) == bool(line)


@pytest.fixture(scope="module")
def folder(small_model, small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = small_model(vocab_size=small_tokenizer.size, max_position_embeddings=64)
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig(temperature=0.0))
    return folder


@pytest.fixture
def settings(folder):
    """settings(**values) writes generation_config.json."""
    file = folder / "generation_config.json"
    before = file.read_text()

    def write(**values):
        file.write_text(json.dumps({"do_sample": False, "eos_token_id": 0, **values}))

    yield write
    file.write_text(before)


def test_generate_names_them(folder, settings, capfd):
    settings(max_new_tokens=3, token_healing=True, dola_layers="low")
    arguments = ["generate", "-m", str(folder), "--threads", "1", "Once"]
    assert commands.run(arguments) == 0
    expected = (
        "lm: generation_config.json: dola_layers, token_healing are not supported and are ignored\n"
    )
    assert capfd.readouterr().err == expected
    assert commands.run([*arguments, "-q"]) == 0
    assert capfd.readouterr().err == ""


def their_tokens(folder, prompt: str, stop: list[str], model, tokenizer) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(
        ids,
        max_new_tokens=30,
        do_sample=False,
        stop_strings=stop,
        tokenizer=tokenizer,
        eos_token_id=0,
        pad_token_id=0,
    )
    return found[0, ids.shape[1] :].tolist()


def test_a_text_ends_with_the_token_that_completes_a_stop_string(folder, settings):
    """Whole tokens, ends of tokens, strings over several tokens, and those begun in the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings(max_new_tokens=30)
    ended = 0
    for prompt in ("Once upon a time", "The baker", "In the dark wood "):
        ((free),) = lmcli.load(folder).generate([prompt])
        text = free.text
        stops = [text[3:4], text[4:7], text[10:15], text[1:30], "never to be seen", prompt[-2:]]
        stops += [prompt[-3:] + text[:2], prompt[-1:] + text[:6]]
        for stop in (stop for stop in stops if stop and "\ufffd" not in stop):
            settings(max_new_tokens=30, stop_strings=stop)
            (ours,) = lmcli.load(folder).generate([prompt])
            expected = their_tokens(folder, prompt, [stop], model, tokenizer)
            assert ours.tokens == expected, (prompt, stop)
            if ours.finish_reason == "stop":
                ended += 1
                assert stop in prompt + ours.text and free.text.startswith(ours.text)
    assert ended > 8


def test_stop_strings_do_not_end_a_text_of_a_form(folder, settings):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    settings(max_new_tokens=30, stop_strings=["0", "1", "tomato"])
    model = lmcli.load(folder)
    ((number,), (choice,)) = (
        model.generate("Once", regex="[01]{9}!"),
        model.generate("Once", choices=["tomatoes", "tomato soup"]),
    )
    assert re.fullmatch("[01]{9}!", number.text)
    assert choice.text in ("tomatoes", "tomato soup")
    with pytest.raises(UsageError, match="--stop would cut the text"):
        model.generate("Once", regex="a", stop_strings=("x",))


def test_several_stop_strings_and_no_comma_splits_one(folder, settings):
    settings(max_new_tokens=30, stop_strings=["a, b", "zzz"])
    assert checkpoints.load(folder).generate.stop_strings == ("a, b", "zzz")
    settings(max_new_tokens=30, stop_strings="a, b")
    assert checkpoints.load(folder).generate.stop_strings == ("a, b",)


def test_stop_strings_that_cannot_be(folder, settings):
    for values, message in (
        ({"stop_strings": ""}, "stop_strings must not be empty"),
        ({"stop_strings": ["x"], "num_beams": 2}, "stop_strings with num_beams 2 is not supported"),
        ({"stop_strings": [3]}, "stop_strings: "),
    ):
        settings(**values)
        with pytest.raises(UserError, match=message) as caught:
            lmcli.load(folder).generate(["Once"])
        assert caught.value.exit_code == 1


def test_stop_strings_are_saved_again(folder, settings, tmp_path):
    settings(stop_strings=["x", "y"])
    loaded = checkpoints.load(folder)
    checkpoints.save(tmp_path, loaded.model, loaded.tokenizer, loaded.generate)
    assert checkpoints.load(tmp_path).generate == loaded.generate
    assert torch.is_tensor(loaded.model.embedding.weight)
