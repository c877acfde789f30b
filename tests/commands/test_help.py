"""`lm help`: the list of guides, a guide as Markdown or rendered, the help of a command."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from lmcli.commands import COMMANDS
from lmcli.commands import help as help_module

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
    assert done.returncode == 0 and done.stdout == direct.stdout and b"Options:" in done.stdout


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
