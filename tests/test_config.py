"""Values and ranges: what is taken, as which type, and what is refused with which words."""

import dataclasses
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcli.config import GenerateConfig, ModelConfig, Recipe, TokenizerConfig, TrainConfig, check, duration
from lmcli.errors import UsageError

SECTIONS = (TokenizerConfig, ModelConfig, TrainConfig, GenerateConfig)
KNOBS = [(section, field) for section in SECTIONS for field in dataclasses.fields(section)]
every_knob = pytest.mark.parametrize("section, field", KNOBS, ids=lambda part: getattr(part, "name", ""))


@pytest.mark.parametrize("section, key, given_, taken", [
    (TrainConfig, "learning_rate", "1e-5", 1e-5),
    (TrainConfig, "learning_rate", 1, 1.0),
    (TrainConfig, "steps", "2_500", 2500),
    (TrainConfig, "steps", 100.0, 100),
    (TrainConfig, "steps", "1e3", 1000),
    (TrainConfig, "seed", (1 << 63) - 1, (1 << 63) - 1),  # more digits than a float holds
    (TrainConfig, "seed", str((1 << 62) + 1), (1 << 62) + 1),
    (TrainConfig, "time", "1h30m", 5400.0),
    (TrainConfig, "time", 90, 90.0),
    (TrainConfig, "schedule", "cosine", "cosine"),
    (ModelConfig, "query_key_norm", "false", False),
    (ModelConfig, "query_key_norm", True, True),
    (ModelConfig, "bos_token_id", None, None),
    (ModelConfig, "bos_token_id", "7", 7),
    (TrainConfig, "lora_targets", "query, down", ("query", "down")), (TrainConfig, "lora_targets", ["all"], ("all",))])
def test_values_become_the_type_of_their_field(section, key, given_, taken):
    value = check(section, key, given_, "here")
    assert value == taken and type(value) is type(taken)


@pytest.mark.parametrize("section, key, value, message", [
    (TrainConfig, "steps", True, "steps: True is not a whole number"),
    (TrainConfig, "steps", 1.5, "steps: 1.5 is not a whole number"),
    (TrainConfig, "steps", math.nan, "steps: nan is not a whole number"),
    (TrainConfig, "steps", math.inf, "steps: inf is not a whole number"),
    (TrainConfig, "steps", "many", "steps: 'many' is not a whole number"),
    (TrainConfig, "steps", None, "steps: None is not a whole number"),
    (TrainConfig, "steps", [1], r"steps: \[1\] is not a whole number"),
    (TrainConfig, "steps", -1, "steps: -1 is outside 0 or more"),
    (TrainConfig, "seed", 1 << 63, "seed: 9223372036854775808 is outside 0 to 9223372036854775807"),
    (TrainConfig, "warmup", "fast", "warmup: 'fast' is not a number"),
    (TrainConfig, "warmup", False, "warmup: False is not a number"),
    (TrainConfig, "warmup", 1.1, "warmup: 1.1 is outside 0.0 to 1.0"),
    (TrainConfig, "warmup", math.nan, "warmup: nan is outside 0.0 to 1.0"),
    (TrainConfig, "epochs", math.inf, "epochs: inf is outside 0.0 or more"),
    (TrainConfig, "epochs", "nan", "epochs: nan is outside 0.0 or more"),
    (TrainConfig, "epochs", 10 ** 400, "epochs: 1000.* is not a number"),
    (TrainConfig, "time", "soon", "time: 'soon' is not a number"),
    (TrainConfig, "time", -5, "time: -5.0 is outside 0.0 or more"),
    (TrainConfig, "schedule", "square", "schedule: 'square' is not one of linear, cosine, constant"),
    (TrainConfig, "schedule", 3, "schedule: 3 is not a word"),
    (TrainConfig, "lora_targets", "query, dwn", "lora_targets: 'dwn' is not one of .*; did you mean 'down'"),
    (TrainConfig, "lora_targets", 3, "lora_targets: 3 is not a list of words"),
    (TrainConfig, "lora_rank", -1, "lora_rank: -1 is outside 0 to 65536"),
    (ModelConfig, "query_key_norm", "yes", "query_key_norm: 'yes' is not true or false"),
    (ModelConfig, "query_key_norm", 1, "query_key_norm: 1 is not true or false"),
    (ModelConfig, "bos_token_id", -1, "bos_token_id: -1 is outside 0 or more"),
    (TokenizerConfig, "vocab_size", 256, "vocab_size: 256 is outside 257 to 1000000")])
