"""Preset auto: the choice follows from text, budget and measured speed, and can be trained."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli import recipes
from lmcli.config import TrainConfig
from lmcli.planning import auto_preset
from lmcli.planning.auto_preset import (
    AutoPreset,
    TextStatistics,
    choose,
    compute_budget,
    text_statistics,
)

MEGABYTE = TextStatistics(1_000_000, 60, 1.0)


def choose_design(text=MEGABYTE, seconds=0.0, rate=1.5e11, vocab_size=0, **train):
    """(choice, measured designs) for a machine that trains everything at `rate` FLOP/s."""
    measured = []

    def measure(design):
        measured.append(design)
        return rate

    return choose(
        text, compute_budget(TrainConfig(time=seconds, **train), text), vocab_size, measure
    ), measured


@pytest.mark.parametrize(
    ("budget", "sized_for"),
    [
        ({"steps": 100}, "--steps 100"),
        ({"epochs": 0.1}, "--epochs 0.1"),
        ({"tokens": 10_000}, "--tokens 10000"),
        ({"steps": 10**9}, ""),
    ],
)
def test_the_first_budget_reached_decides_the_size(monkeypatch, budget, sized_for):
    monkeypatch.setattr(auto_preset, "training_flops_per_second", lambda *arguments: 1e11)

    def chosen(**train):
        auto = AutoPreset(lambda defaults: recipes.resolve("auto", (), train, defaults))
        return auto.for_text(["one two three"] * 1000, 10**6, None)

    both, reasons = chosen(time=300, **budget)
    alone, _ = chosen(**(budget if sized_for else {"time": 300}))
    assert both.model == alone.model and both.train.batch_tokens == alone.train.batch_tokens
    assert (f"sized for {sized_for}, which ends the run before --time" in reasons) == bool(
        sized_for
    )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(50, 10**12),
    st.integers(1, 8000),
    st.floats(1.0, 4.0),
    st.floats(1.0, 1e6),
    st.floats(1e7, 1e15),
)
def test_every_choice_is_a_recipe_that_can_be_trained(size, characters, width, seconds, rate):
    design = choose_design(TextStatistics(size, characters, width), seconds, rate)[0].design
    recipe = recipes.resolve(
        "auto", [f"{key}={value}" for key, value in design.settings.items()], {"time": seconds}
    )
    recipe.model.complete()
    assert recipe.train.batch_tokens >= recipe.train.context and recipe.train.time == seconds
    assert 257 <= recipe.tokenizer.vocab_size <= 32_768 and 0 <= recipe.train.dropout <= 0.2


@settings(deadline=None)
@given(st.integers(10**4, 10**10), st.floats(5.0, 1e5), st.floats(1.0, 4.0))
def test_more_time_or_more_text_never_makes_a_smaller_model(size, seconds, times):
    def blocks(text, seconds):
        design = choose_design(text, seconds)[0].design
        return design.layers * design.hidden**2

    small = TextStatistics(size, 60, 1.0)
    few = blocks(small, seconds)
    # widths are multiples of 32, and are rounded again when the depth changes
    assert blocks(small, times * seconds) >= 0.7 * few
    assert blocks(TextStatistics(int(times * size), 60, 1.0), seconds) >= 0.7 * few


def test_a_faster_machine_gets_a_larger_model_and_is_measured_twice_at_most():
    slow, first = choose_design(seconds=60, rate=1.5e11)
    fast, second = choose_design(TextStatistics(10**9, 60, 1.0), seconds=60, rate=1e14)
    assert len(first) == 1 and len(second) == 2  # the first guess was right, the second was not
    assert fast.design.hidden > slow.design.hidden and fast.design.layers >= slow.design.layers
    assert fast.rate == 1e14


def test_the_best_design_of_the_grid_on_a_megabyte_is_chosen():
    minute = choose_design(seconds=60)[0].design
    assert (minute.layers, minute.hidden, minute.vocabulary, minute.batch, minute.dropout) == (
        4,
        128,
        1024,
        2048,
        0.0,
    )
    assert minute.weight_decay == 0.5
    five = choose_design(seconds=300)[0].design
    assert (five.layers, five.hidden, five.vocabulary, five.context, five.batch) == (
        4,
        192,
        512,
        128,
        4096,
    )
    assert five.dropout == 0.2 and five.weight_decay == 0.5


def test_dropout_and_strong_weight_decay_need_many_epochs():
    once, often = (
        choose_design(TextStatistics(size, 90, 1.0), seconds=3600)[0].design
        for size in (10**9, 100_000)
    )
    assert (once.dropout, once.weight_decay) == (0.0, 0.1) and (
        often.dropout,
        often.weight_decay,
    ) == (0.2, 0.5)
    assert once.settings["train.weight_decay"] == 0.1


def test_little_text_gets_a_small_model():
    design = choose_design(TextStatistics(30_000, 60, 1.0), seconds=36_000)[0].design
    assert 12 * design.layers * design.hidden**2 < 10 * 30_000


def test_scripts_of_many_characters_get_a_vocabulary_for_them():
    latin, chinese = (
        choose_design(TextStatistics(2_500_000, count, width), seconds=60)[0].design
        for count, width in ((60, 1.0), (2600, 2.95))
    )
    assert chinese.vocabulary == 4096 > latin.vocabulary


def test_a_given_tokenizer_keeps_its_size():
    assert choose_design(seconds=60, vocab_size=777)[0].design.vocabulary == 777


def test_without_a_time_budget_nothing_is_measured():
    for train in ({"tokens": 2_000_000}, {"steps": 500}, {"epochs": 3.0}):
        choice, measured = choose_design(**train)
        assert not measured and choice.rate == 0.0 and "GFLOP" not in choice.reasons[0]
        assert choice.design.tokens > 0


def test_text_statistics():
    text = text_statistics(iter(["ab" * 50_000, "é" * 10]), 100_020)
    assert text.bytes == 100_020 and text.characters == 2 and 1.0 < text.bytes_per_character < 1.001
    assert text_statistics(iter(["红楼梦" * 10]), 90).bytes_per_character == 3.0
    assert text_statistics(iter([]), 0).characters == 0


def test_only_a_sample_of_the_text_is_read():
    pieces = iter(["a" * 100_000] * 50)
    text_statistics(pieces, 5_000_000)
    assert sum(1 for _ in pieces) == 50 - 11
