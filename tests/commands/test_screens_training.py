"""Training on real terminals: from the first second to the box at the end, Ctrl-C, a resize."""

import re
import signal

import pytest
from drawn_screen import printable
from small_runs import SMALL

SAMPLED = [value.replace("sample_every=1000000", "sample_every=10") for value in SMALL]
BRAILLE = re.compile("[\u2801-\u28ff]{5}")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_run_ends_with_its_curve_its_samples_and_what_they_mean(
    terminal, story, tmp_path, columns
):
    running = terminal(
        *("train", story, "-o", "runs/tale", *SAMPLED, "--steps", 30),
        *("--set", "train.eval_every=10"),
        columns=columns,
        folder=tmp_path,
    )
    first = running.read(until="starting")
    assert printable(first.lines)
    shown = running.read()
    assert shown.code == 0 and printable(shown.lines), shown.text
    assert all(len(line) <= columns for line in shown.lines)
    for text in (
        "100% done",
        "step 30 · epoch",
        "bits/byte",
        "◆  validation",
        "runs/tale ──",
        "this model",
        "5-gram",
        "gzip",
        "lm train --resume runs/tale --time 10m",
    ):
        assert shown.text.count(text) >= 1, (text, shown.text)
    # the final state is there once, and no ghost of an earlier one
    assert shown.text.count("━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━") <= 2
    assert shown.text.count("tokens/s") == 1 and shown.text.count("╭") == 1
    assert shown.text.count("starting") == 0
    # three samples and that of the finished model, each with its step
    assert all(re.search(rf"^ *{step}  ", shown.text, re.M) for step in (10, 20, 30))
    assert len(BRAILLE.findall(shown.text)) >= 3
    assert shown.lines[-1] == "runs/tale"
    # the commands run as they stand
    (command,) = (line.strip() for line in shown.lines if "lm generate" in line)
    card = (tmp_path / "runs" / "tale" / "README.md").read_text(encoding="utf-8")
    assert command.replace("runs/tale", "tale") in card and "](loss.svg)" in card
    assert "## Sample" in card


@pytest.mark.parametrize("columns", [60, 120])
def test_ctrl_c_leaves_no_ghost_and_says_how_to_resume(terminal, story, tmp_path, columns):
    running = terminal(
        *(
            "train",
            story,
            "-o",
            "runs/r",
            *SMALL,
            "--steps",
            100_000,
            "--set",
            "train.eval_every=9",
        ),
        columns=columns,
        folder=tmp_path,
    )
    running.read(until="◆")
    running.resize(columns + 10, 24)
    running.type("keys that nobody asked for\n\n")
    running.read(until="◆")
    running.process.send_signal(signal.SIGINT)
    shown = running.read()
    assert shown.code == 130 and printable(shown.lines)
    assert "^C" not in shown.text and "nobody asked" not in shown.text
    assert shown.text.count("tokens/s") == 1 and shown.text.count("stopped at step") == 1
    assert "".join(shown.lines).endswith("lm train --resume runs/r")
    assert all(len(line) <= columns + 10 for line in shown.lines)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colors_and_on_a_dumb_terminal(screen, story, tmp_path, variables):
    shown = screen(
        *("train", story, "-o", "runs/r", *SMALL, "--steps", 3),
        variables=variables,
        folder=tmp_path,
    )
    assert shown.code == 0 and printable(shown.lines)
    colors = re.compile(rb"\x1b\[[0-9;]*3[1-7]")
    assert not colors.search(shown.raw)
    if "TERM" in variables:  # plain lines, as in a pipe
        assert b"\x1b" not in shown.raw and "validation " in shown.text
    else:
        assert "╭─ runs/r" in shown.text
