"""The background load trains inside its block only, and ends with its parent process."""

import multiprocessing
import time
from pathlib import Path

import pytest
from forked import CONTEXT

from lmcli.errors import UserError
from lmcli.model.device import select_device
from lmcli.planning.background_load import BackgroundLoad
from lmcli.recipes import resolve

RECIPE = resolve(
    "tiny",
    (
        "model.hidden_size=16",
        "model.num_hidden_layers=1",
        "model.num_attention_heads=1",
        "tokenizer.vocab_size=300",
        "train.context=16",
        "train.batch_tokens=16",
    ),
    {"steps": 1},
)


@pytest.fixture
def load():
    """A background load of one process, which is ended afterwards."""
    yield BackgroundLoad(1, select_device("cpu", "float32"))
    for process in multiprocessing.active_children():
        process.terminate()
        process.join()


def cpu_ticks(process) -> int:
    """Clock ticks of CPU time that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU time is read from /proc")
def test_it_trains_inside_the_block_and_waits_outside(load):
    for _ in range(2):  # the same process both times
        with load.training(RECIPE):
            (process,) = multiprocessing.active_children()
            before, until = cpu_ticks(process), time.monotonic() + 60
            while cpu_ticks(process) < before + 5:
                assert time.monotonic() < until
                time.sleep(0.05)
        before = cpu_ticks(process)
        time.sleep(0.2)
        assert cpu_ticks(process) <= before + 1


@pytest.fixture
def forking(monkeypatch):
    """The load's process is forked from one that has imported torch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: CONTEXT)


def test_a_killed_process_is_an_error(forking, load):
    error = pytest.raises(UserError, match="--nproc: a process of the background load has ended")
    with error, load.training(RECIPE):
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()


def test_it_ends_when_the_parent_has_gone(forking, load):
    with load.training(RECIPE):
        (process,) = multiprocessing.active_children()
        for pipe in load._pipes:
            pipe.close()
        process.join(60)
        assert process.exitcode == 0
        load._pipes.clear()
