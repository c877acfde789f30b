"""Files as streams of bytes: plain, .gz, .zst, and rows of .parquet as JSON Lines."""

import codecs
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from lmcli.errors import UserError, import_extra
from lmcli.ownership import create, temporary_name
from lmcli.storage import cache_folder, free_bytes, near_names, user_errors
from lmcli.terminal import progress

COMPRESSED_SUFFIXES = (".gz", ".zst")  # may follow the suffix that names the format
COMPRESSED_BYTES = 1 << 16  # read at once
PARQUET_ROWS = 1024  # converted at once
PINNED_BYTES = 1 << 18  # copied at once
CHUNKS_BETWEEN = 256  # between two looks at the space that is free on the disk
LEAST_FREE = 1 << 30  # bytes that a copy leaves
STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # of this process only
ENDING = re.compile(r"(\.\w{1,8}){1,2}$", re.ASCII)  # of a pipe's name, which names its format
HEAD_BYTES = 1 << 16  # by which text is told from binary data
# how text in other encodings may begin, and the name that iconv has for it; the longer ones first
ENCODING_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# how compressed files begin, and what turns them into text
COMPRESSED_MARKS = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"PK\3\4", "unzip"),
)
FREQUENT = (
    "\n .,\u3001\u3002\uff0c"  # characters that any text in UTF-16 has among its first thousand
)


_typed_names: dict[str, str] = {}  # paths that `pin` has returned → the inputs' names


def display_name(file: str) -> str:
    """The name of an input in messages and results; bytes that are not UTF-8 show as U+FFFD."""
    file = _typed_names.get(file, file)
    if file == "-":
        return "standard input"
    return file if file.isascii() else os.fsencode(file).decode("utf-8", "replace")


def open_bytes(name: str) -> BinaryIO:
    """An unbuffered stream of a file's bytes, decompressed; "-" is standard input.

    Rows of a .parquet file are JSON Lines. `read(n)` returns what is there instead of waiting for n
    bytes. Raises OSError for a file that cannot be read or is damaged, UserError for a missing
    package.
    """
    if name == "-":
        return _opened(name, open(sys.stdin.fileno(), "rb", buffering=0, closefd=False))
    if name.endswith(".gz"):
        gzipped = _Gzip(name)
        progress.opened(name, gzipped.fileobj)
        return cast(BinaryIO, gzipped)
    if name.endswith((".zst", ".parquet")):
        open(name, "rb").close()  # raises for a missing file now, as for other files
        chunks = _zst_content(name) if name.endswith(".zst") else _parquet_rows(name)
        return cast(BinaryIO, _ChunkStream(name, chunks))
    return _opened(name, open(name, "rb", buffering=0))


def _opened(name: str, handle: BinaryIO) -> BinaryIO:
    progress.opened(name, handle)
    return handle


