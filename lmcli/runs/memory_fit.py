"""Makes training fit into memory, or refuses what cannot, before the first step."""

from collections.abc import Callable

import torch

from lmcli.config import ModelConfig, Recipe
from lmcli.distributed import process_group
from lmcli.distributed.data_parallel import ReplicaGroup
from lmcli.errors import UsageError
from lmcli.kernels import build
from lmcli.model import flops
from lmcli.model.device import DeviceConfig, available_memory, dtype_name, machine_memory
from lmcli.model.memory import fits_on_one, sharded_memory, training_memory
from lmcli.training.train_step import TrainStep

BYTES_PER_PARAMETER = 12  # weight, gradient and at least one moment, in float32
MIN_MICRO_BATCH_TOKENS = 2048  # smaller products are slower than activation checkpointing
MEMORY_SHARE = 0.8  # of the free memory, for a training step


def require_memory(config: ModelConfig, device_config: DeviceConfig) -> None:
    """Raises UsageError if weights, gradients and moments need more memory than the machine has.

    With GPUs, all of a run count together. The run would be killed otherwise.
    """
    parameters = flops.parameters(config).total
    needed, memory = BYTES_PER_PARAMETER * parameters, machine_memory(device_config.device)
    if device_config.device.type == "cuda":
        memory *= process_group.world_size()
    if needed > memory:
        raise UsageError(
            f"{parameters:,} parameters need {needed / 1e9:,.0f} GB of memory to train, "
            f"{memory / 1e9:,.0f} GB are available",
            where="model",
            hint="lower hidden_size, num_hidden_layers or the vocabulary",
        )


def fits_one_process(recipe: Recipe, device_config: DeviceConfig) -> bool:
    """True if weights, gradients and moments fit into the memory of one process."""
    memory = _memory_per_process(device_config.device)
    needed = training_memory(recipe.model.complete(), recipe.train, 0)
    return not memory or fits_on_one(needed, memory)


def fit(train_step: TrainStep, replicas: ReplicaGroup, note: Callable[[str], None]) -> None:
    """Reduces the micro-batch, then adds activation checkpointing, until a step fits memory.

    The system kills a process that runs out of memory, so this is not left to be found out.
    """
    train, counters, config = train_step.config, train_step.counters, train_step.model.config
    device, dtype = train_step.device_config.device, dtype_name(train_step.device_config.dtype)
    free = _memory_per_process(device)

    def fits(tokens: int, checkpointing: bool) -> bool:
        needed = training_memory(
            config, train, tokens, dtype, checkpointing, build.serve(device), device.type
        )
        if replicas.sharded:
            needed = sharded_memory(config, needed, replicas.size)
        return not free or needed.total <= MEMORY_SHARE * free

    # smaller and smaller micro-batches, first without and then with activation checkpointing
    sizes = [min(train_step.micro_batch_tokens, train.batch_tokens)]
    while sizes[-1] // 2 >= max(MIN_MICRO_BATCH_TOKENS, train.context):
        sizes.append(sizes[-1] // 2)
    choosable = train.recompute == "auto" and not counters.recompute
    modes = [False, True] if choosable else [train_step.checkpointing]
    candidates = [(checkpointing, tokens) for checkpointing in modes for tokens in sizes]
    chosen = next((pair for pair in candidates if fits(pair[1], pair[0])), candidates[-1])
    if chosen == candidates[0]:
        return
    checkpointing, counters.micro_batch_tokens = chosen
    counters.recompute = checkpointing or counters.recompute
    again = ", and activations calculated again in the backward pass" if checkpointing else ""
    note(
        f"{free / 1e9:.1f} GB of memory are free: {counters.micro_batch_tokens:,} tokens at "
        f"once{again}; the batch of an optimizer step stays {train.batch_tokens:,}"
    )


def _memory_per_process(device: torch.device) -> float:
    """Free bytes for each process of this machine; each has a GPU of its own."""
    processes = 1 if device.type == "cuda" else process_group.local_world_size()
    return available_memory(device) / processes
