"""Messages wrapped at words for a terminal; a command to copy stays on one line."""

import os
import re
from typing import TextIO

from lmcli.text.characters import visible

FALLBACK_COLUMNS = 80
_VALUE = r"""(?:'[^']*'|"[^"]*"|,(?=\S)|[^\s;,'"])+"""
# `lm` and its command, or a program; then options with values, paths, KEY=VALUE, FILE, 'quoted'
COMMAND_TO_COPY = re.compile(
    r"\b(?:lm (?:help )?[a-z]+|pip install|iconv)"
    rf"(?: (?:--?[a-z]\S*[^\s;,:.](?: (?!-){_VALUE})?|-[a-z]\b(?: {_VALUE})?"
    rf"""|(?=\S*[/=]|\S+\.\w|[A-Z]+\b|['"<|>]){_VALUE}))*"""
)
_HELD = "\0"  # a space inside a command


def columns_of(stream: TextIO) -> int:
    """The width of a stream's terminal; COLUMNS overrides it, and 80 is taken if it is unknown."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or FALLBACK_COLUMNS
    try:
        return os.get_terminal_size(stream.fileno()).columns or FALLBACK_COLUMNS
    except (OSError, ValueError):
        return FALLBACK_COLUMNS


def moves_cursor(stream: TextIO) -> bool:
    """True for a terminal that can draw lines again.

    A notebook shows what `!lm …` writes to the terminal that ipykernel makes for it, and keeps
    every line; ipykernel is known by what it sets.
    """
    in_notebook = os.environ.get("TERM") == "xterm-color" and os.environ.get("GIT_PAGER") == "cat"
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not in_notebook


def wrap(text: str, columns: int, indent: int = 4) -> str:
    """The text in lines of at most so many columns; what continues a line is indented.

    Words and commands to copy are never broken, even if they are longer than a line.

    >>> wrap("lm: stopped; resume with: lm train --resume runs/x", 34)
    'lm: stopped; resume with:\\n    lm train --resume runs/x'
    """
    text = COMMAND_TO_COPY.sub(lambda match: match[0].replace(" ", _HELD), text)
    lines = []
    for line in text.split("\n"):
        head, *words = line.split(" ")
        filled = head
        for word in words:
            if filled.strip() and width(f"{filled} {word}") > columns:
                lines.append(filled)
                filled = " " * indent + word
            else:
                filled += f" {word}"
        lines.append(filled)
    return "\n".join(lines).replace(_HELD, " ")


def width(text: str) -> int:
    """Columns of the text on a terminal, where Chinese characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def message_for(stream: TextIO, text: str) -> str:
    """A message as it is written to a stream: on a terminal wrapped, its control characters drawn.

    Elsewhere it is the text as it is.
    """
    return wrap(visible(text), columns_of(stream)) if stream.isatty() else text
