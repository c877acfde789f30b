"""`lm score`: prefixes, choices, pairs, alternatives, worst records, colors, other shapes."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lmcli.output.score_forms import _context


@pytest.fixture
def score(inside, trained):
    """score(*arguments, stdin=b"", model=the trained one): the lines written, without a header."""

    def call(*arguments, stdin=b"", model=trained[0]):
        done = inside("score", "-m", model, "--no-header", *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        call.stderr = done.stderr.decode()
        return done.stdout.decode().split("\n")[:-1]

    return call


def objects(lines: list[str]) -> list[dict]:
    return [json.loads(line) for line in lines]


def written(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_prefix_is_not_scored_but_changes_what_is(score):
    (plain,), (after,) = (
        objects(score("--json", *options, stdin=b"went home\n"))
        for options in ((), ("--prefix", "The baker"))
    )
    (whole,), (prefix,) = (
        objects(score("--json", stdin=text)) for text in (b"The baker went home\n", b"The baker\n")
    )
    assert (
        after["text"] == plain["text"] == "went home" and after["bytes"] == 10
    )  # with the space between
    assert after["logprob"] == pytest.approx(whole["logprob"] - prefix["logprob"], abs=1e-3)
    assert after["logprob"] != pytest.approx(plain["logprob"], abs=0.5)
    (joined,) = objects(
        score("--json", "--prefix", "The bak", "--join", "", stdin=b"er went home\n")
    )
    assert joined["bytes"] == 12


def test_a_prefix_may_be_a_field_of_each_row(score, tmp_path):
    file = written(
        tmp_path / "a.jsonl",
        {"id": 1, "prompt": "The baker", "completion": " went home"},
        {"id": 2, "prompt": "The dog ", "completion": "ran"},
    )
    results = objects(score("--json", "--prefix-field", "prompt", file))
    assert [(row["id"], row["text"], row["bytes"]) for row in results] == [
        (1, " went home", 10),
        (2, "ran", 3),
    ]
    named = objects(score("--json", "--prefix-field", "prompt", "--field", "completion", file))
    assert named == results
    units = [line.split("\t") for line in score("--per", "word", "--prefix-field", "prompt", file)]
    assert [(unit[0], unit[2]) for unit in units] == [("1", "went"), ("1", "home"), ("2", "ran")]


def test_the_likeliest_choice(score, tmp_path):
    row = {
        "q": "The baker went",
        "options": ["home", "x x x x x", "home to the market"],
        "answer": 0,
    }
    file = written(tmp_path / "quiz.jsonl", row, {**row, "options": ["only"]})
    first, second = objects(
        score("--json", "--prefix-field", "q", "--choices-field", "options", file)
    )
    each = [
        objects(score("--json", "--prefix", row["q"], stdin=text.encode() + b"\n"))[0]
        for text in row["options"]
    ]
    assert [choice["text"] for choice in first["scores"]] == row["options"] and first["answer"] == 0
    for choice, alone in zip(first["scores"], each, strict=True):
        assert (
            choice["logprob"] == pytest.approx(alone["logprob"], abs=1e-4)
            and choice["bytes"] == alone["bytes"]
        )
    assert first["by_sum"] == max(range(3), key=lambda i: each[i]["logprob"])
    assert first["by_token"] == max(range(3), key=lambda i: each[i]["logprob"] / each[i]["tokens"])
    assert first["by_byte"] == min(range(3), key=lambda i: each[i]["bits_per_byte"])
    assert (second["by_sum"], second["by_token"], second["by_byte"]) == (0, 0, 0)
    table = [
        line.split("\t")
        for line in score("--prefix-field", "q", "--choices-field", "options", file)
    ]
    assert len(table[0]) == 5 and len(table[0][3].split()) == 3 and table[0][4] == row["q"]


PAIRS = (
    {"sentence_good": "The dogs run.", "sentence_bad": "The dogs runs.", "UID": "x"},
    {"sentence_good": "qzx jkw", "sentence_bad": "The baker went home."},
)


def test_pairs_of_blimp_and_crows_pairs(score, tmp_path):
    results = objects(score("--json", "--pairs", written(tmp_path / "blimp.jsonl", *PAIRS)))
    assert [row.get("UID") for row in results] == ["x", None]
    for row, pair in zip(results, PAIRS, strict=True):
        assert [one["text"] for one in row["scores"]] == [
            pair["sentence_good"],
            pair["sentence_bad"],
        ]
        alone = objects(
            score("--json", stdin="".join(f"{one['text']}\n" for one in row["scores"]).encode())
        )
        assert [one["logprob"] for one in row["scores"]] == pytest.approx(
            [one["logprob"] for one in alone], abs=1e-4
        )
        assert row["first_likelier"] == (alone[0]["logprob"] > alone[1]["logprob"])
    assert results[1]["first_likelier"] is False
    crows = tmp_path / "crows.csv"
    crows.write_text(
        ',sent_more,sent_less,bias\n0,"The dogs run, ""fast"".",The dogs runs.,a\n',
        encoding="utf-8",
    )
    (cells,) = [line.split("\t") for line in score("--pairs", crows)]
    assert cells[9:] == ['The dogs run, "fast".', "The dogs runs."] and len(cells) == 11
    assert re.search(
        r"the first is likelier in [01] of 1 pairs: 1?0+\.0% \(95 % interval", score.stderr
    )
    other = [
        line.split("\t")
        for line in score("--pairs", "--field", "sent_less", "--field", "sent_more", crows)
    ]
    assert other[0][9] == "The dogs runs." and other[0][0] == cells[4]
    short = written(
        tmp_path / "short.jsonl",
        {"more": "The dogs run.", "less": "The dogs runs."},
        {"good": "The dogs run.", "bad": "The dogs runs."},
    )
    assert [row["scores"] for row in objects(score("--json", "--pairs", short))] == [
        results[0]["scores"]
    ] * 2
    plain = [
        line.split("\t") for line in score("--pairs", stdin=b"The dogs run.\tThe dogs runs.\n")
    ]
    assert plain[0][8] in "01"


@pytest.mark.parametrize(
    "arguments, stdin, message",
    [
        (("--pairs",), b"only one\n", "line 1: has 0 tabs"),
        (("--pairs",), b"a\tb\tc\n", "has 2 tabs"),
        (("--pairs", "--format", "jsonl"), b'{"a": "x"}\n', "no pair of fields among 'a'"),
        (
            ("--choices-field", "c", "--format", "jsonl"),
            b'{"text": "x", "c": "y"}\n',
            "'c' is missing or no list of texts",
        ),
        (("--choices-field", "c"), b"plain\n", "'c' is missing"),
        (("--prefix-field", "p"), b"plain\n", "without a field 'p'"),
        (("--format", "csv"), b'text\n"a"b\n', "line 2: is no whole CSV row"),
    ],
)
def test_records_without_a_needed_field_are_named(inside, trained, arguments, stdin, message):
    done = inside("score", "-m", trained[0], *arguments, stdin=stdin)
    assert done.returncode == 1 and message in done.stderr.decode()
    blank = inside(
        "score", "-m", trained[0], "--no-header", "--on-error", "blank", *arguments, stdin=stdin
    )
    assert blank.returncode == 0 and blank.stdout.count(b"\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pairs", "--choices-field", "x"),
        ("--pairs", "--prefix", "a"),
        ("--prefix", "a", "--prefix-field", "b"),
        ("--worst", 2, "--best", 2),
        ("--worst", 2, "--alternatives", 2),
        ("--color", "--json"),
        ("--html", "x", "--keep", "a"),
        ("--html", "x", "-o", "y"),
        ("--below", 3, "--color"),
        ("--below", 3, "--pairs"),
        ("--below", 3, "--continue", "-o", "x"),
        ("--above", 3, "--below", 3),
        ("--below", "nan"),
        ("--html", "no/such/folder/x"),
        ("--keep", "a,,b"),
        ("--keep", "a,a"),
        ("--color", "--alternatives", 2),
        ("--alternatives", 2, "--per", "word"),
        ("--pairs", "--field", "a"),
        ("--pll", "within-word"),
        ("--worst", 1, "--continue", "-o", "x"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other(inside, trained, arguments):
    done = inside("score", "-m", trained[0], *arguments, stdin=b"a\tb\n")
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.startswith(b"lm: error: ")


def test_alternatives_of_each_token(inside, score, trained):
    done = inside("score", "-m", trained[0], "--alternatives", 2, stdin=b"The baker\n")
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header[8:] == [
        "rank",
        "entropy",
        "alternative_1",
        "logprob_1",
        "alternative_2",
        "logprob_2",
    ]
    assert all(len(row) == len(header) and float(row[11]) >= float(row[13]) for row in rows)
    (results,) = objects(score("--json", "--alternatives", 2, stdin=b"The baker\n"))
    for unit, row in zip(results["pieces"], rows, strict=True):
        assert str(unit["rank"]) == row[8] and unit["entropy"] == pytest.approx(
            float(row[9]), rel=1e-4
        )
        assert (unit["rank"] == 1) == (unit["alternatives"][0]["piece"] == unit["piece"])
        assert len(unit["alternatives"]) == 2
    nats = [
        line.split("\t") for line in score("--alternatives", 1, "--base", "e", stdin=b"The baker\n")
    ]
    assert float(nats[0][9]) == pytest.approx(float(rows[0][9]) * math.log(2), rel=1e-4)


def test_only_the_worst_are_written_and_in_order(inside, score, trained):
    lines = [
        b"The baker went home.",
        b"",
        b"qZ9#",
        b"The dog",
        b"\xe5\x8d\xb4\xe8\xaf\xb4",
        b"The baker went home.",
    ]
    every = [row.split("\t") for row in score(stdin=b"\n".join(lines) + b"\n")]
    done = inside("score", "-m", trained[0], "--worst", 3, stdin=b"\n".join(lines) + b"\n")
    header, *worst = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header == ["line", "logprob", "tokens", "bytes", "bits_per_byte", "text"]
    order = sorted((i for i in range(6) if i != 1), key=lambda i: (-float(every[i][3]), i))
    assert [(row[0], row[5]) for row in worst] == [(str(i + 1), every[i][4]) for i in order[:3]]
    assert len(score("--worst", 50, stdin=b"\n".join(lines) + b"\n")) == 5  # no more than there are


def test_an_interrupted_run_writes_the_worst_so_far(environment, trained):
    command = [
        sys.executable,
        "-m",
        "lmcli",
        "score",
        "-m",
        str(trained[0]),
        "--worst",
        "2",
        "--no-header",
        "-v",
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    process.stdin.write(b"The baker\nqZ9#\nThe dog\n")
    process.stdin.flush()
    assert b"context 64" in process.stderr.readline()  # the model is there
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(out.splitlines()) == 2 and b"qZ9#" in out.splitlines()[0]


def test_colored_output_is_the_text_and_nothing_else(score):
    lines = ["The baker 却说 went home.", "", "tab\tand \x1b[31mescape", "qZ9# café"]
    painted = score("--color", stdin="".join(f"{line}\n" for line in lines).encode())
    bare = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in painted]
    assert bare == [line.replace("\x1b", "\u241b") for line in lines]
    assert "\x1b[48;5;203;38;5;16m" in painted[3] and all(
        line.count("\x1b[") % 2 == 0 for line in painted
    )


def test_targets_of_a_source(score, marian, tmp_path):
    text = b"the dog\tthe cat ran\nthe cat\tthe cat ran\n"
    results = objects(score("--json", stdin=text, model=marian))
    assert [row["method"] for row in results] == ["conditional"] * 2
    assert [(row["text"], row["bytes"]) for row in results] == [("the cat ran", 11)] * 2
    assert results[0]["logprob"] != pytest.approx(results[1]["logprob"], abs=1e-3)
    file = written(tmp_path / "a.jsonl", {"source": "the dog", "target": "the cat ran", "n": 1})
    (row,) = objects(score("--json", file, model=marian))
    assert row["logprob"] == pytest.approx(results[0]["logprob"], abs=1e-4) and row["n"] == 1
    (closed,) = objects(score("--json", "--eos", file, model=marian))
    assert closed["tokens"] == row["tokens"] + 1 and closed["logprob"] < row["logprob"]
    assert [line.split("\t")[2] for line in score("--per", "word", file, model=marian)] == [
        "the",
        "cat",
        "ran",
    ]


def test_a_target_without_a_source_and_a_long_source(inside, marian):
    done = inside("score", "-m", marian, stdin=b"no tab\n")
    assert done.returncode == 1 and b"line 1: has 0 tabs" in done.stderr
    done = inside("score", "-m", marian, stdin=b"the dog " * 30 + b"\tthe cat\n")
    assert done.returncode == 1 and b"more than the model's context of 32" in done.stderr


def test_an_encoder_gives_pseudo_log_likelihoods(inside, score, berts):
    text = b"The unbelievable dog.\n"
    (plain,) = objects(score("--json", stdin=text, model=berts / "masked"))
    (word,) = objects(score("--json", "--pll", "within-word", stdin=text, model=berts / "masked"))
    assert (plain["method"], word["method"]) == ("pseudo", "pseudo-within-word")
    assert plain["tokens"] == word["tokens"] and plain["logprob"] < 0 and plain["bytes"] == 21
    units = [
        line.split("\t") for line in score("--per", "word", stdin=text, model=berts / "masked")
    ]
    assert [unit[2] for unit in units] == ["The", "unbelievable", "dog."]
    assert sum(float(unit[6]) for unit in units) == pytest.approx(plain["logprob"], abs=1e-3)
    for options, message in ((("--eos",), b"--eos"), (("--bos",), b"--bos")):
        done = inside("score", "-m", berts / "masked", *options, stdin=text)
        assert done.returncode == 2 and message in done.stderr
    done = inside("score", "-m", berts / "labels", stdin=text)
    assert done.returncode == 1 and b"lm classify" in done.stderr


def test_the_context_of_a_word_is_cut_from_a_few_bytes_around_it():
    text = "你好吗 " * 40 + "word" + " 很好的" * 40
    start = len(("你好吗 " * 40).encode())
    context = _context(text.encode(), SimpleNamespace(start=start, end=start + 4, piece="word"))
    assert (
        context
        == "… 你好吗 你好吗 你好吗 你好吗 你好吗 «word» 很好的 很好的 很好的 很好的 很好的 …"
    )
    short = _context("日 word!".encode(), SimpleNamespace(start=4, end=8, piece="word"))
    assert short == "日 «word»!"