def test_impossible_values_are_refused(section, key, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(section, key, value, "mine.yaml: train")
    assert caught.value.where == "mine.yaml: train" and caught.value.exit_code == 2


def test_a_refusal_ends_in_what_the_key_means():
    with pytest.raises(UsageError) as caught:
        check(TrainConfig, "warmup", 2, "--set: train")
    assert caught.value.hint == "warmup: share of the budget in which the rate rises from 0"


@every_knob
def test_every_default_is_within_its_own_range_and_explained(section, field):
    assert check(section, field.name, field.default, "here") == field.default
    assert len(field.metadata["meaning"]) > 3


@every_knob
def test_every_border_is_taken_and_what_lies_beyond_refused(section, field):
    low, high = field.metadata["low"], field.metadata["high"]
    for border, beyond in ((low, -1), (high, 1)):
        if border is not None:
            assert check(section, field.name, border, "here") == border
            with pytest.raises(UsageError, match=f"{field.name}: .* is outside"):
                check(section, field.name, border + beyond, "here")


@pytest.mark.parametrize("text, seconds", [
    ("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661), (" 2m ", 120), ("0", 0)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "m", "5 m", "-5", "1m1h", "5d", "1e3", "nan", "inf", "5m5", "1h30", "½h", "."])
def test_no_durations(text):
    with pytest.raises(ValueError, match="is not a duration"):
        duration(text)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_durations_add_up(hours, minutes, seconds):
    assume(hours or minutes or seconds)
    text = "".join(f"{count}{unit}" for count, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if count)
    assert duration(text) == hours * 3600 + minutes * 60 + seconds


class TestModelSizes:
    def test_zeros_are_derived(self):
        done = ModelConfig(hidden_size=256, num_attention_heads=4).complete()
        assert (done.head_dim, done.num_key_value_heads) == (64, 4)
        assert done.intermediate_size == 704  # 682⅔ up to the next multiple of 32

    def test_what_is_given_stays(self):
        given_ = ModelConfig(hidden_size=100, num_attention_heads=6, num_key_value_heads=2, head_dim=30,
                             intermediate_size=33)
        done = given_.complete()
        assert all(getattr(done, field.name) == getattr(given_, field.name) for field in dataclasses.fields(ModelConfig)
                   if getattr(given_, field.name) not in (0, ""))
        assert done.complete() == done

    @pytest.mark.parametrize("sizes, message", [
        ({"hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 100"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "num_attention_heads 4 does not divide hidden_size 2"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head_dim 3 is odd"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3},
         "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "num_key_value_heads 8 does not divide")])
    def test_sizes_that_cannot_fit(self, sizes, message):
        with pytest.raises(UsageError, match=message) as caught:
            ModelConfig(**sizes).complete()
        assert caught.value.where == "model" and caught.value.hint

    @given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 64))
    def test_what_completes_fits(self, hidden, heads, key_value_heads):
        try:
            done = ModelConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=key_value_heads).complete()
        except UsageError:
            return
        assert done.head_dim * heads == hidden and done.head_dim % 2 == 0 and heads % done.num_key_value_heads == 0
        assert done.intermediate_size % 32 == 0 and done.intermediate_size >= hidden * 8 / 3


def test_a_recipe_is_not_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.steps = 3


def test_on_and_off_are_words_though_yaml_reads_them_as_true_and_false():
    assert [check(TrainConfig, "recompute", value, "here") for value in (True, False, "on", "off", "auto")] == [
        "on", "off", "on", "off", "auto"]
    with pytest.raises(UsageError, match="'true' is not one of auto, on, off"):
        check(TrainConfig, "recompute", "true", "here")
