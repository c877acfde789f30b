"""What is drawn on real terminals: pyte reads the screen, as a person would."""

import pytest
from drawn_screen import printable


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal(screen, columns):
    shown = screen("--help", columns=columns)
    assert shown.code == 0 and printable(shown.lines)
    assert "Usage: lm" in shown.text and "train" in shown.text


def test_keys_reach_a_program_and_it_knows_the_width(terminal, trained, tmp_path):
    running = terminal("generate", "-m", trained[0], "-i", columns=60, folder=tmp_path)
    running.read(until=">")
    running.type("/help\r")
    assert printable(running.read(until="/reset").lines)
    running.read(until=">>>", times=2)  # the terminal would drop Ctrl-D before the prompt is back
    running.type("\x04")
    assert running.read().code == 0
