"""Standard streams that are closed or full, ASCII locales, and what a terminal is sent."""

import os
import re
import subprocess
import sys

import pytest

from lmcli.config import TokenizerConfig
from lmcli.text.tokenizer import learn

CANNOT_WRITE = b"lm: error: standard output: cannot write: Bad file descriptor\n"
# what no terminal may get from a text: all of C0 but tab and line end, DEL, C1, and the rest
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
EVIL = "a\x1b]0;title\x07\x9b31m\u202ebidi\u2066\u061c\u2028\x7fz"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn(["one two three"] * 9, TokenizerConfig(vocab_size=270)).save(folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    return tmp_path / "a.txt"


@pytest.fixture
def closing(environment):
    """closing(streams, *arguments): `lm` with these streams (as ">&- 2>&-") closed by a shell."""

    def call(streams, *arguments, **options):
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        shell = ["bash", "-c", f'"$@" {streams}', "bash", *command]
        return subprocess.run(shell, capture_output=True, env=environment, timeout=60, **options)

    return call


class TestClosedStreams:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("--help",),
            ("--version",),
            ("help", "data"),
            ("tokenize", "-m", "TOKENIZER", "LINES"),
            ("info", "TOKENIZER"),
            ("info", "TOKENIZER", "--json"),
        ],
        ids=" ".join,
    )
    def test_output_that_cannot_be_written_is_an_error(self, closing, tokenizer, lines, arguments):
        """As coreutils do: `cat FILE >&-` says the same, with exit code 1."""
        places = {"TOKENIZER": tokenizer, "LINES": lines}
        done = closing(">&-", *(places.get(word, word) for word in arguments))
        assert (done.returncode, done.stderr, done.stdout) == (1, CANNOT_WRITE, b"")
        done = closing("<&- >&- 2>&-", *(places.get(word, word) for word in arguments))
        assert (done.returncode, done.stderr, done.stdout) == (1, b"", b"")

    def test_nothing_to_write_is_no_error(self, closing, tokenizer, lines, tmp_path):
        """The file is no standard output: it did not get the free number 1."""
        output = tmp_path / "out"
        done = closing("<&- >&- 2>&-", "tokenize", "-m", tokenizer, lines, "-o", output, "--count")
        assert done.returncode == 0 and len(output.read_text().split()) == 2

    @pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
    def test_messages_that_cannot_be_written_are_lost(self, closing, tokenizer, lines, streams):
        done = closing(streams, "tokenize", "-m", tokenizer, lines, "--count")
        assert done.returncode == 0 and len(done.stdout.split()) == 2
        done = closing(streams, "tokenize", "-m", "/nowhere", lines)
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")

    def test_a_closed_standard_input_cannot_be_read(self, closing, tokenizer):
        done = closing("<&-", "tokenize", "-m", tokenizer)
        assert (done.returncode, done.stderr) == (
            1,
            b"lm: error: standard input: cannot read: Bad file descriptor\n",
        )

    def test_a_full_disk_is_an_error(self, closing, tokenizer):
        done = closing(">/dev/full", "info", tokenizer)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert b"No space left on device" in done.stderr


