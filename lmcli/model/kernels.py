"""The compiled kernels of kernels.c: built once a machine with its C compiler, and called on tensors."""

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
from pathlib import Path

import torch
from torch import Tensor

from lmcli.errors import UserError
from lmcli.storage import atomic_path, cache_folder, user_errors

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=fast",
         # sums may be cut into vector lanes; NaN and infinity must still be seen, so no -ffast-math
         "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # by default compilers use half of what AVX-512 has
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}
ACCUMULATED = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
WIDEST_HEAD = 1024  # BUFFER of kernels.c
PARTS = 64  # work is cut into so many parts, whatever the number of threads: results are then the same to the bit


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled first if need be; None where they cannot be used (see `problem`)."""
    return None if problem() else _loaded()


@functools.cache
def problem() -> str:
    """Why the kernels cannot be used here, in words; empty where they can. Compiling takes some two seconds, once."""
    if os.environ.get("LM_KERNELS") == "0":
        return "LM_KERNELS=0"
    if sys.platform != "linux":
        return f"not built on {platform.system()}"  # elsewhere torch brings an OpenMP that a compiler does not find
    if not _compiler():
        return f"CC={os.environ['CC']} was not found" if os.environ.get("CC") else "no C compiler (cc, gcc, clang) was found"
    try:
        _loaded()
    except subprocess.CalledProcessError as error:
        return f"{_compiler()[0]} fails: {_complaint(error)}"
    except (OSError, UserError) as error:
        return str(error)
    return ""


def _complaint(error: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else f"exit code {error.returncode}")


def _compiler() -> list[str]:
    """The C compiler's command: CC, which may bring options, else the first there is; empty where there is none."""
    asked = os.environ.get("CC", "").split()
    for program, *options in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if found := shutil.which(program):
            return [found, *options]
    return []


@functools.cache
def _loaded() -> ctypes.CDLL:
    file = _file()
    if not _whole(file):
        _compile(file)
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # perhaps it was built against libraries that are gone
        _compile(file)
        return ctypes.CDLL(str(file))


def _file() -> Path:
    """Where the compiled file is kept, named by all that it depends on: source, compiler, flags, processor."""
    compiler = _compiler()
    with user_errors(compiler[0], "run"):
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True).stdout
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((version, compiler, FLAGS)).encode() + _processor())
    return cache_folder() / "kernels" / f"{digest.hexdigest()[:32]}.so"


def _compile(file: Path) -> None:
    with user_errors(file, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as part:
        command = [*_compiler(), *FLAGS, "-o", str(part), str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, check=True, text=True)
        digest = hashlib.sha256(part.read_bytes()).digest()
        with part.open("ab") as written:
            written.write(digest)  # a loader does not look behind the last section


def _whole(file: Path) -> bool:
    """Whether a compiled file is there as it was written: loading one that was cut short would kill the process."""
    if not file.is_file():
        return False
    content = file.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> bytes:
    """What -march=native goes by: a home folder may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.machine().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def serve(device: torch.device) -> bool:
    """Whether work on this device has the kernels."""
    return device.type == "cpu" and library() is not None


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on tensors like this one."""
    return x.dtype in SUFFIX and serve(x.device)


def run(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Calls kernel `name` for tensors of `dtype`, with arguments as kernels.c has them; PARTS is added behind them."""
    _function(name, dtype)(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments], PARTS)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function, told the types that its line in kernels.c declares."""
    declared = re.search(rf"^void NAME\({name}\)\((.*?)\) {{", SOURCE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    real = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
    kinds = {"long": ctypes.c_long, "A": real}
    function = getattr(library(), f"{name}_{SUFFIX[dtype]}")
    # "long rows" and "A eps" are numbers; everything else ("IN x", "const int64_t *targets") is an array
    function.argtypes = [kinds.get(kind, ctypes.c_void_p) for kind in re.findall(r"(?:^|, ?)\s*(\w+)", declared[1])]
    function.restype = None
    return function
