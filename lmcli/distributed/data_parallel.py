"""Data-parallel training: each process computes gradients of its micro-batches; all are summed.

Rank 0 leads: it runs the loop, evaluates, saves and prints. The workers repeat every step that the
leader broadcasts, so all processes hold the same weights. (`sharding` splits the model as well.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcli.distributed import process_group
from lmcli.distributed.launcher import RESUME_HINT
from lmcli.model.transformer import Transformer

BUCKET_BYTES = 64 << 20  # gradients per all-reduce
# an evaluation of the leader may take hours; a process that has exited is noticed at once
EVALUATION_TIMEOUT = timedelta(days=1)
Item = TypeVar("Item")
peer_errors = partial(process_group.peer_errors, "training", RESUME_HINT)


class ReplicaGroup:
    """The processes of a run, each with all weights; a group of size 1 does not communicate."""

    sharded = False  # True if each process holds a part of the model: every method is collective

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def is_leader(self) -> bool:
        """True in the process that runs the loop."""
        return not self.rank

    def shard(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """This process's items, each with True if its result counts."""
        return [(item, True) for item in items[self.rank :: self.size]]

    def broadcast(self, message: Any) -> None:
        """Sends a JSON message from the leader to all workers; None ends them."""
        if self.size > 1:
            with peer_errors():
                process_group.send_json(message, partial(dist.broadcast, src=0))

    def receive(self) -> Any:
        """The leader's next message."""
        with peer_errors():
            return process_group.recv_json(partial(dist.broadcast, src=0))

    def run_on_all(self, *message: str) -> None:
        """Asks all workers to run the same collective next; does nothing unless sharded."""

    def seed(self, seed: int, step: int) -> None:
        """Seeds a step's random numbers differently in each process; does nothing if alone."""
        if self.size > 1:
            torch.manual_seed((seed * 1_000_003 + step) * self.size + self.rank)

    def any_rank(self, flag: bool) -> bool:
        """True if the flag is set in any process."""
        return flag if self.size == 1 else bool(self._max(torch.tensor([float(flag)])))

    def add_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sums every gradient over all processes in place and returns the sum of their losses.

        A parameter without a gradient in any process keeps None.
        """
        if self.size == 1:
            return loss
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        has_gradient = self._max(
            torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        )
        for parameter, somewhere in zip(parameters, has_gradient.tolist()):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        loss = loss.clone()
        for bucket in _buckets([loss, *(p.grad for p in parameters if p.grad is not None)]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with peer_errors():
                dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(summed.view_as(tensor))
        return loss

    def gradient_norm(self, gradients: list[Tensor]) -> float:
        """The L2 norm of all gradients together; `gradients` are this process's shards."""
        return float(torch.stack(torch._foreach_norm(gradients)).norm()) if gradients else 0.0

    def on_full_matrices(
        self,
        matrices: Sequence[Tensor],
        shards: list[Tensor],
        update: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """This process's shards of `update(full matrices)`, from its `shards` of these matrices."""
        return update(shards)

    def distribute(self, model: Transformer, device: torch.device) -> None:
        """Moves this process's share of the model to `device`."""
        model.to(device)

    def peer_errors(self) -> AbstractContextManager[None]:
        """Context for forward and backward passes: raises ProcessLost if a peer is gone."""
        return nullcontext()

    def reshard(self, model: Transformer) -> None:
        """Frees gathered weights; call it after forward passes without a backward pass."""

    def gather(self, model: Transformer) -> Transformer | None:
        """The model with all of its weights, for the leader to save; None in workers."""
        return model

    def all_finite(self, model: Transformer) -> bool:
        """True if every weight is finite. Reads all weights; call it before saving only."""
        finite = [local_shard(weight).isfinite().all() for weight in model.parameters()]
        return bool(torch.stack(finite).all())

    def broadcast_weights(self, model: Transformer) -> None:
        """Copies the leader's weights to all processes."""
        if self.size > 1:
            for weight in model.state_dict().values():
                with peer_errors():
                    dist.broadcast(weight, src=0)

    def _max(self, numbers: Tensor) -> Tensor:
        """The largest value of each number over all processes."""
        with peer_errors():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


SINGLE_PROCESS = ReplicaGroup()


def join() -> ReplicaGroup:
    """The group that this process belongs to by its environment; SINGLE_PROCESS without one."""
    if process_group.world_size() == 1:
        return SINGLE_PROCESS
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with peer_errors():
        return ReplicaGroup(*process_group.join(EVALUATION_TIMEOUT, backend))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, grouped by dtype and device into buckets of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if not alike or size > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
