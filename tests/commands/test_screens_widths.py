"""Results on terminals of 60, 80 and 120 columns: no line too wide, no number cut."""

import json
import re

import pytest
from drawn_screen import assert_whole

TEXT = "The baker slept all day, and nobody else in the town was awake.\nA dog ran home.\n"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@pytest.fixture
def folder(tmp_path, trained, monkeypatch):
    """The working folder, with texts, labels of two systems and three names of a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT * 3)
    rows = [
        {"text": f"film {number}", "label": ("good", "bad")[number % 3 == 0], "by": number % 2}
        for number in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "p.txt").write_text("good\n" * 40)
    (tmp_path / "q.txt").write_text("good\nbad\n" * 20)
    for name in ("one", "two", "three"):
        (tmp_path / name).symlink_to(trained[0])


SYSTEMS = ("--predictions", "p.txt", "--predictions", "q.txt")
THREE = ("-m", "one", "-m", "two", "-m", "three")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "-m", "one", "text.txt"),
        ("score", *THREE, "--per", "word", "text.txt"),
        ("score", *THREE, "--per", "token", "text.txt"),
        ("perplexity", *THREE[:4], "--documents", "line", "text.txt", "other.txt", "-v"),
        (
            "evaluate",
            "rows.jsonl",
            "--predictions",
            "p.txt",
            "--predictions",
            "q.txt",
            "--by",
            "by",
        ),
        ("info", "one"),
        ("info", "-v", "one"),
        ("tokenize", "-m", "one", "--pieces", "text.txt"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("folder")
def test_tables_fit_and_their_numbers_are_whole(drawn, arguments, columns):
    shown = drawn(*arguments, columns=columns)
    wide = drawn(*arguments, columns=300)
    assert (shown.code, wide.code) == (0, 0), shown.text
    assert_whole(shown)
    if arguments[0] == "info":  # a path that is longer than a line is parted in its numbers
        return
    # a number of fewer digits is that of the wide screen, rounded
    known = {float(each.replace(",", "")) for each in NUMBER.findall(wide.text)}
    for each in NUMBER.findall(re.sub(r"\S*…\S*|… \d+ more facts", "", shown.text)):
        number, digits = float(each.replace(",", "")), len(each.partition(".")[2])
        assert any(abs(number - other) <= 0.5001 * 10**-digits for other in known), each


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.usefixtures("folder")
def test_colored_text_is_whole(drawn, columns):
    shown = drawn("score", "-m", "one", "--color", "text.txt", columns=columns)
    assert shown.code == 0
    assert "".join(TEXT.split()) in "".join(shown.text.split())
