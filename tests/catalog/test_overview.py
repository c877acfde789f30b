"""`lm info` without a name: runs and models here and in the Hub's cache."""

import json
import os
import socket
from pathlib import Path

import pytest

from lmcli.catalog import overview
from lmcli.checkpoints import hub
from lmcli.terminal.wrapping import width

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
RESULT = "train:\n  steps: 3\nresult:\n  val_bits_per_byte: 2.5\n  steps: 40\n  stopped: false\n"
EVALUATION = '{"step": 7, "val_loss": 1.5, "val_bits_per_byte": 3.25}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def model(name, recipe=None, metrics="", config=CONFIG):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        if recipe is not None:
            (path / "recipe.yaml").write_text(recipe)
            (path / "metrics.jsonl").write_text(metrics)
        return path

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return model


def row_of(name):
    return next(row for row in overview.local_rows() if row["name"] == name)


def test_a_finished_run(folder):
    folder("runs/a", RESULT, EVALUATION)
    row = row_of("runs/a")
    assert tuple(row) == overview.OVERVIEW_COLUMNS
    assert (row["kind"], row["shape"], row["steps"], row["state"]) == ("run", "decoder", 40, "done")
    assert (row["figure"], row["best"]) == ("bits_per_byte", 2.5)


def test_parameters_are_counted_from_the_config(folder):
    folder("a")
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64  # attention, MLP, norms
    assert row_of("a")["parameters"] == 2 * 32000 * 64 + 2 * block + 64


def test_a_run_that_was_killed_has_the_best_of_its_metrics(folder):
    metrics = (
        EVALUATION + '{"step": 9, "val_loss": 1.8, "val_bits_per_byte": 3.5}\n{"step": 11}\n{"s'
    )
    path = folder("b", "train: {}\n", metrics)
    assert row_of("b")["state"] is None
    (path / "state" / "step-000000009").mkdir(parents=True)
    row = row_of("b")
    assert (row["steps"], row["best"], row["state"]) == (11, 3.25, "resumable")


@pytest.mark.parametrize(
    "metrics, figure, best",
    [
        ('{"val_loss": 1.0, "val_accuracy": 0.5}\n{"val_loss": 2.0, "val_accuracy": 0.75}\n', *x)
        for x in [("accuracy", 0.75)]
    ]
    + [
        ('{"val_loss": 2.0, "val_f1": 0.25}\n{"val_loss": 1.0, "val_f1": 0.125}\n', "f1", 0.25),
        ('{"val_loss": 2.5}\n{"val_loss": 2.0}\n{"val_loss": NaN}\n', "loss", 2.0),
        ("", None, None),
    ],
)
def test_the_figure_is_that_of_the_task(folder, metrics, figure, best):
    folder("c", "", metrics)
    row = row_of("c")
    assert (row["figure"], row["best"]) == (figure, best)


def test_a_run_at_work_is_running_and_a_dead_one_is_not(folder):
    path = folder("d", RESULT)
    (path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert row_of("d")["state"] == "running"
    for text in (f"process 99999999 on {socket.gethostname()}\n", "process 1 on elsewhere\n", "x"):
        (path / ".lock").write_text(text)
        assert row_of("d")["state"] == "done"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "mamba"}', '{"model_type": 3}'])
def test_a_damaged_config_and_recipe_are_no_error(folder, tmp_path, content):
    path = folder("e", "result:\n  - [\nresult:\n  x: 1\n", "\x00\n3\n")
    (path / "config.json").write_text(content)
    row = row_of("e")
    assert row["parameters"] is None and row["steps"] is None


def test_adapters_and_other_folders(folder, tmp_path):
    folder("f", RESULT)
    (tmp_path / "f" / "config.json").rename(tmp_path / "f" / "adapter_config.json")
    (tmp_path / "plain").mkdir()
    assert [(row["name"], row["shape"]) for row in overview.local_rows()] == [("f", "adapter")]


def test_the_cache_counts_what_lm_cannot_read(folder):
    for name, config in (("llama", CONFIG), ("clip", {"model_type": "clip"})):
        folder(f"hub/models--org--{name}/snapshots/1", config=config)
        refs = folder(f"hub/models--org--{name}/refs")
        (refs / "main").write_text("1")
    rows, others = overview.cached_rows()
    assert [(row["name"], row["kind"]) for row in rows] == [("org/llama", "hub")] and others == 1


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits(folder, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    folder("runs/ein sehr langer Name", RESULT)
    folder("runs/红楼梦", RESULT)
    text = overview.readable(overview.local_rows(), [], 3)
    lines = text.splitlines()
    assert max(map(width, lines)) <= columns and "…" not in text
    assert "2.500 bits/byte" in text and "done" in text and "runs/红楼梦" in text
    assert ("decoder" in text) == (columns == 120)
    assert lines[-1] == "in the Hub's cache 3 more, which lm cannot read"
    assert overview.readable([], [], 0) == "no runs or models here; lm train TEXT makes one\n"


def test_ages():
    from datetime import UTC, datetime, timedelta

    def ago(**past):
        return overview.age((datetime.now(UTC) - timedelta(**past)).isoformat())

    texts = [ago(), ago(minutes=3.5), ago(hours=2), ago(days=1.2), ago(days=9)]
    assert texts == ["just now", "3 min ago", "2 h ago", "1 day ago", "9 days ago"]


def test_a_best_figure_that_is_no_number_is_none(tmp_path):
    (tmp_path / "run").mkdir()
    recipe = "result:\n  stopped: false\n  val_loss: .nan\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    (row,) = overview.local_rows(str(tmp_path))
    assert row["best"] is None


def test_folders_that_cannot_be_read_hide_no_others(folder, monkeypatch):
    """As for a user without permissions: `stat` in the folder "secret" is refused."""
    for name in ("runs/a", "runs/secret", "runs/z"):
        folder(name, RESULT)
    os.symlink("loop", "runs/loop")
    os.symlink("nowhere", "runs/broken")
    stat = os.stat

    def refusing(path, *arguments, **options):
        if "secret/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    assert sorted(row["name"] for row in overview.local_rows()) == ["runs/a", "runs/z"]
    assert hub.nearby(Path("runs/x")) == "models here: runs/a, runs/z; "
