"""Painted text as files by themselves: a page of HTML, written as records come, and an SVG."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Protocol

from lmcli.errors import UserError
from lmcli.terminal.painted_text import (
    HEX,
    SHADES,
    Segment,
    drawable,
    in_lines,
    segments_html,
    shade,
    tooltip,
)
from lmcli.terminal.wrapping import width

# backgrounds where the reader prefers dark pages: the likeliest text stays the darkest
DARK = {203: "#b3261e", 209: "#9c3f12", 215: "#7d4a0c", 222: "#574410", 230: "#33301a"}
# characters of a line, their width, the height of a line, and what is between records
SVG_COLUMNS, CELL, LINE, GAP = 96, 8.4, 20, 6
MOST_SVG_LINES = 10_000
LARGE_PAGE = 50_000_000  # characters: Chromium opens 30 million in 8 s, 100 million in minutes
LEGEND = "bits of surprisal from"


def _fills(colors: Mapping[int, str]) -> str:
    return "".join(f".c{k}{{background:{v}}}rect.c{k}{{fill:{v}}}" for k, v in colors.items())


STYLE = (
    "body,svg{font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    "background:#fff;color:#222;fill:#222}[class^=c]{color:#000;fill:#000}.n{opacity:.65}\n"
    + _fills(HEX)
    + "@media (prefers-color-scheme:dark){body,svg{background:#161616;color:#ddd;fill:#ddd}"
    + f"[class^=c]{{color:#fff;fill:#fff}}{_fills(DARK)}}}\n"
)
HTML_STYLE = """
body{margin:0 auto 2em;max-width:calc(4em + 46em*var(--models));padding:0 1em;line-height:1.6}
header{position:sticky;top:0;padding:.6em 0;background:inherit;border-bottom:1px solid #8886}
div{display:grid;grid-template-columns:3.5em repeat(var(--models),minmax(0,1fr));gap:0 1.2em}
div{scroll-margin-top:6em;content-visibility:auto;contain-intrinsic-height:auto 1.9em}
div:target{outline:2px solid #4a90d9;outline-offset:2px;border-radius:2px}
a{color:inherit;opacity:.65;text-decoration:none;text-align:right;user-select:none}
a::before{content:attr(href);font-size:.75em}a:hover{opacity:1}
p{margin:.15em 0;min-height:1.6em;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
header p{margin-left:4.7em}
i{font-style:normal;padding:0 .4em}b{overflow-wrap:anywhere}span,i{border-radius:2px}
header *,span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
@media (max-width:40em){div{grid-template-columns:2.5em 1fr}p,b{grid-column:2}
header p{margin:0}}
"""


def _title(models: Sequence[str]) -> str:
    return f"<title>Surprisal: {escape(', '.join(models))}</title>"


class PaintedPage(Protocol):
    """A file of painted records, several models side by side: made from its parts, in order.

    `size` are the characters of its records so far that a browser has to open.
    """

    size: int

    def start(self) -> str:
        """What comes before the records."""

    def record(self, number: int, texts: Sequence[Sequence[Segment]]) -> str:
        """A record with its number: its text as each model has it."""

    def end(self) -> str:
        """What comes after them."""


class HtmlPage:
    """A page of HTML: a line for each record, which `#NUMBER` links to."""

    def __init__(self, models: Sequence[str]):
        self.models, self.size = [drawable(name) for name in models], 0

    def start(self) -> str:
        """Style, legend and the names of the models, which stay at the top of the window."""
        shades = "".join(f'<i class="c{color}">{least:g}</i> ' for least, color in reversed(SHADES))
        names = "".join(f"<b>{escape(name)}</b>" for name in self.models)
        return (
            '<!doctype html>\n<html><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
            f'content="light dark">{_title(self.models)}<style>{STYLE}{HTML_STYLE}</style></head>\n'
            f'<body style="--models:{len(self.models)}"><header><p>{LEGEND} {shades}</p>'
            f"<div><u></u>{names}</div></header>\n"
        )

    def record(self, number: int, texts: Sequence[Sequence[Segment]]) -> str:
        """A line with a paragraph for each model."""
        paragraphs = (f'<p dir="auto">{segments_html(parts, True)}</p>' for parts in texts)
        line = f'<div id="{number}"><a href="#{number}"></a>{"".join(paragraphs)}</div>\n'
        self.size += len(line)
        return line

    def end(self) -> str:
        """The end of the page."""
        return "</body></html>\n"


class SvgPage:
    """A picture: the lines of each record, wrapped as on a terminal.

    Without a title of its own a browser would look through the picture at each of its tooltips:
    800 records opened in 38 s, and in 2 with it.

    Its first line needs the height, so it is in memory: `record` raises UserError for more than
    MOST_SVG_LINES lines.
    """

    def __init__(self, models: Sequence[str]):
        self.models, self.size = [drawable(name) for name in models], 0
        self.columns = max(24, SVG_COLUMNS // len(models))
        self.lines, self.records = 2, 0  # the legend and the names
        self.shapes: list[str] = []

    def start(self) -> str:
        """Nothing: all of it is written at the end."""
        return ""

    def record(self, number: int, texts: Sequence[Sequence[Segment]]) -> str:
        """Nothing yet."""
        wrapped = [in_lines(parts, self.columns) for parts in texts]
        for k, lines in enumerate(wrapped):
            base = next(filter(None, (_direction(part.text) for part in texts[k])), "ltr")
            for i, line in enumerate(lines):
                self.shapes += _line_shapes(line, self._left(k), self._y(i), base, self.columns)
        self.lines += max(map(len, wrapped))
        self.records += 1
        if self.lines > MOST_SVG_LINES:
            raise UserError(
                f"a picture has at most {MOST_SVG_LINES:,} lines, and record {number:,} exceeds it",
                where="--svg",
                hint="--html FILE writes a page of any length",
            )
        return ""

    def _left(self, model: int) -> float:
        return 10 + model * (self.columns + 3) * CELL

    def _y(self, line: int) -> float:
        """The base line of a line after those that are drawn."""
        return 26.0 + LINE * (self.lines + line) + GAP * self.records

    def end(self) -> str:
        """The picture."""
        height = self._y(0)
        self.lines = self.records = 0
        legend = [Segment(f"{LEGEND} ", 0.0)]
        for least, _ in reversed(SHADES):
            legend += [Segment(f" {least:g} ", least), Segment(" ", 0.0)]
        shapes = list(_line_shapes(legend, self._left(0), self._y(0), "ltr", self.columns))
        for k, name in enumerate(self.models):
            attributes = f'x="{self._left(k):.1f}" y="{self._y(1):.1f}" font-weight="bold"'
            shapes.append(f"<text {attributes}>{escape(name)}</text>\n")
        size = max(self._left(len(self.models)) - 3 * CELL, 10 + 46 * CELL) + 10
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {size:.0f} {height:.0f}" font-size="14">{_title(self.models)}'
            f"<style>{STYLE}</style>\n"
            f"{''.join(shapes)}{''.join(self.shapes)}</svg>\n"
        )


def _direction(text: str) -> str:
    """Where the first letter of a text has its end: "ltr", "rtl", or "" without letters."""
    kinds = (unicodedata.bidirectional(character) for character in text)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "")
    return {"L": "ltr", "": ""}.get(first, "rtl")


def _in_drawn_order(line: Sequence[Segment], base: str) -> list[tuple[Segment, str]]:
    """The segments from left to right, each with its direction, in a text with direction `base`.

    What has no letters goes with its neighbors, or with the text if these differ.
    """
    directions = [_direction(part.text) for part in line]
    for i, direction in enumerate(directions):
        before = directions[i - 1] if i else base
        after = next(filter(None, directions[i:]), base)
        directions[i] = direction or (before if before == after else base)
    runs = [
        (direction, [part for part, _ in run])
        for direction, run in groupby(zip(line, directions), key=lambda each: each[1])
    ]
    return [
        (part, direction)
        for direction, run in (runs if base == "ltr" else reversed(runs))
        for part in (run if direction == "ltr" else reversed(run))
    ]


def _line_shapes(
    line: Sequence[Segment], left: float, y: float, base: str, columns: int
) -> Iterator[str]:
    """The shapes of a line with its base line at y; one from right to left ends at the right."""
    parts = [
        Segment("".join(each.text for each in same), bits)
        for bits, same in groupby(line, key=lambda each: each.bits)
    ]
    x = left
    if base == "rtl":
        x += CELL * (columns - sum(width(part.text) for part in parts))
    for part, direction in _in_drawn_order(parts, base):
        size, color = width(part.text) * CELL, shade(part.bits)
        title = f"<title>{tooltip(part)}</title>" if part.bits != 0 else ""
        style = f' class="c{color}"' if color else ' class="n"' if color is None else ""
        rectangle = ""
        if color:
            rectangle = (
                f'<rect class="c{color}" fill="{HEX[color]}" x="{x:.1f}" y="{y - 15:.1f}" '
                f'width="{size:.1f}" height="{LINE}"/>'
            )
        # Arabic letters join each other: they are stretched, others spaced
        rtl = direction == "rtl"
        fit = ' direction="rtl" lengthAdjust="spacingAndGlyphs"' if rtl else ""
        text = (
            f'<text{style} x="{x + size * rtl:.1f}" y="{y:.1f}" textLength="{size:.1f}"{fit} '
            f'xml:space="preserve">{escape(part.text)}</text>'
        )
        yield f"<g>{title}{rectangle}{text}</g>\n"
        x += size
