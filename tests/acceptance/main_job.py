"""Runs the main job at full length, on real texts.

python tests/acceptance/main_job.py shakespeare   5 minutes of preset small; compares transformers
python tests/acceptance/main_job.py chinese       3 minutes of preset small; whole characters only
python tests/acceptance/main_job.py first         the README's first run, and a sample to read
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ROOT.parent / "shared" / "data" / "text"


def lm(*arguments: object) -> tuple[str, str]:
    """(standard output, standard error) of a command that must succeed."""
    completed = subprocess.run(
        [sys.executable, "-m", "lmcli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    print(completed.stderr, end="", flush=True)
    assert completed.returncode == 0, completed.returncode
    return completed.stdout, completed.stderr


def shakespeare(folder: Path) -> None:
    """Trains for five minutes; ids, logits and perplexity must agree with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lmcli

    file = TEXTS / "tinyshakespeare.txt"
    _, messages = lm("train", file, "-o", folder, "--preset", "small", "--time", "5m")
    print(lm("generate", "-m", folder, "--seed", 1, "ROMEO:")[0])

    # the printed validation figure is the one that lm perplexity measures
    match = re.search(r"lm: validation ([\d.]+) bits/byte", messages)
    assert match, messages
    printed = float(match.group(1))
    measured = json.loads(lm("perplexity", "-m", folder, "--validation", "--json")[0])
    assert abs(measured["bits_per_byte"] - printed) < 5e-5, (measured, printed)

    # ids
    reference: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = lmcli.load(folder, dtype="float32")
    text = file.read_text(encoding="utf-8")
    validation = text[len(text) - measured["bytes"] :]
    ids = tokenizer(validation)["input_ids"]
    assert ids == loaded.prompt(validation)

    # logits and perplexity, in windows that overlap by half
    tokens, total, first, context = ids[1:], 0.0, 0, loaded.context
    end, worst = context, 0.0
    while first < len(tokens):
        start = max(0, end - context)
        window = torch.tensor([[0, *tokens[start : end - 1]]])
        with torch.no_grad():
            logits = reference(window).logits
        if first % 4096 < context // 2:
            difference = (loaded.logits(window) - logits).norm() / logits.norm()
            worst = max(worst, difference.item())
        logprobs = logits[0].log_softmax(-1)
        total += sum(logprobs[i - start, tokens[i]].item() for i in range(first, end))
        first, end = end, min(end + context // 2, len(tokens))
    perplexity = math.exp(-total / len(tokens))
    print(
        f"perplexity: lm {measured['perplexity']:.6f}, transformers {perplexity:.6f}; "
        f"logits differ by {worst:.1e}; {printed} bits per byte printed, "
        f"{measured['bits_per_byte']:.6f} measured"
    )
    assert abs(perplexity / measured["perplexity"] - 1) < 1e-4 and worst <= 1e-5


def chinese(folder: Path) -> None:
    """Trains for three minutes on a novel; no output may show half a character."""
    file = TEXTS / "zh-hongloumeng.txt"
    _, messages = lm("train", file, "-o", folder, "--preset", "small", "--time", "3m")
    texts = [lm("generate", "-m", folder, "--seed", seed, "却说")[0] for seed in range(20)]
    print(texts[0])
    assert "bits/character" in messages.splitlines()[-1]
    halves = sum(text.count("\ufffd") for text in texts) + messages.count("\ufffd")
    print(
        f"{halves} replacement characters in {sum(map(len, texts)):,} characters of generated text "
        "and in the progress"
    )
    assert halves == 0


def first(folder: Path) -> None:
    """Trains for a minute on the stories of this repository."""
    lm("train", ROOT / "data" / "stories.txt", "-o", folder, "--preset", "tiny")
    print(lm("generate", "-m", folder, "--seed", 1, "The baker")[0])


JOBS = {"shakespeare": shakespeare, "chinese": chinese, "first": first}


def main() -> None:
    """Runs one job in a temporary folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    job = JOBS[parser.parse_args().job]
    with tempfile.TemporaryDirectory() as temporary:
        job(Path(temporary) / "run")


if __name__ == "__main__":
    main()
