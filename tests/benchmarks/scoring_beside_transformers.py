"""Compares the speed of scoring with loops around transformers, at the size of GPT-2 small.

python tests/benchmarks/scoring_beside_transformers.py TEXT --tokenizer FOLDER [--lines 256]
    [--tokens 4096] [--rounds 5] [--dtype float32] [--threads N]

Both load the same folder with random weights. Lines are the sentences of TEXT (3 to 60 words). In
each round all take turns at the same work, so other load slows all alike:

- transformers, in another process: padded batches of 16 lines, in the order of the text;
- the same, sorted by length;
- transformers' documented recipe for long texts (windows of 1,024 tokens, stride 512);
- lm, as `lm score` and `lm perplexity` do both.

Prints medians of lines or new tokens per second and of the ratio in each round, then how lm's speed
compares with its own matrix products, and the distance of --dtype from float32.
"""

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import lmcli
from lmcli.api import Model
from lmcli.model import flops
from lmcli.planning.benchmark import ProductClock
from lmcli.scoring.scorer import Scorer

BATCH = 16


def sentences(text: str, count: int) -> list[str]:
    """The first sentences of 3 to 60 words."""
    pieces = (" ".join(piece.split()) for piece in re.split(r"(?<=[.!?]) |\n", text))
    return [piece for piece in pieces if 3 <= len(piece.split()) <= 60][:count]


class Transformers:
    """The usual loops around transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def lines(self, texts: list[str], in_order: bool) -> list[float]:
        """The log-probability of each text, the first token given the end-of-text token."""
        order = list(range(len(texts)))
        if not in_order:
            order.sort(key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = self.tokenizer(
                [self.tokenizer.bos_token + texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
            )
            logprobs = self.model(**batch).logits[:, :-1].float().log_softmax(-1)
            targets = batch.input_ids[:, 1:, None]
            target_logprobs = logprobs.gather(-1, targets)[..., 0] * batch.attention_mask[:, 1:]
            for i, total in zip(chosen, target_logprobs.double().sum(1).tolist()):
                scores[i] = total
        return scores

    @torch.inference_mode()
    def windows(self, tokens: list[int], context: int = 1024, stride: int = 512) -> float:
        """The summed log-probability by the recipe of transformers' page on perplexity."""
        ids, total, before = torch.tensor([tokens]), 0.0, 0
        for start in range(0, ids.shape[1], stride):
            end = min(start + context, ids.shape[1])
            window, targets = ids[:, start:end], ids[:, start:end].clone()
            targets[:, : before - end] = -100
            new_tokens = (targets[:, 1:] != -100).sum().item()
            total -= self.model(window, labels=targets).loss.item() * new_tokens
            before = end
            if end == ids.shape[1]:
                break
        return total


def make(folder: Path, tokenizer: Path) -> None:
    """Writes GPT-2 small with random weights."""
    import transformers

    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    if (tokenizer / "tokenizer.json").is_file():
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    else:
        files = str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt")
        transformers.GPT2Tokenizer(*files).save_pretrained(folder)


class TransformersProcess:
    """`Transformers` in another process, since lm configures the memory of its process."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (other, torch.get_num_threads(), folder, dtype)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()

    def __call__(self, method: str, *arguments: object) -> Any:
        """The result of a method."""
        self.pipe.send((method, arguments))
        return self.pipe.recv()


def _serve(pipe: Connection, threads: int, folder: Path, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    contestant = Transformers(folder, dtype)
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(contestant, method)(*arguments))


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    started = time.perf_counter()
    result = job()
    return time.perf_counter() - started, result


def share_of_products(loaded: Model, lengths: list[int], seconds: float) -> float:
    """FLOP/s of scoring rows of these lengths, relative to their matrix products alone.

    The products are timed at the size of a full batch.
    """
    config, batch = loaded.model.config, Scorer(loaded.model, loaded.tokenizer, []).batch
    rows = max(1, batch * len(lengths) // sum(lengths))
    mean = sum(lengths) // len(lengths)
    forward = flops.ForwardPass(rows, 0, mean, rows * mean)
    products = [
        product
        for product in flops.products(config, forward)
        if product.kind in ("linear", "scores", "mixture")
    ]
    clock = ProductClock(products, loaded.device_config)
    for _ in range(3):
        clock.measure()
    total = sum(product.flops for product in products) / (rows * mean) * sum(lengths)
    return total / seconds / clock.rate()


def measure(
    jobs: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of each job in each round, last result of each job)."""
    for name in ("lines, transformers sorted", "lines, lm", "windows, lm"):
        jobs[name]()  # kernels are prepared at the first call
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            elapsed, results[name] = timed(job)
            seconds[name].append(elapsed)
    return seconds, results


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Measures both on the model in a folder and prints the table."""
    text = options.text.read_text(encoding="utf-8")
    texts = sentences(text, options.lines)
    loaded = lmcli.load(folder, dtype=options.dtype, threads=options.threads)
    transformers = TransformersProcess(folder, getattr(torch, options.dtype))
    ids = loaded.encode(text)[: options.tokens]
    lines, windows = loaded.scorer(bos=True), loaded.scorer(bos=False, context=1024, stride=512)
    jobs: dict[str, Callable[[], Any]] = {
        "lines, transformers in order": lambda: transformers("lines", texts, True),
        "lines, transformers sorted": lambda: transformers("lines", texts, False),
        "lines, lm": lambda: [score.logprob for score in lines.score(texts)],
        "windows, transformers": lambda: transformers("windows", ids),
        "windows, lm": lambda: float(windows.token_logprobs([ids])[0][1:].sum()),
    }
    seconds, results = measure(jobs, options.rounds)

    # speed
    for name, times in seconds.items():
        kind = name.partition(",")[0]
        count, unit = (len(texts), "lines") if kind == "lines" else (len(ids), "tokens")
        ratios = [other / lm for other, lm in zip(times, seconds[f"{kind}, lm"])]
        print(
            f"{name:<30} {count / statistics.median(times):9.1f} {unit}/s  lm is "
            f"{statistics.median(ratios):.2f} × as fast ({min(ratios):.2f} – {max(ratios):.2f})"
        )
    lengths = [len(tokens) + 1 for tokens in loaded.tokenizer.encode_batch(texts)]
    share = share_of_products(loaded, lengths, statistics.median(seconds["lines, lm"]))
    print(
        f"{sum(lengths) / len(lengths):.1f} tokens per line; lm reaches {share:.0%} of the speed "
        "of its matrix products on lines"
    )

    # accuracy
    expected = lmcli.load(folder, dtype="float32").scorer(bos=True).score(texts)
    for name in ("lines, lm", "lines, transformers in order"):
        errors = [abs(logprob - score.logprob) for logprob, score in zip(results[name], expected)]
        print(
            f"{name}: differs from lm in float32 by {statistics.median(errors):.2g} nats per line "
            f"(median), {max(errors):.2g} (largest)"
        )


def main() -> None:
    """Makes the model in a temporary folder and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), options.tokenizer)
        compare(Path(temporary), options)


if __name__ == "__main__":
    main()
