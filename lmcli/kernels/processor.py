"""What this machine offers the kernels, found out without torch: threads, bfloat16, no GPU."""

import functools
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of the drivers of CUDA, also in WSL, ROCm

_chosen: list[int] = []


def set_thread_count(count: int) -> None:
    """Sets the number of threads while torch is not loaded; once it is, its own setting counts."""
    _chosen[:] = [count]


def thread_count() -> int:
    """The number of threads that a call of a kernel uses."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return _chosen[0] if _chosen else _default_count()


@functools.cache
def _default_count() -> int:
    """torch's default: the cores this process may use, fewer if the environment says so."""
    cores = _cores()
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        number = os.environ.get(name, "").partition(",")[0].strip()
        if number.isdecimal() and int(number):
            return min(int(number), cores)
    return cores


def _cores() -> int:
    """Cores that this process may run on; two processors of one core count once."""
    try:
        processors = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
    folder, cores = Path("/sys/devices/system/cpu"), set()
    for number in processors:
        try:
            cores.add((folder / f"cpu{number}/topology/thread_siblings_list").read_bytes())
        except OSError:
            return len(processors)
    return len(cores)


def cpu_precision(device: str, dtype: str, training: bool) -> str:
    """The precision in which decode_step.c computes for these options of `select_device`.

    "" where it has none: on another device, in float16, and where only torch can tell. "auto" is
    bfloat16 for training (and generation) if the processor has instructions for it, else float32.
    """
    if device != "cpu" and (device != "auto" or _gpu_is_possible()):
        return ""
    if dtype == "auto":
        return "bfloat16" if training and _has_bfloat16() else "float32"
    return dtype if dtype in ("float32", "bfloat16") else ""


@functools.cache
def _gpu_is_possible() -> bool:
    """False if torch cannot find a GPU here: it is a build without one, or there is no driver."""
    if sys.platform == "darwin":
        return True
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not any(map(os.path.exists, GPU_FILES)):
        return False
    version = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    return bool(re.search(r"^(cuda|hip)\b.*= *['\"]", version, re.MULTILINE))


@functools.cache
def _has_bfloat16() -> bool:
    """True for the processors on which `model.device.has_fast_bfloat16` measures a gain."""
    try:
        flags = re.search(rb"^flags.*$", Path("/proc/cpuinfo").read_bytes(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {b"avx512_bf16", b"amx_tile"}.isdisjoint(flags[0].split())
