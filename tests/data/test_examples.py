"""Rows with two sides as token ids: the cache, templates, labels, and the unigram baseline."""

import json
import math

import numpy as np
import pytest

from lmcli.config import TokenizerConfig
from lmcli.data import examples
from lmcli.data.batches import IGNORED, ExampleCollator, unigram_entropy
from lmcli.data.documents import DocumentFormat, survey
from lmcli.errors import UserError
from lmcli.text.tokenizer import learn

PAIRS = [("a b c", "x y"), ("a", "x"), ("", "y"), ("b b", "")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return learn(["a b c x y " * 20], TokenizerConfig(vocab_size=300), "encoder-decoder")


def read(path, rows, tokenizer, **doc_format):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    doc_format = DocumentFormat(**doc_format)
    surveyed = survey([str(path)], doc_format)
    documents, hashes = surveyed.documents, surveyed.hashes
    return documents, hashes, doc_format


def pairs(path, tokenizer):
    rows = [{"source": source, "target": target} for source, target in PAIRS]
    documents, hashes, doc_format = read(path, rows, tokenizer, fields=("source", "target"))
    return examples.build(documents, hashes, doc_format, tokenizer)


@pytest.mark.parametrize("kind", ["pairs", "labels", "several"])
def test_batches_of_rows_are_written_as_one_array(tmp_path, tokenizer, monkeypatch, kind):
    """100 rows, 7 at once: the files grow, and their headers are correct at the end."""
    rows = [
        {
            "source": "a b" * (i % 4),
            "target": f"x {i}",
            "text": f"c {i}",
            "label": ["x", "y"][: i % 2 + 1] if kind == "several" else "xy"[i % 2],
        }
        for i in range(100)
    ]
    encoded, options = (
        [],
        {"fields": ("source", "target")}
        if kind == "pairs"
        else {"fields": ("text",), "label": "label", "multi_label": kind == "several"},
    )
    for at_once in (7, 1000):
        monkeypatch.setattr(examples, "ROWS_AT_ONCE", at_once)
        monkeypatch.setenv("LM_CACHE", str(tmp_path / f"cache{at_once}"))
        documents, hashes, doc_format = read(tmp_path / "r.jsonl", rows, tokenizer, **options)
        encoded.append(
            examples.build(
                documents, hashes, doc_format, tokenizer, () if kind == "pairs" else ("x", "y")
            )
        )
    first, second = encoded
    for side in ("sources", "targets") if kind == "pairs" else ("sources",):
        written, expected = getattr(first, side), getattr(second, side)
        assert len(written) == 100 and all(
            np.array_equal(written[i], expected[i]) for i in range(100)
        )
    assert first.bytes == second.bytes and np.array_equal(first.sizes, second.sizes)
    if kind != "pairs":
        assert first.labels.shape == ((100, 2) if kind == "several" else (100,))
        assert np.array_equal(first.labels, second.labels) and first.labels.any()


def test_both_sides_are_encoded_and_cached(tmp_path, tokenizer):
    first, second = pairs(tmp_path / "p.jsonl", tokenizer), pairs(tmp_path / "p.jsonl", tokenizer)
    for encoded in (first, second):
        assert (
            len(encoded) == 4
            and encoded.bytes == sum(len(target) for _, target in PAIRS)
            and encoded.labels is None
        )
        sides = [
            (
                tokenizer.decode(encoded.sources[i].tolist()),
                tokenizer.decode(encoded.targets[i].tolist()),
            )
            for i in range(4)
        ]
        assert sides == PAIRS
    assert first.tokens == len(first.sources.ids) + len(first.targets.ids)


def test_a_decoder_reads_decoder_start_and_predicts_eos(tmp_path, tokenizer):
    encoded = pairs(tmp_path / "p.jsonl", tokenizer)
    collator = ExampleCollator([], [1], context=16, padding=0, decoder_start=0, eos=1)
    batch = collator.batch(encoded, np.array([0, 1]))
    source, target = encoded.sources[0].tolist(), encoded.targets[0].tolist()
    assert batch.ids[0].tolist() == [*source, 1] and batch.decoder_ids[0].tolist() == [0, *target]
    assert batch.targets[0].tolist() == [*target, 1]
    short = encoded.targets[1].tolist()
    assert batch.targets[1].tolist() == [*short, 1] + [IGNORED] * (len(target) - len(short))
    assert batch.token_mask[1].tolist() == [True] * (len(encoded.sources[1]) + 1) + [False] * (
        len(source) - len(encoded.sources[1])
    )
    assert batch.count == len(target) + len(short) + 2


def test_long_examples_are_truncated_and_counted(tmp_path, tokenizer):
    encoded = pairs(tmp_path / "p.jsonl", tokenizer)
    collator = ExampleCollator([2], [1], context=3, padding=0, decoder_start=0, eos=1)
    batch = collator.batch(encoded, np.arange(4))
    assert batch.ids.shape == (4, 3) and batch.ids[0].tolist() == [2, encoded.sources[0][0], 1]
    expected = [
        max(0, len(encoded.sources[i]) - 1) + max(0, len(encoded.targets[i]) - 2) for i in range(4)
    ]
    assert collator.truncated_tokens(encoded).tolist() == expected and sum(expected) > 0
    assert collator.lengths(encoded).max() == 3


def test_labels_are_indexed_in_sorted_order(tmp_path, tokenizer):
    rows = [{"text": text, "label": label} for text, label in (("a", "10"), ("b", 9), ("c", "10"))]
    documents, hashes, doc_format = read(
        tmp_path / "l.jsonl", rows, tokenizer, fields=("text",), label="label"
    )
    names = examples.label_names(documents, doc_format)
    assert names == ("9", "10")
    encoded = examples.build(documents, hashes, doc_format, tokenizer, names)
    assert encoded.labels.tolist() == [1, 0, 1] and encoded.targets is None and encoded.bytes == 3
    batch = ExampleCollator([2], [3], 8, 0).batch(encoded, np.array([0, 1]))
    assert batch.targets.tolist() == [1, 0] and batch.ids[:, 0].tolist() == [2, 2]
    with pytest.raises(UserError, match="label '10' is none of the model's labels") as caught:
        examples.build(documents, hashes, doc_format, tokenizer, ("9", "11"))
    assert caught.value.where == f"{tmp_path / 'l.jsonl'}, line 1"


def test_multi_label_texts(tmp_path, tokenizer):
    rows = [
        {"text": "a", "label": ["x", "z"]},
        {"text": "b", "label": []},
        {"text": "c", "label": "y, x"},
    ]
    documents, hashes, doc_format = read(
        tmp_path / "l.jsonl", rows, tokenizer, fields=("text",), label="label", multi_label=True
    )
    names = examples.label_names(documents, doc_format)
    encoded = examples.build(documents, hashes, doc_format, tokenizer, names)
    assert names == ("x", "y", "z") and encoded.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    batch = ExampleCollator([], [], 8, 0).batch(encoded, np.array([2, 0]))
    assert batch.targets.tolist() == [[1, 1, 0], [1, 0, 1]] and batch.count == 2


def joined(path, tokenizer, sides):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in sides]
    documents, hashes, doc_format = read(
        path, rows, tokenizer, fields=("prompt", "completion"), paired=True
    )
    return examples.build(documents, hashes, doc_format, tokenizer, joined=True)


