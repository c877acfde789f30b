"""Whether a model and its training steps have room in memory, told or arranged before the first step."""

from collections.abc import Callable

import torch

from lmcli.config import ModelConfig, Recipe
from lmcli.errors import UsageError
from lmcli.model import cost, group, kernels
from lmcli.model.device import Placement, available_memory, dtype_name, machine_memory
from lmcli.model.memory import held_by_one, shared_out, training_memory
from lmcli.training.parallel import Team
from lmcli.training.stepper import Stepper

BYTES_PER_PARAMETER = 12  # weight, gradient and at least one moment, in float32
FEWEST_MICRO_BATCH_TOKENS = 2048  # smaller products are slower than calculating activations again
MEMORY_SHARE = 0.8  # of what is free, for a training step


def require(config: ModelConfig, placement: Placement) -> None:
    """Raises UsageError when weights, gradients and moments alone need more than the machine has, or all GPUs of a run: it
    would be killed."""
    parameters = cost.parameters(config).total
    there = machine_memory(placement.device) * (group.expected() if placement.device.type == "cuda" else 1)
    if BYTES_PER_PARAMETER * parameters > there:
        raise UsageError(f"{parameters:,} parameters need {BYTES_PER_PARAMETER * parameters / 1e9:,.0f} GB of memory to "
                         f"train, {there / 1e9:,.0f} GB are there", where="model",
                         hint="lower hidden_size, num_hidden_layers or the vocabulary")


def for_one(recipe: Recipe, placement: Placement) -> bool:
    """Whether weights, gradients and moments have room in what one process has of memory."""
    there = _memory_of_one(placement.device)
    return not there or held_by_one(training_memory(recipe.model.complete(), recipe.train, 0), there)


def fit(run: Stepper, note: Callable[[str], None], team: Team) -> None:
    """Where a step would need more memory than there is: a smaller micro-batch, then recomputation; the kernel of a
    system ends a process rather than tell it that memory is short, so this is not left to be found out."""
    train, counters, there = run.config, run.counters, MEMORY_SHARE * _memory_of_one(run.placement.device)
    config = run.model.config
    first = min(run.micro_batch_tokens, train.batch_tokens)
    ways = [False, True] if train.recompute == "auto" and not counters.recompute else [run.recompute]

    def fits(tokens: int, recompute: bool) -> bool:
        needed = training_memory(config, train, tokens, dtype_name(run.placement.dtype), recompute,
                                 kernels.serve(run.placement.device), run.placement.device.type)
        return not there or (shared_out(config, needed, team.size) if team.shards else needed).total <= there

    sizes = [first]
    while sizes[-1] // 2 >= max(FEWEST_MICRO_BATCH_TOKENS, train.context):
        sizes.append(sizes[-1] // 2)
    tried = [(recompute, tokens) for recompute in ways for tokens in sizes]
    recompute, tokens = next((way for way in tried if fits(way[1], way[0])), tried[-1])
    if (recompute, tokens) != tried[0]:
        counters.micro_batch_tokens, counters.recompute = tokens, recompute or counters.recompute
        again = ", and activations calculated again in the backward pass" if recompute else ""
        note(f"{there / MEMORY_SHARE / 1e9:.1f} GB of memory are free: {tokens:,} tokens at once{again}; the batch of an "
             f"optimizer step stays {train.batch_tokens:,}")


def _memory_of_one(device: torch.device) -> float:
    """Bytes that are free for one of the processes that torchrun or --nproc started here; a GPU is one's own."""
    members = 1 if device.type == "cuda" else group.here()
    return available_memory(device) / members
