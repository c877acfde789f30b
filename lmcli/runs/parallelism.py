"""How a run is spread over processes: replicas or shards, and how workers get the weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lmcli.config import Recipe
from lmcli.distributed import launcher, process_group
from lmcli.distributed.data_parallel import ReplicaGroup
from lmcli.distributed.sharding import ShardedGroup
from lmcli.errors import UsageError
from lmcli.model import device as devices
from lmcli.model.device import DeviceConfig
from lmcli.recipes import BUDGETS
from lmcli.runs import memory_fit
from lmcli.training.train_step import TrainStep

ONE_GPU_EACH = "each process takes a GPU of its own: start no more, or use --device cpu"


def select_device(device: str, recipe: Recipe, threads: int) -> DeviceConfig:
    """The device and precision to train with. Raises UsageError for more processes than GPUs."""
    config = devices.select_device(device, recipe.train.precision, threads, training=True)
    process_group.require_gpus(process_group.local_world_size(), config.device, ONE_GPU_EACH)
    return config


def choose(
    replicas: ReplicaGroup,
    shard: bool | None,
    recipe: Recipe,
    device_config: DeviceConfig,
    note: Callable[[str], None],
) -> ReplicaGroup:
    """The processes, which shard the model with --shard or if one of them cannot hold it."""
    if replicas.size == 1:
        if shard:
            raise UsageError(
                "--shard spreads a model over several processes, and there is one",
                hint="give --nproc N as well",
            )
        return replicas
    if shard is False or (shard is None and memory_fit.fits_one_process(recipe, device_config)):
        return replicas
    note(f"weights, gradients and moments are sharded over {replicas.size} processes")
    return ShardedGroup(replicas.rank, replicas.size)


def start_workers(
    train_step: TrainStep, replicas: ReplicaGroup, folder: Path, resumed: bool
) -> TrainStep:
    """Announces the run to the workers; returns the leader's train step among the replicas.

    The model has its weights or, if `resumed`, is about to load them from the newest state.
    """
    if replicas.size == 1:
        return train_step
    launcher.record_run_folder(folder)
    replicas.broadcast(
        {
            "folder": str(folder.resolve()),
            "resumed": resumed,
            "shards": replicas.sharded,
            "precision": devices.dtype_name(train_step.device_config.dtype),
            "budget": {name: getattr(train_step.config, name) for name in BUDGETS},
        }
    )
    return join(train_step, replicas, resumed)


def join(train_step: TrainStep, replicas: ReplicaGroup, resumed: bool) -> TrainStep:
    """The train step of one replica, whose optimizer has no state yet.

    It has the leader's weights, unless these are `resumed`.
    """
    if not resumed:
        replicas.broadcast_weights(train_step.model)
    replicas.distribute(train_step.model, train_step.device_config.device)
    return replace(train_step, replicas=replicas)
