"""How fast lines and long texts are scored, beside loops around transformers, at the shape of GPT-2 small.

python tests/benchmarks/scoring_beside_transformers.py TEXT --tokenizer FOLDER [--lines 256] [--tokens 8192] [--rounds 5]
    [--dtype float32] [--threads N]

Weights are random; both load the same folder. Lines are the sentences of TEXT (3 to 60 words). In each round all take their
turn at the same work, so noise hits all alike: transformers, in a process of its own, one batch of 16 after another, padded,
in the order of the text; the same sorted by length; its documented recipe for long texts (windows of 1,024 tokens, stride
512); and ours, as `lm score` and `lm perplexity` do it. Printed are medians of lines or new tokens a second, and of each
round's ratio, then what part of the rate of the work's own matrix products ours reaches, and how far bfloat16 is from
float32.
"""

import argparse
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import lmcli
from lmcli.analysis.benchmark import ProductClock
from lmcli.inference.scoring import Scorer
from lmcli.model import cost

BATCH = 16


def sentences(text: str, count: int) -> list[str]:
    """Sentences of 3 to 60 words."""
    found = (" ".join(part.split()) for part in re.split(r"(?<=[.!?]) |\n", text))
    return [sentence for sentence in found if 3 <= len(sentence.split()) <= 60][:count]


class Theirs:
    """Loops as people write them around transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def lines(self, texts: list[str], in_order: bool) -> list[float]:
        """The log-probability of each, the first token from the end-of-text token."""
        order = list(range(len(texts))) if in_order else sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [0.0] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start:start + BATCH]
            rows = self.tokenizer([self.tokenizer.bos_token + texts[i] for i in chosen], return_tensors="pt", padding=True)
            logprobs = self.model(**rows).logits[:, :-1].float().log_softmax(-1)
            taken = logprobs.gather(-1, rows.input_ids[:, 1:, None])[..., 0] * rows.attention_mask[:, 1:]
            for i, total in zip(chosen, taken.double().sum(1).tolist()):
                found[i] = total
        return found

    @torch.inference_mode()
    def windows(self, ids: list[int], context: int = 1024, stride: int = 512) -> float:
        """The recipe of transformers' page on perplexity: the summed log-probability."""
        ids, total, before = torch.tensor([ids]), 0.0, 0
        for start in range(0, ids.shape[1], stride):
            end = min(start + context, ids.shape[1])
            part, targets = ids[:, start:end], ids[:, start:end].clone()
            targets[:, :before - end] = -100
            new = (targets[:, 1:] != -100).sum().item()
            total -= self.model(part, labels=targets).loss.item() * new
            before = end
            if end == ids.shape[1]:
                break
        return total


def make(folder: Path, tokenizer: Path) -> None:
    """GPT-2 small with random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    known = AutoTokenizer.from_pretrained(tokenizer) if (tokenizer / "tokenizer.json").is_file() else GPT2TokenizerFast(
        str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"))
    known.save_pretrained(folder)


class InItsOwnProcess:
    """`Theirs` apart from ours, which sets up its memory to its own liking."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, torch.get_num_threads(), *arguments), daemon=True)
        self.process.start()

    def __call__(self, name: str, *arguments) -> object:
        """What that method returns."""
        self.pipe.send((name, arguments))
        return self.pipe.recv()


def _serve(pipe, threads: int, *arguments) -> None:
    torch.set_num_threads(threads)
    theirs = Theirs(*arguments)
    while True:
        name, given = pipe.recv()
        pipe.send(getattr(theirs, name)(*given))


def timed(job) -> tuple[float, object]:
    """(seconds, result)."""
    started = time.perf_counter()
    result = job()
    return time.perf_counter() - started, result


def share_of_products(ours, lengths: list[int], seconds: float) -> float:
    """FLOPs of reading rows of such lengths in so many seconds, against the rate of those products at their best size."""
    config, batch = ours.model.config, Scorer(ours.model, ours.tokenizer, []).batch
    rows = max(1, batch * len(lengths) // sum(lengths))
    mean = sum(lengths) // len(lengths)
    made = [product for product in cost.products(config, cost.Passes(rows, 0, mean, rows * mean))
            if product.kind in ("linear", "scores", "mixture")]
    clock = ProductClock(made, ours.placement)
    for _ in range(3):
        clock.turn()
    flops = sum(product.flops for product in made) / (rows * mean) * sum(lengths)
    return flops / seconds / clock.rate()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    text = options.text.read_text(encoding="utf-8")
    texts = sentences(text, options.lines)
    folder = Path(tempfile.mkdtemp())
    try:
        make(folder, options.tokenizer)
        ours = lmcli.load(folder, dtype=options.dtype, threads=options.threads)
        theirs = InItsOwnProcess(folder, getattr(torch, options.dtype))
        ids = ours.encode(text)[:options.tokens]
        lines, windows = ours.scorer(bos=True), ours.scorer(bos=False, context=1024, stride=512)
        jobs = {"lines, theirs in order": lambda: theirs("lines", texts, True),
                "lines, theirs sorted": lambda: theirs("lines", texts, False),
                "lines, ours": lambda: [score.logprob for score in lines.score(texts)],
                "windows, theirs": lambda: theirs("windows", ids),
                "windows, ours": lambda: float(windows.token_logprobs([ids])[0][1:].sum())}
        for name in ("lines, theirs sorted", "lines, ours", "windows, ours"):
            jobs[name]()  # kernels are prepared at the first call
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        results = {}
        for _ in range(options.rounds):
            for name, job in jobs.items():
                taken, results[name] = timed(job)
                seconds[name].append(taken)
        for name, taken in seconds.items():
            kind = name.partition(",")[0]
            ratios = [own / mine for own, mine in zip(taken, seconds[f"{kind}, ours"])]
            work = len(texts) if kind == "lines" else len(ids)
            print(f"{name:<24} {work / statistics.median(taken):9.1f} {'lines' if kind == 'lines' else 'tokens'}/s  ours is "
                  f"{statistics.median(ratios):.2f} × as fast ({min(ratios):.2f} – {max(ratios):.2f})")
        lengths = [len(found) + 1 for found in ours.tokenizer.encode_batch(texts)]
        print(f"tokens a line {sum(lengths) / len(lengths):.1f}; ours reaches "
              f"{share_of_products(ours, lengths, statistics.median(seconds['lines, ours'])):.0%} of its products on lines")
        wanted = lmcli.load(folder, dtype="float32").scorer(bos=True).score(texts)
        for name in ("lines, ours", "lines, theirs in order"):
            apart = [abs(found - score.logprob) for found, score in zip(results[name], wanted)]
            print(f"{name}: from ours in float32 by {statistics.median(apart):.2g} nats a line (median), {max(apart):.2g} "
                  "(largest)")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
