"""Preset auto beside a fixed grid of 3 sizes × 2 vocabularies, on one text and time budget.

python tests/benchmarks/auto_beside_grid.py TEXT [--val FILE] [--time 60s] [--threads N]    seven runs of that time

Without --val the last tenth of the text is held out, for all alike. Prints bits per byte by the run's own measurement
(that of `lm perplexity --validation`), the seconds it took, and how far auto is from the best of the grid; exits 1 if that
is more than 3 %, or if auto was more than 5 % off its time.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

SIZES = {"4 × 128": (4, 128, 4, 128, 2048), "4 × 192": (4, 192, 6, 128, 4096), "6 × 256": (6, 256, 8, 256, 4096)}
VOCABULARIES = (1024, 4096)


def settings(layers: int, hidden: int, heads: int, context: int, batch: int, vocabulary: int) -> list[str]:
    """`--set` arguments of one cell of the grid."""
    values = {"model.num_hidden_layers": layers, "model.hidden_size": hidden, "model.num_attention_heads": heads,
              "train.context": context, "train.batch_tokens": batch, "train.dropout": 0.1,
              "tokenizer.vocab_size": vocabulary}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def run(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """(bits per byte, seconds) of one `lm train`."""
    subprocess.run([sys.executable, "-m", "lmcli", "train", "-q", "-o", str(folder), *arguments], check=True,
                   stdout=subprocess.DEVNULL)
    result = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["result"]
    return result["val_bits_per_byte"], result["seconds"]


def main() -> int:
    """Runs all seven and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--val")
    parser.add_argument("--time", default="60s")
    parser.add_argument("--threads")
    options = parser.parse_args()
    common = [options.text, "--time", options.time]
    common += ["--val", options.val] if options.val else []
    common += ["--threads", options.threads] if options.threads else []
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        jobs = {"auto": []} | {f"{size}, {vocabulary:,}": ["--preset", "small", *settings(*SIZES[size], vocabulary)]
                               for size in SIZES for vocabulary in VOCABULARIES}
        for number, (name, arguments) in enumerate(jobs.items()):
            found[name] = run(Path(temporary) / str(number), [*common, *arguments])
            print(f"{name:<16} {found[name][0]:.4f} bits/byte  {found[name][1]:.1f} s", flush=True)
    (reached, seconds), best = found.pop("auto"), min(found.values())[0]
    from lmcli.config import duration

    wanted = duration(options.time)
    print(f"auto is {reached / best - 1:+.1%} from the best of the grid; its time was off by {seconds / wanted - 1:+.1%}")
    return int(reached > 1.03 * best or abs(seconds / wanted - 1) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
