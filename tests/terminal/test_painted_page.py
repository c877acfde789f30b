"""Pages of painted text: what a reader can see, copy and link to, and their memory."""

import re
import tracemalloc
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lmcli.errors import UserError
from lmcli.output.score import ScoreFormat
from lmcli.output.score_forms import ColoredRows
from lmcli.terminal import painted_page
from lmcli.terminal.painted_page import DARK, HtmlPage, SvgPage
from lmcli.terminal.painted_text import HEX, SHADES, Segment

MIXED = [Segment("\u05e9\u05dc\u05d5\u05dd", 15.0), Segment(" ", 0.0), Segment("dog", 3.0)]
MIXED += [Segment(" ", 0.0), Segment("12", 5.0), Segment(".", 1.0)]


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_shade_can_be_read_on_light_and_dark_pages():
    """WCAG AA asks for 4.5."""
    assert set(HEX) == set(DARK) == {color for _, color in SHADES}
    assert all(contrast(color, "#000000") >= 4.5 for color in HEX.values())
    assert all(contrast(color, "#ffffff") >= 4.5 for color in DARK.values())
    # on a dark page what is likelier is darker, on a light one lighter
    by_bits = [color for _, color in SHADES]
    assert sorted(by_bits, key=lambda color: -luminance(HEX[color])) == by_bits[::-1]
    assert sorted(by_bits, key=lambda color: luminance(DARK[color])) == by_bits[::-1]


class Reader(HTMLParser):
    """The texts of the paragraphs, and what links to what."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.ids, self.links, self.directions = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag == "p":
            self.texts.append("")
            self.directions.append(values.get("dir"))

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def test_a_record_can_be_copied_and_linked_to():
    page = HtmlPage(["a<b"])
    text = page.record(7, [[Segment("x\ny\t", 1.0), *MIXED]]) + page.record(9, [[]])
    reader = Reader(text)
    assert reader.texts[0].rstrip() == "x\ny\t" + "".join(part.text for part in MIXED)
    assert reader.ids == ["7", "9"] and reader.links == ["#7", "#9"]
    assert reader.directions == ["auto", "auto"] and page.size == len(text)
    assert "<title>Surprisal: a&lt;b</title>" in page.start()


def test_the_memory_of_a_page_is_flat(tmp_path):
    rows = ColoredRows(ScoreFormat(), color=False, html=str(tmp_path / "page.html"))
    parts = [Segment(f" word{i}", i / 3) for i in range(12)]
    with rows.opened(["m"]):
        tracemalloc.start()
        for number in range(1, 3001):
            assert rows.written((number, [parts])) == ""
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows.summary() == ""
    size = (tmp_path / "page.html").stat().st_size
    assert size > 1_500_000 and peak < 300_000


def test_a_large_page_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("lmcli.output.score_forms.LARGE_PAGE", 1_000_000)
    rows = ColoredRows(ScoreFormat(), color=False, html=str(tmp_path / "page.html"))
    with rows.opened(["m"]):
        rows.written((1, [[Segment("x" * 3_000_000, 1.0)]]))
        assert re.search(r"page.html has 3 MB: browsers .* above 1; ", rows.summary())


def picture(*records: list[Segment], models=("m",)) -> ElementTree.Element:
    page = SvgPage(models)
    assert page.start() == "" and not any(
        page.record(i, [parts] * len(models)) for i, parts in enumerate(records, 1)
    )
    return ElementTree.fromstring(page.end())


def test_a_picture_from_right_to_left():
    """The first word of a Hebrew line is at its right; a number has no direction of its own."""
    root = picture(MIXED)
    places = {}
    for group in root.iterfind(".//{*}g"):
        (text,) = group.iterfind("{*}text")
        rtl = text.get("direction") == "rtl"
        left = float(text.get("x")) - rtl * float(text.get("textLength"))
        places[text.text] = (left, rtl)
    order = sorted(("\u05e9\u05dc\u05d5\u05dd", "dog", "12", "."), key=places.get)
    assert order == [".", "12", "dog", "\u05e9\u05dc\u05d5\u05dd"]
    assert not places["dog"][1] and places["\u05e9\u05dc\u05d5\u05dd"][1]
    right = places["\u05e9\u05dc\u05d5\u05dd"][0] + 4 * painted_page.CELL
    assert right == pytest.approx(10 + painted_page.SVG_COLUMNS * painted_page.CELL, abs=0.2)


def test_a_picture_has_a_title_a_legend_and_room_for_all():
    root = picture(*[[Segment("word ", 3.0)] * 60] * 9, models=("one", "two"))
    assert root[0].tag.endswith("title") and root[0].text == "Surprisal: one, two"
    texts = list(root.iterfind(".//{*}text"))
    assert "".join(each.text for each in texts[:12]).startswith("bits of surprisal from  2 ")
    lowest = max(float(each.get("y")) for each in texts)
    assert lowest < float(root.get("height")) < lowest + 40
    columns = {float(each.get("x")) for each in texts if each.text in ("one", "two")}
    assert len(columns) == 2 and max(columns) > float(root.get("width")) / 2


def test_a_picture_with_too_many_lines_is_refused(monkeypatch):
    monkeypatch.setattr(painted_page, "MOST_SVG_LINES", 5)
    page = SvgPage(["m"])
    for number in range(1, 4):
        page.record(number, [[Segment("x", 1.0)]])
    with pytest.raises(UserError, match="at most 5 lines, and record 4 exceeds it"):
        page.record(4, [[Segment("x", 1.0)]])
