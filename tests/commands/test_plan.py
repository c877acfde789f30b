"""`lm plan` on the command line. No speed is asserted."""

import json
import re
from pathlib import Path

import pytest
from drawn_screen import Screen, assert_whole

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
def tables(drawn, monkeypatch):
    """tables(*arguments): screens of `lm plan` at 60, 80, 120 and 300 columns, measured once."""
    measure, plans = plan.Planner.plan, {}

    def planned(planner, name, recipe, group):
        if (name, group.size) not in plans:
            plans[name, group.size] = measure(planner, name, recipe, group)
        return plans[name, group.size]

    monkeypatch.setattr(plan.Planner, "plan", planned)

    def call(*arguments) -> list[Screen]:
        screens = [drawn("plan", *arguments, columns=columns) for columns in (60, 80, 120, 300)]
        assert [shown.code for shown in screens] == [0] * 4, screens[0].text
        return screens

    return call


COLUMNS = ["preset", "params", "tokens", "epochs", "tok/par", "FLOPs", "MB", "tok/s", "time"]
DEVICE_COLUMNS = ["preset", "devices", "idle", "weights", "MB each", "tok/s", "× one", "sends"]


@pytest.mark.parametrize(
    "arguments, columns, rows",
    [
        (("--preset", "tiny", "--preset", "{mine}"), [*COLUMNS, "bits/byte"], 2),
        (("--preset", "tiny", "--devices", "1,8,512"), [*DEVICE_COLUMNS, "time", "bits/byte"], 3),
    ],
)
def test_a_table_on_a_terminal(tables, notes, tmp_path, arguments, columns, rows):
    mine = tmp_path / "my-own-preset.yaml"
    mine.write_text("extends: tiny\n")
    arguments = [word.format(mine=mine) for word in arguments]
    *screens, wide = tables(notes, *arguments, *SMALL, "--steps", "5", "--threads", "1")
    for shown in screens:
        hidden = f"not shown at this width: {', '.join(columns)} {' '.join(columns)}"
        assert_whole(shown, f"{wide.text} {hidden}")
        lines = shown.written
        start = next(i for i, line in enumerate(lines) if line.strip().startswith("preset"))
        titles = re.split(r"  +", lines[start].strip())
        assert titles == [title for title in columns if title in titles]
        assert {"preset", "tok/s", "time", "bits/byte"} <= set(titles)
        assert shown.columns < 120 or titles == columns
        assert all(
            "about" in line and line.startswith(("tiny", "my-own-preset.yaml "))
            for line in lines[start + 1 : start + 1 + rows]
        )
    # what is advised is the same in words
    advice = " ".join(wide.text.split())
    advice = advice[advice.index("tiny on 1 device:" if rows == 3 else "tiny:") :]
    assert "gradients 0, optimizer 0, activations" in advice
    assert all(advice in " ".join(" ".join(shown.written).split()) for shown in screens)
    if rows == 3:
        assert "tiny on 512 devices: a step has 4 rows for 512 devices: 508 are idle" in advice


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
