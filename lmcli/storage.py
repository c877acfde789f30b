"""Atomic files and folders: written under a temporary name, flushed, renamed; the cache folder."""

import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcli import ownership
from lmcli.errors import ClosedPipe, UserError, nearest
from lmcli.ownership import make_private_folder, require_own, require_own_folder

if TYPE_CHECKING:
    from filelock import BaseFileLock


PROBE_BYTES = 1 << 14  # must be free in the cache folder
LOCK_SECONDS = 0.2
MOST_NAMES = 2000  # of a folder, looked at for one like a missing name
CACHING = "write the token cache"


@contextmanager
def user_errors(path: Path | str, action: str, hint: str | None = None) -> Iterator[None]:
    """Turns an OSError (no space, no permission, no such folder) into a UserError naming `path`.

    A closed pipe becomes ClosedPipe instead.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error
    except OSError as error:
        reason, where = error.strerror or str(error), str(error.filename or path)
        if action == "read" and error.errno == errno.ENOENT:
            reason += near_names(where)
        raise UserError(f"cannot {action}: {reason}", where, hint) from error


def near_names(path: Path | str) -> str:
    """The end of a message about a missing path: what has nearly its name, or the missing folder.

    Of a large folder some names are looked at.
    """
    path = Path(path)
    with suppress(OSError):
        if not path.parent.is_dir():
            return f"; there is no folder {str(path.parent)!r}"
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
        stems = {Path(name).stem: name for name in sorted(names) if not name.startswith(".")}
        for stem in nearest(path.stem, stems, cutoff=0.7):
            return f"; did you mean {str(path.with_name(stems[stem]))!r}?"
    return ""


def announce(text: str) -> None:
    """Prints a line on standard error about what was taken instead, unless --quiet is given."""
    if is_quiet():
        return
    if sys.stderr.isatty():  # control characters in a folder's name are drawn
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    print(f"lm: {text}", file=sys.stderr)


@contextmanager
def atomic_path(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary file next to `path`: renamed to it when the block succeeds, removed otherwise.

    It is empty, and nobody else can write it; with `private` that holds for `path` too. A link at
    `path` is replaced, never followed. Raises UserError when the file cannot be written.
    """
    temporary = ownership.temporary_name(path)
    try:
        with user_errors(path, "write"):
            ownership.create(temporary).close()
            yield temporary
            _flush(temporary, 0o600 if private else 0o666 & ~_umask())
            os.replace(temporary, path)
            _flush_entries(path.parent)
    finally:
        with suppress(OSError):  # the error that ended the block is the one to report
            temporary.unlink()


def read_json(file: Path, hint: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; UserError when there is none."""
    if not file.is_file():
        raise UserError(f"holds no {file.name}", where=str(file.parent), hint=hint)
    with user_errors(file, "read"):
        try:
            document = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(document, dict):
        raise UserError("is not a JSON object", where=str(file))
    return document


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically; "?" for what is not UTF-8 (in the name of a file)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file atomically, after checking that the disk has space for it."""
    with user_errors(source, "read"):
        needed = source.stat().st_size
    require_disk_space(path, needed)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def atomic_folder(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary folder next to `path`: renamed to it when the block succeeds, removed otherwise.

    Nobody else can write in it; with `private` that holds for `path` too. A folder or link at
    `path` is replaced at the moment of the rename, and restored if that fails.
    """
    temporary, old = (ownership.temporary_name(path, end) for end in ("part", "old"))
    try:
        with user_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(0o700)
            yield temporary
            for file in temporary.iterdir():
                _flush(file, 0o600 if private else None)
            _flush_entries(temporary)
            if not private:
                temporary.chmod(0o777 & ~_umask())
            if os.path.lexists(path):  # renamed first: a kill while deleting would leave half of it
                os.rename(path, old)
            os.rename(temporary, path)
            _flush_entries(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            if not os.path.lexists(path):
                os.rename(old, path)
            elif old.is_symlink():
                old.unlink()
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path, mode: int | None = None) -> None:
    """Forces a file to the disk, with these permissions."""
    # Windows flushes only what may be written
    handle = os.open(path, os.O_RDWR | ownership.NO_FOLLOW | ownership.BINARY)
    try:
        if mode is not None and hasattr(os, "fchmod"):
            os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_entries(folder: Path) -> None:
    """Flushes the names in a folder: without this, a power cut may undo a rename.

    Does nothing on systems that cannot open or flush a folder.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF):
            raise
    finally:
        os.close(handle)


# temporary files of this module, and of safetensors
LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<end>part|old)|\.tmp[A-Za-z0-9]{6}")


