"""Inference with --nproc: the same bytes as one process, and how all processes end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LINES = [
    f"The baker of village {i} sold {i % 7} loaves." + " She went home." * (i % 5)
    for i in range(100)
]
LINES[7], LINES[50], LINES[80] = "", "The baker had a dream. " * 60, "a"


@pytest.fixture(scope="module")
def model(small_model, small_tokenizer, tmp_path_factory) -> Path:
    """A small decoder with random weights."""
    return saved(small_model(), small_tokenizer, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def classifier(small_model, small_tokenizer, tmp_path_factory) -> Path:
    """A small BERT with two labels."""
    from lmcli.checkpoints.families import FAMILIES

    family = FAMILIES["bert"]
    chosen = {
        key: value for choices in family.choices.values() for key, value in choices[0][1].items()
    }
    options = {
        **family.options_for("sequence"),
        **chosen,
        "model_type": "bert",
        "shape": "encoder",
        "head": "sequence",
        "num_key_value_heads": 4,
        "labels": ("good", "bad"),
    }
    return saved(small_model(**options), small_tokenizer, tmp_path_factory.mktemp("classifier"))


def saved(model, tokenizer, path: Path) -> Path:
    from lmcli.checkpoints import folder
    from lmcli.config import GenerateConfig

    folder.save(path, model, tokenizer, GenerateConfig(max_new_tokens=8))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Lines of mixed lengths, one empty, one of many contexts; rows with labels, some bad."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        json.dumps({"text": line, "label": ("good", "bad")[i % 3 == 0]})
        for i, line in enumerate(LINES * 6)
    ]
    texts = {
        "text.txt": LINES,
        "rows.jsonl": rows,
        "bad.jsonl": [*rows[:90], "{no row", *rows[90:120]],
    }
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return {name: folder / name for name in texts}


@pytest.fixture
def same(lm, inside):
    """same(*arguments, count=2, stdin=b""): the result, checked with several processes."""

    def call(*arguments, count: int = 2, stdin: bytes = b"") -> subprocess.CompletedProcess:
        alone, done = inside(*arguments, stdin=stdin), lm(*arguments, "--nproc", count, stdin=stdin)
        assert (done.stdout, done.stderr, done.returncode) == (
            alone.stdout,
            alone.stderr,
            alone.returncode,
        )
        return alone

    return call


class TestTheOutputIsThatOfOneProcess:
    def test_scores_of_records(self, same, model, files):
        done = same(
            "score", "-m", model, "--on-error", "blank", files["bad.jsonl"], "--json", count=3
        )
        assert done.returncode == 0 and done.stdout.count(b"\n") == 121

    def test_summaries_at_the_end_and_skipped_records(self, same, model, files):
        done = same("score", "-m", model, "--on-error", "skip", "--worst", 5, files["bad.jsonl"])
        assert done.stdout.count(b"\n") == 6 and b"1 bad record" in done.stderr

    def test_tokens_of_lines_from_a_pipe(self, same, model, files):
        done = same("score", "-m", model, "--per", "token", stdin=files["text.txt"].read_bytes())
        assert done.returncode == 0 and done.stdout.count(b"\n") > 1000

    def test_perplexity_and_the_difference_of_two_models(self, same, model, files, tmp_path):
        done = same(
            "perplexity",
            "-m",
            model,
            "-m",
            shutil.copytree(model, tmp_path / "copy"),
            "--batch-tokens",
            32,
            "--documents",
            "line",
            "--json",
            files["text.txt"],
        )  # a batch so small reads the long line in slices
        assert done.returncode == 0 and json.loads(done.stdout.splitlines()[1])["difference"] == 0

    def test_sampled_texts(self, same, model, files):
        done = same(
            "generate",
            "-m",
            model,
            "--on-long",
            "slide",
            "--seed",
            3,
            "--num-samples",
            2,
            "--batch-tokens",
            64,
            "--json",
            stdin=files["text.txt"].read_bytes(),
            count=3,
        )
        seeds = [json.loads(line)["seed"] for line in done.stdout.splitlines()]
        assert len(seeds) == 200 and seeds[:2] == [3, 4]

    def test_figures_of_predictions(self, lm, inside, classifier, files, tmp_path):
        command = (
            "evaluate",
            "-m",
            classifier,
            "-m",
            shutil.copytree(classifier, tmp_path / "copy"),
            "--resamples",
            50,
            "-q",
            files["rows.jsonl"],
        )
        alone, several = (
            [
                line
                for line in run(*command, *more).stdout.decode().splitlines()
                if "memory_bytes" not in line and "records_per_second" not in line
            ]
            for run, more in ((inside, ()), (lm, ("--nproc", 2)))
        )
        assert alone == several and any("accuracy" in line for line in alone)

    def test_labels_after_continue(self, lm, inside, classifier, files, tmp_path):
        whole = inside("classify", "-m", classifier, files["rows.jsonl"]).stdout
        unfinished = tmp_path / "labels.part"
        unfinished.write_bytes(b"".join(whole.splitlines(keepends=True)[:520]) + b"half a li")
        done = lm(
            "classify",
            "-m",
            classifier,
            files["rows.jsonl"],
            "-o",
            tmp_path / "labels",
            "--continue",
            "--nproc",
            2,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert (tmp_path / "labels").read_bytes() == whole

    def test_under_torchrun(self, model, files, environment, inside):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "lmcli",
        ]
        done = subprocess.run(
            [*torchrun, "score", "-m", model],
            input=files["text.txt"].read_bytes(),
            capture_output=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == inside("score", "-m", model, files["text.txt"]).stdout


@pytest.mark.parametrize(
    "arguments, code",
    [(("rows.jsonl", "--context", 99), 2), (("bad.jsonl",), 1)],
    ids=["what all find", "what one reads"],
)
def test_an_error_is_printed_once(lm, inside, model, files, arguments, code):
    name, *options = arguments
    alone, several = (
        run("score", "-m", model, files[name], *options, *more)
        for run, more in ((inside, ()), (lm, ("--nproc", 2)))
    )
    assert (several.stdout, several.stderr, several.returncode) == (
        alone.stdout,
        alone.stderr,
        code,
    )
    assert several.stderr.count(b"lm: error") == 1


@pytest.fixture
def busy(environment, model):
    """busy(*arguments): two processes, in their own session, that score an endless text."""
    processes = []

    def start(*arguments) -> subprocess.Popen:
        text = subprocess.Popen(["yes", "The baker went home. " * 5], stdout=subprocess.PIPE)
        command = [
            sys.executable,
            "-m",
            "lmcli",
            "score",
            "-m",
            str(model),
            "--nproc",
            "2",
            *map(str, arguments),
        ]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=text.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        text.stdout.close()
        processes.extend([text, process])
        assert process.stdout.readline()
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def members(process: subprocess.Popen) -> list[int]:
    """The process ids of the pool, the leader's first."""
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def end(process: subprocess.Popen, there: list[int]) -> str:
    """Its standard error, after all of its processes have ended."""
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.wait(timeout=30)
    assert "Traceback" not in errors
    assert not [one for one in there if Path(f"/proc/{one}").exists()]
    return errors


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
class TestHowTheyEnd:
    @pytest.mark.parametrize("which", [0, 1], ids=["the leader", "another"])
    def test_all_end_when_one_is_killed_and_its_signal_is_named(self, busy, which):
        process = busy()
        there = members(process)
        os.kill(there[which], signal.SIGKILL)
        read = process.stdout.read()
        errors = end(process, there)
        assert errors == (
            f"lm: process {which} of 2 was killed by SIGKILL: "
            "start the command again; after -o FILE, --continue resumes\n"
        )
        assert process.returncode == 1 and read.endswith(b"\n")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
    def test_a_signal_to_all_ends_all_at_once(self, busy, number):
        process = busy()
        there = members(process)
        os.killpg(process.pid, number)
        process.stdout.read()
        assert (end(process, there).strip(), process.returncode) == ("lm: interrupted", 130)

    def test_a_closed_pipe_ends_all_quietly(self, busy):
        process = busy()
        assert (end(process, members(process)), process.returncode) == ("", 141)
