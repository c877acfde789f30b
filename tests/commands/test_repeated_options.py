"""An option with one value is given one: two different ones are exit code 2, and both are named."""

import importlib

import click
import pytest

from lmcli import recipes
from lmcli.commands import COMMANDS, options, run
from lmcli.errors import UsageError


def command(name):
    return getattr(importlib.import_module(f"lmcli.commands.{name}"), name)


def two_values(option):
    """Two different values of an option as its type wants them; ("", "") for a flag."""
    kind = option.type
    if option.is_flag:
        return "", ""
    if isinstance(kind, click.Choice):
        return kind.choices[0], kind.choices[-1]
    if kind is options.DURATION_TYPE:
        return "90", "2m"
    if isinstance(kind, click.IntRange):
        return str(kind.min or 1), str((kind.min or 1) + 1)
    if kind.name.startswith("float"):
        return "0.5", "0.25"
    return ("3,1" if kind is options.WEIGHTS_TYPE else "a"), "4"


SINGLE = [
    (name, option)
    for name in COMMANDS
    for option in command(name).params
    if isinstance(option, click.Option)
    and not option.multiple
    and (not option.is_flag or option.secondary_opts)
]


def test_the_cases_are_all_that_there_are():
    """-m of these commands is single, and a flag with --no- has two values."""
    names = {(name, option.name) for name, option in SINGLE}
    assert {(name, "model") for name in ("generate", "tokenize", "classify")} <= names
    assert {("score", "eos"), ("train", "shard"), ("train", "time_"), ("bench", "device")} <= names
    assert len(names) > 150


@pytest.mark.parametrize(
    "name, option", SINGLE, ids=[f"{name} {option.name}" for name, option in SINGLE]
)
def test_two_values_are_refused_and_named(name, option, capsys, monkeypatch):
    monkeypatch.setenv("LM_MODEL", "unused")
    first, second = two_values(option)
    names = (option.opts[0], (option.secondary_opts or option.opts)[-1])  # -m and --model, if both
    given = [word for word in (names[0], first, names[1], second) if word]
    needed = ["-o", "y"] if name == "export" and option.name != "output" else []
    assert run([name, *given, *needed, "x"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    shown = names if option.is_flag else (first, second)
    long = max(option.opts, key=len)
    expected = f"lm: error: {long} is given 2 values: {shown[0]} and {shown[1]}\n"
    assert output.err == expected + "  give one of them\n"


def parse(*arguments, name="train"):
    return command(name).make_context(name, list(arguments)).params


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (("-m", "A", "--model", "A"), "model", "A"),
        (("--temperature", "0", "--temperature", "0.0"), "temperature", 0.0),
        (("-q", "-q"), "quiet", True),
        (("--seed=3", "--seed", "03"), "seed", 3),
    ],
)
def test_a_value_may_be_repeated(arguments, key, value):
    assert parse(*arguments, name="generate")[key] == value


def test_the_environment_does_not_count(monkeypatch):
    monkeypatch.setenv("LM_MODEL", "A")
    assert parse("-m", "B", name="classify")["model"] == "B"
    assert parse(name="classify")["model"] == "A"
    assert parse("-m", "B", "-m", "C", name="perplexity")["models"] == ("B", "C")


def test_help_and_completion_come_first(capsys):
    assert run(["score", "-m", "A", "-m", "B", "--help"]) == 0
    assert "Usage: lm score" in capsys.readouterr().out
    command("score").make_context("score", ["-m", "A", "-m", "B"], resilient_parsing=True)


def test_fields_in_two_ways():
    assert parse("--field", "a", "--field", "b", "--fields", "a, b")["fields"] == ("a", "b")
    with pytest.raises(UsageError, match="--fields b,c and --field a name different fields"):
        parse("--field", "a", "--fields", "b,c")


@pytest.mark.parametrize(
    "sets, train, both",
    [
        (("train.steps=3", "train.steps=4"), {}, "--set train.steps=3 and --set train.steps=4"),
        (("train.steps=3", " train.steps=4"), {}, "--set train.steps=3 and --set  train.steps=4"),
        (("train.steps=3",), {"steps": 4}, "--set train.steps=3 and --steps 4"),
        (("train.lora_rank=2",), {"lora_rank": 4}, "--set train.lora_rank=2 and --lora 4"),
        (
            ("train.precision=float32",),
            {"precision": "bfloat16"},
            "--set train.precision=float32 and --dtype bfloat16",
        ),
    ],
)
def test_one_key_of_a_recipe_has_one_value(sets, train, both):
    with pytest.raises(UsageError) as caught:
        recipes.resolve("tiny", sets, train)
    assert caught.value.what == f"{sets[0].partition('=')[0]} is given two values: {both}"


def test_one_key_may_be_set_twice_to_the_same_value():
    sets = ("train.time=5m", "train.time=300", "train.learning_rate=1e-3")
    recipe = recipes.resolve("tiny", sets, {"time": 300.0}, {"train.learning_rate": 5.0})
    assert (recipe.train.time, recipe.train.learning_rate) == (300.0, 1e-3)
    with pytest.raises(UsageError, match=r"train\.learning_rate is given two values"):
        recipes.with_settings(recipe, ["train.learning_rate=1e-3", "train.learning_rate=2e-3"])


def test_a_preset_file_names_a_key_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny\ntrain:\n  steps: 3\n  context: 64\n  steps: 5\n")
    with pytest.raises(UsageError, match="line 5: is not YAML: the key steps is there twice"):
        recipes.resolve(str(file))
