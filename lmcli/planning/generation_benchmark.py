"""Speed of generation: steps of a decoder in C, alternating with a plain read of memory."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lmcli.kernels.decode_step import DecoderWeights, read_rate
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.kernels.processor import thread_count
from lmcli.model.device import peak_memory
from lmcli.planning.benchmark import StepSpeed

PROMPT_TOKENS, NEW_TOKENS = 32, 128
BATCHES = 1, 16
LEAST_READ = 1 << 28  # bytes: more than caches hold


@dataclass
class GenerationSpeed(StepSpeed):
    """One measured speed of generation, greedy, after prompts of PROMPT_TOKENS random tokens.

    achieved: bytes of weights read a second; limit: of a plain read of memory in the same run;
    a step adds a token to each text.
    """

    prompt_ms: float
    peak_memory_bytes: int


def measure_generation(
    name: str, weights: DecoderWeights, seconds: float
) -> Iterator[GenerationSpeed]:
    """Measures each size of a batch for so many seconds, after a warm-up."""
    data = np.ones(max(LEAST_READ, weights.bytes_read) // 8, np.int64)
    for batch in BATCHES:
        _text(weights, batch)
        steps: list[float] = []
        prompts: list[float] = []
        rates: list[float] = []
        started = time.perf_counter()
        while not steps or time.perf_counter() - started < seconds:
            prompt, text = _text(weights, batch)
            prompts.append(prompt)
            steps += text
            rates.append(read_rate(data))
        step, limit = statistics.median(steps), statistics.median(rates)
        achieved = weights.bytes_read / step
        yield GenerationSpeed(
            name=f"{name}, batch {batch}",
            tokens_per_second=batch / step,
            achieved=achieved,
            limit=limit,
            unit="B/s",
            ratio=achieved / limit,
            dtype=weights.weight_type,
            threads=thread_count(),
            step_ms=step * 1e3,
            steps=len(steps),
            prompt_ms=statistics.median(prompts) * 1e3,
            peak_memory_bytes=peak_memory(torch.device("cpu")),
        )


def _text(weights: DecoderWeights, batch: int) -> tuple[float, list[float]]:
    """Seconds for the prompts, and for each step, of `batch` texts."""
    config = weights.config
    context = config.max_position_embeddings
    new = min(NEW_TOKENS, context // 2)
    shape = batch, min(PROMPT_TOKENS, context - new)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()
    started = time.perf_counter()
    state = FastDecodingState(weights, prompts, context)
    seconds = [time.perf_counter() - started]
    for _ in range(new):
        started = time.perf_counter()
        state.add(state.logits.argmax(-1))
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1:]
