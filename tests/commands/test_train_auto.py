"""lm train with preset auto: what it reports and stores; settings of the user override it."""

import json

import yaml


def recipe(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))


def test_the_choice_is_three_notes_and_stored_in_the_recipe(inside, story, tmp_path):
    done = inside("train", story, "-o", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0
    stderr = [
        line.removeprefix(b"lm: auto: ").decode()
        for line in done.stderr.splitlines()
        if line.startswith(b"lm: auto: ")
    ]
    stored = recipe(tmp_path / "run")
    assert stored["choice"] == stderr and len(stderr) == 3
    assert (
        f"{stored['model']['num_hidden_layers']} layers × {stored['model']['hidden_size']}"
        in stderr[0]
    )
    assert (
        "vocabulary" in stderr[1]
        and f"batches of {stored['train']['batch_tokens']:,} tokens" in stderr[2]
    )


def test_settings_of_the_user_override_auto_and_are_named(inside, story, tmp_path):
    done = inside(
        "train",
        story,
        "-o",
        tmp_path / "run",
        "--steps",
        2,
        "--set",
        "model.hidden_size=48",
        "--set",
        "model.num_attention_heads=4",
        "--set",
        "train.dropout=0.3",
    )
    assert done.returncode == 0
    stored = recipe(tmp_path / "run")
    assert stored["model"]["hidden_size"] == 48 and stored["train"]["dropout"] == 0.3
    assert stored["choice"][-1].startswith("overridden by your settings: model.hidden_size")
    assert "train.dropout" in stored["choice"][-1]


def test_a_resumed_run_keeps_the_choice_and_tokenizer_its_size(inside, story, trained, tmp_path):
    done = inside("train", story, "-o", tmp_path / "run", "--steps", 2, "--tokenizer", trained[0])
    assert done.returncode == 0
    before = recipe(tmp_path / "run")
    size = json.loads((trained[0] / "config.json").read_text())["vocab_size"]
    assert before["model"]["vocab_size"] == size
    assert inside("train", "--resume", tmp_path / "run").returncode == 0
    assert recipe(tmp_path / "run")["choice"] == before["choice"]


def test_with_a_time_budget_the_machine_is_measured(lm, story, tmp_path):
    done = lm("train", story, "-o", tmp_path / "run", "--time", "10s")
    assert done.returncode == 0 and b"GFLOP/s (measured)" in done.stderr
    assert recipe(tmp_path / "run")["train"]["time"] == 10.0
