"""`lm score`: a row for every line, NA if nothing is scored, whole files, and --continue."""

import gzip
import json
import math

import pytest

HEADER = b"logprob\ttokens\tbytes\tbits_per_byte\ttext\n"


def rows(done) -> list[list[str]]:
    assert done.returncode == 0, done.stderr.decode()
    return [line.split("\t") for line in done.stdout.decode().split("\n")[:-1]]


@pytest.mark.parametrize(
    "text, lines",
    [
        (b"", 0),
        (b"\n", 1),
        (b"\n\n\n", 3),
        (b"a", 1),
        (b"a\n", 1),
        (b"a\n\nb", 3),
        (b"a\r\nb\r\n", 2),
        (b"a\x85b\xe2\x80\xa8c\x0cd\n".replace(b"\x85", "\x85".encode()), 1),
    ],
)
def test_one_row_per_line(inside, trained, text, lines):
    done = inside("score", "-m", trained[0], stdin=text)
    assert done.stdout.startswith(HEADER)
    assert done.stdout.count(b"\n") == lines + 1
    assert inside("score", "-m", trained[0], "--no-header", stdin=text).stdout.count(b"\n") == lines


def test_text_is_escaped_and_reads_back(inside, trained):
    text = 'back\\slash, "quoted", tab\t, return\r, \\n spelled'
    row = rows(inside("score", "-m", trained[0], "--no-header", stdin=text.encode() + b"\n"))[0]
    assert len(row) == 5 and int(row[2]) == len(text.encode())
    assert row[4] == 'back\\\\slash, "quoted", tab\\t, return\\r, \\\\n spelled'


def test_records_in_one_batch_score_as_they_do_alone(inside, trained, story):
    lines = [line for line in story.read_bytes().split(b"\n")[:80] if line != b"<|endoftext|>"]
    together = rows(
        inside("score", "-m", trained[0], "--no-header", stdin=b"\n".join(lines) + b"\n")
    )
    narrow = rows(
        inside(
            "score",
            "-m",
            trained[0],
            "--no-header",
            "--batch-tokens",
            1,
            stdin=b"\n".join(lines) + b"\n",
        )
    )
    for row, alone, line in zip(together, narrow, lines, strict=True):
        assert row[1:3] == alone[1:3] and row[4].encode() == line
        assert float(row[0]) == pytest.approx(float(alone[0]), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("per", ["word", "token"])
def test_surprisal_is_in_bits_or_nats(inside, trained, per):
    bits, nats = (
        rows(
            inside(
                "score", "-m", trained[0], "--per", per, "--base", base, stdin=b"The baker went\n"
            )
        )
        for base in ("2", "e")
    )
    assert (
        bits[0]
        == nats[0]
        == ["line", "index", "piece", "start", "end", "bytes", "logprob", "surprisal"]
    )
    for two, e in zip(bits[1:], nats[1:], strict=True):
        assert two[:7] == e[:7]  # logprob is nats whatever the base
        assert float(e[7]) == -float(e[6])
        assert float(two[7]) == pytest.approx(float(e[7]) / math.log(2), rel=1e-5)


def test_tokens_cover_every_byte_of_their_line(inside, trained):
    text = "却说 the\tcafé, \U0001f600!".encode()
    pieces = rows(
        inside(
            "score", "-m", trained[0], "--per", "token", "--no-header", stdin=b"\n" + text + b"\n"
        )
    )
    assert {row[0] for row in pieces} == {
        "2"
    }  # the empty line has no token; lines are numbered from 1
    assert [row[1] for row in pieces] == [str(i) for i in range(len(pieces))]
    assert [row[3] for row in pieces] == ["0", *(row[4] for row in pieces[:-1])] and pieces[-1][
        4
    ] == str(len(text))
    assert all(int(row[5]) == int(row[4]) - int(row[3]) for row in pieces)


def test_words_are_runs_without_space(inside, trained):
    pieces = rows(
        inside(
            "score", "-m", trained[0], "--per", "word", "--no-header", stdin=b"  To be,\tor  not \n"
        )
    )
    assert [row[2] for row in pieces] == ["To", "be,", "or", "not"]
    assert [(int(row[3]), int(row[4])) for row in pieces] == [(2, 4), (5, 8), (9, 11), (13, 16)]


def test_json_holds_the_same_figures_and_the_other_fields(inside, trained, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1, "text": "The baker"}\n{"id": 2, "text": ""}\n')
    done = inside("score", "-m", trained[0], "--json", "--per", "token", file)
    pieces = [json.loads(line) for line in done.stdout.splitlines()]
    assert pieces[0]["id"] == 1 and pieces[0]["bytes"] == 9
    assert sum(piece["logprob"] for piece in pieces[0]["pieces"]) == pytest.approx(
        pieces[0]["logprob"], rel=1e-6
    )
    assert pieces[0]["bits_per_byte"] == pytest.approx(-pieces[0]["logprob"] / math.log(2) / 9)
    assert (
        pieces[1]["logprob"],
        pieces[1]["tokens"],
        pieces[1]["bits_per_byte"],
        pieces[1]["pieces"],
    ) == (0, 0, None, [])


def test_a_single_token_without_bos_is_na(inside, trained):
    row = rows(inside("score", "-m", trained[0], "--no-bos", "--no-header", stdin=b"a\n"))[0]
    assert row == ["NA", "0", "0", "NA", "a"]


def test_eos_is_scored_only_with_its_option(inside, trained):
    plain, closed = (
        json.loads(inside("score", "-m", trained[0], "--json", *extra, stdin=b"The baker\n").stdout)
        for extra in ((), ("--eos",))
    )
    assert closed["tokens"] == plain["tokens"] + 1 and closed["logprob"] < plain["logprob"]
    assert closed["bytes"] == plain["bytes"]


def test_several_files_in_order_gzip_and_fields(inside, trained, tmp_path):
    (tmp_path / "b.txt").write_text("beta\n")
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"alpha\n")
    (tmp_path / "c.tsv").write_text("id\tsay\n1\tgamma\n")
    done = inside(
        "score", "-m", trained[0], "--no-header", tmp_path / "b.txt", tmp_path / "a.txt.gz"
    )
    assert [row[4] for row in rows(done)] == ["beta", "alpha"]
    assert (
        rows(
            inside("score", "-m", trained[0], "--no-header", "--field", "say", tmp_path / "c.tsv")
        )[0][4]
        == "gamma"
    )