def clear_leftovers(folder: Path) -> None:
    """Removes temporary files that killed processes left in a folder.

    A folder that was renamed to .old and not replaced gets its name back. Call this only while
    nobody writes in the folder.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        leftover = LEFTOVER.fullmatch(path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        if not leftover or (is_folder and not leftover["end"]):
            continue
        if leftover["end"] == "old" and not os.path.lexists(folder / leftover["name"]):
            os.rename(path, folder / leftover["name"])
        elif is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with user_errors(file, "read"), file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_disk_space(path: Path, needed: int) -> None:
    """Raises UserError unless the disk of `path` has `needed` bytes free, and 1 MB more."""
    free, needed = free_bytes(path), needed + (1 << 20)
    if free < needed:
        raise UserError(
            f"the disk is full: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free",
            where=str(path),
            hint="free some space; everything saved before is intact",
        )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path` (or of its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def tensor_bytes(tensors: dict[str, Any]) -> int:
    """Total size of named tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(
    path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Writes a .safetensors file atomically, after checking that the disk has space for it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_disk_space(path, tensor_bytes(tensors))
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise UserError(f"cannot write: {error}", where=str(path)) from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The tensors of a .safetensors file in their stored dtype; UserError if it is damaged."""
    from safetensors.torch import load_file

    with safetensors_errors(path):
        return load_file(path, device=device)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turns errors of reading a .safetensors file into a UserError naming `path`."""
    from safetensors import SafetensorError

    with user_errors(path, "read"):
        try:
            yield
        except SafetensorError as error:
            raise UserError(
                f"is damaged or no safetensors file ({error})",
                where=str(path),
                hint="download or save it again",
            ) from error


def cache_folder(*names: str, action: str = CACHING) -> Path:
    """Folder for token ids, piped text and compiled kernels, or the one of these names in it.

    It is $LM_CACHE, else `lm` in the user's cache, or where nothing can be written there in the
    temporary folder, which a line on standard error then says. It is made with mode 0700. Raises
    ForeignFile if another user owns it or may write it; UserError, which names the `action`, if
    $LM_CACHE cannot be written, or no other folder.
    """
    if named := os.environ.get("LM_CACHE"):
        folder = Path(named)
    else:
        home = Path(os.path.expanduser("~"))  # "~" itself for a user without a home
        base = os.environ.get("XDG_CACHE_HOME")
        folder = Path(base or home / ".cache") / "lm"
        no_home = "" if base or home.is_dir() else "there is no home folder"
        if problem := no_home or _write_problem(folder):
            folder = _other_cache(folder, problem)
    with user_errors(folder, action):
        make_private_folder(folder)
        for name in names:
            folder /= name
            make_private_folder(folder)
    return folder


@functools.cache
def _write_problem(folder: Path) -> str:
    """Why nothing can be written in a folder, which is made if it is missing; "" if it can."""
    try:
        make_private_folder(folder)
        probe = ownership.temporary_name(folder / "probe")
        try:
            with ownership.create(probe) as file:
                file.write(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return "" if free_bytes(folder) > PROBE_BYTES else "the disk is full"


def is_quiet() -> bool:
    """True with --quiet, and in a worker (see commands/options.py)."""
    import logging

    return not logging.getLogger("lmcli").isEnabledFor(logging.WARNING)


@functools.cache  # names it once
def _other_cache(folder: Path, problem: str) -> Path:
    import tempfile

    other, hint = Path(f"lm-{ownership.user_id()}"), "set LM_CACHE to a folder that can be written"
    try:
        other = tempfile.gettempdir() / other
    except OSError as error:
        raise UserError(f"cannot write: {problem}", str(folder), hint) from error
    if second := _write_problem(other):
        raise UserError(f"cannot write: {problem}; {other}: {second}", str(folder), hint)
    announce(f"{folder}: cannot write: {problem}; the cache is {other}")
    return other


def cached(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """The cache folder that `write` fills, created once; `key` identifies all it depends on.

    Raises ForeignFile if another user owns it or a file in it, or may write one.
    """
    folder = cache_folder(kind) / key
    if not _is_cached(folder):
        with atomic_folder(folder, private=True) as temporary:
            write(temporary)
    return folder


def _is_cached(folder: Path) -> bool:
    """True if a folder of the cache is complete; ForeignFile if it or a file is not this user's."""
    if not (folder / "facts.json").is_file():
        return False
    require_own_folder(folder)
    for file in folder.iterdir():
        require_own(file, file.lstat())
    return True


def cached_resumable(
    kind: str, key: str, write: Callable[[Path], None], waiting: Callable[[], None] = lambda: None
) -> Path:
    """Like `cached`, for long work: a `write` that was killed finds its partial files again.

    Of several processes one writes and the others wait; each calls `waiting` before it waits.
    `write` must recognize partial files it cannot use. If it raises an error, nothing is kept.
    """
    folder = cache_folder(kind) / key
    temporary = folder.with_name(f".{key}.part")
    if _is_cached(folder):
        return folder
    with user_errors(folder, CACHING):
        try:
            file_lock = lock(folder.with_name(f".{key}.lock"), waiting)
        except NoLocks:
            return cached(kind, key, write)
        try:
            if not _is_cached(folder):  # another process may have finished it
                make_private_folder(temporary)
                _complete(temporary, folder, write)
        finally:
            unlock(file_lock)
    return folder


def _complete(temporary: Path, folder: Path, write: Callable[[Path], None]) -> None:
    try:
        write(temporary)
        for file in temporary.iterdir():
            _flush(file, 0o600)
        shutil.rmtree(folder, ignore_errors=True)  # may be incomplete, after a full disk
        os.rename(temporary, folder)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class NoLocks(Exception):
    """This disk has no file locks."""


LOCKS_MISSING = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def lock(path: Path, waiting: Callable[[], None] | None = None, holder: str = "") -> "BaseFileLock":
    """Locks the file at `path`, which is made, until `unlock` or the end of the process.

    The file holds the text `holder`, for others to read. If another process has locked it, calls
    `waiting` and waits, or without it raises BlockingIOError. Raises NoLocks if the disk has none,
    OSError if the file cannot be made or is a link.
    """
    with warnings.catch_warnings():  # of a system without fcntl, where the file itself is the lock
        warnings.simplefilter("ignore")
        from filelock import FileLock, Timeout, UnixFileLock

        file_lock = FileLock(path, thread_local=False)
        if not path.parent.is_dir():  # filelock would make it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        try:
            # not 0 seconds: a process that ends may have removed the file before we locked it
            file_lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            if waiting is None:
                raise BlockingIOError(errno.EAGAIN, "locked", str(path)) from None
            waiting()
            file_lock.acquire()
        except NotImplementedError as error:  # filelock before version 4
            raise NoLocks from error
        except OSError as error:
            if error.errno in LOCKS_MISSING:
                raise NoLocks from error
            raise
    if isinstance(file_lock, UnixFileLock):  # the others keep their own text, or refuse any
        with suppress(OSError, UserError), ownership.open_to_extend(path) as file:
            file.truncate()
            file.write(holder.encode())
    return file_lock


def unlock(file_lock: "BaseFileLock") -> None:
    """Unlocks and removes what `lock` returned."""
    from filelock import UnixFileLock

    if isinstance(file_lock, UnixFileLock):  # the others do it themselves
        with suppress(OSError):  # before unlocking: whoever waits finds that it is no longer there
            Path(file_lock.lock_file).unlink()
    file_lock.release()
