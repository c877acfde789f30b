"""Logits → the logits that may be drawn, and the draw. Pure functions on (B, V), in the order transformers applies them."""

import torch
from torch import Tensor

from lmcli.config import GenerateConfig

NEVER = float("-inf")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of ids in `seen` (B, n) divided by `penalty` where positive, multiplied where negative
    (Keskar et al. 2019)."""
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found > 0, found / penalty, found * penalty))


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits below the k-th largest become −∞; ties with it stay. k is 1 or more."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], NEVER)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose probability reaches p, 0 ≤ p ≤ 1 (Holtzman et al. 2020)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what is likelier than this token
    drop = before >= p
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), NEVER)


def apply_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest, 0 ≤ p ≤ 1 (Nguyen et al. 2024)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)


def filtered(logits: Tensor, config: GenerateConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) float32 after penalty, temperature, top-k, top-p and min-p, each only where it does something."""
    if config.repetition_penalty != 1.0 and seen is not None:
        logits = apply_repetition_penalty(logits, seen, config.repetition_penalty)
    if not config.temperature:
        return logits
    logits = logits / max(config.temperature, 1e-30)  # less would divide to infinity, and draws the same
    if config.top_k:
        logits = apply_top_k(logits, config.top_k)
    if config.top_p < 1.0:
        logits = apply_top_p(logits, config.top_p)
    if config.min_p:
        logits = apply_min_p(logits, config.min_p)
    return logits


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """Ids (B,) drawn with the probabilities that the logits (B, V) give; `chance` (B,) float64, uniform in [0, 1), decides.

    One number a row makes a row's draw independent of the rows beside it.
    """
    total = logits.cpu().double().softmax(-1).cumsum(-1)
    reached = chance[:, None] * total[:, -1:]
    # the first id whose running sum passes the mark; ids of probability 0 never do
    return torch.searchsorted(total, reached, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]
