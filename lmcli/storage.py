"""Atomic files and folders: written under a temporary name, flushed to disk, then renamed."""

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
def user_errors(path: Path | str, action: str) -> Iterator[None]:
    """Turns an OSError (no space, no permission, no such folder) into a UserError naming `path`.

    A closed pipe becomes ClosedPipe instead.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot {action}: {reason}", where=str(error.filename or path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`: renamed to it when the block succeeds, removed otherwise.

    A link at `path` is replaced, never followed. Raises UserError when the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with user_errors(path, "write"):
            yield part
            _flush(part)
            os.chmod(part, 0o666 & ~_umask())  # some libraries create private files
            os.replace(part, path)
            _flush_entries(path.parent)
    finally:
        with suppress(OSError):  # the error that ended the block is the one to report
            part.unlink()


def read_json(file: Path, hint: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; UserError when there is none."""
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
    """Copies a file atomically, after checking that the disk has space for it."""
    with user_errors(source, "read"):
        needed = source.stat().st_size
    require_disk_space(path, needed)
    with atomic_path(path) as part:
        shutil.copyfile(source, part)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`: renamed to it when the block succeeds, removed otherwise.

    A folder or link at `path` is replaced at the moment of the rename, and restored if that fails.
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
            if os.path.lexists(path):  # renamed first: a kill while deleting would leave half of it
                os.rename(path, old)
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
    with atomic_path(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise UserError(f"cannot write: {error}", where=str(path)) from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The tensors of a .safetensors file in their stored dtype; UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with user_errors(path, "read"):
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise UserError(
                f"is damaged or no safetensors file ({error})",
                where=str(path),
                hint="download or save it again",
            ) from error


def cache_folder() -> Path:
    """Folder for token ids, piped text and compiled kernels: $LM_CACHE, else the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LM_CACHE") or Path(base) / "lm")


def cached(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """The cache folder that `write` fills, created once; `key` identifies all it depends on."""
    folder = cache_folder() / kind / key
    if not (folder / "facts.json").is_file():
        with user_errors(folder, "write the token cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as part:
            write(part)
    return folder


def cached_resumable(
    kind: str, key: str, write: Callable[[Path], None], waiting: Callable[[], None] = lambda: None
) -> Path:
    """Like `cached`, for long work: a `write` that was killed finds its partial files again.

    Of several processes one writes and the others wait; each calls `waiting` before it waits.
    `write` must recognize partial files it cannot use. If it raises an error, nothing is kept.
    """
    folder = cache_folder() / kind / key
    part = folder.with_name(f".{key}.part")
    with user_errors(folder, "write the token cache"):
        while not (folder / "facts.json").is_file():
            part.mkdir(parents=True, exist_ok=True)
            with _locked(part, waiting) as locked:
                if locked and (folder / "facts.json").is_file():  # another process has finished
                    shutil.rmtree(part, ignore_errors=True)
                elif locked:
                    _complete(part, folder, write)
    return folder


def _complete(part: Path, folder: Path, write: Callable[[Path], None]) -> None:
    try:
        write(part)
        for file in part.iterdir():
            _flush(file)
        shutil.rmtree(folder, ignore_errors=True)  # may be incomplete, after a full disk
        os.rename(part, folder)
        (folder / LOCK).unlink()  # last: until then, no other process writes into the folder
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise


LOCK = "lock"


@contextmanager
def _locked(folder: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Locks a folder until the block or the process ends; False if the folder was removed."""
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
