"""Presets and recipes: what a file may contain, what it inherits, and error messages."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli import recipes
from lmcli.config import SECTIONS, Recipe, TrainConfig
from lmcli.errors import UsageError, UserError
from lmcli.recipes import from_values, load_yaml, preset_names, resolve, to_yaml

BUDGETS = ("time", "tokens", "steps", "epochs")


def written(folder, text, name="mine.yaml"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def budgets(recipe):
    return {name: getattr(recipe.train, name) for name in BUDGETS if getattr(recipe.train, name)}


class TestPresets:
    @pytest.mark.parametrize("name", preset_names())
    def test_every_shipped_preset_loads_and_has_one_budget(self, name):
        recipe = resolve(name)
        assert recipe.model.complete().head_dim % 2 == 0
        assert len(budgets(recipe)) == 1
        assert recipe.train.batch_tokens >= recipe.train.context

    def test_names_are_those_of_the_files(self):
        assert {"tiny", "small", "base"} <= set(preset_names()) and preset_names() == sorted(
            preset_names()
        )

    def test_presets_inside_the_package_have_priority(self, tmp_path, monkeypatch):
        """As in an installed wheel."""
        (tmp_path / "lmcli" / "presets").mkdir(parents=True)
        (tmp_path / "presets").mkdir()
        monkeypatch.setattr(recipes, "__file__", str(tmp_path / "lmcli" / "recipes.py"))
        assert recipes.preset_folder() == tmp_path / "lmcli" / "presets"
        (tmp_path / "lmcli" / "presets").rmdir()
        assert recipes.preset_folder() == tmp_path / "presets"

    def test_the_error_for_an_unknown_name_has_the_nearest_one(self):
        with pytest.raises(
            UsageError, match=r"--preset: no preset is named 'smal'; did you mean 'small'\?"
        ) as caught:
            resolve("smal")
        assert "tiny" in caught.value.hint and ".yaml file" in caught.value.hint

    def test_a_missing_file_is_an_error(self):
        with pytest.raises(UsageError, match=r"no/such\.yaml: no such preset file"):
            resolve("no/such.yaml")


class TestFiles:
    def test_missing_keys_have_their_defaults(self, tmp_path):
        recipe = resolve(written(tmp_path, "train:\n  steps: 7\n"))
        assert recipe == Recipe(train=TrainConfig(steps=7))

    def test_an_exponent_without_a_point_is_a_number(self, tmp_path):
        """YAML reads 1e-5 as text."""
        assert yaml.safe_load("1e-5") == "1e-5"
        assert (
            resolve(
                written(tmp_path, "train: {learning_rate: 1e-5, tokens: 2_500_000}")
            ).train.learning_rate
            == 1e-5
        )

    def test_empty_sections_are_allowed(self, tmp_path):
        assert resolve(written(tmp_path, "train:\n#  steps: 7\nmodel: {}\n")) == Recipe()

    @pytest.mark.parametrize(
        "text, where, message",
        [
            ("trian: {}", "mine.yaml", "unknown section 'trian'; did you mean 'train'?"),
            ("trian: {steps: 3}", "mine.yaml", "unknown section 'trian'; did you mean 'train'?"),
            ("zzz: 1", "mine.yaml", "unknown section 'zzz'\n"),
            ("1: 2", "mine.yaml", "unknown section 1"),
            (
                "train: {learnig_rate: 1}",
                "mine.yaml",
                "unknown key train.learnig_rate; did you mean 'learning_rate'?",
            ),
            ("train: {3: 1}", "mine.yaml", "unknown key train.3"),
            (
                "model: {hidden: 1}",
                "mine.yaml",
                "unknown key model.hidden; did you mean 'hidden_act'?",
            ),
            ("train: [steps]", "mine.yaml", "section train is not a mapping of keys"),
            ("train: {steps: true}", "mine.yaml: train", "steps: True is not a whole number"),
            ("train: {steps: .inf}", "mine.yaml: train", "steps: inf is not a whole number"),
            ("train: {steps: 2024-01-02}", "mine.yaml: train", "is not a whole number"),
            ("train: {warmup: .nan}", "mine.yaml: train", "warmup: nan is outside"),
            ("train: {schedule: {}}", "mine.yaml: train", "schedule: {} is not a word"),
            ("- train", "mine.yaml", "is not a mapping of sections"),
            ("", "mine.yaml", "is not a mapping of sections"),
            ("train: {steps: 1}\nmodel: [\n", "mine.yaml, line 3", "is not YAML"),
            ("train:\n  steps: 1\n bad: 2\n", "mine.yaml, line 3", "is not YAML"),
            ("train:\n\tsteps: 1\n", "mine.yaml, line 2", "is not YAML"),
            ("train: {seed: 2024-99-99}", "mine.yaml", "is not YAML: month must be in"),
            ("a: 1\n---\nb: 2\n", "mine.yaml, line 2", "is not YAML"),
            ("train: !!python/object:os.system {}", "mine.yaml, line 1", "is not YAML"),
            ("a\0b", "mine.yaml", "is not YAML"),
            ("? [a]\n: 1\n", "mine.yaml, line 1", "is not YAML: found unhashable key"),
            (b"train: \xff", "mine.yaml", "is not YAML: 'utf-8'"),
            ("[" * 100_000, "mine.yaml, line 1", "is nested more than 50 deep"),
        ],
    )
    def test_mistakes_name_the_file_and_the_nearest_key(self, tmp_path, text, where, message):
        with pytest.raises(UsageError) as caught:
            resolve(written(tmp_path, text))
        assert message in str(caught.value)
        assert caught.value.where == str(tmp_path / where) and caught.value.exit_code == 2

    def test_an_alias_is_refused(self, tmp_path):
        text = "train: &a {steps: 1}\nmodel: *a\n"
        with pytest.raises(UsageError, match=r"uses a YAML alias \(\*name\)"):
            resolve(written(tmp_path, text))

    def test_a_file_that_cannot_be_read_is_an_error(self, tmp_path):
        with pytest.raises(UserError, match="cannot read: No such file"):
            load_yaml(tmp_path / "gone.yaml")


class TestExtends:
    def test_a_child_has_only_its_differences(self, tmp_path):
        parent, child = (
            resolve("tiny"),
            resolve(written(tmp_path, "extends: tiny\nmodel: {num_hidden_layers: 3}\n")),
        )
        assert child == dataclasses.replace(
            parent, model=dataclasses.replace(parent.model, num_hidden_layers=3)
        )

    def test_extending_files_in_the_same_folder_over_two_steps(self, tmp_path):
        written(tmp_path, "extends: b.yaml\ntrain: {steps: 1}\n", "c.yaml")
        written(tmp_path, "extends: a.yaml\ntrain: {steps: 2, seed: 2}\n", "b.yaml")
        written(tmp_path, "train: {steps: 3, seed: 3, context: 33}\n", "a.yaml")
        train = resolve(str(tmp_path / "c.yaml")).train
        assert (train.steps, train.seed, train.context) == (1, 2, 33)

    def test_a_preset_may_have_the_name_of_the_shipped_one_it_extends(self, tmp_path):
        assert resolve(written(tmp_path, "extends: tiny\n", "tiny.yaml")) == resolve("tiny")

    def test_a_cycle_is_refused(self, tmp_path):
        written(tmp_path, "extends: b.yaml\n", "a.yaml")
        written(tmp_path, "extends: a.yaml\n", "b.yaml")
        with pytest.raises(UsageError, match=r"a\.yaml: extends itself"):
            resolve(str(tmp_path / "a.yaml"))

    @pytest.mark.parametrize(
        "parent, message", [("gone.yaml", "gone.yaml: cannot read"), ("tiy", "did you mean 'tiny'")]
    )
    def test_a_missing_parent_is_an_error(self, tmp_path, parent, message):
        with pytest.raises(UserError, match=message):
            resolve(written(tmp_path, f"extends: {parent}\n"))


class TestSettings:
    def test_settings_and_options_override_the_preset(self):
        recipe = resolve(
            "tiny",
            ["train.seed=2", " model.hidden_size =64", "train.dropout=1e-1"],
            {"context": 99, "seed": None},
        )
        assert (recipe.train.seed, recipe.train.context, recipe.train.dropout) == (2, 99, 0.1)
        assert recipe.model.hidden_size == 64
        assert resolve("tiny", (), {"seed": 5}).train.seed == 5

    @pytest.mark.parametrize(
        "setting, message",
        [
            (
                "train.learnig_rate=1",
                "--set: unknown key train.learnig_rate; did you mean 'learning_rate'?",
            ),
            ("trian.seed=1", "--set: unknown section 'trian'; did you mean 'train'?"),
            ("seed=1", "--set: 'seed=1' is not section.key=value"),
            ("train.seed", "--set: 'train.seed' is not section.key=value"),
            ("train.seed=", "--set: train: seed: None is not a whole number"),
            ("train.seed=x", "--set: train: seed: 'x' is not a whole number"),
            ("train.seed=[", "has no readable value"),
            ("train.seed=*a", "has no readable value"),
            ("train.seed=2024-99-99", "has no readable value"),
            ("train.warmup=.nan", "--set: train: warmup: nan is outside 0.0 to 1.0"),
        ],
    )
    def test_wrong_settings_are_refused(self, setting, message):
        with pytest.raises(UsageError) as caught:
            resolve("tiny", [setting])
        assert message in str(caught.value) and caught.value.where.startswith("--set")

    def test_the_error_for_an_option_names_the_option(self):
        with pytest.raises(UsageError, match="--context: train: context: 1 is outside 8 to"):
            resolve("tiny", train={"context": 1})

    @pytest.mark.parametrize(
        "sets, options, expected",
        [
            ((), {}, {"time": 60.0, "steps": 9}),
            ((), {"tokens": 1000}, {"tokens": 1000}),
            ((), {"time": 5.0}, {"time": 5.0}),
            (("train.steps=7",), {}, {"steps": 7}),
            (("train.steps=7",), {"epochs": 2.0}, {"steps": 7, "epochs": 2.0}),
            (("train.seed=7",), {"context": 32}, {"time": 60.0, "steps": 9}),
        ],
    )
    def test_a_budget_replaces_all_budgets_of_the_preset(self, tmp_path, sets, options, expected):
        file = written(tmp_path, "train: {time: 60s, steps: 9}")
        assert budgets(resolve(file, sets, options)) == expected


def value_of(field):
    """Values of a field within its range."""
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        one = st.sampled_from(choices)
        return one if field.type is str else st.lists(one, max_size=3).map(tuple)
    if field.type is bool:
        return st.booleans()
    if field.type is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if field.type is str:
        return st.text("abcxyz_-0 ", max_size=5)
    if field.type == tuple[str, ...]:
        return st.lists(st.text("abcxyz_-0 ", max_size=5), max_size=3).map(tuple)
    if field.type == tuple[int, ...]:
        return st.lists(st.integers(0, 99), max_size=3).map(tuple)
    if field.type == tuple[tuple[int, ...], ...]:
        return st.lists(st.lists(st.integers(0, 99), max_size=2).map(tuple), max_size=2).map(tuple)
    if field.type == tuple[tuple[tuple[int, ...], float], ...]:
        ids = st.lists(st.integers(0, 99), min_size=1, max_size=2).map(tuple)
        return st.lists(st.tuples(ids, st.floats(-9, 9)), max_size=2).map(tuple)
    if field.type == tuple[int, float] | None:
        return st.none() | st.tuples(st.integers(0, 99), st.floats(0.5, 2))
    numbers = st.integers(low, high)
    return numbers if field.type is int else st.none() | numbers


def section(kind):
    return st.fixed_dictionaries(
        {field.name: value_of(field) for field in dataclasses.fields(kind)}
    ).map(lambda values: kind(**values))


any_recipe = st.fixed_dictionaries({name: section(kind) for name, kind in SECTIONS.items()}).map(
    lambda sections: Recipe(**sections)
)


class TestStored:
    @given(any_recipe)
    @settings(max_examples=60)
    def test_round_trip_through_yaml(self, recipe):
        assert from_values(yaml.safe_load(to_yaml(recipe)), "recipe.yaml") == recipe

    @given(any_recipe)
    @settings(max_examples=15)
    def test_a_stored_recipe_is_a_preset(self, tmp_path_factory, recipe):
        """Its facts about data and result are not settings."""
        text = to_yaml(
            recipe,
            versions={"lm": "1"},
            data={"files": ["字.txt"]},
            validation=[],
            result={"steps": 3},
        )
        assert resolve(written(tmp_path_factory.mktemp("r"), text)) == recipe

    def test_facts_follow_the_sections_unchanged(self):
        text = to_yaml(Recipe(), data={"files": ["字.txt"]})
        assert list(yaml.safe_load(text)) == [*SECTIONS, "data"] and "字.txt" in text

    def test_a_damaged_recipe_names_file_and_key(self):
        with pytest.raises(UsageError, match=r"r/recipe\.yaml: unknown key train\.x"):
            from_values({"train": {"x": 1}}, "r/recipe.yaml")
        with pytest.raises(UsageError, match=r"r/recipe\.yaml: section train is not a mapping"):
            from_values({"train": [1]}, "r/recipe.yaml")
        assert from_values({"train": None}, "r/recipe.yaml") == Recipe()
