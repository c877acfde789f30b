"""Compressed files and Parquet as streams, damage, missing packages; expanding directories."""

import datetime
import gzip
import importlib
import io
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli.data import files
from lmcli.data.documents import DocumentFormat, first_rows, read_pieces, read_rows, survey
from lmcli.data.files import _ChunkStream, expand, open_bytes
from lmcli.data.rows import RowReader, file_format
from lmcli.data.splits import split
from lmcli.errors import UserError

ROWS = [
    {"id": i, "text": f"row {i} 字\nend", "day": datetime.date(2024, 1, 1 + i % 28)}
    for i in range(3000)
]


def zst(content: bytes) -> bytes:
    """Two frames."""
    zstandard = pytest.importorskip(
        "zstandard", reason="the package zstandard is not installed: the zst extra"
    )
    half = len(content) // 2
    return b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])
    )


@pytest.fixture
def parquet(tmp_path):
    """A file of 3,000 rows in groups of 500, with a column of bytes."""
    pyarrow = pytest.importorskip(
        "pyarrow", reason="the package pyarrow is not installed: the parquet extra"
    )
    table = pyarrow.Table.from_pylist([{**row, "picture": b"\xff\x00"} for row in ROWS])
    importlib.import_module("pyarrow.parquet").write_table(
        table, tmp_path / "a.parquet", row_group_size=500
    )
    return str(tmp_path / "a.parquet")


class TestStreams:
    @given(chunks=st.lists(st.binary(max_size=6), max_size=6), data=st.data())
    @settings(max_examples=80)
    def test_a_stream_reads_and_seeks_as_a_file_in_memory(self, chunks, data):
        plain, stream = io.BytesIO(b"".join(chunks)), _ChunkStream("a", iter(chunks))
        for _ in range(5):
            if data.draw(st.booleans()):
                records = stream.read(data.draw(st.integers(1, 5)))
                assert records == plain.read(len(records)) and (records or not plain.read(1))
            else:
                to = plain.tell() + data.draw(st.integers(0, 6))
                end = len(plain.getvalue())
                assert stream.seek(to) == min(to, end) and plain.seek(min(to, end)) is not None
        assert stream.read() == plain.read()

    def test_a_stream_does_not_seek_backward(self):
        stream = _ChunkStream("a", iter([b"abc"]))
        stream.read(2)
        with pytest.raises(io.UnsupportedOperation):
            stream.seek(1)


