"""decode_step.c's view of a model: its structures, filled with pointers to a decoder's weights.

Weights are numpy's arrays, of float32 numbers or of the bits of bfloat16 ones (uint16): nothing
here loads torch.
"""

import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcli.config import ModelConfig
from lmcli.kernels import build
from lmcli.kernels.processor import thread_count
from lmcli.model.positions import rotary_frequencies

BFLOAT16 = np.dtype("V2")  # two bytes: numpy has no such numbers
BFLOAT16_BITS = np.dtype(np.uint16)
CONVERTED_BY_ONE_THREAD = 1 << 18  # numbers; fewer take less time than waking the other threads
ARRAY_TYPES = {np.dtype(np.float32): "float32", BFLOAT16_BITS: "bfloat16"}
WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
BLOCK_OUTPUTS = 16  # outputs whose weights decode_products.h interleaves
WEIGHT_GROUP = 32  # integer weights that share a scale
ARENA_BYTES = 1 << 26  # only what is written takes memory
ACTIVATION_NUMBERS = {
    "silu": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "relu": 3,
    "tanh": 4,
}

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
Weight = NDArray[np.float32] | NDArray[np.uint16]
_long, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _fields(kind: type, names: str) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names.split())


class _Matrix(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "weight scales bias"), *_fields(_long, "type outputs inputs")]


class _Norm(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "weight bias")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_Norm, "attention_norm query_norm key_norm attention_out_norm"),
        *_fields(_Norm, "cross_norm cross_query_norm mlp_norm mlp_out_norm"),
        *_fields(_Matrix, "query key value output cross_query cross_output gate up down"),
        *_fields(_long, "window local"),
        *_fields(_pointer, "keys values cross_keys cross_values"),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(_long, "layers hidden heads key_heads head_dim vocabulary rotary"),
        *_fields(_long, "capacity cross_capacity cache_type rms post_norm parallel activation"),
        *_fields(_float, "eps attention_scale logit_scale"),
        *_fields(_pointer, "layer"),
        ("final_norm", _Norm),
        ("head", _Matrix),
        *_fields(_pointer, "relative"),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "data packed scales offsets"), *_fields(_long, "stride")]


class _Call(ctypes.Structure):
    _fields_ = [
        *_fields(_long, "rows logit_rows longest"),
        *_fields(_pointer, "slot position source source_length logit_row"),
        *_fields(_pointer, "cos sin local_cos local_sin x logits"),
        *_fields(_Rows, "normed query mixed inner"),
        *_fields(_pointer, "key value scores part"),
    ]


