"""Matrices as small integers with one scale a group: int8 and int4, in numpy alone.

On disk they are in the "pack-quantized" format of the library compressed-tensors, which vLLM and
transformers read. A matrix NAME.weight (O, I) is stored as three tensors. NAME.weight_packed holds
the integers, the first in the lowest bits of an int32. NAME.weight_scale (O, I / group) holds the
float factors, NAME.weight_shape the two sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcli.errors import UserError

GROUP = 32  # inputs that share a scale
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
PACK_QUANTIZED, COMPRESSED_TENSORS = "pack-quantized", "compressed-tensors"
# settings of a quantization that change its numbers → the values that lm reads
READABLE: dict[str, tuple[Any, ...]] = {
    "type": ("int",),
    "symmetric": (True,),
    "dynamic": (False,),
    "num_bits": (4, 8),
    "strategy": ("group", "channel"),
    "actorder": (None, "weight", "static"),
    "block_structure": (None,),
}
DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False, "num_bits": 8}


class PackedMatrix(NamedTuple):
    """A matrix (O, I) as stored: int32 words (O, ceil(I · bits / 32)) and scales (O, groups)."""

    words: NDArray[np.int32]
    scales: NDArray[Any]
    bits: int
    columns: int

    def values(self) -> NDArray[np.int8]:
        """The integers, (O, I)."""
        return unpack(self.words, self.bits, self.columns)

    def weight(self) -> NDArray[np.float32]:
        """The matrix, (O, I)."""
        return dequantize_groups(self.values(), self.scales)


def quantize_groups(
    weight: NDArray[Any], bits: int, group: int = GROUP
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers (O, I) and float32 scales (O, I / group) of a finite matrix (O, I).

    A group's scale is its largest magnitude / 127 (4 bits: 7), and each integer is the nearest one,
    so an error is half a scale at most. `group` must divide I.

    >>> values, scales = quantize_groups(np.array([[0.0, 7.0, -3.6, 2.0]]), bits=4, group=2)
    >>> values.tolist(), scales.tolist()
    ([[0, 7, -7, 4]], [[1.0, 0.5142857432365417]])
    """
    rows, columns = weight.shape
    most = 2 ** (bits - 1) - 1
    groups = np.asarray(weight, np.float32).reshape(rows, columns // group, group)
    scales = np.abs(groups).max(-1, initial=0.0) / np.float32(most)
    scales = np.where(scales > 0, scales, np.float32(1))  # a group of zeros
    values = np.rint(groups / scales[..., None]).clip(-most, most).astype(np.int8)
    return values.reshape(rows, columns), scales


def dequantize_groups(values: NDArray[np.int8], scales: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 matrix (O, I) of integers (O, I) and scales (O, groups)."""
    rows, columns = values.shape
    groups = values.reshape(rows, scales.shape[1], -1).astype(np.float32)
    groups *= scales.astype(np.float32)[..., None]
    return groups.reshape(rows, columns)


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Integers (O, I) of 8 or 4 bits → int32 (O, ceil(I · bits / 32)), 0 stored as 2^(bits − 1)."""
    count = 32 // bits
    stored = values.view(np.uint8) + np.uint8(1 << (bits - 1))  # modulo 256
    stored = np.pad(stored, ((0, 0), (0, -stored.shape[1] % count)))
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] * np.uint8(16)
    return np.ascontiguousarray(stored).view("<i4").astype(np.int32, copy=False)


def unpack(words: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """The inverse of `pack`, int8 (O, columns)."""
    stored = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(words), -1)
    offset = np.uint8(256 - (1 << (bits - 1)))  # subtracted modulo 256
    return (stored + offset).view(np.int8)[:, :columns]


def quantization_config(bits: int, ignored: Sequence[str], group: int = GROUP) -> dict[str, Any]:
    """`quantization_config` of a config.json: all linear layers but the `ignored` modules."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACK_QUANTIZED,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": sorted(ignored),
    }


def quantized_bits(document: Mapping[str, Any], where: str) -> int:
    """Bits of the quantized weights that a config.json announces; 0 for plain weights.

    Raises UserError naming a format, or a setting of it, that lm does not read.
    """
    settings = document.get("quantization_config")
    if settings is None:
        return 0
    settings = settings if isinstance(settings, dict) else {}
    method, layout = settings.get("quant_method"), settings.get("format", PACK_QUANTIZED)
    if (method, layout) != (COMPRESSED_TENSORS, PACK_QUANTIZED):
        name = method if method != COMPRESSED_TENSORS else f"{method} format {layout}"
        raise UserError(
            f"weights quantized by {name} are not supported",
            where=where,
            hint="take the model in float32, bfloat16 or float16, or as GGUF; lm export --int8 "
            "or --int4 makes it small",
        )
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if settings.get(key):
            raise _unsupported(key, "that is set", where)
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    bits = {_bits(scheme, where) for scheme in schemes}
    if len(bits) != 1:
        raise _unsupported("config_groups", f"{len(bits)} schemes", where)
    return bits.pop()


def _bits(scheme: Any, where: str) -> int:
    scheme = scheme if isinstance(scheme, dict) else {}
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        raise _unsupported("weights", weights, where)
    for key in ("input_activations", "output_activations"):
        if scheme.get(key) is not None:
            raise _unsupported(key, "that are quantized", where)
    for key, values in READABLE.items():
        value = weights.get(key, DEFAULTS.get(key))
        if key == "strategy" and value is None:
            value = "group" if weights.get("group_size") else "channel"
        if isinstance(value, list | dict) or value not in values:
            raise _unsupported(key, repr(value), where)
    return int(weights.get("num_bits", DEFAULTS["num_bits"]))


def _unsupported(key: str, value: Any, where: str) -> UserError:
    return UserError(
        f"quantization_config: {key} {value} is not supported",
        where=where,
        hint="lm reads pack-quantized int8 and int4 with one symmetric scale a group",
    )


def packed_matrix(
    tensors: Mapping[str, NDArray[Any]], module: str, bits: int, where: str
) -> PackedMatrix:
    """The stored matrix of a module. Raises UserError if its three tensors do not fit together."""
    names = [f"{module}{end}" for end in (PACKED, SCALE, SHAPE)]
    for name in names:
        if name not in tensors:
            raise UserError(f"has no tensor {name}", where=where)
    words, scales, shape = (tensors[name] for name in names)
    rows, columns = (int(size) for size in shape) if shape.shape == (2,) else (-1, -1)
    expected = (rows, -(-columns * bits // 32))
    groups = scales.shape[1] if scales.ndim == 2 else 0
    fits = words.dtype == np.int32 and words.shape == expected and len(scales) == rows
    if not fits or not groups or columns % groups:
        raise UserError(
            f"{names[0]} {words.shape}, {names[1]} {scales.shape} and {names[2]} "
            f"{shape.tolist()} do not fit together in {bits} bits",
            where=where,
            hint="the file is damaged: download or save it again",
        )
    return PackedMatrix(words, scales, bits, columns)
