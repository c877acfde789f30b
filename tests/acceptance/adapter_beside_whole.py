"""Trains a decoder, then goes on with other text twice, with all its weights and with an adapter, and compares the two.

python tests/acceptance/adapter_beside_whole.py TEXT OTHER FOLDER [--remember FILE] [--threads N]

TEXT is what the base learns (wikitext-2-train.txt), OTHER what it goes on with (tinystories-sample.txt), as BASE, WHOLE and
ADAPTER below say; all three runs are kept in FOLDER, and none that has come to its end is made again. Prints bits per byte
of OTHER's validation part, how far the adapter stays behind and how much of the model it trains, what both have forgotten of
FILE (wikitext-2-valid.txt), and how far logits of transformers and peft are from lm's (‖a−b‖/‖b‖). Fails unless the adapter
is within 2 % with 5 % of all parameters at most (its own among them, as peft counts), and the logits within 1e-4.

On two cores: all weights 1.0028, an adapter with 4.8 % of all 1.0100, so 0.7 % behind; logits 3.2e-7.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers
import yaml
from safetensors.torch import load_file

import lmcli

EACH = ("train.time=0", "train.context=512")
BASE = (*EACH, "train.steps=1250", "train.batch_tokens=8192", "model.hidden_size=512", "model.num_hidden_layers=8",
        "model.num_attention_heads=8", "model.tie_word_embeddings=false", "tokenizer.vocab_size=4096")
BOTH = (*EACH, "train.batch_tokens=4096", "train.averaging=0.3")
WHOLE = (*BOTH, "train.steps=600", "train.learning_rate=1e-3", "train.dropout=0.25")
ADAPTER = (*BOTH, "train.steps=4500", "train.learning_rate=5e-3", "train.warmup=0.2", "train.dropout=0",
           "train.lora_dropout=0.15", "train.lora_init=gradient", "train.lora_targets=all,embedding,head")
NEAR, SHARE, SAME = 0.02, 0.05, 1e-4  # what is asked


def trained(run: Path, *words: object) -> dict:
    """The recipe.yaml of `lm train WORDS -o RUN`, which goes on or is left alone where RUN is there already."""
    recipe = run / "recipe.yaml"
    if not recipe.exists():
        _lm("train", *words, "-o", run)
    elif yaml.safe_load(recipe.read_text())["result"].get("stopped", True):
        _lm("train", "--resume", run)
    return yaml.safe_load(recipe.read_text())


def _lm(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "lmcli", *map(str, words)], check=True)


def apart(base: Path, adapter: Path, text: str) -> float:
    """How far the logits of transformers and peft are from lm's, with the adapter of a folder."""
    ours = lmcli.load(adapter, "cpu", "float32")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.tensor([ours.tokenizer.encode(text)[:256]])
    with torch.inference_mode():
        expected, found = ours.logits(ids), theirs(ids).logits
    return float((found - expected).norm() / expected.norm())


def bits(recipe: dict) -> float:
    """Bits per byte of the validation part, by the model that was kept."""
    return recipe["result"]["val_bits_per_byte"]


def parameters(base: Path, adapter: Path) -> tuple[int, int]:
    """(those of the base, those of the adapter)."""
    return tuple(sum(tensor.numel() for tensor in load_file(file).values())
                 for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("text", "other", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--remember", type=Path)
    parser.add_argument("--threads", default="2")
    given = parser.parse_args()
    base, remember = given.folder / "base", ("--remember", given.remember) if given.remember else ()

    def settings(*values: str) -> list[str]:
        return ["--threads", given.threads, *(word for value in values for word in ("--set", value))]

    trained(base, given.text, "--preset", "small", *settings(*BASE))
    further = (given.other, "--from", base, "--preset", "finetune", *remember)
    whole = trained(given.folder / "whole", *further, *settings(*WHOLE))
    low = trained(given.folder / "adapter", *further, "--lora", 17, *settings(*ADAPTER))
    total, own = parameters(base, given.folder / "adapter")
    behind = bits(low) / bits(whole) - 1
    print(f"all {total:,} weights: {bits(whole):.4f} bits/byte; an adapter of {own:,} ({own / (total + own):.2%} of all): "
          f"{bits(low):.4f} ({behind:+.2%})")
    for name, recipe in (("all weights", whole), ("adapter", low)):
        for told in recipe["result"].get("remembered", ()):
            print(f"{name}: {told['before']:.4f} bits/byte of {Path(told['file']).name} before, {told['after']:.4f} after")
    differ = apart(base, given.folder / "adapter", given.other.read_text(encoding="utf-8")[:4000])
    print(f"transformers with peft: logits {differ:.1e} from lm's")
    sys.exit(0 if behind <= NEAR and own <= SHARE * (total + own) and differ < SAME else 1)


if __name__ == "__main__":
    main()
