"""How far long work is: one line on a terminal, which leaves nothing behind."""

import fcntl
import gzip
import io
import os
import signal
import struct
import termios
from contextlib import nullcontext

import pytest
from drawn_screen import Screen, printable
from rich.cells import cell_len

from lmcli.terminal import progress
from lmcli.terminal.progress_line import ProgressLine, line_text, progress_line

STAGE = progress.Stage("runs/shakespeare 莎士比亚全集", "records", 4000, skipped=500)


@pytest.fixture(autouse=True)
def nobody_watches():
    yield
    progress.watch(None)


class TestText:
    def test_share_rate_and_time_left_are_those_of_new_work(self):
        # 500 records were there, 500 took 10 s: 3,000 more take 60 s
        text = line_text(progress.Shown(STAGE, 1000, 0.25), 10, 120)
        assert text.endswith("─  25 %  1,000 records  50.0/s  1:00 left")
        assert text.count("━") == 5 and text.count("─") == 15

    def test_it_fits_any_width_without_a_cut_number(self):
        shown = progress.Shown(STAGE, 1000, 0.25)
        texts = {columns: line_text(shown, 10, columns) for columns in range(4, 121)}
        assert all(cell_len(text) <= columns for columns, text in texts.items())
        whole = {part.strip() for part in line_text(shown, 10, 200).split("  ")}
        label = STAGE.label[:3]
        for text in texts.values():
            parts = {part.strip() for part in text.split("  ")} - {"", "…"}
            assert {part for part in parts if not part.startswith(label)} <= whole
        assert all("25 %" in text and "1:00 left" in text for c, text in texts.items() if c > 30)

    def test_without_a_known_share_it_shows_what_is_done_and_the_time(self):
        pipe = progress.Stage()
        assert line_text(progress.Shown(pipe, 1, None), 20, 79) == "1 record  0.05/s  0:20"
        loading = progress.Stage("loading \x1b[31mx")
        assert line_text(progress.Shown(loading, 0, None), 3, 79) == "loading ␛[31mx  0:03"
        measuring = progress.Stage("measuring base (4 of 4)")
        assert line_text(progress.Shown(measuring, 0, None), 3, 60) == (
            "measuring base (4 of 4)  0:03"
        )
        size = progress.Stage("", "bytes")
        assert "1.5 MB  750.0 kB/s" in line_text(progress.Shown(size, 1.5e6, None), 2, 79)


class Pane:
    """A pseudo-terminal with a ProgressLine that is drawn when the test says so."""

    def __init__(self, encoding="utf-8"):
        self.master, self.slave = os.openpty()
        self.resize(80)
        self.screen = Screen(80, 5)
        self.line = ProgressLine(self.slave, encoding)
        progress.watch(self.line)

    def resize(self, columns):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 5, columns, 0, 0))

    def write(self, text):
        with progress.TerminalFile(self.slave, "w", closefd=False) as file:
            file.write(text.encode())

    def drawn(self):
        """The lines after a drawing."""
        self.line._draw()
        return self.lines()

    def lines(self):
        os.set_blocking(self.master, False)
        with nullcontext() if self._readable() else io.BytesIO():
            while self._readable():
                self.screen.feed(os.read(self.master, 1 << 16))
        return self.screen.lines

    def _readable(self):
        import select

        return bool(select.select([self.master], [], [], 0)[0])


@pytest.fixture
def pane(monkeypatch):
    monkeypatch.setattr("lmcli.terminal.progress_line.SECONDS_BEFORE", 0.0)
    monkeypatch.setattr("lmcli.terminal.progress_line.SECONDS_AFTER_TEXT", 0.0)
    opened = []

    def make(*arguments):
        opened.append(Pane(*arguments))
        return opened[-1]

    yield make
    for each in opened:
        os.close(each.master), os.close(each.slave)


class TestDrawing:
    def test_text_replaces_the_line_and_it_comes_back_below(self, pane):
        pane = pane()
        with progress.stage("reading", 4) as stage:
            stage.advance(1)
            assert "25 %" in pane.drawn()[-1]
            pane.write("a row\n")
            assert pane.lines() == ["a row"]
            stage.advance(1)
            assert [line[:7] for line in pane.drawn()] == ["a row", "reading"]
            assert "50 %" in pane.drawn()[-1] and len(pane.drawn()) == 2
            pane.write("no end")  # of the line: nothing is drawn behind it
            assert pane.drawn() == ["a row", "no end"]
            pane.write(" yet\n")
            assert "50 %" in pane.drawn()[-1]
            pane.line.stop()
            assert pane.lines() == ["a row", "no end yet"] and printable(pane.lines())

    def test_a_stage_is_shown_after_a_second_only(self, pane, monkeypatch):
        monkeypatch.setattr("lmcli.terminal.progress_line.SECONDS_BEFORE", 1.0)
        pane = pane()
        with progress.stage("reading", 4) as stage:
            stage.advance(1)
            assert pane.drawn() == []
            stage.begun -= 1
            assert "reading" in pane.drawn()[-1]
        assert pane.drawn() == []  # the command itself has not begun

    def test_a_smaller_window_leaves_no_rest(self, pane):
        pane = pane()
        pane.write("above\n")
        with progress.stage("reading", 4) as stage:
            stage.advance(1)
            assert len(pane.drawn()[-1]) > 60
            pane.screen = Screen(40, 5)  # as a terminal that wraps what is there anew
            pane.screen.feed(f"above\r\n{pane.line._drawn}".encode())
            pane.resize(40)
            stage.advance(1)
            above, line = pane.drawn()
            assert above == "above" and "50 %" in line and len(line) < 40

    def test_a_terminal_without_utf_8_gets_ascii(self, pane):
        pane = pane("ascii")
        with progress.stage("reading", 4) as stage:
            stage.advance(1)
            assert "#####---------------  25 %" in pane.drawn()[-1]

    def test_nothing_is_shown_where_nobody_should_see_it(self, pane, monkeypatch):
        def watched(quiet=False, stream=None):
            monkeypatch.setattr("sys.stderr", stream)
            with progress_line(quiet):
                return progress.is_watched()

        slave = open(pane().slave, "w", closefd=False)
        progress.watch(None)
        monkeypatch.setenv("TERM", "xterm")
        assert watched(stream=slave)
        assert not watched(quiet=True, stream=slave)
        assert not watched(stream=io.StringIO())
        assert not watched()
        monkeypatch.setenv("TERM", "dumb")
        assert not watched(stream=slave)


