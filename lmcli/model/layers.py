"""The parts of a block other than attention: norm, gated MLP, rotary positions.

Letters used in shapes, here and in `attention` and `transformer`:
B rows, T tokens read now, S tokens that can be seen, C hidden size, H query heads, K key–value heads, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)): SwiGLU (Shazeer 2020). (B, T, C) → (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, 1, T, D) float32, of rotary positions (Su et al. 2021) for integer positions (B, T).

    Angle i of the D/2 angles is position · theta^(−2i/D); both halves of D carry the same angles.
    """
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-steps / head_dim)  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of every head by their angles. x: (B, heads, T, D); cos, sin: (B, 1, T, D)."""
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return x * cos + torch.cat([-second, first], dim=-1) * sin