class TestZst:
    def test_documents_are_those_of_the_decompressed_file(self, tmp_path):
        text = "".join(f"line {i} of it\n" for i in range(40_000))
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt.zst").write_bytes(zst(text.encode()))
        doc_format = DocumentFormat()
        surveyed = survey([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.zst")], doc_format)
        plain, packed = surveyed.documents
        assert plain[1:] == packed[1:] and len(set(surveyed.hashes.values())) == 1
        training, held_out = split(survey([packed.file], doc_format), doc_format)
        pieces = read_pieces([training[0], held_out[0]], doc_format)
        assert "".join(piece.text for piece in pieces) == text

    def test_records_and_formats(self, tmp_path):
        (tmp_path / "a.jsonl.zst").write_bytes(zst(b'{"text": "one"}\n{"text": "two"}\n'))
        records = [
            record.text
            for batch in RowReader().batches([str(tmp_path / "a.jsonl.zst")])
            for record in batch
        ]
        assert records == ["one", "two"]
        assert [
            file_format(f"x{end}", "auto")
            for end in (".tsv.zst", ".csv.gz", ".txt.zst", ".zst", ".jsonl")
        ] == ["tsv", "csv", "text", "text", "jsonl"]

    @pytest.mark.parametrize("cut", [1, 5, 30])
    def test_a_truncated_file_is_damaged(self, tmp_path, cut):
        (tmp_path / "a.txt.zst").write_bytes(zst(b"some text of it\n" * 99)[:-cut])
        with pytest.raises(UserError, match=r"a\.txt\.zst: cannot read: damaged zstd data"):
            survey([str(tmp_path / "a.txt.zst")], DocumentFormat())

    def test_a_file_of_another_format_is_damaged(self, tmp_path):
        zst(b"")
        (tmp_path / "a.txt.zst").write_bytes(b"plain text\n" * 9)
        with pytest.raises(UserError, match="damaged zstd data"):
            survey([str(tmp_path / "a.txt.zst")], DocumentFormat())

    def test_what_a_few_bytes_become_is_read_in_portions(self, tmp_path):
        """3 kB that hold 100 MB: no chunk is larger than a block of the format, 128 kB."""
        zstandard = pytest.importorskip("zstandard")
        file = tmp_path / "a.txt.zst"
        file.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * 100_000_000))
        assert file.stat().st_size < 5000
        sizes = [len(chunk) for chunk in files._zst_content(str(file))]
        assert max(sizes) <= 1 << 17 and sum(sizes) == 100_000_000

    def test_frames_of_every_kind_against_the_library(self, tmp_path):
        """With and without checksum, size and dictionary id, skippable ones between them."""
        zstandard = pytest.importorskip("zstandard")
        content, data = bytes(range(256)) * 999 + b"a" * 300_000, b""
        skippable = b"\x5a\x2a\x4d\x18" + (70_000).to_bytes(4, "little") + b"x" * 70_000
        for options in (
            {"write_checksum": True},
            {"write_content_size": False},
            {"level": 19, "write_checksum": True},
        ):
            data += zstandard.ZstdCompressor(**options).compress(content) + skippable
        (tmp_path / "a.zst").write_bytes(data)
        assert open_bytes(str(tmp_path / "a.zst")).read() == content * 3
        for end in (b"PK", b"some text after the end"):
            (tmp_path / "a.zst").write_bytes(data + end)
            with pytest.raises(OSError, match=r"no frame begins at byte|ends too early"):
                open_bytes(str(tmp_path / "a.zst")).read()

    def test_a_window_that_needs_gigabytes_is_refused(self, tmp_path):
        """RFC 8878, 3.1.1.1.2: an exponent of 21 is a window of 2 GB."""
        file = tmp_path / "a.txt.zst"
        file.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\0\0")
        pytest.importorskip("zstandard")
        with pytest.raises(UserError, match=r"needs 2,147 MB of memory") as caught:
            survey([str(file)], DocumentFormat())
        assert "--long=27" in caught.value.hint


class TestGzip:
    @pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: d + b"text", lambda d: d[20:]])
    def test_damage_is_named(self, tmp_path, damage):
        (tmp_path / "a.gz").write_bytes(damage(gzip.compress(b"some text\n" * 9)))
        with pytest.raises(UserError, match=r"a\.gz: cannot read: damaged gzip data"):
            survey([str(tmp_path / "a.gz")], DocumentFormat())

    def test_members_follow_each_other(self, tmp_path):
        (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
        assert open_bytes(str(tmp_path / "a.gz")).read() == b"one\ntwo\n"


class TestParquet:
    def test_rows_are_documents(self, parquet):
        doc_format = DocumentFormat()
        surveyed = survey([parquet], doc_format)
        documents = surveyed.documents
        assert [piece.text for piece in read_pieces(documents, doc_format)] == [
            row["text"] for row in ROWS
        ]
        assert first_rows([parquet], doc_format)[0]["id"] == 0
        training, held_out = split(surveyed, doc_format)
        ids = [row["id"] for part in (training, held_out) for _, row in read_rows(part, doc_format)]
        assert sorted(ids) == list(range(3000)) and len(training) == 2700

    def test_records_have_all_fields_but_bytes(self, parquet):
        records = [
            record for batch in RowReader(fields=("text",)).batches([parquet]) for record in batch
        ]
        assert [record.text for record in records] == [row["text"] for row in ROWS]
        assert (
            records[1].fields == {"id": 1, "text": ROWS[1]["text"], "day": "2024-01-02"}
            and records[1].line == 2
        )

    def test_a_row_group_is_read_when_it_is_needed(self, parquet, monkeypatch):
        """Not the whole file at once: the first read converts one batch to JSON."""
        written = []
        monkeypatch.setattr(
            files.json, "dumps", lambda row, **_: written.append(row) or str(row["id"])
        )
        with open_bytes(parquet) as stream:
            stream.read(1)
            assert 500 <= len(written) <= files.PARQUET_ROWS

    def test_a_damaged_file_is_a_user_error(self, parquet):
        content = open(parquet, "rb").read()
        for broken in (content[:-20], b"plain text\n" * 9):
            open(parquet, "wb").write(broken)
            with pytest.raises(UserError, match=r"a\.parquet: cannot read: damaged Parquet file"):
                survey([parquet], DocumentFormat())


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("a.parquet", "pyarrow", "parquet"), ("a.txt.zst", "zstandard", "zstd")],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package, extra):
    (tmp_path / name).write_bytes(b"x")
    for module in (package, "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=f"{name}: reading it needs the package {package}"
    ) as caught:
        survey([str(tmp_path / name)], DocumentFormat())
    assert (
        caught.value.hint == f"pip install 'lmcli[{extra}]'"
        and len(str(caught.value).splitlines()) <= 2
    )


