"""Tables: fewer digits, then fewer columns, then blocks; what is drawn never leaves the width."""

import random

import pytest
from rich.cells import cell_len

from lmcli.terminal import tables
from lmcli.terminal.tables import Column, Layout, RowTable, digits, named_columns, table

WIDE = "却说贾雨村风尘怀闺秀"


@pytest.fixture
def at(monkeypatch):
    """at(columns): the terminal has this width."""
    return lambda columns: monkeypatch.setattr(tables, "columns_of", lambda stream: columns)


def number(value):
    return digits(4, 2, lambda count: f"{value:.{count}f}")


HEADER = (
    Column("model", kind="name"),
    "bits",
    Column("difference", 1),
    Column(("documents", "docs"), 2),
)
ROWS = (("a", number(1.23456), number(-0.5), "12"), ("long/b", number(22.5), number(0.25), "1,234"))


@pytest.mark.parametrize(
    "columns, expected",
    [
        (
            80,
            [
                "model      bits  difference  documents",
                "a        1.2346     -0.5000         12",
                "long/b  22.5000      0.2500      1,234",
            ],
        ),
        # a shorter title, then fewer digits
        (34, ["model      bits  difference   docs", "a        1.2346     -0.5000     12"]),
        (32, ["model    bits  difference   docs", "a        1.23     -0.5000     12"]),
        # then fewer columns, whose room the others take
        (28, ["model      bits  difference", "a        1.2346     -0.5000"]),
        (16, ["model      bits", "a        1.2346"]),
        (13, ["model    bits", "a        1.23"]),
        # then a block for each record, with all figures
        (11, ["model", "      long/b"]),
    ],
)
def test_digits_go_then_columns_then_blocks(at, columns, expected):
    at(columns)
    lines = table(HEADER, ROWS).splitlines()
    if columns > 11:
        assert lines[: len(expected)] == expected
    else:
        assert lines[:2] == ["model       a", "bits        1.23"] and "docs        1,234" in lines


def test_columns_that_were_left_out_are_named(at):
    at(28)
    assert table(HEADER, ROWS).splitlines()[-2:] == ["not shown at this width:", "documents"]
    at(40)
    assert "not shown" not in table(HEADER, ROWS)


def test_no_number_is_cut_and_no_line_too_long_at_any_width(at):
    """Random tables; the numbers are distinct, so that each is found, in one form or another."""
    chance = random.Random(0)
    for _ in range(300):
        columns = [Column("name", kind="name")]
        columns += [Column(f"figure_{k}", chance.randrange(4)) for k in range(chance.randrange(6))]
        columns += [Column("text", kind="text")] * chance.randrange(2)
        rows = [
            [
                number(chance.uniform(-999, 999))
                if column.kind == "number"
                else chance.choice(["", "word " * 9, WIDE * 3, "x" * 50, "\x1b[2J\n\t"])
                for column in columns
            ]
            for _ in range(3)
        ]
        width = chance.randrange(24, 120)
        layout = Layout(columns, rows, width)
        drawn = layout.header() + "".join(map(layout.row, rows))
        assert max(map(cell_len, drawn.splitlines())) <= width and "\x1b" not in drawn
        for each in layout.shown:
            if each.column.kind == "number":
                cells = [row[each.number] for row in rows]
                assert all(any(form in drawn for form in forms) for forms in cells)


def test_a_text_ends_after_a_word_and_a_name_goes_on(at):
    columns = [Column("name", kind="name"), Column("text", kind="text")]
    layout = Layout(columns, [("one two three", "It was the best of times")], 32)
    assert layout.row(("one two three", "It was the best of times")).splitlines() == [
        "one two three  It was the best …"
    ]
    assert tables.shortened(WIDE, 9) == "却说贾 …" and tables.shortened(WIDE, 20) == WIDE
    narrow = Layout(columns, [("one two three", WIDE)], 29)
    assert [cell_len(line) for line in narrow.row(("one two three", WIDE)).splitlines()] == [29, 5]


@pytest.fixture
def rows_at(at):
    """rows_at(columns, names, **options): a RowTable on a terminal of this width."""

    def make(columns, titles, **options):
        at(columns)
        return RowTable(named_columns(titles, **options))

    return make


def test_rows_come_one_by_one_under_one_header(rows_at):
    draw = rows_at(40, ("p", "count", "text"), texts=("text",))
    first = draw("0.5\t3\ta\\tb\\\\n\n1\t12\tNA\n")
    assert first == (
        "        p      count  text\n   0.5000          3  a␉b\\n\n   1.0000         12  NA\n"
    )
    # later rows keep the columns; a number that is too wide has fewer decimals
    assert draw("NA\t7\tx\n") == "       NA          7  x\n"
    assert draw("1e-07\t7\tx\n") == "    1e-07          7  x\n"
    assert draw("-123456.789\t7\tx\n") == "-123456.8          7  x\n"
    wide = draw("-1234567890.5\t7\tx\n")
    assert wide == "-1.23e+09          7  x\n"
    assert draw("") == ""


def test_lists_of_numbers_are_rounded_one_by_one(rows_at):
    draw = rows_at(60, ("label", "probability"), names=("label",))
    assert draw("a,b\t0.75,0.123456\n").splitlines()[1] == "a,b    0.7500,0.1235"
