"""Sharded training: weights, gradients and optimizer states are split between processes by rows.

This is ZeRO (Rajbhandari et al. 2020) by torch's fully_shard (FSDP2; Zhao et al. 2023). Weights are
gathered while a block runs, those outside of blocks until the end of the step. All processes must
make the same forward passes: they evaluate and save together.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcli.distributed.data_parallel import Item, ReplicaGroup, local_shard, peer_errors
from lmcli.errors import UserError
from lmcli.model.device import give_back_freed_memory
from lmcli.model.transformer import Transformer
from lmcli.storage import user_errors

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

FILE_BYTES = 64 << 20
# methods of the model that gather weights; its head runs after them, while weights are still whole
FORWARD_METHODS = ("hidden", "encode")


class ShardedGroup(ReplicaGroup):
    """Processes that split one model: each holds some rows of every weight and of its moments."""

    sharded = True

    def run_on_all(self, *message: str) -> None:
        """Asks all workers to run the same collective next."""
        if self.is_leader:
            self.broadcast(message)

    def shard(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """This process's items, each with True if its result counts; the same number for all.

        A process with one item too few also works on the first item, and its result is discarded.
        """
        shard = [(item, True) for item in items[self.rank :: self.size]]
        return shard + [(items[0], False)] * (-(-len(items) // self.size) - len(shard))

    def add_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """The sum of all processes' losses; the backward pass has summed the gradients already."""
        loss = loss.clone()
        with peer_errors():
            dist.all_reduce(loss)
        return loss

    def gradient_norm(self, gradients: list[Tensor]) -> float:
        """The L2 norm of all gradients together; `gradients` are this process's shards."""
        total = torch.tensor(super().gradient_norm(gradients)).double().square()
        with peer_errors():
            dist.all_reduce(total)
        return float(total.sqrt())

    def distribute(self, model: Transformer, device: torch.device) -> None:
        """Shards the model on `device`, in place; build the optimizer after that."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if device.type == "cpu":
            give_back_freed_memory()
        # harmless: no code changes the output of a block in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        on_meta = {
            id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            for parameter in model.parameters()
        }
        # a copy of the model without weights, which `gather` fills for saving
        self._skeleton = copy.deepcopy(model, on_meta)
        mesh = init_device_mesh(device.type, (self.size,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(model, name)
        for module in _sharded_modules(model):
            # a sum: TrainStep has divided the loss by all targets of the step; gloo knows sums only
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # allocate full weights now: a first evaluation would allocate them without gradients
            module.unshard()
            module.reshard()

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """Context for passes, which gather weights: raises ProcessLost if a peer is gone."""
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
                raise
            with peer_errors():
                raise

    def reshard(self, model: Transformer) -> None:
        """Frees the gathered weights that a forward pass without a backward pass leaves behind."""
        for module in _sharded_modules(model):
            module.reshard()

    def gather(self, model: Transformer) -> Transformer | None:
        """The model with all of its weights in the leader's CPU memory; None in workers."""
        from torch.distributed.tensor import DTensor

        self.run_on_all("gather")
        weights = {}
        for name, parameter in model.named_parameters():
            with peer_errors():
                weight = cast(DTensor, parameter.detach()).full_tensor()
            if self.is_leader:
                weights[name] = weight.cpu()
        if not self.is_leader:
            return None
        gathered = copy.deepcopy(self._skeleton)
        gathered.load_state_dict(weights, strict=False, assign=True)
        gathered.tie()
        return gathered

    def all_finite(self, model: Transformer) -> bool:
        """True if no process has a weight that is NaN or infinite."""
        self.run_on_all("all_finite")
        return not self.any_rank(not super().all_finite(model))

    def on_full_matrices(
        self,
        matrices: Sequence[Tensor],
        shards: list[Tensor],
        update: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """This process's shards of `update(full matrices)`, from its `shards` of these matrices.

        Process i modulo size gathers, updates and splits matrix i: memory and work are divided.
        """
        # elements of each matrix that each process holds: sizes[process][matrix]
        sizes = [
            [rows_of_rank(len(matrix), peer, self.size) * matrix.shape[1] for matrix in matrices]
            for peer in range(self.size)
        ]
        assigned = [range(owner, len(matrices), self.size) for owner in range(self.size)]
        mine, own_sizes = assigned[self.rank], sizes[self.rank]
        # gather the shards of my matrices
        received = self._all_to_all(
            [[shards[i] for i in indices] for indices in assigned],
            [[peer_sizes[i] for i in mine] for peer_sizes in sizes],
            like=shards[0],
        )
        full = [torch.cat(pieces).view(matrices[i].shape) for i, *pieces in zip(mine, *received)]
        # update them, split them by rows and send each shard back
        updated = [
            matrix.reshape(-1).split([peer_sizes[i] for peer_sizes in sizes])
            for i, matrix in zip(mine, update(full) if full else [])
        ]
        returned = self._all_to_all(
            [[pieces[peer] for pieces in updated] for peer in range(self.size)],
            [[own_sizes[i] for i in indices] for indices in assigned],
            like=shards[0],
        )
        results = dict(zip(chain(*assigned), chain(*returned)))
        return [results[i].view(-1, matrix.shape[1]) for i, matrix in enumerate(matrices)]

    def _all_to_all(
        self, outgoing: list[list[Tensor]], incoming: list[list[int]], like: Tensor
    ) -> list[list[Tensor]]:
        """Sends `outgoing` tensors to each process; returns, flat, what each sends here.

        `incoming` are their numbers of elements. `like` has the dtype, in case there are none.
        """
        sent = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        flat = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensor in chain(*outgoing))])
        output = flat.new_empty(sum(map(sum, incoming)))
        size = flat.element_size()  # sent as bytes: gloo knows no bfloat16
        with peer_errors():
            dist.all_to_all_single(
                output.view(torch.uint8),
                flat.view(torch.uint8),
                [size * sum(counts) for counts in incoming],
                [size * count for count in sent],
            )
        tensors = iter(output.split(list(chain(*incoming))))
        return [[next(tensors) for _ in counts] for counts in incoming]


