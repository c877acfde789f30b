"""`lm perplexity`: rows, documents, windows, and the errors of each."""

import json
import math

import pytest


def figures(done) -> list[dict]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def perplexity(inside, trained):
    return lambda *arguments, stdin=b"": figures(
        inside("perplexity", "-m", trained[0], "--json", *arguments, stdin=stdin)
    )


def test_figures_match_their_counts(perplexity):
    text = "The baker\nsaid 却说 twice.\n"
    row = perplexity(stdin=text.encode())[0]
    assert (row["bytes"], row["characters"], row["words"], row["documents"]) == (
        len(text.encode()),
        len(text),
        5,
        1,
    )
    bits = -row["logprob"] / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / row["bytes"])
    assert row["bits_per_character"] == pytest.approx(bits / row["characters"])
    assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["tokens"]))
    assert row["word_perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["words"]))
    assert (row["context"], row["stride"], row["dtype"]) == (64, 32, "float32")


def test_lines_as_documents_score_like_the_lines(perplexity, inside, trained, story):
    lines = story.read_bytes()[:2000].rpartition(b"\n")[0].replace(b"<|endoftext|>", b"") + b"\n"
    row = perplexity("--documents", "line", stdin=lines)[0]
    scored = [
        json.loads(line)
        for line in inside("score", "-m", trained[0], "--json", stdin=lines).stdout.splitlines()
    ]
    full = [score for score in scored if score["text"].strip()]
    assert row["documents"] == len(full)
    assert row["logprob"] == pytest.approx(sum(score["logprob"] for score in full), rel=1e-5)
    assert row["tokens"] == sum(score["tokens"] for score in full)


def test_marks_and_blank_lines_separate_documents(perplexity):
    assert perplexity(stdin=b"one\n<|endoftext|>\ntwo\n")[0]["documents"] == 2
    assert perplexity("--documents", "blank", stdin=b"one\nmore\n\n\ntwo\n")[0]["documents"] == 2


def test_more_context_is_no_worse(perplexity, story):
    text = story.read_bytes()[:6000]
    wide, narrow = (
        perplexity("--context", context, "--stride", 8, stdin=text)[0] for context in (64, 9)
    )
    assert wide["tokens"] == narrow["tokens"] and wide["context"] == 64 and narrow["context"] == 9
    assert wide["bits_per_byte"] < narrow["bits_per_byte"] + 0.05


def test_rows_of_several_models_name_the_model(inside, trained, tmp_path):
    (tmp_path / "twin").symlink_to(trained[0])
    models = [str(trained[0]), str(tmp_path / "twin")]
    done = inside("perplexity", "-m", models[0], "-m", models[1], stdin=b"The baker\n")
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header[:2] == ["model", "file"] and [row[:2] for row in rows] == [
        [name, "standard input"] for name in models
    ]


def test_standard_input_among_files_keeps_its_name(perplexity, story):
    assert [row["file"] for row in perplexity("-", story, stdin=b"The baker\n")] == [
        "standard input",
        str(story),
    ]


def test_rows_before_a_bad_file_are_written(inside, trained, story, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    done = inside("perplexity", "-m", trained[0], story, tmp_path / "bad.txt")
    assert done.returncode == 1 and done.stdout.count(b"\n") == 2
    assert done.stderr.decode().startswith(
        f"lm: error: {tmp_path / 'bad.txt'}, line 2: invalid UTF-8"
    )


def test_a_model_folder_named_by_the_environment_may_hold_a_space(
    inside, trained, tmp_path, monkeypatch
):
    (tmp_path / "my run").symlink_to(trained[0])
    monkeypatch.setenv("LM_MODEL", str(tmp_path / "my run"))
    assert inside("perplexity", stdin=b"The baker\n").returncode == 0


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--context", "100"), 2, "--context: 100 is outside 2 to 64"),
        (("--stride", "65"), 2, "--stride"),
        (("--context", "8", "--stride", "9"), 2, "--stride"),
        (("--validation", "file.txt"), 2, "--validation"),
        (("missing.txt",), 1, "missing.txt: no such file"),
        (("-",), 1, "no text"),
    ],
)
def test_errors_name_the_option_or_file(inside, trained, arguments, code, message):
    done = inside("perplexity", "-m", trained[0], *arguments)
    assert done.returncode == code and message in done.stderr.decode() and done.stdout == b""


