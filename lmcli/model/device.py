"""The device, precision and number of threads that work runs with, and the memory there."""

import ctypes
import functools
import gc
import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from lmcli.errors import UsageError

UNKNOWN_MEMORY = 1 << 50  # bytes: nothing is refused for memory then
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    """Where work runs, and in which precision."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif name == "cpu":
            threads = torch.get_num_threads()
            name = f"cpu, {threads} thread{'s' * (threads != 1)}"
        return f"{name}, {dtype_name(self.dtype)}"


def select_device(
    device: str = "auto", dtype: str = "auto", threads: int = 0, training: bool = False
) -> DeviceConfig:
    """The DeviceConfig for these options; "auto" takes CUDA, then MPS, then the CPU.

    Precision "auto" is float32, but bfloat16 for training if the hardware multiplies it faster.
    Raises UsageError for a device that is not available or an unknown precision.
    """
    if threads:
        torch.set_num_threads(threads)
    selected = torch.device(_available_device(device))
    if selected.type == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        fast = training and has_fast_bfloat16(selected)
        return DeviceConfig(selected, torch.bfloat16 if fast else torch.float32)
    if dtype not in DTYPES:
        raise UsageError(
            f"no precision {dtype!r}", where="--dtype", hint=f"choose auto, {', '.join(DTYPES)}"
        )
    return DeviceConfig(selected, DTYPES[dtype])


def _available_device(name: str) -> str:
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind in usable if usable[kind]), "cpu"]
    if name == "auto":
        return available[0]
    if name not in available:
        hint = f"choose {', '.join(reversed(available))}"
        raise UsageError(f"no {name} device on this machine", where="--device", hint=hint)
    return name


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the hardware multiplies matrices faster in bfloat16 than in float32.

    NVIDIA GPUs from Ampere on; a CPU with AVX-512 BF16 or AMX where a measurement confirms it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return supported and _bfloat16_gain() > 1
    return False


@functools.cache
def _bfloat16_gain() -> float:
    """How many times as fast the CPU multiplies matrices in bfloat16 as in float32.

    2 on Zen 4, more with AMX, but 0.5 on an Intel Xeon with AVX-512 BF16 and AMX switched off, as
    in some virtual machines. Compares the fastest of 8 products of a millisecond, alternating and
    in one thread, so that other load does not decide: all processes of a run, and a resumed run,
    must come to the same answer.
    """
    threads = torch.get_num_threads()
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in fastest}
    torch.set_num_threads(1)
    for _ in range(8):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype itself, or the one of this name in DTYPES."""
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks instead of returning large ones to the system each time.

    Gains 15 to 20 % of a training step on the CPU (4 × 128, batch 4,096 tokens), 5 % of scoring
    (GPT-2 small), and for blocks over 32 MB, as gradients of a large vocabulary are, perhaps 9 % of
    fine-tuning MiniLM (within noise). Does nothing without glibc.
    """
    _set_malloc(mmap_max=0, trim_threshold=(1 << 31) - 1)  # a threshold over 32 MB would be refused


def give_back_freed_memory() -> None:
    """Makes glibc return blocks of a megabyte as soon as they are freed, if memory is short."""
    _set_malloc(mmap_max=1 << 16, trim_threshold=1 << 20, mmap_threshold=1 << 20)


def trim_memory() -> None:
    """Returns all freed pages to the system, also between blocks in use; only with glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _set_malloc(**options: int) -> None:
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h
    parameters = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(parameters[name], value)


def track_peak_memory() -> bool:
    """Releases unused memory and resets `peak_memory`; False if the system cannot reset it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trim_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had resident, or allocated on a GPU; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB


def machine_memory(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of the machine; `UNKNOWN_MEMORY` if it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no os.sysconf
        return _windows_memory() or UNKNOWN_MEMORY


def _windows_memory() -> int:
    """Bytes of memory of a Windows machine, by GlobalMemoryStatusEx; 0 elsewhere."""
    if sys.platform != "win32":
        return 0
    status = (ctypes.c_uint64 * 8)()  # its first half is its size and the share in use
    status[0] = ctypes.sizeof(status)
    known = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status[1]) if known else 0


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still take, on a GPU with what it holds there; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * sizes[0] if sizes else 0


# in plain RuntimeErrors of torch: CPU (POSIX, Windows), MPS, a failed C++ allocation, cuBLAS
OOM = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed")


def ran_out_of_memory(error: BaseException) -> bool:
    """True if torch, numpy or Python raised this error because memory was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in OOM)


def compiles(device: torch.device) -> bool:
    """True if torch.compile has what it needs: Triton, a C compiler, an NVIDIA GPU from 2017 on."""
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))
    )


def finish(device: torch.device) -> None:
    """Waits until a GPU has done its queued work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def free_memory(device: torch.device) -> None:
    """Collects garbage and empties the GPU's memory cache."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators: the CPU's and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Restores what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    for kind in states.keys() - {"cpu"}:
        getattr(torch, kind).set_rng_state(states[kind])
