"""Records: where a line ends, which rows count, what an error names, and results that are whole or say they are not."""

import gzip
import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.errors import ClosedPipe, UsageError, UserError
from lmcli.text import records
from lmcli.text.records import Output, Reader, escaped, expand


def read(*files, **options):
    reader = Reader(**options)
    return [record for batch in reader.batches([str(file) for file in files]) for record in batch], reader


def texts(*files, **options):
    return [record.text for record in read(*files, **options)[0]]


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


def test_lines_end_at_newline_only(tmp_path):
    file = written(tmp_path, "a\rb\r\nc\x85d\u2028e\x0bf\x1cg\n\nh\n")
    assert texts(file) == ["a\rb\r", "c\x85d\u2028e\x0bf\x1cg", "", "h"]


@pytest.mark.parametrize("data, expected", [
    ("", []), ("\n", [("", True)]), ("a", [("a", False)]), ("a\n", [("a", True)]), ("a\n\n", [("a", True), ("", True)]),
    ("\na", [("", True), ("a", False)])])
def test_a_last_line_without_newline_is_marked(tmp_path, data, expected):
    assert [(record.text, record.newline) for record in read(written(tmp_path, data))[0]] == expected


@given(st.text(alphabet="ab\n\ré字🎉", max_size=60), st.integers(1, 9))
def test_chunk_borders_change_nothing(data, chunk):
    """Against str.split, with chunks small enough to cut lines and characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", chunk)
        lines = [line for lines in records._line_chunks(io.BytesIO(data.encode())) for line in lines]
    expected = data.split("\n")
    assert [line.text.decode() for line in lines] == (expected if expected[-1] else expected[:-1])
    assert [line.newline for line in lines if not line.newline] == ([] if not expected[-1] else [False])


def test_lines_are_numbered_over_chunks_and_from_one_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", 3)
    found = read(written(tmp_path, "one\ntwo\nthree"), written(tmp_path, "x\ny\n", "b.txt"))[0]
    assert [(os.path.basename(record.file), record.line) for record in found] == [
        ("a.txt", 1), ("a.txt", 2), ("a.txt", 3), ("b.txt", 1), ("b.txt", 2)]


def test_a_pipe_is_answered_line_by_line():
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as handle:
        chunks = records._line_chunks(handle)
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
        with pytest.raises(UserError, match=r"a\.txt, line 2: invalid UTF-8 \(byte 2 of the line\)") as caught:
            read(file)
        assert "--on-error skip" in caught.value.hint and caught.value.exit_code == 1

    def test_stop_hands_over_what_came_in_earlier_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "CHUNK_BYTES", 6)
        batches = Reader().batches([str(written(tmp_path, self.data))])
        assert [record.text for record in next(batches)] == ["good"]
        with pytest.raises(UserError, match="line 2"):
            next(batches)

    def test_blank_keeps_lines_aligned(self, tmp_path):
        assert texts(written(tmp_path, self.data), on_error="blank") == ["good", "", "last"]

    def test_skip_drops_and_counts_and_keeps_line_numbers(self, tmp_path):
        found, reader = read(written(tmp_path, self.data), on_error="skip")
        assert [(record.text, record.line) for record in found] == [("good", 1), ("last", 3)]
        assert reader.skipped == 1

    @pytest.mark.parametrize("row, message", [
        ("{", "invalid JSON: .*column 2"),
        ("", "invalid JSON"),
        ("[1]", "is not a JSON object"),
        ('{"body": "x"}', "no text field among 'body'.*--field"),
        ("{}", "no text field among none"),
        ('{"text": 3}', "'text' is missing or not a text"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "digits"),
    ])
    def test_rows_that_are_no_records(self, tmp_path, row, message):
        file = written(tmp_path, f'{{"text": "ok"}}\n{row}\n', "a.jsonl")
        with pytest.raises(UserError, match=message) as caught:
            read(file)
        assert caught.value.where.endswith("a.jsonl, line 2")
        assert texts(file, on_error="skip") == ["ok"]


@pytest.mark.parametrize("row, expected", [
    ({"text": "t", "label": 1, "prompt": "p"}, "t"),
    ({"prompt": "p", "completion": " c"}, "p c"),
    ({"completion": "c", "prompt": "p", "source": "s"}, "pc"),
    ({"source": "s", "target": "t"}, "s"),
    ({"prompt": "p", "id": 7}, "p")])
def test_the_first_known_fields_give_the_text(tmp_path, row, expected):
    (record,) = read(written(tmp_path, json.dumps(row) + "\n", "a.jsonl"))[0]
    assert record.text == expected and record.fields == row


def test_named_fields_are_joined_in_the_order_named(tmp_path):
    file = written(tmp_path, '{"text": "no", "a": "1", "b": "2"}\n', "a.jsonl")
    assert texts(file, fields=("b", "a")) == ["21"]
    with pytest.raises(UserError, match="field 'c' is missing or not a text; fields: 'text', 'a', 'b'"):
        read(file, fields=("a", "c"))


def test_json_keeps_what_a_line_may_hold(tmp_path):
    file = written(tmp_path, '{"text": "a\\nb\u2028c\\u0000"}\n{"text": ""}', "a.ndjson")
    found = read(file)[0]
    assert [record.text for record in found] == ["a\nb\u2028c\0", ""]
    assert not found[1].newline


def test_tsv_rows_are_named_by_the_header(tmp_path):
    file = written(tmp_path, "id\ttext\r\n1\thello there\r\n2\t\n3\n", "a.tsv")
    found, reader = read(file, on_error="skip")
    assert [(record.text, record.line) for record in found] == [("hello there", 2), ("", 3)]
    assert found[0].fields == {"id": "1", "text": "hello there"} and reader.skipped == 1
    assert texts(file, fields=("id",)) == ["1", "2", "3"]


def test_format_goes_by_suffix_unless_told(tmp_path):
    file = written(tmp_path, '{"text": "a"}\n', "a.jsonl")
    assert texts(file) == ["a"] and texts(file, format="text") == ['{"text": "a"}']
    assert texts(written(tmp_path, '{"text": "a"}\n', "a.log"), format="jsonl") == ["a"]


def test_gz_is_read_as_its_content(tmp_path):
    assert texts(written(tmp_path, gzip.compress(b'{"text": "a"}\n'), "a.jsonl.gz")) == ["a"]


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(b"hello\n" * 500)[:-20]], ids=["other", "cut"])
def test_a_damaged_gz_is_named(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.gz: cannot read"):
        read(written(tmp_path, data, "a.gz"))


class TestExpand:
    def test_nothing_means_standard_input(self):
        assert expand(()) == (["-"], 0) and expand(["-"]) == (["-"], 0)

    def test_a_directory_gives_its_text_files_sorted(self, tmp_path):
        for name in ("z.txt", "b.txt", "a.txt", "sub/c.md", ".hidden", ".git/config", "sub/.x/y.txt"):
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

    def test_a_text_whose_first_look_ends_inside_a_character_is_text(self, tmp_path):
        written(tmp_path, "字" * 30_000)
        assert len(expand([str(tmp_path)])[0]) == 1

    def test_links_to_files_are_followed(self, tmp_path):
        written(tmp_path, "text", "real.txt")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "link.txt").symlink_to(tmp_path / "real.txt")
        (tmp_path / "d" / "dangling.txt").symlink_to(tmp_path / "nowhere")
        assert expand([str(tmp_path / "d")]) == ([str(tmp_path / "d" / "link.txt")], 0)

    def test_a_link_to_a_folder_above_does_not_read_it_again(self, tmp_path):
        written(tmp_path, "text")
        (tmp_path / "again").symlink_to(tmp_path)
        assert expand([str(tmp_path)]) == ([str(tmp_path / "a.txt")], 0)

    @pytest.mark.parametrize("name, message", [
        ("missing.txt", "missing.txt: no such file or directory"), ("n" * 300, "name too long")])
    def test_what_does_not_exist_is_said(self, tmp_path, name, message):
        with pytest.raises(UserError, match=message):
            expand([str(tmp_path / name)])

    def test_a_directory_without_text_is_said(self, tmp_path):
        written(tmp_path, b"\0", "a.bin")
        with pytest.raises(UserError, match="holds no text files") as caught:
            expand([str(tmp_path)], "*.bin")
        assert "1 files looked at with --include *.bin" in caught.value.hint


@given(st.text(alphabet="\\\n\r\tnrt a", max_size=20))
def test_escaped_text_stays_on_one_line_and_can_be_undone(text):
    line = escaped(text)
    assert not set(line) & set("\n\r\t")
    assert line.encode().decode("unicode_escape") == text


def test_escaped_by_hand():
    assert escaped("a\\\n\r\té") == "a\\\\\\n\\r\\té"


class TestOutput:
    def test_a_file_appears_whole_at_the_end(self, tmp_path):
        file = written(tmp_path, "old")
        with Output(str(file)) as out:
            out.write("one\n")
            out.flush()
            assert file.read_text() == "old" and (tmp_path / "a.txt.part").read_text() == "one\n"
        assert file.read_text() == "one\n" and os.listdir(tmp_path) == ["a.txt"]

    def test_failure_keeps_the_part_and_resuming_its_whole_lines(self, tmp_path):
        file = tmp_path / "out"
        with pytest.raises(RuntimeError), Output(str(file)) as out:
            out.write("one\ntwo\nthr")
            raise RuntimeError
        assert not file.exists() and (tmp_path / "out.part").read_text() == "one\ntwo\nthr"
        with Output(str(file), resume=True) as out:
            assert out.lines_kept == 2
            out.write("three\n")
        assert file.read_text() == "one\ntwo\nthree\n"

    @pytest.mark.parametrize("part, kept", [("", 0), ("half", 0), ("x\n" * 3, 3), ("x\n\nhalf", 2)])
    def test_only_whole_lines_are_kept(self, tmp_path, part, kept):
        file = written(tmp_path, part, "out.part")
        assert records._cut_to_whole_lines(file) == kept
        assert file.read_text() == part[:part.rfind("\n") + 1]

    def test_resuming_without_a_part_begins(self, tmp_path):
        with Output(str(tmp_path / "out"), resume=True) as out:
            assert out.lines_kept == 0

    def test_a_new_start_drops_an_old_part(self, tmp_path):
        written(tmp_path, "stale\n", "out.part")
        with Output(str(tmp_path / "out")) as out:
            out.write("new\n")
        assert (tmp_path / "out").read_text() == "new\n"

    def test_resuming_needs_a_file(self):
        with pytest.raises(UsageError, match="--continue needs -o FILE"):
            Output(None, resume=True)

    def test_a_directory_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="is a directory"):
            Output(str(tmp_path))

    def test_a_missing_folder_is_said(self, tmp_path):
        with pytest.raises(UserError, match="cannot write: No such file"):
            Output(str(tmp_path / "no" / "out"))

    def test_links_are_replaced_not_written_through(self, tmp_path):
        real = written(tmp_path, "real", "real.txt")
        (tmp_path / "out").symlink_to(real)
        (tmp_path / "out.part").symlink_to(real)
        with Output(str(tmp_path / "out")) as out:
            out.write("new\n")
        assert real.read_text() == "real"
        assert (tmp_path / "out").read_text() == "new\n" and not (tmp_path / "out").is_symlink()

    def test_a_pipe_or_device_is_written_as_it_is(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with Output(str(pipe)) as out:
            out.write("through\n")
        assert os.read(reader, 100) == b"through\n"
        os.close(reader)
        assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]

    def test_a_lone_surrogate_in_json_comes_out_as_it_came(self, tmp_path):
        row = {"text": "a", "id": "\ud800"}
        with Output(str(tmp_path / "out")) as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        assert json.loads((tmp_path / "out").read_bytes()) == row

    def test_a_reader_that_has_gone_is_a_closed_pipe(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(ClosedPipe), Output(str(pipe)) as out:
            os.close(reader)
            out.write("x" * 10)
            out.flush()

    def test_a_full_disk_is_the_users_to_mend(self):
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full on this system")
        with pytest.raises(UserError, match="cannot write: No space left"), Output("/dev/full") as out:
            out.write("x")
            out.flush()

    def test_standard_output_and_input_are_the_process_own(self):
        """Bytes in, bytes out, through the real file descriptors; an unbuffered reader sees each flush."""
        program = ("from lmcli.text.records import *\n"
                   "with Output() as out:\n"
                   "    for batch in Reader().batches(['-']):\n"
                   "        for record in batch: out.write(record.text.upper() + '\\n' * record.newline)\n"
                   "        out.flush()\n")
        done = subprocess.run([sys.executable, "-c", program], input="é\na\rb\nlast".encode(), capture_output=True,
                              timeout=30)
        assert done.stdout.decode() == "É\nA\rB\nLAST" and done.stderr == b""
