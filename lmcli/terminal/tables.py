"""Tables that fit the width of a terminal: fewer digits, then fewer columns, then blocks."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lmcli.terminal.wrapping import columns_of, width
from lmcli.text.characters import DIM, PLAIN, shows_color, visible

GAP = "  "
LEAST_TEXT, LEAST_NAME = 16, 10  # columns that a text or a name needs at least
ROOM_OF_NUMBER = 9  # columns for numbers that come later, where there is room
BOLD = "\x1b[1m"

Cell = str | tuple[str, ...]  # of several forms, the widest first, the first that fits is drawn


@dataclass(frozen=True)
class Column:
    """A column of a table; a shorter `title` is used where it must be narrow.

    `rank`: 0 is always drawn; of the others the highest is left out first, all that have it
    together. `kind`: a number is right-aligned and never cut, a name goes on in the next line, a
    text ends in "…" after a word.
    """

    title: Cell
    rank: int = 0
    kind: str = "number"


def digits(most: int, least: int, write: Callable[[int], str]) -> tuple[str, ...]:
    """A number as a cell: what `write` makes of it for `most` to `least` digits."""
    return tuple(write(count) for count in range(most, least - 1, -1))


def table(header: Sequence[str | Column], rows: Sequence[Sequence[Cell]]) -> str:
    """A table for this terminal, as text; a title alone is a number, the first one a name.

    Columns that were left out are named below it.
    """
    layout = _layout(header, rows)
    return layout.header() + "".join(layout.row(row) for row in rows) + _missing(layout)


def _missing(layout: Layout) -> str:
    """The line that names the columns for which there is no room; "" if there are none."""
    if not layout.left_out:
        return ""
    note = f"not shown at this width: {', '.join(layout.left_out)}"
    return "".join(f"{_styled(line, DIM)}\n" for line in wrapped(note, layout.width))


def fits(header: Sequence[str | Column], rows: Sequence[Sequence[Cell]]) -> bool:
    """True if a table of all these columns fits this terminal."""
    layout = _layout(header, rows)
    return not (layout.blocks or layout.left_out)


def _layout(header: Sequence[str | Column], rows: Sequence[Sequence[Cell]]) -> Layout:
    columns = [
        Column(each, kind="number" if i else "name") if isinstance(each, str) else each
        for i, each in enumerate(header)
    ]
    return Layout(columns, rows, columns_of(sys.stdout))


def _forms(cell: Cell) -> tuple[str, ...]:
    """The forms of a cell: no markup, and nothing that moves the cursor."""
    return tuple(visible(form, keep="") for form in ((cell,) if isinstance(cell, str) else cell))


def _form(forms: tuple[str, ...], level: int) -> str:
    return forms[min(level, len(forms) - 1)]


def _styled(text: str, style: str) -> str:
    return f"{style}{text}{PLAIN}" if text and shows_color(sys.stdout) else text


class _Fitted:
    """A column with the widths it can have, by its level: shorter titles, then fewer digits."""

    def __init__(self, number: int, column: Column, cells: Sequence[tuple[str, ...]]):
        self.number, self.column, self.titles = number, column, _forms(column.title)
        depth = max((len(forms) for forms in cells), default=1)
        last = len(self.titles) - 1
        self.steps: list[tuple[int, int, int]] = []  # (title, digits, width), narrower each time
        for title, level in (
            *((k, 0) for k in range(last + 1)),
            *((last, level) for level in range(1, depth)),
        ):
            needed = max((width(_form(forms, level)) for forms in cells), default=0)
            needed = max(needed, width(self.titles[title]))
            if not self.steps or needed < self.steps[-1][2]:
                self.steps.append((title, level, needed))
        self.reset()

    def reset(self) -> None:
        """Takes the widest form."""
        self.step, self.width = 0, self.steps[0][2]

    def excess(self, kind: str, least: int) -> int:
        """The columns that a text or name of this kind has over the least."""
        return self.width - max(least, width(self.titles[-1])) if self.column.kind == kind else 0

    def can_narrow(self) -> bool:
        """True if a shorter title or fewer digits make it narrower."""
        return self.column.kind != "text" and self.step + 1 < len(self.steps)

    def narrow(self) -> None:
        """Takes the next narrower form."""
        self.step += 1
        self.width = self.steps[self.step][2]

    @property
    def title(self) -> str:
        """The title in its present form."""
        return self.titles[self.steps[self.step][0]]

    def text(self, forms: tuple[str, ...], room: int) -> str:
        """The form of a cell: with the column's digits, or fewer for a number that is too wide."""
        level = self.steps[self.step][1]
        fitting = (form for form in forms[level:] if width(form) <= room)
        return next(fitting, _form(forms, len(forms)))


