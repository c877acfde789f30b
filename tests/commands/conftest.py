"""One small trained run for all command tests, and `lm` as a shell sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcli.commands import run

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--preset", "tiny", "--set", "model.hidden_size=64", "--set", "model.num_hidden_layers=2",
         "--set", "tokenizer.vocab_size=512", "--set", "train.context=64", "--set", "train.batch_tokens=512")


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict:
    """The environment of every `lm`: a cache of its own, one thread, no model by default."""
    kept = {key: value for key, value in os.environ.items() if key != "LM_MODEL"}
    return {**kept, "LM_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def lm(environment):
    """lm(*arguments, stdin=b"", **options): the finished process, its output as bytes."""
    def call(*arguments, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, **options)
    return call


@pytest.fixture
def inside(environment, monkeypatch, capfdbinary, tmp_path):
    """inside(*arguments, stdin=b""): as `lm`, in this process: for what needs neither signals nor pipes, and is fast."""
    monkeypatch.setenv("LM_CACHE", environment["LM_CACHE"])
    monkeypatch.delenv("LM_MODEL", raising=False)

    def call(*arguments, stdin: bytes = b"") -> subprocess.CompletedProcess:
        typed = tmp_path / "stdin"
        typed.write_bytes(stdin)
        with typed.open() as handle, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", handle)
            code = run([*map(str, arguments)])
        sys.stdout.flush()
        return subprocess.CompletedProcess(arguments, code, *capfdbinary.readouterr())
    return call


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """A text file of some 120 kB with documents in it."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    text = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")[:120_000]
    path.write_text(text.rpartition("<|endoftext|>")[0], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(lm, story, tmp_path_factory):
    """(run folder, the process that trained it): 40 steps of a very small model."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = lm("train", story, "-o", folder, *SMALL, "--steps", 40)
    assert done.returncode == 0, done.stderr.decode()
    return folder, done
