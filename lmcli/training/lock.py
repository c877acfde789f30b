"""One process at a time in a run's folder."""

import errno
import os
import socket
from pathlib import Path

from lmcli.errors import UserError
from lmcli.storage import user_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class Lock:
    """The lock of a folder, held until `release` or the end of the process, however that comes: it is the system's lock on
    an open file, so a dead process holds none and its file, left behind, stands for nothing. `missing` tells where a system
    or disk has no such locks: then nothing is held."""

    def __init__(self, folder: Path):
        """Raises UserError naming the process that holds it, or when the folder cannot be written."""
        self.path, self.missing = folder / NAME, ""
        self._handle = None
        with user_errors(self.path, "write"):
            while not self._handle and not self.missing:
                self._try()

    def _try(self) -> None:
        handle = open(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with handle:
                raise UserError(f"{handle.read().strip() or 'another process'} is training in this folder: wait for it, or "
                                "end it first", where=str(self.path.parent)) from error
        except OSError as error:
            handle.close()
            if error.errno not in NO_LOCKS:
                raise
            self.path.unlink(missing_ok=True)
            self.missing = f"{self.path.parent}: no file locks here: see to it that no other process trains in this folder"
            return
        if not self._is_at(handle):  # who held it before has just removed the file, and others would make another one
            handle.close()
            return
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        self._handle = handle

    def _is_at(self, handle) -> bool:
        try:
            return os.path.samestat(os.fstat(handle.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets go of it, and removes its file; nothing the second time."""
        if self._handle:
            self.path.unlink(missing_ok=True)  # first: who comes between finds that the file it locked is no longer there
            self._handle.close()
            self._handle = None