class TestEncodings:
    def test_an_ascii_locale_changes_nothing(self, lm, environment, tokenizer, tmp_path):
        folder = tmp_path / "é字"
        folder.mkdir()
        (folder / "a.txt").write_text("字é\n", encoding="utf-8")
        ascii_only = {**environment, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
        for arguments in (
            ("tokenize", "-m", str(tokenizer), "--json", str(folder / "a.txt")),
            ("info", str(folder / "a.txt")),
        ):
            command = [sys.executable, "-m", "lmcli", *arguments]
            done = subprocess.run(command, capture_output=True, env=ascii_only, timeout=60)
            plain = lm(*arguments)
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout == plain.stdout and "字".encode() in done.stdout

    def test_arguments_that_are_not_utf_8(self, closing, tokenizer, tmp_path):
        """Text is refused, the name of a file may have any bytes."""
        name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
        with open(name, "wb") as file:
            file.write(b"one\n")
        done = closing("", "tokenize", "-m", tokenizer, "--count", os.fsdecode(name))
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.strip().isdigit()
        done = closing("", "info", os.fsdecode(name), "--json")
        assert done.returncode == 0 and "caf\ufffd.txt" in done.stdout.decode("utf-8")
        for option in ("--stop", "-m"):
            done = closing("", "generate", option, os.fsdecode(b"\xe9"), "a")
            message = f"{option}: invalid UTF-8 in an argument"
            assert done.returncode == 2 and message.encode() in done.stderr


@pytest.fixture
def on_a_terminal(environment):
    """on_a_terminal(*arguments): (exit code, all that a pseudo-terminal is sent)."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")

    def call(*arguments):
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        sent = b""
        try:
            while data := os.read(leader, 1 << 16):
                sent += data
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(leader)
        return process.wait(timeout=60), sent.decode().replace("\r\n", "\n")

    return call


class TestTerminal:
    def test_records_pieces_and_names_are_drawn(self, on_a_terminal, lm, tokenizer, tmp_path):
        file = tmp_path / "evil\x1b[2J\x9b[red]\u202e.txt"
        file.write_text(f"{EVIL}\n", encoding="utf-8")
        ids = lm("tokenize", "-m", tokenizer, file).stdout
        assert lm("tokenize", "-m", tokenizer, "--decode", stdin=ids).stdout.decode() == f"{EVIL}\n"
        (tmp_path / "ids").write_bytes(ids)
        for arguments, expected in (
            (("tokenize", "-m", tokenizer, "--decode", tmp_path / "ids"), "a␛]0;title␇<U+009B>31m"),
            (("tokenize", "-m", tokenizer, "--json", file), "<U+202E>bidi<U+2066><U+061C><U+2028>"),
            (("info", file), "evil␛[2J<U+009B>[red]<U+202E>.txt"),
        ):
            code, sent = on_a_terminal(*arguments)
            assert code == 0 and expected in re.sub(r"\s+", "", sent) and not RAW.search(sent)

    def test_prompts_are_dim_and_samples_parted(self, on_a_terminal, lm, trained, monkeypatch):
        options = ("generate", "-m", trained[0], "-n", 3, "--seed", 7, "--threads", 1)
        texts = lm(*options, "--num-samples", 2, "The\x1b[1m").stdout.decode().split("\n")
        code, sent = on_a_terminal(*options, "--num-samples", 2, "The\x1b[1m")
        expected = "".join(
            f"\x1b[2m── {number} of 2 ──\nThe␛[1m\x1b[0m{text}\n"
            for number, text in enumerate(texts[:2], 1)
        )
        assert code == 0 and sent == expected
        code, sent = on_a_terminal(*options, "--why", "The")
        start, _, lines = sent.partition("\n\n")
        assert code == 0 and "lm: bits of surprisal" in start and "\x1b[2mThe\x1b[0m" in start
        assert lines.count("\n") == 4 and "\x1b[48;5;" in sent
        assert max(len(re.sub("\x1b[^m]*m", "", line)) for line in lines.split("\n")) <= 80

    @pytest.mark.parametrize(
        "arguments",
        [
            ("tokenize", "-m", "x\x1b[31m\u202e", "a"),
            ("tokenize", "-m", "x\nlm: error: forged\x9b", "a"),
            ("tokenize", "--evil\x1b[31m\x9b", "a"),
            ("evil\x1b[31m\x9b",),
            ("help", "evil\x1b[31m\u202e"),
            ("tokenize", "--truncate", "\x1b[31m", "a"),
        ],
    )
    def test_errors_are_drawn(self, on_a_terminal, arguments):
        code, sent = on_a_terminal(*arguments)
        assert code in (1, 2) and not RAW.search(sent) and "Traceback" not in sent
        assert not any(line.startswith("lm: error: forged") for line in sent.splitlines())