class Recorder:
    """Keeps what is shown after each change."""

    def __init__(self):
        self.seen = []

    def told(self):
        self.seen.append(progress.shown())

    def hidden(self, text):
        return nullcontext()


@pytest.fixture
def recorded(inside):
    """recorded(*arguments): (stages that were shown, their shares and units) of an `lm`."""

    def call(*arguments, **options):
        recorder = Recorder()
        progress.watch(recorder)
        done = inside(*arguments, **options)
        progress.watch(None)
        assert done.returncode == 0, done.stderr
        return recorder.seen

    return call


class TestShares:
    @pytest.mark.parametrize(
        "command", [("score", "--threads", "1"), ("tokenize",), ("tokenize", "--count")]
    )
    def test_records_are_counted_and_shares_end_at_one(self, recorded, trained, story, command):
        seen = recorded(*command, "-m", trained[0], story, "-o", os.devnull)
        shares = [each.share for each in seen]
        assert shares == sorted(shares) and shares[-1] == 1
        assert seen[-1].done == len(story.read_bytes().splitlines())

    def test_a_compressed_file_has_a_share_and_a_pipe_has_none(self, recorded, trained, tmp_path):
        texts = b"".join(b"%d lines to be counted\n" % n for n in range(25_000))
        packed = tmp_path / "a.txt.gz"
        packed.write_bytes(gzip.compress(texts))
        shares = [each.share for each in recorded("tokenize", "-m", trained[0], packed)]
        assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1
        assert 0.1 < shares[0] < 0.9
        fifo = tmp_path / "pipe"
        os.mkfifo(fifo)
        if not os.fork():
            fifo.write_bytes(b"one\ntwo\n")
            os._exit(0)
        (shown,) = recorded("tokenize", "-m", trained[0], fifo)
        os.wait()
        assert shown.share is None and shown.done == 2

    def test_perplexity_counts_the_bytes_of_all_models(self, recorded, trained, story, tmp_path):
        text = tmp_path / "a.txt"
        text.write_bytes(story.read_bytes()[:20_000])
        (tmp_path / "twin").symlink_to(trained[0])
        models = ("-m", trained[0], "-m", tmp_path / "twin")
        seen = recorded("perplexity", *models, text, "--threads", "1")
        seen = [each for each in seen if each.stage.label == str(text)]
        shares = [each.share for each in seen]
        assert shares == sorted(shares) and len(shares) > 4 and shares[-1] == pytest.approx(1)
        assert seen[-1].done == pytest.approx(seen[-1].stage.total)
        assert 0.95 < seen[-1].done / (2 * text.stat().st_size) < 1  # without separators

    def test_evaluating_counts_records_and_texts_within_a_batch(self, recorded, marian, tmp_path):
        rows = tmp_path / "pairs.jsonl"
        rows.write_text('{"source": "a b", "target": "b"}\n' * 70)
        options = ("--resamples", "0", "--batch-tokens", "300", "--threads", "1")
        seen = recorded("evaluate", "-m", marian, rows, *options)
        seen = [each for each in seen if each.stage.label == str(marian)]
        assert [each.done for each in seen] == sorted(each.done for each in seen)
        assert len({each.done for each in seen}) > 2 and seen[-1].done == seen[-1].stage.total == 70

    @pytest.mark.parametrize("count", [1, 3])
    def test_generating_counts_prompts(self, recorded, trained, tmp_path, count):
        prompts = ("--num-samples", count, "-n", 3, "--threads", "1")
        seen = recorded("generate", "-m", trained[0], *prompts, stdin=b"Once\nThere\n" * 5)
        assert seen[-1].done == pytest.approx(10) and seen[-1].share == pytest.approx(1)


def test_a_pipe_that_waits_is_shown_and_ctrl_c_clears_it(terminal, trained, tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    running = terminal("tokenize", "-m", trained[0], fifo, piped=("stdout",))
    with fifo.open("wb", buffering=0) as writer:
        writer.write(b"one\ntwo\n")
        shown = running.read(until="2 records")
        assert printable(shown.lines) and len(shown.lines) == 1
        running.process.send_signal(signal.SIGINT)
        assert [line for line in running.read().lines if line] == ["lm: interrupted"]
