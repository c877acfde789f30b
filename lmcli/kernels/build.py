"""kernels.c and decode_step.c: compiled once per machine with its C compiler; calls on tensors."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lmcli.errors import UserError
from lmcli.ownership import ForeignFile, open_own
from lmcli.storage import NoLocks, atomic_path, cache_folder, lock, unlock, user_errors

SOURCE = Path(__file__).with_name("kernels.c")
SOURCES = (SOURCE, Path(__file__).with_name("decode_step.c"))
# Apple's compiler has no OpenMP: kernels.c then takes dispatch_apply, which macOS brings
OPENMP = sys.platform != "darwin"
ARM_MAC = not OPENMP and platform.machine() == "arm64"
FLAGS: tuple[str, ...] = (
    "-O3",
    "-mcpu=native" if ARM_MAC else "-march=native",
    *(["-fopenmp"] if OPENMP else []),
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    # sums may be split into vector lanes; NaN and infinity must be kept, so no -ffast-math
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # compilers use half of AVX-512 by default
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}
ACCUMULATED = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
WIDEST_HEAD = 1024  # BUFFER of kernels.c
CHUNKS = 64  # of all work, for any number of threads: results are then the same to the bit


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built first if necessary; None if they cannot be used."""
    return None if problem() else _loaded()


@functools.cache
def problem() -> str:
    """Why the kernels cannot be used on this machine; "" if they can. Compiles them once.

    Raises ForeignFile for a cache folder or a library that another user owns or may write.
    """
    if os.environ.get("LM_KERNELS") == "0":
        return "LM_KERNELS=0"
    if sys.platform not in ("linux", "darwin"):
        return f"not built on {platform.system()}"
    if not _compiler():
        command = os.environ.get("CC")
        return (
            f"CC={command} was not found" if command else "no C compiler (cc, gcc, clang) was found"
        )
    try:
        _loaded()
    except subprocess.CalledProcessError as error:
        return f"{_compiler()[0]} fails: {_compiler_message(error)}"
    except ForeignFile:
        raise  # not "use torch's": who may write there may also replace token ids
    except (OSError, UserError) as error:
        return str(error)
    return ""


def _compiler_message(error: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {error.returncode}"
    return next((line for line in lines if "error:" in line), last)


def _compiler() -> list[str]:
    """The C compiler's command: CC with its options, or the first available; [] for none."""
    command = os.environ.get("CC", "").split()
    for program, *options in [command] if command else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(program):
            return [path, *options]
    return []


@functools.cache
def _loaded() -> ctypes.CDLL:
    file = _library_file()
    if not _is_complete(file):
        _compile_once(file)
    try:
        return _open(file)
    except OSError:  # perhaps it was linked with libraries that no longer exist
        _compile(file)
        return _open(file)


OPENED: list[BinaryIO] = []  # kept, since the loader knows a library by its number


def _open(file: Path) -> ctypes.CDLL:
    """Loads the very file that was found to be this user's, whatever has its name by now."""
    OPENED.append(open_own(file))
    number = f"/proc/self/fd/{OPENED[-1].fileno()}"
    return ctypes.CDLL(number if os.path.exists(number) else str(file))


def _library_file() -> Path:
    """Where the library is stored, named by a hash of source, compiler, flags and processor."""
    compiler = _compiler()
    with user_errors(compiler[0], "run"):
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=True, text=True
        ).stdout
    code = b"".join(source.read_bytes() for source in SOURCES)
    facts = code + repr((version, compiler, FLAGS)).encode() + _processor()
    return cache_folder("kernels", action="write") / f"{hashlib.sha256(facts).hexdigest()[:32]}.so"


def _compile_once(file: Path) -> None:
    """Compiles the library; of several processes one does, and the others wait for it."""
    held = None
    with user_errors(file, "write"), suppress(NoLocks):
        held = lock(file.with_suffix(".lock"), waiting=lambda: None)
    try:
        if not _is_complete(file):
            _compile(file)
    finally:
        if held:
            unlock(held)


def _compile(file: Path) -> None:
    with atomic_path(file, private=True) as unfinished:
        sources = map(str, SOURCES)
        command = [*_compiler(), *FLAGS, "-o", str(unfinished), *sources, "-lm"]
        subprocess.run(command, capture_output=True, check=True, text=True)
        digest = hashlib.sha256(unfinished.read_bytes()).digest()
        with unfinished.open("ab") as output:
            output.write(digest)  # a loader ignores what follows the last section


def _is_complete(file: Path) -> bool:
    """True if a library is there and has its hash: loading a damaged one would kill the process.

    Raises ForeignFile if another user owns it or may write it.
    """
    try:
        with open_own(file) as opened:
            content = opened.read()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> bytes:
    """What -march=native depends on: machines with a shared home folder may differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.machine().encode()
    names = (b"flags", b"Features", b"model name")
    return b"\n".join(sorted({line for line in lines if line.startswith(names)}))


def serve(device: torch.device) -> bool:
    """True if the kernels can be used for work on this device."""
    return device.type == "cpu" and library() is not None


def usable(x: Tensor) -> bool:
    """True if the kernels can work on tensors like this one."""
    return x.dtype in SUFFIX and serve(x.device)


def run(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Calls the kernel `name` for a `dtype` with its arguments in kernels.c; CHUNKS is the last."""
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    if not OPENMP:
        _set_threads()(torch.get_num_threads())
    _function(name, dtype)(*values, CHUNKS)


@functools.cache
def _set_threads() -> Callable[[int], None]:
    function = getattr(library(), "set_threads")  # noqa: B009  # typed as any function
    function.argtypes, function.restype = [ctypes.c_long], None
    return function


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function, with the argument types that its line in kernels.c declares."""
    declaration = re.search(
        rf"^void NAME\({name}\)\((.*?)\) {{",
        SOURCE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert declaration is not None
    number = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
    types = {"long": ctypes.c_long, "A": number}
    function = getattr(library(), f"{name}_{SUFFIX[dtype]}")
    # "long rows" and "A eps" are numbers; everything else ("IN x", "const int64_t *targets") arrays
    names = re.findall(r"(?:^|, ?)\s*(\w+)", declaration[1])
    function.argtypes = [types.get(name, ctypes.c_void_p) for name in names]
    function.restype = None
    return function
