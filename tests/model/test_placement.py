"""Where work runs, and what a user hears who asks for what is not there."""

import resource
import sys

import pytest
import torch

from lmcli.errors import UsageError
from lmcli.model import device
from lmcli.model.device import dtype_name, follow_memory, place


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_precision_asked_for_is_taken(name):
    placement = place("cpu", name)
    assert (placement.device, dtype_name(placement.dtype)) == (torch.device("cpu"), name)
    assert str(placement) == f"cpu, {torch.get_num_threads()} threads, {name}"


def test_measuring_is_in_float32_unless_told():
    assert place("cpu").dtype == torch.float32


@pytest.mark.parametrize("instructions, gain, taken", [
    (True, 2.0, torch.bfloat16), (True, 0.5, torch.float32), (False, 2.0, torch.float32)])
def test_training_is_in_bfloat16_where_that_is_measured_to_be_faster(monkeypatch, instructions, gain, taken):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(device, "_bfloat16_gain", lambda: gain)
    assert place("cpu", training=True).dtype == taken and place("cpu").dtype == torch.float32


def test_the_gain_is_how_long_one_precision_takes_beside_the_other(monkeypatch):
    clock, threads = [0.0], torch.get_num_threads()
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def product(one: torch.Tensor, other: torch.Tensor) -> None:
        assert torch.get_num_threads() == 1
        clock[0] += 3.0 if one.dtype == torch.float32 else 2.0
    monkeypatch.setattr(torch, "mm", product)
    assert device._bfloat16_gain.__wrapped__() == 1.5
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device")), "tpu", ""])
def test_a_device_that_is_not_there_is_a_usage_error(name):
    with pytest.raises(UsageError, match=r"no .*device on this machine") as caught:
        place(name)
    assert caught.value.where == "--device"
    assert "cpu" in caught.value.hint


def test_a_precision_that_does_not_exist_is_a_usage_error():
    with pytest.raises(UsageError, match="no precision 'int3'") as caught:
        place("cpu", "int3")
    assert "float32" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak start anew")
def test_the_peak_of_memory_starts_anew():
    if not follow_memory():
        pytest.skip("this system does not let it")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.ones(50_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 150_000  # KiB
    del held
    follow_memory()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
