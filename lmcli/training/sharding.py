"""A model of which each process holds a part: weights, gradients and moments are split by rows (ZeRO, Rajbhandari et al.
2020), by torch's fully_shard (FSDP2; Zhao et al. 2023).

A block's weights are whole while it works, those outside of blocks from the first use in a step to its end. All processes
have to make the same forward passes, so what the leader measures all measure, and what it saves all write.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmcli.errors import UserError
from lmcli.model.device import give_back_freed_memory
from lmcli.storage import user_errors
from lmcli.training.parallel import Part, Team, local, noticing

FILE_BYTES = 64 << 20
FORWARD = ("hidden", "encode")  # the model's ways in; its head works on what they give, with the weights still whole


class ShardedTeam(Team):
    """Processes that share out one model. Every one of them holds the same rows of weights, gradients and moments."""

    shards = True

    def ask(self, *word: str) -> None:
        """Has the processes that follow do the same."""
        if self.leads:
            self.tell(word)

    def share(self, parts: Sequence[Part]) -> list[tuple[Part, bool]]:
        """Those of the parts that this process works on, as many as each other process, and whether each counts: who has
        one too few works on the first one, for nothing."""
        own = [(part, True) for part in parts[self.rank::self.size]]
        return own + [(parts[0], False)] * (-(-len(parts) // self.size) - len(own))

    def add_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """The sum of all processes' losses; gradients were summed in the backward pass."""
        loss = loss.clone()
        with noticing():
            dist.all_reduce(loss)
        return loss

    def norm(self, gradients: list[Tensor]) -> float:
        """The norm of all gradients together, of which each process has its rows."""
        total = torch.tensor(super().norm(gradients)).double().square()
        with noticing():
            dist.all_reduce(total)
        return float(total.sqrt())

    def distribute(self, model: nn.Module, device: torch.device) -> None:
        """Leaves this process its part of the weights, on `device`; the optimizer is to be built after that."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if device.type == "cpu":
            give_back_freed_memory()
        # nothing here changes in place what a block returns
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        nowhere = {id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad)
                   for parameter in model.parameters()}
        self._outline = copy.deepcopy(model, nowhere)  # the model without weights, to be filled for saving
        mesh = init_device_mesh(device.type, (self.size,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for name in FORWARD:
            register_fsdp_forward_method(model, name)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is divided already
            module.set_force_sum_reduction_for_comms(True)  # which gloo can
            module.unshard()  # the room for whole weights must not be made by an evaluation: no gradient could go there
            module.reshard()

    @contextmanager
    def working(self) -> Iterator[None]:
        """As a Team: blocks' weights are gathered from all."""
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
                raise
            with noticing():
                raise

    def settle(self, model: nn.Module) -> None:
        """Lets go of whole weights that a forward pass without a backward pass has left."""
        for module in _sharded(model):
            module.reshard()

    def whole(self, model: nn.Module) -> nn.Module | None:
        """The model with all of its weights in the leader's memory; None to the others."""
        self.ask("whole")
        filled = {}
        for name, parameter in model.named_parameters():
            with noticing():
                weight = parameter.detach().full_tensor()
            if self.leads:
                filled[name] = weight.cpu()
        if not self.leads:
            return None
        model = copy.deepcopy(self._outline)
        model.load_state_dict(filled, strict=False, assign=True)
        model.tie()
        return model

    def finite(self, model: nn.Module) -> bool:
        """Whether no process has a weight that is NaN or infinite."""
        self.ask("finite")
        return not self.any(not super().finite(model))

    def on_whole(self, matrices: Sequence[Tensor], parts: list[Tensor],
                 work: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """This process's rows of what `work` makes of whole matrices, of which `parts` are the rows that it has. Each matrix
        is put together, worked on and parted again by one process: as much memory as its share of all."""
        sizes = [[_rows(len(matrix), peer, self.size) * matrix.shape[1] for matrix in matrices]
                 for peer in range(self.size)]  # numbers of each matrix that each process has
        theirs = [range(owner, len(matrices), self.size) for owner in range(self.size)]
        mine = theirs[self.rank]
        own = [sum(sizes[self.rank][i] for i in chosen) for chosen in theirs]
        their = [sum(sizes[peer][i] for i in mine) for peer in range(self.size)]

        none = parts[0].new_empty(0)  # for a process that has nothing to give: there may be fewer matrices than processes
        found = self._exchanged([none, *(parts[i] for chosen in theirs for i in chosen)], own, their)
        rows = [dict(zip(mine, part.split([sizes[peer][i] for i in mine]))) for peer, part in enumerate(found)]
        whole = [torch.cat([row[i] for row in rows]).view(matrices[i].shape) for i in mine]
        done = [made.reshape(-1).split([size[i] for size in sizes]) for i, made in zip(mine, work(whole) if whole else [])]
        back = self._exchanged([none, *(made[peer] for peer in range(self.size) for made in done)], their, own)
        updates = {i: part for chosen, given in zip(theirs, back)
                   for i, part in zip(chosen, given.split([sizes[self.rank][i] for i in chosen]))}
        return [updates[i].view(-1, matrix.shape[1]) for i, matrix in enumerate(matrices)]

    def _exchanged(self, parts: list[Tensor], sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        """What each process has for this one, of `received` numbers, for the parts that this one has for each, in order,
        of `sent` numbers together."""
        flat = torch.cat([part.reshape(-1) for part in parts])
        got = flat.new_empty(sum(received))
        size = flat.element_size()  # sent as bytes: gloo knows no bfloat16
        with noticing():
            dist.all_to_all_single(got.view(torch.uint8), flat.view(torch.uint8), [size * count for count in received],
                                   [size * count for count in sent])
        return got.split(received)


def _sharded(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "reshard")]


def _rows(count: int, rank: int, size: int) -> int:
    """How many of `count` rows process `rank` has: as torch.chunk parts them. _rows(10, 3, 4) == 1."""
    most = -(-count // size)
    return max(0, min(count, (rank + 1) * most) - rank * most)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes this process's part of the tensors, in several files, each of which is in memory once more meanwhile; all
    processes do it at once. Raises UserError when the disk refuses."""
    import torch.distributed.checkpoint as checkpoint

    before = accumulate((local(tensor).nbytes for tensor in tensors.values()), initial=0)
    files = {name: 1 + size // FILE_BYTES for name, size in zip(tensors, before)}
    numbers = {old: new for new, old in enumerate(dict.fromkeys(files.values()), 1)}  # none left out
    with _refusals(folder):
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(
            str(folder), {name: numbers[file] for name, file in files.items()}, save_distributed=True))


def sizes(folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the tensors in a folder that any number of processes has written."""
    import torch.distributed.checkpoint as checkpoint

    with _refusals(folder):
        found = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return {name: tensor.size for name, tensor in found.items()}


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, shared out or not, from a folder that any number of processes has written, each as far as this process
    holds it. Raises UserError for files that do not have them."""
    import torch.distributed.checkpoint as checkpoint

    with _refusals(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Errors of any process, which torch gathers, as a UserError."""
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
