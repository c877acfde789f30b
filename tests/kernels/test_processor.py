"""Threads, precision and the question of a GPU, all answered without torch."""

import os
import subprocess
import sys

import pytest
import torch

from lmcli.kernels import processor
from lmcli.model.device import has_fast_bfloat16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No number of threads chosen, and nothing remembered."""
    functions = processor._default_count, processor._gpu_is_possible, processor._has_bfloat16
    for function in functions:
        function.cache_clear()
    monkeypatch.setattr(processor, "_chosen", [])
    yield
    for function in functions:
        function.cache_clear()


def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")


def test_torchs_number_counts_where_torch_is_loaded(monkeypatch):
    processor.set_thread_count(7)
    assert processor.thread_count() == torch.get_num_threads()
    without_torch(monkeypatch)
    assert processor.thread_count() == 7


@pytest.mark.parametrize(
    "variables, count",
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "64"}, 4),
        ({"OMP_NUM_THREADS": "0"}, 4),
        ({"OMP_NUM_THREADS": "many"}, 4),
    ],
)
def test_the_environment_lowers_the_number_of_cores(variables, count, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processor, "_cores", lambda: 4)
    without_torch(monkeypatch)
    assert processor.thread_count() == count


@pytest.mark.skipif(sys.platform != "linux", reason="torch counts otherwise elsewhere")
def test_the_default_is_torchs():
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    script = (
        "from lmcli.kernels.processor import thread_count; own = thread_count(); import torch; "
        "print(own, torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=variables)
    own, theirs = done.stdout.split()
    assert own == theirs, done.stderr


def test_precision_by_options(monkeypatch):
    def precisions():
        return [
            processor.cpu_precision(device, dtype, True)
            for device in ("cpu", "auto", "cuda")
            for dtype in ("auto", "float32", "bfloat16", "float16")
        ]

    monkeypatch.setattr(processor, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(processor, "_gpu_is_possible", lambda: False)
    here = ["bfloat16", "float32", "bfloat16", ""]
    assert precisions() == [*here, *here, "", "", "", ""]
    assert processor.cpu_precision("cpu", "auto", training=False) == "float32"
    monkeypatch.setattr(processor, "_has_bfloat16", lambda: False)
    assert processor.cpu_precision("cpu", "auto", training=True) == "float32"
    monkeypatch.setattr(processor, "_gpu_is_possible", lambda: True)
    assert precisions()[4:] == [""] * 8


def test_a_measured_gain_in_bfloat16_needs_the_flags():
    if has_fast_bfloat16(torch.device("cpu")):
        assert processor._has_bfloat16()


@pytest.mark.parametrize(
    "line, driver, possible",
    [
        ("cuda: Optional[str] = None", True, False),
        ("cuda: Optional[str] = '12.8'", True, True),
        ("cuda: Optional[str] = '12.8'", False, False),
        ("cuda = None\nhip: Optional[str] = '6.4'", True, True),
    ],
)
def test_a_gpu_needs_a_build_for_it_and_a_driver(line, driver, possible, monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text(f"__version__ = '2.9'\ndebug = False\n{line}\n")
    (tmp_path / "__init__.py").touch()

    class Found:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(processor, "find_spec", lambda name: Found)
    monkeypatch.setattr(
        processor, "GPU_FILES", (str(tmp_path / ("version.py" if driver else "x")),)
    )
    monkeypatch.setattr(sys, "platform", "linux")
    assert processor._gpu_is_possible() == possible
