"""Bits per byte of the first 100 kB of a text by the decoder in C, in each type of its weights.

python tests/acceptance/quantized_loss.py MODEL... --text wikitext-2-test.txt

It is what `lm generate --quantize` loses: matrices, the head and activations are all rounded. The
float32 figure is that of lm perplexity.
"""

import argparse
import math
from pathlib import Path

import numpy as np

import lmcli
from lmcli.generation.sampling import log_sum_exp
from lmcli.kernels.decoding_state import weights_of
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.text.windows import windows


def bits_per_byte(model: lmcli.Model, text: str, weight_type: str) -> float:
    """Bits per byte in windows of the model's context, as in lm perplexity."""
    weights, ids = weights_of(model.model, weight_type), model.tokenizer.encode(text)
    bos, context, scorer = model.bos_ids(None), model.context, model.scorer()
    total = 0.0
    for start, first, end in windows(len(ids), context, scorer.stride, bool(bos)):
        seen = [*bos, *ids[start:end]]
        state = FastDecodingState(weights, [seen[:1]], len(seen))
        logits = np.concatenate([state.logits, state.look_ahead(np.array(seen[1:], np.int64))])
        targets, logits = np.array(seen[first - end :]), logits[first - end - 1 : -1]
        total += (log_sum_exp(logits) - logits[np.arange(len(targets)), targets]).sum()
    return total / len(text.encode()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_bytes()[:100_000].decode("utf-8", "ignore")
    for name in arguments.models:
        model = lmcli.load(name, device="cpu", dtype="float32")
        print(f"{name}: {model.perplexity(text).bits_per_byte:.4f} by lm perplexity", flush=True)
        exact = bits_per_byte(model, text, "float32")
        for weight_type in ("float32", "bfloat16", "int8", "int4"):
            found = bits_per_byte(model, text, weight_type)
            print(f"  {weight_type} {found:.4f} ({100 * (found / exact - 1):+.2f} %)", flush=True)


if __name__ == "__main__":
    main()
