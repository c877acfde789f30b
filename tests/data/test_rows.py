"""Records: where a line ends, which fields are the text, and what errors name."""

import gzip
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.data import rows
from lmcli.data.rows import RowReader
from lmcli.errors import UserError


def read(*files, **options):
    reader = RowReader(**options)
    return [
        record for batch in reader.batches([str(file) for file in files]) for record in batch
    ], reader


def texts(*files, **options):
    return [record.text for record in read(*files, **options)[0]]


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


def test_lines_end_at_newline_only(tmp_path):
    file = written(tmp_path, "a\rb\r\nc\x85d\u2028e\x0bf\x1cg\n\nh\n")
    assert texts(file) == ["a\rb", "c\x85d\u2028e\x0bf\x1cg", "", "h"]


@pytest.mark.parametrize(
    "data, expected",
    [
        ("", []),
        ("\n", [("", True)]),
        ("a", [("a", False)]),
        ("a\n", [("a", True)]),
        ("a\n\n", [("a", True), ("", True)]),
        ("\na", [("", True), ("a", False)]),
    ],
)
def test_a_last_line_without_newline_is_marked(tmp_path, data, expected):
    assert [
        (record.text, record.newline) for record in read(written(tmp_path, data))[0]
    ] == expected


@given(st.text(alphabet="ab\n\ré字🎉", max_size=60), st.integers(1, 9))
def test_chunk_borders_change_nothing(data, chunk):
    """Against str.split, with chunks small enough to cut lines and characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_BYTES", chunk)
        handle = io.BytesIO(data.encode())
        chunks = iter(lambda: handle.read(rows.CHUNK_BYTES), b"")
        lines = [line for lines in rows.split_lines(chunks) for line in lines]
    expected = data.split("\n")
    assert [line.text.decode() for line in lines] == (expected if expected[-1] else expected[:-1])
    assert [line.newline for line in lines if not line.newline] == (
        [] if not expected[-1] else [False]
    )


def test_lines_are_numbered_over_chunks_and_from_one_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 3)
    records = read(written(tmp_path, "one\ntwo\nthree"), written(tmp_path, "x\ny\n", "b.txt"))[0]
    assert [(os.path.basename(record.file), record.line) for record in records] == [
        ("a.txt", 1),
        ("a.txt", 2),
        ("a.txt", 3),
        ("b.txt", 1),
        ("b.txt", 2),
    ]


def test_a_pipe_is_read_line_by_line():
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as handle:
        chunks = rows.split_lines(iter(lambda: handle.read(rows.CHUNK_BYTES), b""))
        os.write(writing, b"first\nsec")
        assert [line.text for line in next(chunks)] == [b"first"]
        os.write(writing, b"ond\n")
        assert [line.text for line in next(chunks)] == [b"second"]
        os.close(writing)
        assert list(chunks) == []


class TestBadRecords:
    data = b"good\nb\xffd\nlast\n"

    def test_stop_names_file_and_line(self, tmp_path):
        file = written(tmp_path, self.data)
        with pytest.raises(
            UserError, match=r"a\.txt, line 2: invalid UTF-8 \(byte 2 of the line\)"
        ) as caught:
            read(file)
        assert "--on-error skip" in caught.value.hint and caught.value.exit_code == 1

    def test_stop_yields_the_records_of_earlier_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows, "CHUNK_BYTES", 6)
        batches = RowReader().batches([str(written(tmp_path, self.data))])
        assert [record.text for record in next(batches)] == ["good"]
        with pytest.raises(UserError, match="line 2"):
            next(batches)

    def test_blank_keeps_lines_aligned(self, tmp_path):
        assert texts(written(tmp_path, self.data), on_error="blank") == ["good", "", "last"]

    def test_skip_drops_and_counts_and_keeps_line_numbers(self, tmp_path):
        records, reader = read(written(tmp_path, self.data), on_error="skip")
        assert [(record.text, record.line) for record in records] == [("good", 1), ("last", 3)]
        assert reader.skipped == 1

    @pytest.mark.parametrize(
        "row, message",
        [
            ("{", "invalid JSON: .*column 2"),
            ("[1]", "is not a JSON object"),
            ('{"body": "x"}', "no text field among 'body'.*--field"),
            ("{}", "no text field among none"),
            ('{"text": 3}', "'text' is not a text; fields: 'text'"),
            ("[" * 100_000, "nested too deeply"),
            ('{"text": "a", "n": ' + "9" * 5000 + "}", "digits"),
        ],
    )
    def test_bad_rows(self, tmp_path, row, message):
        file = written(tmp_path, f'{{"text": "ok"}}\n{row}\n', "a.jsonl")
        with pytest.raises(UserError, match=message) as caught:
            read(file)
        assert caught.value.where.endswith("a.jsonl, line 2")
        assert texts(file, on_error="skip") == ["ok"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"text": "t", "label": 1, "prompt": "p"}, "t"),
        ({"prompt": "p", "completion": " c"}, "p c"),
        ({"completion": "c", "prompt": "p", "source": "s"}, "pc"),
        ({"source": "s", "target": "t"}, "s"),
        ({"prompt": "p", "id": 7}, "p"),
    ],
)
def test_the_first_known_fields_are_the_text(tmp_path, row, expected):
    (record,) = read(written(tmp_path, json.dumps(row) + "\n", "a.jsonl"))[0]
    assert record.text == expected and record.fields == row


def test_named_fields_are_concatenated_in_their_order(tmp_path):
    file = written(tmp_path, '{"text": "no", "a": "1", "b": "2"}\n', "a.jsonl")
    assert texts(file, fields=("b", "a")) == ["21"]
    with pytest.raises(UserError, match="field 'c' is missing; fields: 'text', 'a', 'b'"):
        read(file, fields=("a", "c"))


def test_json_text_may_contain_line_ends(tmp_path):
    file = written(tmp_path, '{"text": "a\\nb\u2028c\\u0000"}\n{"text": ""}', "a.ndjson")
    records = read(file)[0]
    assert [record.text for record in records] == ["a\nb\u2028c\0", ""]
    assert not records[1].newline


def test_tsv_columns_are_named_by_the_header(tmp_path):
    file = written(tmp_path, "id\ttext\r\n1\thello there\r\n2\t\n3\n", "a.tsv")
    records, reader = read(file, on_error="skip")
    assert [(record.text, record.line) for record in records] == [("hello there", 2), ("", 3)]
    assert records[0].fields == {"id": "1", "text": "hello there"} and reader.skipped == 1
    assert texts(file, fields=("id",)) == ["1", "2", "3"]


def test_the_format_follows_from_the_suffix_unless_given(tmp_path):
    file = written(tmp_path, '{"text": "a"}\n', "a.jsonl")
    assert texts(file) == ["a"] and texts(file, format="text") == ['{"text": "a"}']
    assert texts(written(tmp_path, '{"text": "a"}\n', "a.log"), format="jsonl") == ["a"]


def test_gz_is_read_as_its_content(tmp_path):
    assert texts(written(tmp_path, gzip.compress(b'{"text": "a"}\n'), "a.jsonl.gz")) == ["a"]


@pytest.mark.parametrize(
    "data", [b"no gzip at all", gzip.compress(b"hello\n" * 500)[:-20]], ids=["other", "cut"]
)
def test_a_damaged_gz_is_named(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.gz: cannot read"):
        read(written(tmp_path, data, "a.gz"))