BAD = b'{"text": "fine"}\n{"text": 7}\n{"text": "too"}\n'


@pytest.mark.parametrize(
    "on_error, code, texts",
    [("stop", 1, []), ("blank", 0, ["fine", "", "too"]), ("skip", 0, ["fine", "too"])],
)
def test_bad_records_stop_or_blank_or_skip(inside, trained, on_error, code, texts):
    done = inside("score", "-m", trained[0], "--format", "jsonl", "--on-error", on_error, stdin=BAD)
    assert done.returncode == code
    assert (b"standard input, line 2" in done.stderr) == (on_error == "stop")
    if not code:
        assert [row[4] for row in rows(done)[1:]] == texts
        assert (b"1 bad records left out" in done.stderr) == (on_error == "skip")


def test_an_output_file_appears_whole_or_not_at_all(inside, trained, tmp_path):
    target = tmp_path / "scores.tsv"
    done = inside("score", "-m", trained[0], "-o", target, stdin=b"a\n\xff\n")
    assert done.returncode == 1 and not target.exists()
    target.write_text("the old one")
    assert inside("score", "-m", trained[0], "-o", target, stdin=b"a\nb\n").returncode == 0
    assert target.read_bytes() == inside("score", "-m", trained[0], stdin=b"a\nb\n").stdout
    assert not (tmp_path / "scores.tsv.part").exists()


@pytest.mark.parametrize("extra", [(), ("--json",), ("--json", "--per", "word"), ("--no-header",)])
@pytest.mark.parametrize("complete", [0, 1, 2.5, 4])
def test_continue_gives_the_same_file(inside, trained, tmp_path, extra, complete):
    text, target = b"".join(b"line %d\n\n" % i for i in range(3)), tmp_path / "scores"
    whole = inside("score", "-m", trained[0], *extra, stdin=text).stdout
    lines = whole.splitlines(keepends=True)
    part = b"".join(lines[: int(complete)]) + (
        lines[int(complete)][:3] if complete % 1 else b""
    )  # an unfinished last line
    (tmp_path / "scores.part").write_bytes(part)
    done = inside("score", "-m", trained[0], *extra, "-o", target, "--continue", stdin=text)
    assert done.returncode == 0 and target.read_bytes() == whole


def test_continue_is_refused_for_rows_of_words(inside, trained, tmp_path):
    done = inside(
        "score",
        "-m",
        trained[0],
        "--per",
        "word",
        "-o",
        tmp_path / "x",
        "--continue",
        stdin=b"a b\n",
    )
    assert done.returncode == 2 and b"--json" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--context", "65"), "--context: 65 is outside 2 to 64"),
        (("--context", "32", "--stride", "33"), "--stride"),
        (("--per", "line"), "--per"),
        (("--device", "mps"), "--device"),
    ],
)
def test_impossible_options_are_usage(inside, trained, arguments, message):
    done = inside("score", "-m", trained[0], *arguments, stdin=b"a\n")
    assert done.returncode == 2 and message in done.stderr.decode() and done.stdout == b""


def test_a_closed_pipe_ends_a_long_score_at_once(trained, piped, tmp_path):
    (tmp_path / "many.txt").write_bytes(b"The baker went home.\n" * 200_000)
    done = piped(3, "score", "-m", trained[0], tmp_path / "many.txt")
    assert done.returncode == 141 and done.stdout.count(b"\n") == 3 and done.stderr == b""
