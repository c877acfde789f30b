"""Devices, precisions and memory, and the errors for those that are not available."""

import resource
import sys

import pytest
import torch

from lmcli.errors import UsageError
from lmcli.model import device
from lmcli.model.device import dtype_name, select_device, track_peak_memory


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_requested_precision_is_used(name):
    device_config = select_device("cpu", name)
    assert (device_config.device, dtype_name(device_config.dtype)) == (torch.device("cpu"), name)
    threads = torch.get_num_threads()
    assert str(device_config) == f"cpu, {threads} thread{'s' if threads > 1 else ''}, {name}"


def test_the_default_is_float32():
    assert select_device("cpu").dtype == torch.float32


@pytest.mark.parametrize(
    "instructions, gain, expected",
    [(True, 2.0, torch.bfloat16), (True, 0.5, torch.float32), (False, 2.0, torch.float32)],
)
def test_training_is_in_bfloat16_if_measured_to_be_faster(
    monkeypatch, instructions, gain, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(device, "_bfloat16_gain", lambda: gain)
    assert (
        select_device("cpu", training=True).dtype == expected
        and select_device("cpu").dtype == torch.float32
    )


def test_the_gain_is_the_ratio_of_the_fastest_products(monkeypatch):
    clock, threads = [0.0], torch.get_num_threads()
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def product(one: torch.Tensor, other: torch.Tensor) -> None:
        assert torch.get_num_threads() == 1
        clock[0] += 3.0 if one.dtype == torch.float32 else 2.0

    monkeypatch.setattr(torch, "mm", product)
    assert device._bfloat16_gain.__wrapped__() == 1.5
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        "tpu",
        "",
    ],
)
def test_an_unavailable_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match=r"no .*device on this machine") as caught:
        select_device(name)
    assert caught.value.where == "--device"
    assert "cpu" in caught.value.hint


def test_an_unknown_precision_is_a_usage_error():
    with pytest.raises(UsageError, match="no precision 'int3'") as caught:
        select_device("cpu", "int3")
    assert "float32" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a peak")
def test_peak_memory_can_be_reset():
    if not track_peak_memory():
        pytest.skip("this system cannot reset it")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = torch.ones(50_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 150_000  # KiB
    del tensor
    track_peak_memory()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
