"""Tables, Markdown and messages on a terminal; control characters are drawn."""

import io
import unicodedata

import pytest

from lmcli import display
from lmcli.terminal import tables
from lmcli.text.characters import visible


def test_table_aligns_numbers_right_and_keeps_brackets():
    text = tables.table(("file", "bits"), [("[bold]x", "1.5"), ("longer name", "12.25")])
    assert [line.rstrip() for line in text.splitlines()] == [
        "file          bits",
        "[bold]x        1.5",
        "longer name  12.25",
    ]


def test_table_wider_than_the_terminal_keeps_every_number():
    names = [f"figure_{i}" for i in range(20)]
    text = tables.table(("system", *names), [("a model", *(f"{i}.0123456789" for i in range(20)))])
    assert all(f" {i}.0123456789" in text for i in range(20)) and all(
        name in text for name in names
    )


def test_markdown_is_rendered_within_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = display.markdown("# Title\n\nSome *plain* words, " + "more " * 30 + "\n\n- an item\n")
    assert "Title" in text and "plain words" in text and " • an item" in text
    assert "#" not in text and "*" not in text
    assert max(map(len, text.splitlines())) <= 60


EVIL = "\x1b[2J\x9b31m\u202e\u2028[red]\x07:smile:"
DRAWN = "␛[2J<U+009B>31m<U+202E><U+2028>[red]␇:smile:"


def test_every_picture_is_one_column_wide():
    """So that a line is as long on the terminal as it was measured."""
    from rich.cells import cell_len

    text = "".join(map(chr, range(32))) + "\x7f"
    assert cell_len(visible(text, keep="")) == len(text)


def test_a_table_draws_names_without_markup():
    text = tables.table(("[red]label", "x"), [(EVIL, "1")]) + tables.table(("", EVIL), [("", "1")])
    assert "[red]label" in text and text.count(DRAWN) == 2


@pytest.mark.parametrize("terminal, expected", [(True, DRAWN), (False, EVIL)])
def test_a_pipe_gets_the_text_as_it_is(monkeypatch, terminal, expected):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(display.sys, "stderr", stream)
    display.note(EVIL)
    assert stream.getvalue() == f"lm: {expected}\n"


def test_every_control_character_of_unicode_is_drawn():
    """Cc but tab and line end, Cs, Zl, Zp, and what Unicode calls Bidi_Control (UAX #9)."""
    bidi = [*"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"]
    for code in range(0x110000):
        letter = chr(code)
        control = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in bidi
        assert (visible(letter) != letter) == (control and letter not in "\n\t"), hex(code)
        if control:
            assert visible(letter, keep="").isprintable()
