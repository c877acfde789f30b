"""Compares greedy and beam search with transformers' `generate`, token by token.

python tests/acceptance/beam_comparison.py [FAMILY …]

For each model family (default: all) and setting, both generate from 200 inputs. Prints how many
outputs are equal; exits with 1 unless all are.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors

import lmcli
from lmcli.api import generate_all
from lmcli.config import TokenizerConfig
from lmcli.text import tokenizer

INPUTS, VOCABULARY, NEW_TOKENS = 200, 420, 20
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"
SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
# family → (model class, config class, configuration)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "tie_word_embeddings": False,
        },
    ),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig,
        {**SIZES, "decoder_start_token_id": 2},
    ),
    "marian": (
        transformers.MarianMTModel,
        transformers.MarianConfig,
        {**SIZES, "decoder_start_token_id": 1},
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
}
BEAMS = {"num_beams": 4}
# name → options of generation_config.json
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, rules": {
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 5,
        "suppress_tokens": [7, 9],
    },
    "4 beams": BEAMS,
    **{
        f"length penalty {power}, early stopping {early}": {
            **BEAMS,
            "length_penalty": power,
            "early_stopping": early,
        }
        for power in (0.0, 0.6, 1.0, 2.0)
        for early in (False, True, "never")
    },
    "no-repeat 2": {**BEAMS, "no_repeat_ngram_size": 2},
    "no-repeat 3, all 4 beams": {**BEAMS, "no_repeat_ngram_size": 3, "num_return_sequences": 4},
    "forced first and last": {
        **BEAMS,
        "forced_bos_token_id": 11,
        "forced_eos_token_id": 2,
        "early_stopping": True,
    },
    "suppressed": {
        **BEAMS,
        "suppress_tokens": [5, 6, *range(100, 200)],
        "begin_suppress_tokens": [2, *range(200, 300)],
        "forced_bos_token_id": 11,
    },
    "bad words": {**BEAMS, "bad_words_ids": [[5], [2], *([i, i + 1] for i in range(20, 400, 2))]},
    "lengths, penalty": {
        **BEAMS,
        "min_new_tokens": 8,
        "repetition_penalty": 1.4,
        "num_return_sequences": 2,
    },
    "min_length, max_length": {**BEAMS, "min_length": 6, "max_length": 12, "length_penalty": 2.0},
}


def make(family: str, folder: Path) -> Any:
    """A random transformers model, saved with a tokenizer; sharp enough for beams to differ."""
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(1)
    model = model_class(config_class(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sinusoidal = family == "marian" and "embed_positions" in name
            if weight.ndim > 1 and not sinusoidal:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * _scale(name, weight) * weight.shape[1] ** -0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, VOCABULARY, generator=generator))
    model.save_pretrained(folder)
    texts = STORIES.read_text(encoding="utf-8").splitlines()[:300]
    learned = tokenizer.learn(texts, TokenizerConfig(400))
    if model.config.is_encoder_decoder:
        (eos,) = learned.pieces([2])
        learned.core.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, 2)]
        )
    learned.save(folder)
    return model


def _scale(name: str, weight: torch.Tensor) -> float:
    if "head" in name or weight.shape[0] == VOCABULARY:
        return 2.0
    return 3.0 if "positions" in name else 1.5


def inputs(count: int) -> list[list[int]]:
    """Random sources or prompts of 2 to 12 tokens."""
    generator = random.Random(3)
    return [
        [generator.randrange(20, 400) for _ in range(generator.randint(2, 12))]
        for _ in range(count)
    ]


def padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows, padded on the left or on the right."""
    width = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        padding, ones = [0] * (width - len(row)), [1] * len(row)
        ids.append(padding + row if left else row + padding)
        masks.append(padding + ones if left else ones + padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def theirs(model: Any, rows: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    """The tokens that transformers generates, each text up to its end token."""
    decoder = not model.config.is_encoder_decoder
    batch = padded(rows, left=decoder)
    config = transformers.GenerationConfig(**settings)
    with torch.no_grad():
        sequences = model.generate(**batch, generation_config=config)
    new_tokens = sequences[:, batch["input_ids"].shape[1] if decoder else 1 :].tolist()
    stop_ids, texts = settings["eos_token_id"] or [], []
    for ids in new_tokens:
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        texts.append(ids if end is None else ids[: end + 1])
    return texts


def ours(folder: Path, rows: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    """The tokens that lm generates with these settings as the folder's generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    decoder = lmcli.load(folder).decoder()
    by_row = generate_all(decoder, rows, settings.get("num_return_sequences", 1), seed=0)
    return [result.tokens for results in by_row for result in results]


def complete(model: Any, settings: dict[str, Any], stop_ids: list[int]) -> dict[str, Any]:
    """A whole generation_config.json with these settings.

    A decoder's lengths are given as numbers of new tokens: transformers counts padding otherwise.
    """
    special = {
        "eos_token_id": stop_ids or None,
        "pad_token_id": 1,
        "do_sample": False,
        "bos_token_id": 0,
        "decoder_start_token_id": getattr(model.config, "decoder_start_token_id", None),
    }
    if "max_length" not in settings:
        return {**special, "max_new_tokens": NEW_TOKENS, **settings}
    if model.config.is_encoder_decoder:
        return {**special, **settings}
    others = {k: v for k, v in settings.items() if k not in ("min_length", "max_length")}
    return {**special, **others, "min_new_tokens": 5, "max_new_tokens": 11}


def likely_stop_ids(model: Any, rows: list[list[int]]) -> list[int]:
    """The eos and two frequent tokens: as end tokens they give texts of many lengths."""
    texts = theirs(model, rows, complete(model, BEAMS, []))
    counts = {token: sum(token in text for text in texts) for text in texts for token in text}
    frequent = [
        token for token, count in counts.items() if token != 1 and count <= len(texts) * 0.6
    ]
    return [2, *sorted(frequent, key=lambda token: -counts[token])[:2]]


def compare(
    family: str, count: int, names: tuple[str, ...] = tuple(SETTINGS)
) -> Iterator[tuple[str, int, int, int]]:
    """(setting, equal texts, all texts, number of different lengths) for each setting."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make(family, folder)
        rows = [
            [*row, 2] if model.config.is_encoder_decoder else [0, *row] for row in inputs(count)
        ]
        stop_ids = likely_stop_ids(model, rows)
        for name in names:
            settings = complete(model, SETTINGS[name], stop_ids)
            expected, texts = theirs(model, rows, settings), ours(folder, rows, settings)
            equal = sum(a == b for a, b in zip(expected, texts, strict=True))
            yield name, equal, len(expected), len({len(text) for text in expected})


def main() -> int:
    """Compares the families named on the command line; 1 if an output differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    failed = False
    for family in parser.parse_args().families or FAMILIES:
        for name, equal, total, lengths in compare(family, INPUTS):
            print(
                f"{family:8} {name:42} {equal} of {total} equal, {lengths} different lengths",
                flush=True,
            )
            failed |= equal != total
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