def needs_torch(config: ModelConfig) -> bool:
    """True for a model of which decode_step.c can run a part at most.

    Every decoder of the families in `checkpoints` runs in C. A T5's or BART's does too, but its
    encoder and what follows its embedding need torch. No family of decoders has the other options.
    """
    return (
        config.shape != "decoder"
        or config.head != "lm"
        or config.positions not in ("rotary", "learned")
        or bool(config.embedding_norm or config.type_vocab_size)
        or config.head_dense
        or config.head_norm
    )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that a decoder without an encoder has, as in `Transformer`."""
    size, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    width, key_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    normed = config.norm == "layer" and config.norm_bias
    biased, all_biased = config.attention_bias != "none", config.attention_bias == "all"

    def add(name: str, *shape: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    add("embedding", config.vocab_size, size)
    if config.positions == "learned":
        add("decoder.positions", config.max_position_embeddings + config.position_offset, size)
    for i in range(config.num_hidden_layers):
        layer = f"decoder.layers.{i}"
        if i or config.first_attention_norm:
            add(f"{layer}.attention_norm", size, bias=normed)
        add(f"{layer}.attention.query", width, size, bias=biased)
        add(f"{layer}.attention.key", key_width, size, bias=biased)
        add(f"{layer}.attention.value", key_width, size, bias=biased)
        add(f"{layer}.attention.output", size, width, bias=all_biased)
        if config.query_key_norm:
            add(f"{layer}.attention.query_norm", head_dim)
            add(f"{layer}.attention.key_norm", head_dim)
        add(f"{layer}.mlp_norm", size, bias=normed)
        if config.sandwich_norm:
            add(f"{layer}.attention_out_norm", size, bias=normed)
            add(f"{layer}.mlp_out_norm", size, bias=normed)
        if config.gated_mlp:
            add(f"{layer}.mlp.gate", inner, size, bias=config.mlp_bias)
        add(f"{layer}.mlp.up", inner, size, bias=config.mlp_bias)
        add(f"{layer}.mlp.down", size, inner, bias=config.mlp_bias)
    if not config.post_norm:
        add("decoder.norm", size, bias=normed)
    add("head.output", config.vocab_size, size, bias=config.head_bias)
    if config.tie_word_embeddings:
        del shapes["head.output.weight"]
    return shapes


class DecoderWeights:
    """The weights of a decoder as structures of decode_step.c, from parameters by their names.

    Matrices are copied, interleaved, as `weight_type` ("float32", "bfloat16", "int8", "int4"; None:
    the type of the embedding); norms and biases are float32. `finish_embedding` makes the first
    block's input of embeddings (N, C) at positions (N,), `relative_bias` a table (H, n) of what is
    added to scores by distance: an encoder–decoder brings them.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, Weight],
        finish_embedding: Callable[[Array, Integers], Array] | None = None,
        relative_bias: Callable[[int], Array] | None = None,
        weight_type: str | None = None,
    ):
        self.config, self._parameters = config, parameters
        self.finish_embedding, self.relative_bias = finish_embedding, relative_bias
        self._arrays: list[NDArray[Any]] = []  # what the pointers point to
        self._arena = Arena()
        self.embedding = parameters["embedding.weight"]
        self.weight_type = weight_type or ARRAY_TYPES[self.embedding.dtype]
        positions = parameters.get("decoder.positions.weight")
        self.positions = None if positions is None else float_array(positions)
        self.rotary = _rotary(config)
        types = config.resolved_layer_types(config.num_hidden_layers)
        self.layers = (_Layer * len(types))()
        for i, kind in enumerate(types):
            self.layers[i] = self._layer(f"decoder.layers.{i}")
            if kind == "sliding_attention":
                self.layers[i].window = config.sliding_window
                self.layers[i].local = bool(config.local_rope_theta)
        divisor = config.query_pre_attn_scalar or config.head_dim
        self.model = _Model(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocabulary=config.vocab_size,
            rotary=config.rotary_size if config.positions == "rotary" else 0,
            rms=config.norm == "rms",
            post_norm=config.post_norm,
            parallel=config.parallel_block,
            activation=ACTIVATION_NUMBERS[config.hidden_act],
            eps=config.norm_eps,
            attention_scale=divisor**-0.5 if config.scale_attention else 1.0,
            logit_scale=config.hidden_size**-0.5 if config.scale_logits else 1.0,
            final_norm=self._norm("decoder.norm"),
            head=self._matrix("head.output", default=self.embedding),  # tied
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a step reads: all but the embedding and positions."""
        return sum(array.nbytes for array in self._arrays)

    def _layer(self, name: str) -> _Layer:
        return _Layer(
            attention_norm=self._norm(f"{name}.attention_norm"),
            query_norm=self._norm(f"{name}.attention.query_norm"),
            key_norm=self._norm(f"{name}.attention.key_norm"),
            query=self._matrix(f"{name}.attention.query"),
            key=self._matrix(f"{name}.attention.key"),
            value=self._matrix(f"{name}.attention.value"),
            output=self._matrix(f"{name}.attention.output"),
            attention_out_norm=self._norm(f"{name}.attention_out_norm"),
            cross_norm=self._norm(f"{name}.cross_norm"),
            cross_query_norm=self._norm(f"{name}.cross.query_norm"),
            cross_query=self._matrix(f"{name}.cross.query"),
            cross_output=self._matrix(f"{name}.cross.output"),
            mlp_norm=self._norm(f"{name}.mlp_norm"),
            mlp_out_norm=self._norm(f"{name}.mlp_out_norm"),
            gate=self._matrix(f"{name}.mlp.gate"),
            up=self._matrix(f"{name}.mlp.up"),
            down=self._matrix(f"{name}.mlp.down"),
        )

    def _matrix(self, name: str, default: Weight | None = None) -> _Matrix:
        """A matrix (outputs, inputs) with its bias, or an empty one."""
        weight = self._parameters.get(f"{name}.weight", default)
        if weight is None:
            return _Matrix()
        kind = type_of(weight.shape[1], self.weight_type)
        numbers, scales = interleave(weight, kind, self._arena)
        bias = self._floats(f"{name}.bias")
        pointers = self._pointer(numbers), self._pointer(scales), bias
        return _Matrix(*pointers, WEIGHT_TYPES[kind], *weight.shape)

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._floats(f"{name}.weight"), self._floats(f"{name}.bias"))

    def _floats(self, name: str) -> int | None:
        """A parameter in float32, if the decoder has it."""
        parameter = self._parameters.get(name)
        return None if parameter is None else self._pointer(float_array(parameter))

    def _pointer(self, numbers: NDArray[Any]) -> int:
        self._arrays.append(np.ascontiguousarray(numbers))
        return self._arrays[-1].ctypes.data


def zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of zeros at a multiple of 64 bytes, so that a vector lies in one cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


class Arena:
    """Arrays that lie one after the other in a few large blocks of memory.

    The system gives large blocks in pages of 2 MiB: a step that reads matrices of 1 to 3 MB in
    pages of 4 KiB waits for page tables, and for the processor to fetch ahead anew in each page.
    """

    def __init__(self) -> None:
        self._free = np.zeros(0, np.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """As the function `zeros`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._free):
            self._free = zeros((max(size, ARENA_BYTES),), np.uint8)
        array, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return array.view(dtype).reshape(shape)


