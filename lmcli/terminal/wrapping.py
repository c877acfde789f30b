"""Messages and generated texts wrapped at words for a terminal.

A command to copy stays on one line.
"""

import os
import re
from collections.abc import Callable
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
_JOINT = "\1"  # between two cells of a signature
_SIGNATURE_CELL = re.compile(r"(?<=\w)\|(?=\w+:)")
_UNIT = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)  # a code of a color, or a character
# Chinese and Japanese characters before which and after which no line is broken
_CLOSING, _OPENING = "，。、；：？！」』）》】〉〕…ー々ゝ", "「『（《【〈〔"
_JOINER = "\u200d"  # between the parts of an emoji


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

    Words and commands to copy are never broken, even if they are longer than a line; a signature
    is broken after "|".

    >>> wrap("lm: stopped; resume with: lm train --resume runs/x", 34)
    'lm: stopped; resume with:\\n    lm train --resume runs/x'
    """
    text = COMMAND_TO_COPY.sub(lambda match: match[0].replace(" ", _HELD), text)
    text = _SIGNATURE_CELL.sub("|" + _JOINT, text)
    lines = []
    for line in text.split("\n"):
        filled, *words = re.split(f"([ {_JOINT}])", line)
        for gap, word in zip(words[::2], words[1::2]):
            joined = f"{filled}{gap.strip(_JOINT)}{word}"
            if filled.strip() and width(joined) > columns:
                lines.append(filled)
                joined = " " * indent + word
            filled = joined
        lines.append(filled)
    return "\n".join(lines).replace(_HELD, " ")


class WordWrap:
    """Wraps text that comes in pieces at words, so that no line is wider than `columns()`.

    A word is held back until it has ended. One that is longer than a line is cut; the codes of
    colors take no room. Lines may be parted between Chinese characters.
    """

    def __init__(self, columns: Callable[[], int]):
        self.columns = columns
        self._column = 0  # of the cursor
        self._gap, self._word, self._size = "", "", 0  # not written yet: spaces, a word, its width

    def push(self, text: str) -> str:
        """What is to be written after one more piece of the text."""
        written = []
        for unit in _UNIT.findall(text):
            if unit in " \t\n":
                written.append(self._end_word())
                self._gap += unit
                if unit == "\n":
                    written.append(self._end_line())
                continue
            size = 0 if unit[0] == "\x1b" else width(unit)
            if size and (_may_part(self._word[-1:], unit) or self._size + size > self.columns()):
                written.append(self._end_word())
            self._word += unit
            self._size += size
        return "".join(written)

    def _end_word(self) -> str:
        """The word that is held back, after its spaces or on a new line."""
        start, columns = len((" " * self._column + self._gap).expandtabs(8)), self.columns()
        word, gap, size = self._word, self._gap, self._size
        if not word:
            return ""
        self._gap, self._word, self._size = "", "", 0
        if start + size > columns:
            gap, start = "\n" * bool(self._column and size), self._column if not size else 0
        self._column = start + size
        return gap + word

    def _end_line(self) -> str:
        """The end of a line, without spaces that would have no room."""
        gap, start = self._gap, len((" " * self._column + self._gap[:-1]).expandtabs(8))
        self._gap, self._column = "", 0
        return gap if start <= self.columns() else "\n"


def _may_part(before: str, after: str) -> bool:
    """True if a line may be broken between two characters of a word: if one of them is Chinese."""
    if not before or before in _OPENING + _JOINER or after in _CLOSING:
        return False
    return any(width(each) == 2 and not "가" <= each <= "힣" for each in (before, after))


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
