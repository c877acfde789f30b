"""Text whose parts are painted by their surprisal: for a terminal, and as HTML."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from lmcli.terminal.wrapping import width
from lmcli.text.characters import DIM, PLAIN, visible

# bits of surprisal from which a text has this background: of xterm's 256 colors, and in a page
SHADES = ((14.0, 203), (10.0, 209), (7.0, 215), (4.0, 222), (2.0, 230))
HEX = {203: "#ff5f5f", 209: "#ff875f", 215: "#ffaf5f", 222: "#ffd787", 230: "#ffffd7"}
TOKENS = ("\x1b[48;5;153;38;5;16m", "\x1b[48;5;223;38;5;16m")  # pale blue, pale orange
SPECIAL_TOKEN = "\x1b[48;5;97;38;5;231m"  # white on violet
NONCHARACTERS = {0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}  # XML may not hold them


class Segment(NamedTuple):
    """A part of a text and its bits of surprisal; None for context only."""

    text: str
    bits: float | None


def segments(text: str, units: Iterable[tuple[int, int, float | None]]) -> list[Segment]:
    """The segments of a text from (start, end, bits), in bytes; what lies between has 0 bits.

    A unit that begins inside of a character belongs to the segment of its first bytes.
    """
    data = text.encode("utf-8", "surrogatepass")
    parts = list[tuple[int, float | None]]()  # (start, bits)
    end = 0
    for start, after, bits in units:
        if start > end:
            parts.append((end, 0.0))
        if start < len(data) and data[start] & 0xC0 != 0x80:
            parts.append((start, bits))
        end = after
    if end < len(data):
        parts.append((end, 0.0))
    ends = [*(start for start, _ in parts[1:]), len(data)]
    return [
        Segment(data[start:after].decode("utf-8", "replace"), bits)
        for (start, bits), after in zip(parts, ends)
    ]


def shade(bits: float | None) -> int | None:
    """The background for these bits of surprisal; 0: none, None: the text is dim."""
    return None if bits is None else next((color for least, color in SHADES if bits >= least), 0)


def paint(text: str, color: int | None) -> str:
    """The text, whose control characters are drawn, with a `shade`."""
    if not text or color == 0:
        return text
    style = DIM if color is None else f"\x1b[48;5;{color};38;5;16m"
    # a background must not reach the end of a line
    return "\n".join(line and f"{style}{line}{PLAIN}" for line in text.split("\n"))


def painted(parts: Iterable[Segment]) -> str:
    """The segments for a terminal, on one line; control characters but tabs are drawn."""
    return "".join(
        paint(visible("".join(part.text for part in same), keep="\t"), color)
        for color, same in groupby(parts, key=lambda part: shade(part.bits))
    )


def tokens_painted(tokens: Iterable[tuple[str, bool]], columns: int | None = None) -> str:
    """Tokens on backgrounds that alternate; (text, True) is a special one.

    Control characters are drawn. With `columns` lines end before a word that has no room.
    """
    words: list[list[tuple[str, str]]] = [[]]  # of (text, style)
    number = 0
    for text, special in tokens:
        if special or text[:1].isspace():
            words.append([])
        style = SPECIAL_TOKEN if special else TOKENS[number % len(TOKENS)]
        number += not special
        words[-1].append((visible(text, keep=""), style))
    pieces, used = list[str](), 0
    for word in words:
        needed = sum(width(text) for text, _ in word)
        if columns is not None and used and used + needed > columns:
            pieces.append("\n")
            used = 0
        pieces += [f"{style}{text}{PLAIN}" for text, style in word if text]
        used += needed
    return "".join(pieces)


def color_legend() -> str:
    """What the colors mean."""
    shades = (paint(f" {least:g} ", color) for least, color in reversed(SHADES))
    return f"bits of surprisal from {' '.join(shades)}"


def drawable(text: str, keep: str = "\t") -> str:
    """The text without what no page can show."""
    return visible(text, keep).translate(NONCHARACTERS)


def tooltip(part: Segment) -> str:
    """What is shown of a segment where the mouse is."""
    return "not scored" if part.bits is None else f"{part.bits:.2f} bits"


def segments_html(parts: Iterable[Segment], classes: bool = False) -> str:
    """The segments as HTML, the surprisal of each as its tooltip; what is between has none.

    Their styles are in their tags, or with `classes` (c and the shade, n) in a style sheet.
    """
    spans = []
    for part in parts:
        color, text = shade(part.bits), escape(drawable(part.text, "\t\n"))
        if part.bits == 0:
            spans.append(text)
            continue
        if classes:
            style = f' class="c{color}"' if color else ' class="n"' if color is None else ""
        else:
            style = f' style="background:{HEX[color]};color:#000"' if color else ""
            style = ' style="opacity:.65"' if color is None else style
        spans.append(f'<span title="{tooltip(part)}"{style}>{text}</span>')
    return "".join(spans)


def in_lines(parts: Sequence[Segment], columns: int) -> list[list[Segment]]:
    """The segments in lines of so many columns, which end after words where they can.

    Control characters are drawn, and a tab is four spaces.
    """
    lines: list[list[Segment]] = [[]]
    room = columns
    characters = [
        Segment(c, part.bits) for part in parts for c in drawable(part.text).replace("\t", "    ")
    ]
    for space, group in groupby(characters, key=lambda each: each.text.isspace()):
        word = list(group)
        needed = sum(width(each.text) for each in word)
        if needed > room and not space and needed <= columns:
            lines.append([])
            room = columns
        for each in word:
            if width(each.text) > room:
                lines.append([])
                room = columns
                if space:
                    break
            lines[-1].append(each)
            room -= width(each.text)
    return lines
