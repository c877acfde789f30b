"""The parts of a block other than attention: norms, MLP, and the ways to tell a position.

Letters used in shapes, here and in `attention` and `transformer`:
B rows, T tokens read now, S tokens that can be seen, C hidden size, H query heads, K key–value heads, D width of a head.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model import fused
from lmcli.model.low_rank import LowRank, added

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu, "gelu_new": _gelu_tanh,
               "gelu_pytorch_tanh": _gelu_tanh, "gelu_fast": _gelu_tanh}
CURVES = {F.silu: fused.SILU, _gelu_tanh: fused.GELU_TANH}


class Linear(nn.Linear):
    """x Wᵀ + b, (…, C) → (…, outputs), in the precision of x, which may be lower than that of the weights. `low` is what an
    adapter adds to W (see `adapters`)."""

    low: LowRank | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @property
    def matrix(self) -> Tensor:
        """W (outputs, C) with what an adapter adds to it."""
        return self.weight

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where there is an adapter, the factors (…, rank) and (outputs, rank) of what training adds to x Wᵀ, the first ·
        the secondᵀ."""
        return None


def together(x: Tensor, *parts: Linear) -> tuple[Tensor, ...]:
    """What each of some matrices makes of x (…, C): in training by one product, whose gradients are larger and fewer."""
    if not torch.is_grad_enabled() or any(part.low for part in parts):
        return tuple(part(x) for part in parts)
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts]).to(x.dtype)
    made = F.linear(x, torch.cat([part.weight for part in parts]).to(x.dtype), bias)
    return made.split([part.out_features for part in parts], dim=-1)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fused.active(x):
            return fused.rms_norm(x, self.weight, self.eps)
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
    """The norm of a configuration, over the hidden size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)) (SwiGLU, GeGLU: Shazeer 2020). (B, T, C) → (B, T, C)."""

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            inner = self.up(x)
            if self.activation is _gelu_tanh and fused.active(inner) and not inner.requires_grad:
                return self.down(fused.gelu_tanh_(inner))
            return self.down(self.activation(inner))
        if self.activation in CURVES and self.gate.bias is None and fused.active(x):
            parts = self.gate, self.up
            if torch.is_grad_enabled() and any(part.low for part in parts):
                gate_up = torch.cat([part(x) for part in parts], dim=-1)
            else:
                gate_up = F.linear(x, torch.cat([added(part.weight, part.low) for part in parts]).to(x.dtype))
            return self.down(fused.gated(gate_up, CURVES[self.activation]))
        gate, up = together(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


def rotary_frequencies(config: ModelConfig, theta: float, device: torch.device) -> tuple[Tensor, float]:
    """(angles a position turns by, (R/2,) float32; factor on cos and sin) for the R turned numbers of a head.

    Plain rotary turns by theta^(−2i/R) (Su et al. 2021). To read more than a model was trained on, "linear" divides all
    of them by `rope_factor` (Chen et al. 2023), "llama3" only the slow ones, and "yarn" the slow ones while it sharpens
    attention (Peng et al. 2023).
    """
    size = config.rotary_size
    angles = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    factor, trained = config.rope_factor, config.rope_original_context or config.max_position_embeddings
    if config.rope_type == "linear":
        return angles / factor, 1.0
    if config.rope_type == "llama3":
        turns = trained * angles / (2 * math.pi)  # whole turns within the context of training
        slow, fast = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
        return angles * (kept + (1 - kept) / factor), 1.0
    if config.rope_type == "yarn":
        def place(turns: float) -> float:
            return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), size - 1)
        ramp = ((torch.arange(size // 2, device=device) - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        return angles * (1 - ramp + ramp / factor), 0.1 * math.log(factor) + 1.0
    return angles, 1.0


def rotation(positions: Tensor, config: ModelConfig, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, 1, T, R) float32, of rotary positions for integer positions (B, T).

    Both halves of R carry the same R/2 angles.
    """
    angles, factor = rotary_frequencies(config, theta, positions.device)
    angles = positions[:, None, :, None].float() * angles  # (B, 1, T, R/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, R)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + R/2]) of every head by their angles. x: (B, heads, T, D); cos, sin: (B, 1, T, R).

    Where R is less than D, the rest of each head is left as it is.
    """
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, R/2) each
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """(…, size) float32: sin in the first half and cos in the second of position / 10000^(2i/size) (Vaswani et al. 2017)."""
    steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * 10_000.0 ** (-steps / size)
    return torch.cat([angles.sin(), angles[..., :size // 2].cos()], dim=-1)


class RelativeBias(nn.Module):
    """A number a head for how far a key stands from its query, added to their score (T5: Raffel et al. 2020, §2.1).

    Distances fall into buckets: one each up to half of them, then ever wider ones up to `max_distance`; where both
    directions are seen, half of the buckets are for keys that come after.
    """

    def __init__(self, config: ModelConfig, heads: int, both_directions: bool):
        super().__init__()
        self.table = nn.Embedding(config.relative_attention_num_buckets, heads)
        self.max_distance, self.both_directions = config.relative_attention_max_distance, both_directions

    def forward(self, past: int, read: int) -> Tensor:
        """(1, H, T, S) for T queries at positions `past` and on, and S = past + T keys."""
        at = torch.arange(past + read, device=self.table.weight.device)
        return self.table(self.bucket(at[None, :] - at[past:, None])).permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each key position minus query position."""
        buckets, first = self.table.num_embeddings, 0
        if self.both_directions:
            buckets //= 2
            first = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, wide)
