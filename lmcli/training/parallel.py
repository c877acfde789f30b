"""Several processes around one training loop: each makes the gradients of its share of a step's rows, and all add them up.

The first of them leads: it runs the loop, measures, saves and speaks. The others follow: told that there is a step they make
it, with the same numbers to the end, so that all have the same weights. (In `sharding` they share out the model as well.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcli.model import group

BUCKET_BYTES = 64 << 20  # of gradients that are sent at a time
PATIENCE = timedelta(days=1)  # an evaluation of the leader may take long; one who is gone is noticed at once
Part = TypeVar("Part")
noticing = partial(group.noticing, "training", "lm train --resume goes on from the last state")


class Team:
    """The processes of a run, each with the whole model. `rank` is this one's place, 0 leads; a team of one talks to
    nobody."""

    shards = False  # whether each process holds a part of the model only: then what a method says it does, all have to do

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the process that runs the loop."""
        return not self.rank

    def share(self, parts: Sequence[Part]) -> list[tuple[Part, bool]]:
        """Those of the parts that this process works on, and whether each counts."""
        return [(part, True) for part in parts[self.rank::self.size]]

    def tell(self, word: Any) -> None:
        """Hands something that JSON can say to all that follow; None sends them home."""
        if self.size > 1:
            with noticing():
                group.say(word, partial(dist.broadcast, src=0))

    def ask(self, *word: str) -> None:
        """Has the processes that follow do what this one is about to, where it takes all."""

    def hear(self) -> Any:
        """What the leader tells next."""
        with noticing():
            return group.hear(partial(dist.broadcast, src=0))

    def seed(self, seed: int, step: int) -> None:
        """Gives every process random numbers of its own for a step, whatever was drawn before."""
        if self.size > 1:
            torch.manual_seed((seed * 1_000_003 + step) * self.size + self.rank)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else bool(self._largest(torch.tensor([float(flag)])))

    def add_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Every gradient becomes the sum of all processes' own; returns that of their losses. One that no process has stays
        None."""
        if self.size == 1:
            return loss
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        there = self._largest(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        for parameter, known in zip(parameters, there.tolist()):
            if known and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        loss = loss.clone()
        for bucket in _buckets([loss, *(p.grad for p in parameters if p.grad is not None)]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with noticing():
                dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(summed.view_as(tensor))
        return loss

    def norm(self, gradients: list[Tensor]) -> float:
        """The norm of all gradients together, of which this process has these parts."""
        return float(torch.stack(torch._foreach_norm(gradients)).norm()) if gradients else 0.0

    def on_whole(self, matrices: Sequence[Tensor], parts: list[Tensor],
                 work: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """This process's part of what `work` makes of whole matrices, of which it has these parts."""
        return work(parts)

    def distribute(self, model: nn.Module, device: torch.device) -> None:
        """Brings to `device` what this process is to hold of the model."""
        model.to(device)

    def working(self) -> AbstractContextManager[None]:
        """To be around forward and backward passes, in which processes may need each other: Lost when one has gone."""
        return nullcontext()

    def settle(self, model: nn.Module) -> None:
        """To be called after forward passes without a backward pass."""

    def whole(self, model: nn.Module) -> nn.Module | None:
        """The model with all of its weights, to be saved by the process that leads; None to the others."""
        return model

    def finite(self, model: nn.Module) -> bool:
        """Whether all weights are; a pass over them, so only where they are to be written anyway."""
        return bool(torch.stack([local(weight).isfinite().all() for weight in model.parameters()]).all())

    def share_weights(self, model: nn.Module) -> None:
        """Every process gets the leader's weights."""
        if self.size > 1:
            for weight in model.state_dict().values():
                with noticing():
                    dist.broadcast(weight, src=0)

    def _largest(self, numbers: Tensor) -> Tensor:
        with noticing():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, to be changed in place; all of it where it is not shared out."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


ALONE = Team()


def join() -> Team:
    """The team that this process belongs to, by its environment; ALONE where there is none."""
    if group.expected() == 1:
        return ALONE
    with noticing():
        return Team(*group.join(PATIENCE, "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, of one precision and device and so many bytes together."""
    bucket, size = [], 0
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if not alike or size > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
