"""The folder of a run: claims, what is removed, and metrics without gaps."""

import json

import pytest

from lmcli.errors import UsageError, UserError
from lmcli.runs import run_folder


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    return folder


def test_claim_creates_folders_and_abandon_removes_them(tmp_path):
    claimed = run_folder.claim(str(tmp_path / "a" / "b" / "run"), "", overwrite=False)
    assert claimed.path.is_dir()
    claimed.abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandon_keeps_folders_that_existed_or_are_not_empty(tmp_path):
    (tmp_path / "there").mkdir()
    claimed = run_folder.claim(str(tmp_path / "there" / "run"), "", overwrite=False)
    fill(claimed.path, "config.json", "mine.txt")
    claimed.begin()
    fill(claimed.path, "config.json")
    claimed.abandon()
    assert [path.name for path in (tmp_path / "there" / "run").iterdir()] == ["mine.txt"]


def test_an_overwritten_run_stays_until_the_new_one_begins(tmp_path):
    names = (
        "recipe.yaml",
        "model.safetensors",
        "metrics.jsonl",
        "state/step-000000001/weights.safetensors",
        "mine.txt",
    )
    folder = fill(tmp_path / "run", *names)
    claimed = run_folder.claim(str(folder), "", overwrite=True)
    claimed.abandon()
    assert all((folder / name).read_text() == "old" for name in names)
    claimed.begin()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "names, overwrite, message",
    [
        (("recipe.yaml",), False, "--overwrite starts anew"),
        (("thesis.txt",), False, "holds no run"),
        (("thesis.txt",), True, "holds no run"),
    ],
)
def test_a_folder_that_is_not_empty_is_refused(tmp_path, names, overwrite, message):
    with pytest.raises(UsageError, match=message):
        run_folder.claim(str(fill(tmp_path / "run", *names)), "", overwrite)


def test_a_file_is_refused(tmp_path):
    fill(tmp_path, "file")
    with pytest.raises(UsageError, match="is a file"):
        run_folder.claim(str(tmp_path / "file"), "", overwrite=True)
    with pytest.raises(UserError, match="cannot make this folder"):
        run_folder.claim(str(tmp_path / "file" / "run"), "", overwrite=True)


def test_an_empty_folder_may_be_claimed(tmp_path):
    assert run_folder.claim(str(tmp_path), "", overwrite=False).path == tmp_path


def test_names_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(run_folder.claim(None, "book", False).path) for _ in range(3)] == [
        "runs/book",
        "runs/book-2",
        "runs/book-3",
    ]


def test_metrics_after_the_resumed_step_are_cut_off(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.5}) for step in (1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    folder.open_metrics(2)
    folder.log({"step": 3, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in folder.metrics()] == [
        (1, 1.5),
        (2, 1.5),
        (2, 1.5),
        (3, 0.5),
    ]


@pytest.mark.parametrize(
    "after", ['{"step": 2, "val_loss": 3.0}\n', '{"step": 3, "lo', "\0\0\0\0", '{"step": 3}\n\0\0']
)
def test_lines_logged_after_the_state_are_cut_off_even_of_its_step(tmp_path, after):
    """A repeated evaluation after a stop, half a line, or the zeros that a power loss leaves."""
    folder, kept = run_folder.RunFolder(tmp_path), '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + after)
    assert folder.open_metrics(2, len(kept))
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    folder.log({"step": 3})
    assert folder.flush_metrics() == len(kept) + len('{"step": 3}\n')


@pytest.mark.parametrize(
    "content", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2, "more": 1}\n{"step": 3}\n']
)
def test_metrics_that_differ_from_the_state_are_reported(tmp_path, content):
    folder = run_folder.RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(content)
    assert not folder.open_metrics(2, len('{"step": 1}\n{"step": 2}\n'))
    assert all(row["step"] <= 2 for row in folder.metrics())


@pytest.mark.parametrize("content", [None, "train: [1", "- a list"])
def test_only_a_folder_with_a_readable_recipe_is_reopened(tmp_path, content):
    if content:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        run_folder.reopen(tmp_path)
