"""The corpus: ids equal to those of each document, cached by content, built resumably."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lmcli.config import TokenizerConfig
from lmcli.data import corpus
from lmcli.data.documents import DocumentFormat, find_documents, survey
from lmcli.errors import UserError
from lmcli.text import tokenizer
from lmcli.text.tokenizer import Tokenizer

TOKENIZER = tokenizer.learn(["one two three four\n"] * 20, TokenizerConfig(vocab_size=280))
OTHER = tokenizer.learn(["eins zwei drei vier\n"] * 20, TokenizerConfig(vocab_size=280))
CONTENT = "one two\n\nthree 字 four\r\n"
TEXT = CONTENT.replace("\r\n", "\n")  # as it is read


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpus"


def build(folder, content=CONTENT, name="a.txt", end_of_text=0, using=TOKENIZER, **options):
    file = folder / name
    file.write_bytes(content.encode())
    doc_format = DocumentFormat(**options)
    surveyed = survey([str(file)], doc_format)
    documents, hashes = surveyed.documents, surveyed.hashes
    return corpus.build(documents, hashes, doc_format, using, end_of_text)


def written_at(cache):
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}


def test_ids_are_those_of_each_document_and_eos(tmp_path):
    built = build(tmp_path, documents="line")
    expected = [
        index for line in ("one two", "three 字 four") for index in [*TOKENIZER.encode(line), 0]
    ]
    assert built.ids.tolist() == expected
    assert (built.documents, built.tokens, built.bytes) == (
        2,
        len(expected),
        len("one twothree 字 four".encode()),
    )


def test_without_eos_documents_follow_each_other(tmp_path):
    built = build(tmp_path, end_of_text=None)
    assert built.ids.tolist() == TOKENIZER.encode(TEXT) and 0 not in built.ids


def test_json_rows_are_encoded_by_their_text(tmp_path):
    built = build(tmp_path, '{"text": "one\\ntwo"}\n{"text": "three"}\n', "a.jsonl")
    assert built.ids.tolist() == [*TOKENIZER.encode("one\ntwo"), 0, *TOKENIZER.encode("three"), 0]
    assert built.bytes == len("one\ntwothree")


def test_a_second_build_writes_nothing(tmp_path, cache):
    first = build(tmp_path)
    before = written_at(cache)
    second = build(tmp_path)
    assert len(before) == 2 and written_at(cache) == before
    assert second.key == first.key and np.array_equal(first.ids, second.ids)


def test_the_key_depends_on_content_not_on_names(tmp_path):
    assert build(tmp_path).key == build(tmp_path, name="b.txt").key


@pytest.mark.parametrize(
    "change",
    [
        {"content": CONTENT + "!"},
        {"using": OTHER},
        {"end_of_text": None},
        {"end_of_text": 5},
        {"documents": "line"},
        {"documents": "blank"},
    ],
)
def test_the_key_changes_with_whatever_changes_the_ids(tmp_path, change):
    first, second = build(tmp_path), build(tmp_path, **change)
    assert first.key != second.key and not np.array_equal(first.ids, second.ids)


def test_the_key_changes_with_the_range(tmp_path):
    """As for a validation split, where a range ends earlier."""
    file = tmp_path / "a.txt"
    file.write_text("one two three\n")
    doc_format = DocumentFormat()
    surveyed = survey([str(file)], doc_format)
    (document,), hashes = surveyed.documents, surveyed.hashes
    ranges = [(0, 14), (0, 7), (3, 7)]
    built = [
        corpus.build([document._replace(start=start, end=end)], hashes, doc_format, TOKENIZER, None)
        for start, end in ranges
    ]
    assert len({corpus_.key for corpus_ in built}) == 3
    assert [TOKENIZER.decode(corpus_.ids.tolist()) for corpus_ in built] == [
        "one two three\n",
        "one two",
        " two",
    ]


def test_other_fields_of_the_same_rows_are_another_corpus(tmp_path):
    rows = '{"text": "one", "b": "two"}\n'
    assert not np.array_equal(
        build(tmp_path, rows, "a.jsonl").ids, build(tmp_path, rows, "a.jsonl", fields=("b",)).ids
    )


def test_an_incomplete_cache_entry_is_rebuilt(tmp_path, cache):
    first = build(tmp_path).ids.tolist()
    (facts,) = cache.glob("*/facts.json")
    facts.unlink()
    assert build(tmp_path).ids.tolist() == first and facts.is_file()


def test_ids_take_two_bytes_when_they_fit_and_four_when_not(tmp_path):
    assert build(tmp_path).ids.dtype == np.uint16
    TOKENIZER_LARGE = Tokenizer(TOKENIZER.core)
    TOKENIZER_LARGE.size = (1 << 16) + 1
    built = build(tmp_path, content="one", using=TOKENIZER_LARGE)
    assert built.ids.dtype == np.uint32 and built.ids.tolist() == [*TOKENIZER.encode("one"), 0]


def test_many_documents_keep_their_order(tmp_path):
    lines = [f"one {i} two" for i in range(300)]
    built = build(tmp_path, "\n".join(lines), documents="line")
    assert TOKENIZER.decode(built.ids.tolist()) == "<|endoftext|>".join([*lines, ""])


def test_an_impossible_cache_folder_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the token cache"):
        build(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path, cache):
    file = tmp_path / "a.txt"
    file.write_text("one two three\n")
    doc_format = DocumentFormat()
    surveyed = survey([str(file)], doc_format)
    documents, hashes = surveyed.documents, surveyed.hashes
    file.write_text("one\n")
    with pytest.raises(UserError, match="is shorter than when it was first read"):
        corpus.build(documents, hashes, doc_format, TOKENIZER, 0)
    assert os.listdir(cache) == []


LINES = "".join(f"line {i} of one two three four\n" for i in range(2000))
# builds the corpus of a file in small pieces and saves its progress every 5,000 bytes; after some
# batches the process kills itself or waits for a line on standard input
PROGRAM = """
import os, signal, sys
from lmcli.data import corpus, documents
from lmcli.text import tokenizer
file, folder, form, after, what = sys.argv[1:]
documents.PIECE_CHARS, corpus.CHARACTERS_AT_ONCE, corpus.SAVE_BYTES = 300, 2000, 5000
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
layout = documents.DocumentFormat(form)
found = documents.survey([file], layout)
note = lambda text: print(text, flush=True)
built = corpus.build(found.documents, found.hashes, layout, using, 0, note)
print(built.tokens, sum(built.ids.tolist()), batches)
"""


@pytest.fixture
def process(tmp_path):
    """process(form, after, what): a started process that builds the corpus of 2,000 lines."""
    (tmp_path / "tokenizer").mkdir()
    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(LINES)
    processes = []

    def begin(form="file", after=0, what="go"):
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    PROGRAM,
                    str(tmp_path / "a.txt"),
                    str(tmp_path / "tokenizer"),
                    form,
                    str(after),
                    what,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=dict(os.environ),
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def expected(form):
    texts = [LINES] if form == "file" else LINES.splitlines()
    ids = [index for text in texts for index in [*TOKENIZER.encode(text), 0]]
    return [str(len(ids)), str(sum(ids))]


class TestInterruptedBuilds:
    @pytest.mark.parametrize("form", ["file", "line"])
    def test_a_killed_build_is_continued(self, process, cache, form):
        assert process(form, 20, "die").wait(timeout=60) == -signal.SIGKILL
        (folder,) = cache.glob("*.part")
        done = json.loads((folder / "progress.json").read_text())
        assert folder.name.startswith(".") and 10_000 < done["bytes"] < 40_000
        with (folder / "ids").open("ab") as ids:
            ids.write(b"half of what came after it")
        again = process(form)
        output = again.communicate(timeout=60)[0].splitlines()
        assert output[0] == "tokenizing continues after 0 MB, where it was interrupted"
        *built, batches = output[-1].split()
        assert built == expected(form) and int(batches) < 30  # of 36
        (folder,) = cache.iterdir()
        assert sorted(os.listdir(folder)) == ["facts.json", "ids"]

    def test_missing_ids_are_written_again(self, process, cache):
        assert process("file", 20, "die").wait(timeout=60) == -signal.SIGKILL
        (folder,) = cache.glob("*.part")
        os.truncate(folder / "ids", 10)
        assert process().communicate(timeout=60)[0].splitlines()[-1].split()[:2] == expected("file")

    def test_of_two_builds_at_once_one_waits(self, process, cache):
        first = process("file", 10, "wait")
        assert first.stdout.readline() == "half\n"
        second = process("file")
        assert (
            second.stdout.readline() == "another process tokenizes the same text: waiting for it\n"
        )
        first.stdin.write("\n")
        first.stdin.flush()
        outputs = [process.communicate(timeout=60)[0].split() for process in (first, second)]
        assert outputs[0][:2] == outputs[1][:2] == expected("file") and outputs[1][2] == "0"
        assert len(os.listdir(cache)) == 1

    def test_a_waiting_process_continues_a_killed_build(self, process):
        first = process("file", 20, "wait")
        assert first.stdout.readline() == "half\n"
        second = process("file")
        second.stdout.readline()
        first.kill()
        output = second.communicate(timeout=60)[0].splitlines()
        assert (
            "continues" in output[0]
            and output[-1].split()[:2] == expected("file")
            and int(output[-1].split()[2]) < 30
        )


class TestEncodedDocuments:
    def test_errors_are_raised_in_input_order(self, tmp_path, monkeypatch):
        """Although batches are read ahead."""
        monkeypatch.setattr(corpus, "CHARACTERS_AT_ONCE", 1)
        (tmp_path / "a.jsonl").write_text(
            '{"text": "one"}\n{"text": "two"}\n{"text": "six"}\nnone\n'
        )
        doc_format, built = DocumentFormat(), []
        with pytest.raises(UserError, match="line 4"):
            for document in corpus.encode_documents(
                find_documents([str(tmp_path / "a.jsonl")], doc_format), doc_format, TOKENIZER
            ):
                built.append(TOKENIZER.decode(document.ids.tolist()))
        assert built == [
            "one",
            "two",
        ]  # the third is complete only when the next piece has been read

    def test_counts_are_of_the_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(CONTENT.encode())
        doc_format = DocumentFormat()
        documents = survey([str(tmp_path / "a.txt")], doc_format).documents
        (built,) = corpus.encode_documents(documents, doc_format, TOKENIZER)
        assert built.ids.tolist() == TOKENIZER.encode(TEXT) and built.document == documents[0]
        assert (built.bytes, built.characters, built.words) == (len(TEXT.encode()), len(TEXT), 5)

    def test_a_text_in_memory_is_encoded_the_same(self):
        built = corpus.encode_text(CONTENT, TOKENIZER)
        assert built.ids.tolist() == TOKENIZER.encode(CONTENT)
        assert (built.bytes, built.characters, built.words) == (
            len(CONTENT.encode()),
            len(CONTENT),
            5,
        )

    def test_a_tokenizer_that_normalizes_gets_whole_documents(self, tmp_path, shared, monkeypatch):
        """Its ids could differ at a cut, so texts are not cut."""
        monkeypatch.setattr("lmcli.data.documents.PIECE_CHARS", 5)
        bert = tokenizer.load(shared / "tokenizers" / "bert-minilm")
        file = tmp_path / "a.txt"
        file.write_text("One two three four, five six\nseven\n" * 3)
        doc_format = DocumentFormat()
        (built,) = corpus.encode_documents(
            survey([str(file)], doc_format).documents, doc_format, bert
        )
        assert built.ids.tolist() == bert.encode(file.read_text())


def test_a_long_text_is_encoded_in_pieces_by_a_tokenizer_that_cannot_be_split(
    tmp_path, monkeypatch, shared
):
    """BERT's tokenizer ends words at white space, so the ids are the same, in constant memory."""
    monkeypatch.setattr("lmcli.data.documents.PIECE_CHARS", 50)
    monkeypatch.setattr(corpus, "WHOLE_CHARACTERS", 400)
    bert, lengths, notes = tokenizer.load(shared / "tokenizers" / "bert-minilm"), [], []
    encode = bert.encode_batch
    monkeypatch.setattr(
        bert, "encode_batch", lambda texts: lengths.extend(map(len, texts)) or encode(texts)
    )
    (tmp_path / "a.txt").write_text("One two three four, five six\nseven\n" * 100)
    doc_format = DocumentFormat()
    surveyed = survey([str(tmp_path / "a.txt")], doc_format)
    documents, hashes = surveyed.documents, surveyed.hashes
    built = corpus.build(documents, hashes, doc_format, bert, None, notes.append)
    assert built.ids.tolist() == bert.encode((tmp_path / "a.txt").read_text())
    assert max(lengths) < 500 and notes == [
        "this tokenizer encodes texts whole, and longer ones in pieces of about 400 characters"
    ]


def test_the_first_ids_of_a_mixture_are_those_of_each_corpus_by_weight():
    corpora = [corpus.Corpus(np.arange(k, k + size), 1, size, "") for k, size in ((0, 9), (50, 2))]
    assert corpora[0].first_ids(3).tolist() == [0, 1, 2]
    mixture = corpus.Mixture(corpora, [1.0, 3.0])
    assert mixture.first_ids(8).tolist() == [0, 1, 50, 51]  # of six, there are two
