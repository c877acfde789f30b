"""Measures translation beside transformers and CTranslate2, all with the same model folder.

python tests/benchmarks/translation_beside_peers.py MODEL PAIRS.jsonl [--count 1000] [--rounds 3]

MODEL is an encoder–decoder, such as `lm train PAIRS.jsonl --preset translate` makes. Texts are
sorted by length for the peers, which read `--batch` of them at once. All take turns in each round.
Prints source texts a second, and for each peer the median over rounds of lm's speed / its own.
CTranslate2 is left out where it is not installed.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

import lmcli

NEW_TOKENS = 60


def of_lm(path: str, dtype: str, texts: list[str], beams: int, threads: int) -> Callable[[], Any]:
    """lm, which chooses its batches itself."""
    model = lmcli.load(path, dtype=dtype, threads=threads)
    options = {"temperature": 0.0, "num_beams": beams, "max_new_tokens": NEW_TOKENS}
    return functools.partial(model.generate, texts, **options)


def of_transformers(
    path: str, dtype: str, batches: list[list[str]], beams: int
) -> Callable[[], Any]:
    """transformers' generate."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=getattr(torch, dtype))
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": NEW_TOKENS}

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            inputs = tokenizer(batch, return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)

    return run


def of_ctranslate2(
    path: str, kind: str, batches: list[list[str]], beams: int, threads: int
) -> Callable[[], Any]:
    """CTranslate2's translator."""
    import ctranslate2
    from transformers import AutoTokenizer

    target = path.rstrip("/") + "-ct2"
    if not Path(target).exists():
        ctranslate2.converters.TransformersConverter(path).convert(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    translator = ctranslate2.Translator(target, compute_type=kind, intra_threads=threads)

    def run() -> None:
        for batch in batches:
            tokens = [tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) for text in batch]
            translator.translate_batch(tokens, beam_size=beams, max_decoding_length=NEW_TOKENS)

    return run


def main() -> None:
    """Measures greedy search and 4 beams."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    for name, default in (("count", 1000), ("rounds", 3), ("batch", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lines = chosen.pairs.read_text(encoding="utf-8").splitlines()[: chosen.count]
    texts = [json.loads(line)["source"] for line in lines]
    in_order = sorted(texts, key=len)
    batches = [in_order[i : i + chosen.batch] for i in range(0, len(texts), chosen.batch)]
    for beams in (1, 4):
        systems: dict[str, Callable[[], Any]] = {}
        for dtype in ("float32", "bfloat16"):
            systems[f"lm {dtype}"] = of_lm(chosen.model, dtype, texts, beams, chosen.threads)
            systems[f"transformers {dtype}"] = of_transformers(chosen.model, dtype, batches, beams)
        try:
            for kind in ("float32", "int8"):
                systems[f"CTranslate2 {kind}"] = of_ctranslate2(
                    chosen.model, kind, batches, beams, chosen.threads
                )
        except (ImportError, ValueError) as error:
            print(f"CTranslate2 is left out: {error}")
        report(systems, f"{beams} beams" if beams > 1 else "greedy", len(texts), chosen.rounds)


def report(systems: dict[str, Callable[[], Any]], label: str, count: int, rounds: int) -> None:
    """Prints the speed of each, and lm's beside it."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    for name, taken in times.items():
        ratios = [
            f"{ours[3:]} {statistics.median(b / a for a, b in zip(times[ours], taken)):.2f} ×"
            for ours in times
            if ours.startswith("lm") and not name.startswith("lm")
        ]
        speed = f"{count / statistics.median(taken):,.0f} texts/s"
        print(f"{label}, {name}: {speed}" + (", lm " + ", ".join(ratios) if ratios else ""))


if __name__ == "__main__":
    main()
