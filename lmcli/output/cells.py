"""Cells and TSV lines, as every command writes them, and tokens painted by their surprisal."""

from lmcli.text.characters import DIM, PLAIN

# bits of surprisal from which a token has this background (of xterm's 256 colors)
SHADES = ((14.0, 203), (10.0, 209), (7.0, 215), (4.0, 222), (2.0, 230))


def cell(value: float | None) -> str:
    """A number as TSV has it: six significant digits, NA for None."""
    if value is None:
        return "NA"
    return str(value) if isinstance(value, int) else f"{value:.6g}" if value else "0"


def tsv_line(*cells: str) -> str:
    """One line of tab-separated cells, which must be escaped already."""
    return "\t".join(cells) + "\n"


def numbered(names: list[str], count: int | None) -> list[str]:
    """The column names of `count` items, numbered from 1; the names alone without a count."""
    return [f"{name}_{k + 1}" for k in range(count) for name in names] if count else names


def shade(bits: float | None) -> int | None:
    """The background of a token with these bits of surprisal; 0: none, None: it is dim."""
    return None if bits is None else next((color for least, color in SHADES if bits >= least), 0)


def paint(text: str, color: int | None) -> str:
    """The text, whose control characters are drawn, with a `shade`."""
    if not text or color == 0:
        return text
    style = DIM if color is None else f"\x1b[48;5;{color};38;5;16m"
    # a background must not reach the end of a line
    return "\n".join(line and f"{style}{line}{PLAIN}" for line in text.split("\n"))


def color_legend() -> str:
    """What the colors mean."""
    shades = (paint(f" {least:g} ", color) for least, color in reversed(SHADES))
    return f"bits of surprisal from {' '.join(shades)}"
