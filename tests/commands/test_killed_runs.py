"""The short form of tests/acceptance/killed_runs.py: three kills at different moments."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "acceptance" / "killed_runs.py"


@pytest.fixture
def killed_runs(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("killed_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "killed_runs", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """One thread, as in the runs' options: results are bit-equal for the same number only."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_three_times_equals_an_uninterrupted_one(
    killed_runs, one_thread, inside, tmp_path
):
    arguments = killed_runs.arguments_for(tmp_path)
    assert inside("train", *arguments, "-o", tmp_path / "whole").returncode == 0
    killed = killed_runs.Run(tmp_path / "killed", arguments, killed_runs.launch)
    moments = ("saving", "evaluating", "second epoch")
    kills = [killed.kill_at(moment, random.Random(0)) for moment in moments]
    assert None not in kills and ".lock" in kills[0].leftovers
    assert 0 < kills[0].step < kills[1].step < kills[2].step
    assert kills[2].step > killed_runs.EPOCH
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
        f"state/{newest.name}/random.safetensors",
        "counters.json: rows",
        "metrics.jsonl",
        ".recipe.yaml.5.part",
    ]
