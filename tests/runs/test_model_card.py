"""The model card of a run: the right figures, commands that name the run, a sample."""

import re
import shlex
from types import SimpleNamespace

import pytest

from lmcli.config import ModelConfig, TrainConfig
from lmcli.runs.model_card import USUAL_EXAMPLE, CommandExample, example_text, model_card
from lmcli.training.objectives import OBJECTIVES

RESULT = {
    "seconds": 61.4,
    "steps": 1234,
    "tokens": 5_000_000,
    "epochs": 2.5,
    "val_bytes": 9876,
    "val_tokens": 3210,
    "best_step": 1200,
    "context": 64,
    "stride": 32,
    "val_bits_per_byte": 1.23456,
    "val_bits_per_character": 1.5,
    "val_perplexity": 12.3456,
}


def card(**changes) -> str:
    config = ModelConfig(vocab_size=512, max_position_embeddings=64)
    arguments = {
        "example": CommandExample("my stories", "Tom's cat", "a b.jsonl"),
        "config": config,
        "train": TrainConfig(),
        "parameters": 1_234_567,
        "architecture": "Qwen3ForCausalLM",
        "files": ["/data/a.txt"],
        "result": RESULT,
        "context_prefix": "<|endoftext|>",
        "objective": OBJECTIVES["causal"],
    }
    return model_card(**{**arguments, **changes})


def test_the_card_names_model_data_and_figures_with_their_counts():
    text = card()
    for part in (
        "# my stories",
        "![Training and validation loss](loss.svg)",
        "Qwen3ForCausalLM of 1,234,567 parameters",
        "1,234 steps",
        "5,000,000 tokens",
        "2.50 epochs",
        "61 s",
        "9,876 bytes, 3,210 tokens",
        "step 1,200",
        "| bits per byte | 1.2346 |",
        "| bits per character | 1.5000 |",
        "| perplexity per token | 12.346 |",
        "- `a.txt`",
        "begins with `<|endoftext|>`",
    ):
        assert part in text, part
    assert "/data" not in text  # where the files lay is nobody's business
    assert re.match(r"---\n(\w+: \S+\n)+---\n", text)  # front matter that the hub reads


def test_the_card_mentions_no_missing_prefix():
    assert "Every context begins" not in card(context_prefix="")


def test_a_card_lists_at_most_twenty_files():
    text = card(files=[f"/data/{i}.txt" for i in range(50)])
    assert text.count(".txt`") == 20 and "- …" in text


def test_the_commands_and_the_python_name_the_run():
    text = card()
    for line in ("lm generate -m 'my stories' ", "lm perplexity -m 'my stories' --validation"):
        assert line in text
    command = re.search("lm generate .*", text)[0]
    assert shlex.split(command) == ["lm", "generate", "-m", "my stories", "Tom's cat"]
    assert 'from_pretrained("my stories")' in text and 'tokenizer("Tom\'s cat"' in text
    assert "DIR" not in text and "PROMPT" not in text
    questions = card(objective=OBJECTIVES["span"], result={**RESULT, **SPAN_RESULT})
    assert "lm classify -m 'my stories' 'a b.jsonl'" in questions


SPAN_RESULT = {
    "val_loss": 1.0,
    "val_exact_match": 0.5,
    "val_f1": 0.6,
    "val_questions": 3,
    "val_targets": 3,
    "val_accuracy": 0.5,
    "val_unigram_entropy": 1.0,
    "val_guessing": 1.0,
}


def test_a_sample_is_indented_so_that_none_of_it_is_markdown():
    text = card(sample="# Not a heading\n```\n\n\x1b[31m却说 DIR PROMPT")
    assert "\n    # Not a heading\n    ```\n\n    ␛[31m却说 DIR PROMPT\n" in text
    assert "## Sample" not in card(sample=" \n")


@pytest.mark.parametrize(
    "decoded, expected",
    [
        ("\n\n First Citizen:\nBefore", "First Citizen:"),
        ("Before we proceed any further, hear me", "Before we proceed any"),
        ("却说那僧人道却说那僧人道却说那僧人道", "却说那僧人道却说"),
        ("", USUAL_EXAMPLE),
        ("\x1b[31m", USUAL_EXAMPLE),
        ("half \ufffd", USUAL_EXAMPLE),
    ],
)
def test_the_example_is_the_beginning_of_the_validation_set(decoded, expected):
    data = SimpleNamespace(
        example_ids=lambda: [1], tokenizer=SimpleNamespace(decode=lambda ids: decoded)
    )
    assert example_text(data) == expected
