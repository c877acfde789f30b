"""Evaluations take a tenth of a run at most, in every budget, without a look at the clock."""

import json

import pytest

from lmcli.config import TrainConfig
from lmcli.recipes import load_yaml
from lmcli.training import loop, schedules

SMALL = (
    *("--preset", "tiny", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1"),
    *("--set", "tokenizer.vocab_size=300", "--set", "train.context=32", "--dtype", "float32"),
)


@pytest.fixture
def evaluated(monkeypatch):
    """Tokens of each evaluation."""
    tokens, measure = [], loop.Trainer._measure

    def counted(trainer):
        tokens.append(trainer.evaluation.tokens)
        return measure(trainer)

    monkeypatch.setattr(loop.Trainer, "_measure", counted)
    return tokens


@pytest.mark.parametrize(
    "budget, batch_tokens, times",
    [(("--steps", 30), 1024, 1), (("--tokens", 90_000), 2048, 1), (("--epochs", 5), 2048, 3)],
)
def test_evaluations_cost_a_tenth_of_training(
    inside, story, tmp_path, evaluated, budget, batch_tokens, times
):
    """By floating-point operations: a training token costs three evaluated ones."""
    folder = tmp_path / "run"
    batch = ("--set", f"train.batch_tokens={batch_tokens}")
    done = inside("train", story, "-o", folder, *SMALL, *batch, *budget)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = max(row["tokens"] for row in rows)
    assert sum(evaluated) <= 0.1 * 3 * trained and len(evaluated) >= times
    facts = load_yaml(folder / "recipe.yaml")
    note = "bytes of the validation set are measured, so that this takes less than a tenth"
    assert (note in done.stderr.decode()) == (facts["result"]["val_bytes"] < 10_000)
    # what the run reports is what `lm perplexity` measures
    table = inside("perplexity", "-m", folder, "--validation", "--json", "--device", "cpu")
    assert json.loads(table.stdout)["bytes"] == facts["result"]["val_bytes"]


def test_what_is_asked_for_is_done(inside, story, tmp_path, evaluated):
    options = ("--set", "train.eval_every=2", "--set", "train.batch_tokens=256", "--steps", 6)
    assert inside("train", story, "-o", tmp_path / "run", *SMALL, *options).returncode == 0
    assert len(evaluated) == 3 and sum(evaluated) > 3 * 6 * 256
    assert load_yaml(tmp_path / "run" / "recipe.yaml")["train"]["validation_bytes"] == 250_000


def test_sample_texts_change_no_weights(inside, story, tmp_path):
    folders = [tmp_path / name for name in ("with", "without")]
    for folder, every in zip(folders, (1, 100)):
        options = ("--steps", 4, "--set", f"train.sample_every={every}")
        options += ("--set", "train.dropout=0.1", "--set", "train.batch_tokens=256")
        done = inside("train", story, "-o", folder, *SMALL, *options)
        assert done.stderr.count(b"sample  ") == (4 if every == 1 else 0) - (every == 1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_counted_evaluations_and_bytes_of_a_run():
    """A twentieth of 3 × 1e6 tokens are 150,000."""
    assert schedules.counted_evaluations(1e6, 50_000, 3.0) == 3
    assert schedules.counted_evaluations(1e6, 500_000, 3.0) == 1
    assert schedules.counted_evaluations(1e6, 10, 3.0) == schedules.EVALUATIONS
    assert schedules.counted_evaluations(0, 10, 3.0) == schedules.EVALUATIONS  # by time

    def size(**train) -> int:
        return schedules.validation_bytes(TrainConfig(**train), 1_000_000, 1.5)

    assert size(time=60.0) == size(epochs=100.0) == size(steps=9, eval_every=1) == 250_000
    assert size(steps=9, validation_bytes=77_000) == 77_000
    assert size(epochs=2.0) == 2_000_000 * 1.5 / 20 / 4  # four evaluations
    assert size(tokens=200_000) == 20_000  # one of them, not four of a quarter
    assert size(tokens=50_000) == 7_500
    assert size(tokens=1_000) == 2_000


def test_twenty_examples_are_evaluated_however_long(inside, tmp_path):
    rows = [{"text": "long " * 300 + str(i), "label": i % 2} for i in range(300)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--preset", "classify", *SMALL[2:-2], "--set", "train.batch_tokens=64")
    done = inside("train", data, "-o", tmp_path / "run", *options, "--steps", 2)
    assert done.returncode == 0, done.stderr
    result = load_yaml(tmp_path / "run" / "recipe.yaml")["result"]
    assert 15 <= result["val_targets"] < 30 and result["val_unigram_entropy"] > 0.5
