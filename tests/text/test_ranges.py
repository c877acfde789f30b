"""Lists of documents: as any sequence of them, whatever their number, in memory or on disk."""

import numpy as np
import pytest

from lmcli.errors import UserError
from lmcli.text import ranges
from lmcli.text.documents import Layout, limit, split
from lmcli.text.ranges import Document, Documents

PLAIN = [Document(f"{'ab'[i % 3 == 0]}.txt", 10 * i, 10 * i + i) for i in range(100)]


@pytest.fixture(params=[1 << 20, 30], ids=["in memory", "on disk"])
def found(request, monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "MOST_IN_MEMORY", request.param)
    monkeypatch.setattr(ranges, "BLOCK", 7)
    documents = Documents.of(iter(PLAIN))
    assert isinstance(documents.table, np.memmap) == (request.param == 30)
    return documents


def test_it_is_the_sequence_it_was_made_of(found):
    assert found == PLAIN and list(found) == PLAIN and len(found) == 100 and list(reversed(found)) == PLAIN[::-1]
    assert found[7] == found[np.int64(7)] == PLAIN[7] and found[-1] == PLAIN[-1] and PLAIN[50] in found
    assert found[9::10] == PLAIN[9::10] and found[3:5] == PLAIN[3:5] and found[5:5] == [] and not found[5:5]
    assert found != PLAIN[:-1] and found != [*PLAIN[:-1], PLAIN[0]]
    with pytest.raises(IndexError):
        found[100]


def test_bytes_are_those_of_the_ranges(found):
    assert found.bytes == sum(range(100)) and found[10:12].bytes == 21


def test_a_list_on_disk_leaves_no_file_behind(found, tmp_path):
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found[99] == PLAIN[99]


def test_a_list_is_taken_as_it_is(found):
    assert Documents.of(found) is found and Documents.of([]) == []


def test_a_disk_that_refuses_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(ranges, "MOST_IN_MEMORY", 1)
    with pytest.raises(UserError, match="cannot write the token cache"):
        Documents.of(iter(PLAIN))


def test_surveyed_and_split_lists_may_lie_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setattr(ranges, "MOST_IN_MEMORY", 20)
    monkeypatch.setattr(ranges, "BLOCK", 10)
    (tmp_path / "a.txt").write_text("".join(f"line {i:02}\n" for i in range(50)))
    layout = Layout(documents="line")
    documents, _ = layout.survey([str(tmp_path / "a.txt")])
    training, held_out = split(documents, layout)
    assert [isinstance(part.table, np.memmap) for part in (documents, training)] == [True, True]
    assert [layout.text(document) for document in held_out] == [f"line {i:02}" for i in range(9, 50, 10)]
    assert sorted([*training, *held_out]) == list(documents)


def test_a_large_text_among_many_is_cut_down_as_well(tmp_path):
    """Every k-th document alone would measure a whole file of gigabytes."""
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("line of it\n" * (2000 if i == 0 else 3))
    documents, _ = Layout().survey(sorted(map(str, tmp_path.glob("*.txt"))))
    cut_down = limit(documents, Layout(), 1000)
    assert cut_down.bytes < 2000 and all(document.end % 11 == 0 for document in cut_down)
