"""The validation split: seeded, of each label its share, without leaks, the same in any order."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.model_selection import StratifiedShuffleSplit

from lmcli.data import splits
from lmcli.data.byte_ranges import Document, DocumentLabels, Documents
from lmcli.data.documents import DocumentFormat, read_pieces, read_rows, survey
from lmcli.data.splits import hold_out, hold_out_of_each_label, limit, split
from lmcli.errors import UserError

LABELED = DocumentFormat(fields=("text",), label="label")


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_text(
        data if isinstance(data, str) else "".join(json.dumps(row) + "\n" for row in data)
    )
    return str(file)


def read_text(document, doc_format):
    return "".join(piece.text for piece in read_pieces([document], doc_format))


def rows_of(documents, doc_format=LABELED):
    return [row for _, row in read_rows(documents, doc_format)]


def split_rows(folder, rows, doc_format=LABELED, name="a.jsonl", **options):
    """(training rows, validation rows)"""
    surveyed = survey([written(folder, rows, name)], doc_format)
    return tuple(rows_of(part, doc_format) for part in split(surveyed, doc_format, **options))


def keys(count):
    """The keys of documents with the texts "0", "1", …"""
    return Documents.keyed(((Document("a", i, i), hash(i)) for i in range(count)), 0).keys


def ranges_cover(wanted, training, validation):
    """True if the two lists of ranges cover the documents, each byte once."""
    ranges = {}
    for document in [*training, *validation]:
        ranges.setdefault(document.file, []).append((document.start, document.end))
    covered = {file: sorted(spans) for file, spans in ranges.items()}
    expected = {}
    for document in wanted:
        expected.setdefault(document.file, []).append((document.start, document.end))
    for file, spans in expected.items():
        joined = []
        for start, end in covered.pop(file):
            if (
                joined
                and joined[-1][1] == start
                and (start, end) not in spans
                and joined[-1] not in spans
            ):
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        if joined != sorted(spans):
            return False
    return not covered


class TestLabels:
    def test_labels_that_alternate_are_both_held_out(self, tmp_path):
        """Every tenth of these rows has one label."""
        rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(400)]
        training, validation = split_rows(tmp_path, rows)
        assert Counter(row["label"] for row in validation) == {"a": 20, "b": 20}
        assert Counter(row["label"] for row in training) == {"a": 180, "b": 180}

    @pytest.mark.parametrize("period", [2, 5, 10, 20])
    def test_a_pattern_in_the_order_has_no_influence(self, tmp_path, period):
        """χ² of what the places of the held-out rows leave as remainders, with p > 0.001."""
        rows = [{"text": f"{i}"} for i in range(4000)]
        _, validation = split_rows(tmp_path, rows, DocumentFormat())
        assert len(validation) == 400
        counts = np.bincount([int(row["text"]) % period for row in validation], minlength=period)
        assert chisquare(counts).pvalue > 0.001

    def test_each_label_has_its_share_as_in_scikit_learn(self, tmp_path):
        sizes = {"a": 300, "b": 120, "c": 55, "d": 25}
        rows = [{"text": f"{name}{i}", "label": name} for name in sizes for i in range(sizes[name])]
        _, validation = split_rows(tmp_path, rows)
        labels = [row["label"] for row in rows]
        chosen = StratifiedShuffleSplit(1, test_size=50, random_state=0)
        expected = Counter(labels[i] for i in next(chosen.split(labels, labels))[1])
        counts = Counter(row["label"] for row in validation)
        assert sum(counts.values()) == 50
        assert all(abs(counts[name] - expected[name]) <= 1 for name in sizes)

    def test_a_label_of_two_is_on_both_sides_and_one_of_one_is_trained_on(self, tmp_path):
        rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(30)]
        rows[9]["label"], rows[3]["label"], rows[4]["label"] = "once", "twice", "twice"
        training, validation = split_rows(tmp_path, rows)
        assert Counter(row["label"] for row in validation)["twice"] == 1
        labels = Counter(row["label"] for row in training)
        assert labels["twice"] == labels["once"] == 1

    def test_few_rows_with_labels_too(self, tmp_path):
        rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(6)]
        _, validation = split_rows(tmp_path, rows)
        assert sorted(row["label"] for row in validation) == ["a", "b"]

    @given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 99))
    @settings(max_examples=60)
    def test_the_promises_hold_for_any_sizes(self, sizes, seed):
        ids = np.repeat(np.arange(len(sizes)), sizes)
        random.Random(seed).shuffle(ids)
        labels = DocumentLabels(ids, np.arange(len(ids)))
        chosen = hold_out_of_each_label(keys(len(ids)), labels, 0.1)
        held_out = np.bincount(ids[chosen], minlength=len(sizes))
        for size, held in zip(sizes, held_out):
            assert held == 0 if size == 1 else 1 <= held < size
        surplus = sum(size > 1 for size in sizes)
        assert 0.1 * sum(s for s in sizes if s > 1) - surplus - 1 <= chosen.sum()
        assert chosen.sum() <= 0.1 * len(ids) + surplus + 1

    @given(rows=st.lists(st.sets(st.integers(0, 5)), min_size=2, max_size=40))
    @settings(max_examples=60)
    def test_many_labels_of_a_row_are_all_trained_on(self, rows):
        """A label without a row to train on would be unknown to the model."""
        pairs = [(label, i) for i, row in enumerate(rows) for label in (row or {6})]
        labels = DocumentLabels(*(np.array(column) for column in zip(*pairs)))
        chosen = hold_out_of_each_label(keys(len(rows)), labels, 0.1)
        for label in set(labels.ids.tolist()):
            assert not chosen[labels.documents[labels.ids == label]].all()

    def test_labels_that_all_differ_are_an_error_with_an_advice_that_helps(self, tmp_path):
        rows = [{"text": f"{i}", "label": str(i)} for i in range(30)]
        with pytest.raises(UserError, match="each label occurs once") as caught:
            split_rows(tmp_path, rows)
        assert "--val FILE" in caught.value.hint


class TestContent:
    def test_the_choice_depends_on_the_texts_alone(self, tmp_path):
        """Not on their order, on other fields, or on how the file is written."""
        rows = [{"text": f"text, {i}\n", "label": "ab"[i % 2]} for i in range(100)]
        _, validation = split_rows(tmp_path, rows)
        chosen = sorted(row["text"] for row in validation)
        shuffled = [{"id": i, **row} for i, row in enumerate(rows)]
        random.Random(0).shuffle(shuffled)
        _, again = split_rows(tmp_path, shuffled, name="b.jsonl")
        assert sorted(row["text"] for row in again) == chosen
        one_line = [row | {"text": row["text"][:-1]} for row in rows]
        csv = "label,text\n" + "".join(f'{row["label"]},"{row["text"]}"\n' for row in one_line)
        assert sorted(row["text"] for row in split_rows(tmp_path, csv, name="c.csv")[1]) == sorted(
            row["text"] for row in split_rows(tmp_path, one_line, name="d.jsonl")[1]
        )

    def test_another_seed_chooses_others(self, tmp_path):
        file, doc_format = written(tmp_path, "".join(f"{i}\n" for i in range(100))), "line"
        doc_format = DocumentFormat("line")
        first, other, again = (
            split(survey([file], doc_format, seed), doc_format, seed)[1] for seed in (0, 1, 0)
        )
        assert first == again != other and len(first) == len(other) == 10

    @pytest.mark.parametrize("documents", ["line", "blank", "file"])
    def test_copies_of_a_text_are_on_one_side(self, tmp_path, documents):
        texts = [f"text {i // 2}" for i in range(80)] + ["very often"] * 40
        random.Random(1).shuffle(texts)
        mark = {"line": "\n", "blank": "\n\n", "file": "<|endoftext|>"}[documents]
        doc_format = DocumentFormat(documents)
        surveyed = survey([written(tmp_path, mark.join(texts))], doc_format)
        training, validation = (
            {read_text(document, doc_format) for document in part}
            for part in split(surveyed, doc_format)
        )
        assert len(training | validation) == 41
        assert training & validation <= {"very often"} and len(validation) < 13

    def test_where_all_texts_are_the_same_some_are_held_out(self, tmp_path):
        doc_format = DocumentFormat("line")
        surveyed = survey([written(tmp_path, "the same\n" * 50)], doc_format)
        training, validation = split(surveyed, doc_format)
        assert (len(training), len(validation)) == (45, 5)

    def test_marks_at_the_border_of_a_chunk_change_no_key(self, tmp_path, monkeypatch):
        from lmcli.data import documents

        file = written(tmp_path, "<|endoftext|>\n\n".join(f" text {i}\n" for i in range(30)))
        whole = survey([file], DocumentFormat()).documents.keys.tolist()
        assert len(set(whole)) == 30
        for size in (1, 7, 13, 14, 50):
            monkeypatch.setattr(documents, "CHUNK_BYTES", size)
            assert survey([file], DocumentFormat()).documents.keys.tolist() == whole

    def test_a_long_list_is_chosen_from_its_small_keys(self, monkeypatch):
        many = keys(20_000)
        expected = hold_out(many, 2000)
        monkeypatch.setattr(splits, "MAX_IN_MEMORY", 100)
        assert (hold_out(many, 2000) == expected).all() and expected.sum() == 2000
        assert splits.smallest_keys(many, 500).sum() == 500


def test_runs_of_before_keep_every_tenth(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(45)]
    _, validation = split_rows(tmp_path, rows, seed=None)
    assert validation == rows[9::10]
    documents = survey([str(tmp_path / "a.jsonl")], LABELED).documents
    every = -(-documents.bytes // 300)
    assert limit(documents, LABELED, 300, None) == documents[::every]


class TestFewTexts:
    def test_the_last_tenth_of_each_at_a_line_end(self, tmp_path):
        text = "".join(
            f"line {i:03}\n" for i in range(100)
        )  # lines of 9 bytes: 90 % is byte 810, a line's first
        doc_format = DocumentFormat()
        first, second = written(tmp_path, text), written(tmp_path, text[:450], "b.txt")
        training, validation = split(survey([first, second], doc_format), doc_format)
        assert training == [Document(first, 0, 819), Document(second, 0, 414)]
        assert validation == [Document(first, 819, 900), Document(second, 414, 450)]
        assert all(read_text(document, doc_format).endswith("\n") for document in training)

    @pytest.mark.parametrize(
        "text, held_out",
        [
            ("word " * 20, "word "),  # no line end: cut after the next space
            ("short\n" + "word " * 20, "word word "),  # no line end in the last tenth
            ("abcdefghij" * 4, "ghij"),  # neither: the next character
            ("字" * 10, "字"),
            ("a" + "字" * 10, "字"),
        ],
    )
    def test_a_text_without_a_line_end_there(self, tmp_path, text, held_out):
        doc_format = DocumentFormat()
        training, validation = split(survey([written(tmp_path, text)], doc_format), doc_format)
        assert [read_text(document, doc_format) for document in validation] == [held_out]
        assert read_text(training[0], doc_format) + held_out == text

    @given(
        sizes=st.lists(
            st.text("ab \n字🎉", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=24
        )
    )
    @settings(max_examples=60)
    def test_no_byte_is_lost_or_duplicated(self, tmp_path_factory, sizes):
        folder, doc_format = tmp_path_factory.mktemp("t"), DocumentFormat()
        surveyed = survey(
            [written(folder, text, f"{i}.txt") for i, text in enumerate(sizes)], doc_format
        )
        try:
            training, validation = split(surveyed, doc_format)
        except UserError as error:
            assert (
                "too little text" in error.what and max(len(text.encode()) for text in sizes) < 60
            )
            return
        assert ranges_cover(surveyed.documents, training, validation)
        assert all(
            read_text(document, doc_format) for document in [*training, *validation]
        )  # each is valid UTF-8 by itself

    def test_json_rows_are_not_cut(self, tmp_path):
        file = written(
            tmp_path, "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)), "a.jsonl"
        )
        doc_format = DocumentFormat()
        training, validation = split(survey([file], doc_format), doc_format)
        assert [read_text(d, doc_format) for d in validation] == ["row 4"] and len(training) == 4

    def test_one_row_or_one_character_is_too_little(self, tmp_path):
        doc_format = DocumentFormat()
        for file in (written(tmp_path, '{"text": "a b c"}', "a.jsonl"), written(tmp_path, "字")):
            with pytest.raises(
                UserError, match="too little text for a 10 % validation split"
            ) as caught:
                split(survey([file], doc_format), doc_format)
            assert "--val FILE" in caught.value.hint


class TestLimit:
    def test_documents_within_the_limit_are_unchanged(self, tmp_path):
        documents = survey([written(tmp_path, "some text\n")], DocumentFormat()).documents
        assert limit(documents, DocumentFormat(), 10) is documents

    def test_the_beginning_of_each_text_is_taken(self, tmp_path):
        text = "line of it\n" * 100
        files = [written(tmp_path, text), written(tmp_path, text, "b.txt")]
        cut_down = limit(survey(files, DocumentFormat()).documents, DocumentFormat(), 550)
        assert [(document.start, document.end) for document in cut_down] == [(0, 286), (0, 286)]

    def test_some_of_many_documents_are_taken_without_a_pattern(self, tmp_path):
        doc_format = DocumentFormat("line")
        file = written(tmp_path, "".join(f"{i:04}\n" for i in range(600)))
        documents = survey([file], doc_format).documents
        chosen = [int(read_text(each, doc_format)) for each in limit(documents, doc_format, 240)]
        assert len(chosen) == 60 and chosen == sorted(chosen) and chosen[-1] > 500
        assert 20 <= sum(number % 2 for number in chosen) <= 40

    def test_rows_are_never_cut(self, tmp_path):
        file = written(tmp_path, [{"text": f"aaa{i}"} for i in range(6)], "a.jsonl")
        documents = survey([file], DocumentFormat()).documents
        cut_down = limit(documents, DocumentFormat(), 50)
        assert len(cut_down) == 3 and set(cut_down) < set(documents)
