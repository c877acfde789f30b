"""Measures generation beside llama.cpp (cyllama), CTranslate2 and transformers, of one model.

python tests/benchmarks/decoding_beside_peers.py [--rounds 4] [--threads 2]

A random Llama of 134 million parameters writes 128 tokens after 32, greedily, in one text and in
16 at once, and reads a prompt of 512. At last `lm generate` writes 128 tokens after each of 64
lines of its standard input, beside transformers in batches of 16: of lm the whole process counts.
All systems take turns in each round. Prints medians of tokens a second and, for each, the median
over rounds of lm's speed / its own. Peers that are not installed are left out. The share is of a
plain read of memory in the same rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

from lmcli.checkpoints import folder
from lmcli.checkpoints.export import export_gguf
from lmcli.config import GenerateConfig, ModelConfig, TokenizerConfig
from lmcli.kernels.decode_step import DecoderWeights, read_rate
from lmcli.kernels.decoding_state import weights_of
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.kernels.fast_path import build_model
from lmcli.text import tokenizer

LLAMA = ModelConfig(
    vocab_size=32_000,
    max_position_embeddings=1024,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=2048,
    tie_word_embeddings=False,
    query_key_norm=False,
)
PROMPT, NEW, LONG_PROMPT = 32, 128, 512
STORIES = Path(__file__).parents[2] / "data" / "stories.txt"

Generate = Callable[[int, int, int], None]  # (rows, prompt tokens, new tokens)


def make(path: Path) -> None:
    """Writes a folder of the model with random weights."""
    torch.manual_seed(0)
    model = build_model(LLAMA.complete())
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    learned = tokenizer.learn([STORIES.read_text()], TokenizerConfig(4096))
    folder.save(path, model, learned, GenerateConfig())


def ids(rows: int, count: int) -> list[list[int]]:
    """Prompts of random tokens."""
    return np.random.default_rng(0).integers(5, 32_000, (rows, count)).tolist()


def of_lm(weights: DecoderWeights) -> Generate:
    """lm's decoder in C."""

    def generate(rows: int, prompt: int, new: int) -> None:
        state = FastDecodingState(weights, ids(rows, prompt), prompt + new)
        for _ in range(new - 1):
            state.add(state.logits.argmax(-1))

    return generate


def of_transformers(path: Path, dtype: str) -> Generate:
    """transformers' generate, which fills a cache."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    def generate(rows: int, prompt: int, new: int) -> None:
        prompts = torch.tensor(ids(rows, prompt))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, max_new_tokens=new, **options)

    return generate


def of_llama_cpp(path: Path, threads: int) -> Generate:
    """llama.cpp, one text: it decodes a token at a time."""
    from cyllama.llama import llama_cpp as api

    kind = type("Model", (api.LlamaModel,), {})
    model = kind(str(path), api.LlamaModelParams(), verbose=False)
    kind.n_vocab = model.get_vocab().n_vocab  # which LlamaContext looks for

    def generate(rows: int, prompt: int, new: int) -> None:
        options = api.LlamaContextParams()
        options.n_threads = options.n_threads_batch = threads
        options.n_ctx = prompt + new
        options.n_batch = options.n_ubatch = max(prompt, 32)
        context = api.LlamaContext(model, options, verbose=False)
        batch = api.LlamaBatch(n_tokens=prompt, embd=0, n_seq_max=1)
        batch.set_batch(ids(1, prompt)[0], 0, False)
        context.decode(batch)
        step = api.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        for position in range(prompt, prompt + new - 1):
            step.set_batch([7], position, True)  # any token: choosing one is not decoding
            context.decode(step)

    return generate


def of_ctranslate2(path: Path, kind: str, threads: int) -> Generate:
    """CTranslate2's generator."""
    import ctranslate2
    from transformers import AutoTokenizer

    target = str(path) + "-ct2"
    if not Path(target).exists():
        ctranslate2.converters.TransformersConverter(str(path)).convert(target)
    model = ctranslate2.Generator(target, compute_type=kind, inter_threads=1, intra_threads=threads)
    names = AutoTokenizer.from_pretrained(str(path))

    def generate(rows: int, prompt: int, new: int) -> None:
        tokens = [names.convert_ids_to_tokens([i % 4000 for i in row]) for row in ids(rows, prompt)]
        model.generate_batch(
            tokens,
            max_length=new,
            min_length=new,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )

    return generate


