"""`lm classify`: a line for each record, in order; errors; which command can use which model."""

import json
import math
import subprocess
import sys

import pytest

TEXT = b"The baker went home.\nA b c\n\nshe said no\n"


@pytest.fixture(scope="module")
def folders(small_model, small_tokenizer, tmp_path_factory):
    """folders(shape, head, **options): the folder of a small random model with context 24."""
    from lmcli.checkpoints import folder as checkpoints
    from lmcli.checkpoints.families import FAMILIES
    from lmcli.config import GenerateConfig

    models = {}

    def build(shape="encoder", head="sequence", **options):
        key = (shape, head, *options)
        if key not in models:
            family = next(
                family
                for name, family in FAMILIES.items()
                if family.shape == shape and name not in ("modernbert", "t5", "marian")
            )
            chosen = {
                key: value
                for choices in family.choices.values()
                for key, value in choices[0][1].items()
            }
            model = small_model(
                **{
                    **family.options_for(head),
                    **chosen,
                    "model_type": family.model_type,
                    "shape": shape,
                    "head": head,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 24,
                    "vocab_size": 400,
                    "labels": ("bad", "good", "so so") if head in ("sequence", "token") else (),
                    **options,
                }
            )
            models[key] = tmp_path_factory.mktemp(f"{shape}-{head}")
            checkpoints.save(models[key], model, small_tokenizer, GenerateConfig())
        return models[key]

    return build


def lines(done) -> list[list[str]]:
    assert done.returncode == 0, done.stderr.decode()
    return [line.split("\t") for line in done.stdout.decode().split("\n")[:-1]]


def test_one_row_per_line(inside, folders):
    rows = lines(inside("classify", "-m", folders(), stdin=TEXT))
    assert [row[2] for row in rows] == TEXT.decode().splitlines()
    assert [
        row[0] in ("bad", "good", "so so") and 1 / 3 < float(row[1]) <= 1
        for row in rows[:2] + rows[3:]
    ] == [True] * 3
    assert rows[2] == ["NA", "NA", ""]


def test_answer_options_are_refused_for_a_classifier(inside, folders):
    done = inside("classify", "-m", folders(), "--max-answer-tokens", 3, stdin=TEXT)
    assert (
        done.returncode == 2
        and b"--max-answer-tokens: only a question-answering model gives answers" in done.stderr
    )


def test_logits_have_a_column_for_each_label(inside, folders):
    rows = lines(inside("classify", "-m", folders(), "--logits", stdin=TEXT))
    assert rows[0] == ["bad", "good", "so so", "text"] and len(rows) == 5
    plain = lines(inside("classify", "-m", folders(), stdin=TEXT))
    for row, (label, probability, _) in zip(rows[1:3], plain):
        logits = dict(zip(rows[0], map(float, row[:3])))
        assert max(logits, key=logits.get) == label
        assert math.exp(logits[label]) / sum(map(math.exp, logits.values())) == pytest.approx(
            float(probability), rel=1e-4
        )
    assert rows[3] == ["NA", "NA", "NA", ""]
    assert (
        lines(inside("classify", "-m", folders(), "--logits", "--no-header", stdin=TEXT))
        == rows[1:]
    )


def test_json_keeps_the_records_own_fields(inside, folders, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 7, "text": "The baker", "label": "good"}\n{"id": 8, "text": ""}\n')
    first, empty = map(
        json.loads, inside("classify", "-m", folders(), "--json", file).stdout.splitlines()
    )
    assert (first["id"], first["text"], first["given_label"]) == (7, "The baker", "good")
    assert (
        first["probabilities"][first["label"]]
        == first["probability"]
        == max(first["probabilities"].values())
    )
    assert len(first["logits"]) == 3 and sum(first["probabilities"].values()) == pytest.approx(1)
    assert (empty["id"], empty["label"], empty["probability"], empty["logits"]) == (
        8,
        None,
        None,
        [],
    )
    rows = json.loads(
        inside("classify", "-m", folders(), "--json", "--top", 2, file).stdout.splitlines()[0]
    )
    assert list(rows["probabilities"].values()) == sorted(first["probabilities"].values())[:0:-1]


