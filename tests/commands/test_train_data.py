"""lm train on rows and parallel files: reports before training; long and empty examples."""

import json
import math

import pytest
import yaml

SMALL = (
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "model.num_attention_heads=2",
    "--set",
    "tokenizer.vocab_size=300",
    "--set",
    "train.context=32",
    "--set",
    "train.batch_tokens=256",
)
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


@pytest.fixture
def train(inside, tmp_path):
    """train(rows or text, *options): (exit code, standard error, recipe or None) of one step."""

    def call(rows, *options, name="rows.jsonl", preset="classify"):
        file = tmp_path / name
        file.write_text(
            rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        )
        steps = () if "--steps" in options else ("--steps", 1)
        options = ("-o", tmp_path / "run", "--overwrite", "--preset", preset, *steps, *options)
        done = inside("train", file, *SMALL, *options)
        recipe = tmp_path / "run" / "recipe.yaml"
        return (
            done.returncode,
            done.stderr.decode(),
            yaml.safe_load(recipe.read_text()) if not done.returncode else None,
        )

    return call


def labeled(count=40):
    return [
        {"text": f"{WORDS[i % 7]} {WORDS[i // 7 % 7]} {i}", "label": "odd" if i % 2 else "even"}
        for i in range(count)
    ]


def test_duplicates_overlap_and_label_shares_are_reported(train):
    rows = labeled()
    rows[1] = rows[0] | {"label": "odd"}  # the same text with another label
    rows[3] = rows[2]
    rows[9] = rows[4]
    rows[5] = {"text": "rare", "label": "never"}
    rows[6] = {"text": " ", "label": "odd"}
    rows.append(rows[8])
    code, stderr, _ = train(rows)
    assert code == 0, stderr
    assert (
        "1 row with an empty text left out" in stderr
        and "3 of 36 training examples are repeated word for word" in stderr
    )
    assert "1 training texts come with more than one label" in stderr
    assert "3 labels: even 5" in stderr and "a label with few examples: never (1)" in stderr


def test_overlap_with_the_validation_set_is_reported(train, tmp_path):
    rows = labeled()
    held_out = [*rows[:3], {"text": "x", "label": "odd"}]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    code, stderr, _ = train(rows, "--val", tmp_path / "val.jsonl")
    assert (
        code == 0
        and "3 of 4 validation examples have a source that is in the training set too" in stderr
    )


@pytest.mark.parametrize(
    ("rows", "preset", "code", "expected"),
    [
        (
            [{"text": f"t {i}", "label": "a"} for i in range(30)],
            "classify",
            1,
            "all rows have the same label 'a'",
        ),
        (
            [*labeled(), {"text": "x", "label": None}],
            "classify",
            1,
            "rows.jsonl, line 41: field 'label' has no label",
        ),
        ([{"source": "a", "target": " "}] * 30, "translate", 1, "no text in it"),
        (
            [{"source": "a"}] * 30,
            "translate",
            2,
            "learns from rows with source and target (or with --target FILE); fields: 'source'",
        ),
        ([{"messages": []}] * 30, "tiny", 1, "field 'messages' is no list of messages"),
    ],
    ids=["one label", "no label", "empty targets", "no target", "no message"],
)
def test_rows_without_a_training_example_are_named(rows, preset, code, expected, train):
    exit_code, stderr, _ = train(rows, preset=preset)
    assert exit_code == code and expected in stderr and "Traceback" not in stderr


def test_a_text_may_have_several_labels(train, inside, tmp_path):
    rows = [
        {"text": text, "label": [word for word in WORDS if word in text]}
        for text in (f"{WORDS[i % 7]} {WORDS[i // 7 % 7]}" for i in range(49))
    ]
    code, stderr, recipe = train(rows)
    assert (
        code == 0 and recipe["model"]["multi_label"] and recipe["model"]["labels"] == sorted(WORDS)
    )
    assert recipe["data"]["several"] and "7 labels: " in stderr
    done = inside(
        "classify", "-m", tmp_path / "run", "--json", "--threshold", 0, stdin=b"one two\n"
    )
    assert sorted(json.loads(done.stdout)["labels"]) == sorted(WORDS)


