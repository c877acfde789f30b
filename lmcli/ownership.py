"""Files and folders that only this user can write: made without following links, or refused."""

import errno
import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import BinaryIO, cast

from lmcli.errors import UserError

# Windows has neither of the first two, and no other system has the third
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe that somebody put there is refused, not waited for
BINARY = getattr(os, "O_BINARY", 0)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ForeignFile(UserError):
    """A file or folder that another user owns or may write; nothing in it is read or run."""


def user_id() -> int | None:
    """The user whose rights this process has; None on a system without user ids."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def temporary_name(path: Path, end: str = "part") -> Path:
    """A name next to `path` that nobody can guess: .NAME.NUMBER.part."""
    return path.with_name(f".{path.name}.{secrets.randbelow(10**12)}.{end}")


def create(path: Path, mode: int = 0o600) -> BinaryIO:
    """A new file, open for reading and writing; FileExistsError if a file or link is there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY
    return _opened(os.open(path, flags, mode), "w+b")


def open_own(path: Path) -> BinaryIO:
    """A file that only this user can write, open for reading.

    Raises FileNotFoundError if there is none, ForeignFile for another user's and for a link.
    """
    file = _opened(_open_regular(path, os.O_RDONLY), "rb")
    try:
        require_own(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def open_to_extend(path: Path) -> BinaryIO:
    """A file of this user, under one name, open for reading and writing.

    Raises ForeignFile for another user's, for a link, and for a file with a second name.
    """
    file = _opened(_open_regular(path, os.O_RDWR), "r+b")
    status = os.fstat(file.fileno())
    try:
        _require_owner(path, status)
        if status.st_nlink > 1:
            raise ForeignFile("has a second name (a hard link)", str(path), "remove it")
    except BaseException:
        file.close()
        raise
    return file


def _open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file. Raises ForeignFile for a link and for other kinds."""
    refused = ForeignFile("is a link or no file: lm does not open it", str(path), "remove it")
    if not NO_FOLLOW and path.is_symlink():
        raise refused
    try:
        handle = os.open(path, flags | NO_FOLLOW | NO_WAIT | BINARY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise refused from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refused
    return handle


def _opened(handle: int, mode: str) -> BinaryIO:
    return cast(BinaryIO, open(handle, mode))


def require_own(path: Path, status: os.stat_result) -> None:
    """Raises ForeignFile, naming `path`, unless this user owns it and nobody else may write it."""
    _require_owner(path, status)
    if user_id() is not None and status.st_mode & OTHERS_WRITE:
        raise ForeignFile(
            f"others may write it (mode {stat.S_IMODE(status.st_mode):04o}): lm does not use it",
            where=str(path),
            hint=f"chmod -R go-w {shlex.quote(str(path))} if you trust it, else remove it",
        )


def _require_owner(path: Path, status: os.stat_result) -> None:
    if user_id() not in (None, status.st_uid):
        raise ForeignFile(
            f"belongs to another user (id {status.st_uid}): lm does not use it",
            where=str(path),
            hint="remove it, or set LM_CACHE to a folder of your own",
        )


def make_private_folder(path: Path) -> None:
    """Makes a folder and its missing parents with mode 0700, whatever the umask.

    Raises ForeignFile if it is there and another user owns it, may write it, or has put the link
    there that leads to it.
    """
    for folder in [each for each in reversed((path, *path.parents)) if not each.exists()]:
        try:
            folder.mkdir(0o700)
        except FileExistsError:
            continue
        if folder.lstat().st_mode & 0o700 != 0o700:  # an umask may take these away, but not add any
            folder.chmod(0o700)
    require_own_folder(path)


def require_own_folder(path: Path) -> None:
    """Raises ForeignFile for a folder that is not this user's; NotADirectoryError for a file."""
    if path.is_symlink() and path.lstat().st_uid != 0:
        _require_owner(path, path.lstat())
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    require_own(path, status)
