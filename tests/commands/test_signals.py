"""Signals that end a command: a closed terminal, a supervisor; nothing that was done is lost."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from lmcli.data.output_file import OutputFile
from lmcli.distributed import launcher, signals
from lmcli.errors import EXIT_INTERRUPTED, ProcessLost
from lmcli.training import loop, resume_state

SMALL = (
    *("--preset", "tiny", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1"),
    *("--set", "tokenizer.vocab_size=300", "--set", "train.context=32"),
    *("--set", "train.batch_tokens=128", "--set", "train.save_every=100"),
)


@pytest.fixture(autouse=True)
def handlers():
    """Restores the handlers of all stop signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signaled(inside, story, tmp_path, monkeypatch):
    """signaled(*numbers, steps=9): `lm train` in this process, which gets signals in step 5."""
    events = loop.Trainer.events

    def call(*numbers, steps=9):
        def sending(trainer):
            for event in events(trainer):
                if isinstance(event, loop.Step) and event.step == 5:
                    for number in numbers:
                        os.kill(os.getpid(), number)
                yield event

        monkeypatch.setattr(loop.Trainer, "events", sending)
        signals.interrupt_once()
        return inside("train", story, "-o", tmp_path / "run", *SMALL, "--steps", steps)

    return call


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM),
    ],
    ids=["closed terminal", "sent to the group and by the shell", "systemd"],
)
def test_training_saves_however_often_the_signals_come(signaled, tmp_path, numbers):
    done = signaled(*numbers)
    assert done.returncode == 130 and not done.stdout
    assert f"lm train --resume {tmp_path / 'run'}" in done.stderr.decode()
    assert resume_state.newest(tmp_path / "run" / "state", pytest.fail).counters.step == 5


def test_a_second_ctrl_c_ends_training_at_once(signaled, tmp_path):
    done = signaled(signal.SIGHUP, signal.SIGINT)
    assert done.returncode == 130
    assert resume_state.newest(tmp_path / "run" / "state", pytest.fail).counters.step == 0


def test_under_nohup_training_goes_on(signaled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
    assert signal.SIGHUP not in signals.stop_signals()
    done = signaled(signal.SIGHUP, signal.SIGHUP, steps=6)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_what_was_scored_is_kept_and_continued(inside, trained, tmp_path, monkeypatch, number):
    texts = "".join(f"The baker sold {i} loaves.\n" for i in range(300)).encode()
    whole, out = tmp_path / "whole.tsv", tmp_path / "out.tsv"
    options = ("score", "-m", trained[0], "--device", "cpu")
    assert inside(*options, "-o", whole, stdin=texts).returncode == 0
    flush = OutputFile.flush

    def sending(output):
        flush(output)
        for _ in range(2):
            os.kill(os.getpid(), number)

    signals.interrupt_once()
    with monkeypatch.context() as patched:
        patched.setattr(OutputFile, "flush", sending)
        assert inside(*options, "-o", out, stdin=texts).returncode == 130
    part = out.with_name("out.tsv.part").read_bytes()
    assert part and whole.read_bytes().startswith(part) and not out.exists()
    assert inside(*options, "-o", out, "--continue", stdin=texts).returncode == 0
    assert out.read_bytes() == whole.read_bytes()


class TestProcesses:
    """`run_processes` with scripts in place of `lm`; `wait` is a script that runs for a minute."""

    WAIT = "import time; print(flush=True); time.sleep(60)"
    HANDLES = f"import signal, sys; signal.signal(NUMBER, lambda *_: sys.exit(130)); {WAIT}"
    KILLED = "import os; os.kill(os.getpid(), 9)"

    @pytest.fixture
    def run(self, monkeypatch):
        """run(scripts, number=0): (exit code, notes, starts); sends `number` to this process."""

        def call(*attempts, number=0):
            notes, starts = [], []

            def start(count, arguments, restarts, scratch):
                scripts = attempts[min(restarts, len(attempts) - 1)]
                starts.append(
                    [
                        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
                        for script in scripts
                    ]
                )
                if number:
                    for process in starts[-1]:
                        process.stdout.readline()
                    os.kill(os.getpid(), number)
                return starts[-1]

            monkeypatch.setattr(launcher, "_start", start)
            code = launcher.run_processes(2, [], notes.append)
            return code, notes, len(starts)

        return call

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
    def test_a_signal_goes_to_the_leader(self, run, number):
        """Also one that comes while the processes are started."""
        leader = self.HANDLES.replace("NUMBER", str(int(number)))
        assert run((leader, self.WAIT), number=number) == (130, [], 1)

    def test_a_leader_that_a_signal_ends_is_not_restarted(self, run):
        """It has not set its handlers yet."""
        code, notes, starts = run((self.WAIT, self.WAIT), number=signal.SIGTERM)
        assert (code, starts) == (EXIT_INTERRUPTED, 1)
        assert notes == ["process 0 of 2 was killed by SIGTERM: interrupted"]

    def test_a_killed_worker_restarts_all_and_only_that_is_said(self, run, capfd):
        lost = "import sys; sys.argv = ['lm']; from lmcli.distributed import launcher; " + (
            "from lmcli.errors import ProcessLost\n"
            "import os, time; os.environ[launcher.FOLDER_FILE_VARIABLE] = 'x'; time.sleep(0.3)\n"
            "with launcher.report_loss_once(): raise ProcessLost('gone', hint='--resume')"
        )
        code, notes, starts = run((lost, self.KILLED), ("", ""))
        assert (code, starts) == (0, 2)
        restarting = "restarting all from the last state (1 of 3)"
        assert notes == [f"process 1 of 2 was killed by SIGKILL: {restarting}"]
        assert capfd.readouterr() == ("", "")

    def test_a_worker_that_fails_is_named(self, run):
        lost = f"import os; os._exit({launcher.EXIT_LOST_WORKER})"
        with pytest.raises(ProcessLost) as caught:
            run((lost, "raise SystemExit(1)"))
        assert str(caught.value).startswith("process 1 of 2 failed (exit code 1)\n  lm train --res")


@pytest.mark.slow
def test_training_is_saved_when_its_terminal_is_closed(environment, story, tmp_path):
    """The kernel sends SIGHUP, and all that is written to the terminal from then on is an error."""
    command = [sys.executable, "-m", "lmcli", "train", story, "-o", tmp_path / "run", *SMALL]
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, [*map(str, command), "--steps", "100000"], environment)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < until
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    steps = resume_state.newest(tmp_path / "run" / "state", pytest.fail).counters.step
    assert steps > 3 and not (tmp_path / "run" / ".lock").exists()