def test_a_label_of_val_alone_is_named_with_an_advice_that_helps(train, tmp_path):
    (tmp_path / "val.jsonl").write_text('{"text": "x", "label": "new"}\n')
    code, stderr, _ = train(labeled(), "--val", tmp_path / "val.jsonl")
    assert code == 1 and "new_head" not in stderr
    assert "val.jsonl, line 1: label 'new' is none of the model's labels: even, odd" in stderr
    assert "add rows with it to the training data, or take it out of --val" in stderr


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["bad", "good"] * 4 + ["bad", "rare"] + ["bad", "good"] * 5, ["bad", "good", "rare"]),
        ([False, True] * 15, ["false", "true"]),
        ([1.0, 2.0, 10.0] * 10, ["1", "2", "10"]),
        ([1, 2, 10] * 10, ["1", "2", "10"]),
        ([True, "true", "false", False] * 8, ["false", "true"]),
        (["9" * 5000, "1"] * 10, ["1", "9" * 5000]),
    ],
    ids=["rare at the tenth place", "true, false", "floats", "integers", "mixed", "long"],
)
def test_labels_of_any_kind_are_learned_and_classified(labels, expected, train, inside, tmp_path):
    rows = [{"text": f"text number {i}", "label": label} for i, label in enumerate(labels)]
    code, stderr, recipe = train(rows)
    assert code == 0 and recipe["model"]["labels"] == expected, stderr
    assert recipe["result"]["val_unigram_entropy"] > 0  # more than one label is held out
    done = inside("classify", "-m", tmp_path / "run", tmp_path / "rows.jsonl", "--json")
    assert {json.loads(line)["label"] for line in done.stdout.splitlines()} <= set(expected)
    done = inside("evaluate", "-m", tmp_path / "run", tmp_path / "rows.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["labels"]) == sorted(expected)


def test_labels_other_than_the_models_need_a_new_head(train, inside, tmp_path):
    assert train(labeled())[0] == 0
    rows = [row | {"label": f"un{row['label']}"} for row in labeled()]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = (
        "train",
        tmp_path / "other.jsonl",
        "--from",
        tmp_path / "run",
        "-o",
        tmp_path / "other",
        "--steps",
        1,
    )
    done = inside(*again)
    assert done.returncode == 1 and b"label 'uneven' is none of the model's labels" in done.stderr
    assert b"train.new_head=true" in done.stderr and not (tmp_path / "other").exists()
    done = inside(*again, "--set", "train.new_head=true")
    assert done.returncode == 0 and b"the head is new" in done.stderr
    assert json.loads((tmp_path / "other" / "config.json").read_text())["id2label"] == {
        "0": "uneven",
        "1": "unodd",
    }


LONG = [{"source": f"one two {i}", "target": "x"} for i in range(25)] + [
    {"source": "one two three " * 30, "target": "y " * 40}
] * 3


@pytest.mark.parametrize(
    ("choice", "code", "expected"),
    [
        ("truncate", 0, "3 of 25 examples are longer than the context of 32 tokens: "),
        ("skip", 0, "3 of 25 training examples are longer than the context of 32 tokens: left out"),
        (
            "error",
            1,
            "rows.jsonl, line 26: longer than the context of 32 tokens, and so are 2 others",
        ),
    ],
)
def test_on_long(choice, code, expected, train):
    exit_code, stderr, recipe = train(LONG, "--on-long", choice, preset="translate")
    assert exit_code == code and expected in stderr
    assert recipe is None or recipe["data"]["on_long"] == choice
    if choice == "truncate":
        assert "tokens (" in stderr and "are cut off" in stderr


def test_no_example_left_is_an_error(train):
    code, stderr, _ = train([LONG[-1]] * 30, "--on-long", "skip", preset="translate")
    assert code == 1 and "no example is left" in stderr


PAIRS = {
    "prompt": [{"prompt": f"{word} is", "completion": f" {word[::-1]}"} for word in WORDS * 5],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": word},
                {"role": "assistant", "content": word[::-1]},
            ]
        }
        for word in WORDS * 5
    ],
    "instruction": [
        {"instruction": "turn", "input": word, "output": word[::-1]} for word in WORDS * 5
    ],
    "answers": [
        {
            "context": f"it is {word}",
            "question": "what",
            "answers": [{"text": word, "answer_start": 6}],
        }
        for word in WORDS * 5
    ],
}


def held_out(rows, recipe):
    """The words of the rows that a run of PAIRS has held out."""
    lengths = [len(json.dumps(row)) + 1 for row in rows]
    starts = [str(sum(lengths[:i])) for i in range(len(rows))]
    ranges = recipe["validation"][0]["ranges"].split()
    return [WORDS[starts.index(span.partition("-")[0]) % 7] for span in ranges]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("preset", ["tiny", "translate"])
def test_known_sets_of_fields_are_pairs(kind, preset, train):
    code, stderr, recipe = train(PAIRS[kind], preset=preset)
    fields = {
        "prompt": "prompt + completion",
        "messages": "messages",
        "instruction": "instruction + output",
        "answers": "context + question + answers",
    }[kind]
    chat = kind == "messages" and preset == "tiny"
    what = "conversations" if chat else "pairs"
    assert code == 0 and f"31 {what} ({fields}), " in stderr
    assert recipe["train"]["objective"] == ("completion" if preset == "tiny" else "seq2seq")
    assert recipe["result"]["val_bytes"] == sum(
        len(word) + (kind == "prompt" or (kind == "messages" and not chat))
        for word in held_out(PAIRS[kind], recipe)
    )


def test_two_named_fields_are_a_pair_in_this_order(train):
    rows = [{"de": f"{word} a", "en": f"{word} b", "note": 1} for word in WORDS * 5]
    code, stderr, recipe = train(rows, "--fields", "en,de", preset="translate")
    assert (
        code == 0 and "31 pairs (en + de), " in stderr and recipe["data"]["fields"] == ["en", "de"]
    )


