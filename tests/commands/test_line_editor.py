"""The conversation of `lm generate` with prompt_toolkit, as it is drawn on a terminal."""

import json
import os
import signal
import termios
from pathlib import Path

import pytest

from lmcli.generation.line_editor import ReadlineHistory

ESCAPE, UP, CTRL_C, CTRL_D = "\x1b", "\x1b[A", "\x03", "\x04"
BY_LINES = termios.ECHO | termios.ICANON  # the terminal echoes, and sends whole lines
LEFT = "Ctrl-C again, or Ctrl-D, ends"


@pytest.fixture
def talk(terminal, chat_model):
    """talk(*arguments, **options): a conversation, at its first prompt."""

    def call(*arguments, **options):
        options.setdefault("columns", 60)
        chat = ("generate", "-i", "-m", chat_model, "--threads", 1, "--temperature", 1)
        running = terminal(*chat, *arguments, **options)
        running.read(until=">>>")
        return running

    return call


def enter(talk, *keys, until):
    """Types keys one after the other, each when what the last one shows is there."""
    for key, shown in zip(keys, until, strict=True):
        talk.type(key)
        screen = talk.read(20, until=shown)
    return screen


def modes(talk) -> int:
    """What the terminal itself does with keys: echo, lines, signals."""
    return termios.tcgetattr(talk.master)[3]


class TestKeys:
    def test_completion_lines_and_history(self, talk, environment, tmp_path):
        history = Path(environment["LM_CACHE"]) / "generate_history"
        history.write_text("older\nof two\\\nlines\n")
        one = talk("-n", 3, "--min-new-tokens", 3, folder=tmp_path)
        screen = enter(one, "/", until=["show this"])
        assert [line.split()[0] for line in screen.lines[-4:]] == [
            "/reset",
            "/save",
            "/set",
            "/help",
        ]
        assert screen.display[screen.pyte.cursor.y] == ">>> /" and "..." not in screen.text
        screen = enter(one, "set se", until=["seed  "])  # the option, and its value
        enter(one, "\t7\r", until=["\nseed 7\n>>>"])
        screen = enter(one, UP + CTRL_C, until=[f"{LEFT}\n>>>"])
        assert ">>> /set seed 7\n" + LEFT in screen.text
        screen = enter(one, f"{UP}{UP}!{ESCAPE}\rnew{ESCAPE}\r中文\r", until=[" s\n>>>"])
        assert ">>> of two\n... lines!\n... new\n... 中文\n" in screen.text
        assert b"\x1b[36m" in screen.raw  # the text in its color
        enter(one, "/save saved\r", until=["1 line added to saved\n>>>"])
        one.type(CTRL_D)
        assert one.read().code == 0
        said = json.loads((tmp_path / "saved").read_text())["messages"][0]["content"]
        assert said == "of two\nlines!\nnew\n中文"
        lines = history.read_text().splitlines()
        assert lines[:-1] == [
            *("older", "of two\\", "lines", "/set seed 7"),
            *("of two\\", "lines!\\", "new\\", "中文"),
        ]
        assert history.stat().st_mode & 0o777 == 0o600

    def test_ctrl_c_clears_the_line_and_ends_when_pressed_again(self, talk):
        one = talk()
        typing = modes(one)
        enter(one, "half", CTRL_C, until=["half", f"half\n{LEFT}\n>>>"])
        enter(one, "again", CTRL_C, until=["again", f"again\n{LEFT}\n>>>"])
        enter(one, '"""\r', "some", CTRL_C, until=['"""\n...', "some", f"some\n{LEFT}\n>>>"])
        one.type(CTRL_C)
        screen = one.read()
        assert screen.code == 0 and screen.lines[-1] == ">>>"
        assert screen.text.count(LEFT) == 3
        assert not typing & BY_LINES and modes(one) & BY_LINES == BY_LINES

    def test_a_line_typed_while_a_text_is_written_is_the_next_message(self, talk):
        one = talk("-n", 8000, "--min-new-tokens", 8000)
        one.type("Hello\r")
        while b"\x1b[36m" not in one.screen.raw:
            one.read(20, until=">>>")
        one.type("/set seed 5\r")
        os.kill(one.process.pid, signal.SIGINT)
        screen = one.read(20, until="\nseed 5\n>>>")
        assert " token" in screen.text and "\n>>> /set seed 5\nseed 5\n>>>" in screen.text
        enter(one, CTRL_C, until=[f"{LEFT}\n>>>"])
        one.type(CTRL_C)
        assert one.read().code == 0

    def test_sigterm_leaves_the_terminal_as_it_was(self, talk):
        one = talk()
        os.kill(one.process.pid, signal.SIGTERM)
        assert one.read().code == 130
        assert modes(one) & BY_LINES == BY_LINES

    def test_invalid_utf_8_is_an_error_of_its_line(self, talk):
        one = talk()
        os.write(one.master, b"\xff\r")
        one.read(20, until="error: invalid UTF-8 in this line\n>>>")
        one.type(CTRL_D)
        assert one.read().code == 0

    def test_a_dumb_terminal_gets_plain_lines(self, talk):
        one = talk("-n", 2, variables={"TERM": "dumb"})
        one.type("Hello\r")
        one.read(20, until=" s\n>>>")
        one.type(CTRL_D)
        screen = one.read()
        assert screen.code == 0 and b"\x1b" not in screen.raw


def test_history_is_as_readline_keeps_it():
    class Lines(list):
        """What ReadlineHistory uses of readline."""

        add_history = list.append

        def get_current_history_length(self):
            return len(self)

        def get_history_item(self, number):
            return self[number - 1]

    lines = Lines(["a", "b\\", "", "c"])
    history = ReadlineHistory(lines)
    assert [*history.load_history_strings()] == ["c", "b\n", "a"]
    history.store_string("one\n\ntwo\0")
    assert lines[4:] == ["one\\", "\\", "two"]
    assert next(iter(ReadlineHistory(lines).load_history_strings())) == "one\n\ntwo"
    assert [*ReadlineHistory(None).load_history_strings()] == []
