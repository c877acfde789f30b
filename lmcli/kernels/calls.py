"""Calls of the functions in kernels.c on tensors."""

import ctypes
import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor

from lmcli.kernels import build

SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}
ACCUMULATED = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
WIDEST_HEAD = 1024  # BUFFER of kernels.c
CHUNKS = 64  # of all work, for any number of threads: results are then the same to the bit


def usable(x: Tensor) -> bool:
    """True if the kernels can work on tensors like this one."""
    return x.dtype in SUFFIX and build.serve(x.device)


def run(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Calls the kernel `name` for a `dtype` with its arguments in kernels.c; CHUNKS is the last."""
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    if not build.OPENMP:
        _set_threads()(torch.get_num_threads())
    _function(name, dtype)(*values, CHUNKS)


@functools.cache
def _set_threads() -> Callable[[int], None]:
    function = getattr(build.library(), "set_threads")  # noqa: B009  # typed as any function
    function.argtypes, function.restype = [ctypes.c_long], None
    return function


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function, with the argument types that its line in kernels.c declares."""
    declaration = re.search(
        rf"^void NAME\({name}\)\((.*?)\) {{",
        build.SOURCE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert declaration is not None
    number = ctypes.c_double if dtype == torch.float64 else ctypes.c_float
    types = {"long": ctypes.c_long, "A": number}
    function = getattr(build.library(), f"{name}_{SUFFIX[dtype]}")
    # "long rows" and "A eps" are numbers; everything else ("IN x", "const int64_t *targets") arrays
    names = re.findall(r"(?:^|, ?)\s*(\w+)", declaration[1])
    function.argtypes = [types.get(name, ctypes.c_void_p) for name in names]
    function.restype = None
    return function
