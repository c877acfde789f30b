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


@pytest.mark.parametrize("kind", ["pairs", "labels", "several"])
def test_written_in_parts_they_are_as_in_one_go(tmp_path, tokenizer, monkeypatch, kind):
    """100 rows in parts of 7: the files grow, and their headers are right in the end."""
    rows = [{"source": "a b" * (i % 4), "target": f"x {i}", "text": f"c {i}",
             "label": ["x", "y"][:i % 2 + 1] if kind == "several" else "xy"[i % 2]} for i in range(100)]
    made, options = [], {"fields": ("source", "target")} if kind == "pairs" else {
        "fields": ("text",), "label": "label", "several": kind == "several"}
    for at_once in (7, 1000):
        monkeypatch.setattr(examples, "ROWS_AT_ONCE", at_once)
        monkeypatch.setenv("LM_CACHE", str(tmp_path / f"cache{at_once}"))
        found, hashes, layout = read(tmp_path / "r.jsonl", rows, tokenizer, **options)
        made.append(examples.build(found, hashes, layout, tokenizer, () if kind == "pairs" else ("x", "y")))
    first, second = made
    for side in ("sources", "targets") if kind == "pairs" else ("sources",):
        one, other = getattr(first, side), getattr(second, side)
        assert len(one) == 100 and all(np.array_equal(one[i], other[i]) for i in range(100))
    assert first.bytes == second.bytes and np.array_equal(first.sizes, second.sizes)
    if kind != "pairs":
        assert first.labels.shape == ((100, 2) if kind == "several" else (100,))
        assert np.array_equal(first.labels, second.labels) and first.labels.any()


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
    wanted = [max(0, len(made.sources[i]) - 1) + max(0, len(made.targets[i]) - 2) for i in range(4)]
    assert around.lost(made).tolist() == wanted and sum(wanted) > 0
    assert around.lengths(made).max() == 3


def test_labels_are_numbered_in_their_order(tmp_path, tokenizer):
    rows = [{"text": text, "label": label} for text, label in (("a", "10"), ("b", 9), ("c", "10"))]
    found, hashes, layout = read(tmp_path / "l.jsonl", rows, tokenizer, fields=("text",), label="label")
    names = examples.label_names(found, layout)
    assert names == ("9", "10")
    made = examples.build(found, hashes, layout, tokenizer, names)
    assert made.labels.tolist() == [1, 0, 1] and made.targets is None and made.bytes == 3
    batch = Template([2], [3], 8, 0).batch(made, np.array([0, 1]))
    assert batch.targets.tolist() == [1, 0] and batch.ids[:, 0].tolist() == [2, 2]
    with pytest.raises(UserError, match="label '10' is none of the labels that the model has") as caught:
        examples.build(found, hashes, layout, tokenizer, ("9", "11"))
    assert caught.value.where == f"{tmp_path / 'l.jsonl'}, line 1"


def test_a_text_may_have_several_labels(tmp_path, tokenizer):
    rows = [{"text": "a", "label": ["x", "z"]}, {"text": "b", "label": []}, {"text": "c", "label": "y, x"}]
    found, hashes, layout = read(tmp_path / "l.jsonl", rows, tokenizer, fields=("text",), label="label", several=True)
    names = examples.label_names(found, layout)
    made = examples.build(found, hashes, layout, tokenizer, names)
    assert names == ("x", "y", "z") and made.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    batch = Template([], [], 8, 0).batch(made, np.array([2, 0]))
    assert batch.targets.tolist() == [[1, 1, 0], [1, 0, 1]] and batch.count == 2


def joined(path, tokenizer, sides):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in sides]
    found, hashes, layout = read(path, rows, tokenizer, fields=("prompt", "completion"), paired=True)
    return examples.build(found, hashes, layout, tokenizer, joined=True)


def test_what_follows_is_encoded_with_what_stands_before_it(tmp_path, tokenizer):
    sides = [("a b", " c x"), ("a ", "b c"), ("a b c x y a b c", " y")]
    made = joined(tmp_path / "p.jsonl", tokenizer, sides)
    for i, (prompt, completion) in enumerate(sides):
        whole = tokenizer.encode(prompt + completion)
        assert [*made.sources[i], *made.targets[i]] == whole
        before = tokenizer.decode(made.sources[i].tolist())
        assert prompt.startswith(before) and made.sizes[i] == len(completion)
    assert tokenizer.decode(made.targets[1].tolist()) == " b c"  # " b" spans the border, and is to be predicted


@pytest.mark.parametrize("context", [4, 6, 30])
def test_of_a_continued_text_only_the_continuation_is_predicted(context, tmp_path, tokenizer):
    made = joined(tmp_path / "p.jsonl", tokenizer, [("a b c x y a b c", " y"), ("a", " b c x y a b c x"), ("a b", " c")])
    around = Template([0], [], context, padding=9, end=1, joined=True)
    batch = around.batch(made, np.arange(3))
    assert batch.ids.shape == (3, min(context, around.lengths(made).max()))
    for i, (ids, targets) in enumerate(zip(batch.ids.tolist(), batch.targets.tolist())):
        target = [*made.targets[i].tolist()[:context - 1], 1]
        source = [0, *made.sources[i].tolist()]
        assert [wanted for wanted in targets if wanted != IGNORED] == target
        row = (source + target)[-context - 1:] if len(source + target) > context + 1 else source + target
        if len(source) + len(target) <= context + 1:
            assert ids[:len(row) - 1] == row[:-1]
        assert ids[0] == 0 or len(target) == context  # the beginning stays while there is room for it
    assert (around.lost(made) > 0).tolist() == [len(made.sources[i]) + len(made.targets[i]) + 1 > context for i in range(3)]


def test_entropy_of_counting_by_hand():
    # 1/2, 1/4, 1/4: 1.5 bits
    parts = [np.array([5, 5, IGNORED]), np.array([7, 900])]
    assert unigram_entropy(iter(parts)) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(iter([np.array([3, 3])])) == 0


def test_two_texts_and_a_label_are_read_as_a_pair_and_cut_as_tokenizers_does(tmp_path):
    tokenizer = learn(["a b c x y " * 20], TokenizerConfig(vocab_size=300), "encoder")
    rows = [{"one": "a b c", "two": "x y", "is": "u"}, {"one": "a", "two": "x y " * 9, "is": "v"}]
    found, hashes, layout = read(tmp_path / "p.jsonl", rows, tokenizer, fields=("one", "two"), label="is")
    made = examples.build(found, hashes, layout, tokenizer, ("u", "v"))
    assert made.labels.tolist() == [0, 1] and made.sizes.tolist() == [8, 37]
    around = Template(tokenizer.prefix, tokenizer.suffix, 12, 0, pair=tokenizer.with_template)
    batch = around.batch(made, np.arange(2))
    tokenizer.core.enable_truncation(12, strategy="longest_first")
    for i, row in enumerate(rows):
        wanted = tokenizer.core.encode(row["one"], row["two"])
        size = len(wanted.ids)
        assert batch.ids[i, :size].tolist() == wanted.ids and batch.types[i, :size].tolist() == wanted.type_ids
    assert batch.real.sum(1).tolist() == around.lengths(made)[:, 0].tolist()
    special = len(tokenizer.with_template([], [])[0])
    assert around.lost(made).tolist() == [0, len(made.sources[1]) + len(made.targets[1]) + special - 12]
