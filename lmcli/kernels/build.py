"""kernels.c and decode_step.c: compiled once per machine with its C compiler. Loads no torch."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lmcli.errors import UserError
from lmcli.ownership import ForeignFile, open_own
from lmcli.storage import NoLocks, atomic_path, cache_folder, lock, unlock, user_errors
from lmcli.terminal import progress

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("kernels.c")
SOURCES = (SOURCE, Path(__file__).with_name("decode_step.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("decode_products.h", "numbers.h"))
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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built first if necessary; None if they cannot be used."""
    return None if problem() else _loaded()


def is_loaded() -> bool:
    """True if this process uses the kernels already, so that asking costs nothing."""
    return library.cache_info().currsize > 0 and library() is not None


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
        with progress.stage("compiling kernels, once"):
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
    code = b"".join(source.read_bytes() for source in SOURCES + HEADERS)
    facts = code + repr((version, compiler, FLAGS)).encode() + _processor()
    return cache_folder("kernels", action="write") / f"{hashlib.sha256(facts).hexdigest()[:32]}.so"


def _compile_once(file: Path) -> None:
    """Compiles the library; of several processes one does, and the others wait for it."""
    lock_handle = None
    with user_errors(file, "write"), suppress(NoLocks):
        lock_handle = lock(file.with_suffix(".lock"), waiting=lambda: None)
    try:
        if not _is_complete(file):
            _compile(file)
    finally:
        if lock_handle:
            unlock(lock_handle)


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


def serve(device: "torch.device") -> bool:
    """True if the kernels can be used for work on this device."""
    return device.type == "cpu" and library() is not None
