"""Changes since a run was saved: which are refused, impossible, or only noted."""

import dataclasses
from pathlib import Path

import pytest

from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.runs import changes

RUN = Path("runs/a")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache of its own."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path_factory.mktemp("cache")))


def recipe(section="train", **values) -> Recipe:
    base = Recipe()
    return dataclasses.replace(
        base, **{section: dataclasses.replace(getattr(base, section), **values)}
    )


def test_the_same_recipe_has_no_changes():
    original = recipe(lora_targets=("q", "v"), learning_rate=1 / 3)  # tuples come back as lists
    assert list(changes.settings(changes.plain(original), original)) == []
    assert (
        list(changes.settings({}, original)) == []
    )  # of a state from before this was stored nothing is known


@pytest.mark.parametrize(
    "section, key, value, refused, impossible",
    [
        ("train", "steps", 7, True, False),
        ("train", "seed", 7, True, False),
        ("tokenizer", "vocab_size", 999, True, False),
        ("train", "learning_rate", 0.7, False, False),
        ("train", "precision", "float32", False, False),
        ("generate", "top_k", 7, False, False),
        ("model", "hidden_size", 1024, True, True),
        ("train", "optimizer", "adamw", True, True),
        ("train", "lora_rank", 3, True, True),
    ],
)
def test_each_setting_has_its_kind(section, key, value, refused, impossible):
    (change,) = changes.settings(changes.plain(Recipe()), recipe(section, **{key: value}))
    assert change.what == f"{section}.{key}" and (change.refused, change.impossible) == (
        refused,
        impossible,
    )
    assert str(change).startswith(f"{section}.{key} ") and str(change).endswith(
        f" → {value}".replace("adamw", '"adamw"').replace("float32", '"float32"')
    )


def test_files_are_compared_by_hash_and_unknown_ones_left_out():
    change = list(
        changes.files(
            {"a": "1" * 64, "b": "2" * 64, "c": "3" * 64},
            {"a": "1" * 64, "b": "4" * 64, "d": "5" * 64},
        )
    )
    assert [str(change) for change in change] == [f"b (SHA-256) {'2' * 12} → {'4' * 12}"]


def test_versions_and_code_are_compared_as_far_as_they_are_known():
    here = changes.versions_here()
    assert list(changes.versions(here)) == [] and list(changes.versions({})) == []
    assert list(changes.versions({**here, "python": "2.7", "device": "abacus"})) == []
    change = list(changes.versions({**here, "torch": "1.0", "code": "abc"}))
    assert [str(change) for change in change] == [
        f"code of lm (SHA-256) abc → {here['code']}",
        f"torch 1.0 → {here['torch']}",
    ]
    assert all(change.refused for change in change)


def test_the_code_fingerprint_covers_what_calculates(monkeypatch, tmp_path):
    package = tmp_path / "lmcli"
    for part in ("model", "commands"):
        (package / part).mkdir(parents=True)
        (package / part / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(changes, "__file__", str(package / "training" / "changes.py"))
    change = []
    for part in ("model", "commands"):
        changes.code.cache_clear()
        change.append(changes.code())
        (package / part / "a.py").write_text("x = 2\n")
    changes.code.cache_clear()
    change.append(changes.code())
    changes.code.cache_clear()
    monkeypatch.undo()
    assert change[0] != change[1] == change[2]


def digests(monkeypatch, package, name, *sources):
    """The code's fingerprint for several contents of one file of the package."""
    monkeypatch.setattr(changes, "__file__", str(package / "training" / "changes.py"))
    (package / "kernels").mkdir(parents=True, exist_ok=True)
    for source in sources:
        (package / "kernels" / name).write_text(source)
        changes.code.cache_clear()
        yield changes.code()
    changes.code.cache_clear()


def test_comments_docstrings_and_layout_do_not_change_the_fingerprint(monkeypatch, tmp_path):
    plain, same, *other = digests(
        monkeypatch,
        tmp_path,
        "a.py",
        "def f(x):\n    return x + 1\n",
        '"""A module."""\n\n\ndef f(x):  # adds\n    """Adds one."""\n'
        "    return (\n        x\n        + 1)\n",
        "def f(x):\n    return x + 2\n",
        "def f(x):\n    'a'\n    return x, 'a'\n",
        "def f(y):\n    return y + 1\n",
        "def f(x):\n    return x - 1\n",
        "def f(x=1):\n    return x + 1\n",
        "async def f(x):\n    return x + 1\n",
    )
    assert plain == same and len({plain, *other}) == len(other) + 1


def test_comments_in_c_do_not_change_the_fingerprint(monkeypatch, tmp_path):
    plain, same, *other = digests(
        monkeypatch,
        tmp_path,
        "a.c",
        'int f(void) { return g("/* text */"); }\n',
        'int f(void) /* the\nfirst */  { return g("/* text */"); } // end\n',
        'int f(void) { return g("/* other */"); }\n',
        'int f(void) { return h("/* text */"); }\n',
    )
    assert plain == same and len({plain, *other}) == len(other) + 1


def test_files_that_were_seen_before_are_not_parsed_again(monkeypatch):
    changes.code.cache_clear()
    first = changes.code()
    changes.code.cache_clear()
    monkeypatch.setattr(changes, "syntax", pytest.fail)
    assert changes.code() == first


def change(**kind) -> changes.Change:
    return changes.Change("steps", "1", "2", **kind)


def test_allowed_changes_are_noted():
    notes = []
    changes.require_allowed([change()], RUN, True, notes.append)
    changes.require_allowed([change(refused=False)], RUN, False, notes.append)
    assert notes == ["changed: steps 1 → 2"] * 2


@pytest.mark.parametrize(
    "kind, allow, message, hint",
    [
        ({}, False, "runs/a: has changed since it was saved: steps 1 → 2", "--allow-changes"),
        (
            {"impossible": True},
            True,
            "runs/a: this state was saved with other settings: steps 1 → 2",
            "correct recipe.yaml",
        ),
    ],
)
def test_refused_changes_are_an_error(kind, allow, message, hint):
    with pytest.raises(UserError) as caught:
        changes.require_allowed([change(**kind), change(refused=False)], RUN, allow, pytest.fail)
    first, second = str(caught.value).splitlines()
    assert first == message and hint in second
