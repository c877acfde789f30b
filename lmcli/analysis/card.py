"""The model card (README.md) of a run: what the model is, what it was trained on, and its figures with their counts."""

from pathlib import Path

from lmcli.config import ModelConfig, TrainConfig


def model_card(name: str, config: ModelConfig, train: TrainConfig, parameters: int, architecture: str,
               files: list[str], result: dict, beginning: str) -> str:
    """Markdown for the run called `name`; `result` is the `result` section of its recipe.yaml, `beginning`
    spells the token that leads every context."""
    sources = "\n".join(f"- `{Path(file).name}`" for file in files[:20]) + ("\n- …" if len(files) > 20 else "")
    first = f"Every context begins with `{beginning}`; `tokenizer.json` puts it there.\n\n" if beginning else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {architecture} of {parameters:,} parameters ({config.num_hidden_layers} layers, hidden size {config.hidden_size},
{config.num_attention_heads} heads, context {config.max_position_embeddings}, vocabulary {config.vocab_size:,}),
trained with `lm train` in {result['seconds']:.0f} s: {result['steps']:,} steps, {result['tokens']:,} tokens
({result['epochs']:.2f} passes over the training text), batches of {train.batch_tokens:,} tokens.

Trained on:

{sources}

## Figures

Of the held-out text that `recipe.yaml` names ({result['val_bytes']:,} bytes, {result['val_tokens']:,} tokens scored),
with the weights of step {result['best_step']:,}, in float32, windows of {result['context']} tokens every
{result['stride']}; `lm perplexity -m DIR --validation` measures the same again.

| figure | value |
| --- | --- |
| bits per byte | {result['val_bits_per_byte']:.4f} |
| bits per character | {result['val_bits_per_character']:.4f} |
| perplexity per token | {result['val_perplexity']:.3f} |

{first}## Use

```
lm generate -m DIR "Once"
lm score -m DIR FILE
```

or `AutoModelForCausalLM.from_pretrained(DIR)` and `AutoTokenizer.from_pretrained(DIR)` in `transformers`.
"""
