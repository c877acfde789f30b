"""Decoding with the cache at shape R (6 layers, hidden 384, 6 heads, vocabulary 4,096, context 256) beside transformers.

python tests/acceptance/decoding_speed.py    prints tokens per second of both, interleaved in one sitting, and the ratio
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from transformers import AutoModelForCausalLM

import lmcli
from lmcli.checkpoints import folder
from lmcli.config import GenerateConfig, ModelConfig, TokenizerConfig
from lmcli.model.transformer import Transformer
from lmcli.text import tokenizer

SHAPE_R = ModelConfig(vocab_size=4096, max_position_embeddings=256, hidden_size=384, num_hidden_layers=6,
                      num_attention_heads=6).complete()
PROMPT, NEW, ROUNDS = 32, 128, 5
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"


def make(path: Path) -> None:
    """A model folder of shape R with random weights."""
    model = Transformer(SHAPE_R)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    folder.save(path, model, tokenizer.learn([STORIES.read_text()], TokenizerConfig(4096)), GenerateConfig())


def measure(path: Path, dtype: str, rows: int) -> None:
    """Prints medians for one precision and batch size."""
    ours, theirs = lmcli.load(path, dtype=dtype), AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    ids = torch.randint(1, 4096, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    decoder = ours.decoder(temperature=0, max_new_tokens=NEW)
    decoder.stops = []

    def run_ours() -> None:
        decoder.generate(ids.tolist(), [0] * rows)

    def run_theirs() -> None:
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                        eos_token_id=None, pad_token_id=0)

    pairs = [(seconds(run_ours), seconds(run_theirs)) for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(theirs_ / ours_ for ours_, theirs_ in pairs)
    speeds = [rows * NEW / statistics.median(side) for side in zip(*pairs)]
    print(f"{dtype}, batch {rows}: ours {speeds[0]:.0f} tokens/s, transformers {speeds[1]:.0f}, ratio {ratio:.2f}",
          flush=True)
    assert ratio >= 1.0


def seconds(work) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
        for precision in ("float32", "bfloat16"):
            for batch in (1, 16):
                measure(Path(temporary), precision, batch)
