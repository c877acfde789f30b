"""Compares the generation speed of a Marian model with transformers, and batched with one by one.

python tests/acceptance/generation_speed.py

The model has 3 + 3 layers, hidden size 256 and a vocabulary of 8,000. All take turns in one
process. Prints tokens per second and ratios; fails if lm is slower than transformers.
"""

import argparse
import functools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers

from lmcli.api import generate_all
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig, TokenizerConfig
from lmcli.generation.decoding import Decoder
from lmcli.kernels.decoding_state import decoding_state
from lmcli.text import tokenizer

NEW_TOKENS, ROUNDS = 64, 5
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"
MARIAN = transformers.MarianConfig(
    vocab_size=8000,
    d_model=256,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=1024,
    decoder_ffn_dim=1024,
    max_position_embeddings=512,
    pad_token_id=7999,
    eos_token_id=0,
    decoder_start_token_id=7999,
    forced_eos_token_id=None,
    tie_word_embeddings=True,
)


def sources(count: int) -> list[list[int]]:
    """Random sources of 10 to 40 tokens."""
    generator = random.Random(0)
    return [
        [*(generator.randrange(1, 7999) for _ in range(generator.randint(9, 39))), 0]
        for _ in range(count)
    ]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """(median seconds of the first, of the second, median of second / first), run in turns.

    One more round before warms up.
    """
    times = [(seconds(first), seconds(second)) for _ in range(rounds + 1)][1:]
    first_times, second_times = zip(*times)
    ratio = statistics.median(b / a for a, b in times)
    return statistics.median(first_times), statistics.median(second_times), ratio


def compare_with_transformers(
    checkpoint: checkpoints.Checkpoint, reference: Any, beams: int
) -> None:
    """Prints tokens per second for 16 sources, each target NEW_TOKENS long."""
    rows = sources(16)
    width = max(map(len, rows))
    ids = torch.tensor([row + [7999] * (width - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    decoder = endless_decoder(checkpoint, beams, NEW_TOKENS)

    def run_transformers() -> None:
        reference.generate(
            ids,
            attention_mask=attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=beams,
            eos_token_id=None,
        )

    lm_time, reference_time, ratio = alternate(
        lambda: generate_all(decoder, rows, seed=0), run_transformers
    )
    method = f"{beams} beams" if beams > 1 else "greedy"
    print(
        f"{method}, batch 16: lm {16 * NEW_TOKENS / lm_time:.0f} tokens/s, "
        f"transformers {16 * NEW_TOKENS / reference_time:.0f}, ratio {ratio:.2f}",
        flush=True,
    )
    assert ratio >= 1.0


def endless_decoder(checkpoint: checkpoints.Checkpoint, beams: int, new_tokens: int) -> Decoder:
    """A Decoder without stop ids."""
    config = GenerateConfig(temperature=0.0, num_beams=beams, max_new_tokens=new_tokens)
    model = checkpoint.model
    states = functools.partial(decoding_state, model)
    return Decoder(model.config, states, checkpoint.tokenizer, [], [], config)


def compare_batched(checkpoint: checkpoints.Checkpoint) -> None:
    """Prints how much faster 4 beams for 64 sources are in batches than source by source."""
    rows, decoder = sources(64), endless_decoder(checkpoint, 4, 32)
    batched, one_by_one, ratio = alternate(
        lambda: generate_all(decoder, rows, seed=0),
        lambda: [generate_all(decoder, [row], seed=0) for row in rows],
        rounds=3,
    )
    print(
        f"4 beams for 64 sources: batched {batched:.2f} s, one by one {one_by_one:.2f} s, "
        f"ratio {ratio:.2f}"
    )


def main() -> None:
    """Makes a random model and measures greedy search, 4 beams and batching."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        reference = transformers.MarianMTModel(MARIAN).eval()
        reference.save_pretrained(temporary)
        texts = [STORIES.read_text(encoding="utf-8")]
        tokenizer.learn(texts, TokenizerConfig(2000)).save(Path(temporary))
        checkpoint = checkpoints.load(temporary)
        with torch.no_grad():
            for beams in (1, 4):
                compare_with_transformers(checkpoint, reference, beams)
            compare_batched(checkpoint)


if __name__ == "__main__":
    main()
