"""Files as streams of bytes: plain, .gz, .zst, and rows of .parquet as JSON Lines."""

import gzip
import importlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from lmcli.errors import UserError
from lmcli.storage import user_errors

COMPRESSED_SUFFIXES = (".gz", ".zst")  # may follow the suffix that names the format
COMPRESSED_BYTES = 1 << 16  # read at once; the content may be some hundred times as much
PARQUET_ROWS = 1024  # converted at once
HEAD_BYTES = 1 << 16  # by which text is told from binary data


def open_bytes(name: str) -> BinaryIO:
    """An unbuffered stream of a file's bytes, decompressed; "-" is standard input.

    Rows of a .parquet file are JSON Lines. `read(n)` returns what is there instead of waiting for n
    bytes. Raises OSError for a file that cannot be read or is damaged, UserError for a missing
    package.
    """
    if name == "-":
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    if name.endswith(".gz"):
        return cast(BinaryIO, _Gzip(name))
    if name.endswith((".zst", ".parquet")):
        open(name, "rb").close()  # raises for a missing file now, as for other files
        chunks = _zst_content(name) if name.endswith(".zst") else _parquet_rows(name)
        return cast(BinaryIO, _ChunkStream(name, chunks))
    return open(name, "rb", buffering=0)


class _Gzip(gzip.GzipFile):
    """A .gz file; damage is an OSError that names it."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except (EOFError, zlib.error) as error:
            raise _damaged("gzip data", error, self.name) from error


class _ChunkStream(io.RawIOBase):
    """A stream of the bytes in chunks of any size; it can skip forward."""

    def __init__(self, name: str, chunks: Iterator[bytes]):
        self.name, self._chunks, self._chunk, self._at, self._passed = name, chunks, b"", 0, 0

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes, of what is there; -1: all."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(COMPRESSED_BYTES), b""))
        while self._at == len(self._chunk):
            following = next(self._chunks, None)
            if following is None:
                return b""
            self._passed, self._chunk, self._at = self._passed + len(self._chunk), following, 0
        data = self._chunk[self._at : self._at + size]
        self._at += len(data)
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Skips to a later position, or to the end if that comes first."""
        if whence != io.SEEK_SET or position < self._passed + self._at:
            raise io.UnsupportedOperation("only forward")
        while position > self._passed + len(self._chunk):
            self._at = len(self._chunk)
            if not self.read(1):
                return self._passed + self._at
        self._at = position - self._passed
        return position

    def close(self) -> None:
        """Closes the file too."""
        cast(Any, self._chunks).close()  # a generator, which has the file open
        super().close()


def _zst_content(name: str) -> Iterator[bytes]:
    """The content of all frames; an incomplete last one is damage."""
    new_frame, error_type = _zst_library(name)
    with open(name, "rb", buffering=0) as handle:
        frame, inside = new_frame(), False
        while data := handle.read(COMPRESSED_BYTES):
            while data:
                try:
                    content = frame.decompress(data)
                except error_type as error:
                    raise _damaged("zstd data", error, name) from error
                inside, data = not frame.eof, frame.unused_data if frame.eof else b""
                frame = frame if inside else new_frame()
                yield content
    if inside:
        raise _damaged("zstd data", "it ends too early", name)


def _zst_library(name: str) -> tuple[Callable[[], Any], type[Exception]]:
    """(makes a decompressor of one frame, its error): Python's own (3.14), else the package's."""
    with suppress(ImportError):
        library = importlib.import_module("compression.zstd")
        return library.ZstdDecompressor, library.ZstdError
    library = _import("zstandard", "zstd", name)
    return lambda: library.ZstdDecompressor().decompressobj(), library.ZstdError


def _parquet_rows(name: str) -> Iterator[bytes]:
    """The rows as JSON Lines, in chunks, without columns of bytes (pictures, sound).

    A value that JSON has no form for, such as a date, is written as its text.
    """
    arrow, parquet = (_import(module, "parquet", name) for module in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(name, pre_buffer=False) as file:
            columns = [
                column.name for column in file.schema_arrow if "binary" not in str(column.type)
            ]
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                rows = [
                    json.dumps(row, ensure_ascii=False, default=str) for row in batch.to_pylist()
                ]
                yield "".join([f"{row}\n" for row in rows]).encode()
    except (arrow.ArrowException, UnicodeError) as error:
        raise _damaged("Parquet file", error, name) from error


def _import(module: str, extra: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"reading it needs the package {module.partition('.')[0]}",
            where=name,
            hint=f"pip install 'lmcli[{extra}]'",
        ) from error


def _damaged(what: str, error: Exception | str, name: str) -> OSError:
    return OSError(5, f"damaged {what} ({' '.join(str(error).split())})", name)


def expand(
    arguments: tuple[str, ...] | list[str], include: str | None = None
) -> tuple[list[str], int]:
    """(files, number of skipped ones): directories replaced by their text files, sorted.

    Without arguments: standard input. In directories hidden files are ignored and binary files
    skipped; a file that is named itself is always taken. Raises UserError for what does not exist
    and for a directory without text.
    """
    files: list[str] = []
    skipped = 0
    for argument in arguments or ("-",):
        path = Path(argument)
        with user_errors(argument, "read"):  # a name too long, a folder that may not be entered
            is_file = argument == "-" or (path.exists() and not path.is_dir())
        if is_file:
            files.append(argument)
            continue
        if not path.is_dir():
            raise UserError("no such file or directory", where=argument)
        visible = _visible_files(path, include or "*")
        texts = [name for name in visible if _is_text(name)]
        skipped += len(visible) - len(texts)
        if not texts:
            suffix = f" with --include {include}" if include else ""
            raise UserError(
                "holds no text files", where=argument, hint=f"{len(visible)} files read{suffix}"
            )
        files += texts
    return files, skipped


def _visible_files(folder: Path, include: str) -> list[str]:
    files = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            os.path.join(root, name)
            for name in names
            if not name.startswith(".") and Path(name).match(include)
        ]
    return sorted(name for name in files if os.path.isfile(name))


def _is_text(name: str) -> bool:
    try:
        with open_bytes(name) as handle:
            head = handle.read(HEAD_BYTES)
    except OSError:
        return False
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:  # fine if only a last character is incomplete
        return error.start > len(head) - 4 and len(head) == HEAD_BYTES
    return bool(head)
