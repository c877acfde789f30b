"""`lm classify`: a line for each record, in order; what it refuses; and which command can use which model."""

import json
import math
import subprocess
import sys

import pytest

TEXT = b"The baker went home.\nA b c\n\nshe said no\n"


@pytest.fixture(scope="module")
def folders(small_model, small_tokenizer, tmp_path_factory):
    """folders(shape, head, **options): a small random model of a family of that shape, context 24, as a folder."""
    from lmcli.checkpoints import folder as checkpoints
    from lmcli.checkpoints.families import FAMILIES
    from lmcli.config import GenerateConfig

    made = {}

    def build(shape="encoder", head="sequence", **options):
        key = (shape, head, *options)
        if key not in made:
            family = next(family for name, family in FAMILIES.items()
                          if family.shape == shape and name not in ("modernbert", "t5", "marian"))
            chosen = {key: value for choices in family.choices.values() for key, value in choices[0][1].items()}
            model = small_model(**{
                **family.expected(head), **chosen, "model_type": family.model_type, "shape": shape, "head": head,
                "num_key_value_heads": 4, "max_position_embeddings": 24, "vocab_size": 400,
                "labels": ("bad", "good", "so so") if head in ("sequence", "token") else (), **options})
            made[key] = tmp_path_factory.mktemp(f"{shape}-{head}")
            checkpoints.save(made[key], model, small_tokenizer, GenerateConfig())
        return made[key]
    return build


def lines(done) -> list[list[str]]:
    assert done.returncode == 0, done.stderr.decode()
    return [line.split("\t") for line in done.stdout.decode().split("\n")[:-1]]


def test_a_line_in_is_a_line_out(inside, folders):
    found = lines(inside("classify", "-m", folders(), stdin=TEXT))
    assert [row[2] for row in found] == TEXT.decode().splitlines()
    assert [row[0] in ("bad", "good", "so so") and 1 / 3 < float(row[1]) <= 1 for row in found[:2] + found[3:]] == [True] * 3
    assert found[2] == ["NA", "NA", ""]


def test_a_classifier_gives_no_answers(inside, folders):
    done = inside("classify", "-m", folders(), "--max-answer-tokens", 3, stdin=TEXT)
    assert done.returncode == 2 and b"--max-answer-tokens: only a question-answering model gives answers" in done.stderr


def test_logits_have_a_column_a_label(inside, folders):
    found = lines(inside("classify", "-m", folders(), "--logits", stdin=TEXT))
    assert found[0] == ["bad", "good", "so so", "text"] and len(found) == 5
    plain = lines(inside("classify", "-m", folders(), stdin=TEXT))
    for row, (label, probability, _) in zip(found[1:3], plain):
        logits = dict(zip(found[0], map(float, row[:3])))
        assert max(logits, key=logits.get) == label
        assert math.exp(logits[label]) / sum(map(math.exp, logits.values())) == pytest.approx(float(probability), rel=1e-4)
    assert found[3] == ["NA", "NA", "NA", ""]
    assert lines(inside("classify", "-m", folders(), "--logits", "--no-header", stdin=TEXT)) == found[1:]


def test_json_keeps_the_records_own_fields(inside, folders, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 7, "text": "The baker", "label": "good"}\n{"id": 8, "text": ""}\n')
    first, empty = map(json.loads, inside("classify", "-m", folders(), "--json", file).stdout.splitlines())
    assert (first["id"], first["text"], first["given_label"]) == (7, "The baker", "good")
    assert first["probabilities"][first["label"]] == first["probability"] == max(first["probabilities"].values())
    assert len(first["logits"]) == 3 and sum(first["probabilities"].values()) == pytest.approx(1)
    assert (empty["id"], empty["label"], empty["probability"], empty["logits"]) == (8, None, None, [])
    found = json.loads(inside("classify", "-m", folders(), "--json", "--top", 2, file).stdout.splitlines()[0])
    assert list(found["probabilities"].values()) == sorted(first["probabilities"].values())[:0:-1]


