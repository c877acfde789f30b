"""Config values: conversion to the field's type, ranges, and the messages of refusals."""

import dataclasses
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcli.config import (
    GenerateConfig,
    ModelConfig,
    Recipe,
    TokenizerConfig,
    TrainConfig,
    check,
    duration,
)
from lmcli.errors import UsageError

SECTIONS = (TokenizerConfig, ModelConfig, TrainConfig, GenerateConfig)
KNOBS = [(section, field) for section in SECTIONS for field in dataclasses.fields(section)]


@pytest.mark.parametrize(
    "section, key, value, expected",
    [
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
        (TrainConfig, "lora_targets", "query, down", ("query", "down")),
        (TrainConfig, "lora_targets", ["all"], ("all",)),
    ],
)
def test_values_are_converted_to_the_type_of_their_field(section, key, value, expected):
    converted = check(section, key, value, "here")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        (TrainConfig, "steps", True, "steps: True is not a whole number"),
        (TrainConfig, "steps", 1.5, "steps: 1.5 is not a whole number"),
        (TrainConfig, "steps", math.nan, "steps: nan is not a whole number"),
        (TrainConfig, "steps", math.inf, "steps: inf is not a whole number"),
        (TrainConfig, "steps", "many", "steps: 'many' is not a whole number"),
        (TrainConfig, "steps", None, "steps: None is not a whole number"),
        (TrainConfig, "steps", [1], r"steps: \[1\] is not a whole number"),
        (TrainConfig, "steps", -1, "steps: -1 is outside 0 or more"),
        (
            TrainConfig,
            "seed",
            1 << 63,
            "seed: 9223372036854775808 is outside 0 to 9223372036854775807",
        ),
        (TrainConfig, "warmup", "fast", "warmup: 'fast' is not a number"),
        (TrainConfig, "warmup", False, "warmup: False is not a number"),
        (TrainConfig, "warmup", 1.1, "warmup: 1.1 is outside 0.0 to 1.0"),
        (TrainConfig, "warmup", math.nan, "warmup: nan is outside 0.0 to 1.0"),
        (TrainConfig, "epochs", math.inf, "epochs: inf is outside 0.0 or more"),
        (TrainConfig, "epochs", "nan", "epochs: nan is outside 0.0 or more"),
        (TrainConfig, "epochs", 10**400, "epochs: 1000.* is not a number"),
        (TrainConfig, "time", "soon", "time: 'soon' is not a number"),
        (TrainConfig, "time", -5, "time: -5.0 is outside 0.0 or more"),
        (
            TrainConfig,
            "schedule",
            "square",
            "schedule: 'square' is not one of linear, cosine, constant",
        ),
        (TrainConfig, "schedule", 3, "schedule: 3 is not a word"),
        (
            TrainConfig,
            "lora_targets",
            "query, dwn",
            "lora_targets: 'dwn' is not one of .*; did you mean 'down'",
        ),
        (TrainConfig, "lora_targets", 3, "lora_targets: 3 is not a list of words"),
        (TrainConfig, "lora_rank", -1, "lora_rank: -1 is outside 0 to 65536"),
        (ModelConfig, "query_key_norm", "yes", "query_key_norm: 'yes' is not true or false"),
        (ModelConfig, "query_key_norm", 1, "query_key_norm: 1 is not true or false"),
        (ModelConfig, "bos_token_id", -1, "bos_token_id: -1 is outside 0 or more"),
        (TokenizerConfig, "vocab_size", 256, "vocab_size: 256 is outside 257 to 1000000"),
    ],
)
def test_impossible_values_raise_usage_error(section, key, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(section, key, value, "mine.yaml: train")
    assert caught.value.where == "mine.yaml: train" and caught.value.exit_code == 2


def test_the_hint_is_the_meaning_of_the_key():
    with pytest.raises(UsageError) as caught:
        check(TrainConfig, "warmup", 2, "--set: train")
    assert caught.value.hint == "warmup: share of the budget in which the rate rises from 0"


def accepts(section, field, value):
    """True if `check` returns the value unchanged, False if it is out of range."""
    try:
        return check(section, field.name, value, "here") == value
    except UsageError as error:
        assert f"{field.name}: " in error.what and " is outside" in error.what
        return False


def test_every_default_is_within_its_range_and_every_knob_has_a_meaning():
    assert len(KNOBS) == 137
    wrong = [
        field.name
        for section, field in KNOBS
        if not accepts(section, field, field.default) or len(field.metadata["meaning"]) <= 3
    ]
    assert wrong == []


def test_every_bound_is_accepted_and_one_beyond_it_refused():
    wrong = []
    for section, field in KNOBS:
        for bound, step in ((field.metadata["low"], -1), (field.metadata["high"], 1)):
            beyond = bound is not None and accepts(section, field, bound + step)
            if bound is not None and (beyond or not accepts(section, field, bound)):
                wrong.append((field.name, bound))
    assert wrong == []


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("1h1m1s", 3661),
        (" 2m ", 120),
        ("0", 0),
    ],
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "m", "5 m", "-5", "1m1h", "5d", "1e3", "nan", "inf", "5m5", "1h30", "½h", "."]
)
def test_invalid_durations(text):
    with pytest.raises(ValueError, match="is not a duration"):
        duration(text)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_durations_add_up(hours, minutes, seconds):
    assume(hours or minutes or seconds)
    text = "".join(
        f"{count}{unit}" for count, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if count
    )
    assert duration(text) == hours * 3600 + minutes * 60 + seconds


