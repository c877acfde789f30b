"""Hidden states → log-probabilities of targets: the one place where a training loss, a score and a perplexity are made."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcli.model import fused, head_loss


class Readings(NamedTuple):
    """What a model says at N positions. `logprobs` (N,) of the targets and, where asked for, `inside` (N,) of any token of
    a set, in nats; `entropy` (N,) in nats; `ranks` (N,) of the targets, 1 for the likeliest; the likeliest `tokens` (N, K)
    and their log-probabilities `best` (N, K)."""

    logprobs: Tensor
    inside: Tensor | None = None
    entropy: Tensor | None = None
    ranks: Tensor | None = None
    tokens: Tensor | None = None
    best: Tensor | None = None


def target_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Natural-log probability of each target, (N,) float32, given its position's hidden state (N, C).

    `head` turns hidden states into logits (…, V); logits are made for so many rows at a time that they stay small, and
    are normalised in float32 whatever the model's precision. Differentiable.
    """
    return -target_losses(hidden, head, targets)


def target_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """What training makes small, (N,) float32: −log p of each target; with `smoothing` so much of the target's weight is
    spread over all words (Szegedy et al. 2016). Targets (N, V) of 0 and 1 hold or not each for itself: the sum of their
    −log p, each by the sigmoid of its logit."""
    if targets.is_floating_point():
        return F.binary_cross_entropy_with_logits(head(hidden).float(), targets, reduction="none").sum(-1)
    if hasattr(head, "prepared") and fused.active(hidden) and not torch.is_grad_enabled() and not smoothing:
        return head_loss.target_losses(head.prepared(hidden), head.output.matrix, head.output.bias, targets)
    parts = [F.cross_entropy(head(rows).float(), wanted, reduction="none", label_smoothing=smoothing)
             for rows, wanted in pieces(head, hidden, targets)]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def pieces(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of hidden states (N, C) with their targets (N,), as many at a time as logits may be."""
    output = getattr(head, "output", head)  # of a LanguageHead, or a matrix by itself
    rows = head_loss.rows_at_once(hidden.device, getattr(output, "out_features", 2048))
    return zip(hidden.split(rows), targets.split(rows))


def readings(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, members: Tensor | None = None,
             count: int = 0) -> Readings:
    """The Readings at hidden states (N, C), for targets (N,): `inside` the set that `members` (V,) bool marks, and with a
    `count` above 0 entropy, ranks and so many of the likeliest tokens."""
    if members is None and not count:
        return Readings(target_logprobs(hidden, head, targets))
    parts = [_read(head(rows).float().log_softmax(-1), wanted, members, count)
             for rows, wanted in pieces(head, hidden, targets)]
    return Readings(*(None if part[0] is None else torch.cat(part) for part in zip(*parts)))


def _read(logprobs: Tensor, targets: Tensor, members: Tensor | None, count: int) -> Readings:
    of_target = logprobs.gather(1, targets[:, None])  # (N, 1)
    inside = None if members is None else logprobs[:, members].logsumexp(-1)
    if not count:
        return Readings(of_target[:, 0], inside)
    best, tokens = logprobs.topk(min(count, logprobs.shape[1]))
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    return Readings(of_target[:, 0], inside, entropy, (logprobs > of_target).sum(-1) + 1, tokens, best)


def summed_loss(hidden: Tensor, head: torch.nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `target_losses`; of a language head the gradient is made beside it."""
    if hasattr(head, "prepared"):
        prepared, output = head.prepared(hidden), head.output
        return head_loss.cross_entropy(prepared, output.weight, output.bias, targets, smoothing, head.loss_with_gradient,
                                       output.beside(prepared))
    return target_losses(hidden, head, targets, smoothing).sum()