def test_one_token_without_bos_has_nothing_to_score(inside, trained):
    done = inside("perplexity", "-m", trained[0], "--no-bos", stdin=b"a")
    assert done.returncode == 1 and b"no token to score" in done.stderr


def test_validation_text_that_has_changed_is_refused(inside, tmp_path, story):
    text = tmp_path / "text.txt"
    text.write_bytes(story.read_bytes()[:20_000])
    small = (
        "--preset",
        "tiny",
        "--steps",
        1,
        "--set",
        "model.hidden_size=32",
        "--set",
        "model.num_hidden_layers=1",
        "--set",
        "tokenizer.vocab_size=300",
        "--set",
        "train.context=32",
        "--set",
        "train.batch_tokens=128",
    )
    assert inside("train", text, "-o", tmp_path / "run", *small).returncode == 0
    assert inside("perplexity", "-m", tmp_path / "run", "--validation").returncode == 0
    text.write_bytes(text.read_bytes()[:-1] + b"!")
    done = inside("perplexity", "-m", tmp_path / "run", "--validation")
    assert done.returncode == 1 and done.stderr.decode().startswith(
        f"lm: error: {text}: has changed"
    )
    text.unlink()
    done = inside("perplexity", "-m", tmp_path / "run", "--validation")
    assert done.returncode == 1 and b"no longer exists" in done.stderr