class TestModelSizes:
    def test_zeros_are_derived(self):
        done = ModelConfig(hidden_size=256, num_attention_heads=4).complete()
        assert (done.head_dim, done.num_key_value_heads) == (64, 4)
        assert done.intermediate_size == 704  # 682⅔ up to the next multiple of 32

    def test_values_that_are_set_are_kept(self):
        config = ModelConfig(
            hidden_size=100,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=30,
            intermediate_size=33,
        )
        done = config.complete()
        assert all(
            getattr(done, field.name) == getattr(config, field.name)
            for field in dataclasses.fields(ModelConfig)
            if getattr(config, field.name) not in (0, "")
        )
        assert done.complete() == done

    @pytest.mark.parametrize(
        "sizes, message",
        [
            (
                {"hidden_size": 100, "num_attention_heads": 3},
                "num_attention_heads 3 does not divide hidden_size 100",
            ),
            (
                {"hidden_size": 2, "num_attention_heads": 4},
                "num_attention_heads 4 does not divide hidden_size 2",
            ),
            ({"hidden_size": 12, "num_attention_heads": 4}, "head_dim 3 is odd"),
            ({"head_dim": 7}, "head_dim 7 is odd"),
            (
                {"num_attention_heads": 4, "num_key_value_heads": 3},
                "num_key_value_heads 3 does not divide num_attention_heads 4",
            ),
            (
                {"num_attention_heads": 4, "num_key_value_heads": 8},
                "num_key_value_heads 8 does not divide",
            ),
        ],
    )
    def test_sizes_that_do_not_fit_raise_usage_error(self, sizes, message):
        with pytest.raises(UsageError, match=message) as caught:
            ModelConfig(**sizes).complete()
        assert caught.value.where == "model" and caught.value.hint

    @given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 64))
    def test_completed_sizes_fit(self, hidden, heads, key_value_heads):
        try:
            done = ModelConfig(
                hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=key_value_heads
            ).complete()
        except UsageError:
            return
        assert (
            done.head_dim * heads == hidden
            and done.head_dim % 2 == 0
            and heads % done.num_key_value_heads == 0
        )
        assert done.intermediate_size % 32 == 0 and done.intermediate_size >= hidden * 8 / 3


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.steps = 3


def test_on_and_off_are_words_although_yaml_reads_them_as_booleans():
    assert [
        check(TrainConfig, "recompute", value, "here")
        for value in (True, False, "on", "off", "auto")
    ] == ["on", "off", "on", "off", "auto"]
    with pytest.raises(UsageError, match="'true' is not one of auto, on, off"):
        check(TrainConfig, "recompute", "true", "here")
