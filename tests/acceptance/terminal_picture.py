"""Draws the terminal picture of the README from real output.

python tests/acceptance/terminal_picture.py MODEL OUTPUT.svg TEXT    runs lm score --color on TEXT

The colors are those that a terminal gets; rich draws them as SVG.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

WIDTH = 84  # columns


def colored_output(model: str, text: str) -> str:
    """What `lm score --color` writes, with its escape codes."""
    command = [sys.executable, "-m", "lmcli", "score", "-m", model, "--color"]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout + done.stderr


def main() -> None:
    """Runs the command and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("text")
    options = parser.parse_args()
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))
    console.print(f"$ lm score -m {options.model} --color story.txt", highlight=False)
    console.print(Text.from_ansi(colored_output(options.model, options.text)))
    picture = console.export_svg(title="lm score --color", theme=MONOKAI)
    # the picture loads nothing from elsewhere: without fonts of the web it falls back to monospace
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    options.output.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
