"""Scoring speed: real passes over lines and windows, alternating with their matrix products."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lmcli.config import ModelConfig
from lmcli.data.length_batching import doubling_batches, group_by_length, tokens_per_forward
from lmcli.kernels.fast_path import build_model
from lmcli.model import flops
from lmcli.model.device import DeviceConfig, dtype_name, peak_memory
from lmcli.model.transformer import Transformer
from lmcli.planning.benchmark import MIN_STEPS, ProductClock
from lmcli.scoring.scorer import NATS_PER_BIT, Scorer
from lmcli.scoring.token_logprobs import CausalLogprobs, ScoreFields, ScoreRequest
from lmcli.text.windows import windows

# the shape of GPT-2 small with the parts of a Llama, for measurements without a model
REFERENCE = ModelConfig(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=50_257,
    max_position_embeddings=1024,
    intermediate_size=2048,
)
RANDOM_LINES, LINE_TOKENS = 256, (8, 40)  # 24 tokens on average
LONG_TEXT_CONTEXTS = 4  # contexts in the long text


@dataclass
class ScoringSpeed:
    """One measured scoring speed.

    achieved, limit: FLOP/s of the work that lines of these lengths need, without padding;
    ratio: achieved / limit; pass_ms: the median pass over all lines in milliseconds;
    bits_per_byte: of the scored lines, None for random weights.
    """

    name: str
    lines_per_second: float
    tokens_per_second: float
    achieved: float
    limit: float
    unit: str
    ratio: float
    bits_per_byte: float | None
    dtype: str
    threads: int
    pass_ms: float
    passes: int
    parameters: int
    peak_memory_bytes: int


@dataclass
class ScoringWorkload:
    """Something to time: `run` scores all lines and returns bits per byte if it knows them.

    `needed` are the forward passes without padding, `executed` those that are run.
    """

    name: str
    run: Callable[[], float | None]
    lines: int
    tokens: int
    needed: list[flops.ForwardPass]
    executed: list[flops.ForwardPass]


def random_model(device_config: DeviceConfig) -> Transformer:
    """The reference model with random weights."""
    torch.manual_seed(0)
    model = build_model(REFERENCE.complete())
    model.initialize(0)
    return model.to(device_config.device, device_config.dtype).eval()


def random_workloads(model: Transformer) -> list[ScoringWorkload]:
    """Lines of about 24 random ids, and a long text in windows with a stride of half a context."""
    config, generator = model.config, random.Random(0)
    context = config.max_position_embeddings
    batch = tokens_per_forward(model.embedding.weight.device.type)

    def random_ids(count: int) -> list[int]:
        return [generator.randrange(1, config.vocab_size) for _ in range(count)]

    lines = [random_ids(generator.randint(*LINE_TOKENS)) for _ in range(RANDOM_LINES)]
    text = random_ids(LONG_TEXT_CONTEXTS * context)
    logprobs = CausalLogprobs(model, [0], context, context // 2, batch)

    def score(texts: list[list[int]]) -> None:
        logprobs.compute([ScoreRequest(ids) for ids in texts], ScoreFields())

    spans = windows(len(text), context, context // 2, True)
    needed = [flops.ForwardPass(1, 0, s.end - s.start, s.end - s.first) for s in spans]
    rows = max(1, batch // context)
    return [
        ScoringWorkload(
            "lines",
            lambda: score(lines),
            len(lines),
            *_forward_passes([len(ids) for ids in lines], batch),
        ),
        ScoringWorkload(
            "windows",
            lambda: score([text]),
            1,
            len(text),
            needed,
            [flops.ForwardPass(rows, 0, context, rows * context // 2)],
        ),
    ]


def line_workload(name: str, scorer: Scorer, texts: Sequence[str]) -> ScoringWorkload:
    """Lines of text as `lm score` takes them, including tokenizing."""

    def run() -> float | None:
        scores = [score for batch in doubling_batches(texts) for score in scorer.score(batch)]
        bits = sum(-score.logprob for score in scores if score.logprob) / NATS_PER_BIT
        return bits / max(1, sum(score.bytes for score in scores))

    lengths = [len(ids) for ids in scorer.text_tokenizer.encode_batch(list(texts))]
    passes = _forward_passes([length for length in lengths if length], scorer.batch)
    return ScoringWorkload(name, run, len(texts), *passes)


def _forward_passes(
    lengths: list[int], batch: int
) -> tuple[int, list[flops.ForwardPass], list[flops.ForwardPass]]:
    """(tokens, passes as needed, passes as executed) of lines.

    A line's beginning token is read, its last token is not.
    """
    executed = []
    for group in group_by_length(lengths, batch):
        longest, predicted = lengths[group[0]], sum(lengths[i] for i in group)
        executed.append(flops.ForwardPass(len(group), 0, longest, predicted))
    return sum(lengths), [flops.ForwardPass(1, 0, length, length) for length in lengths], executed


def measure_scoring(
    workload: ScoringWorkload, config: ModelConfig, device_config: DeviceConfig, seconds: float
) -> ScoringSpeed:
    """Scores for `seconds` after a warm-up, at least three passes, alternating with products."""

    def products(passes: Sequence[flops.ForwardPass]) -> list[flops.MatrixProduct]:
        every = [product for forward in passes for product in flops.products(config, forward)]
        return [item for item in every if item.kind in ("linear", "scores", "mixture")]

    clock = ProductClock(products(workload.executed), device_config)
    durations: list[float] = []
    workload.run()
    until, bits = time.perf_counter() + seconds, None
    while len(durations) < MIN_STEPS or time.perf_counter() < until:
        started = time.perf_counter()
        bits = workload.run()
        durations.append(time.perf_counter() - started)
        clock.measure()
    median, limit = statistics.median(durations), clock.rate()
    achieved = sum(product.flops for product in products(workload.needed)) / median
    return ScoringSpeed(
        name=workload.name,
        lines_per_second=workload.lines / median,
        tokens_per_second=workload.tokens / median,
        achieved=achieved,
        limit=limit,
        unit="FLOP/s",
        ratio=achieved / limit,
        bits_per_byte=bits,
        dtype=dtype_name(device_config.dtype),
        threads=torch.get_num_threads(),
        pass_ms=1e3 * median,
        passes=len(durations),
        parameters=flops.parameters(config).total,
        peak_memory_bytes=peak_memory(device_config.device),
    )
