"""Seconds from the start of a process to the first token, beside `import torch` and transformers.

    python tests/benchmarks/start_time.py [--rounds N]

Each round starts every process once, so that other load meets all of them; the medians over the
rounds are printed, and the medians of each round's ratio to `lm generate`. The model has shape R (6
layers, 384 wide, 12M parameters) with random weights, and all files are in the page cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THEIRS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
text = model.generate(ids, do_sample=False, max_new_tokens=1, pad_token_id=0)
print(tokenizer.decode(text[0, ids.shape[1]:]), flush=True)
"""


def save_model(folder: Path) -> None:
    """A model folder of shape R with random weights in float32, as `lm train` writes it."""
    from lmcli.checkpoints import folder as checkpoints
    from lmcli.config import GenerateConfig, ModelConfig, TokenizerConfig
    from lmcli.kernels.fast_path import build_model
    from lmcli.text.tokenizer import learn

    text = Path(__file__).resolve().parents[2] / "data" / "stories.txt"
    lines = text.read_text(encoding="utf-8").splitlines()
    tokenizer = learn(lines, TokenizerConfig(vocab_size=4096))
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = ModelConfig(vocab_size=4096, max_position_embeddings=256, **sizes).complete()
    model = build_model(config)
    model.initialize(0)
    checkpoints.save(folder, model, tokenizer, GenerateConfig())


def first_output(command: list[str]) -> tuple[float, float]:
    """(seconds to the first byte of standard output, seconds to the end) of a command."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        output = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not output:
        raise SystemExit(f"{command[:4]} failed")
    return first, time.perf_counter() - start


def main() -> None:
    """Measures and prints a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        lm = [sys.executable, "-m", "lmcli", "generate", "-m", folder, "--temperature", "0"]
        lm += ["-n", "1", "Once upon a time", "--dtype"]
        commands = {
            "lm generate, float32": [*lm, "float32"],
            "lm generate, bfloat16": [*lm, "bfloat16"],
            "lm --version": [sys.executable, "-m", "lmcli", "--version"],
            "import numpy, tokenizers": [
                *(sys.executable, "-c"),
                "import numpy, tokenizers; print(1, flush=True)",
            ],
            "import torch": [sys.executable, "-c", "import torch; print(1, flush=True)"],
            "transformers, float32": [sys.executable, "-c", THEIRS, folder, "float32"],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                measured = first_output(command)
                if number:  # the first one fills caches, and compiles the kernels
                    times[name].append(measured)
    ours = [first for first, _ in times["lm generate, float32"]]
    print("process\tfirst output s\tend s\ttimes lm generate")
    for name, measured in times.items():
        first, end = (statistics.median(column) for column in zip(*measured))
        ratio = statistics.median(theirs / own for (theirs, _), own in zip(measured, ours))
        print(f"{name}\t{first:.3f}\t{end:.3f}\t{ratio:.2f}")


if __name__ == "__main__":
    main()
