"""The layers of a block other than attention: norms, the MLP, and position encodings.

Letters used in shapes, here and in `attention`, `transformer` and `heads`:
B batch size, T query positions, S key positions, C hidden size, V vocabulary size,
H query heads, K key–value heads, D size of a head, R size of its rotated part.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.positions import rotary_frequencies

gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
}


class Linear(nn.Linear):
    """x Wᵀ + b, (…, inputs) → (…, outputs), in the precision of x, which may be lower than W's."""

    multiply: Callable[..., Tensor] = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.multiply(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias over the last axis (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), bias, self.eps)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm that a configuration names, over the hidden size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)) (SwiGLU, GeGLU: Shazeer 2020)."""

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        sizes = config.hidden_size, intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate = Linear(*sizes, bias=config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(*sizes, bias=config.mlp_bias)
        self.down = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def rotary_embedding(positions: Tensor, config: ModelConfig, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, 1, T, R) float32, for integer positions (B, T).

    Both halves of R hold the same R/2 angles.
    """
    index = torch.arange(config.rotary_size // 2, device=positions.device)
    frequencies, factor = rotary_frequencies(config, theta, index)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, R/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, R)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + R/2]) of every head. x (B, heads, T, D); cos, sin (…, T, R).

    If R is less than D, the rest of each head does not change.
    """
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, R/2) each
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def sinusoidal_embedding(positions: Tensor, size: int) -> Tensor:
    """(…, size) float32: [sin, cos] of position / 10000^(2i/size) (Vaswani et al. 2017)."""
    steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * 10_000.0 ** (-steps / size)
    return torch.cat([angles.sin(), angles[..., : size // 2].cos()], dim=-1)


class RelativeBias(nn.Module):
    """Adds to each score a learned number per head and distance (T5: Raffel et al. 2020, §2.1).

    Distances fall into buckets. Half of the buckets hold one distance each, the others ever wider
    ranges up to `max_distance`. A bidirectional stack has separate buckets for later keys.
    """

    def __init__(self, config: ModelConfig, heads: int, bidirectional: bool):
        super().__init__()
        self.table = nn.Embedding(config.relative_attention_num_buckets, heads)
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional

    def forward(self, past: int, queries: int) -> Tensor:
        """(1, H, T, S) for T queries from position `past` on, and S = past + T keys."""
        at = torch.arange(past + queries, device=self.table.weight.device)
        return self.table(self.bucket(at[None, :] - at[past:, None])).permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance, key position − query position; same shape, int64."""
        buckets, first = self.table.num_embeddings, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, wide)