def type_of(inputs: int, weight_type: str) -> str:
    """The type of a matrix with so many inputs: integers need whole groups, else bfloat16."""
    return "bfloat16" if weight_type.startswith("int") and inputs % WEIGHT_GROUP else weight_type


def interleave(
    weight: Weight, kind: str, arena: Arena
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """A matrix (O, I) as decode_products.h reads it: its bytes, and the scales of integers.

    Integers are rounded to the nearest, in groups of WEIGHT_GROUP inputs with a scale in bfloat16.
    """
    rows: NDArray[Any] = np.ascontiguousarray(weight)
    outputs, inputs = rows.shape
    blocks, padded = -(-outputs // BLOCK_OUTPUTS), -(-inputs // WEIGHT_GROUP) * WEIGHT_GROUP
    bits = {"float32": 32 * inputs, "bfloat16": 16 * padded, "int8": 8 * padded, "int4": 4 * padded}
    groups = inputs // WEIGHT_GROUP if kind.startswith("int") else 0
    numbers = arena.zeros((blocks * BLOCK_OUTPUTS * bits[kind] // 8,), np.uint8)
    scales = arena.zeros((blocks * groups * BLOCK_OUTPUTS,), np.uint16)
    pointers = numbers.ctypes.data, scales.ctypes.data, None
    matrix = _Matrix(*pointers, WEIGHT_TYPES[kind], outputs, inputs)
    source = rows.ctypes.data, WEIGHT_TYPES[ARRAY_TYPES[rows.dtype]]
    function = _function("interleave", _pointer, _pointer, _long, _long)
    threads = thread_count() if rows.size >= CONVERTED_BY_ONE_THREAD else 1
    function(ctypes.byref(matrix), *source, threads)
    return numbers, scales


def _rotary(config: ModelConfig) -> dict[str, tuple[Array, np.float32]]:
    """(frequencies (R/2,), factor on cos and sin) of full and of local layers ("local_")."""
    if config.positions != "rotary":
        return {}
    rules = {"": (config, config.rope_theta)}
    if config.local_rope_theta:
        rules["local_"] = replace(config, rope_type="default"), config.local_rope_theta
    tables = {}
    for prefix, (options, theta) in rules.items():
        # powers in float64, so that the result is torch's up to its rounding
        index = np.arange(config.rotary_size // 2, dtype=np.float32)
        frequencies, factor = rotary_frequencies(options, np.float64(theta), index)
        tables[prefix] = frequencies.astype(np.float32), np.float32(factor)
    return tables


def float_array(weight: Weight) -> Array:
    """The numbers of a weight in float32, contiguous."""
    if weight.dtype == BFLOAT16_BITS:
        return (np.ascontiguousarray(weight).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(weight, np.float32)


def in_precision(numbers: NDArray[Any], dtype: str) -> Weight:
    """Numbers of any floating-point type (see BFLOAT16) as a Weight in float32 or bfloat16.

    What is in `dtype` already is not copied.
    """
    if numbers.dtype == BFLOAT16:
        bits: NDArray[np.uint16] = numbers.view(BFLOAT16_BITS)
        return bits if dtype == "bfloat16" else float_array(bits)
    floats = numbers.astype(np.float32, copy=False)
    return _round_to_bfloat16(floats) if dtype == "bfloat16" else floats


def weights_from_files(
    config: ModelConfig,
    parameters: Mapping[str, NDArray[Any]],
    precision: str,
    weight_type: str | None = None,
) -> DecoderWeights:
    """DecoderWeights of parameters as files hold them, see BFLOAT16; precision is of the embedding.

    `interleave` rounds the matrices of the layers, so that they are read once.
    """

    def weight(name: str, numbers: NDArray[Any]) -> Weight:
        stored = "bfloat16" if numbers.dtype == BFLOAT16 else "float32"
        is_matrix = numbers.ndim == 2 and not name.startswith(("embedding", "decoder.positions"))
        return in_precision(numbers, stored if is_matrix else precision)

    weights = {name: weight(name, numbers) for name, numbers in parameters.items()}
    return DecoderWeights(config, weights, weight_type=weight_type)


def _round_to_bfloat16(numbers: Array) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even, as torch rounds."""
    numbers = np.ascontiguousarray(numbers)
    bits = np.empty(numbers.shape, np.uint16)
    threads = thread_count() if numbers.size >= CONVERTED_BY_ONE_THREAD else 1
    arguments = numbers.ctypes.data, bits.ctypes.data, numbers.size, threads
    _function("round_to_bfloat16", _pointer, _pointer, _long, _long)(*arguments)
    return bits


def forward(model: _Model, call: _Call) -> None:
    """Runs decode_step.c's `decode_step` on all threads."""
    step = _function("decode_step", _pointer, _pointer, _long)
    step(ctypes.byref(model), ctypes.byref(call), thread_count())


def log_sums(logits: Array) -> NDArray[np.float64]:
    """log Σ exp of each row (R, V), in nats; NaN or infinite as `sampling.log_sum_exp` says."""
    logits = np.ascontiguousarray(logits)
    sums = np.empty(len(logits))
    threads = thread_count() if logits.size >= CONVERTED_BY_ONE_THREAD else 1
    function = _function("log_sums", _pointer, _long, _long, _pointer, _long)
    function(logits.ctypes.data, *logits.shape, sums.ctypes.data, threads)
    return sums


def largest_columns(scores: Array, count: int) -> Integers:
    """The columns (R, n) of the largest scores (R, V) of each row, NaN first; n ≤ `count`, V."""
    scores = np.ascontiguousarray(scores)
    count = min(count, scores.shape[1])
    columns = np.empty((len(scores), count), np.int64)
    threads = thread_count() if scores.size >= CONVERTED_BY_ONE_THREAD else 1
    function = _function("largest_columns", _pointer, _long, _long, _long, _pointer, _long)
    function(scores.ctypes.data, *scores.shape, count, columns.ctypes.data, threads)
    return columns


def read_rate(data: NDArray[Any]) -> float:
    """Bytes a second at which all threads read an array from memory, once."""
    read = _function("read_memory", _pointer, _long, _long)
    started = time.perf_counter()
    read(data.ctypes.data, data.nbytes, thread_count())
    return data.nbytes / (time.perf_counter() - started)


@functools.cache
def _function(name: str, *argument_types: type) -> Callable[..., None]:
    function = getattr(build.library(), name)
    function.argtypes, function.restype = argument_types, None
    return function  # type: ignore[no-any-return]
