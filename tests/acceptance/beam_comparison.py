"""Greedy and beam search beside transformers' `generate`: the same tokens for 200 inputs, per family and setting.

python tests/acceptance/beam_comparison.py    prints how many are equal; exit code 1 unless all are
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import processors

import lmcli
from lmcli.api import decode_all
from lmcli.config import TokenizerConfig
from lmcli.text import tokenizer

INPUTS, VOCABULARY, NEW = 200, 420, 20
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"
SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
         "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": None}
FAMILIES = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1, "tie_word_embeddings": False}),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, {**SIZES, "decoder_start_token_id": 2}),
    "marian": (transformers.MarianMTModel, transformers.MarianConfig, {**SIZES, "decoder_start_token_id": 1}),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 2}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 2})}
BEAMS = {"num_beams": 4}
SETTINGS = {
    "greedy": {},
    "greedy, rules": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5, "suppress_tokens": [7, 9]},
    "4 beams": BEAMS,
    **{f"length penalty {power}, early stopping {early}": {**BEAMS, "length_penalty": power, "early_stopping": early}
       for power in (0.0, 0.6, 1.0, 2.0) for early in (False, True, "never")},
    "no-repeat 2": {**BEAMS, "no_repeat_ngram_size": 2},
    "no-repeat 3, all 4 beams": {**BEAMS, "no_repeat_ngram_size": 3, "num_return_sequences": 4},
    "forced first and last": {**BEAMS, "forced_bos_token_id": 11, "forced_eos_token_id": 2, "early_stopping": True},
    "suppressed": {**BEAMS, "suppress_tokens": [5, 6, *range(100, 200)], "begin_suppress_tokens": [2, *range(200, 300)],
                   "forced_bos_token_id": 11},
    "bad words": {**BEAMS, "bad_words_ids": [[5], [2], *([i, i + 1] for i in range(20, 400, 2))]},
    "lengths, penalty": {**BEAMS, "min_new_tokens": 8, "repetition_penalty": 1.4, "num_return_sequences": 2},
    "as long as it may be": {**BEAMS, "min_length": 6, "max_length": 12, "length_penalty": 2.0},
}


def make(family: str, folder: Path):
    """A random model of transformers, sharp enough for beams to differ, saved with a tokenizer; greedy texts of it."""
    kind, config, options = FAMILIES[family]
    torch.manual_seed(1)
    model = kind(config(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and (family, "embed_positions" in name) != ("marian", True):  # those are sines
                scale = 2.0 if "head" in name or weight.shape[0] == VOCABULARY else 3.0 if "positions" in name else 1.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale * weight.shape[1] ** -0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, VOCABULARY, generator=generator))
    model.save_pretrained(folder)
    words = tokenizer.learn(STORIES.read_text(encoding="utf-8").splitlines()[:300], TokenizerConfig(400))
    if model.config.is_encoder_decoder:
        words.core.post_processor = processors.TemplateProcessing(
            single=f"$A {words.pieces([2])[0]}", special_tokens=[(words.pieces([2])[0], 2)])
    words.save(folder)
    return model


def inputs(count: int) -> list[list[int]]:
    """Sources or prompts of 2 to 12 tokens."""
    draw = random.Random(3)
    return [[draw.randrange(20, 400) for _ in range(draw.randint(2, 12))] for _ in range(count)]


def padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps)]),
            "attention_mask": torch.tensor([gap + [1] * len(row) if left else [1] * len(row) + gap
                                            for row, gap in zip(rows, gaps)])}


def theirs(model, rows: list[list[int]], settings: dict) -> list[list[int]]:
    """What transformers writes, each text up to its end token."""
    decoder = not model.config.is_encoder_decoder
    batch = padded(rows, left=decoder)
    with torch.no_grad():
        found = model.generate(**batch, generation_config=transformers.GenerationConfig(**settings))
    ends, texts = settings["eos_token_id"] or [], []
    for ids in found[:, batch["input_ids"].shape[1] if decoder else 1:].tolist():
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        texts.append(ids if end is None else ids[:end + 1])
    return texts


def ours(folder: Path, rows: list[list[int]], settings: dict) -> list[list[int]]:
    """What lm writes with the same generation_config.json in the folder."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    lm = lmcli.load(folder)
    found = decode_all(lm.decoder(), rows, settings.get("num_return_sequences", 1), seed=0)
    return [result.tokens for results in found for result in results]


def complete(model, settings: dict, ends: list[int]) -> dict:
    """Settings as a whole generation_config.json; a decoder's lengths are told without its (padded) prompt."""
    special = {"eos_token_id": ends or None, "pad_token_id": 1, "do_sample": False, "bos_token_id": 0,
               "decoder_start_token_id": getattr(model.config, "decoder_start_token_id", None)}
    if not model.config.is_encoder_decoder and "max_length" in settings:
        settings = {key: value for key, value in settings.items() if key not in ("min_length", "max_length")}
        return {**special, **settings, "min_new_tokens": 5, "max_new_tokens": 11}
    return {**special, **({} if "max_length" in settings else {"max_new_tokens": NEW}), **settings}


def likely_ends(model, rows: list[list[int]]) -> list[int]:
    """Two tokens that many texts come to, early or late: as end tokens they make texts of many lengths."""
    texts = theirs(model, rows, complete(model, BEAMS, []))
    counts = {token: sum(token in text for text in texts) for text in texts for token in text}
    return [2, *sorted((token for token, count in counts.items() if token != 1 and count <= len(texts) * 0.6),
                       key=lambda token: -counts[token])[:2]]


def compare(family: str, count: int, names: tuple[str, ...] = tuple(SETTINGS)):
    """(setting, equal texts, all texts, different lengths) for each setting."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make(family, folder)
        rows = [[*row, 2] if model.config.is_encoder_decoder else [0, *row] for row in inputs(count)]
        ends = likely_ends(model, rows)
        for name in names:
            settings = complete(model, SETTINGS[name], ends)
            wanted, found = theirs(model, rows, settings), ours(folder, rows, settings)
            same = sum(a == b for a, b in zip(wanted, found, strict=True))
            yield name, same, len(wanted), len({len(text) for text in wanted})


if __name__ == "__main__":
    failed = False
    for family_ in sys.argv[1:] or FAMILIES:
        for name_, same_, total, lengths in compare(family_, INPUTS):
            print(f"{family_:8} {name_:42} {same_} of {total} equal, {lengths} different lengths", flush=True)
            failed |= same_ != total
    sys.exit(failed)
