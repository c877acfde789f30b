"""Messages on a terminal: wrapped at words, while commands to copy stay whole."""

import io
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from lmcli.evaluation.signature import Signature
from lmcli.terminal.live_region import can_redraw
from lmcli.terminal.wrapping import WordWrap, columns_of, message_for, moves_cursor, wrap

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


SIGNATURE = (
    "lm-perplexity|model:de179e9284e5|tokenizer:715cbc3cdd08|text:aa07eeb4df64|documents:file|"
    "context:64|stride:32|bos:1|eos:0|dtype:float32|nats:111374.968726|tokens:27841|bytes:59146|"
    "version:0.1.0"
)


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_a_signature_is_broken_between_its_cells_and_read_as_it_was_shown(columns):
    lines = wrap(f"lm: {SIGNATURE}", columns).split("\n")
    assert len(lines) > 2 and max(map(len, lines)) <= columns
    assert all(line.endswith("|") for line in lines[1:-1])
    shown = "\n".join(lines).removeprefix("lm: ")
    assert str(Signature.parse(shown)) == SIGNATURE


TEXTS = [
    "Once upon a time,  there was\n\n  an indented line with a tab\there, and a dog. " * 3,
    "却说那僧道：「你我不必同行，就此分手，各干营生去罢。」三劫后 we meet again，会齐了。" * 3,
    "x" * 50 + " y " + "x" * 150 + " https://example.org/a/very/long/address/of/something.html",
    "나는 학교에 갑니다 그리고 친구를 만납니다 " * 4 + "e\u0301clair " * 9,
    " " * 100 + "a" + " " * 100 + "\n" + "b " * 40,
]


class TestStreamedText:
    @pytest.mark.parametrize("columns", [20, 60, 80])
    @pytest.mark.parametrize("text", TEXTS)
    def test_no_line_is_too_wide_and_no_word_is_cut_or_lost(self, columns, text):
        wrapped = WordWrap(lambda: columns).push(f"{text}\n")
        lines = wrapped.removesuffix("\n").split("\n")
        assert all(cell_len(line.expandtabs(8).rstrip()) <= columns for line in lines)
        if "，" in text:  # Chinese may be parted between characters, but not before a comma
            assert "".join(wrapped.split()) == "".join(text.split())
            assert not any(line[:1] in "，。：」" or line[-1:] == "「" for line in lines if line)
        short = [word for word in text.split() if cell_len(word) <= columns and "，" not in word]
        rest = iter(wrapped.split())
        assert all(word in rest for word in short)  # in order

    def test_text_in_pieces_is_wrapped_as_a_whole(self):
        for text in TEXTS:
            wrap, whole = WordWrap(lambda: 33), WordWrap(lambda: 33)
            assert "".join(map(wrap.push, text + "\n")) == whole.push(text + "\n")

    def test_text_that_fits_is_not_changed(self):
        text = "def f(x):\n    return x  # 却说\n\n\ta tab\t\tand trailing spaces   \n"
        assert WordWrap(lambda: 60).push(text) == text

    def test_a_word_appears_when_it_has_ended(self):
        wrap = WordWrap(lambda: 9)
        pieces = ["One", " ti", "me ", "there", "\n"]
        assert [wrap.push(piece) for piece in pieces] == ["", "One", " time", "", "\nthere\n"]

    def test_colors_take_no_room(self):
        wrap = WordWrap(lambda: 10)
        assert wrap.push("\x1b[2mfive\x1b[0m \x1b[36mletters\x1b[0m\n") == (
            "\x1b[2mfive\x1b[0m\n\x1b[36mletters\x1b[0m\n"
        )

    def test_a_window_that_changes_counts_from_then_on(self):
        columns = [40]
        wrap = WordWrap(lambda: columns[0])
        shown = wrap.push("thirty letters in one long row and ")
        columns[0] = 12
        shown += wrap.push("then the window is narrow\n")
        assert shown.split("\n") == [
            "thirty letters in one long row and",
            "then the",
            "window is",
            "narrow",
            "",
        ]