def test_the_likeliest_labels(inside, folders):
    found = lines(inside("classify", "-m", folders(), "--top", 2, stdin=TEXT))
    assert all(len(row) == 5 for row in found) and float(found[0][1]) >= float(found[0][3])
    assert found[2] == ["NA"] * 4 + [""]
    assert len(lines(inside("classify", "-m", folders(), "--top", 9, stdin=TEXT))[0]) == 7  # there are three
    assert inside("classify", "-m", folders(), "--top", 2, "--logits", stdin=TEXT).returncode == 2


def test_several_labels_are_joined_by_commas(inside, folders):
    several = folders(multi_label=True)
    found = lines(inside("classify", "-m", several, "--threshold", 0, stdin=b"The baker\n"))
    assert sorted(found[0][0].split(",")) == ["bad", "good", "so so"]
    assert list(map(float, found[0][1].split(","))) == sorted(map(float, found[0][1].split(",")), reverse=True)
    assert lines(inside("classify", "-m", several, "--threshold", 1, stdin=b"The baker\n")) == [["NA", "NA", "The baker"]]
    assert inside("classify", "-m", several, "--threshold", 2, stdin=b"a\n").returncode == 2


def test_tokens_have_a_row_each(inside, folders, tmp_path):
    tokens = folders(head="token")
    found = lines(inside("classify", "-m", tokens, stdin="Café,  no\n\nb\n".encode()))
    assert found[0] == ["line", "index", "piece", "start", "end", "label", "probability"]
    assert {row[0] for row in found[1:]} == {"1", "3"}
    data = "Café,  no".encode()
    assert all(data[int(row[3]):int(row[4])].decode(errors="backslashreplace") == row[2].replace("\\\\", "\\")
               for row in found[1:] if row[0] == "1")
    done = inside("classify", "-m", tokens, "--per", "token", "--json", stdin=b"a b\n")
    assert [piece["piece"] for piece in json.loads(done.stdout)["pieces"]] == ["a", "b"]
    assert inside("classify", "-m", tokens, "--per", "record", stdin=b"a\n").returncode == 2
    assert inside("classify", "-m", folders(), "--per", "token", stdin=b"a\n").returncode == 2
    assert b"--json" in inside("classify", "-m", tokens, "-o", tmp_path / "x", "--continue", stdin=b"a\n").stderr


def test_long_records_are_cut_and_counted_or_stop(inside, folders):
    long = b"short\n" + b"The baker went home and said no. " * 30 + b"\n"
    done = inside("classify", "-m", folders(), stdin=long)
    assert done.stdout.count(b"\n") == 2 and b"1 record is longer than the context of 24 tokens" in done.stderr
    assert inside("classify", "-m", folders(), "-q", stdin=long).stderr == b""
    done = inside("classify", "-m", folders(), "--on-long", "error", stdin=long)
    assert done.returncode == 1 and b"standard input, line 2: longer than" in done.stderr
    assert done.stdout.count(b"\n") == 1  # what was ready


def test_two_fields_joined_by_a_comma_are_a_pair(inside, folders, tmp_path):
    import lmcli

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"a": "The baker", "b": "went\\thome"}\n{"a": 1}\n{"a": "", "b": ""}\n')
    found = lines(inside("classify", "-m", folders(), "--field", "a,b", "--logits", "--on-error", "blank", file))
    assert found[0][3:] == ["a", "b"] and found[1][3:] == ["The baker", "went\\thome"]
    (expected,) = lmcli.load(folders(), device="cpu").classify([("The baker", "went\thome")])
    assert [float(cell) for cell in found[1][:3]] == pytest.approx(expected.logits, rel=1e-5)
    assert found[2] == found[3] == ["NA", "NA", "NA", "", ""]
    row = json.loads(inside("classify", "-m", folders(), "--field", "a,b", "--json", "--on-error", "skip", file
                            ).stdout.splitlines()[0])
    assert (row["a"], row["b"], row["label"]) == ("The baker", "went\thome", expected.label)
    done = inside("classify", "-m", folders(head="token"), "--field", "a,b", file)
    assert done.returncode == 2 and b"not of a pair" in done.stderr


