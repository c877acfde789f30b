"""The corpus: ids equal to encoding each document, written once, found again by content and by nothing else; a build that
was killed goes on, and two at once do no harm."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.text import corpus, tokenizer
from lmcli.text.documents import Layout
from lmcli.text.tokenizer import Tokenizer

TOKENIZER = tokenizer.learn(["one two three four\n"] * 20, TokenizerConfig(vocab_size=280))
OTHER = tokenizer.learn(["eins zwei drei vier\n"] * 20, TokenizerConfig(vocab_size=280))
CONTENT = "one two\n\nthree 字 four\r\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpus"


def build(folder, content=CONTENT, name="a.txt", end_of_text=0, using=TOKENIZER, **options):
    file = folder / name
    file.write_bytes(content.encode())
    layout = Layout(**options)
    documents, hashes = layout.survey([str(file)])
    return corpus.build(documents, hashes, layout, using, end_of_text)


def written_at(cache):
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}


def test_ids_are_each_documents_and_the_closing_token(tmp_path):
    found = build(tmp_path, documents="line")
    expected = [index for line in ("one two", "three 字 four\r") for index in [*TOKENIZER.encode(line), 0]]
    assert found.ids.tolist() == expected
    assert (found.documents, found.tokens, found.bytes) == (2, len(expected), len("one twothree 字 four\r".encode()))


def test_without_a_closing_token_nothing_stands_between(tmp_path):
    found = build(tmp_path, end_of_text=None)
    assert found.ids.tolist() == TOKENIZER.encode(CONTENT) and 0 not in found.ids


def test_json_rows_give_the_ids_of_their_text(tmp_path):
    found = build(tmp_path, '{"text": "one\\ntwo"}\n{"text": "three"}\n', "a.jsonl")
    assert found.ids.tolist() == [*TOKENIZER.encode("one\ntwo"), 0, *TOKENIZER.encode("three"), 0]
    assert found.bytes == len("one\ntwothree")


def test_a_second_build_writes_nothing(tmp_path, cache):
    first = build(tmp_path)
    before = written_at(cache)
    second = build(tmp_path)
    assert len(before) == 2 and written_at(cache) == before
    assert second.key == first.key and np.array_equal(first.ids, second.ids)


def test_the_key_goes_by_content_and_not_by_name(tmp_path):
    assert build(tmp_path).key == build(tmp_path, name="b.txt").key


@pytest.mark.parametrize("change", [
    {"content": CONTENT + "!"}, {"using": OTHER}, {"end_of_text": None}, {"end_of_text": 5}, {"documents": "line"},
    {"documents": "blank"}])
def test_the_key_changes_with_whatever_changes_the_ids(tmp_path, change):
    first, second = build(tmp_path), build(tmp_path, **change)
    assert first.key != second.key and not np.array_equal(first.ids, second.ids)


def test_the_key_changes_with_the_range(tmp_path):
    """As of a part held out, that ends earlier."""
    file = tmp_path / "a.txt"
    file.write_text("one two three\n")
    layout = Layout()
    (document,), hashes = layout.survey([str(file)])
    ranges = [(0, 14), (0, 7), (3, 7)]
    found = [corpus.build([document._replace(start=start, end=end)], hashes, layout, TOKENIZER, None)
             for start, end in ranges]
    assert len({part.key for part in found}) == 3
    assert [TOKENIZER.decode(part.ids.tolist()) for part in found] == ["one two three\n", "one two", " two"]


def test_other_fields_of_the_same_rows_are_another_corpus(tmp_path):
    rows = '{"text": "one", "b": "two"}\n'
    assert not np.array_equal(build(tmp_path, rows, "a.jsonl").ids, build(tmp_path, rows, "a.jsonl", fields=("b",)).ids)


def test_an_unfinished_cache_entry_is_built_anew(tmp_path, cache):
    first = build(tmp_path).ids.tolist()
    (facts,) = cache.glob("*/facts.json")
    facts.unlink()
    assert build(tmp_path).ids.tolist() == first and facts.is_file()


def test_ids_take_two_bytes_when_they_fit_and_four_when_not(tmp_path):
    assert build(tmp_path).ids.dtype == np.uint16
    TOKENIZER_LARGE = Tokenizer(TOKENIZER.core)
    TOKENIZER_LARGE.size = (1 << 16) + 1
    found = build(tmp_path, content="one", using=TOKENIZER_LARGE)
    assert found.ids.dtype == np.uint32 and found.ids.tolist() == [*TOKENIZER.encode("one"), 0]


def test_many_documents_keep_their_order(tmp_path):
    lines = [f"one {i} two" for i in range(300)]
    found = build(tmp_path, "\n".join(lines), documents="line")
    assert TOKENIZER.decode(found.ids.tolist()) == "<|endoftext|>".join([*lines, ""])


def test_a_cache_folder_that_cannot_be_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the token cache"):
        build(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path, cache):
    file = tmp_path / "a.txt"
    file.write_text("one two three\n")
    layout = Layout()
    documents, hashes = layout.survey([str(file)])
    file.write_text("one\n")
    with pytest.raises(UserError, match="is shorter than when it was first read"):
        corpus.build(documents, hashes, layout, TOKENIZER, 0)
    assert os.listdir(cache) == []


LINES = "".join(f"line {i} of one two three four\n" for i in range(2000))
# builds the corpus of a file: small pieces, notes of how far it is every 5,000 bytes; the process kills itself, or waits
# for a line on standard input, after some batches
PROGRAM = """
import os, signal, sys
from lmcli.text import corpus, documents, tokenizer
file, folder, form, after, what = sys.argv[1:]
documents.PIECE_CHARS, corpus.CHARACTERS_AT_ONCE, corpus.KEPT_EVERY = 300, 2000, 5000
using, batches = tokenizer.load(folder), 0
encode = using.encode_batch
def counted(texts):
    global batches
    batches += 1
    if batches == int(after):
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        print("half", flush=True)
        sys.stdin.readline()
    return encode(texts)
