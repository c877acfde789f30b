"""Compares preset auto with a grid of 3 sizes × 2 vocabularies, on one text and time budget.

python tests/benchmarks/auto_beside_grid.py TEXT [--val FILE] [--time 60s] [--threads N]

Takes seven runs of that time. Without --val the last tenth of the text is the validation set of all
runs. Prints bits per byte as measured by the run (the same as `lm perplexity --validation`), the
seconds it took, and the difference of auto from the best of the grid. Exits with 1 if auto is more
than 3 % worse than the best, or misses its time by more than 5 %.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from lmcli.config import duration

# name → (layers, hidden size, heads, context, tokens per batch)
SIZES = {
    "4 × 128": (4, 128, 4, 128, 2048),
    "4 × 192": (4, 192, 6, 128, 4096),
    "6 × 256": (6, 256, 8, 256, 4096),
}
VOCABULARIES = (1024, 4096)


def settings(size: tuple[int, int, int, int, int], vocabulary: int) -> list[str]:
    """The `--set` options of one cell of the grid."""
    layers, hidden, heads, context, batch = size
    values = {
        "model.num_hidden_layers": layers,
        "model.hidden_size": hidden,
        "model.num_attention_heads": heads,
        "train.context": context,
        "train.batch_tokens": batch,
        "train.dropout": 0.1,
        "tokenizer.vocab_size": vocabulary,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def run(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """(bits per byte, seconds) of one `lm train`."""
    subprocess.run(
        [sys.executable, "-m", "lmcli", "train", "-q", "-o", str(folder), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    result = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["result"]
    return result["val_bits_per_byte"], result["seconds"]


def main() -> int:
    """Makes all seven runs and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("--val")
    parser.add_argument("--time", default="60s")
    parser.add_argument("--threads")
    options = parser.parse_args()
    common = [options.text, "--time", options.time]
    common += ["--val", options.val] if options.val else []
    common += ["--threads", options.threads] if options.threads else []

    # the runs
    jobs: dict[str, list[str]] = {"auto": []}
    for name, size in SIZES.items():
        for vocabulary in VOCABULARIES:
            sets = settings(size, vocabulary)
            jobs[f"{name}, {vocabulary:,}"] = ["--preset", "small", *sets]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, arguments) in enumerate(jobs.items()):
            bits, seconds = run(Path(temporary) / str(number), [*common, *arguments])
            results[name] = bits, seconds
            print(f"{name:<16} {bits:.4f} bits/byte  {seconds:.1f} s", flush=True)

    # auto and the best of the grid
    bits, seconds = results.pop("auto")
    best, _ = min(results.values())
    budget = duration(options.time)
    print(
        f"auto differs by {bits / best - 1:+.1%} from the best of the grid, "
        f"and its time by {seconds / budget - 1:+.1%} from the budget"
    )
    return int(bits > 1.03 * best or abs(seconds / budget - 1) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
