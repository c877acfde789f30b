"""The model card (README.md) of a run: what the model is, what it was trained on, and its figures with their counts."""

from pathlib import Path

from lmcli.config import ModelConfig, TrainConfig

# what a card of each objective says to the hub, and how the model is used
USES = {
    "causal": ("text-generation", 'lm generate -m DIR "Once"\nlm score -m DIR FILE', "AutoModelForCausalLM"),
    "completion": ("text-generation", "lm generate -m DIR < PROMPTS", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "lm generate -m DIR 'Paris is the [MASK] of France.'", "AutoModelForMaskedLM"),
    "seq2seq": ("text2text-generation", "lm generate -m DIR < SOURCES", "AutoModelForSeq2SeqLM"),
    "classification": ("text-classification", "lm classify -m DIR FILE", "AutoModelForSequenceClassification"),
    "span": ("question-answering", "lm classify -m DIR QUESTIONS.jsonl", "AutoModelForQuestionAnswering"),
}


def model_card(name: str, config: ModelConfig, train: TrainConfig, parameters: int, architecture: str,
               files: list[str], result: dict, beginning: str, base: str = "") -> str:
    """Markdown for the run called `name`; `result` is the `result` section of its recipe.yaml, `beginning`
    spells the token that leads every context, `base` names the model that an adapter is for."""
    sources = "\n".join(f"- `{Path(file).name}`" for file in files[:20]) + ("\n- …" if len(files) > 20 else "")
    first = f"Every context begins with `{beginning}`; `tokenizer.json` puts it there.\n\n" if beginning else ""
    objective = train.objective if train.objective in USES else "causal"
    pipeline, commands, auto_class = USES[objective]
    layers = f"{config.num_encoder_layers} + {config.num_hidden_layers}" if config.shape == "encoder-decoder" else \
        f"{config.num_hidden_layers}"
    library = f"peft\nbase_model: {base}" if base else "transformers"
    adapter = f"A LoRA adapter of rank {train.lora_rank} for `{base}`, with which it is:\n\n" if base else ""
    merging = "\n`lm export DIR --merge -o MODEL` makes one model of adapter and base.\n" if base else ""
    loading = "`transformers` with `peft`" if base else "`transformers`"
    return f"""---
library_name: {library}
pipeline_tag: {pipeline}
---

# {name}

{adapter}A {architecture} of {parameters:,} parameters ({layers} layers, hidden size {config.hidden_size},
{config.num_attention_heads} heads, context {config.max_position_embeddings}, vocabulary {config.vocab_size:,}),
trained with `lm train` in {result['seconds']:.0f} s: {result['steps']:,} steps, {result['tokens']:,} tokens
({result['epochs']:.2f} passes over the training text), batches of {train.batch_tokens:,} tokens.

Trained on:

{sources}

## Figures

{_figures(objective, result, train)}

{first}## Use

```
{commands}
```

or `{auto_class}.from_pretrained(DIR)` and `AutoTokenizer.from_pretrained(DIR)` in {loading}.
{merging}"""


def _figures(objective: str, result: dict, train: TrainConfig) -> str:
    if objective == "causal":
        counts = f"{result['val_bytes']:,} bytes, {result['val_tokens']:,} tokens scored"
        return f"""Of the held-out text that `recipe.yaml` names ({counts}),
with the weights of step {result['best_step']:,}, in float32, windows of {result['context']} tokens every
{result['stride']}; `lm perplexity -m DIR --validation` measures the same again.

| figure | value |
| --- | --- |
| bits per byte | {result['val_bits_per_byte']:.4f} |
| bits per character | {result['val_bits_per_character']:.4f} |
| perplexity per token | {result['val_perplexity']:.3f} |"""
    if objective == "span":
        return f"""Of the {result['val_questions']:,} questions held out that `recipe.yaml` names, with the weights of step
{result['best_step']:,}, in float32.

| figure | value |
| --- | --- |
| exact match | {result['val_exact_match']:.1%} |
| F1 | {result['val_f1']:.1%} |
| loss, nats for the start or the end | {result['val_loss']:.4f} |
| the same by guessing | {result['val_guessing']:.4f} |"""
    what = {"masked": f"masked tokens ({train.mask_share:.0%} of all)", "classification": "texts",
            "completion": "tokens of what follows, each given the ones before it",
            "seq2seq": "target tokens, each given the ones before it"}[objective]
    bits = f"\n| bits per byte of the target | {result['val_bits_per_byte']:.4f} |" if "val_bits_per_byte" in result else ""
    return f"""Of the held-out part that `recipe.yaml` names ({result['val_targets']:,} {what}), with the weights of step
{result['best_step']:,}, in float32.

| figure | value |
| --- | --- |
| loss, nats each | {result['val_loss']:.4f} |
| the same by counting alone (unigram entropy) | {result['val_unigram_entropy']:.4f} |
| right | {result['val_accuracy']:.1%} |{bits}"""
