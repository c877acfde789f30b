"""Compares the speed of decoding with a KV cache with transformers, at shape R.

python tests/acceptance/decoding_speed.py

Shape R: 6 layers, hidden size 384, 6 heads, vocabulary 4,096, context 256. Both take turns in one
process. Prints tokens per second of both and the ratio; fails if lm is slower.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from transformers import AutoModelForCausalLM

import lmcli
from lmcli.checkpoints import folder
from lmcli.config import GenerateConfig, ModelConfig, TokenizerConfig
from lmcli.generation.decoding import Decoder
from lmcli.kernels.fast_path import build_model
from lmcli.text import tokenizer

SHAPE_R = ModelConfig(
    vocab_size=4096,
    max_position_embeddings=256,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
).complete()
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 128, 5
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"


def make(path: Path) -> None:
    """Writes a model folder of shape R with random weights."""
    model = build_model(SHAPE_R)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    learned = tokenizer.learn([STORIES.read_text()], TokenizerConfig(4096))
    folder.save(path, model, learned, GenerateConfig())


def measure(path: Path, dtype: str, rows: int) -> None:
    """Prints the medians for one precision and batch size."""
    lm = lmcli.load(path, dtype=dtype)
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    ids = torch.randint(1, 4096, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    decoder = lm.decoder(temperature=0, max_new_tokens=NEW_TOKENS)
    assert isinstance(decoder, Decoder)
    decoder.stop_ids = []  # every text has NEW_TOKENS tokens

    def run_lm() -> None:
        decoder.generate(ids.tolist(), [0] * rows)

    def run_transformers() -> None:
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    # the first round warms up
    rounds = [(seconds(run_lm), seconds(run_transformers)) for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(reference_time / lm_time for lm_time, reference_time in rounds)
    lm_speed, speed = (rows * NEW_TOKENS / statistics.median(times) for times in zip(*rounds))
    print(
        f"{dtype}, batch {rows}: lm {lm_speed:.0f} tokens/s, transformers {speed:.0f}, "
        f"ratio {ratio:.2f}",
        flush=True,
    )
    assert ratio >= 1.0


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measures both precisions with batches of 1 and 16."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
        for precision in ("float32", "bfloat16"):
            for batch in (1, 16):
                measure(Path(temporary), precision, batch)


if __name__ == "__main__":
    main()
