"""`lm plan` on the command line. No speed is asserted."""

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from lmcli.commands import run
from lmcli.planning import plan

SMALL = (
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "model.num_attention_heads=2",
    "--set",
    "train.context=16",
    "--set",
    "train.batch_tokens=64",
    "--set",
    "tokenizer.vocab_size=300",
)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """No speed is asserted, so three steps of each measurement are enough."""
    monkeypatch.setattr(plan, "SECONDS", 0.0)
    monkeypatch.setattr(plan, "SAMPLE_SECONDS", 0.001)


@pytest.fixture
def notes(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("".join(f"The baker of number {i} went home and slept.\n" for i in range(300)))
    return str(file)


def test_json_has_one_object_per_preset_and_advice(inside, notes):
    done = inside(
        "plan", notes, *SMALL, "--steps", "20", "--json", "--threads", "1", "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["preset"] for row in rows] == ["auto", "tiny", "small", "base"]
    for row in rows:
        assert (row["steps"], row["tokens"], row["context"]) == (20, 1280, 16) and row["advice"]
        assert row["memory"] == sum(
            row[name] for name in ("weights", "gradients", "optimizer", "activations", "process")
        )
        assert row["bits_per_byte"] == round(row["bits_per_byte"], 1)
    last = done.stderr.decode().splitlines()
    assert "trying auto, tiny, small, base on cpu, 1 thread, float32" in last[0] and last[
        -1
    ].startswith("lm: take ")
    assert "overridden by your settings: " in last[4] and "model.hidden_size" in last[4]


def test_auto_is_planned_as_train_chooses_it(inside, notes, tmp_path):
    options = (notes, "--preset", "auto", "--tokens", "20000", "--threads", "1")
    done = inside("plan", *options, "--json")
    (row,), stderr = (
        [json.loads(line) for line in done.stdout.splitlines()],
        done.stderr.decode().splitlines(),
    )
    trained = inside("train", *options, "-o", tmp_path / "run").stderr.decode().splitlines()
    reasons = [line for line in stderr if line.startswith("lm: auto: ")]
    assert len(reasons) == 3 and reasons == [
        line for line in trained if line.startswith("lm: auto: ")
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        row["vocabulary"] == config["vocab_size"]
        and row["context"] == config["max_position_embeddings"]
    )


def test_standard_input_and_tsv_in_a_pipe(inside, notes):
    done = inside(
        "plan", "--preset", "tiny", *SMALL, "--time", "1h", "-q", stdin=Path(notes).read_bytes()
    )
    assert done.returncode == 0 and not done.stderr
    header, line = (line.split("\t") for line in done.stdout.decode().splitlines())
    row = dict(zip(header, line, strict=True))
    assert row["preset"] == "tiny" and float(row["seconds"]) == 3600 and int(row["steps"]) > 100
    assert "times the text" in row["advice"]


def test_a_row_for_each_number_of_devices(inside, notes):
    done = inside(
        "plan",
        notes,
        *SMALL,
        "--preset",
        "tiny",
        "--steps",
        "20",
        "--devices",
        "1,2",
        "--devices",
        "64",
        "--interconnect",
        "10",
        "--threads",
        "1",
        "--dtype",
        "float32",
        "--json",
    )
    assert done.returncode == 0, done.stderr.decode()
    rows, stderr = (
        [json.loads(line) for line in done.stdout.splitlines()],
        done.stderr.decode().splitlines(),
    )
    assert [row["devices"] for row in rows] == [1, 2, 64] and [
        row["idle_devices"] for row in rows
    ] == [0, 0, 60]
    assert [row["sharding"] for row in rows] == ["none", "data parallel", "data parallel"]
    assert [row["interconnect"] for row in rows] == [None, 1e10, 1e10]
    for row in rows:
        assert row["memory"] == sum(
            row[name] for name in ("weights", "gradients", "optimizer", "activations", "process")
        )
        assert (row["steps"], row["tokens"]) == (20, 1280) and row["speedup"] > 0
        assert len(row["assumptions"]) == 2 and all(
            f"lm: {line}" in stderr for line in row["assumptions"]
        )
    assert rows[2]["advice"].startswith("a step has 4 rows for 64 devices: 60 are idle")
    assert (
        "1, 2, 64 devices like this one (cpu, 1 thread, float32)" in stderr[1]
        and "10 GB/s" in stderr[1]
    )
    assert [
        line.partition(":")[0] for line in (line.removeprefix("lm: ") for line in stderr[-3:])
    ] == ["on 1 device", "on 2 devices", "on 64 devices"]


def test_processes_of_this_machine_are_measured_at_the_same_time(inside, notes):
    done = inside(
        "plan", notes, *SMALL, "--preset", "tiny", "--steps", "20", "--nproc", "2", "--threads", "1"
    )
    assert done.returncode == 0, done.stderr.decode()
    header, line = (line.split("\t") for line in done.stdout.decode().splitlines())
    row = dict(zip(header, line, strict=True))
    assert (row["devices"], row["micro_batch_tokens"], row["sharding"]) == (
        "2",
        "32",
        "data parallel",
    )
    assert row["speedup"] == "NA" and "assumptions" not in row
    assert "2 processes on this machine (cpu, 1 thread, " in done.stderr.decode()


@pytest.fixture
def on_terminal(environment, monkeypatch):
    """on_terminal(*arguments): the lines that `lm plan` prints on a terminal of 80 columns."""
    monkeypatch.setenv("LM_CACHE", environment["LM_CACHE"])
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments) -> list[str]:
        leader, follower = pty.openpty()
        with open(follower, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            assert run(["plan", *arguments]) == 0
        text = b""  # a table is less than a terminal holds back
        try:
            while part := os.read(leader, 1 << 16):
                text += part
        except OSError:
            pass  # how Linux tells the end of a terminal
        os.close(leader)
        assert b"\t" not in text
        return re.sub(r"\x1b\[\d*m", "", text.decode()).splitlines()

    return call


def test_a_table_on_a_terminal(on_terminal, notes):
    header, line, advice = on_terminal(notes, "--preset", "tiny", *SMALL, "--steps", "5")
    assert re.split(r"  +", header.strip()) == [
        "preset",
        "params",
        "tokens",
        "epochs",
        "tok/par",
        "FLOPs",
        "MB",
        "tok/s",
        "time",
        "bits/byte",
    ]
    assert max(len(header), len(line)) <= 80 and line.split()[0] == "tiny" and "about" in line
    assert advice.startswith("tiny: ") and "gradients 0, optimizer 0, activations" in advice


def test_a_table_of_several_devices(on_terminal, notes):
    header, *lines, one, many = on_terminal(
        notes, "--preset", "tiny", *SMALL, "--steps", "5", "--devices", "1,512"
    )
    assert re.split(r"  +", header.strip()) == [
        "preset",
        "devices",
        "idle",
        "weights",
        "MB each",
        "tok/s",
        "× one",
        "sends",
        "time",
        "bits/byte",
    ]
    assert [line.split()[:4] for line in lines] == [
        ["tiny", "1", "0", "whole"],
        ["tiny", "512", "508", "whole"],
    ]
    assert max(map(len, (header, *lines))) <= 80
    assert one.startswith("tiny on 1 device: ") and many.startswith(
        "tiny on 512 devices: a step has 4 rows for 512 devices"
    )


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (("missing.txt",), 1, "missing.txt"),
        (("{empty}",), 1, "no text"),
        (("{binary}",), 1, "UTF-8"),
        (("{notes}", "--devices", "8,x"), 2, "as in 8,64,512"),
        (("{notes}", "--devices", "0"), 2, "whole numbers from 1"),
        (("{notes}", "--devices", "8", "--nproc", "2"), 2, "leave one of them out"),
        (("{notes}", "--interconnect", "8"), 2, "say how many"),
        (("{notes}", "--devices", "2", "--interconnect", "0"), 2, "0"),
        (("{empty}", "--preset", "tinny"), 2, "did you mean 'tiny'?"),
        (("{empty}", "--time", "soon"), 2, "not a duration"),
        (("{notes}", "--preset", "tiny", "--set", "train.time=0"), 2, "tiny: no budget"),
        (("{notes}", "--set", "train.time=0"), 2, "auto: no budget"),
    ],
)
def test_impossible_plans_are_errors(inside, notes, tmp_path, arguments, code, expected):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\xfe" * 100)
    names = {"empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt", "notes": notes}
    done = inside("plan", *(word.format(**names) for word in arguments))
    assert done.returncode == code and expected in done.stderr.decode() and not done.stdout
