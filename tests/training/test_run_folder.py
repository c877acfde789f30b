"""The folder of a run: who may claim it, what is removed, and metrics that stay whole."""

import json

import pytest

from lmcli.errors import UsageError, UserError
from lmcli.training import run_folder


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    return folder


def test_claiming_makes_the_folder_and_its_parents_and_abandoning_removes_them(tmp_path):
    claimed = run_folder.claim(str(tmp_path / "a" / "b" / "run"), "", overwrite=False)
    assert claimed.path.is_dir()
    claimed.abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandoning_keeps_folders_that_were_there_or_hold_something(tmp_path):
    (tmp_path / "there").mkdir()
    claimed = run_folder.claim(str(tmp_path / "there" / "run"), "", overwrite=False)
    fill(claimed.path, "config.json", "mine.txt")
    claimed.begin()
    fill(claimed.path, "config.json")
    claimed.abandon()
    assert [path.name for path in (tmp_path / "there" / "run").iterdir()] == ["mine.txt"]


def test_a_run_that_is_to_be_overwritten_stays_until_the_new_one_begins(tmp_path):
    names = ("recipe.yaml", "model.safetensors", "metrics.jsonl", "state/step-000000001/weights.safetensors", "mine.txt")
    folder = fill(tmp_path / "run", *names)
    claimed = run_folder.claim(str(folder), "", overwrite=True)
    claimed.abandon()
    assert all((folder / name).read_text() == "old" for name in names)
    claimed.begin()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("names, overwrite, told", [
    (("recipe.yaml",), False, "--overwrite starts anew"), (("thesis.txt",), False, "holds no run"),
    (("thesis.txt",), True, "holds no run")])
def test_a_folder_that_holds_something_is_refused(tmp_path, names, overwrite, told):
    with pytest.raises(UsageError, match=told):
        run_folder.claim(str(fill(tmp_path / "run", *names)), "", overwrite)


def test_a_file_is_no_folder(tmp_path):
    fill(tmp_path, "file")
    with pytest.raises(UsageError, match="is a file"):
        run_folder.claim(str(tmp_path / "file"), "", overwrite=True)
    with pytest.raises(UserError, match="cannot write"):
        run_folder.claim(str(tmp_path / "file" / "run"), "", overwrite=True)


def test_an_empty_folder_may_be_claimed(tmp_path):
    assert run_folder.claim(str(tmp_path), "", overwrite=False).path == tmp_path


def test_names_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(run_folder.claim(None, "book", False).path) for _ in range(3)] == ["runs/book", "runs/book-2", "runs/book-3"]


def test_metrics_after_the_step_that_is_resumed_are_cut_off(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.5}) for step in (1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    folder.open_metrics(2)
    folder.log({"step": 3, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in folder.metrics()] == [(1, 1.5), (2, 1.5), (2, 1.5), (3, 0.5)]


@pytest.mark.parametrize("after", ['{"step": 2, "val_loss": 3.0}\n', '{"step": 3, "lo', "\0\0\0\0", '{"step": 3}\n\0\0'])
def test_what_was_logged_after_the_state_goes_even_of_the_same_step(tmp_path, after):
    """An evaluation that a stop made once more, half a line, or the zeros that a machine without power leaves."""
    folder, kept = run_folder.RunFolder(tmp_path), '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + after)
    assert folder.open_metrics(2, len(kept))
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    folder.log({"step": 3})
    assert folder.flush_metrics() == len(kept) + len('{"step": 3}\n')


@pytest.mark.parametrize("found", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2, "more": 1}\n{"step": 3}\n'])
def test_metrics_that_are_not_those_of_the_state_are_told(tmp_path, found):
    folder = run_folder.RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(found)
    assert not folder.open_metrics(2, len('{"step": 1}\n{"step": 2}\n'))
    assert all(row["step"] <= 2 for row in folder.metrics())


@pytest.mark.parametrize("content", [None, "train: [1", "- a list"])
def test_only_a_folder_with_a_readable_recipe_is_reopened(tmp_path, content):
    if content:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        run_folder.reopen(tmp_path)
