"""Lists of documents: like any sequence of them, in memory or on disk."""

import numpy as np
import pytest

from lmcli.data import byte_ranges
from lmcli.data.byte_ranges import Document, Documents
from lmcli.data.documents import DocumentFormat, survey
from lmcli.data.splits import limit, split
from lmcli.errors import UserError

PLAIN = [Document(f"{'ab'[i % 3 == 0]}.txt", 10 * i, 10 * i + i) for i in range(100)]


@pytest.fixture(params=[1 << 20, 30], ids=["in memory", "on disk"])
def documents(request, monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(byte_ranges, "MAX_IN_MEMORY", request.param)
    monkeypatch.setattr(byte_ranges, "BLOCK", 7)
    documents = Documents.of(iter(PLAIN))
    assert isinstance(documents.table, np.memmap) == (request.param == 30)
    return documents


def test_documents_equal_the_sequence_they_were_made_from(documents):
    assert (
        documents == PLAIN
        and list(documents) == PLAIN
        and len(documents) == 100
        and list(reversed(documents)) == PLAIN[::-1]
    )
    assert (
        documents[7] == documents[np.int64(7)] == PLAIN[7]
        and documents[-1] == PLAIN[-1]
        and PLAIN[50] in documents
    )
    assert (
        documents[9::10] == PLAIN[9::10]
        and documents[3:5] == PLAIN[3:5]
        and documents[5:5] == []
        and not documents[5:5]
    )
    assert documents != PLAIN[:-1] and documents != [*PLAIN[:-1], PLAIN[0]]
    with pytest.raises(IndexError):
        documents[100]


def test_bytes_are_the_total_of_the_ranges(documents):
    assert documents.bytes == sum(range(100)) and documents[10:12].bytes == 21


def test_a_list_on_disk_leaves_no_file_behind(documents, tmp_path):
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert documents[99] == PLAIN[99]


def test_documents_of_documents_are_the_same_object(documents):
    assert Documents.of(documents) is documents and Documents.of([]) == []


def test_a_disk_error_is_a_user_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(byte_ranges, "MAX_IN_MEMORY", 1)
    with pytest.raises(UserError, match="cannot write the token cache"):
        Documents.of(iter(PLAIN))


def test_surveyed_and_split_lists_may_be_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setattr(byte_ranges, "MAX_IN_MEMORY", 20)
    monkeypatch.setattr(byte_ranges, "BLOCK", 10)
    (tmp_path / "a.txt").write_text("".join(f"line {i:02}\n" for i in range(50)))
    doc_format = DocumentFormat(documents="line")
    surveyed = survey([str(tmp_path / "a.txt")], doc_format)
    documents = surveyed.documents
    training, validation = split(surveyed, doc_format)
    assert [isinstance(part.table, np.memmap) for part in (documents, training)] == [True, True]
    assert sorted([*training, *validation]) == list(documents) and len(validation) == 5
    monkeypatch.setattr(byte_ranges, "MAX_IN_MEMORY", 1 << 20)  # the same choice in memory
    assert split(survey([str(tmp_path / "a.txt")], doc_format), doc_format)[1] == validation


def test_joined_lists_keep_files_and_keys(documents):
    other = Documents.keyed(((Document("c.txt", i, i + 1), i) for i in range(40)), seed=3)
    joined = Documents.joined([documents, other])
    assert joined == [*PLAIN, *other] and joined.keys[100:].tolist() == other.keys.tolist()
    assert isinstance(joined.table, np.memmap) == isinstance(documents.table, np.memmap)
    assert Documents.joined([other]) is other


def test_keys_are_splitmix64_of_the_hash_and_the_seed():
    """Published results of SplitMix64: its state 1234567 plus once and twice the constant."""
    for seed, expected in ((0, 6457827717110365317), (1, 3203168211198807973)):
        documents = Documents.keyed([(Document("a", 0, 1), 1234567)], seed)
        assert documents.keys.astype(np.uint64).tolist() == [expected]


def test_a_large_text_among_many_is_cut_too(tmp_path):
    """Every k-th document alone could include a whole file of gigabytes."""
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("line of it\n" * (2000 if i == 0 else 3))
    documents = survey(sorted(map(str, tmp_path.glob("*.txt"))), DocumentFormat()).documents
    cut_down = limit(documents, DocumentFormat(), 1000)
    assert cut_down.bytes < 2000 and all(document.end % 11 == 0 for document in cut_down)
