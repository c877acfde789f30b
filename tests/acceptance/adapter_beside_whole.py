"""Compares an adapter with full fine-tuning: trains a base model and continues it in both ways.

python tests/acceptance/adapter_beside_whole.py TEXT OTHER FOLDER [--remember FILE] [--threads N]

The base model learns TEXT (wikitext-2-train.txt). Both runs continue it on OTHER
(tinystories-sample.txt), with the settings BASE, FULL and ADAPTER below. The three runs stay in
FOLDER; a finished one is not repeated. Prints:

- bits per byte on the validation set of OTHER, and the adapter's share of all parameters;
- bits per byte of FILE (wikitext-2-valid.txt) before and after, as a measure of forgetting;
- the relative difference (‖a−b‖/‖b‖) between the logits of transformers with peft and of lm.

Exits with 1 unless the adapter is at most 2 % worse than full fine-tuning, has at most 5 % of all
parameters (its own included, as peft counts), and the logits differ by less than 1e-4.

On two cores: full fine-tuning 1.0028, an adapter with 4.8 % of all parameters 1.0100, which is
0.7 % worse; logits differ by 3.2e-7.
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

COMMON = ("train.time=0", "train.context=512")
BASE = (
    *COMMON,
    "train.steps=1250",
    "train.batch_tokens=8192",
    "model.hidden_size=512",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "model.tie_word_embeddings=false",
    "tokenizer.vocab_size=4096",
)
FINETUNING = (*COMMON, "train.batch_tokens=4096", "train.averaging=0.3")
FULL = (*FINETUNING, "train.steps=600", "train.learning_rate=1e-3", "train.dropout=0.25")
ADAPTER = (
    *FINETUNING,
    "train.steps=4500",
    "train.learning_rate=5e-3",
    "train.warmup=0.2",
    "train.dropout=0",
    "train.lora_dropout=0.15",
    "train.lora_init=gradient",
    "train.lora_targets=all,embedding,head",
)
MAX_LOSS, MAX_SHARE, MAX_LOGIT_DIFFERENCE = 0.02, 0.05, 1e-4


def train(run: Path, *arguments: object) -> dict:
    """The recipe.yaml of `lm train ARGUMENTS -o RUN`, which is resumed if it was interrupted."""
    recipe = run / "recipe.yaml"
    if not recipe.exists():
        _lm("train", *arguments, "-o", run)
    elif yaml.safe_load(recipe.read_text())["result"].get("stopped", True):
        _lm("train", "--resume", run)
    return yaml.safe_load(recipe.read_text())


def _lm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "lmcli", *map(str, arguments)], check=True)


def logit_difference(base: Path, adapter: Path, text: str) -> float:
    """The relative difference of the logits of transformers with peft from those of lm."""
    lm = lmcli.load(adapter, "cpu", "float32")
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft_model = peft.PeftModel.from_pretrained(base_model, adapter).eval()
    ids = torch.tensor([lm.tokenizer.encode(text)[:256]])
    with torch.inference_mode():
        lm_logits, peft_logits = lm.logits(ids), peft_model(ids).logits
    return float((peft_logits - lm_logits).norm() / lm_logits.norm())


def bits_per_byte(recipe: dict) -> float:
    """Bits per byte of the best model on the validation set."""
    return recipe["result"]["val_bits_per_byte"]


def parameters(file: Path) -> int:
    """Number of parameters in a safetensors file."""
    return sum(tensor.numel() for tensor in load_file(file).values())


def main() -> int:
    """Trains what is missing and prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("text", "other", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--remember", type=Path)
    parser.add_argument("--threads", default="2")
    options = parser.parse_args()
    base, adapter_folder = options.folder / "base", options.folder / "adapter"

    def settings(*values: str) -> list[str]:
        sets = [word for value in values for word in ("--set", value)]
        return ["--threads", options.threads, *sets]

    # the three runs
    remember = ("--remember", options.remember) if options.remember else ()
    finetune = (options.other, "--from", base, "--preset", "finetune", *remember)
    train(base, options.text, "--preset", "small", *settings(*BASE))
    full = train(options.folder / "whole", *finetune, *settings(*FULL))
    adapter = train(adapter_folder, *finetune, "--lora", 17, *settings(*ADAPTER))

    # quality and size
    adapter_parameters = parameters(adapter_folder / "adapter_model.safetensors")
    base_parameters = parameters(base / "model.safetensors")
    share = adapter_parameters / (base_parameters + adapter_parameters)
    loss = bits_per_byte(adapter) / bits_per_byte(full) - 1
    print(
        f"full fine-tuning of {base_parameters:,} parameters: {bits_per_byte(full):.4f} bits/byte; "
        f"adapter of {adapter_parameters:,} ({share:.2%} of all parameters): "
        f"{bits_per_byte(adapter):.4f} ({loss:+.2%})"
    )

    # forgetting
    for name, recipe in (("full fine-tuning", full), ("adapter", adapter)):
        for entry in recipe["result"].get("remembered", ()):
            print(
                f"{name}: {Path(entry['file']).name}: {entry['before']:.4f} bits/byte before, "
                f"{entry['after']:.4f} after"
            )

    # agreement with peft
    text = options.other.read_text(encoding="utf-8")[:4000]
    difference = logit_difference(base, adapter_folder, text)
    print(f"transformers with peft: logits differ from lm's by {difference:.1e}")
    passed = loss <= MAX_LOSS and share <= MAX_SHARE and difference < MAX_LOGIT_DIFFERENCE
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
