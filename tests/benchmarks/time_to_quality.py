"""Compares `lm train` with nanoGPT's README recipe for a CPU: the time to reach a quality.

python tests/benchmarks/time_to_quality.py TEXT --nanogpt CHECKOUT [--times 6s,8s,10s] [--seeds 3]
python tests/benchmarks/time_to_quality.py TEXT --val FILE --nanogpt CHECKOUT --tokenizer RUN
    --minutes 20 --times 4m

Without --val the first 90 % of the text are for training, the rest for validation. nanoGPT (4
layers × 128, context 64, batch 12, 2,000 steps, characters) runs its own train.py in a copy of the
checkout, about two minutes per seed. lm learns its tokenizer within its time.

Both are measured as bits per byte in disjoint windows of their own context, on every byte of the
validation text. Both clocks run from process start to saved model. The last column is `lm
perplexity` with its defaults.

With --tokenizer, nanoGPT reads the tokens of that folder (RUN: of the model that lm trained last
here), encoded before its clock starts. With --minutes it makes as many steps as last about so long,
estimated from runs of 250 and 750 steps.
"""

import argparse
import json
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

CONTEXT = 64  # of nanoGPT
RECIPE = (
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=100",
    f"--block_size={CONTEXT}",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--dropout=0.0",
    "--always_save_checkpoint=True",
    "--dataset=here",
    "--out_dir=out",
)
# runs in the copy: every token of the validation text but the first is predicted once
MEASURE = """
import json, math, pickle, sys, torch, numpy as np
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"])); model.load_state_dict(saved["model"]); model.eval()
ids = torch.from_numpy(np.fromfile("data/here/val.bin", dtype=np.uint16).astype(np.int64))
size, total = saved["model_args"]["block_size"], 0.0
with torch.no_grad():
    for start in range(0, len(ids) - 1, size):
        row = ids[start:start + size + 1]
        total += float(model(row[None, :-1], row[None, 1:])[1]) * (len(row) - 1)
print(json.dumps(total / math.log(2)))
"""


@dataclass(frozen=True)
class Encoding:
    """How nanoGPT's text is encoded: to ids below `vocab_size`, at most 65,536."""

    encode: Callable[[str], list[int]]
    vocab_size: int


def character_encoding(text: str) -> Encoding:
    """Numbers the characters of a text, as nanoGPT's prepare.py does."""
    ids = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return Encoding(lambda part: [ids[letter] for letter in part], len(ids))


def tokenizer_encoding(folder: Path) -> Encoding:
    """Encodes with the tokenizer of a model folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Encoding(
        lambda part: tokenizer.encode(part, add_special_tokens=False).ids,
        tokenizer.get_vocab_size(),
    )


def train_nanogpt(
    checkout: Path, texts: dict[str, str], encoding: Encoding, steps: int, seed: int
) -> tuple[float, float]:
    """(seconds, bits per byte) of nanoGPT's README recipe on the texts "train" and "val"."""
    with tempfile.TemporaryDirectory() as temporary:
        # a copy with the data and the seed
        copy = Path(temporary) / "nanoGPT"
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
        folder = copy / "data" / "here"
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.bin").write_bytes(array("H", encoding.encode(text)).tobytes())
        with (folder / "meta.pkl").open("wb") as out:
            pickle.dump({"vocab_size": encoding.vocab_size}, out)
        script = (copy / "train.py").read_text()
        script = script.replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}")
        (copy / "train.py").write_text(script)
        # training
        length = (f"--max_iters={steps}", f"--lr_decay_iters={steps}")
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "train.py", *RECIPE, *length],
            cwd=copy,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        # measurement
        measure = [sys.executable, "-c", MEASURE]
        completed = subprocess.run(measure, cwd=copy, check=True, capture_output=True, text=True)
        bits = json.loads(completed.stdout.splitlines()[-1])
        return seconds, bits / len(texts["val"].encode())


def train_lm(
    folder: Path, training: Path, validation: Path, budget: str, seed: int
) -> tuple[float, float, float]:
    """(seconds, bits per byte in disjoint windows, by `lm perplexity`) of preset auto."""
    started = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, "-m", "lmcli", "train", "-q", str(training)),
            *("--val", str(validation), "-o", str(folder), "--time", budget),
            *("--seed", str(seed), "--overwrite"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - started
    context = str(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    windows = ["--context", context, "--stride", context]
    return seconds, bits_per_byte(folder, validation, windows), bits_per_byte(folder, validation)


def bits_per_byte(folder: Path, validation: Path, options: list[str] | None = None) -> float:
    """Bits per byte by `lm perplexity`."""
    command = [sys.executable, "-m", "lmcli", "perplexity", "-m", str(folder), "--json"]
    completed = subprocess.run(
        [*command, *(options or []), str(validation)], check=True, capture_output=True, text=True
    )
    return json.loads(completed.stdout.splitlines()[0])["bits_per_byte"]


def run_nanogpt(
    options: argparse.Namespace, training: Path, validation: Path, run: Path, seed: int
) -> tuple[float, float]:
    """(seconds, bits per byte) of nanoGPT with the options; `run` is lm's last model."""
    texts = {
        "train": training.read_text(encoding="utf-8"),
        "val": validation.read_text(encoding="utf-8"),
    }
    if options.tokenizer:
        encoding = tokenizer_encoding(
            run if options.tokenizer == "RUN" else Path(options.tokenizer)
        )
    else:
        encoding = character_encoding("".join(texts.values()))
    steps = options.steps
    if options.minutes:
        few, more = (
            train_nanogpt(options.nanogpt, texts, encoding, count, seed)[0] for count in (250, 750)
        )
        steps = round(500 * (60 * options.minutes - few) / (more - few))
        print(f"nanoGPT: {steps:,} steps, vocabulary {encoding.vocab_size:,}", flush=True)
    return train_nanogpt(options.nanogpt, texts, encoding, steps, seed)


def main() -> None:
    """Prints a row for each contestant: medians over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--tokenizer", metavar="FOLDER|RUN")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--times", default="6s,8s,10s")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    text = options.text.read_bytes()
    cut = len(text) if options.val else len(text) * 9 // 10
    with tempfile.TemporaryDirectory() as temporary:
        training, validation = Path(temporary) / "train.txt", Path(temporary) / "val.txt"
        training.write_bytes(text[:cut])
        validation.write_bytes(options.val.read_bytes() if options.val else text[cut:])
        run = Path(temporary) / "run"
        jobs: dict[str, Callable[[int], tuple[float, ...]]] = {}
        for budget in filter(None, options.times.split(",")):
            jobs[f"lm, {budget}"] = partial(train_lm, run, training, validation, budget)
        if options.nanogpt:
            jobs["nanoGPT"] = partial(run_nanogpt, options, training, validation, run)
        for name, job in jobs.items():
            results = [job(seed) for seed in range(options.seeds)]
            seconds, bits, *by_perplexity = (statistics.median(column) for column in zip(*results))
            by_seed = ", ".join(f"{result[1]:.4f}" for result in results)
            print(
                f"{name:<12} {seconds:6.1f} s  {bits:.4f} bits/byte ({by_seed})"
                f"{''.join(f'  {value:.4f}' for value in by_perplexity)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