def _sharded_modules(model: nn.Module) -> "list[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def rows_of_rank(count: int, rank: int, size: int) -> int:
    """How many of `count` rows a process holds, split as by torch.chunk.

    >>> [rows_of_rank(10, rank, 4) for rank in range(4)]
    [3, 3, 3, 1]
    """
    most = -(-count // size)
    return max(0, min(count, (rank + 1) * most) - rank * most)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes this process's shards of the tensors to a folder; all processes call it together.

    In several files, since each is copied in memory. Raises UserError when the disk refuses.
    """
    import torch.distributed.checkpoint as checkpoint

    before = accumulate((local_shard(tensor).nbytes for tensor in tensors.values()), initial=0)
    files = {name: 1 + size // FILE_BYTES for name, size in zip(tensors, before)}
    # file numbers must be consecutive; a tensor above FILE_BYTES would leave a gap
    numbers = {old: new for new, old in enumerate(dict.fromkeys(files.values()), 1)}
    with _user_errors(folder):
        checkpoint.save(
            tensors,
            storage_writer=checkpoint.HuggingFaceStorageWriter(
                str(folder),
                {name: numbers[file] for name, file in files.items()},
                save_distributed=True,
            ),
        )


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the tensors in a folder that any number of processes wrote."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _user_errors(folder):
        metadata = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata()
        return {
            name: cast(TensorStorageMetadata, tensor).size
            for name, tensor in metadata.state_dict_metadata.items()
        }


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills this process's shards of tensors from a folder that any number of processes wrote.

    Raises UserError for files that do not hold these tensors.
    """
    import torch.distributed.checkpoint as checkpoint

    with _user_errors(folder), warnings.catch_warnings():
        # expected: each process reads by itself
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(
            tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=True
        )


@contextmanager
def _user_errors(folder: Path) -> Iterator[None]:
    """Raises errors of any process, which torch collects, as a UserError about the folder."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with user_errors(folder, "use"):
            try:
                yield
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"cannot use: {error}", where=str(folder)) from error
