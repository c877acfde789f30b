"""Draws pictures of terminals for README and guides from real output.

python tests/acceptance/terminal_picture.py score MODEL OUTPUT.svg TEXT   lm score --color on TEXT
python tests/acceptance/terminal_picture.py train FILE FOLDER [OPTION...]  lm train FILE OPTION...:
    FOLDER/training.svg from the middle of the run, FOLDER/trained.svg from its end

What is drawn is what a person sees: a run in a pseudo-terminal whose screen pyte reads. rich draws
the cells as SVG.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drawn_screen import Screen, Terminal

WIDTH, HEIGHT = 84, 46  # columns, rows


def picture(title: str, texts: list[Text]) -> str:
    """The lines as SVG, which loads nothing: without fonts of the web it is in monospace."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))
    for text in texts:
        console.print(text, highlight=False, no_wrap=True, overflow="crop")
    drawn = console.export_svg(title=title, theme=MONOKAI)
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def cells(screen: Screen) -> list[Text]:
    """The visible lines of a screen with the styles of their characters, without empty ones."""
    lines = []
    for row in range(screen.pyte.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.pyte.buffer[row][column]
            color = None if cell.fg == "default" else cell.fg.replace("brown", "yellow")
            line.append(cell.data, Style(color=color, bold=cell.bold, italic=cell.italics))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def score(options: argparse.Namespace) -> None:
    """Draws `lm score --color`."""
    command = [sys.executable, "-m", "lmcli", "score", "-m", options.model, "--color"]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    done = subprocess.run(
        command, input=options.text, capture_output=True, text=True, check=True, env=environment
    )
    typed = Text(f"$ lm score -m {options.model} --color story.txt")
    output = Text.from_ansi(done.stdout + done.stderr)
    options.output.write_text(picture("lm score --color", [typed, output]), encoding="utf-8")


def train(options: argparse.Namespace) -> None:
    """Draws a run when it has come halfway, and when it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(options.file).name
        (Path(folder) / name).symlink_to(Path(options.file).resolve())
        running = Terminal(
            ["train", name, *options.options], dict(os.environ), WIDTH, HEIGHT, folder=folder
        )
        typed = " ".join(["$ lm train", name, *options.options])
        middle: list[Text] = []
        while running.process.poll() is None:
            try:
                running.read(seconds=1.0, until="\0")
            except TimeoutError:
                share = re.search(r" (\d+)% ", "\n".join(running.screen.display))
                if share and int(share[1]) >= 50 and not middle:
                    middle = cells(running.screen)
        running.read()
        end = cells(running.screen)
        running.close()
    for file, lines in (("training.svg", middle), ("trained.svg", end)):
        (options.folder / file).write_text(picture(typed, lines), encoding="utf-8")


def main() -> None:
    """Runs the command and writes its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("model")
    scoring.add_argument("output", type=Path)
    scoring.add_argument("text")
    scoring.set_defaults(draw=score)
    training = commands.add_parser("train")
    training.add_argument("file")
    training.add_argument("folder", type=Path)
    training.add_argument("options", nargs=argparse.REMAINDER)
    training.set_defaults(draw=train)
    options = parser.parse_args()
    options.draw(options)


if __name__ == "__main__":
    main()