def test_the_likeliest_labels(inside, folders):
    rows = lines(inside("classify", "-m", folders(), "--top", 2, stdin=TEXT))
    assert all(len(row) == 5 for row in rows) and float(rows[0][1]) >= float(rows[0][3])
    assert rows[2] == ["NA"] * 4 + [""]
    assert (
        len(lines(inside("classify", "-m", folders(), "--top", 9, stdin=TEXT))[0]) == 7
    )  # there are three
    assert inside("classify", "-m", folders(), "--top", 2, "--logits", stdin=TEXT).returncode == 2


def test_multiple_labels_are_joined_by_commas(inside, folders):
    model = folders(multi_label=True)
    rows = lines(inside("classify", "-m", model, "--threshold", 0, stdin=b"The baker\n"))
    assert sorted(rows[0][0].split(",")) == ["bad", "good", "so so"]
    assert list(map(float, rows[0][1].split(","))) == sorted(
        map(float, rows[0][1].split(",")), reverse=True
    )
    assert lines(inside("classify", "-m", model, "--threshold", 1, stdin=b"The baker\n")) == [
        ["NA", "NA", "The baker"]
    ]
    assert inside("classify", "-m", model, "--threshold", 2, stdin=b"a\n").returncode == 2


def test_a_row_for_each_token(inside, folders, tmp_path):
    tokens = folders(head="token")
    rows = lines(inside("classify", "-m", tokens, stdin="Café,  no\n\nb\n".encode()))
    assert rows[0] == ["line", "index", "piece", "start", "end", "label", "probability"]
    assert {row[0] for row in rows[1:]} == {"1", "3"}
    data = "Café,  no".encode()
    assert all(
        data[int(row[3]) : int(row[4])].decode(errors="backslashreplace")
        == row[2].replace("\\\\", "\\")
        for row in rows[1:]
        if row[0] == "1"
    )
    done = inside("classify", "-m", tokens, "--per", "token", "--json", stdin=b"a b\n")
    assert [piece["piece"] for piece in json.loads(done.stdout)["pieces"]] == ["a", "b"]
    assert inside("classify", "-m", tokens, "--per", "record", stdin=b"a\n").returncode == 2
    assert inside("classify", "-m", folders(), "--per", "token", stdin=b"a\n").returncode == 2
    assert (
        b"--json"
        in inside("classify", "-m", tokens, "-o", tmp_path / "x", "--continue", stdin=b"a\n").stderr
    )


def test_long_records_are_truncated_and_counted_or_stop(inside, folders):
    long = b"short\n" + b"The baker went home and said no. " * 30 + b"\n"
    done = inside("classify", "-m", folders(), stdin=long)
    assert (
        done.stdout.count(b"\n") == 2
        and b"1 record longer than the context of 24 tokens" in done.stderr
    )
    assert inside("classify", "-m", folders(), "-q", stdin=long).stderr == b""
    done = inside("classify", "-m", folders(), "--on-long", "error", stdin=long)
    assert done.returncode == 1 and b"standard input, line 2: longer than" in done.stderr
    assert done.stdout.count(b"\n") == 1  # what was ready


def test_two_fields_joined_by_a_comma_are_a_pair(inside, folders, tmp_path):
    import lmcli

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"a": "The baker", "b": "went\\thome"}\n{"a": 1}\n{"a": "", "b": ""}\n')
    rows = lines(
        inside(
            "classify", "-m", folders(), "--field", "a,b", "--logits", "--on-error", "blank", file
        )
    )
    assert rows[0][3:] == ["a", "b"] and rows[1][3:] == ["The baker", "went\\thome"]
    (expected,) = lmcli.load(folders(), device="cpu").classify([("The baker", "went\thome")])
    assert [float(cell) for cell in rows[1][:3]] == pytest.approx(expected.logits, rel=1e-5)
    assert rows[2] == rows[3] == ["NA", "NA", "NA", "", ""]
    row = json.loads(
        inside(
            "classify", "-m", folders(), "--field", "a,b", "--json", "--on-error", "skip", file
        ).stdout.splitlines()[0]
    )
    assert (row["a"], row["b"], row["label"]) == ("The baker", "went\thome", expected.label)
    done = inside("classify", "-m", folders(head="token"), "--field", "a,b", file)
    assert done.returncode == 2 and b"not of a pair" in done.stderr


