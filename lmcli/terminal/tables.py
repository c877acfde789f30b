"""Tables and cells that fit the width of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcli.text.characters import visible

if TYPE_CHECKING:
    from rich.text import Text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal as text; all columns but the first are right-aligned."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        drawn.add_column(_cell_text(name), justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        drawn.add_row(*map(_cell_text, row))
    wide = Console(width=1 << 14)
    # numbers are never cut off, whatever the terminal's width
    needed = Measurement.get(wide, wide.options, drawn).minimum
    console = Console(width=max(80, Console().width, needed))
    with console.capture() as captured:
        console.print(drawn)
    return captured.get()


def _cell_text(text: str) -> Text:
    """The text of a cell: no markup, and nothing that moves the cursor."""
    from rich.text import Text

    return Text(visible(text, keep="\n"))


def fit(text: str, columns: int) -> str:
    """The text in so many columns of a terminal: padded with spaces, or cut with "…"."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= columns:
        return set_cell_size(text, columns)
    return set_cell_size(text, columns - 1) + "…"
