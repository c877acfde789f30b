"""Where adapters begin: at the directions in which the loss of the first step falls fastest."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcli.model.adapters import LoraEmbedding, adapters_of
from lmcli.training.stepper import Note, Stepper

ROUNDS = 2  # of two passes each


def align(run: Stepper) -> Generator[Note, None, None]:
    """Has what adapters read span the leading right singular vectors of the gradient that each frozen matrix would have in
    the first step, in place of directions that were drawn (LoRA-GA, Wang et al. 2024; here the other factor stays 0, as PEFT
    has it, and so the model as it is). Yields what has to be noted.

    The gradient G of a matrix is never made. With B = 0 that of B is scale · G Aᵀ, with A = 0 that of A is scale · Bᵀ G:
    passes in turn, the result of each made orthonormal, are a subspace iteration (Halko et al. 2011, §4.5). An adapter
    stays as it was drawn where its rank is above what the matrix can have, and where nothing reaches the matrix yet.
    """
    pairs = [pair for pair in _pairs(run.model) if pair.rank <= min(pair.read.shape[1], len(pair.written))]
    sizes = {pair.reads: float(pair.read.norm()) for pair in pairs}
    for _ in range(ROUNDS):
        yield from run.rehearse()
        pairs = [pair for pair in pairs if pair.written_gradient.any()]
        for pair in pairs:
            pair.put(torch.zeros_like(pair.read), torch.linalg.qr(pair.written_gradient.cpu().double()).Q)
        yield from run.rehearse()
        for pair in pairs:
            directions = torch.linalg.svd(pair.read_gradient.cpu().double(), full_matrices=False).Vh
            pair.put(directions * sizes[pair.reads] / pair.rank ** 0.5, torch.zeros_like(pair.written))
    run.optimizer.zero_grad()


@dataclass
class _Pair:
    """The factors of adapters that share what they read: `reads` is stored as (rank, in), each of `writes` as (out, rank);
    those of an embedding the other way round (`turned`)."""

    reads: nn.Parameter
    writes: list[nn.Parameter]
    turned: bool

    @property
    def read(self) -> Tensor:
        return self._upright(self.reads.detach())

    @property
    def written(self) -> Tensor:
        return torch.cat([self._upright(part.detach()) for part in self.writes])

    @property
    def read_gradient(self) -> Tensor:
        return self._upright(self.reads.grad)

    @property
    def written_gradient(self) -> Tensor:
        return torch.cat([self._upright(part.grad) for part in self.writes])

    @property
    def rank(self) -> int:
        return len(self.read)

    def put(self, read: Tensor, written: Tensor) -> None:
        """Gives both factors other values."""
        with torch.no_grad():
            self.read.copy_(read)
            for part, values in zip(self.writes, written.split([len(self._upright(part)) for part in self.writes])):
                self._upright(part.detach()).copy_(values)

    def _upright(self, stored: Tensor) -> Tensor:
        return stored.T if self.turned else stored


def _pairs(model: nn.Module) -> list[_Pair]:
    found: dict[nn.Parameter, _Pair] = {}
    for adapter in adapters_of(model).values():
        turned = isinstance(adapter, LoraEmbedding)
        read, written = (adapter.lora_b, adapter.lora_a) if turned else (adapter.lora_a, adapter.lora_b)
        found.setdefault(read, _Pair(read, [], turned)).writes.append(written)
    return list(found.values())
