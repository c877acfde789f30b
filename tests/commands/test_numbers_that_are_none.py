"""A model that gives NaN or infinity: exit 1 at the first such record, after those before it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.data.output_file import json_line
from lmcli.errors import UserError
from lmcli.model.likelihood import TokenDistribution
from lmcli.scoring.scorer import Score
from lmcli.scoring.token_logprobs import ScoreFields, TokenScores

LINES = ["The baker went home", "a cat", "a zebra ran", "the end"]
PLAIN = "".join(f"{line}\n" for line in LINES).encode()


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(line: bytes | str) -> dict:
    return json.loads(line, parse_constant=no_constant)


@pytest.fixture(scope="module")
def models(small_model, small_tokenizer, tmp_path_factory):
    """The folder of a sound model, and of copies with NaN: everywhere, or in a row for "z"."""
    folder = tmp_path_factory.mktemp("models")
    (z,) = small_tokenizer.encode("z")
    for name in ("sound", "row", "all", "large"):
        model = small_model(
            vocab_size=small_tokenizer.size, tie_word_embeddings=False, max_position_embeddings=64
        )
        with torch.no_grad():
            if name == "row":
                model.embedding.weight[z] = float("nan")
            elif name == "all":
                model.blocks()[1].mlp.down.weight[0, 0] = float("nan")
            elif name == "large":  # finite, and no product of it is
                model.blocks()[1].mlp.down.weight[:] = 3e38
        (folder / name).mkdir()
        checkpoints.save(folder / name, model, small_tokenizer, GenerateConfig())
    return folder


@pytest.fixture(scope="module")
def damaged(berts, tmp_path_factory):
    """damaged(kind, word): a small BERT with NaN in the embedding of a word, or in its head."""

    def make(kind: str, word: str | None):
        folder = tmp_path_factory.mktemp("damaged") / kind
        shutil.copytree(berts / kind, folder)
        weights = load_file(folder / "model.safetensors")
        token = lmcli.load(folder).encode(word or "a")[0]
        name = "embeddings.word_embeddings.weight" if word else ("classifier.bias", "qa_outputs.bi")
        for key, weight in weights.items():
            if isinstance(name, str) and key.endswith(name):
                weight[token] = float("nan")
            elif not isinstance(name, str) and key.startswith(name):
                weight[0] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


SCORING = [
    [],
    ["--json"],
    ["--per", "token"],
    ["--per", "token", "--json"],
    ["--per", "word", "--json"],
    ["--alternatives", 2, "--json"],
    ["--prefix", "A", "--json"],
    ["--eos"],
    ["--color"],
    ["--batch-tokens", 1],
]
GENERATING = [
    ["--temperature", 0],
    ["--seed", 1, "--json"],
    ["--num-beams", 3],
    ["--num-beams", 3, "--num-samples", 2, "--json"],
    ["--temperature", 0, "--batch-tokens", 1, "--no-repeat-ngram-size", 2],
]


@pytest.mark.parametrize(
    "command",
    [["score", *options] for options in SCORING]
    + [["generate", "-n", 4, *options] for options in GENERATING],
    ids=lambda command: " ".join(map(str, command)),
)
def test_records_before_the_first_bad_one_are_written(command, inside, models):
    name, *options = command
    sound = inside(name, "-m", models / "sound", *options, stdin=PLAIN)
    assert sound.returncode == 0
    done = inside(name, "-m", models / "row", *options, stdin=PLAIN)
    error = done.stderr.decode().replace(str(models / "row"), "MODEL").strip().splitlines()[-2:]
    place = "prompt 3 ('a zebra ran')" if name == "generate" else "standard input, line 3"
    assert done.returncode == 1
    assert error == [
        f"lm: error: MODEL: a log-probability is NaN or infinite: {place}",
        "  the model is damaged: NaN or infinity in embedding.weight",
    ]
    # the same bytes as of the sound model, up to the bad record
    assert done.stdout and sound.stdout.startswith(done.stdout)
    records = {line.split(b"\t")[0] for line in done.stdout.splitlines()}
    if options[:2] == ["--per", "token"] and "--json" not in options:
        assert records == {b"line", b"1", b"2"}
    elif "--num-samples" in options:
        assert len(done.stdout.splitlines()) == 4
    else:
        header = name == "score" and not {"--json", "--color"} & set(options)
        assert len(done.stdout.splitlines()) == 2 + header


def test_prompts_as_arguments_end_at_the_bad_one(inside, models):
    options = "generate", "-m", models / "row", "-n", 3, "--temperature", 0
    done = inside(*options, "The baker", "a zebra", "the end")
    assert done.returncode == 1 and b"prompt 2 ('a zebra')" in done.stderr
    good = inside(*options, "The baker").stdout
    assert done.stdout.startswith(good)


def test_perplexity_names_the_byte(inside, models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(PLAIN * 3 + b"z")  # windows
    done = inside("perplexity", "-m", models / "row", text)
    # 0 · NaN is NaN: attention may carry it to positions before that of the z, not after
    place = re.search(rf"is NaN or infinite: {text}, byte (\d+)\n", done.stderr.decode())
    assert (done.returncode, done.stdout) == (1, b"")
    assert place and int(place[1]) <= PLAIN.index(b"z") + 1
    # a NaN in the last position only; a z that is read and predicts nothing is no error
    text.write_bytes(b"the end z")
    assert inside("perplexity", "-m", models / "row", text).returncode == 0
    assert inside("perplexity", "-m", models / "row", "--eos", text).returncode == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the end"}\n{"text": "zebra"}\n')
    for options in ([], ["--by", "text"], ["-m", models / "sound"]):
        done = inside("perplexity", "-m", models / "row", *options, rows)
        assert done.returncode == 1 and f"{rows}, byte 20".encode() in done.stderr
    done = inside("perplexity", "-m", models / "sound", "-m", models / "row", "--json", rows)
    assert done.returncode == 1 and str(models / "row").encode() in done.stderr


@pytest.mark.parametrize("name", ["all", "large"])
def test_a_model_without_any_number(name, inside, models):
    for command in (["score", "--json"], ["perplexity"], ["generate"], ["score", "--worst", 2]):
        done = inside(command[0], "-m", models / name, *command[1:], stdin=PLAIN)
        assert done.returncode == 1 and b"nan" not in done.stdout.lower()
        assert b"NaN or infinite" in done.stderr and str(models / name).encode() in done.stderr
        hint = b"in decoder.layers.1.mlp.down.weight" if name == "all" else b"in between overflow"
        assert hint in done.stderr


def test_pairs_and_choices(inside, models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    pairs = [{"sentence_good": "a cat", "sentence_bad": f"a {word}"} for word in ("dog", "zebra")]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for command in (["score", "--pairs", "--json"], ["evaluate", "--pairs"]):
        done = inside(command[0], "-m", models / "row", *command[1:], rows)
        assert done.returncode == 1 and f"{rows}, line 2".encode() in done.stderr
        assert len(done.stdout.splitlines()) == (command[0] == "score")
    choices = [{"text": "The", "options": [" cat", word]} for word in (" dog", " zebra")]
    rows.write_text("".join(json.dumps(row) + "\n" for row in choices))
    options = "--prefix-field", "text", "--choices-field", "options"
    done = inside("score", "-m", models / "row", *options, rows)
    assert done.returncode == 1 and f"{rows}, line 2".encode() in done.stderr


def test_labels_and_answers(inside, damaged, berts, tmp_path):
    text = b"a cat\nthe zebra\nthe end\n"
    for options in ([], ["--json"], ["--top", 2], ["--logits"]):
        done = inside("classify", "-m", damaged("labels", "zebra"), *options, stdin=text)
        sound = inside("classify", "-m", berts / "labels", *options, stdin=text)
        assert done.returncode == 1 and sound.stdout.startswith(done.stdout) and done.stdout
        assert b"a logit is NaN or infinite: standard input, line 2" in done.stderr
    done = inside("classify", "-m", damaged("labels", None), "--json", stdin=text)
    assert (done.returncode, done.stdout) == (1, b"") and b"line 1" in done.stderr
    rows = tmp_path / "rows.jsonl"
    labeled = [{"text": each, "label": "LABEL_0"} for each in text.decode().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labeled))
    done = inside("evaluate", "-m", damaged("labels", "zebra"), rows)
    assert done.returncode == 1 and f"{rows}, line 2".encode() in done.stderr

    asked = [
        {"context": f"a {word} sat on the mat", "question": "who sat", "answers": ["a"]}
        for word in ("cat", "zebra", "dog")
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    for command in ("classify", "evaluate"):
        done = inside(command, "-m", damaged("answers", "zebra"), rows)
        assert done.returncode == 1 and f"{rows}, line 2".encode() in done.stderr
        assert b"a logit is NaN or infinite" in done.stderr
    done = inside("classify", "-m", damaged("answers", None), "--json", rows)
    assert (done.returncode, done.stdout) == (1, b"")


def test_masks(inside, damaged):
    model, text = damaged("masked", "zebra"), b"a [MASK] cat\nthe [MASK] zebra\n"
    # the word embeddings are its output matrix too: a NaN is in every row of logits
    for command in (["generate"], ["generate", "--num-samples", 2, "--json"], ["score"]):
        done = inside(*command, "-m", model, stdin=text)
        assert done.returncode == 1 and b"NaN or infinite" in done.stderr
        assert b"nan" not in done.stdout.lower()


def test_training_further_stops_before_the_first_step(inside, models, damaged, tmp_path, story):
    done = inside("train", story, "--from", models / "all", "--steps", 2, "-o", tmp_path / "run")
    assert done.returncode == 1 and b"before the first step" in done.stderr
    assert b"the starting model: the loss of the validation set is NaN or infinite" in done.stderr
    assert b"in decoder.layers.1.mlp.down.weight" in done.stderr


def test_python_calls_raise(models):
    model = lmcli.load(models / "row")
    for call, place in (
        (lambda: model.score(["a cat", "a zebra"]), "text 2"),
        (lambda: model.perplexity("a zebra"), "the text"),
        (lambda: model.generate(["the", "a z"], temperature=0, max_new_tokens=2), "prompt 2"),
        (lambda: list(model.stream("a z", temperature=0, max_new_tokens=2)), "the text"),
    ):
        with pytest.raises(UserError, match=f"NaN or infinite: {place}") as caught:
            call()
        assert caught.value.exit_code == 1 and caught.value.where == str(models / "row")


def test_nan_of_a_model_is_stored_apart_from_not_scored():
    scores = TokenScores.empty(4, ScoreFields(), 9)
    nan = float("nan")
    scores.put(1, TokenDistribution(torch.tensor([-1.0, nan, -float("inf")])))
    np.testing.assert_array_equal(scores.logprobs, [nan, -1, np.inf, -np.inf])
    assert not Score(None, 0, 0).problem and not Score(-1.0, 1, 1).problem
    assert Score(float("inf"), 1, 1).problem and Score(-float("inf"), 1, 1).problem


def test_json_never_holds_nan_or_infinity(inside, models, tmp_path):
    for value in (float("nan"), float("inf"), [1, {"x": -float("inf")}]):
        with pytest.raises(UserError, match="field 'b'"):
            json_line({"a": 1, "b": value})
    # Python writes NaN into JSON Lines; other fields travel to the output
    rows = b'{"text": "a cat", "x": NaN, "y": [Infinity, 2]}\n'
    done = inside("score", "-m", models / "sound", "--format", "jsonl", "--json", stdin=rows)
    fields = strict(done.stdout)
    assert (fields["x"], fields["y"], fields["tokens"] > 0) == (None, [None, 2], True)
    done = inside(
        "score",
        "-m",
        models / "sound",
        "--format",
        "jsonl",
        "--json",
        stdin=b'{"text":"a","x":1e999}',
    )
    assert done.returncode == 1 and b"field 'x' holds NaN or infinity" in done.stderr.replace(
        b":", b""
    )
    # a perplexity above the largest number
    done = inside("perplexity", "-m", models / "sound", "--json", stdin=b"zebra," * 90)
    assert strict(done.stdout)["word_perplexity"] is None
    table = inside("perplexity", "-m", models / "sound", stdin=b"zebra," * 90).stdout.decode()
    header, cells = (line.split("\t") for line in table.splitlines())
    assert cells[header.index("word_perplexity")] == "inf"
