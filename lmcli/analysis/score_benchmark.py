"""How fast scoring runs: real passes over lines and windows, in turns with the matrix products they are made of."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lmcli.analysis.benchmark import FEWEST_STEPS, ProductClock, peak_memory
from lmcli.config import ModelConfig
from lmcli.inference.ordering import batch_tokens, grouped_by_length, growing
from lmcli.inference.scoring import NATS_PER_BIT, Scorer
from lmcli.inference.token_scores import Causal, Request, Wanted
from lmcli.model import cost
from lmcli.model.device import Placement, dtype_name
from lmcli.model.transformer import Transformer
from lmcli.text.windows import windows

# the shape of GPT-2 small with the parts of a Llama: what speeds are told for where no model is named
REFERENCE = ModelConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=50_257,
                        max_position_embeddings=1024, intermediate_size=2048)
LINES, LINE_TOKENS = 256, (8, 40)  # so many, of 24 tokens on average
CONTEXTS = 4  # a long text has so many


@dataclass
class Scored:
    """One measured speed: `tokens_per_second` scored, `lines_per_second`; `achieved` and `limit` in FLOP/s of the work that
    lines of these lengths need, without padding, and their `ratio`; `pass_ms` is the median pass over all lines.
    `bits_per_byte` is the quality beside it, None for random weights."""

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
class Work:
    """Something to time: `run` scores `lines` texts, `tokens` tokens in all, and returns bits per byte if it knows them.
    `needed` are the forward passes without padding, `done` those that are run."""

    name: str
    run: Callable[[], float | None]
    lines: int
    tokens: int
    needed: list[cost.Passes]
    done: list[cost.Passes]


def random_model(placement: Placement) -> Transformer:
    """The reference, with random weights."""
    torch.manual_seed(0)
    model = Transformer(REFERENCE.complete())
    model.initialize(0)
    return model.to(placement.device, placement.dtype).eval()


def random_work(model: Transformer) -> list[Work]:
    """Lines of some 24 random ids, and a long text in windows of the context that add half of it each."""
    drawn, config = random.Random(0), model.config
    context, batch = config.max_position_embeddings, batch_tokens(model.embedding.weight.device)
    lines = [[drawn.randrange(1, config.vocab_size) for _ in range(drawn.randint(*LINE_TOKENS))] for _ in range(LINES)]
    text = [drawn.randrange(1, config.vocab_size) for _ in range(CONTEXTS * context)]
    reader = Causal(model, [0], context, context // 2, batch)
    views = list(windows(len(text), context, context // 2, True))
    rows = max(1, batch // context)
    return [
        Work("lines", lambda: reader.read([Request(ids) for ids in lines], Wanted()) and None, len(lines),
             *_passes([len(ids) for ids in lines], batch)),
        Work("windows", lambda: reader.read([Request(text)], Wanted()) and None, 1, len(text),
             [cost.Passes(1, 0, view.end - view.start, view.end - view.first) for view in views],
             [cost.Passes(rows, 0, context, rows * context // 2)])]


def line_work(name: str, scorer: Scorer, texts: Sequence[str]) -> Work:
    """Lines of text as `lm score` takes them, tokenizing included."""
    def run() -> float | None:
        scores = [score for part in growing(texts) for score in scorer.score(part)]
        bits = sum(-score.logprob for score in scores if score.logprob) / NATS_PER_BIT
        return bits / max(1, sum(score.bytes for score in scores))

    lengths = [len(ids) for ids in scorer.texts.encode_batch(list(texts))]
    return Work(name, run, len(texts), *_passes([size for size in lengths if size], scorer.batch))


def _passes(lengths: list[int], batch: int) -> tuple[int, list[cost.Passes], list[cost.Passes]]:
    """(tokens, passes as needed, passes as run) of lines, whose beginning token is read and last token is not."""
    done = []
    for group in grouped_by_length(lengths, batch):
        longest, predicted = lengths[group[0]], sum(lengths[i] for i in group)
        done.append(cost.Passes(len(group), 0, longest, predicted))
    return sum(lengths), [cost.Passes(1, 0, size, size) for size in lengths], done


def measure(work: Work, config: ModelConfig, placement: Placement, seconds: float) -> Scored:
    """Runs the work for about `seconds`, three passes at least after one to warm up, in turns with its products."""
    def products(passes: Sequence[cost.Passes]) -> list[cost.Product]:
        return [product for one in passes for product in cost.products(config, one)
                if product.kind in ("linear", "scores", "mixture")]

    clock, taken = ProductClock(products(work.done), placement), []
    work.run()
    until, bits = time.perf_counter() + seconds, None
    while len(taken) < FEWEST_STEPS or time.perf_counter() < until:
        started = time.perf_counter()
        bits = work.run()
        taken.append(time.perf_counter() - started)
        clock.turn()
    median, limit = statistics.median(taken), clock.rate()
    achieved = sum(product.flops for product in products(work.needed)) / median
    return Scored(work.name, work.lines / median, work.tokens / median, achieved, limit, "FLOP/s", achieved / limit, bits,
                  dtype_name(placement.dtype), torch.get_num_threads(), 1e3 * median, len(taken),
                  cost.parameters(config).total, peak_memory(placement.device))
