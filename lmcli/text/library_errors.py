"""What the tokenizers library raises → UserError, also where its Rust code panics.

A damaged table or a regular expression that backtracks without end makes the library panic: it
reports that on standard error by itself and raises an exception that is no `Exception`.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lmcli.errors import UserError

_lock = threading.Lock()
_calls, _stderr = 0, -1  # calls at work, and a copy of standard error while they are


@contextmanager
def library_errors(what: str, where: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Raises UserError with `what` and the library's reason instead of the library's exception."""
    _silence(1)
    try:
        yield
    except BaseException as error:
        # the library raises a bare Exception, or pyo3's PanicException
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines()
        reason = lines[0][:300] if lines else "for no reason that it gives"
        raise UserError(f"{what}: {reason}", where, hint) from error
    finally:
        _silence(-1)


def _silence(change: int) -> None:
    """Points standard error at nothing while any call is at work: a panic writes a stack trace."""
    global _calls, _stderr
    with _lock, suppress(OSError):  # standard error may be closed
        _calls += change
        if _calls == 1 and change == 1:
            _stderr = os.dup(2)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
        elif not _calls and _stderr >= 0:
            os.dup2(_stderr, 2)
            os.close(_stderr)
            _stderr = -1