def test_a_decoder_trained_on_completions_generates_them(inside, tmp_path):
    """And ends where the completions end."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"{WORDS[i * 3 % 7]} {WORDS[i * 5 % 7]} {WORDS[i % 7]} ->",
                    "completion": f" {WORDS[i % 7]}",
                }
            )
            + "\n"
            for i in range(200)
        )
    )
    done = inside(
        "train",
        tmp_path / "rows.jsonl",
        "-o",
        tmp_path / "run",
        "--preset",
        "tiny",
        *SMALL,
        "--steps",
        150,
    )
    assert done.returncode == 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["result"]["val_accuracy"] == 1.0 and recipe["result"]["val_loss"] < 0.1
    prompts = b"seven four three ->\ntwo five six ->\n"
    assert (
        inside("generate", "-m", tmp_path / "run", "--temperature", 0, stdin=prompts).stdout
        == b" three\n six\n"
    )


class TestAlignedFiles:
    def files(self, folder, lines=30):
        (folder / "a.en").write_text("".join(f"{WORDS[i % 7]} {i}\n" for i in range(lines)))
        (folder / "a.de").write_text("".join(f"{i} {WORDS[i % 7]}\n" for i in range(30)))
        return (
            folder / "a.en",
            "--target",
            folder / "a.de",
            "--preset",
            "translate",
            "--steps",
            1,
            *SMALL,
        )

    def test_lines_are_pairs_and_the_run_can_be_resumed(self, inside, tmp_path):
        done = inside("train", *self.files(tmp_path), "-o", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
        rows = [json.loads(line) for line in open(recipe["data"]["files"][0])]
        assert len(rows) == 30 and rows[8] == {"source": "two 8", "target": "8 two"}
        (tmp_path / "a.en").unlink()
        assert inside("train", "--resume", tmp_path / "run").returncode == 0

    def test_files_of_different_length_are_an_error(self, inside, tmp_path):
        done = inside("train", *self.files(tmp_path, 28), "-o", tmp_path / "run")
        assert done.returncode == 1 and not (tmp_path / "run").exists()
        assert (
            f"{tmp_path / 'a.en'}: ends after line 28, {tmp_path / 'a.de'} does not"
            in done.stderr.decode()
        )

    def test_each_file_needs_a_target(self, inside, tmp_path):
        done = inside(
            "train", *self.files(tmp_path), "--val", tmp_path / "a.en", "-o", tmp_path / "run"
        )
        assert done.returncode == 2 and b"1 files of sources and 0 of targets" in done.stderr


def test_two_texts_and_a_label_are_a_pair_in_training_and_in_lm_classify(train, inside, tmp_path):
    """The validation loss equals that of the probabilities of lm classify."""
    rows = [
        {
            "premise": WORDS[i % 7],
            "hypothesis": WORDS[i * 3 % 7],
            "label": "same" if i % 7 == i * 3 % 7 else "other",
        }
        for i in range(60)
    ]
    code, stderr, recipe = train(rows, "--fields", "premise,hypothesis,label", "--steps", 3)
    assert code == 0 and "labeled texts (premise + hypothesis + label)" in stderr
    validation = tmp_path / "held.jsonl"
    text = (tmp_path / "rows.jsonl").read_bytes()
    spans = [map(int, span.split("-")) for span in recipe["validation"][0]["ranges"].split()]
    validation.write_bytes(b"".join(text[start:end] + b"\n" for start, end in spans))
    done = inside(
        "classify", "-m", tmp_path / "run", "--field", "premise,hypothesis", "--json", validation
    )
    predictions = [json.loads(line) for line in done.stdout.splitlines()]
    loss = -sum(math.log(row["probabilities"][row["given_label"]]) for row in predictions) / len(
        predictions
    )
    assert recipe["result"]["val_loss"] == pytest.approx(loss, abs=2e-5)


def test_a_pooler_is_kept_if_the_classification_head_has_one(berts, inside, tmp_path):
    """As in transformers: a bare BERT's pooler is kept, the layer of a masked-LM head is not."""
    from safetensors.numpy import load_file

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labeled()))
    for kind, new in (
        ("bare", "lm: the head is new: head.output.weight, head.output.bias\n"),
        ("masked", "lm: the head is new: head.dense.weight"),
    ):
        done = inside(
            "train",
            tmp_path / "rows.jsonl",
            "--from",
            berts / kind,
            "-o",
            tmp_path / kind,
            "--steps",
            1,
            "--preset",
            "finetune",
            "--set",
            "train.learning_rate=1e-9",
        )
        assert done.returncode == 0 and new in done.stderr.decode()
    before = load_file(berts / "bare" / "model.safetensors")["pooler.dense.weight"]
    after = load_file(tmp_path / "bare" / "model.safetensors")["bert.pooler.dense.weight"]
    assert abs(after - before).max() < 1e-6
