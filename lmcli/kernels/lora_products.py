"""Products with several matrices at once and their LoRA branches, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcli.kernels import products
from lmcli.kernels.dropout import dropped
from lmcli.model.lora import LowRank


class LoraProducts(NamedTuple):
    """Products of one x (N, in) with several matrices, each (out, in) with a LoRA branch or None.

    `outputs` are the matrices' `out`. With `dropout`, the branches read x behind one mask, drawn
    from `seed`; without it the caller has added them to the matrices, and only `gradients` sees
    them.
    """

    branches: tuple[LowRank | None, ...]
    outputs: list[int]
    dropout: float
    seed: int
    trained: bool = True  # inference leaves products as they are

    @property
    def _separate(self) -> bool:
        return bool(self.dropout) and any(self.branches)

    @property
    def _ranks(self) -> list[int]:
        return [0 if lora is None else len(lora.a) for lora in self.branches]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x times the joined matrices (Σ out, in), and the branches if separate: (N, Σ out)."""
        padded = products.padded(x) if self.trained else x
        y = products.matmul(padded, weight.T) if self.trained else x @ weight.T
        if self._separate:
            inner = self._inner(dropped(x, self.dropout, self.seed)).split(self._ranks, dim=1)
            for columns, xa, lora in zip(y.split(self.outputs, dim=1), inner, self.branches):
                if lora:
                    columns.addmm_(products.padded(xa), lora.b.T.to(x.dtype), alpha=lora.scale)
        return y[: len(x)]

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x (N, in), given dy (N, Σ out) of the product."""
        dx = products.product(dy, weight)
        if self._separate:
            through = products.product(self._inner_gradient(dy), self._joined_a(dy.dtype))
            dx = dropped(through, self.dropout, self.seed, dx)
        return dx

    def gradients(self, dy: Tensor, x: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """(da, db) of each branch: da = scale (dy b)ᵀ x and db = scale dyᵀ (x aᵀ).

        Leaving out the gradients of the frozen matrices saves a third of a block's work.
        """
        if not any(self.branches):
            return [(None, None)] * len(self.branches)
        x = dropped(x, self.dropout, self.seed)
        das = products.matrix_gradient(self._inner_gradient(dy), x).split(self._ranks)
        dys, inner = dy.split(self.outputs, dim=1), self._inner(x).split(self._ranks, dim=1)
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        for lora, da, columns, xa in zip(self.branches, das, dys, inner):
            if lora is None:
                pairs.append((None, None))
            else:
                db = products.matrix_gradient(columns, xa).to(lora.b.dtype).mul_(lora.scale)
                pairs.append((da.to(lora.a.dtype), db))
        return pairs

    def _inner(self, x: Tensor) -> Tensor:
        """x aᵀ of each branch, (N, Σ ranks)."""
        return products.product(x, self._joined_a(x.dtype).T)

    def _inner_gradient(self, dy: Tensor) -> Tensor:
        """scale · dy b of each branch, (N, Σ ranks)."""
        pairs = zip(dy.split(self.outputs, dim=1), self.branches)
        gradients = [
            products.product(columns, (lora.b * lora.scale).to(dy.dtype))
            for columns, lora in pairs
            if lora
        ]
        return torch.cat(gradients, dim=1)

    def _joined_a(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([lora.a for lora in self.branches if lora]).to(dtype)
