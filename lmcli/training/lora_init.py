"""LoRA-GA: adapters start at the directions in which the loss falls fastest."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcli.model.lora import LoraEmbedding, adapters_of
from lmcli.training.train_step import Note, TrainStep

ROUNDS = 2  # of two passes each


def gradient_init(train_step: TrainStep) -> Generator[Note, None, None]:
    """Sets each adapter's A to the leading right singular vectors of its matrix's first gradient.

    This is LoRA-GA (Wang et al. 2024), but B stays 0 as in PEFT, and so the model stays as it is.
    The gradient G of the frozen matrix is never made: with B = 0 the gradient of B is scale · G Aᵀ,
    and with A = 0 the gradient of A is scale · Bᵀ G. Alternating passes, each result made
    orthonormal, are a subspace iteration (Halko et al. 2011, §4.5). An adapter keeps its random A
    if its rank is larger than the matrix allows, or if no gradient reaches the matrix yet.
    """
    factors = [
        pair
        for pair in _adapter_factors(train_step.model)
        if pair.rank <= min(pair.a.shape[1], len(pair.b))
    ]
    norms = {pair.a_parameter: float(pair.a.norm()) for pair in factors}
    for _ in range(ROUNDS):
        # A as it is, B = 0
        yield from train_step.first_gradients()
        factors = [pair for pair in factors if pair.b_gradient.any()]
        for pair in factors:
            basis = torch.linalg.qr(pair.b_gradient.cpu().double()).Q
            pair.set(torch.zeros_like(pair.a), basis)
        # A = 0, B as it is
        yield from train_step.first_gradients()
        for pair in factors:
            rows = torch.linalg.svd(pair.a_gradient.cpu().double(), full_matrices=False).Vh
            scale = norms[pair.a_parameter]
            pair.set(rows * scale / pair.rank**0.5, torch.zeros_like(pair.b))
    train_step.optimizer.zero_grad()


@dataclass
class _Factors:
    """The factors of adapters that share one A: A is stored as (rank, in), each B as (out, rank).

    Those of an embedding are `transposed`: its B takes the place of A.
    """

    a_parameter: nn.Parameter
    b_parameters: list[nn.Parameter]
    transposed: bool

    @property
    def a(self) -> Tensor:
        return self._oriented(self.a_parameter.detach())

    @property
    def b(self) -> Tensor:
        return torch.cat([self._oriented(parameter.detach()) for parameter in self.b_parameters])

    @property
    def a_gradient(self) -> Tensor:
        return self._oriented(self._gradient(self.a_parameter))

    @property
    def b_gradient(self) -> Tensor:
        return torch.cat([self._oriented(self._gradient(p)) for p in self.b_parameters])

    @property
    def rank(self) -> int:
        return len(self.a)

    def set(self, a: Tensor, b: Tensor) -> None:
        """Copies new values into both factors."""
        sizes = [len(self._oriented(parameter)) for parameter in self.b_parameters]
        with torch.no_grad():
            self.a.copy_(a)
            for parameter, values in zip(self.b_parameters, b.split(sizes)):
                self._oriented(parameter.detach()).copy_(values)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def _oriented(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored


def _adapter_factors(model: nn.Module) -> list[_Factors]:
    by_a: dict[nn.Parameter, _Factors] = {}
    for adapter in adapters_of(model).values():
        transposed = isinstance(adapter, LoraEmbedding)
        a, b = adapter.lora_a, adapter.lora_b
        if transposed:
            a, b = b, a
        by_a.setdefault(a, _Factors(a, [], transposed)).b_parameters.append(b)
    return list(by_a.values())
