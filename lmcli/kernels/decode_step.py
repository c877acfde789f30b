"""decode_step.c's view of a model: its structures, filled with pointers to a decoder's weights."""

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.kernels import build
from lmcli.kernels.fast_path import FastTransformer
from lmcli.model.layers import rotary_frequencies
from lmcli.model.transformer import Block, Transformer

DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
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
_long, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _fields(kind: type, names: str) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names.split())


class _Matrix(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "weight bias"), *_fields(_long, "outputs inputs")]


class _Norm(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "weight bias")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_Norm, "attention_norm query_norm key_norm cross_norm cross_query_norm mlp_norm"),
        *_fields(_Matrix, "query key value output cross_query cross_output gate up down"),
        *_fields(_long, "window local"),
        *_fields(_pointer, "keys values cross_keys cross_values"),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(_long, "dtype layers hidden heads key_heads head_dim vocabulary rotary"),
        *_fields(_long, "capacity cross_capacity rms post_norm parallel activation"),
        *_fields(_float, "eps attention_scale logit_scale"),
        *_fields(_pointer, "layer"),
        ("final_norm", _Norm),
        ("head", _Matrix),
        *_fields(_pointer, "relative"),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "data packed"), *_fields(_long, "stride")]


class _Call(ctypes.Structure):
    _fields_ = [
        *_fields(_long, "rows logit_rows longest"),
        *_fields(_pointer, "slot position source source_length logit_row"),
        *_fields(_pointer, "cos sin local_cos local_sin x logits"),
        *_fields(_Rows, "normed query mixed inner"),
        *_fields(_pointer, "key value scores"),
    ]


def supports(model: Transformer) -> bool:
    """True if decode_step.c can run this model's decoder: fast path, on a CPU, no adapters."""
    if type(model) is not FastTransformer:
        return False
    config, weight = model.config, model.embedding.weight
    plain_head = config.head == "lm" and not (config.head_dense or config.head_norm)
    return (
        config.shape != "encoder"
        and plain_head
        and build.serve(weight.device)
        and weight.dtype in DTYPE_NUMBERS
        and all(
            type(parameter) is nn.Parameter and parameter.dtype == weight.dtype
            for parameter in model.parameters()
        )
        and not any(name.endswith(".lora_a") for name, _ in model.named_parameters())
    )


class DecoderWeights:
    """The weights of a model's decoder as structures of decode_step.c.

    Matrices are used where they are; those that are not contiguous are copied once. Norms and
    biases are float32.
    """

    def __init__(self, model: Transformer):
        config, stack = model.config, model.stacks()[-1]
        self.version = version(model)
        self._tensors: list[Tensor] = []  # what the pointers point to
        self.embedding = array(model.embedding.weight)
        self.positions = None if stack.positions is None else float_array(stack.positions.weight)
        self.rotary = _rotary(config)
        types = config.resolved_layer_types(config.num_hidden_layers)
        self.layers = (_Layer * len(types))()
        for i, (block, kind) in enumerate(zip(model.blocks()[-len(types) :], types)):
            self.layers[i] = self._layer(block)
            if kind == "sliding_attention":
                self.layers[i].window = config.sliding_window
                self.layers[i].local = bool(config.local_rope_theta)
        self.model = _Model(
            dtype=DTYPE_NUMBERS[model.embedding.weight.dtype],
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
            attention_scale=config.head_dim**-0.5 if config.scale_attention else 1.0,
            logit_scale=config.hidden_size**-0.5 if config.scale_logits else 1.0,
            final_norm=self._norm(stack.norm),
            head=self._matrix(getattr(model.head, "output", None)),
        )

    def _layer(self, block: Block) -> _Layer:
        attention, cross, mlp = block.attention, block.cross, block.mlp
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            query_norm=self._norm(attention.query_norm),
            key_norm=self._norm(attention.key_norm),
            query=self._matrix(attention.query),
            key=self._matrix(attention.key),
            value=self._matrix(attention.value),
            output=self._matrix(attention.output),
            cross_norm=self._norm(block.cross_norm),
            cross_query_norm=self._norm(None if cross is None else cross.query_norm),
            cross_query=self._matrix(None if cross is None else cross.query),
            cross_output=self._matrix(None if cross is None else cross.output),
            mlp_norm=self._norm(block.mlp_norm),
            gate=self._matrix(mlp.gate),
            up=self._matrix(mlp.up),
            down=self._matrix(mlp.down),
        )

    def _matrix(self, linear: nn.Linear | None) -> _Matrix:
        if linear is None:
            return _Matrix()
        outputs, inputs = linear.weight.shape
        bias = None if linear.bias is None else self._pointer(linear.bias.float())
        return _Matrix(self._pointer(linear.weight), bias, outputs, inputs)

    def _norm(self, norm: nn.Module | None) -> _Norm:
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is None:
            return _Norm()
        return _Norm(
            self._pointer(weight.float()), None if bias is None else self._pointer(bias.float())
        )

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _rotary(config: ModelConfig) -> dict[str, tuple[Array, np.float32]]:
    """(frequencies (R/2,), factor on cos and sin) of full and of local layers ("local_")."""
    if config.positions != "rotary":
        return {}
    rules = {"": (config, config.rope_theta)}
    if config.local_rope_theta:
        rules["local_"] = replace(config, rope_type="default"), config.local_rope_theta
    tables = {}
    for prefix, (options, theta) in rules.items():
        frequencies, factor = rotary_frequencies(options, theta, torch.device("cpu"))
        tables[prefix] = frequencies.numpy(), np.float32(factor)
    return tables


def float_array(tensor: Tensor) -> Array:
    """The numbers of a tensor in float32, contiguous."""
    return tensor.detach().float().contiguous().numpy()


def array(tensor: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A tensor's own memory: float32 numbers, or the bits of bfloat16 ones."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def version(model: Transformer) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is replaced or changed in place, as in training."""
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    )


_cached: "weakref.WeakKeyDictionary[Transformer, DecoderWeights]" = weakref.WeakKeyDictionary()


def weights_of(model: Transformer) -> DecoderWeights:
    """The DecoderWeights of a model in its present state."""
    weights = _cached.get(model)
    if weights is None or weights.version != version(model):
        weights = _cached[model] = DecoderWeights(model)
    return weights


def forward(model: _Model, call: _Call) -> None:
    """Runs decode_step.c's `decode_step` on all threads of torch."""
    _function()(ctypes.byref(model), ctypes.byref(call), torch.get_num_threads())


@functools.cache
def _function() -> Callable[..., None]:
    function = build.library().decode_step  # type: ignore[union-attr]  # `supports` says it is there
    function.argtypes, function.restype = [_pointer, _pointer, _long], None
    return function
