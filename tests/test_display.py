"""Terminal output: plain lines in a pipe, a panel on a terminal, nothing with --quiet."""

import io
import re
import unicodedata
from types import SimpleNamespace

import pytest
from rich.console import Console

from lmcli import display
from lmcli.terminal import tables
from lmcli.text.characters import visible

STEP = SimpleNamespace(
    step=1234,
    share=0.25,
    epoch=1.5,
    loss=2.0,
    learning_rate=3e-3,
    tokens_per_second=45678.0,
    remaining=75,
)
FIGURES = SimpleNamespace(headline=lambda: "1.5000 bits/byte · perplexity 20.00")
VALIDATION = SimpleNamespace(step=1234, figures=FIGURES, best=True)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (5.4, "0:05"), (65, "1:05"), (59.6, "1:00"), (7384, "2:03:04"), (None, "–")],
)
def test_clock(seconds, text):
    assert display.clock(seconds) == text


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


@pytest.fixture
def new_view():
    """new_view(quiet, terminal, **options): a TrainingView and the stream of its terminal."""

    def make(quiet=False, terminal=False, bytes_per_token=4.0, **options):
        view, stream = display.TrainingView(quiet, bytes_per_token, **options), io.StringIO()
        view.console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
        return view, stream

    return make


def test_a_pipe_gets_plain_lines_at_intervals(new_view, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    view, _ = new_view()
    with view:
        for i in range(301):
            now[0] = i / 10
            view.step(STEP)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # 30 s
    # 2 nats a token of 4 bytes: 2 / ln 2 / 4 = 0.721 bits a byte
    assert lines[0] == (
        "step 1,234 · 25% · epoch 1.50 · loss 2.000 nats/token = 0.721 bits/byte · 45,678 tokens/s "
        "· 1:15 left"
    )


def test_a_loss_of_other_targets_has_no_bits_per_byte(new_view, capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0)
    view, _ = new_view(bytes_per_token=0.0, target="masked token")
    with view:
        view.step(STEP)
    assert "loss 2.000 nats/masked token · 45,678 tokens/s" in capsys.readouterr().err


def test_evaluations_and_samples_are_lines_in_a_pipe(new_view, capsys):
    view, _ = new_view()
    with view:
        view.validation(VALIDATION)
        view.sample("却说\n  one\ttwo [bold]")
    assert capsys.readouterr() == (
        "",
        "validation 1.5000 bits/byte · perplexity 20.00 (step 1,234, best)\n"
        "sample     却说 one two [bold]\n",
    )


def test_quiet_prints_nothing(new_view, monkeypatch, capsys):
    for terminal in (False, True):
        view, stream = new_view(quiet=True, terminal=terminal)
        monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0)
        with view:
            view.step(STEP)
            view.validation(VALIDATION)
            view.sample("text")
        assert capsys.readouterr() == ("", "") and stream.getvalue() == ""


def test_a_terminal_gets_a_panel_with_everything(new_view, capsys):
    view, stream = new_view(terminal=True)
    with view:
        view.validation(VALIDATION)  # before the first step of a resumed run
        view.step(STEP)
        view.sample("却说 [red]one")
    drawn = stream.getvalue()
    for text in (
        "25%",
        "1:15",
        "step 1,234",
        "epoch 1.50",
        "2.000",
        "0.721",
        "45,678 tokens/s",
        "rate 0.003",
        "validation 1.5000 bits/byte · perplexity 20.00",
        "却说 [red]one",
    ):
        assert text in drawn, text
    assert capsys.readouterr() == ("", "")


def test_the_loss_is_a_moving_average(new_view):
    view, _ = new_view()
    with view:
        for loss in (4.0, 2.0):
            view.step(SimpleNamespace(**{**vars(STEP), "loss": loss}))
    assert view.loss == pytest.approx(0.95 * 4 + 0.05 * 2)


def test_a_note_is_one_line_that_stays(new_view, capsys):
    event = SimpleNamespace(step=3, text="out of memory with [16] tokens at once")
    view, stream = new_view(terminal=True)
    with view:
        view.step(STEP)
        view.note(event)
    assert stream.getvalue().count("lm: out of memory with [16] tokens at once") == 1
    for quiet, expected in ((False, "lm: out of memory with [16] tokens at once\n"), (True, "")):
        view, _ = new_view(quiet)
        with view:
            view.note(event)
        assert capsys.readouterr().err == expected


def test_markdown_is_rendered_within_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = display.markdown("# Title\n\nSome *plain* words, " + "more " * 30 + "\n\n- an item\n")
    assert "Title" in text and "plain words" in text and " • an item" in text
    assert "#" not in text and "*" not in text
    assert max(map(len, text.splitlines())) <= 60


EVIL = "\x1b[2J\x9b31m\u202e\u2028[red]\x07:smile:"
DRAWN = "␛[2J<U+009B>31m<U+202E><U+2028>[red]␇:smile:"


def test_a_sample_of_control_characters_is_drawn_in_the_panel(new_view):
    """Such samples moved the cursor, so that the panel's earlier lines stayed as ghost bars."""
    view, stream = new_view(terminal=True)
    with view:
        view.step(STEP)
        view.sample(EVIL.replace("\u2028", "") + "\r\x0b\x7f")
        view.note(SimpleNamespace(step=1, text=EVIL))
    sent = stream.getvalue()
    assert DRAWN.replace("<U+2028>", "") in sent and DRAWN in sent
    # nothing but rich's own styles, cursor moves and line ends
    own = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", own.sub("", sent))
    assert "\x1b[2J" not in sent


def test_every_picture_is_one_column_wide():
    """So that a line is as long on the terminal as it was measured."""
    from rich.cells import cell_len

    text = "".join(map(chr, range(32))) + "\x7f"
    assert cell_len(visible(text, keep="")) == len(text)


def test_a_table_draws_names_without_markup():
    text = tables.table(("[red]label", EVIL), [(EVIL, "1")])
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