using.encode_batch = counted
layout = documents.Layout(form)
found, hashes = layout.survey([file])
built = corpus.build(found, hashes, layout, using, 0, lambda text: print(text, flush=True))
print(built.tokens, sum(built.ids.tolist()), batches)
"""


@pytest.fixture
def process(tmp_path):
    """process(form, after, what): a process that builds the corpus of 2,000 lines, begun."""
    (tmp_path / "tokenizer").mkdir()
    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(LINES)
    begun = []

    def begin(form="file", after=0, what="go"):
        begun.append(subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "a.txt"), str(tmp_path / "tokenizer"), form, str(after), what],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)))
        return begun[-1]

    yield begin
    for one in begun:
        one.kill()
        one.wait()


def expected(form):
    texts = [LINES] if form == "file" else LINES.splitlines()
    ids = [index for text in texts for index in [*TOKENIZER.encode(text), 0]]
    return [str(len(ids)), str(sum(ids))]


class TestBuildsInterrupted:
    @pytest.mark.parametrize("form", ["file", "line"])
    def test_a_killed_build_goes_on_where_it_was(self, process, cache, form):
        assert process(form, 20, "die").wait(timeout=60) == -signal.SIGKILL
        (part,) = cache.iterdir()
        done = json.loads((part / "progress.json").read_text())
        assert part.name.startswith(".") and 10_000 < done["bytes"] < 40_000
        with (part / "ids").open("ab") as ids:
            ids.write(b"half of what came after it")
        again = process(form)
        output = again.communicate(timeout=60)[0].splitlines()
        assert output[0] == "tokenizing goes on after 0 MB, where it was interrupted"
        *found, batches = output[-1].split()
        assert found == expected(form) and int(batches) < 30  # of 36
        (folder,) = cache.iterdir()
        assert sorted(os.listdir(folder)) == ["facts.json", "ids"]

    def test_ids_that_are_missing_are_written_anew(self, process, cache):
        assert process("file", 20, "die").wait(timeout=60) == -signal.SIGKILL
        (part,) = cache.iterdir()
        os.truncate(part / "ids", 10)
        assert process().communicate(timeout=60)[0].splitlines()[-1].split()[:2] == expected("file")

    def test_of_two_builds_at_once_one_waits(self, process, cache):
        first = process("file", 10, "wait")
        assert first.stdout.readline() == "half\n"
        second = process("file")
        assert second.stdout.readline() == "another process tokenizes the same text: waiting for it\n"
        first.stdin.write("\n")
        first.stdin.flush()
        told = [one.communicate(timeout=60)[0].split() for one in (first, second)]
        assert told[0][:2] == told[1][:2] == expected("file") and told[1][2] == "0"
        assert len(os.listdir(cache)) == 1

    def test_who_waits_for_a_killed_one_goes_on_with_its_part(self, process):
        first = process("file", 20, "wait")
        assert first.stdout.readline() == "half\n"
        second = process("file")
        second.stdout.readline()
        first.kill()
        output = second.communicate(timeout=60)[0].splitlines()
        assert "goes on" in output[0] and output[-1].split()[:2] == expected("file") and int(output[-1].split()[2]) < 30


class TestEncodedDocuments:
    def test_what_is_wrong_is_told_after_what_came_before(self, tmp_path, monkeypatch):
        """Though it is read ahead."""
        monkeypatch.setattr(corpus, "CHARACTERS_AT_ONCE", 1)
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "six"}\nnone\n')
        layout, found = Layout(), []
        with pytest.raises(UserError, match="line 4"):
            for document in corpus.encode_documents(layout.find([str(tmp_path / "a.jsonl")]), layout, TOKENIZER):
                found.append(TOKENIZER.decode(document.ids.tolist()))
        assert found == ["one", "two"]  # the third is given once it is known that nothing of it follows

    def test_counts_are_of_the_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(CONTENT.encode())
        layout = Layout()
        documents, _ = layout.survey([str(tmp_path / "a.txt")])
        (found,) = corpus.encode_documents(documents, layout, TOKENIZER)
        assert found.ids.tolist() == TOKENIZER.encode(CONTENT) and found.document == documents[0]
        assert (found.bytes, found.characters, found.words) == (len(CONTENT.encode()), len(CONTENT), 5)

    def test_a_text_in_memory_is_encoded_alike(self):
        found = corpus.encode_text(CONTENT, TOKENIZER)
        assert found.ids.tolist() == TOKENIZER.encode(CONTENT)
        assert (found.bytes, found.characters, found.words) == (len(CONTENT.encode()), len(CONTENT), 5)

    def test_a_tokenizer_that_normalizes_gets_the_whole_document(self, tmp_path, shared, monkeypatch):
        """Its ids could differ at a cut, so there is none."""
        monkeypatch.setattr("lmcli.text.documents.PIECE_CHARS", 5)
        bert = tokenizer.load(shared / "tokenizers" / "bert-minilm")
        file = tmp_path / "a.txt"
        file.write_text("One two three four, five six\nseven\n" * 3)
        layout = Layout()
        (found,) = corpus.encode_documents(layout.survey([str(file)])[0], layout, bert)
        assert found.ids.tolist() == bert.encode(file.read_text())


def test_a_long_text_for_a_tokenizer_that_needs_it_whole_is_encoded_in_stretches(tmp_path, monkeypatch, shared):
    """BERT's ends words at white space, so its ids stay what they were; memory does not grow with the text."""
    monkeypatch.setattr("lmcli.text.documents.PIECE_CHARS", 50)
    monkeypatch.setattr(corpus, "WHOLE_CHARACTERS", 400)
    bert, lengths, notes = tokenizer.load(shared / "tokenizers" / "bert-minilm"), [], []
    encode = bert.encode_batch
    monkeypatch.setattr(bert, "encode_batch", lambda texts: lengths.extend(map(len, texts)) or encode(texts))
    (tmp_path / "a.txt").write_text("One two three four, five six\nseven\n" * 100)
    layout = Layout()
    documents, hashes = layout.survey([str(tmp_path / "a.txt")])
    found = corpus.build(documents, hashes, layout, bert, None, notes.append)
    assert found.ids.tolist() == bert.encode((tmp_path / "a.txt").read_text())
    assert max(lengths) < 500 and notes == [
        "this tokenizer encodes texts whole, and longer ones in stretches of about 400 characters"]
