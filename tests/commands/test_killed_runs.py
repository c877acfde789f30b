"""The short form of tests/acceptance/killed_runs.py: three kills, while saving, while evaluating and in the second epoch."""

import importlib.util
import json
import multiprocessing
import random
import sys
from pathlib import Path

import pytest
import torch

from lmcli.commands import run

SCRIPT = Path(__file__).resolve().parents[1] / "acceptance" / "killed_runs.py"


@pytest.fixture
def killed_runs(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("killed_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "killed_runs", module)
    spec.loader.exec_module(module)
    return module


class Forked:
    """As subprocess.Popen, for an `lm` in a process of its own that need not import torch first: three of them are to be
    started, and that would take most of the time."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lmcli.runs", "lmcli.display", "lmcli.commands.train"])
        self.process = context.Process(target=run, args=([*map(str, arguments)],))
        self.process.start()
        self.kill, self.wait = self.process.kill, self.process.join

    @property
    def returncode(self):
        """None while it goes on; −9 once it was killed."""
        return self.process.exitcode

    def poll(self):
        """The same."""
        return self.returncode


@pytest.fixture
def one_thread():
    """Bits are the same at the same number of threads only; the options of the runs say 1, for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_three_times_is_the_run_left_in_peace(killed_runs, one_thread, inside, tmp_path):
    arguments = killed_runs.arguments_for(tmp_path)
    assert inside("train", *arguments, "-o", tmp_path / "whole").returncode == 0
    killed = killed_runs.Run(tmp_path / "killed", arguments, Forked)
    strikes = [killed.strike(aim, random.Random(0)) for aim in ("saving", "evaluating", "second epoch")]
    assert None not in strikes and ".lock" in strikes[0].leftovers
    assert 0 < strikes[0].step < strikes[1].step < strikes[2].step and strikes[2].step > killed_runs.EPOCH
    assert inside(*killed.next_arguments()).returncode == 0
    assert killed_runs.differences(tmp_path / "whole", killed.folder) == []

    newest = killed.folder / "state" / f"step-{killed_runs.STEPS:09d}"  # and it would be seen:
    counters = json.loads((newest / "counters.json").read_text())
    (newest / "counters.json").write_text(json.dumps({**counters, "rows": 5, "seconds": 1e9}))
    (newest / "random.safetensors").write_bytes(b"x")
    (killed.folder / ".recipe.yaml.5.part").write_text("")
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60}\n')
    assert killed_runs.differences(tmp_path / "whole", killed.folder) == [
        f"state/{newest.name}/random.safetensors", "counters.json: rows", "metrics.jsonl", ".recipe.yaml.5.part"]