def test_joined_sides_are_encoded_as_one_text(tmp_path, tokenizer):
    sides = [("a b", " c x"), ("a ", "b c"), ("a b c x y a b c", " y")]
    encoded = joined(tmp_path / "p.jsonl", tokenizer, sides)
    for i, (prompt, completion) in enumerate(sides):
        whole = tokenizer.encode(prompt + completion)
        assert [*encoded.sources[i], *encoded.targets[i]] == whole
        before = tokenizer.decode(encoded.sources[i].tolist())
        assert prompt.startswith(before) and encoded.sizes[i] == len(completion)
    assert (
        tokenizer.decode(encoded.targets[1].tolist()) == " b c"
    )  # " b" spans the border, so it is a target


@pytest.mark.parametrize("context", [4, 6, 30])
def test_of_joined_sides_only_the_target_is_predicted(context, tmp_path, tokenizer):
    encoded = joined(
        tmp_path / "p.jsonl",
        tokenizer,
        [("a b c x y a b c", " y"), ("a", " b c x y a b c x"), ("a b", " c")],
    )
    collator = ExampleCollator([0], [], context, padding=9, eos=1, joined=True)
    batch = collator.batch(encoded, np.arange(3))
    assert batch.ids.shape == (3, min(context, collator.lengths(encoded).max()))
    for i, (ids, targets) in enumerate(zip(batch.ids.tolist(), batch.targets.tolist())):
        target = [*encoded.targets[i].tolist()[: context - 1], 1]
        source = [0, *encoded.sources[i].tolist()]
        assert [expected for expected in targets if expected != IGNORED] == target
        row = (
            (source + target)[-context - 1 :]
            if len(source + target) > context + 1
            else source + target
        )
        if len(source) + len(target) <= context + 1:
            assert ids[: len(row) - 1] == row[:-1]
        assert ids[0] == 0 or len(target) == context  # bos stays while there is room
    assert (collator.truncated_tokens(encoded) > 0).tolist() == [
        len(encoded.sources[i]) + len(encoded.targets[i]) + 1 > context for i in range(3)
    ]


def test_unigram_entropy_by_hand():
    # 1/2, 1/4, 1/4: 1.5 bits
    batches = [np.array([5, 5, IGNORED]), np.array([7, 900])]
    assert unigram_entropy(iter(batches)) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(iter([np.array([3, 3])])) == 0


def test_pairs_with_a_label_are_truncated_as_in_tokenizers(tmp_path):
    tokenizer = learn(["a b c x y " * 20], TokenizerConfig(vocab_size=300), "encoder")
    rows = [{"one": "a b c", "two": "x y", "is": "u"}, {"one": "a", "two": "x y " * 9, "is": "v"}]
    documents, hashes, doc_format = read(
        tmp_path / "p.jsonl", rows, tokenizer, fields=("one", "two"), label="is"
    )
    encoded = examples.build(documents, hashes, doc_format, tokenizer, ("u", "v"))
    assert encoded.labels.tolist() == [0, 1] and encoded.sizes.tolist() == [8, 37]
    collator = ExampleCollator(
        tokenizer.prefix, tokenizer.suffix, 12, 0, join_pair=tokenizer.with_template
    )
    batch = collator.batch(encoded, np.arange(2))
    tokenizer.core.enable_truncation(12, strategy="longest_first")
    for i, row in enumerate(rows):
        expected = tokenizer.core.encode(row["one"], row["two"])
        size = len(expected.ids)
        assert (
            batch.ids[i, :size].tolist() == expected.ids
            and batch.types[i, :size].tolist() == expected.type_ids
        )
    assert batch.token_mask.sum(1).tolist() == collator.lengths(encoded)[:, 0].tolist()
    special = len(tokenizer.with_template([], [])[0])
    assert collator.truncated_tokens(encoded).tolist() == [
        0,
        len(encoded.sources[1]) + len(encoded.targets[1]) + special - 12,
    ]
