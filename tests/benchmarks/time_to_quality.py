"""How long until a quality is reached: `lm train` beside nanoGPT's README recipe for a CPU, on one text of characters.

python tests/benchmarks/time_to_quality.py TEXT --nanogpt CHECKOUT [--times 6s,8s,10s] [--seeds 3]
python tests/benchmarks/time_to_quality.py TEXT --val FILE --nanogpt CHECKOUT --tokenizer RUN --minutes 20 --times 4m

Without --val the text is split once, 90 % to train on and 10 % to validate on. nanoGPT (4 layers × 128, context 64, batch
12, 2,000 steps, characters) runs as its train.py runs, in a copy of the checkout; ours learns its tokenizer on the first
part within its time. Each is measured in disjoint windows of its own context over every validation byte, as bits per byte;
both clocks run from process start to saved model. The last column is `lm perplexity` as it stands. About two minutes a seed
for nanoGPT. With --tokenizer it reads the tokens of a folder of ours (RUN: of the model trained last here), made before its
clock starts; with --minutes it takes as many steps as last about so long, by runs of 250 and 750 steps.
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
from pathlib import Path

from tokenizers import Tokenizer

CONTEXT = 64  # nanoGPT's
RECIPE = ("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100",
          f"--block_size={CONTEXT}", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
          "--dropout=0.0", "--always_save_checkpoint=True", "--dataset=here", "--out_dir=out")
# run inside the copy: disjoint windows over every validation byte, each predicted once but the first of the text
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


def characters(text: str) -> Callable[[str], list[int]]:
    """An encoder that numbers the characters of a text, as nanoGPT's prepare.py does."""
    number = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return lambda part: [number[letter] for letter in part]


def nanogpt(checkout: Path, parts: dict[str, str], encode: Callable[[str], list[int]], vocab_size: int, steps: int,
            seed: int) -> tuple[float, float]:
    """(seconds, bits per byte) of its README recipe, on parts `train` and `val` as encoded to less than 65,536 ids."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "nanoGPT"
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
        folder = copy / "data" / "here"
        folder.mkdir()
        for name, text in parts.items():
            (folder / f"{name}.bin").write_bytes(array("H", encode(text)).tobytes())
        with (folder / "meta.pkl").open("wb") as out:
            pickle.dump({"vocab_size": vocab_size}, out)
        script = (copy / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}")
        (copy / "train.py").write_text(script)
        started = time.monotonic()
        subprocess.run([sys.executable, "train.py", *RECIPE, f"--max_iters={steps}", f"--lr_decay_iters={steps}"], cwd=copy,
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        bits = json.loads(subprocess.run([sys.executable, "-c", MEASURE], cwd=copy, check=True, capture_output=True,
                                         text=True).stdout.splitlines()[-1])
        return seconds, bits / len(parts["val"].encode())


def ours(folder: Path, training: Path, validation: Path, budget: str, seed: int) -> tuple[float, float, float]:
    """(seconds, bits per byte in disjoint windows, the same as `lm perplexity` tells it) of `lm train` with preset auto."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "lmcli", "train", "-q", str(training), "--val", str(validation), "-o", str(folder),
                    "--time", budget, "--seed", str(seed), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    context = str(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    windows = ["--context", context, "--stride", context]
    return seconds, perplexity(folder, validation, windows), perplexity(folder, validation, [])


def perplexity(folder: Path, validation: Path, options: list[str]) -> float:
    """Bits per byte by `lm perplexity`."""
    command = [sys.executable, "-m", "lmcli", "perplexity", "-m", str(folder), "--json", *options, str(validation)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[0])["bits_per_byte"]


def main() -> None:
    """Prints a row for each contestant: medians over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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

        def peer(seed: int) -> tuple[float, float]:
            parts = {"train": training.read_text(encoding="utf-8"), "val": validation.read_text(encoding="utf-8")}
            if options.tokenizer:
                folder = run if options.tokenizer == "RUN" else Path(options.tokenizer)
                tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
                encode, size = lambda part: tokenizer.encode(part, add_special_tokens=False).ids, tokenizer.get_vocab_size()
            else:
                letters = "".join(parts.values())
                encode, size = characters(letters), len(set(letters))
            steps = options.steps
            if options.minutes:
                few, more = (nanogpt(options.nanogpt, parts, encode, size, count, seed)[0] for count in (250, 750))
                steps = round(500 * (60 * options.minutes - few) / (more - few))
                print(f"nanoGPT: {steps:,} steps, vocabulary {size:,}", flush=True)
            return nanogpt(options.nanogpt, parts, encode, size, steps, seed)

        jobs = {f"lm, {budget}": lambda seed, budget=budget: ours(run, training, validation, budget, seed)
                for budget in options.times.split(",") if budget}
        if options.nanogpt:
            jobs["nanoGPT"] = peer
        for name, job in jobs.items():
            found = [job(seed) for seed in range(options.seeds)]
            seconds, bits, *standing = (statistics.median(side) for side in zip(*found))
            seeds = ", ".join(f"{values[1]:.4f}" for values in found)
            print(f"{name:<12} {seconds:6.1f} s  {bits:.4f} bits/byte ({seeds})"
                  f"{''.join(f'  {value:.4f}' for value in standing)}", flush=True)


if __name__ == "__main__":
    main()
