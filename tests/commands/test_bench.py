"""`lm bench`: its rows for each shape of model. No speed is asserted."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from lmcli.config import ModelConfig
from lmcli.model import flops

COLUMNS = (
    "name",
    "tokens_per_second",
    "achieved",
    "limit",
    "unit",
    "ratio",
    "dtype",
    "threads",
    "step_ms",
    "steps",
    "flops_per_token",
    "parameters",
    "peak_memory_bytes",
)
SCORE_COLUMNS = (
    "name",
    "lines_per_second",
    "tokens_per_second",
    "achieved",
    "limit",
    "unit",
    "ratio",
    "bits_per_byte",
    "dtype",
    "threads",
    "pass_ms",
    "passes",
    "parameters",
    "peak_memory_bytes",
)
SMALL = (
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "model.num_attention_heads=2",
    "--set",
    "model.intermediate_size=64",
    "--set",
    "model.vocab_size=300",
    "--set",
    "train.context=16",
    "--set",
    "train.batch_tokens=64",
    "--seconds",
    "0.01",
)
DECODER = ModelConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=300,
    max_position_embeddings=16,
).complete()


def test_json_has_one_object_per_measurement(inside):
    done = inside("bench", "--train", "--json", "--dtype", "float32", "--threads", "1", *SMALL)
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["train S", "train R"]
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["unit"], row["dtype"], row["threads"]) == ("FLOP/s", "float32", 1) and row[
            "steps"
        ] >= 3
        assert row["parameters"] == flops.parameters(DECODER).total
        assert row["flops_per_token"] == flops.training_flops_per_token(DECODER, 16)
        assert row["achieved"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"])
        assert row["ratio"] == pytest.approx(row["achieved"] / row["limit"])
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_ms"] * 1e3)
        assert row["peak_memory_bytes"] > 1 << 24
    assert b"train R: 0.01 s on cpu, 1 thread, float32" in done.stderr


@pytest.mark.parametrize("preset", ["tiny", "encoder-small", "seq2seq-small", "transformer-2017"])
def test_presets_of_every_shape_in_a_pipe(inside, preset):
    done = inside(
        "bench", "--train", "--preset", preset, *SMALL, "--set", "train.micro_batch_tokens=32", "-q"
    )
    assert done.returncode == 0, done.stderr.decode()
    header, line = (line.split("\t") for line in done.stdout.decode().splitlines())
    row = dict(zip(header, line, strict=True))
    assert tuple(header) == COLUMNS and row["name"] == f"train {preset}" and not done.stderr
    assert float(row["ratio"]) > 0 and float(row["flops_per_token"]) > 0


def test_the_reference_shapes_are_those_in_the_help():
    from lmcli.model.device import select_device
    from lmcli.planning import benchmark

    shapes = {}
    for name in ("R", "S"):
        workload = benchmark.TrainingWorkload(
            benchmark.reference(name), select_device("cpu", "float32")
        )
        config, train = workload.config, workload.train
        assert (train.optimizer, train.dropout) == ("adamw", 0.0)
        shapes[name] = (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.vocab_size,
            train.context,
            workload.tokens // train.context,
            round(workload.flops / workload.tokens / 1e6, 1),
        )
    assert shapes == {"R": (6, 384, 6, 4096, 256, 16, 80.2), "S": (4, 128, 4, 65, 64, 12, 5.2)}


def test_a_table_on_a_terminal(environment):
    leader, follower = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "lmcli", "bench", "--train", "--preset", "tiny", *SMALL],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**environment, "COLUMNS": "80"},
    )
    os.close(follower)
    text = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while chunk := os.read(leader, 1 << 16):
            text += chunk
    os.close(leader)
    assert done.wait(60) == 0 and b"\t" not in text
    header, line = re.sub(r"\x1b\[\d*m", "", text.decode()).splitlines()
    assert max(len(header), len(line)) <= 80 and line.split()[:2] == ["train", "tiny"]
    assert re.split(r"  +", header.strip()) == [
        "name",
        "tokens/s",
        "GFLOP/s",
        "limit",
        "share",
        "dtype",
        "threads",
        "step ms",
        "peak MB",
    ]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), "choose one of --train, --score and --generate"),
        (("--train", "--preset", "tinny"), "did you mean 'tiny'?"),
        (("--train", "--set", "model.hidden_sise=3"), "did you mean 'hidden_size'?"),
        (
            ("--train", "--preset", "encoder-small", "--set", "train.objective=classification"),
            "leave train.objective at auto",
        ),
        (
            ("--train", "--preset", "tiny", "--set", "train.objective=masked"),
            "objective masked with shape decoder",
        ),
        (("--train", "--dtype", "float16"), "float16"),
        (("--train", "--seconds", "soon"), "not a duration"),
    ],
)
def test_impossible_measurements_are_usage_errors(inside, arguments, expected):
    done = inside("bench", *arguments)
    assert done.returncode == 2 and expected in done.stderr.decode() and not done.stdout


def test_scoring_of_lines_reports_speed_and_bits_per_byte(inside, trained, story, tmp_path):
    (tmp_path / "lines.txt").write_bytes(story.read_bytes()[:5000])
    done = inside(
        "bench", "--score", "-m", trained[0], "--seconds", "0.01", "--json", tmp_path / "lines.txt"
    )
    assert done.returncode == 0, done.stderr.decode()
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert tuple(row) == SCORE_COLUMNS and row["passes"] >= 3
    lines = [line for line in story.read_bytes()[:5000].split(b"\n") if line]
    assert row["lines_per_second"] == pytest.approx(len(lines) / row["pass_ms"] * 1e3)
    assert row["ratio"] == pytest.approx(row["achieved"] / row["limit"])
    (perplexity,) = [
        json.loads(line)
        for line in inside(
            "perplexity", "-m", trained[0], "--documents", "line", "--json", stdin=b"\n".join(lines)
        ).stdout.splitlines()
    ]
    assert row["bits_per_byte"] == pytest.approx(perplexity["bits_per_byte"], rel=1e-3)


def test_scoring_of_random_lines_and_windows(inside, trained):
    done = inside("bench", "--score", "-m", trained[0], "--seconds", "0.01", "-q")
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and tuple(header) == SCORE_COLUMNS and done.stderr == b""
    assert [row[0] for row in rows] == ["lines", "windows"] and all(
        float(row[6]) > 0 for row in rows
    )
    assert rows[0][7] == "NA"  # random ids have no bytes


def test_generation_is_measured_beside_a_read_of_memory(inside, monkeypatch):
    from lmcli.planning import score_benchmark

    small = dataclasses.replace(score_benchmark.REFERENCE, num_hidden_layers=1, hidden_size=64)
    small = dataclasses.replace(small, vocab_size=300, intermediate_size=128, num_attention_heads=2)
    monkeypatch.setattr(score_benchmark, "REFERENCE", small)
    options = ("--seconds", "0.1", "--dtype", "float32", "--json", "-q")
    rows = [
        json.loads(line) for line in inside("bench", "--generate", *options).stdout.splitlines()
    ]
    assert [row["name"] for row in rows] == ["generate, batch 1", "generate, batch 16"]
    for row in rows:
        weights = 4 * (64 * 300 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64)
        assert row["achieved"] == pytest.approx(weights / row["step_ms"] * 1e3, rel=0.01)
        assert row["unit"] == "B/s" and row["ratio"] == row["achieved"] / row["limit"] > 0


def test_the_flops_of_scoring_are_those_of_a_forward_pass():
    from lmcli.planning import score_benchmark

    tokens, needed, done = score_benchmark._forward_passes([10, 20, 30], 60)
    assert tokens == 60 and [one.tokens for one in needed] == [10, 20, 30]
    assert [(one.rows, one.decoder, one.predicted) for one in done] == [(2, 30, 50), (1, 10, 10)]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--train", "--score"), "only one can be measured"),
        (("--generate", "a.txt"), "FILE goes with --score"),
        (("--score", "--quantize", "int8"), "--quantize: goes with --generate"),
        ((), "nothing to measure"),
        (("--train", "a.txt"), "FILE goes with --score"),
        (("--score", "--preset", "tiny"), "--preset and --set with --train"),
        (("--score", "a.txt"), "no model was given"),
    ],
)
def test_options_that_exclude_each_other_are_usage_errors(inside, arguments, expected):
    done = inside("bench", *arguments)
    assert done.returncode == 2 and expected in done.stderr.decode()
