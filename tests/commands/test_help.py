"""`lm help`: guides, presets and keys; `--help`: what fits a screen, and groups of options."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import click
import pytest
from drawn_screen import printable

from lmcli.commands import COMMANDS, command, lm, run
from lmcli.commands import help as help_module
from lmcli.recipes import preset_names

GUIDES = sorted(help_module.GUIDES.glob("*.md"))


def on_terminal(environment, *arguments, **variables):
    """The output of `lm help` on a terminal of 80 columns, without colors."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcli", "help", *arguments],
        stdout=follower,
        stdin=follower,
        env={**environment, "COLUMNS": "80", "TERM": "xterm", **variables},
    )
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while chunk := os.read(leader, 1 << 16):
            output += chunk
    os.close(leader)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", output.decode())


def test_without_a_topic_it_lists_the_guides_with_their_titles(inside):
    done = inside("help")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and not done.stderr and GUIDES
    for file in GUIDES:
        title = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        assert any(line.split() == [file.stem, *title.split()] for line in lines)
    assert any(line.startswith("  preset [NAME] ") for line in lines)
    assert any(line.startswith("  keys [SECTION|KEY] ") for line in lines)


@pytest.mark.parametrize("file", GUIDES, ids=lambda file: file.stem)
def test_a_guide_is_plain_markdown_in_a_pipe(inside, file):
    done = inside("help", file.stem)
    assert (done.returncode, done.stdout, done.stderr) == (0, file.read_bytes(), b"")


