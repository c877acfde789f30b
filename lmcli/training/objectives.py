"""(model, batch) → summed loss and the number of targets in it."""

import torch
from torch import Tensor

from lmcli.model.likelihood import target_logprobs
from lmcli.model.transformer import Transformer


def causal(model: Transformer, rows: Tensor) -> tuple[Tensor, int]:
    """(sum of −log p over all next tokens in nats, their number) for packed rows (B, T + 1) of ids."""
    hidden = model.hidden(rows[:, :-1])  # (B, T, C)
    targets = rows[:, 1:].reshape(-1)  # (B·T)
    return -target_logprobs(hidden.flatten(0, 1), model.head, targets).sum(), len(targets)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which forward passes run in `dtype` over float32 weights."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
