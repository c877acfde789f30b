"""Which device, precision and number of threads work runs with, and why."""

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where work runs."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif name == "cpu":
            name = f"cpu, {torch.get_num_threads()} threads"
        return f"{name}, {dtype_name(self.dtype)}"


def place(device: str = "auto", dtype: str = "auto", threads: int = 0, training: bool = False) -> Placement:
    """The Placement for these options; "auto" takes CUDA, then MPS, then the CPU.

    Precision "auto" is bfloat16 for training and generating where the hardware multiplies it faster, else float32.
    Raises UsageError for a device that is not there or a precision it lacks.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = torch.device(_device(device))
    if chosen.type == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        return Placement(chosen, torch.bfloat16 if training and has_fast_bfloat16(chosen) else torch.float32)
    if dtype not in DTYPES:
        raise UsageError(f"no precision {dtype!r}", where="--dtype", hint=f"there is: auto, {', '.join(DTYPES)}")
    return Placement(chosen, DTYPES[dtype])


def _device(name: str) -> str:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there.get(name):
        raise UsageError(f"no {name} device on this machine", where="--device",
                         hint=f"there is: {', '.join(kind for kind in there if there[kind])}")
    return name


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices faster in bfloat16 than in float32: Ampere and later on NVIDIA; a CPU that
    has AVX-512 BF16 or AMX, and is measured to."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) and _bfloat16_gain() > 1
    return False


@functools.cache
def _bfloat16_gain() -> float:
    """How many times as fast as in float32 the CPU multiplies matrices in bfloat16: 2 on Zen 4, more with AMX, but 0.5 on an
    Intel Xeon that has AVX-512 BF16 alone (AMX switched off, as in some virtual machines).

    Told by the shortest of some products of a millisecond, in turns and by one thread, so that other work beside it does not
    decide: all processes of a run, and a run that is resumed, are to find the same.
    """
    threads, shortest = torch.get_num_threads(), dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    torch.set_num_threads(1)
    pairs = {dtype: (torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)) for dtype in shortest}
    for _ in range(8):
        for dtype, (one, other) in pairs.items():
            began = time.perf_counter()
            torch.mm(one, other)
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - began)
    torch.set_num_threads(threads)
    return shortest[torch.float32] / shortest[torch.bfloat16]


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks instead of giving each large one back to the system and faulting it in again.

    Worth 15 to 20 % of a training step on the CPU (4 × 128, batch 4,096 tokens), 5 % of scoring (GPT-2 small), and for
    blocks over 32 MB, as a large vocabulary's gradient is, perhaps 9 % of fine-tuning MiniLM (within
    noise). Elsewhere it does nothing.
    """
    _set_malloc(mmap_max=0, trim_threshold=(1 << 31) - 1)  # a threshold over 32 MB would be refused


def give_back_freed_memory() -> None:
    """The opposite, for when memory is what is short: a block of a megabyte goes back to the system once it is freed."""
    _set_malloc(mmap_max=1 << 16, trim_threshold=1 << 20, mmap_threshold=1 << 20)


def _set_malloc(**options: int) -> None:
    places = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # M_TRIM_THRESHOLD … of malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(places[name], value)


def follow_memory() -> bool:
    """Lets the peak of memory start anew, after what nobody holds has been given back; False where the system cannot do
    that, so that a peak stays that of all the process has done."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks are kept otherwise: see keep_freed_memory
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, no C library by that name
        return False
    return True


def machine_memory(device: torch.device) -> int:
    """Bytes of memory that the machine, or its GPU, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: on a GPU of its own memory, with what this process holds there, else of the machine's
    (0: it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


# what torch says where it raises a plain RuntimeError: CPU (POSIX, Windows), MPS, a failed C++ allocation, cuBLAS
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's, numpy's or Python's way to say that memory was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def compiles(device: torch.device) -> bool:
    """Whether torch.compile has all it needs for this GPU: Triton, a C compiler, and a card of 2017 or later."""
    return device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0) \
        and any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given: a GPU is told of work and does it later."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def free_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators for work on this device, the CPU's included."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Puts back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    for kind in states.keys() - {"cpu"}:
        getattr(torch, kind).set_rng_state(states[kind])