@pytest.mark.parametrize("on_error, code, texts", [("stop", 1, []), ("blank", 0, ["fine", "", "too"]),
                                                   ("skip", 0, ["fine", "too"])])
def test_bad_records_stop_or_blank_or_skip(inside, folders, on_error, code, texts):
    bad = b'{"text": "fine"}\n{"text": 7}\n{"text": "too"}\n'
    done = inside("classify", "-m", folders(), "--format", "jsonl", "--on-error", on_error, stdin=bad)
    assert done.returncode == code
    assert [line.split("\t")[-1] for line in done.stdout.decode().splitlines()] == texts


@pytest.mark.parametrize("kept", [0, 1, 2.5, 5])
def test_going_on_with_a_part_gives_the_same_file(inside, folders, tmp_path, kept):
    whole = inside("classify", "-m", folders(), "--logits", stdin=TEXT).stdout
    rows = whole.splitlines(keepends=True)
    (tmp_path / "out.part").write_bytes(b"".join(rows[:int(kept)]) + (rows[int(kept)][:3] if kept % 1 else b""))
    done = inside("classify", "-m", folders(), "--logits", "-o", tmp_path / "out", "--continue", stdin=TEXT)
    assert done.returncode == 0 and (tmp_path / "out").read_bytes() == whole


def test_nothing_in_is_nothing_out(inside, folders):
    done = inside("classify", "-m", folders(), stdin=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_reader_that_goes_ends_it_at_once(folders, environment, tmp_path):
    (tmp_path / "many.txt").write_bytes(b"The baker went home.\n" * 200_000)
    shell = f"{sys.executable} -m lmcli classify -m {folders()} {tmp_path / 'many.txt'} | head -3; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, env=environment, timeout=60)
    *found, code = done.stdout.splitlines()
    assert code == b"141" and len(found) == 3 and done.stderr == b""


def test_a_slow_pipe_is_answered_line_by_line(folders, environment):
    command = [sys.executable, "-m", "lmcli", "classify", "-m", str(folders())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0) as process:
        for line in (b"The baker\n", b"went home\n"):
            process.stdin.write(line)
            assert process.stdout.readline().endswith(line)
        process.stdin.close()
    assert process.returncode == 0


KINDS = {("decoder", "lm"): "a language model", ("encoder", "lm"): "a masked language model",
         ("encoder-decoder", "lm"): "an encoder–decoder", ("encoder", "sequence"): "a classifier of texts",
         ("encoder", "token"): "a classifier of tokens", ("encoder", "span"): "a question-answering model",
         ("encoder", "none"): "an encoder without a head"}


@pytest.mark.parametrize("command, able", [
    ("score", {("decoder", "lm"), ("encoder", "lm"), ("encoder-decoder", "lm")}), ("perplexity", {("decoder", "lm")}),
    ("classify", {("encoder", "sequence"), ("encoder", "token"), ("encoder", "span")})])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_command_that_a_model_is_not_made_for_says_what_the_model_is(inside, folders, kind, command, able):
    done = inside(command, "-m", folders(*kind), stdin=b"The baker\twent\n")
    told = done.stderr.decode()
    if kind in able and "names no mask token" not in told and "is plain text" not in told:  # what some cannot do without
        assert lines(done)
        return
    if kind in able:
        assert done.returncode == 1 and (command, kind) in {("score", ("encoder", "lm")), ("classify", ("encoder", "span"))}
        return
    assert (done.returncode, done.stdout) == (1, b"") and told.count("\n") == 2
    assert f"is {KINDS[kind]}" in told and f"which lm {command} cannot use" in told
    if kind in (("decoder", "lm"), ("encoder", "sequence")):
        assert ("lm score" if kind[0] == "decoder" else "lm classify") in told.splitlines()[1]