def rows_of(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_standard_errors_are_over_documents(perplexity, inside, trained):
    lines = b"The baker went home.\nqZ9# x\nThe dog ran to the market.\n"
    (row,) = perplexity("--documents", "line", stdin=lines)
    each = [
        json.loads(line)
        for line in inside("score", "-m", trained[0], "--json", stdin=lines).stdout.splitlines()
    ]
    ratio = sum(one["logprob"] for one in each) / sum(one["tokens"] for one in each)
    squares = sum((one["logprob"] - ratio * one["tokens"]) ** 2 for one in each)
    error = math.sqrt(squares * 3 / 2) / sum(one["tokens"] for one in each)
    assert row["perplexity_se"] == pytest.approx(row["perplexity"] * error, rel=1e-3)
    assert perplexity(stdin=lines)[0]["perplexity_se"] is None  # one document


def test_groups_by_a_field(perplexity, tmp_path):
    file = rows_of(
        tmp_path / "a.jsonl",
        *({"text": f"The baker {i}.", "kind": kind} for i, kind in enumerate("abba")),
        {"text": "none of them"},
        {"text": "", "kind": "a"},
    )
    rows = perplexity("--by", "kind", file)
    assert [(row["group"], row["documents"]) for row in rows] == [("a", 2), ("b", 2), ("NA", 1)]
    (whole,) = perplexity(file)
    assert whole["logprob"] == pytest.approx(sum(row["logprob"] for row in rows), rel=1e-6)
    assert whole["tokens"] == sum(row["tokens"] for row in rows) and "group" not in whole


@pytest.fixture(scope="module")
def other(lm, story, tmp_path_factory):
    """A second run with another vocabulary."""
    folder = tmp_path_factory.mktemp("other") / "run"
    done = lm(
        "train",
        story,
        "-o",
        folder,
        "--preset",
        "tiny",
        "--set",
        "model.hidden_size=64",
        "--set",
        "model.num_hidden_layers=1",
        "--set",
        "tokenizer.vocab_size=400",
        "--set",
        "train.context=32",
        "--set",
        "train.batch_tokens=512",
        "--steps",
        20,
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_two_models_are_compared_on_the_same_documents(inside, trained, other, story):
    lines = b"".join(
        line + b"\n" for line in story.read_bytes().split(b"\n")[:80] if line and b"<|" not in line
    )
    done = inside(
        "perplexity",
        "-m",
        trained[0],
        "-m",
        other,
        "--documents",
        "line",
        "--json",
        "--differing",
        2,
        stdin=lines,
    )
    first, second = figures(done)
    assert (first["model"], second["model"]) == (str(trained[0]), str(other))
    assert first["difference"] is first["difference_low"] is first["differing"] is None
    assert second["difference"] == pytest.approx(
        second["bits_per_byte"] - first["bits_per_byte"], abs=1e-9
    )
    assert second["difference_low"] < second["difference"] < second["difference_high"]
    assert b"different vocabularies" in done.stderr and second["tokenizer"] != first["tokenizer"]
    worst, next_to = second["differing"]
    assert abs(worst["second"] - worst["first"]) >= abs(next_to["second"] - next_to["first"]) > 0
    for model, name in ((trained[0], "first"), (other, "second")):
        (alone,) = figures(
            inside("score", "-m", model, "--json", stdin=worst["text"].encode() + b"\n")
        )
        assert worst[name] == pytest.approx(-alone["logprob"] / math.log(2), rel=1e-3)
    number = lines.split(b"\n").index(worst["text"].encode()) + 1
    assert f"line {number}: ".encode() in done.stderr
    table = inside("perplexity", "-m", trained[0], "-m", other, stdin=lines)
    header, *rows = [line.split("\t") for line in table.stdout.decode().splitlines()]
    assert (
        header[-4:] == ["difference", "difference_low", "difference_high", "signature"]
        and rows[0][-4] == "NA"
    )
    assert rows[1][-3] == "NA" and b"one document has no interval" in table.stderr
    assert inside("perplexity", "-m", trained[0], "-m", other, "-q", stdin=lines).stderr == b""


def test_a_signature_reproduces_the_figure(inside, trained, other, story, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(story.read_bytes()[:4000])
    (row,) = figures(
        inside(
            "perplexity",
            "-m",
            trained[0],
            "--json",
            "--context",
            32,
            "--stride",
            12,
            "--documents",
            "line",
            "--no-bos",
            "--eos",
            text,
        )
    )
    line = row["signature"]
    assert "|context:32|stride:12|bos:0|eos:1|dtype:float32|" in line and "|documents:line|" in line
    done = inside("perplexity", "-m", trained[0], "--verify", line, text)
    assert done.returncode == 0 and done.stdout.startswith(b"the same: ")
    for model, change, message in ((other, b"", "model is"), (trained[0], b"!", "text is")):
        text.write_bytes(story.read_bytes()[:4000] + change)
        done = inside("perplexity", "-m", model, "--verify", line, text)
        assert done.returncode == 1 and message in done.stderr.decode() and done.stdout == b""
    assert inside("perplexity", "-m", trained[0], "--verify", "nonsense", text).returncode == 2


def test_lines_that_were_scored_are_verified_as_documents(inside, trained, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("The baker went home.\n\n \t\nqZ9# 却说\nThe dog")
    done = inside("score", "-m", trained[0], "-v", "--context", 16, text)
    *_, line = done.stderr.decode().splitlines()
    assert "|documents:line|context:16|stride:8|bos:1|" in line
    assert (
        inside(
            "perplexity", "-m", trained[0], "--verify", line.removeprefix("lm: "), text
        ).returncode
        == 0
    )
    assert b"|bytes:" not in inside("score", "-m", trained[0], text).stderr


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--by", "kind", "-"), 2, "no fields to group by"),
        (("--validation", "--by", "kind"), 2, "--validation"),
    ],
)
def test_groups_need_rows(inside, trained, arguments, code, message):
    done = inside("perplexity", "-m", trained[0], *arguments, stdin=b"plain\n")
    assert done.returncode == code and message in done.stderr.decode()
