"""Targets of a Marian (3 + 3 layers, width 256, vocabulary 8,000): beside transformers, batched beside one by one.

python tests/acceptance/generation_speed.py    prints tokens per second of both, interleaved in one sitting, and ratios
"""

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers

from lmcli.api import decode_all
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import TokenizerConfig
from lmcli.inference.decoding import Decoder
from lmcli.text import tokenizer

NEW, ROUNDS = 64, 5
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"
MARIAN = transformers.MarianConfig(
    vocab_size=8000, d_model=256, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=1024, decoder_ffn_dim=1024, max_position_embeddings=512, pad_token_id=7999, eos_token_id=0,
    decoder_start_token_id=7999, forced_eos_token_id=None, tie_word_embeddings=True)


def sources(count: int) -> list[list[int]]:
    """Sources of 10 to 40 tokens."""
    draw = random.Random(0)
    return [[*(draw.randrange(1, 7999) for _ in range(draw.randint(9, 39))), 0] for _ in range(count)]


def seconds(work) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(first, second, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Median seconds of two works done by turns, after one round each to warm up, and the median of second / first."""
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds + 1)][1:]
    return (*(statistics.median(side) for side in zip(*pairs)), statistics.median(b / a for a, b in pairs))


def beside_transformers(loaded, theirs, beams: int) -> None:
    """Prints tokens per second of 16 sources, every text NEW tokens long."""
    rows = sources(16)
    width = max(map(len, rows))
    ids = torch.tensor([row + [7999] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    lm = decoder(loaded, beams, NEW)

    def run_theirs() -> None:
        theirs.generate(ids, attention_mask=real, max_new_tokens=NEW, do_sample=False, num_beams=beams, eos_token_id=None)

    ours_, theirs_, ratio = paired(lambda: decode_all(lm, rows, seed=0), run_theirs)
    print(f"{f'{beams} beams' if beams > 1 else 'greedy'}, batch 16: ours {16 * NEW / ours_:.0f} tokens/s, transformers "
          f"{16 * NEW / theirs_:.0f}, ratio {ratio:.2f}", flush=True)
    assert ratio >= 1.0


def decoder(loaded, beams: int, new: int) -> Decoder:
    """A Decoder that never ends early."""
    config = checkpoints.GenerateConfig(temperature=0.0, num_beams=beams, max_new_tokens=new)
    return Decoder(loaded.model, loaded.tokenizer, [], [], config)


def batched(loaded) -> None:
    """Prints how much faster 4 beams of 64 sources are together than one source after another."""
    rows, lm = sources(64), decoder(loaded, 4, 32)
    together, alone, ratio = paired(lambda: decode_all(lm, rows, seed=0),
                                    lambda: [decode_all(lm, [row], seed=0) for row in rows], rounds=3)
    print(f"4 beams of 64 sources: together {together:.2f} s, one by one {alone:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        model = transformers.MarianMTModel(MARIAN).eval()
        model.save_pretrained(temporary)
        tokenizer.learn([STORIES.read_text(encoding="utf-8")], TokenizerConfig(2000)).save(Path(temporary))
        ours = checkpoints.load(temporary)
        with torch.no_grad():
            for beams_ in (1, 4):
                beside_transformers(ours, model, beams_)
            batched(ours)
