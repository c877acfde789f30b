"""lm train with preset auto: what it reports and stores; settings of the user override it."""

import itertools
import json
import subprocess
import sys

import pytest
import yaml

SMALL = ("--steps", 1, "--set", "train.context=16", "--set", "tokenizer.vocab_size=300")


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


def test_with_a_time_budget_the_machine_is_measured(environment, story, tmp_path):
    command = [sys.executable, "-m", "lmcli", "train", story, "-o", tmp_path / "run"]
    command += ["--time", "1m", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        lines = iter(process.stderr.readline, b"")
        notes = [*itertools.takewhile(lambda line: b"; into " not in line, lines)]
        process.kill()  # its steps are of no interest
    assert any(b"GFLOP/s (measured)" in note for note in notes)
    assert recipe(tmp_path / "run")["train"]["time"] == 60.0


@pytest.mark.parametrize(
    "header, options, preset, kind",
    [
        ("text,label", (), "classify", "labeled texts (text + label)"),
        (
            "review,mood",
            ("--fields", "text=review,label=mood"),
            "classify",
            "labeled texts (review + mood)",
        ),
        ("source,target", (), "translate", "pairs (source + target)"),
    ],
)
def test_rows_decide_about_the_preset_and_the_first_line_says_so(
    inside, tmp_path, header, options, preset, kind
):
    rows = "".join(f"text {i} of them,{'good' if i % 2 else 'bad'}\n" for i in range(30))
    (tmp_path / "a.csv").write_text(f"{header}\n{rows}")
    done = inside("train", tmp_path / "a.csv", *options, *SMALL, "-o", tmp_path / "run")
    reason = f"as preset {preset}, since the data are {kind}"
    assert done.returncode == 0 and done.stderr.decode().splitlines()[0] == f"lm: auto: {reason}"
    stored = recipe(tmp_path / "run")
    assert stored["choice"] == [reason]
    assert stored["train"]["objective"] == ("classification" if preset == "classify" else "seq2seq")
    columns = {"classify": header.split(",")[:1], "translate": ["source", "target"]}
    assert stored["data"]["fields"] == columns[preset]


def test_parallel_files_are_translated(inside, tmp_path):
    """They were read as one text by a language model."""
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("".join(f"line {i} {name}\n" for i in range(30)))
    files = (tmp_path / "a.en", "--target", tmp_path / "a.de")
    done = inside("train", *files, *SMALL, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"lm: auto: as preset translate, since the data are pairs")


def test_columns_that_are_not_known_are_refused_with_a_command_that_works(inside, tmp_path):
    rows = "".join(f"text {i} of them,{i % 2}\n" for i in range(30))
    (tmp_path / "a.csv").write_text(f"review,stars\n{rows}")
    done = inside("train", tmp_path / "a.csv", *SMALL, "-o", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    message = done.stderr.decode()
    assert len(message.splitlines()) == 2  # and no line about a choice or a measurement
    command = message.partition("a classifier: lm ")[2].partition(";")[0].split()
    again = inside(*command, *SMALL, "-o", tmp_path / "run")
    assert again.returncode == 0 and recipe(tmp_path / "run")["model"]["labels"] == ["0", "1"]


def test_a_set_objective_decides_about_the_preset(inside, tmp_path):
    (tmp_path / "a.txt").write_text("some words of a text\n" * 60)
    chosen = ("--set", "train.objective=masked")
    done = inside("train", tmp_path / "a.txt", *chosen, *SMALL, "-o", tmp_path / "run")
    reason = b"lm: auto: as preset encoder-small, since train.objective is masked"
    assert done.returncode == 0 and done.stderr.splitlines()[0] == reason
    done = inside("train", tmp_path / "a.txt", *chosen, "--set", "model.shape=decoder", *SMALL)
    assert done.returncode == 2 and b"objective masked needs the shape encoder" in done.stderr
