"""Hidden states → log-probabilities of targets: the one place where a training loss, a score and a perplexity are made."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 4096


def target_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Natural-log probability of each target, (N,) float32, given its position's hidden state (N, C).

    `head` turns hidden states into logits (…, V); logits are made for so many rows at a time that they stay small, and
    are normalised in float32 whatever the model's precision. Differentiable.
    """
    parts = [-F.cross_entropy(head(rows).float(), wanted, reduction="none")
             for rows, wanted in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE))]
    return torch.cat(parts)
