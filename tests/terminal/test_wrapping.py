"""Messages on a terminal: wrapped at words, while commands to copy stay whole."""

import io
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from lmcli.terminal.live_region import can_redraw
from lmcli.terminal.wrapping import columns_of, message_for, moves_cursor, wrap

COMMANDS = [
    "lm train --resume runs/x --set train.learning_rate=0.1 --time 10m",
    "lm train reviews.csv --fields text=review,label=stars",
    "lm generate -m 'runs/my run' \"Once upon a time\"",
    "lm export runs/a --merge -o DIR",
    "lm help formats",
    "pip install 'lmcli[eval]'",
    "iconv -f latin1 -t utf-8 a.txt > b.txt",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [20, 60, 80, 120])
def test_a_command_is_never_broken_and_nothing_is_lost(command, columns):
    text = f"lm: stopped after step 1,234 and saved; go on with {command}; or start anew, 却说 那僧"
    lines = wrap(text, columns).split("\n")
    assert sum(command in line for line in lines) == 1
    assert " ".join(line.strip() for line in lines) == text
    assert all(cell_len(line) <= columns or command in line for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])


def test_the_prose_after_a_command_is_wrapped():
    lines = wrap("lm train --resume runs/x goes on from the state that was saved last", 30)
    assert lines.split("\n")[0] == "lm train --resume runs/x goes"


def test_lines_keep_their_indentation_and_long_words_stay_whole():
    text = "lm: error: no text\n  give a file\n\n" + "x" * 90
    assert wrap(text, 60) == text


def test_a_chinese_message_is_measured_in_columns():
    assert wrap("训练 文本 训练 文本", 10, indent=0) == "训练 文本\n训练 文本"


def test_only_a_terminal_gets_wrapped_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setenv("COLUMNS", "20")
    assert message_for(stream, "word " * 9 + "\x1b") == "word " * 9 + "\x1b"
    stream.isatty = lambda: True
    assert message_for(stream, "word " * 4 + "\x1b") == "word word word word\n    ␛"
    assert columns_of(stream) == 20
    monkeypatch.setenv("COLUMNS", "")
    assert columns_of(stream) == 80


@pytest.mark.parametrize(
    "variables, moves",
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-color"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm-color", "GIT_PAGER": "cat"}, False),  # `!lm …` in a notebook
    ],
)
def test_lines_are_drawn_again_only_where_they_can_be(monkeypatch, variables, moves):
    for name in ("TERM", "GIT_PAGER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = SimpleNamespace(isatty=lambda: True, encoding="utf-8")
    assert moves_cursor(stream) == can_redraw(stream) == moves
    assert not moves_cursor(SimpleNamespace(isatty=lambda: False))
