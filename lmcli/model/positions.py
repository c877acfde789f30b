"""The frequencies of rotary positions, by the same formulas for tensors and for numpy's arrays."""

import math
from typing import Any

from lmcli.config import ModelConfig


def rotary_frequencies(config: ModelConfig, theta: float, index: Any) -> tuple[Any, float]:
    """(radians per position (R/2,), factor on cos and sin) of rotary position encoding.

    `index` is 0, 1 … R/2 − 1, a tensor or an array. The default is theta^(−2i/R) (Su et al. 2021).
    For contexts longer than in training, "linear" divides all frequencies by `rope_factor` (Chen et
    al. 2023), "llama3" only the low ones, and "yarn" the low ones while it sharpens attention (Peng
    et al. 2023).
    """
    size, factor = config.rotary_size, config.rope_factor
    trained_context = config.rope_original_context or config.max_position_embeddings
    frequencies = theta ** -(index / (size / 2))
    if config.rope_type == "linear":
        return frequencies / factor, 1.0
    if config.rope_type == "llama3":
        turns = trained_context * frequencies / (2 * math.pi)  # full turns in a training context
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        unchanged = ((turns - low) / (high - low)).clip(0, 1)
        return frequencies * (unchanged + (1 - unchanged) / factor), 1.0
    if config.rope_type == "yarn":

        def dimension(turns: float) -> float:
            """The index at which a frequency makes this many turns in a training context."""
            length = trained_context / (turns * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(theta))

        first = max(math.floor(dimension(32)), 0)
        last = min(math.ceil(dimension(1)), size - 1)
        width = last - first if last > first else 0.001
        ramp = ((index - first) / width).clip(0, 1)
        return frequencies * (1 - ramp + ramp / factor), 0.1 * math.log(factor) + 1.0
    return frequencies, 1.0
