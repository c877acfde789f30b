"""The model card (README.md) of a run: its model, its data and its figures."""

from pathlib import Path
from typing import Any

from lmcli.config import ModelConfig, TrainConfig
from lmcli.training.objective import CardText, Objective

FILES_NAMED = 20


def model_card(
    name: str,
    config: ModelConfig,
    train: TrainConfig,
    objective: Objective,
    parameters: int,
    architecture: str,
    files: list[str],
    result: dict[str, Any],
    context_prefix: str = "",
    base: str = "",
) -> str:
    """Markdown for the run called `name`; `result` is that section of its recipe.yaml.

    `context_prefix` is the token that begins every context. `base` names the model that an adapter
    is for.
    """
    sources = "\n".join(f"- `{Path(file).name}`" for file in files[:FILES_NAMED])
    if len(files) > FILES_NAMED:
        sources += "\n- …"
    prefix = f"Every context begins with `{context_prefix}`; `tokenizer.json` puts it there.\n\n"
    library, adapter, merging, loading = "transformers", "", "", "`transformers`"
    if base:
        library = f"peft\nbase_model: {base}"
        adapter = f"A LoRA adapter of rank {train.lora_rank} for `{base}`, with which it is:\n\n"
        merging = "\n`lm export DIR --merge -o MODEL` makes one model of adapter and base.\n"
        loading = "`transformers` with `peft`"
    card = objective.card
    pipeline = f"\npipeline_tag: {card.pipeline}" if card.pipeline else ""
    return f"""---
library_name: {library}{pipeline}
---

# {name}

{adapter}A {architecture} of {parameters:,} parameters ({_sizes(config)}),
trained with `lm train` in {result["seconds"]:.0f} s: {result["steps"]:,} steps,
{result["tokens"]:,} tokens ({result["epochs"]:.2f} epochs), in batches of
{train.batch_tokens:,} tokens.

Trained on:

{sources}

## Figures

{card.figures(result, train)}

{prefix if context_prefix else ""}## Use

```
{card.usage}
```

or in {loading}:

{_python(card)}
{merging}"""


def _python(card: CardText) -> str:
    """Python that uses the model, as a block of code."""
    return f"""```python
from transformers import {card.auto_class}, AutoTokenizer

model = {card.auto_class}.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
{card.example.strip()}
```"""


def _sizes(config: ModelConfig) -> str:
    encoder = f"{config.num_encoder_layers} + " if config.shape == "encoder-decoder" else ""
    return (
        f"{encoder}{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads,\ncontext {config.max_position_embeddings}, "
        f"vocabulary {config.vocab_size:,}"
    )
