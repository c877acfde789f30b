"""Training as it is shown: plain lines in a pipe, nothing with --quiet, screens that fit."""

import io
import math
import os
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmcli import display
from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.runs import closing_report
from lmcli.runs.model_card import CommandExample
from lmcli.terminal import progress
from lmcli.terminal.live_region import LiveRegion, give_back, terminal_modes
from lmcli.terminal.training_screen import final_lines, flow, live_lines, report_lines, shorten
from lmcli.terminal.training_state import Evaluated, Report, SampleText, TrainingState, clock
from lmcli.training.example_objectives import ExampleData
from lmcli.training.objectives import OBJECTIVES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drawn_screen import Screen, printable

STEP = SimpleNamespace(
    step=1234,
    share=0.25,
    epoch=1.5,
    loss=2.0,
    learning_rate=3e-3,
    tokens_per_second=45678.0,
    elapsed=25.0,
    remaining=75,
)
FIGURES = SimpleNamespace(
    headline=lambda: "1.5000 bits/byte · perplexity 20.00",
    metrics=lambda: {"val_bits_per_byte": 1.5, "val_loss": 3.0},
)
VALIDATION = SimpleNamespace(step=1234, figures=FIGURES, best=True)
EVIL = "\x1b[2J\x9b31m\u202e[red]\x07:smile:\r\x0b\x7f"
SAMPLES = (
    EVIL,
    "the the of and",
    "却说那僧人" * 30,
    "First Citizen:\nBefore we proceed any further,\n\nhear me speak. " * 2,
)


def phase(begun, seconds):
    """An evaluation as it is shown, with the seconds it is expected to take."""
    return progress.Shown(progress.Stage("evaluating", begun=begun, seconds=seconds), 0.0, None)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (5.4, "0:05"), (65, "1:05"), (59.6, "1:00"), (7384, "2:03:04"), (None, "–")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def new_view(quiet=False, bytes_per_token=4.0, target="token"):
    """A view of a run with this target."""
    view = display.TrainingView(quiet)
    view.begin(
        SimpleNamespace(
            folder="runs/a",
            objective=SimpleNamespace(target=target, selection=lambda train: "lowest loss"),
            record=SimpleNamespace(
                recipe=SimpleNamespace(train=None),
                device_config=SimpleNamespace(device=None),
                data=SimpleNamespace(bytes_per_token=bytes_per_token),
            ),
            trainer=SimpleNamespace(train_step=SimpleNamespace(compiled=False)),
        )
    )
    return view


def test_a_pipe_gets_plain_lines_at_intervals(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with new_view() as view:
        for i in range(301):
            now[0] = i / 10
            view.show("step", STEP)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # 30 s
    # 2 nats a token of 4 bytes: 2 / ln 2 / 4 = 0.721 bits a byte
    assert lines[0] == (
        "step 1,234 · 25% · epoch 1.50 · loss 2.000 nats/token = 0.721 bits/byte · 45,678 tokens/s "
        "· 1:15 left"
    )


def test_a_loss_of_other_targets_has_no_bits_per_byte(capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0)
    with new_view(bytes_per_token=0.0, target="masked token") as view:
        view.step(STEP)
        view.validation(VALIDATION)
    assert "loss 2.000 nats/masked token · 45,678 tokens/s" in capsys.readouterr().err
    assert view.state.evaluations[-1].value == 3.0  # on the axis of the training loss


def test_evaluations_and_samples_are_lines_in_a_pipe(capsys):
    with new_view() as view:
        view.validation(VALIDATION)
        view.sample(SampleText(7, "却说\n  one\ttwo [bold]"))
        view.sample(SampleText(9, "of the finished model", finished=True))
    assert capsys.readouterr() == (
        "",
        "validation 1.5000 bits/byte · perplexity 20.00 (step 1,234, best)\n"
        "sample     却说 one two [bold]\n",
    )
    assert view.state.evaluations[-1].value == 1.5


def test_quiet_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0)
    with new_view(quiet=True) as view:
        view.step(STEP)
        view.due(SimpleNamespace(what="evaluation", step=3, seconds=1.0))
        view.validation(VALIDATION)
        view.sample(SampleText(7, "text"))
        view.note(SimpleNamespace(step=3, text="a note"))
    assert capsys.readouterr() == ("", "")


def test_the_loss_is_a_moving_average():
    with new_view(quiet=True) as view:
        for loss in (4.0, 2.0):
            view.step(SimpleNamespace(**{**vars(STEP), "loss": loss}))
    assert view.state.loss == pytest.approx(0.95 * 4 + 0.05 * 2)


