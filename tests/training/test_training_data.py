"""From files to what is trained and validated on; the facts that let it be found again."""

import pytest

from lmcli.config import TokenizerConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.text.documents import Document, Layout
from lmcli.training import data

VOCABULARY = TokenizerConfig(vocab_size=300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prepare(tmp_path):
    """prepare(text, **options): (TrainingData, Source, notes) of a file with this text."""
    def call(text, context=16, validation_bytes=10**6, tokenizer=None, layout=None, name="text.txt"):
        path, notes = tmp_path / name, []
        path.write_text(text)
        source = data.find((str(path),), (), layout or Layout(), None, notes.append)
        parts = data.split(source, validation_bytes, notes.append)
        return data.prepare(source, parts, VOCABULARY, context, tokenizer, notes.append), source, notes
    return call


LINES = [f"line {i} of the text, quite short\n" for i in range(100)]


def test_training_and_validation_part_the_text_between_them(prepare):
    text = "".join(LINES)
    prepared, _, _ = prepare(text)
    held = prepared.measured[0]
    assert held.end == len(text) and text[held.start - 1] == "\n"
    assert (held.end - held.start) / len(text) == pytest.approx(0.1, abs=0.01)
    tokenizer = prepared.tokenizer
    *ids, closing = prepared.corpus.ids.tolist()
    assert tokenizer.decode(ids) == text[:held.start] and closing == tokenizer.special("eos_token")
    assert tokenizer.decode(prepared.validation[0].ids.tolist()) == text[held.start:]
    assert prepared.corpus.bytes == held.start


def test_the_tokenizer_is_learnt_on_the_training_part_only(prepare):
    prepared, _, _ = prepare("".join(LINES) + "zzzzqqqq " * 30)
    assert not any("zz" in piece or "qq" in piece for piece in prepared.tokenizer.core.get_vocab())


def test_every_tenth_of_many_documents_is_held_out(prepare):
    prepared, _, notes = prepare("".join(LINES), layout=Layout("line"))
    assert [document.start for document in prepared.measured] == [len("".join(LINES[:i])) for i in range(9, 100, 10)]
    assert notes[0].startswith("90 documents, ")


def test_a_large_validation_part_is_measured_in_part_and_said(prepare):
    prepared, _, notes = prepare("".join(LINES), validation_bytes=100)
    assert sum(document.end - document.start for document in prepared.measured) < 200
    assert "of them measured" in notes[0]


def test_ranges_are_found_again():
    documents = [Document("a", 0, 5), Document("a", 9, 12), Document("b", 3, 4)]
    stored = data.ranges(documents)
    assert stored == [{"file": "a", "ranges": "0-5 9-12"}, {"file": "b", "ranges": "3-4"}]
    assert data.from_ranges(stored) == documents


def test_facts_hold_all_that_reading_needs(tmp_path):
    source = data.Source(["a"], ["b"], Layout("line", "jsonl", ("x", "y"), "skip"), {"a": "0"})
    assert data.source_from_facts(source.facts()) == source


def test_a_changed_file_is_named(prepare, tmp_path):
    prepared, source, notes = prepare("".join(LINES))
    known = data.source_from_facts(source.facts())
    again = data.prepare(known, data.split(known, 10**6, notes.append), VOCABULARY, 16, prepared.tokenizer, notes.append)
    assert again.corpus.ids.tolist() == prepared.corpus.ids.tolist()
    (tmp_path / "text.txt").write_text("".join(LINES[::-1]))
    with pytest.raises(UserError, match="has changed since the run began") as caught:
        data.split(data.source_from_facts(source.facts()), 10**6, notes.append)
    assert caught.value.where == str(tmp_path / "text.txt")


@pytest.mark.parametrize("words, context, told", [
    (5, None, "at least 32"), (60, None, None), (60, 10_000, "context shrinks")])
def test_too_little_text(prepare, words, context, told):
    text = "".join(f"{chr(97 + i % 26)}{i}\n" for i in range(words))
    if told == "at least 32":
        with pytest.raises(UserError, match="tokens to train on") as caught:
            prepare(text)
        assert told in caught.value.hint
        return
    prepared, _, notes = prepare(text, context or 16)
    assert prepared.context == (16 if context is None else prepared.corpus.tokens)
    assert any("context shrinks" in note for note in notes) == bool(told)


def test_what_is_left_out_is_counted(prepare, tmp_path):
    rows = "".join(f'{{"text": "row {i} of a few"}}\n' for i in range(40)) + "broken\n"
    _, _, notes = prepare(rows, layout=Layout(on_error="skip"), name="rows.jsonl")
    assert "1 bad records left out" in notes
    (tmp_path / "noise.bin").write_bytes(b"\0")
    notes = []
    data.find((str(tmp_path),), (), Layout(), None, notes.append)
    assert notes[0].endswith("files that are not UTF-8 text left out")


QUESTION = '{"context": "Anna sits.", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}\n'


@pytest.mark.parametrize("text, fields, asked, objective", [
    (QUESTION, (), "auto", "span"), (QUESTION.replace("context", "text"), ("text", "question", "answers"), "span", "span"),
    (QUESTION.replace("context", "text"), ("text",), "auto", "masked"),
    ('{"text": "a", "label": "b"}\n', (), "auto", "classification")])
def test_the_fields_of_an_encoders_rows_settle_what_it_learns(tmp_path, text, fields, asked, objective):
    (tmp_path / "a.jsonl").write_text(text * 30)
    source = data.find((str(tmp_path / "a.jsonl"),), (), Layout(fields=fields), None, print)
    assert data.settle(source, asked, "encoder", print).name == objective
    assert source.layout.answers == ("answers" if objective == "span" else "")
    assert data.source_from_facts(source.facts()) == source
    if objective == "span":
        assert len(source.layout.fields) == 2
        assert data.split(source, 10**6, lambda told: None).measured


def test_questions_come_with_what_they_pose_and_their_windows(tmp_path):
    rows = QUESTION * 25 + QUESTION.replace("Anna sits.", "Anna sits and sits and sits and sits and sits.") * 5
    (tmp_path / "a.jsonl").write_text(rows)
    source = data.find((str(tmp_path / "a.jsonl"),), (), Layout(), None, print)
    objective = data.settle(source, "auto", "encoder", print)
    parts = data.split(source, 10**6, lambda told: None)
    prepared = data.prepare(source, parts, VOCABULARY, 10, None, lambda told: None, objective)
    assert [one.question for one in prepared.posed] == ["Who?"] * 3 and len(prepared.validation) == 3
    assert len(prepared.corpus) == 27
    long = data.in_windows(prepared)
    assert long == 4  # one of the five is held out
    rows = data.training_rows(prepared, objective, None, TrainConfig(doc_stride=2))
    assert rows.rows_per_epoch > 27 + long and rows.step(0, 64, 64)[0].ids.shape[1] <= 10