@pytest.mark.parametrize("name", ["gone.parquet", "gone.txt.zst", "gone.gz"])
def test_a_missing_file_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="cannot read: No such file"):
        survey([str(tmp_path / name)], DocumentFormat())


def test_a_directory_includes_compressed_files(tmp_path, parquet):
    (tmp_path / "b.txt.zst").write_bytes(zst(b"text\n"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text\n"))
    (tmp_path / "d.bin").write_bytes(b"\0\1")
    assert expand([str(tmp_path)]) == (
        [parquet, str(tmp_path / "b.txt.zst"), str(tmp_path / "c.txt.gz")],
        1,
    )


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


class TestExpand:
    def test_without_arguments_standard_input_is_read(self):
        assert expand(()) == (["-"], 0) and expand(["-"]) == (["-"], 0)

    def test_a_directory_gives_its_text_files_sorted(self, tmp_path):
        for name in (
            "z.txt",
            "b.txt",
            "a.txt",
            "sub/c.md",
            ".hidden",
            ".git/config",
            "sub/.x/y.txt",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            written(tmp_path, "text\n", name)
        written(tmp_path, b"\x89PNG\0\0", "z.png")
        written(tmp_path, b"caf\xe9\n", "latin.txt")
        written(tmp_path, b"", "empty.txt")
        files, skipped = expand([str(tmp_path)])
        assert files == [str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.md", "z.txt")]
        assert skipped == 3
        assert expand([str(tmp_path)], "*.md") == ([str(tmp_path / "sub" / "c.md")], 0)

    def test_a_file_named_itself_is_always_taken(self, tmp_path):
        file = written(tmp_path, b"\xff\0", ".hidden")
        assert expand([str(file), "-"]) == ([str(file), "-"], 0)

    def test_a_text_whose_head_ends_inside_a_character_is_text(self, tmp_path):
        written(tmp_path, "字" * 30_000)
        assert len(expand([str(tmp_path)])[0]) == 1

    def test_links_to_files_are_followed(self, tmp_path):
        written(tmp_path, "text", "real.txt")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "link.txt").symlink_to(tmp_path / "real.txt")
        (tmp_path / "d" / "dangling.txt").symlink_to(tmp_path / "nowhere")
        assert expand([str(tmp_path / "d")]) == ([str(tmp_path / "d" / "link.txt")], 0)

    def test_a_link_to_a_parent_folder_is_not_followed(self, tmp_path):
        written(tmp_path, "text")
        (tmp_path / "again").symlink_to(tmp_path)
        assert expand([str(tmp_path)]) == ([str(tmp_path / "a.txt")], 0)

    @pytest.mark.parametrize(
        "name, message",
        [("missing.txt", "missing.txt: no such file or directory"), ("n" * 300, "name too long")],
    )
    def test_a_missing_path_is_a_user_error(self, tmp_path, name, message):
        with pytest.raises(UserError, match=message):
            expand([str(tmp_path / name)])

    def test_a_directory_without_text_is_a_user_error(self, tmp_path):
        written(tmp_path, b"\0", "a.bin")
        with pytest.raises(UserError, match="holds no text files") as caught:
            expand([str(tmp_path)], "*.bin")
        assert caught.value.hint == "none of its 1 files with --include *.bin is UTF-8 text"


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_a_device_that_never_ends_is_refused(name):
    with pytest.raises(UserError, match="never ends"):
        files.pin(name)


def test_a_pipe_leaves_space_on_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 29)
    endless = SimpleNamespace(read=lambda size: b"y")
    read = 0
    with pytest.raises(UserError, match="little of the disk is free"):
        for chunk in files._chunks_of(endless, "standard input"):
            read += len(chunk)
    assert read < files.CHUNKS_BETWEEN


def test_a_file_in_shared_memory_is_read_where_it_is():
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("needs /dev/shm")
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        assert files.pin(file.name) == file.name
