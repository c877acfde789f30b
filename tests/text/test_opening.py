"""Packed files: read as what is in them, in any command, as a stream; damage and a missing package are one line."""

import datetime
import gzip
import importlib
import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli.errors import UserError
from lmcli.text import opening
from lmcli.text.documents import Layout, split
from lmcli.text.opening import _Stream, open_bytes
from lmcli.text.records import Reader, expand, file_format

ROWS = [{"id": i, "text": f"row {i} 字\nend", "day": datetime.date(2024, 1, 1 + i % 28)} for i in range(3000)]


def zst(content: bytes) -> bytes:
    """Two frames, one after the other."""
    zstandard = pytest.importorskip("zstandard", reason="the package zstandard is not installed: the zst extra")
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


@pytest.fixture
def parquet(tmp_path):
    """A file of 3,000 rows in groups of 500, with a column of bytes."""
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed: the parquet extra")
    table = pyarrow.Table.from_pylist([{**row, "picture": b"\xff\x00"} for row in ROWS])
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "a.parquet", row_group_size=500)
    return str(tmp_path / "a.parquet")


class TestStreams:
    @given(chunks=st.lists(st.binary(max_size=6), max_size=6), data=st.data())
    @settings(max_examples=80)
    def test_as_a_file_in_memory(self, chunks, data):
        plain, stream = io.BytesIO(b"".join(chunks)), _Stream("a", iter(chunks))
        for _ in range(5):
            if data.draw(st.booleans()):
                found = stream.read(data.draw(st.integers(1, 5)))
                assert found == plain.read(len(found)) and (found or not plain.read(1))
            else:
                to = plain.tell() + data.draw(st.integers(0, 6))
                end = len(plain.getvalue())
                assert stream.seek(to) == min(to, end) and plain.seek(min(to, end)) is not None
        assert stream.read() == plain.read()

    def test_not_backward(self):
        stream = _Stream("a", iter([b"abc"]))
        stream.read(2)
        with pytest.raises(io.UnsupportedOperation):
            stream.seek(1)


class TestZst:
    def test_documents_are_those_of_the_content(self, tmp_path):
        text = "".join(f"line {i} of it\n" for i in range(40_000))
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt.zst").write_bytes(zst(text.encode()))
        layout = Layout()
        (plain, packed), hashes = layout.survey([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.zst")])
        assert plain[1:] == packed[1:] and len(set(hashes.values())) == 1
        training, held_out = split(layout.survey([packed.file])[0], layout)
        assert layout.text(training[0]) + layout.text(held_out[0]) == text

    def test_records_and_formats(self, tmp_path):
        (tmp_path / "a.jsonl.zst").write_bytes(zst(b'{"text": "one"}\n{"text": "two"}\n'))
        found = [record.text for batch in Reader().batches([str(tmp_path / "a.jsonl.zst")]) for record in batch]
        assert found == ["one", "two"]
        assert [file_format(f"x{end}", "auto") for end in (".tsv.zst", ".csv.gz", ".txt.zst", ".zst", ".jsonl")] == [
            "tsv", "csv", "text", "text", "jsonl"]

    @pytest.mark.parametrize("cut", [1, 5, 30])
    def test_one_that_is_cut_off_is_damaged(self, tmp_path, cut):
        (tmp_path / "a.txt.zst").write_bytes(zst(b"some text of it\n" * 99)[:-cut])
        with pytest.raises(UserError, match=r"a\.txt\.zst: cannot read: damaged zstd data"):
            Layout().survey([str(tmp_path / "a.txt.zst")])

    def test_what_is_none_is_damaged(self, tmp_path):
        zst(b"")
        (tmp_path / "a.txt.zst").write_bytes(b"plain text\n" * 9)
        with pytest.raises(UserError, match="damaged zstd data"):
            Layout().survey([str(tmp_path / "a.txt.zst")])


class TestParquet:
    def test_rows_are_documents(self, parquet):
        layout = Layout()
        documents, _ = layout.survey([parquet])
        assert [piece.text for piece in layout.pieces(documents)] == [row["text"] for row in ROWS]
        assert layout.text(documents[-1]) == ROWS[-1]["text"] and layout.first_row([parquet])["id"] == 0
        training, held_out = split(documents, layout)
        assert [row["id"] for _, row in layout.raw_rows(held_out)] == list(range(9, 3000, 10))
        assert len(training) == 2700

    def test_records_keep_their_fields_but_bytes(self, parquet):
        found = [record for batch in Reader(fields=("text",)).batches([parquet]) for record in batch]
        assert [record.text for record in found] == [row["text"] for row in ROWS]
        assert found[1].fields == {"id": 1, "text": ROWS[1]["text"], "day": "2024-01-02"} and found[1].line == 2

    def test_a_row_group_is_read_when_it_is_asked_for(self, parquet, monkeypatch):
        """Not the whole file at once: what has been written to JSON by the first read is one batch."""
        written = []
        monkeypatch.setattr(opening.json, "dumps", lambda row, **_: written.append(row) or str(row["id"]))
        with open_bytes(parquet) as stream:
            stream.read(1)
            assert 500 <= len(written) <= opening.ROWS_AT_ONCE

    def test_a_damaged_file_is_said(self, parquet):
        content = open(parquet, "rb").read()
        for broken in (content[:-20], b"plain text\n" * 9):
            open(parquet, "wb").write(broken)
            with pytest.raises(UserError, match=r"a\.parquet: cannot read: damaged Parquet file"):
                Layout().survey([parquet])


@pytest.mark.parametrize(("name", "package", "extra"), [
    ("a.parquet", "pyarrow", "parquet"), ("a.txt.zst", "zstandard", "zstd")])
def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, name, package, extra):
    (tmp_path / name).write_bytes(b"x")
    for module in (package, "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{name}: reading it needs the package {package}") as caught:
        Layout().survey([str(tmp_path / name)])
    assert caught.value.hint == f"pip install 'lmcli[{extra}]'" and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["gone.parquet", "gone.txt.zst", "gone.gz"])
def test_a_missing_file_is_said(tmp_path, name):
    with pytest.raises(UserError, match="cannot read: No such file"):
        Layout().survey([str(tmp_path / name)])


def test_a_directory_brings_packed_files_along(tmp_path, parquet):
    (tmp_path / "b.txt.zst").write_bytes(zst(b"text\n"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text\n"))
    (tmp_path / "d.bin").write_bytes(b"\0\1")
    assert expand([str(tmp_path)]) == ([parquet, str(tmp_path / "b.txt.zst"), str(tmp_path / "c.txt.gz")], 1)
