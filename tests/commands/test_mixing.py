"""lm train a.txt b.jsonl --weights 3,1: what is reported and stored, and resuming."""

import json

import pytest
import yaml

SMALL = (
    "--preset",
    "tiny",
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "tokenizer.vocab_size=300",
    "--set",
    "train.context=32",
    "--set",
    "train.batch_tokens=256",
    "--set",
    "train.sample_every=1000000",
)


@pytest.fixture
def sources(tmp_path):
    """A text, and rows of a tenth of its size."""
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(600)))
    rows.write_text("".join(json.dumps({"text": f"ROW {i}: {i * i}"}) + "\n" for i in range(150)))
    return text, rows


def recipe(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_shares_and_epochs_are_reported_and_stored(inside, sources, tmp_path):
    options = ("--weights", "3,1", "--steps", 20, "--set", "train.validation_bytes=250000")
    done = inside("train", *sources, "-o", tmp_path / "run", *SMALL, *options)
    stderr = done.stderr.decode()
    assert done.returncode == 0, stderr
    facts = recipe(tmp_path / "run")
    assert [
        (share["name"], share["files"], share["weight"]) for share in facts["data"]["shares"]
    ] == [(str(sources[0]), 1, 3.0), (str(sources[1]), 1, 1.0)]
    drawn = facts["result"][
        "drawn"
    ]  # 20 steps of 8 rows, in a random order 3 in 4 of them from the first
    assert sum(source["rows"] for source in drawn) == 160 and 114 <= drawn[0]["rows"] <= 126
    for source, percent in zip(drawn, (75, 25)):
        lines = [
            line
            for line in stderr.splitlines()
            if line.startswith(f"lm: {source['name']}: {percent} % of the rows, ")
        ]
        assert len(lines) == 2 and all(
            f"{source['epochs']:.3g} epochs of its " in line for line in lines
        )
    assert drawn[1]["epochs"] > drawn[0]["epochs"]
    held_out = {entry["file"] for entry in facts["validation"]}
    assert held_out == set(map(str, sources))  # of each


def test_rows_are_drawn_by_the_weights(inside, sources, tmp_path, monkeypatch):
    from lmcli.training.train_step import TrainStep

    seen = []
    monkeypatch.setattr(
        TrainStep,
        "_accumulate",
        lambda run: (seen.append(run.rows.batch(run.counters.rows, 512)), 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        inside("train", *sources, "--weights", "1,4", "-o", tmp_path / "run", *SMALL, "--steps", 1)
    from lmcli.text import tokenizer

    tokens = tokenizer.load(tmp_path / "run")
    rows = [tokens.decode(row.tolist()) for row in seen[0]]
    assert 0.7 < sum("ROW" in row for row in rows) / 512 < 0.9
    assert not any("ROW" in row and "baker" in row for row in rows)


def test_a_resumed_mixture_equals_an_uninterrupted_one(
    inside, stopped_after_five, sources, tmp_path
):
    options = ("--weights", "3,1", *SMALL, "--steps", 10, "--threads", 1)
    whole = inside("train", *sources, "-o", tmp_path / "whole", *options)
    assert (
        stopped_after_five("train", *sources, "-o", tmp_path / "parts", *options).returncode == 130
    )
    again = inside("train", "--resume", tmp_path / "parts")
    assert (whole.returncode, again.returncode) == (0, 0), again.stderr.decode()
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert (
        one == other
        and recipe(tmp_path / "whole")["result"]["drawn"]
        == recipe(tmp_path / "parts")["result"]["drawn"]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--weights", "3"), "1 weights for 2 sources of data"),
        (("--weights", "3,0"), "'3,0': give numbers above 0, as in 3,1"),
        (("--weights", "3,x"), "numbers above 0"),
        (("--weights", "1,nan"), "numbers above 0"),
        (("--weights", "1e9,1"), "1 is less than 1e-05 of all weights"),
        (
            ("--weights", "1,1", "--target", "x.txt"),
            "--weights mixes texts, --target pairs the lines of two",
        ),
        (
            ("--weights", "1,1", "--preset", "encoder-small"),
            "--weights mixes text, and objective classification learns from",
        ),
    ],
)
def test_impossible_mixtures_are_errors(inside, sources, tmp_path, options, expected):
    if "encoder-small" in options:
        sources[1].write_text('{"text": "a", "label": "b"}\n' * 30)
    done = inside("train", *sources, "-o", tmp_path / "run", "--steps", 1, *options)
    assert done.returncode == 2 and expected in done.stderr.decode(), done.stderr.decode()
    assert not (tmp_path / "run").exists()


def test_a_source_too_small_is_named(inside, sources, tmp_path):
    sources[1].write_text('{"text": "a b"}\n{"text": "c"}\n')
    done = inside(
        "train", *sources, "--weights", "1,1", "-o", tmp_path / "run", *SMALL, "--steps", 1
    )
    assert done.returncode == 1 and f"{sources[1]}: only " in done.stderr.decode()
