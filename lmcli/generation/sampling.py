"""Sampling: filters on logits (B, V) in the order of transformers, and the draw of the next token.

All functions are pure; a filtered logit is −∞.
"""

import torch
from torch import Tensor

from lmcli.config import GenerateConfig

FORBIDDEN = float("-inf")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the ids `seen` (B, n) less likely by a factor on their logits (Keskar et al. 2019)."""
    seen_logits = logits.gather(1, seen)
    penalized = torch.where(seen_logits > 0, seen_logits / penalty, seen_logits * penalty)
    return logits.scatter(1, seen, penalized)


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k ≥ 1 largest logits, and those equal to the k-th."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], FORBIDDEN)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the likeliest tokens until their probability reaches p ≤ 1 (Holtzman et al. 2020)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total of the tokens likelier than this
    drop = before >= p
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), FORBIDDEN)


def apply_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest, 0 ≤ p ≤ 1 (Nguyen et al. 2024)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), FORBIDDEN)


def apply_filters(logits: Tensor, config: GenerateConfig) -> Tensor:
    """Logits (B, V) after temperature, top-k, top-p and min-p; unchanged at temperature 0."""
    if not config.temperature:
        return logits
    # a smaller divisor would overflow; it would draw the same token
    logits = logits / max(config.temperature, 1e-30)
    if config.top_k:
        logits = apply_top_k(logits, config.top_k)
    if config.top_p < 1.0:
        logits = apply_top_p(logits, config.top_p)
    if config.min_p:
        logits = apply_min_p(logits, config.min_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Ids (B,) drawn from softmax(logits) by random numbers `uniform` (B,) float64 in [0, 1)."""
    cumulative = logits.cpu().double().softmax(-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    # the first id whose cumulative sum exceeds the target; ids of probability 0 never do
    ids = torch.searchsorted(cumulative, target, right=True)
    return ids.clamp(max=logits.shape[-1] - 1)[:, 0]
