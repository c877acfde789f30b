"""Standard output fails: a full disk is a one-line error (code 1), a closed pipe code 141."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COMMANDS = {
    "help": ("--help",),
    "train help": ("train", "--help"),
    "tokenize": ("tokenize", "-m", "RUN", "STORY"),
    "score": ("score", "-m", "RUN", "STORY"),
    "generate": ("generate", "-m", "RUN", "-n", "300", "--stop", "never said", "The"),
    "generate json": ("generate", "-m", "RUN", "-n", "3", "--json", "The"),
    "perplexity": ("perplexity", "-m", "RUN", "SHORT"),
    "train": (
        "train",
        "STORY",
        "-o",
        "NEW",
        "-q",
        "--preset",
        "tiny",
        "--steps",
        "1",
        "--tokenizer",
        "RUN",
        "--set",
        "model.hidden_size=32",
        "--set",
        "model.num_hidden_layers=1",
        "--set",
        "train.context=32",
        "--set",
        "train.batch_tokens=32",
    ),
}


@pytest.fixture(params=COMMANDS)
def command(request, trained, story, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("The baker went home.\n")
    places = {"RUN": trained[0], "STORY": story, "SHORT": short, "NEW": tmp_path / "new"}
    return [
        sys.executable,
        "-m",
        "lmcli",
        *(places.get(word, word) for word in COMMANDS[request.param]),
    ]


def test_a_full_disk_is_an_error(command, environment):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    assert (done.returncode, done.stderr) == (
        1,
        b"lm: error: standard output: cannot write: No space left on device\n",
    )


def test_a_closed_pipe_is_not(command, environment):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
