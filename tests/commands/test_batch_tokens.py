"""--batch-tokens changes speed, not results, within the precision that the help names."""

import json

import pytest

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.kernels import build

LINES = b"Once\nThe\nA man\n\nYes\n" + b"The baker went home and\n" * 3 + b"a cat " * 30 + b"\nIt\n"
SIZES = (1, 64, 4096)


@pytest.fixture(scope="module")
def model(small_model, small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    built = small_model(vocab_size=small_tokenizer.size, max_position_embeddings=64)
    checkpoints.save(folder, built, small_tokenizer, GenerateConfig())
    return folder


def numbers(value: object) -> list[float]:
    """All numbers in a JSON value, in order."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def rows(inside, *arguments, dtype="float32") -> list[dict]:
    done = inside(*arguments, "--json", "--dtype", dtype, stdin=LINES)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", 3],
        ["--temperature", 0, "--seed", 3],
        ["--num-beams", 3, "--seed", 3],
        ["--seed", 3, "--num-samples", 3],
        ["--seed", 3, "--repetition-penalty", 1.3, "--no-repeat-ngram-size", 3],
    ],
    ids=str,
)
def test_generated_texts(options, inside, model):
    results = [
        rows(
            inside,
            "generate",
            "-m",
            model,
            "--on-long",
            "slide",
            "-n",
            8,
            "--batch-tokens",
            size,
            *options,
        )
        for size in SIZES
    ]
    for result in results[1:]:
        assert [row["text"] for row in result] == [row["text"] for row in results[0]]
        assert numbers(result) == pytest.approx(numbers(results[0]), abs=1e-4)


@pytest.mark.skipif(build.library() is None, reason=build.problem())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [[], ["--temperature", 0], ["--num-samples", 2]], ids=str)
def test_a_decoder_on_a_cpu_generates_the_same_bits(options, dtype, inside, model):
    arguments = ("generate", "-m", model, "--on-long", "slide", "-n", 8, "--seed", 3, *options)
    results = [rows(inside, *arguments, "--batch-tokens", size, dtype=dtype) for size in SIZES]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "command", [["score", "--per", "token"], ["score", "--per", "word"], ["perplexity"]], ids=str
)
def test_scores(command, inside, model):
    results = [
        numbers(rows(inside, *command, "-m", model, "--batch-tokens", size)) for size in SIZES
    ]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5, abs=1e-5)


def test_labels(inside, berts):
    results = [
        rows(inside, "classify", "-m", berts / "labels", "--batch-tokens", size) for size in SIZES
    ]
    for result in results[1:]:
        assert [row["label"] for row in result] == [row["label"] for row in results[0]]
        assert numbers(result) == pytest.approx(numbers(results[0]), abs=1e-5)


@pytest.mark.parametrize("command", ["generate", "score", "perplexity", "classify", "evaluate"])
def test_the_help_promises_no_more_than_that(command, inside):
    text = " ".join(inside(command, "--help-all").stdout.decode().split())
    assert "--batch-tokens" in text and "speed, not results" not in text
    assert "in bfloat16 and float16 also rounding" in text
