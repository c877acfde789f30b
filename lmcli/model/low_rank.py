"""Products of two narrow matrices added to a matrix (LoRA: Hu et al. 2021): the sum, a block's way through and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.model.dropout import dropped


class LowRank(NamedTuple):
    """What is added to a matrix (out, in): scale · b a (LoRA: Hu et al. 2021), with a (rank, in) and b (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float


def added(weight: Tensor, low: LowRank | None) -> Tensor:
    """The matrix with what is added to it."""
    return weight if low is None else torch.addmm(weight, low.b, low.a, alpha=low.scale)


class Additions(NamedTuple):
    """What is added to the matrices that read the same x (N, in): to each (out, in) or None, out of each, and the dropout
    between x and what is added, one mask for all of them. With it, the sums are never made."""

    lows: tuple[LowRank | None, ...]
    outputs: list[int]
    share: float
    seed: int

    @property
    def _ranks(self) -> list[int]:
        return [0 if low is None else len(low.a) for low in self.lows]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x times the matrices (Σ out, in), which hold what is added unless there is dropout: (N, Σ out)."""
        y = x @ weight.T
        if self.share and any(self.lows):
            narrow = self._narrow(dropped(x, self.share, self.seed)).split(self._ranks, dim=1)
            for part, own, low in zip(y.split(self.outputs, dim=1), narrow, self.lows):
                if low:
                    part.addmm_(own, low.b.T.to(x.dtype), alpha=low.scale)
        return y

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """That of x, from that of the product."""
        dx = dy @ weight
        if self.share and any(self.lows):
            dx = dropped(self._above(dy) @ self._joined_a(dy.dtype), self.share, self.seed, dx)
        return dx

    def gradients(self, dy: Tensor, x: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """(that of a, that of b) of each: da = (dy b)ᵀ x and db = dyᵀ (x aᵀ), each times the scale. Without the matrix's own
        a third of a block's work is spared."""
        if not any(self.lows):
            return [(None, None)] * len(self.lows)
        x = dropped(x, self.share, self.seed)
        das = (self._above(dy).T @ x).split(self._ranks)
        each = zip(self.lows, das, dy.split(self.outputs, dim=1), self._narrow(x).split(self._ranks, dim=1))
        return [(da.to(low.a.dtype), (part.T @ own).to(low.b.dtype).mul_(low.scale)) if low else (None, None)
                for low, da, part, own in each]

    def _narrow(self, x: Tensor) -> Tensor:
        """x aᵀ of each, (N, Σ ranks)."""
        return x @ self._joined_a(x.dtype).T

    def _above(self, dy: Tensor) -> Tensor:
        """scale · dy b of each, (N, Σ ranks)."""
        return torch.cat([part @ (low.b * low.scale).to(dy.dtype)
                          for part, low in zip(dy.split(self.outputs, dim=1), self.lows) if low], dim=1)

    def _joined_a(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([low.a for low in self.lows if low]).to(dtype)