def state_after(steps: int, total: int = 400, nats_per_unit: float = math.log(2) * 2.5):
    """A run of `total` steps after some of them; its validation is best after step 300."""
    state = TrainingState(
        name="runs/shake",
        unit="bits/byte" if nats_per_unit != 1 else "nats/text",
        nats_per_unit=nats_per_unit,
        memory=lambda: 1_234_000_000,
    )
    for i in range(1, steps + 1):
        loss = nats_per_unit * (2.2 + 5 * math.exp(-i / 30) + 0.1 * math.sin(i * i))
        state.add_step(i, loss, 3848.0, i / total, i / 200, 0.0052, i / 8, (total - i) / 8, 0.0)
        if i % 50 == 0:
            value = 2.3 + 5 * math.exp(-i / 30) + (0.2 if i > 300 else 0)
            headline = f"{value:.4f} {state.unit} · perplexity 39.27"
            state.evaluations.append(Evaluated(i, value, headline, i <= 300))
            state.samples.append(SampleText(i, SAMPLES[(i // 50 - 1) % 4]))
    return state


SIZES = [(60, 24), (80, 24), (120, 40), (80, 12), (60, 7), (40, 5), (20, 3), (80, 1)]


@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 49, 170, 400])
def test_every_screen_fits_and_shows_no_control_character(columns, rows, steps):
    for nats in (1.0, 1.7):
        state = state_after(steps, nats_per_unit=nats)
        state.phase = phase(0.0, 3.0) if steps % 2 else None
        lines = live_lines(state, columns, rows, 2.0)
        assert len(lines) <= rows and all(line.cell_len <= columns for line in lines)
        lines += final_lines(state, columns)
        assert all(line.cell_len <= columns for line in lines)
        assert printable([line.plain for line in lines])


@pytest.mark.parametrize("columns, rows", SIZES[:3])
def test_the_screen_in_the_middle_shows_everything(columns, rows):
    state = state_after(170)
    state.phase = phase(0.0, 3.0)
    lines = [line.plain for line in live_lines(state, columns - 1, rows - 1, 2.0)]
    text = "\n".join(lines)
    for figure in (
        "42%",
        "0:27 left",
        "evaluating 0:02",
        "step 170",
        "epoch 0.85",
        "3,848 tokens/s ███",
        "rate 0.0052",
        "1.2 GB",
        "bits/byte",
        "2.3337 bits/byte · perplexity 39.27",
        "step 150, best",
        "◆",
        " 50  ␛[2J",
        "100  the the of and",
        "150  却说那僧人",
    ):
        assert figure in text, figure
    # the newest sample is whole
    assert (
        "".join(line.strip().removeprefix("150") for line in lines[-9:]).count("却说那僧人") >= 28
    )
    braille = [c for line in lines for c in line if "\u2801" <= c <= "\u28ff"]
    assert len(braille) > columns // 2


def test_the_sample_of_a_language_with_spaces_is_cut_between_words():
    text = "First Citizen: Before we proceed any further, hear me speak."
    for columns in range(12, 70):
        shown = shorten(text, columns)
        words = shown.removesuffix(" …").split()
        assert len(shown) <= columns and words == text.split()[: len(words)]


def test_figures_flow_without_being_cut():
    from rich.text import Text

    items = ["step 1,234", "epoch 1.50", "45,678 tokens/s", "rate 0.003"]
    for columns in range(15, 60):
        lines = [line.plain for line in flow(map(Text, items), columns)]
        assert " · ".join(lines) == " · ".join(items)
        assert all(len(line) <= columns for line in lines)


def test_the_estimate_falls_with_the_clock_and_waits_for_work_that_takes_longer():
    state = state_after(200)  # 25 s are left
    assert [state.seconds_left(now) for now in (0.0, 1.0, 99.0)] == [25.0, 24.0, 0.0]
    state.phase = phase(2.0, 5.0)
    assert [state.seconds_left(now) for now in (2.0, 4.0, 7.0, 20.0)] == [23.0, 21.0, 18.0, 18.0]


class FakeTerminal(io.StringIO):
    """A terminal of 60 × 12 in a string; pyte draws what was written."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


def drawn(stream, columns=80, rows=24) -> Screen:
    screen = Screen(columns, rows)
    screen.feed(stream.getvalue().encode())
    return screen


def test_a_region_is_drawn_in_place_and_messages_stand_above_it():
    from rich.text import Text

    stream, height = FakeTerminal(), [3]
    region = LiveRegion(stream, lambda columns, rows: [Text(f"row {i}") for i in range(height[0])])
    before = sys.stderr
    with region:
        for height[0] in (3, 5, 2, 4):
            region.refresh()
        print("a message", file=sys.stderr)
        print("another ", file=sys.stderr, end="")
        print("one", file=sys.stderr)
        region.refresh()
        assert drawn(stream).lines == ["a message", "another one", *(f"row {i}" for i in range(4))]
        region.close([Text("the end")])
    assert sys.stderr is before
    assert drawn(stream).lines == ["a message", "another one", "the end"]


def test_a_region_higher_than_the_terminal_is_cut():
    from rich.text import Text

    stream = FakeTerminal()
    region = LiveRegion(stream, lambda columns, rows: [Text(f"row {i}") for i in range(99)])
    region.refresh()
    region.refresh()
    assert drawn(stream).lines == [f"row {i}" for i in range(23)]


def test_lines_that_a_narrower_window_has_wrapped_are_all_drawn_over(monkeypatch):
    from rich.text import Text

    stream, size = FakeTerminal(), [(41, 24)]
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size(size[0]))
    stream.fileno = lambda: 1
    region = LiveRegion(stream, lambda columns, rows: [Text("x" * min(30, columns))] * 3)
    region.refresh()
    size[0] = (21, 24)
    stream.truncate(0)
    region.refresh()
    assert "\x1b[5A" in stream.getvalue()  # three lines of 30 take six rows of 21


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_evaluation_that_is_no_number_is_left_out_of_the_curve(value):
    state = TrainingState()
    for step in range(1, 40):
        state.add_step(step, 5 - 0.1 * step, 100.0, 0.1, 0.1, 1e-3, step, 9.0, float(step))
    state.evaluations.append(Evaluated(50, value, "nan bits/byte", True))
    for columns in (3, 12, 40, 80):
        lines = [*live_lines(state, columns, 24, 60.0), *final_lines(state, columns)]
        assert any("step 39" in line.plain or columns < 12 for line in lines)


def test_a_screen_is_drawn_of_a_copy_that_the_run_does_not_change():
    state = TrainingState()
    state.add_step(1, 5.0, 100.0, 0.1, 0.1, 1e-3, 1.0, 9.0, 1.0)
    copy = state.copy()
    state.add_step(2, 4.0, 100.0, 0.2, 0.1, 1e-3, 2.0, 8.0, 2.0)
    state.evaluations.append(Evaluated(2, 4.0, "4.0", True))
    assert (copy.step, len(copy.losses.points), copy.evaluations) == (1, 1, [])


def test_the_terminal_gets_cursor_and_echo_back_after_ctrl_c_amid_the_end():
    stream = io.StringIO()
    stderr = sys.stderr
    region = LiveRegion(stream, lambda columns, rows: [])
    region.__enter__()
    region._rendered = lambda lines: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        region.close()
    assert sys.stderr is stderr
    assert stream.getvalue().endswith("\x1b[?25h")


def test_a_finished_run_is_reported_though_its_data_has_gone(monkeypatch):
    def gone(run):
        raise UserError("cannot read: No such file or directory", "notes.txt")

    monkeypatch.setattr(closing_report, "_comparison", gone)
    result = {"best_step": 5, "steps": 9, "tokens": 99, "epochs": 1.0, "seconds": 3.0}
    example = CommandExample("runs/x", data=os.path.abspath("notes.csv"))
    record = SimpleNamespace(
        result=result,
        headline="1.5 bits/byte",
        example=lambda _: example,
        recipe=SimpleNamespace(train=TrainConfig(metric="accuracy")),
    )
    run = SimpleNamespace(record=record, objective=OBJECTIVES["classification"], folder="runs/x")
    report = closing_report.report(run)
    assert (report.comparison, report.figures[0]) == (None, "1.5 bits/byte")
    assert report.commands == [
        "echo 'Once upon a time' | lm classify -m runs/x",
        "lm train --resume runs/x --time 10m",
    ]
    chat = SimpleNamespace(
        **{**vars(record), "example": lambda _: replace(example, converses=True)}
    )
    for objective, command in (
        ("completion", "lm generate -m runs/x"),
        ("span", "lm classify -m runs/x notes.csv"),
    ):
        run = SimpleNamespace(record=chat, objective=OBJECTIVES[objective], folder="runs/x")
        assert closing_report.report(run).commands[0] == command
    assert report.figures[1] == "best at step 5 of 9 (highest accuracy)"


def test_work_in_other_rooms_is_named_on_the_live_screen(monkeypatch):
    """As when kernels are compiled, once: the stage that is at work, and its share."""
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    with display.TrainingView(quiet=False) as view:
        progress.now("building the model")
        with progress.stage("compiling kernels, once"):
            assert view._lines(79, 23)[0].plain[2:] == "compiling kernels, once  0:00"
        with progress.stage("reading", 400, "bytes") as stage:
            stage.advance(100)
            assert "reading  ━━━━━───────────────  25 %" in view._lines(79, 23)[0].plain
        assert view._lines(79, 23)[0].plain[2:] == "building the model  0:00"
        view.step(STEP)
        assert "building" not in "".join(line.plain for line in view._lines(79, 23))
        view.due(SimpleNamespace(what="evaluation", step=3, seconds=1.0))
        assert "evaluating 0:00" in "".join(line.plain for line in view._lines(79, 23))
    assert not progress.is_watched()


def test_a_classifier_is_compared_with_always_the_most_frequent_label():
    validation = SimpleNamespace(labels=np.array([1, 0, 1, 1]))
    data = SimpleNamespace(validation=validation, multi_label=False, labels=("bad", "good"))
    data.most_frequent = ExampleData.most_frequent.fget(data)
    assert data.most_frequent == ("good", 0.75)
    data.bytes_per_token, result = 0.0, {"val_accuracy": 0.875, "val_loss": 9.0}
    run = SimpleNamespace(record=SimpleNamespace(result=result, data=data))
    comparison = closing_report._comparison(run)
    lines = [line.plain for line in report_lines(Report("a", ["b"], comparison, []), 80)]
    assert lines[3].split()[1:5] == ["this", "model", "0.875", "━" * 57]
    assert lines[4].split()[1:4] == ["one", "label", "0.750"]
    assert "One label: always 'good', the most frequent one." in lines[6]
    data.multi_label = True  # then texts have any number of labels
    assert ExampleData.most_frequent.fget(data) is None


class TestGivingTheTerminalBack:
    PROGRAM = """
import sys, time
from rich.text import Text
from lmcli.terminal.live_region import LiveRegion
with LiveRegion(sys.stderr, lambda columns, rows: [Text("row one"), Text("row two")]):
    time.sleep(60)
"""

    @pytest.fixture
    def region(self):
        """(process that draws two lines on a pseudo-terminal, its ends, its settings before)."""
        master, slave = os.openpty()
        with open(slave, "w", closefd=False) as stream:
            modes = terminal_modes(stream)
        process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], stderr=slave, preexec_fn=os.setpgrp
        )
        yield process, master, slave, modes
        process.kill()
        process.wait()
        os.close(master), os.close(slave)

    def drawn(self, master, screen, is_there):
        """Draws on the screen what comes until that is there."""
        end = time.monotonic() + 30
        while not is_there() and time.monotonic() < end:
            if select.select([master], [], [], 0.05)[0]:
                screen.feed(os.read(master, 1 << 16))
        assert is_there(), screen.text

    def test_after_ctrl_z_cursor_and_echo_are_there_until_it_goes_on(self, region):
        process, master, *_ = region
        screen = Screen(60, 12)

        def echoes():
            return bool(termios.tcgetattr(master)[3] & termios.ECHO)

        self.drawn(master, screen, lambda: "row two" in screen.text)
        assert screen.pyte.cursor.hidden and not echoes()
        for count in (2, 3):  # twice
            process.send_signal(signal.SIGTSTP)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            self.drawn(master, screen, lambda: not screen.pyte.cursor.hidden)
            assert echoes() and screen.pyte.cursor.x == 0
            process.send_signal(signal.SIGCONT)
            self.drawn(master, screen, lambda count=count: screen.text.count("row two") == count)
            assert screen.pyte.cursor.hidden and not echoes()
        assert screen.lines == ["row one", "row two"] * 3

    def test_a_killed_process_leaves_what_another_one_gives_back(self, region):
        process, master, slave, modes = region
        screen = Screen(60, 12)
        self.drawn(master, screen, lambda: "row two" in screen.text)
        process.kill()
        process.wait()
        assert screen.pyte.cursor.hidden and not termios.tcgetattr(master)[3] & termios.ECHO
        with open(slave, "w", closefd=False) as stream:
            give_back(stream, modes)
        self.drawn(master, screen, lambda: not screen.pyte.cursor.hidden)
        assert termios.tcgetattr(master)[3] & termios.ECHO
        assert terminal_modes(io.StringIO()) is None

    def test_nothing_is_drawn_in_the_background(self, monkeypatch):
        from rich.text import Text

        stream = FakeTerminal()
        stream.fileno = lambda: 1
        region = LiveRegion(stream, lambda columns, rows: [Text("row")])
        monkeypatch.setattr("os.tcgetpgrp", lambda number: os.getpgrp() + 1)
        region.refresh()
        assert stream.getvalue() == ""
        monkeypatch.setattr("os.tcgetpgrp", lambda number: os.getpgrp())
        region.refresh()
        assert "row" in stream.getvalue()