class _Gzip(gzip.GzipFile):
    """A .gz file; damage is an OSError that names it."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
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
    """The content of all frames, a block at a time; an incomplete last frame is damage.

    A block of a few bytes may hold 128 KB, so more than one block could fill the memory. The format
    is RFC 8878.
    """
    new_frame, error_type = _zst_library(name)
    with open(name, "rb") as handle:
        progress.opened(name, handle)

        def take(size: int) -> bytes:
            if len(data := handle.read(size)) < size:
                raise _damaged("zstd data", "it ends too early", name)
            return data

        while start := handle.read(1):
            magic = start + take(3)
            if magic[0] & 0xF0 == 0x50 and magic[1:] == ZST_SKIPPABLE:
                for size in _portions(int.from_bytes(take(4), "little")):
                    take(size)
                continue
            if magic != ZST_FRAME:
                where = f"no frame begins at byte {handle.tell() - 3:,}"
                raise _damaged("zstd data", where, name)
            header, has_checksum = _zst_header(take, name)
            frame = new_frame()
            try:
                yield frame.decompress(magic + header)
                last = False
                while not last:
                    block = take(3)
                    fields = int.from_bytes(block, "little")
                    last, is_run = bool(fields & 1), fields >> 1 & 3 == 1
                    yield frame.decompress(block + take(1 if is_run else fields >> 3))
                if has_checksum:
                    yield frame.decompress(take(4))
            except error_type as error:
                raise _damaged("zstd data", error, name) from error


ZST_FRAME, ZST_SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
ZST_WINDOW = 1 << 27  # bytes; the library's limit


def _zst_header(take: Callable[[int], bytes], name: str) -> tuple[bytes, bool]:
    """(the rest of a frame's header, whether a checksum ends the frame); UserError: huge window."""
    descriptor = take(1)
    flags = descriptor[0]
    single_segment = flags >> 5 & 1
    sizes = (single_segment, 2, 4, 8)[flags >> 6], (0, 1, 2, 4)[flags & 3]
    rest = take((not single_segment) + sum(sizes))
    if not single_segment:
        window = (8 + (rest[0] & 7)) << (rest[0] >> 3) + 7
        if window > ZST_WINDOW:
            raise UserError(
                f"needs {window / 1e6:,.0f} MB of memory, more than {ZST_WINDOW / 1e6:.0f} MB",
                where=name,
                hint="compress it with zstd --long=27 at most",
            )
    return descriptor + rest, bool(flags >> 2 & 1)


def _portions(size: int) -> Iterator[int]:
    """The size in portions that fit into memory."""
    for start in range(0, size, COMPRESSED_BYTES):
        yield min(COMPRESSED_BYTES, size - start)


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
    what = f"reading it needs the package {module.partition('.')[0]}"
    return import_extra(module, extra, what, where=name)


def _damaged(what: str, error: Exception | str, name: str) -> OSError:
    return OSError(5, f"damaged {what} ({' '.join(str(error).split())})", name)


# -- the beginning of a text


def text_chunks(
    handle: BinaryIO, name: str, size: int, keep_mark: bool = False, nul_separated: bool = False
) -> tuple[bytes, Iterator[bytes]]:
    """(a UTF-8 byte order mark at the start of a stream, or b""; chunks of what follows it).

    With `keep_mark` it is part of the chunks. Raises UserError for text in UTF-16 or UTF-32 and for
    compressed data. Texts that are `nul_separated` may look like UTF-16.
    """
    head = handle.read(size)
    marks = (codecs.BOM_UTF8, *(mark for mark, _ in ENCODING_MARKS))
    while any(mark != head and mark.startswith(head) for mark in marks):
        if not (more := handle.read(size)):
            break
        head += more
    refuse_other_encoding(head[:4] if nul_separated else head, name)
    mark = codecs.BOM_UTF8 if head.startswith(codecs.BOM_UTF8) and not keep_mark else b""

    def chunks() -> Iterator[bytes]:
        if rest := head[len(mark) :]:
            yield rest
        while chunk := handle.read(size):
            yield chunk

    return mark, chunks()


def limited(chunks: Iterable[bytes], name: str, limit: int) -> Iterator[bytes]:
    """The chunks; UserError once they have more bytes than the limit."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise UserError(
                f"more than {limit / 1e6:,.0f} MB for one text",
                where=display_name(name),
                hint="give less at once",
            )
        yield chunk


def refuse_other_encoding(head: bytes, name: str) -> None:
    """Raises UserError for the beginning of UTF-16, UTF-32 or compressed data: what converts it."""
    where, plain = display_name(name), name != "-" and not name.endswith(COMPRESSED_SUFFIXES)
    file = f" {display_name(name)}" if plain else ""
    for mark, tool in COMPRESSED_MARKS:
        if head.startswith(mark):
            command = f"{tool} -dc{file}" if tool != "unzip" else f"unzip -p{file}"
            raise UserError(
                f"is {tool.removeprefix('un')} data, not text",
                where=where,
                hint=f"decompress it: {command} | lm …",
            )
    if encoding := other_encoding(head):
        raise UserError(
            f"is {encoding} text, and only UTF-8 can be read",
            where=where,
            hint=f"convert it: iconv -f {encoding} -t UTF-8{file} > NEW_FILE",
        )


def other_encoding(head: bytes) -> str:
    """The encoding, UTF-16 or UTF-32, of text that begins like this; "" for any other data.

    Without a byte order mark: by the high bytes, or where it is not UTF-8 by the most frequent
    characters of Chinese and Japanese.
    """
    for mark, name in ENCODING_MARKS:
        if head.startswith(mark):
            return name
    head = head[: min(len(head), HEAD_BYTES) // 4 * 4]
    if len(head) < 8 or (head.isascii() and b"\0" not in head):
        return ""
    # UTF-32: no character above U+10FFFF
    if not any(head[3::4]) and max(head[2::4]) <= 0x10 and any(head[::4]):
        return "UTF-32LE"
    if not any(head[::4]) and max(head[1::4]) <= 0x10 and any(head[3::4]):
        return "UTF-32BE"
    # UTF-16: of all alphabets the high byte is below 0x20, as no byte of text is but line ends
    even, odd = (sum(byte < 0x20 for byte in head[i::2]) * 2 / len(head) for i in (0, 1))
    if min(even, odd) < 0.3 and max(even, odd) > 0.9:
        return "UTF-16LE" if odd > even else "UTF-16BE"
    if _is_utf8(head):
        return ""
    little, big = (_frequent_share(head, name) for name in ("utf-16-le", "utf-16-be"))
    return "" if max(little, big) < 0.01 else "UTF-16LE" if little > big else "UTF-16BE"


def _is_utf8(head: bytes) -> bool:
    """True if UTF-8 begins like this; its last character may be incomplete."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and error.reason == "unexpected end of data"
    return True


def _frequent_share(head: bytes, encoding: str) -> float:
    text = head.decode(encoding, "replace")
    return sum(map(text.count, FREQUENT)) / max(1, len(text))


# -- files of arguments


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
            raise UserError(
                f"no such file or directory{near_names(argument)}",
                where=argument,
                hint="give a file or a folder, or pipe text in",
            )
        visible = _visible_files(path, include or "*")
        texts = [name for name in visible if _is_text(name)]
        skipped += len(visible) - len(texts)
        if not texts:
            named = f" with --include {include}" if include else ""
            hint = f"none of its {len(visible):,} files{named} is UTF-8 text"
            if not visible:
                hint = f"it has no files{named or ' that are not hidden'}"
            raise UserError("holds no text files", where=argument, hint=hint)
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
    if b"\0" in head or not head.removeprefix(codecs.BOM_UTF8):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:  # fine if only a last character is incomplete
        return error.start > len(head) - 4 and len(head) == HEAD_BYTES
    return True


# -- copies of input that can be read again


def pin(file: str) -> str:
    """The file itself if it can be read twice, else the path of a copy in the cache.

    Standard input and pipes are copied; the copy is named by its content, so that a run on it can
    be resumed. `display_name` of the copy is that of the file. Raises UserError for a device that
    never ends, such as /dev/zero, and for a pipe that would fill the disk.
    """
    with user_errors(display_name(file), "read"):
        path = Path(file)
        is_stream = path.exists() and not (path.is_file() or path.is_dir())
        if not (file == "-" or file.startswith(STREAMS) or is_stream):
            return file
        source = open_bytes("-") if file == "-" else open(file, "rb", buffering=0)
    ending = ENDING.search(file)
    with source:
        _require_end(source, display_name(file))
        action = f"keep {display_name(file)}"
        chunks = _chunks_of(source, display_name(file))
        copy = write_pinned("stdin", ending[0] if ending else ".txt", action, chunks)
    _typed_names[copy] = file
    return copy


def pin_absolute(file: str) -> str:
    """The absolute path of `pin`, for what is stored; `display_name` of it is that of the file."""
    path = str(Path(pin(file)).absolute())
    _typed_names.setdefault(path, file)
    return path


def _require_end(source: BinaryIO, name: str) -> None:
    """Raises UserError for a device that never ends: any but a terminal and /dev/null."""
    facts = os.fstat(source.fileno())
    is_null = os.path.exists(os.devnull) and os.path.samestat(facts, os.stat(os.devnull))
    if stat.S_ISCHR(facts.st_mode) and not (is_null or source.isatty()):
        raise UserError("is a device that never ends", name, "give a file or a pipe")


def _chunks_of(source: BinaryIO, name: str) -> Iterator[bytes]:
    with user_errors(name, "read"):
        for number in itertools.count(1):
            if not (chunk := source.read(PINNED_BYTES)):
                return
            if number % CHUNKS_BETWEEN == 0 and free_bytes(cache_folder()) < LEAST_FREE:
                raise UserError(
                    "cannot be copied: little of the disk is free",
                    where=name,
                    hint=f"free space for {cache_folder()}, or name another folder by LM_CACHE",
                )
            yield chunk


def write_pinned(folder_name: str, suffix: str, action: str, chunks: Iterable[bytes]) -> str:
    """Writes chunks to a file in a folder of the cache, named by its content; returns the path.

    Raises UserError, which names the `action`, when it cannot be written.
    """
    folder, digest = cache_folder(folder_name), hashlib.sha256()
    unfinished = temporary_name(folder / "new")
    with user_errors(folder, action):
        try:
            with create(unfinished) as out:
                for chunk in chunks:
                    digest.update(chunk)
                    out.write(chunk)
            target = folder / f"{digest.hexdigest()[:16]}{suffix}"
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    return str(target)