class Layout:
    """How a table is drawn in so many columns of a terminal: chosen by the rows it is given.

    `spare` room goes to the last text, and to numbers that may come later. `left_out` names the
    columns for which there is no room. Without room for the others a record is a block of lines.
    """

    def __init__(
        self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], most: int, spare=False
    ):
        cells = [[_forms(row[i]) for row in rows] for i in range(len(columns))]
        self.width = most
        self.all = [_Fitted(i, each, cells[i]) for i, each in enumerate(columns)]
        self.shown, self.left_out = list(self.all), list[str]()
        self.blocks = not self._fits()
        if self.blocks:
            self.shown, self.left_out = list(self.all), []
        elif spare:
            self._use_room()

    def _room(self) -> int:
        """The columns that are left over; less than 0: that are missing."""
        widths = sum(each.width for each in self.shown)
        return self.width - widths - len(GAP) * (len(self.shown) - 1)

    def _fits(self) -> bool:
        """Makes the table narrower until it fits; False if it cannot."""
        while not self._narrowed(max(LEAST_NAME, self.width // 3)):
            optional = [each for each in self.shown if each.column.rank]
            if not optional:
                return self._narrowed(LEAST_NAME)
            highest = max(each.column.rank for each in optional)
            leaving = [each for each in optional if each.column.rank == highest]
            self.shown = [each for each in self.shown if each not in leaving]
            self.left_out[:0] = [each.titles[0] for each in leaving]
            for each in self.shown:
                each.reset()
        return True

    def _narrowed(self, least_name: int) -> bool:
        """True if shorter texts and titles, then fewer digits, then narrower names make it fit."""
        while self._room() < 0:
            text = max(self.shown, key=lambda each: each.excess("text", LEAST_TEXT))
            name = max(self.shown, key=lambda each: each.excess("name", least_name))
            if (excess := text.excess("text", LEAST_TEXT)) > 0:
                text.width -= min(excess, -self._room())
            elif numbers := [each for each in self.shown if each.can_narrow()]:
                max(numbers, key=lambda each: each.width).narrow()
            elif (excess := name.excess("name", least_name)) > 0:
                name.width -= min(excess, -self._room())
            else:
                return False
        return True

    def _use_room(self) -> None:
        numbers = [each for each in self.shown if each.column.kind == "number"]
        for each in numbers:
            wanted = max(0, ROOM_OF_NUMBER - each.width)
            each.width += min(wanted, max(0, self._room()) // len(numbers))
        if texts := [each for each in self.shown if each.column.kind == "text"]:
            texts[-1].width += max(0, self._room())

    def header(self) -> str:
        """The line of titles; nothing for blocks, which have a title in each line."""
        if self.blocks:
            return ""
        return self._line([[each.title] for each in self.shown], BOLD)

    def row(self, cells: Sequence[Cell]) -> str:
        """The lines of a record."""
        forms = [_forms(cell) for cell in cells]
        if self.blocks:
            return self._block(forms)
        drawn: list[list[str]] = []
        excess = 0  # columns that wide numbers have taken
        for each in self.shown:
            room = max(1, each.width - excess)
            if each.column.kind == "number":
                text = each.text(forms[each.number], each.width)
                excess = max(0, excess + width(text) - each.width)
                drawn.append([text])
            elif each.column.kind == "name":
                drawn.append(wrapped(forms[each.number][0], each.width) or [""])
            else:
                drawn.append([shortened(forms[each.number][0], room)])
                excess = 0
        return self._line(drawn)

    def _line(self, cells: Sequence[list[str]], style: str = "") -> str:
        lines = []
        for k in range(max(map(len, cells))):
            parts, excess = [], 0
            for each, texts in zip(self.shown, cells):
                text = texts[k] if k < len(texts) else ""
                padding = each.width - width(text) - excess
                excess = max(0, -padding)
                fill, text = " " * max(0, padding), _styled(text, style)
                parts.append(fill + text if each.column.kind == "number" else text + fill)
            lines.append(GAP.join(parts).rstrip() + "\n")
        return "".join(lines)

    def _block(self, forms: Sequence[tuple[str, ...]]) -> str:
        """A line for each figure, and an empty one."""
        indent = max(width(each.titles[-1]) for each in self.all)
        lines = []
        for each in self.all:
            title = each.titles[-1]
            room = max(4, self.width - indent - len(GAP))
            fitting = (form for form in forms[each.number] if width(form) <= room)
            text = next(fitting, forms[each.number][-1])
            is_number = each.column.kind == "number"
            first, *rest = ([text] if is_number else wrapped(text, room)) or [""]
            lines.append(_styled(title, BOLD) + " " * (indent - width(title)) + GAP + first)
            lines += [" " * indent + GAP + line for line in rest]
        return "\n".join(line.rstrip() for line in lines) + "\n\n"


def wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of so many columns, which end after words where they can."""
    if width(text) <= columns:
        return [text] if text else []
    from rich.console import Console
    from rich.text import Text

    lines = Text(text).wrap(Console(width=columns), columns, overflow="fold")
    return [line.plain.rstrip() for line in lines]


def shortened(text: str, columns: int) -> str:
    """The text on one line of so many columns: whole, or its first words and "…"."""
    if width(text) <= columns:
        return text
    if columns <= 2:
        return "…"
    # no more can be seen, however long the text is
    start = wrapped(text[: columns + 1], columns - 2)[0]
    return f"{start.rstrip()} …"


def fit(text: str, columns: int) -> str:
    """The text in so many columns of a terminal: padded with spaces, or cut with "…"."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= columns:
        return set_cell_size(text, columns)
    return set_cell_size(text, columns - 1) + "…"


def in_columns(rows: Sequence[Sequence[str]], columns: int) -> str:
    """Rows of short texts, one above the other; they go on below where a line ends."""
    lines: list[list[str]] = [[] for _ in rows]
    used = 0
    for texts in zip(*([visible(text, keep="") for text in row] for row in rows)):
        most = max(map(width, texts))
        if used and used + most > columns:
            lines += [[] for _ in rows]
            used = 0
        for line, text in zip(lines[-len(rows) :], texts):
            line.append(text + " " * (most - width(text)))
        used += most + 1
    return "\n".join(" ".join(line).rstrip() for line in lines)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
ESCAPED = re.compile(r"\\(.)", re.DOTALL)
CHARACTERS = {"n": "\n", "r": "\r", "t": "\t"}


class RowTable:
    """Draws tab-separated lines as rows of a table, as they come; the first ones choose its widths.

    `merge` makes the cells of a row from those of its line; `columns` are for its result. The
    numbers of a column have equally many decimals.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        header: bool = True,
        merge: Callable[[list[str]], list[str]] = list,
    ):
        self.columns, self.has_header, self.merge = columns, header, merge
        self.layout: Layout | None = None
        self.decimals: list[int | None] = []

    def __call__(self, text: str) -> str:
        """The drawn rows of some lines; before the first ones the titles, and what is not shown."""
        rows = [self.merge(line.split("\t")) for line in text.split("\n")[:-1]]
        if not rows:
            return ""
        first = self.layout is None
        if self.layout is None:
            self.decimals = [
                _decimals([row[i] for row in rows]) if column.kind == "number" else None
                for i, column in enumerate(self.columns)
            ]
            cells = [self._cells(row) for row in rows]
            self.layout = Layout(self.columns, cells, columns_of(sys.stdout), spare=True)
        titles = self.layout.header() if first and self.has_header else ""
        if titles:
            titles = _missing(self.layout) + titles
        return titles + "".join(self.layout.row(self._cells(row)) for row in rows)

    def _cells(self, row: list[str]) -> list[Cell]:
        return [
            _rounded(cell, decimals) if column.kind == "number" else _unescaped(cell)
            for column, cell, decimals in zip(self.columns, row, self.decimals)
        ]


def _unescaped(cell: str) -> str:
    return ESCAPED.sub(lambda match: CHARACTERS.get(match[1], match[1]), cell)


def _decimals(cells: list[str]) -> int | None:
    """The decimals for the numbers of a column; None for whole numbers."""
    numbers = [number for cell in cells for number in NUMBER.findall(cell)]
    if not any("." in number or "e" in number for number in numbers):
        return None
    largest = max(abs(float(number)) for number in numbers)
    return 4 if largest <= 1 else 3 if largest < 10 else 2


def _rounded(cell: str, decimals: int | None) -> Cell:
    """The cell with its numbers in so many decimals, or fewer."""
    if decimals is None:
        decimals = 2 if "." in cell else None
    if decimals is None:
        return cell
    return digits(decimals, 1, lambda count: NUMBER.sub(lambda m: _number(m[0], count), cell))


def _number(text: str, decimals: int) -> str:
    value = float(text)
    rounded = f"{value:.{decimals}f}"
    if abs(value) >= 1e9 or (value and not float(rounded)):
        return f"{value:.{max(1, decimals)}g}"
    return rounded


def named_columns(
    columns: Sequence[str],
    names: Collection[str] = (),
    texts: Collection[str] = (),
    optional: Sequence[str] = (),
) -> list[Column]:
    """Columns with these titles: `names`, `texts`, and numbers.

    `optional` ones, the most important first, are left out where there is no room.
    """
    ranks = {name: rank for rank, name in enumerate(optional, start=1)}
    kinds = {**dict.fromkeys(names, "name"), **dict.fromkeys(texts, "text")}
    return [Column(each, ranks.get(each, 0), kinds.get(each, "number")) for each in columns]
