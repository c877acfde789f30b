"""Hidden states → log-probabilities of targets: the one place where a training loss, a score and a perplexity are made."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcli.model import fused

ROWS_AT_ONCE = 4096


def target_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Natural-log probability of each target, (N,) float32, given its position's hidden state (N, C).

    `head` turns hidden states into logits (…, V); logits are made for so many rows at a time that they stay small, and
    are normalised in float32 whatever the model's precision. Differentiable.
    """
    return -target_losses(hidden, head, targets)


def target_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """What training makes small, (N,) float32: −log p of each target; with `smoothing` so much of the target's weight is
    spread over all words (Szegedy et al. 2016)."""
    parts = [F.cross_entropy(head(rows).float(), wanted, reduction="none", label_smoothing=smoothing)
             for rows, wanted in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE))]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def summed_loss(hidden: Tensor, head: torch.nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `target_losses`, with a gradient that costs less where the kernels are there."""
    if fused.active(hidden) and hasattr(head, "prepared") and head.output.bias is None:
        return fused.cross_entropy(head.prepared(hidden), head.output.weight, targets, smoothing)
    return target_losses(hidden, head, targets, smoothing).sum()
