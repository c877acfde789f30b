"""Results of commands: complete or not there, resumable, escaped, and errors in writing."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.data import output_file
from lmcli.data.output_file import OutputFile, escaped
from lmcli.errors import ClosedPipe, UsageError, UserError


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@given(st.text(alphabet="\\\n\r\tnrt a", max_size=20))
def test_escaped_text_is_one_line_and_reversible(text):
    line = escaped(text)
    assert not set(line) & set("\n\r\t")
    assert line.encode().decode("unicode_escape") == text


def test_escaped_by_hand():
    assert escaped("a\\\n\r\té") == "a\\\\\\n\\r\\té"


class TestOutputFile:
    def test_a_file_appears_complete_at_the_end(self, tmp_path):
        file = written(tmp_path, "old")
        with OutputFile(str(file)) as out:
            out.write("one\n")
            out.flush()
            assert file.read_text() == "old" and (tmp_path / "a.txt.part").read_text() == "one\n"
        assert file.read_text() == "one\n" and os.listdir(tmp_path) == ["a.txt"]

    def test_failure_keeps_the_part_and_resume_its_whole_lines(self, tmp_path):
        file = tmp_path / "out"
        with pytest.raises(RuntimeError), OutputFile(str(file)) as out:
            out.write("one\ntwo\nthr")
            raise RuntimeError
        assert not file.exists() and (tmp_path / "out.part").read_text() == "one\ntwo\nthr"
        with OutputFile(str(file), resume=True) as out:
            assert out.resumed_lines == 2
            out.write("three\n")
        assert file.read_text() == "one\ntwo\nthree\n"

    @pytest.mark.parametrize("part, kept", [("", 0), ("half", 0), ("x\n" * 3, 3), ("x\n\nhalf", 2)])
    def test_only_whole_lines_are_kept(self, tmp_path, part, kept):
        file = written(tmp_path, part, "out.part")
        with file.open("r+b") as opened:
            assert output_file._cut_to_whole_lines(opened) == kept
        assert file.read_text() == part[: part.rfind("\n") + 1]

    def test_resume_without_a_part_starts_anew(self, tmp_path):
        with OutputFile(str(tmp_path / "out"), resume=True) as out:
            assert out.resumed_lines == 0

    def test_a_new_start_drops_an_old_part(self, tmp_path):
        written(tmp_path, "stale\n", "out.part")
        with OutputFile(str(tmp_path / "out")) as out:
            out.write("new\n")
        assert (tmp_path / "out").read_text() == "new\n"

    def test_resume_needs_a_file(self):
        with pytest.raises(UsageError, match="--continue needs -o FILE"):
            OutputFile(None, resume=True)

    def test_a_directory_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="is a directory"):
            OutputFile(str(tmp_path))

    def test_a_missing_folder_is_a_user_error(self, tmp_path):
        with pytest.raises(UserError, match="cannot write: No such file"):
            OutputFile(str(tmp_path / "no" / "out"))

    def test_links_are_replaced_not_written_through(self, tmp_path):
        real = written(tmp_path, "real", "real.txt")
        (tmp_path / "out").symlink_to(real)
        (tmp_path / "out.part").symlink_to(real)
        with OutputFile(str(tmp_path / "out")) as out:
            out.write("new\n")
        assert real.read_text() == "real"
        assert (tmp_path / "out").read_text() == "new\n" and not (tmp_path / "out").is_symlink()

    def test_another_file_under_a_second_name_is_not_extended(self, tmp_path):
        real = written(tmp_path, "real\n", "real.txt")
        os.link(real, tmp_path / "out.part")
        with pytest.raises(UserError, match=r"out\.part: has a second name"):
            OutputFile(str(tmp_path / "out"), resume=True)
        with OutputFile(str(tmp_path / "out")) as out:
            out.write("new\n")
        assert real.read_text() == "real\n" and (tmp_path / "out").read_text() == "new\n"

    def test_a_pipe_or_device_is_written_as_it_is(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with OutputFile(str(pipe)) as out:
            out.write("through\n")
        assert os.read(reader, 100) == b"through\n"
        os.close(reader)
        assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]

    def test_a_lone_surrogate_is_the_replacement_character(self, tmp_path):
        row = {"text": "a", "id": "\ud800"}
        with OutputFile(str(tmp_path / "out")) as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        assert json.loads((tmp_path / "out").read_bytes()) == {"text": "a", "id": "\ufffd"}

    def test_a_closed_reader_is_a_closed_pipe(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(ClosedPipe), OutputFile(str(pipe)) as out:
            os.close(reader)
            out.write("x" * 10)
            out.flush()

    def test_a_full_disk_is_a_user_error(self):
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full on this system")
        with (
            pytest.raises(UserError, match="cannot write: No space left"),
            OutputFile("/dev/full") as out,
        ):
            out.write("x")
            out.flush()

    def test_standard_input_and_output_are_the_file_descriptors(self):
        """Bytes are read and written by the real file descriptors, without newline translation."""
        program = (
            "from lmcli.data.output_file import OutputFile\n"
            "from lmcli.data.rows import RowReader\n"
            "with OutputFile() as out:\n"
            "    for batch in RowReader().batches(['-']):\n"
            "        for record in batch: out.write(record.text.upper() + '\\n' * record.newline)\n"
            "        out.flush()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input="é\na\rb\nlast".encode(),
            capture_output=True,
            timeout=30,
        )
        assert done.stdout.decode() == "É\nA\rB\nLAST" and done.stderr == b""