def systems(path: Path, threads: int) -> dict[str, dict[str, Generate]]:
    """Precision → system → how it generates; those that are not installed are left out."""
    found: dict[str, dict[str, Generate]] = {}
    parameters = folder.load(path).model
    for dtype, gguf, ct2 in (
        ("float32", "f32", "float32"),
        ("bfloat16", "bf16", ""),
        ("int8", "q8_0", "int8"),
    ):
        in_precision = parameters.float() if dtype == "float32" else parameters.bfloat16()
        weights = weights_of(in_precision, "int8" if dtype == "int8" else None)
        found[dtype] = {"lm": of_lm(weights)}
        makers: dict[str, Callable[[], Generate]] = {}
        if dtype != "int8":
            makers["transformers"] = lambda dtype=dtype: of_transformers(path, dtype)  # type: ignore[misc]
        file = path.with_suffix(f".{gguf}.gguf")
        makers["llama.cpp"] = lambda file=file: of_llama_cpp(file, threads)  # type: ignore[misc]
        if ct2:
            makers["CTranslate2"] = lambda ct2=ct2: of_ctranslate2(path, ct2, threads)  # type: ignore[misc]
        for name, maker in makers.items():
            try:
                if name == "llama.cpp":
                    export_gguf(path, file, gguf, merge=False)
                found[dtype][name] = maker()
            except ImportError as error:
                print(f"{name} is left out: {error}")
    return found


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(generators: dict[str, Generate], label: str, rows: int, rounds: int, size: int) -> None:
    """Prints the speed of generating, or with `label` prefill of reading, for each system."""
    times: dict[str, list[float]] = {name: [] for name in generators}
    shares = []
    data = np.ones(max(1 << 28, size) // 8, np.int64)
    prompt, new = (LONG_PROMPT, 1) if label == "prefill" else (PROMPT, NEW)
    for number in range(rounds + 1):
        rate = read_rate(data)
        for name, generate in generators.items():
            if rows > 1 and name == "llama.cpp":
                continue
            taken = seconds(lambda generate=generate: generate(rows, prompt, new))  # type: ignore[misc]
            if label != "prefill":  # the prompt's time is not the text's
                taken -= seconds(lambda generate=generate: generate(rows, prompt, 1))  # type: ignore[misc]
            if number:  # the first round warms up
                times[name].append(taken)
                if name == "lm":
                    shares.append(size * (new - 1) / taken / rate)
    tokens = rows * (prompt if label == "prefill" else new - 1)
    for name, taken_by in times.items():
        if not taken_by:
            continue
        speed = tokens / statistics.median(taken_by)
        ratios = [peer / ours for peer, ours in zip(taken_by, times["lm"])]
        share = f", {statistics.median(shares):.0%} of memory" if name == "lm" and new > 1 else ""
        ratio = "" if name == "lm" else f", lm {statistics.median(ratios):.2f} ×"
        print(f"{label}, {rows} at once, {name}: {speed:,.0f} tokens/s{share}{ratio}", flush=True)


def compare_pipes(path: Path, dtype: str, rounds: int) -> None:
    """Prints tokens a second of 64 lines of text through `lm generate`, beside transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [line for line in STORIES.read_text().split("\n") if len(line) > 60][:64]
    lines = [line[: 60 + 5 * (i % 20)] for i, line in enumerate(lines)]
    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    def of_transformers_in_batches() -> None:
        for first in range(0, len(lines), 16):
            batch = tokenizer(lines[first : first + 16], return_tensors="pt", padding=True)
            lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
            model.generate(batch.input_ids, attention_mask=batch.attention_mask, **lengths)

    def of_lm_in_a_pipe() -> None:
        options = ["--temperature=0", f"-n{NEW}", f"--min-new-tokens={NEW}", f"--dtype={dtype}"]
        command = [sys.executable, "-m", "lmcli", "generate", "-m", str(path), *options]
        given = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
        assert done.stdout.count("\n") == len(lines)

    pairs = [(seconds(of_lm_in_a_pipe), seconds(of_transformers_in_batches)) for _ in range(rounds)]
    speeds = [64 * NEW / statistics.median(taken) for taken in zip(*pairs)]
    ratio = statistics.median(peer / ours for ours, peer in pairs)
    print(f"{dtype}, 64 lines in a pipe, lm: {speeds[0]:,.0f} tokens/s")
    print(f"the same, transformers: {speeds[1]:,.0f} tokens/s, lm {ratio:.2f} ×", flush=True)


def main() -> None:
    """Measures all precisions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "llama"
        path.mkdir()
        make(path)
        for dtype, generators in systems(path, arguments.threads).items():
            size = LLAMA.complete().vocab_size * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048)
            size = int(size * {"float32": 4, "bfloat16": 2, "int8": 1.0625}[dtype])
            for rows in (1, 16):
                compare(generators, dtype, rows, arguments.rounds, size)
            print(f"{dtype}:", end=" ")
            compare(generators, "prefill", 1, arguments.rounds, size)
        for dtype in ("float32", "bfloat16"):
            compare_pipes(path, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
