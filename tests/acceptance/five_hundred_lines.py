"""Checks the log-probabilities of 500 lines against a plain loop over transformers.

python tests/acceptance/five_hundred_lines.py [MODEL]

MODEL is by default the published 260K-parameter Llama. The scores must not depend on the batch
size. Then 200 prompts from a pipe must give 200 lines of generated text.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import lmcli
from lmcli.api import Model

ROOT = Path(__file__).resolve().parents[2]
STORIES_260K = ROOT.parent / "shared" / "data" / "models" / "stories260K"


def lm(*arguments: object, stdin: bytes) -> tuple[bytes, float]:
    """(standard output, seconds) of a command that must succeed."""
    started = time.monotonic()
    command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
    completed = subprocess.run(command, input=stdin, stdout=subprocess.PIPE)
    assert completed.returncode == 0, completed.returncode
    return completed.stdout, time.monotonic() - started


def reference_scores(path: str | Path, loaded: Model, lines: list[str]) -> list[tuple[int, float]]:
    """(tokens, log-probability in nats) of each line, cut to the context, by transformers."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    scores = []
    for line in lines:
        ids = loaded.prompt(line)[: loaded.context] if line else []
        total = 0.0
        if len(ids) > 1:
            with torch.no_grad():
                logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(logprobs[i - 1, ids[i]].item() for i in range(1, len(ids)))
        scores.append((len(ids) - 1 if ids else 0, total))
    return scores


def main() -> None:
    """Scores the lines in batches of several sizes, then generates from 200 prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=STORIES_260K)
    model = parser.parse_args().model
    stories = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8").split("\n")
    lines = [line for line in stories if "<|" not in line][:500]  # every other one is empty
    loaded = lmcli.load(model)
    expected = reference_scores(model, loaded, lines)

    # lines that fit the context, whatever the batch
    text = "\n".join(lines).encode() + b"\n"
    fitting = [i for i, line in enumerate(lines) if len(loaded.prompt(line)) <= loaded.context]
    for batch in (1, 64, 1000, 100_000):
        output, seconds = lm("score", "-m", model, "--json", "--batch-tokens", batch, stdin=text)
        rows = [json.loads(line) for line in output.splitlines()]
        assert len(rows) == len(lines)
        worst = max(abs(rows[i]["logprob"] - expected[i][1]) for i in fitting)
        print(
            f"batches of {batch} tokens, {seconds:.1f} s: largest difference {worst:.1e} nats",
            flush=True,
        )
        assert worst < 1e-4 and all(rows[i]["tokens"] == expected[i][0] for i in fitting)

    # prompts from a pipe
    prompts = b"".join(line.encode()[:40] + b"\n" for line in lines[:200])
    output, seconds = lm("generate", "-m", model, "-n", 50, "--seed", 1, stdin=prompts)
    print(f"200 prompts, {seconds:.1f} s: {len(output.splitlines())} lines")
    assert output.count(b"\n") == 200


if __name__ == "__main__":
    main()