@pytest.mark.parametrize(
    "on_error, code, texts",
    [("stop", 1, []), ("blank", 0, ["fine", "", "too"]), ("skip", 0, ["fine", "too"])],
)
def test_bad_records_stop_or_blank_or_skip(inside, folders, on_error, code, texts):
    bad = b'{"text": "fine"}\n{"text": 7}\n{"text": "too"}\n'
    done = inside(
        "classify", "-m", folders(), "--format", "jsonl", "--on-error", on_error, stdin=bad
    )
    assert done.returncode == code
    assert [line.split("\t")[-1] for line in done.stdout.decode().splitlines()] == texts


@pytest.mark.parametrize("complete", [0, 1, 2.5, 5])
def test_continue_gives_the_same_file(inside, folders, tmp_path, complete):
    whole = inside("classify", "-m", folders(), "--logits", stdin=TEXT).stdout
    rows = whole.splitlines(keepends=True)
    (tmp_path / "out.part").write_bytes(
        b"".join(rows[: int(complete)]) + (rows[int(complete)][:3] if complete % 1 else b"")
    )
    done = inside(
        "classify", "-m", folders(), "--logits", "-o", tmp_path / "out", "--continue", stdin=TEXT
    )
    assert done.returncode == 0 and (tmp_path / "out").read_bytes() == whole


def test_empty_input_gives_empty_output(inside, folders):
    done = inside("classify", "-m", folders(), stdin=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_closed_pipe_ends_it_at_once(folders, piped, tmp_path):
    (tmp_path / "many.txt").write_bytes(b"The baker went home.\n" * 200_000)
    done = piped(3, "classify", "-m", folders(), tmp_path / "many.txt")
    assert done.returncode == 141 and done.stdout.count(b"\n") == 3 and done.stderr == b""


def test_a_slow_pipe_is_answered_line_by_line(folders, environment):
    command = [sys.executable, "-m", "lmcli", "classify", "-m", str(folders())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        for line in (b"The baker\n", b"went home\n"):
            process.stdin.write(line)
            assert process.stdout.readline().endswith(line)
        process.stdin.close()
    assert process.returncode == 0


KINDS = {
    ("decoder", "lm"): "a language model",
    ("encoder", "lm"): "a masked language model",
    ("encoder-decoder", "lm"): "an encoder–decoder",
    ("encoder", "sequence"): "a classifier of texts",
    ("encoder", "token"): "a classifier of tokens",
    ("encoder", "span"): "a question-answering model",
    ("encoder", "none"): "an encoder without a head",
}


@pytest.mark.parametrize(
    "command, able",
    [
        ("score", {("decoder", "lm"), ("encoder", "lm"), ("encoder-decoder", "lm")}),
        ("perplexity", {("decoder", "lm")}),
        ("classify", {("encoder", "sequence"), ("encoder", "token"), ("encoder", "span")}),
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_command_that_cannot_use_a_model_says_what_the_model_is(
    inside, folders, kind, command, able
):
    done = inside(command, "-m", folders(*kind), stdin=b"The baker\twent\n")
    message = done.stderr.decode()
    if (
        kind in able and "names no mask token" not in message and "is plain text" not in message
    ):  # what some cannot do without
        assert lines(done)
        return
    if kind in able:
        assert done.returncode == 1 and (command, kind) in {
            ("score", ("encoder", "lm")),
            ("classify", ("encoder", "span")),
        }
        return
    assert (done.returncode, done.stdout) == (1, b"") and message.count("\n") == 2
    assert f"is {KINDS[kind]}" in message and f"which lm {command} cannot use" in message
    if kind in (("decoder", "lm"), ("encoder", "sequence")):
        assert ("lm score" if kind[0] == "decoder" else "lm classify") in message.splitlines()[1]
