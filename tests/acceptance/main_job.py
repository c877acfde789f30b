"""The main job at full length, on real text beside the repository.

python tests/acceptance/main_job.py shakespeare   5 minutes of preset small, then transformers on the same folder
python tests/acceptance/main_job.py chinese       3 minutes of preset small; whole characters only
python tests/acceptance/main_job.py first         the README's training on data/stories.txt, and a sample to read
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT.parent / "shared" / "data" / "text"


def lm(*arguments: object) -> tuple[str, str]:
    """(standard output, standard error) of a command that must succeed."""
    done = subprocess.run([sys.executable, "-m", "lmcli", *map(str, arguments)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    print(done.stderr, end="", flush=True)
    assert done.returncode == 0, done.returncode
    return done.stdout, done.stderr


def shakespeare(folder: Path) -> None:
    """Trains five minutes; ids, logits, perplexity and the validation figure agree with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lmcli

    _, told = lm("train", TEXT / "tinyshakespeare.txt", "-o", folder, "--preset", "small", "--time", "5m")
    print(lm("generate", "-m", folder, "--seed", 1, "ROMEO:")[0])
    printed = float(re.search(r"lm: validation ([\d.]+) bits/byte", told).group(1))
    measured = json.loads(lm("perplexity", "-m", folder, "--validation", "--json")[0])
    assert abs(measured["bits_per_byte"] - printed) < 5e-5, (measured, printed)

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = lmcli.load(folder, dtype="float32")
    text = (TEXT / "tinyshakespeare.txt").read_text(encoding="utf-8")
    held_out = text[len(text) - measured["bytes"]:]
    ids = tokenizer(held_out)["input_ids"]
    assert ids == ours.prompt(held_out)
    tokens, total, first, context = ids[1:], 0.0, 0, ours.context
    end, worst = context, 0.0
    while first < len(tokens):
        start = max(0, end - context)
        window = torch.tensor([[0, *tokens[start:end - 1]]])
        with torch.no_grad():
            logits = theirs(window).logits
        if first % 4096 < context // 2:
            mine = ours.logits(window)
            worst = max(worst, ((mine - logits).norm() / logits.norm()).item())
        logprobs = logits[0].log_softmax(-1)
        total += sum(logprobs[i - start, tokens[i]].item() for i in range(first, end))
        first, end = end, min(end + context // 2, len(tokens))
    perplexity = math.exp(-total / len(tokens))
    print(f"perplexity: ours {measured['perplexity']:.6f}, transformers {perplexity:.6f}; logits differ by {worst:.1e}; "
          f"{printed} bits per byte printed, {measured['bits_per_byte']:.6f} measured")
    assert abs(perplexity / measured["perplexity"] - 1) < 1e-4 and worst <= 1e-5


def chinese(folder: Path) -> None:
    """Trains three minutes on a novel; nothing shown has half a character."""
    _, told = lm("train", TEXT / "zh-hongloumeng.txt", "-o", folder, "--preset", "small", "--time", "3m")
    texts = [lm("generate", "-m", folder, "--seed", seed, "却说")[0] for seed in range(20)]
    print(texts[0])
    assert "bits/character" in told.splitlines()[-1]
    halves = sum(text.count("\ufffd") for text in texts) + told.count("\ufffd")
    print(f"{halves} replacement characters in {sum(map(len, texts)):,} characters generated and what progress showed")
    assert halves == 0


def first(folder: Path) -> None:
    """Trains a minute on the shipped stories."""
    lm("train", ROOT / "data" / "stories.txt", "-o", folder, "--preset", "tiny")
    print(lm("generate", "-m", folder, "--seed", 1, "The baker")[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        {"shakespeare": shakespeare, "chinese": chinese, "first": first}[sys.argv[1]](Path(temporary) / "run")
