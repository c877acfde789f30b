"""Log-probabilities of 500 lines against a plain loop over transformers, whatever the batch; and 200 prompts in a pipe.

python tests/acceptance/five_hundred_lines.py [MODEL]      without MODEL: the published 260K-parameter Llama
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import lmcli

ROOT = Path(__file__).resolve().parents[2]


def lm(*arguments: object, stdin: bytes) -> tuple[bytes, float]:
    """(standard output, seconds) of a command that must succeed."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmcli", *map(str, arguments)], input=stdin, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.returncode
    return done.stdout, time.monotonic() - began


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ROOT.parent / "shared" / "data" / "models" / "stories260K"
    lines = [line for line in (ROOT / "data" / "stories.txt").read_text(encoding="utf-8").split("\n")
             if "<|" not in line][:500]  # every other one is empty
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ours = lmcli.load(model)
    expected = []
    for line in lines:
        ids = ours.prompt(line)[:ours.context] if line else []
        total = 0.0
        if len(ids) > 1:
            with torch.no_grad():
                logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(logprobs[i - 1, ids[i]].item() for i in range(1, len(ids)))
        expected.append((len(ids) - 1 if ids else 0, total))
    text = "\n".join(lines).encode() + b"\n"
    whole = [i for i, line in enumerate(lines) if len(ours.prompt(line)) <= ours.context]
    for batch in (1, 64, 1000, 100_000):
        out, seconds = lm("score", "-m", model, "--json", "--batch-tokens", batch, stdin=text)
        found = [json.loads(line) for line in out.splitlines()]
        assert len(found) == len(lines)
        worst = max(abs(found[i]["logprob"] - expected[i][1]) for i in whole)
        print(f"batches of {batch} tokens, {seconds:.1f} s: largest difference {worst:.1e} nats", flush=True)
        assert worst < 1e-4 and all(found[i]["tokens"] == expected[i][0] for i in whole)
    prompts = b"".join(line.encode()[:40] + b"\n" for line in lines[:200])
    out, seconds = lm("generate", "-m", model, "-n", 50, "--seed", 1, stdin=prompts)
    print(f"200 prompts, {seconds:.1f} s: {len(out.splitlines())} lines")
    assert out.count(b"\n") == 200


if __name__ == "__main__":
    main()
