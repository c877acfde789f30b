"""Measures speed and memory of training as width, context or batch grows, to show any jumps.

python tests/benchmarks/cost_as_work_grows.py [--seconds 3]

One process per size; about three minutes on two cores.
"""

import argparse
import json
import subprocess
import sys

BASE = {"hidden_size": 256, "context": 256, "batch": 4096}
SIZES = {
    "hidden_size": (128, 256, 512, 1024),
    "context": (128, 256, 512, 1024, 2048),
    "batch": (512, 2048, 8192, 32768),
}


def measure(hidden_size: int, context: int, batch: int, seconds: float) -> dict:
    """The row that `lm bench --train` prints for 4 layers of this width, vocabulary 4,096."""
    settings = (
        f"model.hidden_size={hidden_size}",
        f"model.num_attention_heads={hidden_size // 64}",
        "model.num_hidden_layers=4",
        "model.vocab_size=4096",
        f"train.context={context}",
        f"train.batch_tokens={batch}",
        "train.dropout=0",
    )
    command = [
        *(sys.executable, "-m", "lmcli", "bench", "--train", "--json"),
        *("--preset", "tiny", "--seconds", str(seconds)),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def main() -> None:
    """Prints a row for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    print(
        f"{'width':>6} {'context':>8} {'batch':>7} {'tokens/s':>9} {'GFLOP/s':>8} "
        f"{'of products':>12} {'peak MB':>8}"
    )
    for key, sizes in SIZES.items():
        for size in sizes:
            work = {**BASE, key: size}
            row = measure(**work, seconds=seconds)
            print(
                f"{work['hidden_size']:>6} {work['context']:>8,} {work['batch']:>7,} "
                f"{row['tokens_per_second']:>9,.0f} {row['achieved'] / 1e9:>8,.0f} "
                f"{row['ratio']:>12.0%} {row['peak_memory_bytes'] / 1e6:>8,.0f}",
                flush=True,
            )
        print()


if __name__ == "__main__":
    main()
