"""`lm help keys`: rows of the configuration's fields that agree with what `check` accepts."""

import dataclasses
import math

import pytest

from lmcli.catalog.keys import KEY_COLUMNS, key_rows, value_text
from lmcli.config import SECTIONS, check
from lmcli.errors import UsageError
from lmcli.recipes import resolve

FIELDS = [
    (section, config, field)
    for section, config in SECTIONS.items()
    for field in dataclasses.fields(config)
]
ROWS = {row["key"]: row for row in key_rows()}


def accepts(config, key, value):
    try:
        check(config, key, value, "here")
    except UsageError:
        return False
    return True


def test_there_is_a_row_for_every_key_a_preset_may_set():
    assert list(ROWS) == [f"{section}.{field.name}" for section, _, field in FIELDS]
    for row in ROWS.values():
        assert tuple(row) == KEY_COLUMNS and row["meaning"] and row["type"] and row["default"]
        assert "\t" not in "".join(row.values()) and "\n" not in "".join(row.values())


def test_ranges_are_those_of_the_validation():
    ranges = 0
    for section, config, field in FIELDS:
        text = ROWS[f"{section}.{field.name}"]["range"].replace(",", "")
        low, _, high = text.partition(" to ")
        if text.endswith(" or more"):
            low, high = text.removesuffix(" or more"), ""
        elif not high:
            continue
        ranges += 1
        number = int if field.type in (int, int | None) else float
        assert accepts(config, field.name, number(low)), field.name
        below = int(low) - 1 if number is int else math.nextafter(float(low), -math.inf)
        assert not accepts(config, field.name, below), field.name
        if high:
            assert accepts(config, field.name, number(high)), field.name
            above = int(high) + 1 if number is int else math.nextafter(float(high), math.inf)
            assert not accepts(config, field.name, above), field.name
    assert ranges > 60


def test_choices_are_those_of_the_validation():
    choices = 0
    for section, config, field in FIELDS:
        text = ROWS[f"{section}.{field.name}"]["range"]
        if ROWS[f"{section}.{field.name}"]["type"] == "a word" and text:
            choices += 1
            assert all(accepts(config, field.name, word) for word in text.split(", "))
            assert not accepts(config, field.name, "no such word")
    assert choices > 15


def test_a_default_is_what_set_takes():
    for section, _, field in FIELDS:
        default = ROWS[f"{section}.{field.name}"]["default"]
        if default != "–":
            recipe = resolve("tiny", (f"{section}.{field.name}={default}",))
            assert recipe.value(f"{section}.{field.name}") == field.default
        else:
            assert field.default in (None, "", ())


def test_values_as_text():
    values = [value_text(value) for value in (1e-6, True, (), ("a", "b"), None, 3, 0.5)]
    assert values == ["1e-06", "true", "–", "a,b", "–", "3", "0.5"]


@pytest.mark.parametrize(
    "selection, keys",
    [
        ("tokenizer", ["tokenizer.vocab_size", "tokenizer.pattern"]),
        ("train.schedule", ["train.schedule"]),
        ("vocab_size", ["tokenizer.vocab_size", "model.vocab_size"]),
    ],
)
def test_a_section_or_a_key_may_be_chosen(selection, keys):
    assert [row["key"] for row in key_rows(selection)] == keys


@pytest.mark.parametrize(
    "selection, near",
    [
        ("tran", "train"),
        ("hiden_size", "model.hidden_size"),
        ("train.learning_rat", "train.learning_rate"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(selection, near):
    with pytest.raises(UsageError) as caught:
        key_rows(selection)
    assert f"did you mean {near}" in caught.value.what
    assert "tokenizer, model, train, generate" in (caught.value.hint or "")