def test_a_guide_loads_nothing_heavy(environment):
    program = (
        "import sys\nfrom lmcli.commands import run\nassert run(['help', 'numbers']) == 0\n"
        "print('loaded:', *{'rich', 'torch', 'numpy', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and done.stdout.endswith(b"\nloaded:\n")


def test_a_terminal_gets_rendered_text_through_the_pager(environment):
    shown = on_terminal(environment, "numbers", PAGER="sed s/^/paged:/", LINES="20")
    lines = shown.splitlines()
    assert len(lines) > 20 and all(line.startswith("paged:") for line in lines if line)
    assert max(map(len, lines)) <= 80 + len("paged:") and "**" not in shown and "`" not in shown


def test_a_short_guide_is_shown_without_a_pager(environment):
    shown = on_terminal(environment, "numbers", PAGER="sed s/^/paged:/", LINES="100000")
    assert "bits_per_byte" in shown and "paged:" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_name_of_a_command_shows_its_help(inside, name):
    done, direct = inside("help", name), inside(name, "--help")
    assert done.returncode == 0 and done.stdout == direct.stdout
    assert f"Usage: lm {name}" in done.stdout.decode()


@pytest.mark.parametrize(
    "topic, hint",
    [
        ("numbesr", "did you mean 'numbers'?"),
        ("trian", "did you mean 'train'"),
        ("zzzzzz", "run lm help for the list of guides"),
    ],
)
def test_an_unknown_topic_is_a_usage_error_with_the_nearest_names(inside, topic, hint):
    done = inside("help", topic)
    assert done.returncode == 2 and not done.stdout
    assert f"no guide or command is named '{topic}'" in done.stderr.decode()
    assert hint in done.stderr.decode()


def options_of(name):
    parameters = lm.get_command(click.Context(lm), name).params
    return [option for option in parameters if isinstance(option, click.Option) and option.help]


class TestHelpOfCommands:
    @pytest.mark.parametrize(
        "arguments, most",
        [(["--help"], 22), *(([name, "--help"], 36) for name in COMMANDS)],
        ids=str,
    )
    def test_it_fits_the_screen(self, inside, monkeypatch, arguments, most):
        monkeypatch.setenv("COLUMNS", "80")
        lines = inside(*arguments).stdout.decode().splitlines()
        assert len(lines) <= most and max(map(len, lines)) <= 80

    @pytest.mark.parametrize("width", ["60", "120"])
    def test_no_text_is_wider_than_the_terminal(self, inside, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", width)
        for name in COMMANDS:
            text = inside(name, "--help-all").stdout.decode()
            wide = [line for line in text.splitlines() if len(line) > int(width)]
            assert all(" lm " in line for line in wide)  # a command to copy is never broken
            assert command.UNBROKEN not in text

    @pytest.mark.parametrize("name", COMMANDS)
    def test_options_stand_in_groups_and_rare_ones_only_in_help_all(self, inside, name):
        short, full = (inside(name, word).stdout.decode() for word in ("--help", "--help-all"))
        for option in options_of(name):
            listed = re.compile(rf"^  (-\w, )?{max(option.opts, key=len)}\b", re.MULTILINE)
            assert listed.search(full), option.opts
            assert bool(listed.search(short)) != bool(vars(option).get("rare")), option.opts
        groups = re.findall(r"^(\w[\w ()]*):$", full, re.MULTILINE)
        assert groups[0] == "Examples" and len({*groups}) == len(groups)
        known = [title for title in groups if title in command.GROUPS]
        assert known == sorted(known, key=command.GROUPS.index)

    def test_equal_options_have_equal_texts(self):
        special = {  # that mean something else in each command
            *("--model", "--output", "--dtype", "--per", "--on-long", "--preset", "--seed"),
            *("--color", "--verbose"),
            *(
                "--header",
                "--eos",
                "--field",
                "--train",
                "--by",
                "--top",
                "--pairs",
                "--overwrite",
                "--on-error",
            ),
        }
        texts = {}
        for name in COMMANDS:
            for option in options_of(name):
                texts.setdefault(max(option.opts, key=len), set()).add(command._text(option))
        different = {name for name, both in texts.items() if len(both) > 1}
        assert different <= special

    def test_defaults_are_shown(self):
        shown = {max(o.opts, key=len): command._text(o) for o in options_of("evaluate")}
        assert shown["--resamples"].endswith("[default: 1000]")
        assert shown["--stemmer"].endswith("[default: --no-stemmer]")
        assert shown["--model"].endswith("[default: $LM_MODEL]")
        assert shown["--task"].endswith(
            "Choices: auto, classify, translate, summarize, qa, pairs.  [default: auto]"
        )

    def test_headings_are_bold_on_a_terminal_unless_no_color_is_set(self, screen):
        plain = screen("train", "--help", rows=40, variables={"NO_COLOR": "1"})
        assert b"\x1b[1m" not in plain.raw and printable(plain.lines)
        shown = screen("train", "--help", rows=40)
        assert b"\x1b[1mWhat:" in shown.raw and shown.lines == plain.lines
        assert shown.lines[0].startswith("Usage: lm train")  # nothing has scrolled away

    def test_a_preset_named_badly_or_two_topics_are_errors(self, inside):
        for words, message in (
            (("preset", "tinny"), "did you mean 'tiny'?"),
            (("keys", "hiden_size"), "did you mean model.hidden_size"),
            (("numbers", "training"), "'numbers training' is no topic"),
        ):
            done = inside("help", *words)
            assert done.returncode == 2 and message in done.stderr.decode()


class TestReferences:
    def test_presets_are_listed_in_two_ways(self, inside):
        listed, same = inside("train", "--list-presets"), inside("help", "preset")
        assert listed.returncode == 0 and listed.stdout == same.stdout
        rows = [line.split("\t") for line in listed.stdout.decode().splitlines()]
        assert rows[0] == ["name", "parameters", "budget", "data", "purpose"]
        assert [row[0] for row in rows[1:]] == preset_names()

    def test_keys_in_a_pipe_are_tsv(self, inside):
        lines = inside("help", "keys", "train.schedule").stdout.decode().splitlines()
        assert lines[0].split("\t")[:2] == ["key", "type"] and len(lines) == 2
        assert lines[1].startswith("train.schedule\ta word\tlinear\tlinear, cosine, constant\t")

    @pytest.mark.parametrize("columns", [60, 80, 120])
    def test_on_a_terminal_nothing_is_cut(self, inside, monkeypatch, columns, capfdbinary):
        monkeypatch.setattr(help_module.sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "10000")
        for words in (
            ("--help",),
            ("help",),
            ("help", "keys"),
            ("train", "--list-presets"),
            ("help", "preset", "qa"),
        ):
            assert run([*words]) == 0
            text = re.sub(r"\x1b\[[\d;]*m", "", capfdbinary.readouterr().out.decode())
            assert printable(text.splitlines()) and len(text) > 500
            if words[-1] != "qa":  # the lines of a file are as they are
                assert max(map(len, text.splitlines())) <= columns

    def test_a_long_list_goes_through_the_pager(self, screen):
        shown = screen("help", "keys", variables={"PAGER": "head -n 3"})
        assert shown.code == 0 and shown.lines[0].startswith("tokenizer.vocab_size=4096")
        assert sum(map(bool, shown.lines)) == 3
