"""From files to training and validation sets; the facts in recipe.yaml that restore them."""

from dataclasses import replace

import pytest

from lmcli.config import ModelConfig, TokenizerConfig, TrainConfig
from lmcli.data.documents import Document, DocumentFormat
from lmcli.errors import UserError
from lmcli.training import datasets
from lmcli.training.language_modeling import CAUSAL
from lmcli.training.objectives import encode, resolve_objective

VOCABULARY = TokenizerConfig(vocab_size=300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prepare(tmp_path):
    """prepare(text, **options): (TrainingData, Source, notes) of a file with this text."""

    def call(
        text, context=16, validation_bytes=10**6, tokenizer=None, doc_format=None, name="text.txt"
    ):
        path, notes = tmp_path / name, []
        path.write_text(text)
        doc_format = doc_format or DocumentFormat()
        source = datasets.open_sources((str(path),), (), doc_format, None, notes.append)
        split = datasets.split(source, validation_bytes, notes.append)
        data = encode(CAUSAL, split, VOCABULARY, context, tokenizer, notes.append)
        return data, split.source, notes

    return call


LINES = [f"line {i} of the text, quite short\n" for i in range(100)]


def test_training_and_validation_sets_share_out_the_text(prepare):
    text = "".join(LINES)
    data, _, _ = prepare(text)
    validation = data.measured[0]
    assert validation.end == len(text) and text[validation.start - 1] == "\n"
    assert (validation.end - validation.start) / len(text) == pytest.approx(0.1, abs=0.01)
    tokenizer = data.tokenizer
    *ids, closing = data.corpus.ids.tolist()
    assert tokenizer.decode(ids) == text[: validation.start] and closing == tokenizer.special_id(
        "eos_token"
    )
    assert tokenizer.decode(data.validation[0].ids.tolist()) == text[validation.start :]
    assert data.corpus.bytes == validation.start


def test_the_tokenizer_is_learned_from_the_training_set_only(prepare):
    data, _, _ = prepare("".join(LINES) + "zzzzqqqq " * 30)
    assert not any("zz" in piece or "qq" in piece for piece in data.tokenizer.core.get_vocab())


def test_a_tenth_of_many_documents_is_for_validation(prepare):
    data, _, notes = prepare("".join(LINES), doc_format=DocumentFormat("line"))
    assert len(data.measured) == 10 and notes[0].startswith("90 documents, ")
    assert {document.start for document in data.measured} < {
        len("".join(LINES[:i])) for i in range(100)
    }


def test_a_large_validation_set_is_limited_and_the_note_says_so(prepare):
    data, _, notes = prepare("".join(LINES), validation_bytes=100)
    assert sum(document.end - document.start for document in data.measured) < 200
    assert "of them measured" in notes[0]


def test_the_limit_takes_some_of_each_source(tmp_path):
    for name, count in (("a", 90), ("b", 9), ("c", 1)):
        (tmp_path / name).write_text("".join(LINES) * count)
    names = tuple(str(tmp_path / name) for name in "abc")
    source = datasets.open_sources(
        names, (), DocumentFormat("line"), None, lambda text: None, weights=(1, 1, 1)
    )
    split = datasets.split(source, 300, lambda text: None)
    fewer = datasets.measure_fewer(
        datasets.split(source, 0, lambda text: None), 300, lambda text: None
    )
    for measured in (split.measured, fewer.measured):
        assert {document.file for document in measured} == set(names)
        assert sum(document.file == names[0] for document in measured) >= 5


def test_byte_ranges_round_trip():
    documents = [Document("a", 0, 5), Document("a", 9, 12), Document("b", 3, 4)]
    stored = datasets.ranges(documents)
    assert stored == [{"file": "a", "ranges": "0-5 9-12"}, {"file": "b", "ranges": "3-4"}]
    assert datasets.from_ranges(stored) == documents


def test_source_facts_round_trip(tmp_path):
    source = datasets.Source(
        ["a"], ["b"], DocumentFormat("line", "jsonl", ("x", "y"), "skip"), {"a": "0"}
    )
    assert datasets.source_from_facts(source.facts()) == source


def test_a_run_without_a_split_seed_keeps_every_tenth(tmp_path):
    """recipe.yaml of November 2026 has no split_seed."""
    file = tmp_path / "a.txt"
    file.write_text("".join(LINES))
    source = datasets.open_sources((str(file),), (), DocumentFormat("line"), None, print)
    facts = source.facts()
    assert facts.pop("split_seed") == 0
    old = datasets.source_from_facts(facts)
    ends = [len("".join(LINES[: i + 1])) - 1 for i in range(100)]
    split = datasets.split(old, 10**6, lambda text: None)
    assert [document.end for document in split.validation] == ends[9::10]
    assert [document.end for document in split.measured] == ends[9::10]
    assert "split_seed" not in split.source.facts()  # and so when it is resumed once more
    new = datasets.split(source, 10**6, lambda text: None).validation
    assert len(new) == 10 and [document.end for document in new] != ends[9::10]


def test_the_error_names_a_changed_file(prepare, tmp_path):
    data, source, notes = prepare("".join(LINES))
    known = datasets.source_from_facts(source.facts())
    split = datasets.split(known, 10**6, notes.append)
    again = encode(CAUSAL, split, VOCABULARY, 16, data.tokenizer, notes.append)
    assert again.corpus.ids.tolist() == data.corpus.ids.tolist()
    (tmp_path / "text.txt").write_text("".join(LINES[::-1]))
    with pytest.raises(UserError, match="has changed since the run began") as caught:
        datasets.split(datasets.source_from_facts(source.facts()), 10**6, notes.append)
    assert caught.value.where == str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    "words, context, message",
    [(5, None, "at least 32"), (60, None, None), (60, 10_000, "context shrinks")],
)
def test_too_little_text(prepare, words, context, message):
    text = "".join(f"{chr(97 + i % 26)}{i}\n" for i in range(words))
    if message == "at least 32":
        with pytest.raises(UserError, match="tokens to train on") as caught:
            prepare(text)
        assert message in caught.value.hint
        return
    data, _, notes = prepare(text, context or 16)
    assert data.context == (16 if context is None else data.corpus.tokens)
    assert any("context shrinks" in note for note in notes) == bool(message)


