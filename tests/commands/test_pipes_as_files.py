"""A pipe given as a FILE, as the shell's <(COMMAND) does: read once, named as it was typed."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from lmcli.distributed import launcher

LABELED = "".join(
    json.dumps({"text": f"a {word} film", "label": label, "prediction": "pos"}) + "\n"
    for word, label in (("good", "pos"), ("bad", "neg")) * 3
)
DEVICES = pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="this system has no /dev/fd")


@pytest.fixture
def descriptor():
    """descriptor(text): /dev/fd/N, whose content is the text, once."""
    opened = []

    def make(text: str) -> str:
        reading, writing = os.pipe()
        opened.append(reading)
        with os.fdopen(writing, "w") as out:
            out.write(text)
        return f"/dev/fd/{reading}"

    yield make
    for number in opened:
        os.close(number)


@pytest.fixture
def fifo(tmp_path):
    """fifo(name, content): a named pipe, into which another thread writes the content once."""
    threads = []

    def make(name: str, content: bytes) -> str:
        path = tmp_path / name
        os.mkfifo(path)
        threads.append(threading.Thread(target=path.write_bytes, args=(content,), daemon=True))
        threads[-1].start()
        return str(path)

    yield make
    for thread in threads:
        thread.join(5)


def succeeded(done) -> str:
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@DEVICES
class TestDescriptors:
    def test_records_of_evaluate_are_read_twice(self, inside, descriptor):
        given = descriptor(LABELED)
        printed = succeeded(inside("evaluate", "--format", "jsonl", "--resamples", 0, given))
        assert "accuracy\tNA\tNA\t0.5\t" in printed

    def test_references_and_predictions(self, inside, descriptor):
        references, predictions = descriptor("pos\nneg\n"), descriptor("pos\npos\n")
        options = ("--references", references, "--predictions", predictions)
        rows = inside("evaluate", *options, "--task", "classify", "--resamples", 0)
        assert re.search(r"^accuracy\t.*\t0\.5\t", succeeded(rows), re.MULTILINE)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "no records in it"),
            ('{"text": "a", "label": "b"}\nwrong\n', ", line 2: invalid JSON"),
        ],
    )
    def test_an_error_names_the_pipe_as_typed(self, inside, descriptor, content, message):
        given = descriptor(content)
        done = inside("evaluate", "--format", "jsonl", given)
        assert done.returncode == 1 and f"lm: error: {given}" in done.stderr.decode()
        assert message in done.stderr.decode() and b"Traceback" not in done.stderr

    def test_perplexity_names_each_row(self, inside, trained, descriptor):
        texts = ["Once upon a time there was a dog.\n" * 9, "The cat sat.\n" * 9]
        given = [descriptor(text) for text in texts]
        rows = succeeded(inside("perplexity", "-m", trained[0], *given, "-q")).splitlines()[1:]
        assert [row.split("\t")[0] for row in rows] == given
        typed = inside("perplexity", "-m", trained[0], stdin=texts[1].encode())
        assert rows[1].split("\t")[1:] == succeeded(typed).splitlines()[1].split("\t")[1:]

    def test_info_counts(self, inside, descriptor):
        given = descriptor("one two\nthree\n")
        facts = json.loads(succeeded(inside("info", "--json", given)))
        assert (facts["path"], facts["lines"], facts["words"]) == (given, 2, 3)

    def test_a_run_reads_data_validation_and_preset(self, inside, descriptor, story, tmp_path):
        text = story.read_text(encoding="utf-8")
        preset = (
            "extends: tiny\nmodel: {hidden_size: 32, num_hidden_layers: 1}\n"
            "tokenizer: {vocab_size: 300}\ntrain: {context: 32, batch_tokens: 64}\n"
        )
        folder = tmp_path / "run"
        options = ("--preset", descriptor(preset), "--val", descriptor(text[-900:]), "-o", folder)
        options += ("--steps", 1)
        assert succeeded(inside("train", descriptor(text[:9000]), *options)) == f"{folder}\n"
        # the copies are there for a resume and for this
        succeeded(inside("perplexity", "-m", folder, "--validation"))

    def test_a_tokenizer_is_learned(self, inside, descriptor, tmp_path):
        folder = tmp_path / "tok"
        options = ("--vocab-size", 270, "-o", folder, "-q")
        succeeded(inside("tokenize", "--train", descriptor("the cat the hat " * 99), *options))
        assert (folder / "tokenizer.json").is_file()

    @pytest.mark.parametrize("command", ["tokenize", "score"])
    def test_what_reads_once_still_does(self, inside, trained, descriptor, command):
        lines = succeeded(inside(command, "-m", trained[0], descriptor("one\ntwo\n")))
        assert lines == succeeded(inside(command, "-m", trained[0], stdin=b"one\ntwo\n"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
class TestNamedPipes:
    def test_its_ending_names_the_format(self, inside, fifo):
        given = fifo("rows.jsonl", LABELED.encode())
        assert "accuracy\t" in succeeded(inside("evaluate", "--resamples", 0, given))

    def test_remember_and_a_measured_text(self, inside, trained, fifo, story, tmp_path):
        given = fifo("old", story.read_bytes()[:900])
        options = ("--from", trained[0], "--steps", 1, "-o", tmp_path / "more", "--remember", given)
        done = inside("train", story, *options)
        assert re.search(rf"lm: {given}: [\d.]+ bits/byte after, ", done.stderr.decode())

    def test_a_device(self, inside):
        done = inside("train", "/dev/null")
        assert (done.returncode, done.stderr) == (
            1,
            b"lm: error: /dev/null: no text in it\n  give a file with text, or pipe some in\n",
        )
        assert not Path("runs").exists()


def test_processes_get_the_pipe_of_the_shell(descriptor):
    given = descriptor("one\n")
    assert launcher._pipes([given, "/dev/fd/999999", "x/dev/fd/0"]) == [int(given.split("/")[-1])]
