"""Files and folders that are either whole or not there: written under a temporary name, flushed to disk, renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmcli.errors import ClosedPipe, UserError


@contextmanager
def user_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turns an operating system's refusal (no space, no permission, no such folder) into a UserError naming `path`.

    A closed pipe is no refusal: it becomes ClosedPipe.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot {doing}: {reason}", where=str(error.filename or path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it when the block ends well, removed when it does not.

    A link at `path` is replaced, never written through. Raises UserError when the disk or its permissions refuse.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with user_errors(path, "write"):
            yield part
            _flush(part)
            os.chmod(part, 0o666 & ~_umask())  # some writers make private files
            os.replace(part, path)
            _flush_entries(path.parent)
    finally:
        with suppress(OSError):  # on a disk that refuses, the error that ended the block is the one to tell
            part.unlink()


def read_json(file: Path, hint: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; UserError when there is none."""
    if not file.is_file():
        raise UserError(f"holds no {file.name}", where=str(file.parent), hint=hint)
    with user_errors(file, "read"):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(document, dict):
        raise UserError("is not a JSON object", where=str(file))
    return document


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file atomically, after looking whether the disk has room for it."""
    with user_errors(source, "read"):
        needed = source.stat().st_size
    require_room(path, needed)
    with atomic_path(path) as part:
        shutil.copyfile(source, part)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; renamed to it when the block ends well, removed when it does not.

    A folder or link already at `path` gives way only at the moment of the rename, and comes back if that fails.
    """
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        with user_errors(path, "write"):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            for file in part.iterdir():
                _flush(file)
            _flush_entries(part)
            if os.path.lexists(path):
                os.rename(path, old)  # aside and whole: deleting takes time, and a kill would leave half of it
            os.rename(part, path)
            _flush_entries(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
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


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_entries(folder: Path) -> None:
    """Has the names in a folder reach the disk: without it a machine that loses its power may have the file under its old
    name, or under none. Where a system cannot open a folder, or flush one, its own order of writing has to do."""
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


LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<end>part|old)|\.tmp[A-Za-z0-9]{6}")  # the last: a file of safetensors


def clear_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while they wrote left in a folder, in which nobody may be writing now. What
    they had put aside, and did not come to replace, gets its name back."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        if not found or (is_folder and not found["end"]):
            continue
        if found["end"] == "old" and not os.path.lexists(folder / found["name"]):
            os.rename(path, folder / found["name"])
        elif is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with user_errors(file, "read"), file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_room(path: Path, needed: int) -> None:
    """Raises UserError when the disk that holds `path` has not `needed` bytes, and a megabyte, left."""
    free, needed = free_bytes(path), needed + (1 << 20)
    if free < needed:
        raise UserError(f"no room on the disk: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free",
                        where=str(path), hint="free some room; what was saved before is intact")


def free_bytes(path: Path) -> int:
    """Bytes that can still be written on the disk that holds `path` (or its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size_of(tensors: dict) -> int:
    """Bytes that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file atomically, after looking whether the disk has room for it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_room(path, size_of(tensors))
    with atomic_path(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise UserError(f"cannot write: {error}", where=str(path)) from error


def read_tensors(path: Path, device: str = "cpu") -> dict:
    """The tensors of a .safetensors file, in the file's own dtype. Raises UserError naming a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with user_errors(path, "read"):
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise UserError(f"is damaged or no safetensors file ({error})", where=str(path),
                            hint="fetch or save it again") from error


def cache_folder() -> Path:
    """Where token ids, piped-in text and compiled kernels are kept: $LM_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LM_CACHE") or Path(base) / "lm")


def cached(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """The folder of the cache that `write` makes, of a kind and with a key made of all it depends on; made once."""
    folder = cache_folder() / kind / key
    if not (folder / "facts.json").is_file():
        with user_errors(folder, "write the token cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as part:
            write(part)
    return folder


def cached_in_steps(kind: str, key: str, write: Callable[[Path], None], waiting: Callable[[], None] = lambda: None) -> Path:
    """Like `cached`, for what takes long: what a `write` that was killed or interrupted has left in its folder is there
    again at the next call. Processes that want the same one let one of them write; `waiting` is called before a wait.

    What `write` cannot go on from it must know by itself; when it fails with an error, nothing is left.
    """
    folder = cache_folder() / kind / key
    part = folder.with_name(f".{key}.part")
    with user_errors(folder, "write the token cache"):
        while not (folder / "facts.json").is_file():
            part.mkdir(parents=True, exist_ok=True)
            with _locked(part, waiting) as mine:
                if mine and (folder / "facts.json").is_file():  # another process ended while this one came for the lock
                    shutil.rmtree(part, ignore_errors=True)
                elif mine:
                    _finish(part, folder, write)
    return folder


def _finish(part: Path, folder: Path, write: Callable[[Path], None]) -> None:
    try:
        write(part)
        for file in part.iterdir():
            _flush(file)
        shutil.rmtree(folder, ignore_errors=True)  # half of one, as a full disk may have left it
        os.rename(part, folder)
        (folder / LOCK).unlink()  # after it: while the lock is there, nobody takes the folder for one to write in
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise


LOCK = "lock"


@contextmanager
def _locked(folder: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Holds the lock in a folder, which ends with the process however that ends. False: the folder went away meanwhile."""
    import fcntl

    try:
        file = (folder / LOCK).open("a")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield os.fstat(file.fileno()).st_nlink > 0
