"""The header of a GGUF file: its metadata, and where its tensors lie.

Files come from strangers, so every length and offset is compared with the size of the file before
it is used. (Format: ggml's docs/gguf.md, versions 2 and 3.)
"""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmcli.errors import UserError
from lmcli.storage import user_errors

GGUF_SUFFIX = ".gguf"
MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
# numbers of the types of values → how struct spells them
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
# options of ours → keys behind the architecture's name
SIZE_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
KEY_HEADS = "attention.head_count_kv"
HEAD_SIZES = ("attention.key_length", "attention.value_length")
NORM_KEYS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
ROPE_SIZE, ROPE_BASE = "rope.dimension_count", "rope.freq_base"
ROPE_TYPE, ROPE_FACTOR = "rope.scaling.type", "rope.scaling.factor"
ROPE_CONTEXT, PARALLEL = "rope.scaling.original_context_length", "use_parallel_residual"
WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LOCAL_BASE = "rope.freq_base_swa"
READ_KEYS = {
    *SIZE_KEYS.values(),
    *HEAD_SIZES,
    *NORM_KEYS.values(),
    *(KEY_HEADS, ROPE_SIZE, ROPE_BASE, ROPE_TYPE, ROPE_FACTOR, ROPE_CONTEXT, PARALLEL),
    *(WINDOW, WINDOW_PATTERN, LOCAL_BASE),
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"),
}


class StoredGgufTensor(NamedTuple):
    """A tensor of a file: its sizes, slowest first, the number of its type, its first byte."""

    shape: tuple[int, ...]
    type: int
    start: int


class GgufHeader(NamedTuple):
    """What a file says before its numbers."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredGgufTensor]


def is_gguf(path: str | Path) -> bool:
    """True if a name means a GGUF file."""
    return str(path).endswith(GGUF_SUFFIX)


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises UserError naming the file if it is damaged, or one of several parts of a model.
    """
    with user_errors(path, "read"), path.open("rb") as file:
        size = path.stat().st_size
        if file.read(4) != MAGIC:
            raise UserError("is no GGUF file", where=str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(_Cursor(data))
            except (_DamagedHeader, UnicodeDecodeError) as error:
                raise UserError(
                    f"is damaged: {error}", where=str(path), hint="download it again"
                ) from None
    shards = header.metadata.get("split.count", 1)
    if shards not in (0, 1):
        raise UserError(
            f"is one of {shards} parts of a model",
            where=str(path),
            hint="join them with llama.cpp's llama-gguf-split --merge",
        )
    outside = [name for name, tensor in header.tensors.items() if tensor.start >= size]
    if outside:
        raise UserError(f"is cut off: {outside[0]} is behind its end", where=str(path))
    return header


class _DamagedHeader(Exception):
    """The header is not what the format says."""


class _Cursor:
    """Reads values one after the other, never behind the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4  # behind the magic bytes

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes; returns the old place."""
        if size > len(self.data) - self.at:
            raise _DamagedHeader(f"{size:,} bytes at {self.at:,} go beyond its end")
        self.at += size
        return self.at - size

    def numbers(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        """`count` numbers of a type of struct."""
        format_ = f"<{count}{kind}"
        if count >= 1 << 60:  # more than struct can count
            raise _DamagedHeader(f"a list of {count:,} values")
        at = self.skip(count * struct.calcsize(f"<{kind}"))
        return struct.unpack_from(format_, self.data, at)

    def string(self) -> str:
        (size,) = self.numbers("Q")
        at = self.skip(size)
        return self.data[at : at + size].decode("utf-8")

    def value(self) -> Any:
        """A value behind its type: a number, a string, or a list of these."""
        (kind,) = self.numbers("I")
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _DamagedHeader(f"a value of unknown type {kind}")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        if kind != STRING or count > len(self.data):
            raise _DamagedHeader(f"a list of {count:,} values of type {kind}")
        return [self.string() for _ in range(count)]


def _parse(cursor: _Cursor) -> GgufHeader:
    (version,) = cursor.numbers("I")
    if version not in GGUF_VERSIONS:
        raise _DamagedHeader(f"version {version} is none of {GGUF_VERSIONS}")
    tensor_count, value_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise _DamagedHeader(f"the key {key!r} stands twice")
        metadata[key] = cursor.value()
    offsets: dict[str, StoredGgufTensor] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.numbers("I")
        if name in offsets or not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _DamagedHeader(
                f"the tensor {name!r} stands twice, or has {dimensions} dimensions"
            )
        shape = cursor.numbers("Q", dimensions)[::-1]
        offsets[name] = StoredGgufTensor(shape, *cursor.numbers("I"), *cursor.numbers("Q"))
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise _DamagedHeader(f"{ALIGNMENT_KEY} is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        metadata, {name: t._replace(start=start + t.start) for name, t in offsets.items()}
    )


def required(keys: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key; of a list with a value for each layer the one that they all have."""
    value = keys.get(key)
    if isinstance(value, list) and len({*map(str, value)}) == 1:
        value = value[0]
    if not isinstance(value, int | float):
        raise UserError(f"{key} is {value!r}, not one number", where=where)
    return value


def decimal(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