def test_notes_count_what_is_left_out(prepare, tmp_path):
    rows = "".join(f'{{"text": "row {i} of a few"}}\n' for i in range(40)) + "broken\n"
    _, _, notes = prepare(rows, doc_format=DocumentFormat(on_error="skip"), name="rows.jsonl")
    assert "1 bad record left out" in notes
    (tmp_path / "noise.bin").write_bytes(b"\0")
    notes = []
    datasets.open_sources((str(tmp_path),), (), DocumentFormat(), None, notes.append)
    assert notes[0].endswith("files that are not UTF-8 text left out")


QUESTION = (
    '{"context": "Anna sits.", "question": "Who?", '
    '"answers": [{"text": "Anna", "answer_start": 0}]}\n'
)


@pytest.mark.parametrize(
    "text, fields, name, objective",
    [
        (QUESTION, (), "auto", "span"),
        (QUESTION.replace("context", "text"), ("text", "question", "answers"), "span", "span"),
        (QUESTION.replace("context", "text"), ("text",), "auto", "masked"),
        ('{"text": "a", "label": "b"}\n', (), "auto", "classification"),
    ],
)
def test_an_encoders_objective_follows_from_the_fields(tmp_path, text, fields, name, objective):
    (tmp_path / "a.jsonl").write_text(text * 30)
    source = datasets.open_sources(
        (str(tmp_path / "a.jsonl"),), (), DocumentFormat(fields=fields), None, print
    )
    chosen, doc_format = resolve_objective(source, name, ModelConfig(shape="encoder"), print)
    assert chosen.name == objective
    assert doc_format.answers == ("answers" if objective == "span" else "")
    assert source.doc_format == DocumentFormat(fields=fields)  # is not written into
    source = replace(source, doc_format=doc_format)
    assert datasets.source_from_facts(source.facts()) == source
    if objective == "span":
        assert len(doc_format.fields) == 2
        assert datasets.split(source, 10**6, lambda text: None).measured


def test_questions_have_their_examples_and_windows(tmp_path):
    long = QUESTION.replace("Anna sits.", "Anna sits and sits and sits and sits and sits.")
    rows = "".join(QUESTION.replace("Who", f"Who {i}") for i in range(25)) + long * 5
    (tmp_path / "a.jsonl").write_text(rows)
    source = datasets.open_sources((str(tmp_path / "a.jsonl"),), (), DocumentFormat(), None, print)
    objective, doc_format = resolve_objective(source, "auto", ModelConfig(shape="encoder"), print)
    source, notes = replace(source, doc_format=doc_format), []
    split = datasets.split(source, 10**6, lambda text: None)
    data = encode(objective, split, VOCABULARY, 10, None, notes.append)
    # copies of one question are not chosen where there are enough others
    assert all(example.question.startswith("Who ") for example in data.examples)
    assert len(data.validation) == 3 and len(data.questions) == 27
    assert data.long_contexts() == 5
    assert notes[-1] == "5 of 27 contexts have no room in 10 tokens: they are read in windows"
    rows = data.batches(TrainConfig(doc_stride=2), ModelConfig())
    assert rows.rows_per_epoch > 27 + 5 and rows.step(0, 64, 64)[0].ids.shape[1] <= 10
