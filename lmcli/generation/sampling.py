"""Sampling: filters on the logits of one text in the order of transformers, and the draw.

A filter tells which of the tokens that are left it keeps, so later ones see fewer tokens: nothing
sorts a whole vocabulary. A forbidden logit is −∞.
"""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcli.config import GenerateConfig
from lmcli.kernels import build
from lmcli.kernels.decode_step import log_sums

FORBIDDEN = float("-inf")

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def keep_top_k(logits: Floats, k: int) -> Flags:
    """(N,) True for the k ≥ 1 largest logits, and those equal to the k-th."""
    if k >= len(logits):
        return np.ones(len(logits), np.bool_)
    return logits >= np.partition(logits, len(logits) - k)[-k]


def keep_top_p(logits: Floats, p: float) -> Flags:
    """(N,) True for the likeliest tokens until their probability reaches p ≤ 1, at least one.

    Of equal logits the first ones are kept (Holtzman et al. 2020).
    """
    count, size = len(logits), 256
    best = logits.max()
    total = np.exp(logits - best).sum(dtype=np.float64)
    while True:  # mostly few tokens are enough: look at more only if they are not
        size = min(8 * size, count)
        ordered = np.sort(np.partition(logits, count - size)[count - size :])[::-1]
        probabilities = np.exp(ordered - best).astype(np.float64) / total
        cumulative = probabilities.cumsum()
        if size == count or cumulative[-1] >= p:
            break
    before = cumulative - probabilities  # total of the tokens likelier than this
    number = max(1, int((before < p).sum()))
    keep = logits > ordered[number - 1]
    equal = np.nonzero(logits == ordered[number - 1])[0]
    keep[equal[: number - int(keep.sum())]] = True
    return keep


def keep_min_p(logits: Floats, p: float) -> Flags:
    """(N,) True for tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return np.exp(logits - logits.max()) >= p


def _log_softmax(logits: Floats) -> Floats:
    return logits - np.float32(log_sum_exp(logits))


def keep_typical(logits: Floats, p: float) -> Flags:
    """(N,) True for tokens whose surprisal is nearest to the entropy, until their probability is p.

    At least one; of equally near ones all (Meister et al. 2023).
    """
    logprobs = _log_softmax(logits)
    probabilities = np.exp(logprobs)
    distance = np.abs(-logprobs + (probabilities * logprobs).sum())
    order = np.argsort(distance)
    count = int((probabilities[order].cumsum(dtype=np.float64) < p).sum())
    return distance <= distance[order[min(count, len(order) - 1)]]


def keep_epsilon(logits: Floats, epsilon: float) -> Flags:
    """(N,) True for tokens of at least this probability, and the likeliest (Hewitt et al. 2022)."""
    return (np.exp(_log_softmax(logits)) >= epsilon) | (logits == logits.max())


def keep_eta(logits: Floats, epsilon: float) -> Flags:
    """(N,) as `keep_epsilon`, with less where the entropy is high (Hewitt et al. 2022)."""
    logprobs = _log_softmax(logits)
    entropy = -(np.exp(logprobs) * logprobs).sum()
    return keep_epsilon(logits, min(epsilon, epsilon**0.5 * float(np.exp(-entropy))))


def keep_top_h(logits: Floats, share: float) -> Flags:
    """(N,) True for the likeliest with this share of the entropy of the first 100, at least one.

    Top-H decoding (Potraghloo et al. 2025).
    """
    best = np.argsort(-logits, kind="stable")[:100]
    logprobs = _log_softmax(logits[best])
    entropy = (-np.exp(logprobs) * logprobs).cumsum()
    count = max(1, int((entropy <= share * entropy[-1]).sum()))
    keep = np.zeros(len(logits), np.bool_)
    keep[best[:count]] = True
    return keep


def apply_filters(logits: Floats, config: GenerateConfig) -> tuple[Integers, Floats]:
    """(ids, logits) of what temperature and filters leave of logits (V,).

    Ids ascend; there is none if all logits are FORBIDDEN. The temperature is above 0.
    """
    # a smaller divisor would overflow; it would draw the same token
    logits = logits / np.float32(max(config.temperature, 1e-30))
    ids = np.nonzero(logits > FORBIDDEN)[0]
    logits = logits[ids]
    filters: tuple[tuple[bool, Callable[[Floats, Any], Flags], float], ...] = (
        (config.top_h > 0, keep_top_h, config.top_h),
        (config.top_k > 0, keep_top_k, config.top_k),
        (config.top_p < 1.0, keep_top_p, config.top_p),
        (config.min_p > 0, keep_min_p, config.min_p),
        (config.typical_p < 1.0, keep_typical, config.typical_p),
        (config.epsilon_cutoff > 0, keep_epsilon, config.epsilon_cutoff),
        (config.eta_cutoff > 0, keep_eta, config.eta_cutoff),
    )
    for applies, keeps, value in filters:
        if applies and len(ids):
            keep = keeps(logits, value)
            ids, logits = ids[keep], logits[keep]
    return ids, logits


def draw(logits: Floats, uniform: float) -> int:
    """An index drawn from softmax(logits), (N,), by a random number `uniform` in [0, 1)."""
    cumulative = np.exp(logits.astype(np.float64) - logits.max()).cumsum()
    # the first one whose cumulative sum exceeds the target; those of probability 0 never do
    index = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return min(int(index), len(logits) - 1)


def choose(logits: Floats, config: GenerateConfig, random: Random) -> int | None:
    """The next id after logits (V,): drawn, or the likeliest at temperature 0; None without any."""
    if not config.temperature:
        best = int(logits.argmax())
        return None if logits[best] == FORBIDDEN else best
    ids, logits = apply_filters(logits, config)
    return int(ids[draw(logits, random.random())]) if len(ids) else None


def likeliest(logits: Floats, count: int) -> Integers:
    """Ids of the `count` largest logits (V,), largest first; of equal ones the first."""
    count = min(count, len(logits))
    ids = np.nonzero(keep_top_k(logits, count))[0]
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def log_sum_exp(logits: Floats) -> NDArray[np.float64]:
    """log Σ exp over the last axis; NaN or infinite if a logit is NaN or +∞, or all are −∞."""
    rows = logits.reshape(-1, logits.shape[-1])
    if build.is_loaded() and logits.dtype == np.float32:
        return log_sums(rows).reshape(logits.shape[:-1])
    best = logits.max(-1)[..., None]
    totals = np.empty(len(rows))
    at_once = max(1, (1 << 16) // len(rows[0]))  # rows that stay in the processor's cache
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, len(rows), at_once):
            block = slice(start, start + at_once)
            differences = rows[block] - best.reshape(-1, 1)[block]
            totals[block] = np.exp(differences, out=differences).sum(-1, dtype=np.float64)
        return best[..., 0] + np.log(totals).reshape(logits.shape[:-1])
