"""Files as streams of bytes, whatever they are packed in: plain, .gz, .zst, and the rows of .parquet as JSON Lines."""

import gzip
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any, BinaryIO

from lmcli.errors import UserError

PACKED = (".gz", ".zst")  # what may stand behind the suffix that tells the format
PACKED_BYTES = 1 << 16  # read at once; what comes out may be some hundred times as much
ROWS_AT_ONCE = 1024


def open_bytes(name: str) -> BinaryIO:
    """An unbuffered binary stream of a file, of a .gz or .zst file's content, of a .parquet file's rows as JSON Lines, or of
    standard input ("-").

    Its `read(n)` returns what is there instead of waiting for n bytes. Raises OSError for a file that cannot be read or is
    damaged, UserError where a package is missing, naming the extra that brings it.
    """
    if name == "-":
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    if name.endswith(".gz"):
        return _Gzip(name)
    if name.endswith((".zst", ".parquet")):
        open(name, "rb").close()  # what is not there is told now, as of other files
        return _Stream(name, _zst_content(name) if name.endswith(".zst") else _parquet_rows(name))
    return open(name, "rb", buffering=0)


class _Gzip(gzip.GzipFile):
    """A .gz whose damage is an OSError that names the file."""

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except (EOFError, gzip.zlib.error) as error:
            raise _damaged("gzip data", error, self.name) from error


class _Stream(io.RawIOBase):
    """Bytes that come in chunks of any size, to be read, or skipped forward, as those of a file."""

    def __init__(self, name: str, chunks: Iterator[bytes]):
        self.name, self._chunks, self._chunk, self._at, self._passed = name, chunks, b"", 0, 0

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, of what is there; -1: all."""
        if size < 0:
            return b"".join(iter(lambda: self.read(PACKED_BYTES), b""))
        while self._at == len(self._chunk):
            following = next(self._chunks, None)
            if following is None:
                return b""
            self._passed, self._chunk, self._at = self._passed + len(self._chunk), following, 0
        found = self._chunk[self._at:self._at + size]
        self._at += len(found)
        return found

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Skips to a position, which must lie ahead, or to the end where that comes first."""
        if whence != io.SEEK_SET or position < self._passed + self._at:
            raise io.UnsupportedOperation("only forward")
        while position > self._passed + len(self._chunk):
            self._at = len(self._chunk)
            if not self.read(1):
                return self._passed + self._at
        self._at = position - self._passed
        return position

    def close(self) -> None:
        """Closes the file below."""
        self._chunks.close()
        super().close()


def _zst_content(name: str) -> Iterator[bytes]:
    """The content of all frames; a last one that is cut off is damage."""
    new, error_kind = _zst_library(name)
    with open(name, "rb", buffering=0) as handle:
        frame, inside = new(), False
        while data := handle.read(PACKED_BYTES):
            while data:
                try:
                    content = frame.decompress(data)
                except error_kind as error:
                    raise _damaged("zstd data", error, name) from error
                inside, data = not frame.eof, frame.unused_data if frame.eof else b""
                frame = frame if inside else new()
                yield content
    if inside:
        raise _damaged("zstd data", "it ends too early", name)


def _zst_library(name: str) -> tuple[Callable[[], Any], type[Exception]]:
    """(what makes a decompressor of one frame, the error it raises): Python's own from 3.14 on, else the package's."""
    with suppress(ImportError):
        library = importlib.import_module("compression.zstd")
        return library.ZstdDecompressor, library.ZstdError
    library = _package("zstandard", "zstd", name)
    return lambda: library.ZstdDecompressor().decompressobj(), library.ZstdError


def _parquet_rows(name: str) -> Iterator[bytes]:
    """The rows as JSON Lines, one row group after another, without columns that hold bytes (pictures, sound); what JSON
    has no form for, such as a date, is written as its text."""
    arrow, parquet = (_package(module, "parquet", name) for module in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(name, pre_buffer=False) as file:
            columns = [column.name for column in file.schema_arrow if "binary" not in str(column.type)]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                rows = [json.dumps(row, ensure_ascii=False, default=str) for row in batch.to_pylist()]
                yield "".join([f"{row}\n" for row in rows]).encode()
    except (arrow.ArrowException, UnicodeError) as error:
        raise _damaged("Parquet file", error, name) from error


def _package(module: str, extra: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading it needs the package {module.partition('.')[0]}", where=name,
                        hint=f"pip install 'lmcli[{extra}]'") from error


def _damaged(what: str, error: Exception | str, name: str) -> OSError:
    return OSError(5, f"damaged {what} ({' '.join(str(error).split())})", name)
