"""Generated texts on terminals of several widths: wrapped at words, in a pipe as they are."""

import json
import re
import time

import pytest
from drawn_screen import assert_whole, printable
from rich.cells import cell_len

from lmcli.text.characters import visible

WIDTHS = (60, 80, 120)
PROMPT = "Once upon a time there was a baker who slept all day, and nobody else in the town"
CHINESE = "却说那僧道：「你我不必同行，就此分手，各干营生去罢。三劫后，我在北邙山等你，会齐了。」"
OPTIONS = ("--seed", 1, "--threads", 1, "--on-long", "slide", "-q")


@pytest.fixture
def texts(drawn, inside, trained):
    """texts(*arguments, columns): (the screen of `lm generate`, its output in a pipe)."""

    def call(*arguments, columns):
        command = ("generate", "-m", trained[0], *OPTIONS, *arguments)
        shown = drawn(*command, columns=columns)
        piped = inside(*command, "--echo").stdout.decode()
        assert shown.code == 0, shown.text
        return shown, piped

    return call


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_text_is_wrapped_at_words(texts, columns):
    shown, piped = texts("-n", 60, PROMPT, columns=columns)
    assert_whole(shown, piped)
    words = visible(piped).split()
    assert " ".join(shown.written).split() == words and " ".join(shown.lines).split() == words
    assert not any(line.startswith(" ") for line in shown.lines if piped.count(line) == 0)


@pytest.mark.parametrize("columns", WIDTHS)
def test_samples_are_parted_and_the_prompt_is_dim(texts, columns):
    shown, piped = texts("-n", 20, "--num-samples", 3, PROMPT, columns=columns)
    assert_whole(shown, f"{piped} ── of 1 2 3")
    text = re.sub(r"── \d of 3 ──", "", " ".join(shown.written))
    assert text.split() == visible(piped).split()
    assert [line for line in shown.lines if "──" in line] == [f"── {k} of 3 ──" for k in (1, 2, 3)]
    dim = re.findall(rb"\x1b\[2m(.*?)\x1b\[0m", shown.raw, re.DOTALL)
    assert [b" ".join(each.split()[-18:]).decode() for each in dim] == [PROMPT] * 3


@pytest.mark.parametrize("columns", WIDTHS)
def test_chinese_is_parted_between_characters(texts, columns):
    shown, piped = texts("-n", 12, CHINESE * 2, columns=columns)
    assert_whole(shown)
    assert "".join(shown.text.split()) == "".join(visible(piped).split())
    for line in shown.written:
        assert cell_len(line) <= columns and not line.startswith(tuple("，。：」"))
    assert cell_len(shown.written[0]) >= columns - 4


def test_a_dumb_terminal_gets_no_codes_and_whole_words(texts, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown, piped = texts("-n", 40, PROMPT, columns=60)
    assert b"\x1b" not in shown.raw
    assert_whole(shown, piped)


@pytest.mark.parametrize("columns", WIDTHS)
def test_why_has_as_many_alternatives_as_fit_whole(texts, columns):
    shown, _ = texts("-n", 12, "--why", "--logprobs", 5, PROMPT, columns=columns)
    assert_whole(shown)
    table = shown.lines[-12:]
    shares = {len(re.findall(r"\d%", line)) for line in table}
    assert shares <= set(range(1, 7)) and max(shares) >= {60: 2, 80: 3, 120: 5}[columns]
    assert all(re.search(r"\d%$", line) for line in table) and "…" not in "".join(table)


def test_verbose_names_model_seed_and_speed(drawn, trained):
    for columns in WIDTHS:
        options = ("--seed", 7, "--threads", 1, "-n", 80, "-v")
        shown = drawn("generate", "-m", trained[0], *options, PROMPT, columns=columns)
        assert_whole(shown)
        assert "lm: seed 7" in shown.lines and "80 tokens, " in shown.text
        assert "the window slid" in " ".join(shown.text.split())


def test_json_on_a_terminal_is_what_a_pipe_gets(texts):
    shown, piped = texts("-n", 12, "--json", PROMPT, columns=60)
    assert "\n".join(shown.written) + "\n" == piped and printable(shown.lines)


def test_a_conversation_is_wrapped_at_words_also_in_a_window_that_changes(
    terminal, chat_model, tmp_path
):
    options = ("--threads", 1, "-n", 60, "--min-new-tokens", 60, "--temperature", 1, "--seed", 1)
    chat = ("generate", "-i", "-m", chat_model, *options)
    running = terminal(*chat, columns=60, rows=60, folder=tmp_path)
    running.read(until=">>>")
    for number, columns in enumerate(WIDTHS, 1):
        running.resize(columns, 60)
        running.type("Once upon a time\r")
        running.read(until="tokens/s", times=number)
        running.read(until=">>>", times=number + 1)
    running.type("/save talk.jsonl\r")
    running.read(until="1 line added")
    for typed, until in (("/set", "system"), ("/set nothing", "known:"), ("/help", "Ctrl-D.\n>>>")):
        running.type(typed + "\r")
        running.read(until=until)
    running.type("\x04")
    shown = running.read()
    assert shown.code == 0 and printable(shown.lines)
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    words = [word for each in messages[1::2] for word in visible(each["content"]).split()]
    assert len(words) > 20
    assert [word for word in words if word not in shown.text.split()] == []


def test_what_is_typed_while_a_text_is_written_is_the_next_message(terminal, chat_model, tmp_path):
    options = ("--threads", 1, "-n", 400, "--min-new-tokens", 400)
    running = terminal("generate", "-i", "-m", chat_model, *options, rows=60, folder=tmp_path)
    running.read(until=">>>")
    running.type("One\r")
    time.sleep(0.1)
    running.type("Two\r/save talk.jsonl\r")
    shown = running.read(until="1 line added", seconds=20)
    assert shown.code is None, shown.text
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [each["content"] for each in messages[::2]] == ["One", "Two"]
