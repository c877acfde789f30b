"""The model card (README.md) of a run: its model, its data and its figures."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcli.config import ModelConfig, TrainConfig
from lmcli.terminal.wrapping import width
from lmcli.text.characters import visible
from lmcli.training.objective import CardText, Objective, TrainingData

FILES_NAMED = 20
EXAMPLE_COLUMNS = 26
USUAL_EXAMPLE = "Once upon a time"


@dataclass(frozen=True)
class CommandExample:
    """What stands for DIR, PROMPT and DATA in an objective's commands and lines of Python.

    A model that `converses` is asked in a conversation, which a command without a prompt begins.
    """

    folder: str
    prompt: str = USUAL_EXAMPLE
    data: str = ""
    converses: bool = False

    def shell(self, text: str) -> str:
        """Commands that run as they stand."""
        return self._filled(text.replace(" PROMPT", "") if self.converses else text, shlex.quote)

    def python(self, text: str) -> str:
        """Lines of Python."""
        return self._filled(
            text.replace('"DIR"', "DIR"), lambda value: json.dumps(value, ensure_ascii=False)
        )

    def _filled(self, text: str, quote: Any) -> str:
        values = {"DIR": self.folder, "PROMPT": self.prompt, "DATA": self.data}
        return re.sub(r"\b(DIR|PROMPT|DATA)\b", lambda match: quote(values[match[0]]), text)


def example_text(data: TrainingData) -> str:
    """The first words of the validation set, or USUAL_EXAMPLE."""
    lines = data.tokenizer.decode(list(data.example_ids())[:64]).split("\n")
    words = next((line.split() for line in lines if line.strip()), [])
    text = ""
    for word in words:
        if text and width(f"{text} {word}") > EXAMPLE_COLUMNS:
            break
        text = f"{text} {word}".strip()
    if width(text) > EXAMPLE_COLUMNS:  # a language without spaces
        text = text[: EXAMPLE_COLUMNS // 3]
    return (
        text if text and visible(text, keep="") == text and "\ufffd" not in text else USUAL_EXAMPLE
    )


def model_card(
    example: CommandExample,
    config: ModelConfig,
    train: TrainConfig,
    objective: Objective,
    parameters: int,
    architecture: str,
    files: list[str],
    result: dict[str, Any],
    context_prefix: str = "",
    base: str = "",
    sample: str = "",
) -> str:
    """Markdown for the run in the folder of `example`; `result` is that section of recipe.yaml.

    `context_prefix` is the token that begins every context. `base` names the model that an adapter
    is for. `sample` is a text of the model, "" for none.
    """
    prefix = ""
    if context_prefix:
        prefix = f"Every context begins with `{context_prefix}`; `tokenizer.json` adds it.\n\n"
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

# {example.folder}

{adapter}A {architecture} of {parameters:,} parameters ({_sizes(config)}),
trained with `lm train` in {result["seconds"]:.0f} s: {result["steps"]:,} steps,
{result["tokens"]:,} tokens ({result["epochs"]:.2f} epochs), in batches of
{train.batch_tokens:,} tokens.

Trained on:

{_file_list(files)}

## Figures

{example.shell(card.figures(result, train))}

![Training and validation loss](loss.svg)

{_sample_section(sample)}{prefix}## Use

```
{example.shell(card.usage)}
```

or in {loading}:

{example.python(_python(card))}
{example.shell(merging)}"""


def _file_list(files: list[str]) -> str:
    names = [f"- `{Path(file).name}`" for file in files[:FILES_NAMED]]
    return "\n".join([*names, "- …"] if len(files) > FILES_NAMED else names)


def _sample_section(sample: str) -> str:
    """A text of the model, indented: no characters of it are Markdown then."""
    if not sample.strip():
        return ""
    lines = "\n".join(f"    {line}".rstrip() for line in visible(sample).strip("\n").split("\n"))
    return f"## Sample\n\nWritten by the finished model:\n\n{lines}\n\n"


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
