"""Draws pictures of terminals for README and guides from real output.

python tests/acceptance/terminal_picture.py screen OUTPUT.svg ARGUMENT...   lm ARGUMENT...
python tests/acceptance/terminal_picture.py train FILE FOLDER [OPTION...]   lm train FILE OPTION...:
    FOLDER/training.svg from the middle of the run, FOLDER/trained.svg from its end

What is drawn is what a person sees: a run in a pseudo-terminal whose screen pyte reads. rich draws
the cells as SVG. --folder DIR before the arguments of `screen` is the working folder.
"""

import argparse
import itertools
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def rich_color(name: str) -> str | None:
    """A color of pyte as rich names it."""
    if name == "default":
        return None
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else name.replace("brown", "yellow")


def style_of(cell: Any) -> Style:
    """The style of a cell of pyte."""
    colors = {"color": rich_color(cell.fg), "bgcolor": rich_color(cell.bg)}
    return Style(**colors, bold=cell.bold, italic=cell.italics)


def cells(screen: Screen) -> list[Text]:
    """The visible lines of a screen with the styles of their characters, without empty ones."""
    lines = []
    for row in range(screen.pyte.lines):
        line = Text()
        drawn = [screen.pyte.buffer[row][column] for column in range(screen.columns)]
        for style, run in itertools.groupby(drawn, style_of):  # few elements in the SVG
            line.append("".join(cell.data for cell in run), style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def screen(options: argparse.Namespace) -> None:
    """Draws what a command leaves on the screen."""
    running = Terminal(options.arguments, dict(os.environ), WIDTH, HEIGHT, folder=options.folder)
    running.read(seconds=600)
    running.close()
    typed = shlex.join(["lm", *options.arguments])
    options.output.write_text(picture(f"$ {typed}", cells(running.screen)), encoding="utf-8")


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
    drawing = commands.add_parser("screen")
    drawing.add_argument("--folder", type=Path)
    drawing.add_argument("output", type=Path)
    drawing.add_argument("arguments", nargs=argparse.REMAINDER)
    drawing.set_defaults(draw=screen)
    training = commands.add_parser("train")
    training.add_argument("file")
    training.add_argument("folder", type=Path)
    training.add_argument("options", nargs=argparse.REMAINDER)
    training.set_defaults(draw=train)
    options = parser.parse_args()
    options.draw(options)


if __name__ == "__main__":
    main()
