"""Hidden states → log-probabilities of targets: every loss, score and perplexity is made here."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcli.model.memory import logit_rows

Head = Callable[[Tensor], Tensor]  # hidden states (…, C) → logits (…, V)


@runtime_checkable
class LossHead(Protocol):
    """A head that computes losses itself, without holding all logits; see `summed_loss` below."""

    def summed_loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """The summed loss of all targets in nats, a scalar; hidden (N, C), targets (N,)."""

    def target_losses(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """The loss of each target in nats, (N,); hidden (N, C), targets (N,)."""


class TokenDistribution(NamedTuple):
    """What a model predicts at N positions, in nats.

    `logprobs` (N,) of the targets and `set_logprobs` (N,) of any token of a set; `entropy` (N,);
    `ranks` (N,) of the targets, 1 for the likeliest; the K likeliest `tokens` (N, K) and their
    log-probabilities `best` (N, K). None where not asked for.
    """

    logprobs: Tensor
    set_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    ranks: Tensor | None = None
    tokens: Tensor | None = None
    best: Tensor | None = None


def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-probability (nats) of each target, (N,) float32, from hidden states (N, C).

    Logits are computed for a few rows at a time and normalized in float32. Differentiable.
    """
    return -target_losses(hidden, head, targets)


def target_losses(hidden: Tensor, head: Head, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The training loss of each target, (N,) float32: −log p, nats.

    `smoothing` is the share of the target's weight that is spread over all tokens (Szegedy et al.
    2016). Targets (N, labels) of 0 and 1 are independent labels: their −log p by sigmoid, summed.
    """
    if targets.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(head(hidden).float(), targets, reduction="none")
        return losses.sum(-1)
    if isinstance(head, LossHead):
        return head.target_losses(hidden, targets, smoothing)
    return chunked_losses(hidden, head, targets, smoothing)


def chunked_losses(hidden: Tensor, head: Head, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """`target_losses` from logits of a few rows at a time."""
    losses = [
        F.cross_entropy(head(rows).float(), answers, reduction="none", label_smoothing=smoothing)
        for rows, answers in chunks(head, hidden, targets)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0)


def summed_loss(hidden: Tensor, head: Head, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `target_losses`, for training."""
    if isinstance(head, LossHead):
        return head.summed_loss(hidden, targets, smoothing)
    return target_losses(hidden, head, targets, smoothing).sum()


def chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states (N, C) with targets (N,), as many rows at a time as logits may have."""
    output = getattr(head, "output", head)  # of a LanguageHead, or a matrix alone
    rows = logit_rows(hidden.device.type, getattr(output, "out_features", 2048))
    return zip(hidden.split(rows), targets.split(rows))


def token_distributions(
    hidden: Tensor, head: Head, targets: Tensor, members: Tensor | None = None, count: int = 0
) -> TokenDistribution:
    """The TokenDistribution at hidden states (N, C), for targets (N,).

    `members` (V,) bool is the set of `set_logprobs`. `count` above 0 adds entropy, ranks and the
    `count` likeliest tokens.
    """
    if members is None and not count:
        return TokenDistribution(target_logprobs(hidden, head, targets))
    results = [
        _distribution(head(rows).float().log_softmax(-1), answers, members, count)
        for rows, answers in chunks(head, hidden, targets)
    ]
    return TokenDistribution._make(
        None if values[0] is None else torch.cat(values) for values in zip(*results)
    )


def _distribution(
    logprobs: Tensor, targets: Tensor, members: Tensor | None, count: int
) -> TokenDistribution:
    """The TokenDistribution of log-probabilities (N, V)."""
    of_target = logprobs.gather(1, targets[:, None])  # (N, 1)
    set_logprobs = None if members is None else logprobs[:, members].logsumexp(-1)
    if not count:
        return TokenDistribution(of_target[:, 0], set_logprobs)
    best, tokens = logprobs.topk(min(count, logprobs.shape[1]))
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    ranks = (logprobs > of_target).sum(-1) + 1
    return TokenDistribution(of_target[:, 0], set_logprobs, entropy, ranks, tokens, best)
