"""The decoding state of a Transformer: in C where model and machine allow it, else by PyTorch."""

import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lmcli.kernels import build
from lmcli.kernels.decode_step import Array, DecoderWeights, Integers, Weight
from lmcli.kernels.fast_decoding import LANES, CrossHeads, FastDecodingState, in_blocks
from lmcli.kernels.fast_path import FastTransformer
from lmcli.model.cached_forward import DecodingState, encode_different
from lmcli.model.layers import sinusoidal_embedding
from lmcli.model.transformer import Transformer

State = DecodingState | FastDecodingState


def decoding_state(
    model: Transformer,
    sequences: list[list[int]],
    sources: list[list[int]] | None,
    capacity: int,
    weight_type: str | None = None,
) -> State:
    """A FastDecodingState where the model and the machine allow it, else a DecodingState.

    The former's matrices are of `weight_type` (see DecoderWeights).
    """
    if not supports(model):
        return DecodingState(model, sequences, sources, capacity)
    return fast_state(model, sequences, sources, capacity, weight_type)


def fast_state(
    model: Transformer,
    sequences: list[list[int]],
    sources: list[list[int]] | None,
    capacity: int,
    weight_type: str | None = None,
) -> FastDecodingState:
    """A FastDecodingState of a model that `supports` accepts; equal sources are encoded once."""
    encode = partial(_cross_heads, model)
    heads = None if sources is None else encode(sources)
    return FastDecodingState(weights_of(model, weight_type), sequences, capacity, heads, encode)


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
        and weight.dtype in (torch.float32, torch.bfloat16)
        and all(
            type(parameter) is nn.Parameter and parameter.dtype == weight.dtype
            for parameter in model.parameters()
        )
        and not any(name.endswith(".lora_a") for name, _ in model.named_parameters())
    )


def version(model: Transformer) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is replaced or changed in place, as in training."""
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    )


_cached: "weakref.WeakKeyDictionary[Transformer, tuple[object, DecoderWeights]]" = (
    weakref.WeakKeyDictionary()
)


def weights_of(model: Transformer, weight_type: str | None = None) -> DecoderWeights:
    """The DecoderWeights of a model in its present state, of the last `weight_type` asked for."""
    present = version(model), weight_type
    cached_version, weights = _cached.get(model, (None, None))
    if weights is None or cached_version != present:
        parameters = {name: _array(weight) for name, weight in model.named_parameters()}
        options = _finish_embedding(model), _relative_bias(model)
        weights = DecoderWeights(model.config, parameters, *options, weight_type)
        _cached[model] = present, weights
    return weights


def _array(tensor: Tensor) -> Weight:
    """A tensor's own memory: float32 numbers, or the bits of bfloat16 ones."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _numbers(tensor: Tensor) -> Array:
    return tensor.detach().float().contiguous().numpy()


def _finish_embedding(model: Transformer) -> Callable[[Array, Integers], Array] | None:
    """Sinusoidal positions and the norm after the embedding, for a model that has them."""
    norm, sinusoidal = model.stacks()[-1].embedding_norm, model.config.positions == "sinusoidal"
    if norm is None and not sinusoidal:
        return None
    dtype = model.embedding.weight.dtype
    table = np.empty((0, model.config.hidden_size), np.float32)  # of the first positions

    @torch.inference_mode()
    def finish(x: Array, positions: Integers) -> Array:
        nonlocal table
        if sinusoidal:
            if (most := int(positions.max())) >= len(table):
                table = sinusoidal_embedding(torch.arange(2 * most + 2), x.shape[1]).numpy()
            x = x + table[positions]
        return x if norm is None else _numbers(norm(torch.from_numpy(x).to(dtype)))

    return finish


def _relative_bias(model: Transformer) -> Callable[[int], Array] | None:
    """T5's bias by distance, (H, n) for n distances, for a model that has one."""
    relative = model.stacks()[-1].relative
    if relative is None:
        return None
    return lambda count: _numbers(relative.table(relative.bucket(-torch.arange(count))).T)


@torch.inference_mode()
def _cross_heads(model: Transformer, sources: list[list[int]]) -> CrossHeads:
    """Keys and values of each layer's cross-attention to the encoder's output."""
    (states, mask), source_of = encode_different(model, sources)
    keys, values = [], []
    for block in model.blocks()[-model.config.num_hidden_layers :]:
        cross = block.cross
        assert cross is not None
        key, value = cross.project_keys(states)
        keys.append(in_blocks(_whole_blocks(cross.split_heads(key, cross.key_norm))))
        values.append(_whole_blocks(cross.split_heads(value)))
    rows, longest = states.shape[:2]
    lengths = np.full(rows, longest) if mask is None else mask.sum(1).numpy()
    return CrossHeads(keys, values, lengths.astype(np.int64), np.array(source_of, np.int64))


def _whole_blocks(heads: torch.Tensor) -> Array:
    """Keys or values (sources, K, S, D) in float32, with zeros up to a multiple of LANES tokens."""
    return _numbers(torch.nn.functional.pad(heads, (0, 0, 0, -heads.shape[2] % LANES)))
