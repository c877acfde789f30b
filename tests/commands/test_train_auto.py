"""lm train without a preset: what it says it chose, what it stores, and that what the user sets goes first."""

import json

import yaml


def recipe(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))


def test_three_lines_tell_the_choice_and_the_recipe_keeps_it(inside, story, tmp_path):
    done = inside("train", story, "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0
    told = [line.removeprefix(b"lm: auto: ").decode() for line in done.stderr.splitlines() if line.startswith(b"lm: auto: ")]
    stored = recipe(tmp_path / "run")
    assert stored["choice"] == told and len(told) == 3
    assert f"{stored['model']['num_hidden_layers']} layers × {stored['model']['hidden_size']}" in told[0]
    assert "vocabulary" in told[1] and f"batches of {stored['train']['batch_tokens']:,} tokens" in told[2]


def test_what_the_user_sets_goes_first_and_is_named(inside, story, tmp_path):
    done = inside("train", story, "-o", tmp_path / "run", "--steps", 2, "--set", "model.hidden_size=48",
                  "--set", "model.num_attention_heads=4", "--set", "train.dropout=0.3")
    assert done.returncode == 0
    stored = recipe(tmp_path / "run")
    assert stored["model"]["hidden_size"] == 48 and stored["train"]["dropout"] == 0.3
    assert stored["choice"][-1].startswith("but for what you set yourself: model.hidden_size")
    assert "train.dropout" in stored["choice"][-1]


def test_a_resumed_run_keeps_the_choice_and_a_given_tokenizer_its_size(inside, story, trained, tmp_path):
    done = inside("train", story, "-o", tmp_path / "run", "--steps", 2, "--tokenizer", trained[0])
    assert done.returncode == 0
    before = recipe(tmp_path / "run")
    size = json.loads((trained[0] / "config.json").read_text())["vocab_size"]
    assert before["model"]["vocab_size"] == size
    assert inside("train", "--resume", tmp_path / "run").returncode == 0
    assert recipe(tmp_path / "run")["choice"] == before["choice"]


def test_with_a_time_budget_the_machine_is_measured(lm, story, tmp_path):
    done = lm("train", story, "-o", tmp_path / "run", "--time", "10s")
    assert done.returncode == 0 and b"GFLOP/s, as measured here" in done.stderr
    assert recipe(tmp_path / "run")["train"]["time"] == 10.0
