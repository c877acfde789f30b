"""Rows with two sides as token ids: the cache, templates, labels, and what counting alone would know."""

import json
import math

import numpy as np
import pytest

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.text import examples
from lmcli.text.batches import IGNORED
from lmcli.text.documents import Layout
from lmcli.text.examples import Template, unigram_entropy
from lmcli.text.tokenizer import learn

PAIRS = [("a b c", "x y"), ("a", "x"), ("", "y"), ("b b", "")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return learn(["a b c x y " * 20], TokenizerConfig(vocab_size=300), "encoder-decoder")


def read(path, rows, tokenizer, **layout):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    holder = Layout(**layout)
    found, hashes = holder.survey([str(path)])
    return found, hashes, holder


def pairs(path, tokenizer):
    rows = [{"source": source, "target": target} for source, target in PAIRS]
    found, hashes, layout = read(path, rows, tokenizer, fields=("source", "target"))
    return examples.build(found, hashes, layout, tokenizer)


def test_both_sides_come_back_and_the_cache_gives_the_same(tmp_path, tokenizer):
    first, second = pairs(tmp_path / "p.jsonl", tokenizer), pairs(tmp_path / "p.jsonl", tokenizer)
    for made in (first, second):
        assert len(made) == 4 and made.bytes == sum(len(target) for _, target in PAIRS) and made.labels is None
        sides = [(tokenizer.decode(made.sources[i].tolist()), tokenizer.decode(made.targets[i].tolist())) for i in range(4)]
        assert sides == PAIRS
    assert first.tokens == len(first.sources.ids) + len(first.targets.ids)


def test_a_decoder_reads_the_start_and_predicts_the_end(tmp_path, tokenizer):
    made = pairs(tmp_path / "p.jsonl", tokenizer)
    around = Template([], [1], context=16, padding=0, start=0, end=1)
    batch = around.batch(made, np.array([0, 1]))
    source, target = made.sources[0].tolist(), made.targets[0].tolist()
    assert batch.ids[0].tolist() == [*source, 1] and batch.decoder_ids[0].tolist() == [0, *target]
    assert batch.targets[0].tolist() == [*target, 1]
    short = made.targets[1].tolist()
    assert batch.targets[1].tolist() == [*short, 1] + [IGNORED] * (len(target) - len(short))
    assert batch.real[1].tolist() == [True] * (len(made.sources[1]) + 1) + [False] * (len(source) - len(made.sources[1]))
    assert batch.count == len(target) + len(short) + 2


def test_what_is_too_long_is_cut_and_counted(tmp_path, tokenizer):
    made = pairs(tmp_path / "p.jsonl", tokenizer)
    around = Template([2], [1], context=3, padding=0, start=0, end=1)
    batch = around.batch(made, np.arange(4))
    assert batch.ids.shape == (4, 3) and batch.ids[0].tolist() == [2, made.sources[0][0], 1]
    assert around.cut(made) == sum(len(made.sources[i]) > 1 or len(made.targets[i]) > 2 for i in range(4)) > 0
    assert (around.lengths(made) <= 6).all()


def test_labels_are_numbered_in_their_order(tmp_path, tokenizer):
    rows = [{"text": text, "label": label} for text, label in (("a", "10"), ("b", 9), ("c", "10"))]
    found, hashes, layout = read(tmp_path / "l.jsonl", rows, tokenizer, fields=("text",), label="label")
    names = examples.label_names(found, layout)
    assert names == ("9", "10")
    made = examples.build(found, hashes, layout, tokenizer, names)
    assert made.labels.tolist() == [1, 0, 1] and made.targets is None and made.bytes == 3
    batch = Template([2], [3], 8, 0).batch(made, np.array([0, 1]))
    assert batch.targets.tolist() == [1, 0] and batch.ids[:, 0].tolist() == [2, 2]
    with pytest.raises(UserError, match="label '10' is none of the model's labels"):
        examples.build(found, hashes, layout, tokenizer, ("9", "11"))


def test_entropy_of_counting_by_hand():
    # 1/2, 1/4, 1/4: 1.5 bits
    parts = [np.array([5, 5, IGNORED]), np.array([7, 900])]
    assert unigram_entropy(iter(parts)) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(iter([np.array([3, 3])])) == 0
