"""`lm train --list-presets` and `lm help preset`: what the files of the presets say."""

import dataclasses
import re

import pytest
import yaml

from lmcli import recipes
from lmcli.catalog.presets import PRESET_COLUMNS, preset_rows, preset_text, rounded
from lmcli.errors import UsageError
from lmcli.model.transformer import Transformer

ROWS = {row["name"]: row for row in preset_rows()}


def test_every_preset_says_what_it_is_for_and_what_it_learns_from():
    assert list(ROWS) == recipes.preset_names()
    for name, row in ROWS.items():
        assert tuple(row) == PRESET_COLUMNS
        assert row["purpose"].endswith(".") and len(row["purpose"]) < 62, name
        assert row["data"] and row["budget"] and row["parameters"], name
        assert len("".join(row[key] for key in ("data", "budget", "parameters"))) < 80, name


@pytest.mark.parametrize("name", ["tiny", "classify", "translate"])
def test_sizes_are_those_of_the_model(name):
    recipe = recipes.resolve(name)
    config = dataclasses.replace(
        recipe.model.complete(),
        vocab_size=recipe.tokenizer.vocab_size,
        max_position_embeddings=recipe.train.context,
    )
    count = sum(weights.numel() for weights in Transformer(config).parameters())
    assert ROWS[name]["parameters"] == rounded(count)


def test_budgets_are_those_of_the_recipe():
    assert ROWS["small"]["budget"] == "5 min" and ROWS["tiny"]["budget"] == "60 s"
    assert ROWS["classify"]["budget"] == "4 epochs" and ROWS["base"]["budget"] == "2.5B tokens"


@pytest.mark.parametrize(
    "count, text",
    [(999, "999"), (1000, "1.0k"), (999_600, "1.0M"), (9_960_000, "10M"), (124_439_808, "124M")],
)
def test_counts_are_rounded(count, text):
    assert rounded(count) == text


@pytest.mark.parametrize("name", recipes.preset_names())
def test_the_text_of_a_preset_is_the_preset(name, tmp_path):
    text = preset_text(name)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert recipes.resolve(str(file)) == recipes.resolve(name)
    assert "extends:" not in text and max(map(len, text.splitlines())) < 125


def test_it_has_the_comments_and_says_where_values_come_from():
    lines = preset_text("small").splitlines()
    assert lines[0] == "# A small language model in five minutes on two cores."
    assert "# Extends tiny, whose values are marked." in lines
    assert "  hidden_size: 192" in lines
    assert "  num_attention_heads: 4          # tiny" in lines
    assert any(line.endswith("# tiny: a text of a megabyte or so is read several times")
               for line in lines)  # fmt: skip


def test_a_file_of_ones_own_is_shown_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# Mine.\nextends: tiny\nmodel: {hidden_size: 64}\n"
        "train:\n  learning_rate: 1e-3 # 'low'\n  lora_targets:\n    - query\n  seed:   3\n"
    )
    text = preset_text(str(file))
    assert text.startswith("# Mine.\n# Extends tiny") and re.search(r"1e-3 +# 'low'\n", text)
    shown = yaml.safe_load(text)
    assert shown["model"]["hidden_size"] == 64 and shown["train"]["lora_targets"] == ["query"]
    assert shown["train"]["seed"] == 3 and shown["tokenizer"]["vocab_size"] == 2048


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such preset file"),
        ("model: [", "is not YAML"),
        ("model:\n  hiden_size: 3\n", "did you mean 'hidden_size'"),
        ("extends: nothing\n", "no preset is named 'nothing'"),
    ],
)
def test_a_bad_preset_is_an_error(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        preset_text(str(file))
