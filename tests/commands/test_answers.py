"""`lm train` on questions, and `lm classify` with the trained model."""

import json
import random
from pathlib import Path

import pytest
import yaml

SMALL = (
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=2",
    "--set",
    "model.num_attention_heads=4",
    "--set",
    "tokenizer.vocab_size=400",
    "--set",
    "train.context=28",
    "--set",
    "train.learning_rate=0.01",
    "--set",
    "train.batch_tokens=512",
)
NAMES = ("Anna", "Björn", "Clara", "David", "Emil", "Frida")
THINGS = ("a clock", "two loaves", "the old map", "five books")


@pytest.fixture(scope="module")
def rows():
    """Questions about who holds something; some have no answer."""
    draw, table = random.Random(0), []
    for i in range(60):
        people = draw.sample(NAMES, 4)
        context = " ".join(f"{name} holds {thing}." for name, thing in zip(people, THINGS))
        thing = draw.choice(THINGS)
        name = people[THINGS.index(thing)]
        answers = [{"text": name, "answer_start": context.index(name)}] if i % 6 else []
        table.append(
            {
                "id": i,
                "context": context if answers else context.replace(thing, "nothing"),
                "question": f"Who holds {thing}?",
                "answers": answers,
            }
        )
    return table


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(data, lm):
    """(folder, standard error) of a run of 12 steps with the preset's architecture."""
    folder = data.parent / "run"
    done = lm("train", data, "-o", folder, "--preset", "qa", *SMALL, "--steps", 12, "--threads", 1)
    assert done.returncode == 0, done.stderr.decode()
    return folder, done.stderr.decode()


def lines(done):
    assert done.returncode == 0, done.stderr.decode()
    return [line.split("\t") for line in done.stdout.decode().split("\n")[:-1]]


def test_figures_are_reported_and_recorded(run):
    folder, message = run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["train"]["objective"] == "span" and recipe["data"]["answers"] == "answers"
    assert (
        "span objective" in message
        and "contexts have no room in 28 tokens: they are read in windows" in message
    )
    result = recipe["result"]
    assert (
        f"{result['val_loss']:.4f} nats/position (guessing: {result['val_guessing']:.3f})"
        in message
    )
    assert f"{result['val_exact_match']:.1%} exact · F1 {result['val_f1']:.1%}" in message
    assert result["val_questions"] == 6 and result["val_targets"] > 12
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    card = (folder / "README.md").read_text()
    assert (
        "ModernBertForQuestionAnswering" in card
        and f"| exact match | {result['val_exact_match']:.1%} |" in card
    )


def test_the_figures_match_lm_classify(run, inside, tmp_path):
    from lmcli.data.squad import exact_match, token_f1

    folder, _ = run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (held_out,) = recipe["validation"]
    text = Path(held_out["file"]).read_bytes()
    spans = [map(int, span.split("-")) for span in held_out["ranges"].split()]
    (tmp_path / "held.jsonl").write_bytes(b"".join(text[a:b] + b"\n" for a, b in spans))
    validation_rows = list(map(json.loads, (tmp_path / "held.jsonl").read_text().splitlines()))
    table = [
        json.loads(line)["answer"]
        for line in inside(
            "classify", "-m", folder, "--json", tmp_path / "held.jsonl"
        ).stdout.splitlines()
    ]
    gold = [[answer["text"] for answer in row["answers"]] for row in validation_rows]
    result = recipe["result"]
    assert result["val_exact_match"] == pytest.approx(sum(map(exact_match, table, gold)) / 6)
    assert result["val_f1"] == pytest.approx(sum(map(token_f1, table, gold)) / 6)


def test_transformers_loads_the_folder_as_it_is(run):
    import transformers

    kind = transformers.ModernBertForQuestionAnswering
    _, message = kind.from_pretrained(run[0], output_loading_info=True)
    assert not any(message[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_run_stopped_after_a_step_resumes_to_the_same_bits(
    data, run, inside, stopped_after_five, tmp_path
):
    stopped = stopped_after_five(
        "train",
        data,
        "-o",
        tmp_path / "run",
        "--preset",
        "qa",
        *SMALL,
        "--steps",
        12,
        "--threads",
        1,
    )
    assert stopped.returncode == 130
    assert inside("train", "--resume", tmp_path / "run", "--threads", 1).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        run[0] / "model.safetensors"
    ).read_bytes()


def test_one_answer_per_line_with_its_bytes(run, rows, data, inside):
    table = lines(inside("classify", "-m", run[0], "--threshold", 1, data))
    assert table[0] == ["answer", "score", "start", "end", "question"] and len(table) == 61
    for row, (answer, score, start, end, question) in zip(rows, table[1:]):
        assert (
            row["context"].encode()[int(start) : int(end)].decode() == answer
            and question == row["question"]
        )
        assert 0 < float(score) < 1
    never = lines(inside("classify", "-m", run[0], "--threshold", 0, "--no-header", data))
    assert never[0] == ["NA"] * 4 + [rows[0]["question"]] and len(never) == 60


def test_the_likeliest_answers_side_by_side_and_as_json(run, rows, data, inside):
    table = lines(inside("classify", "-m", run[0], "--top", 2, "--max-answer-tokens", 3, data))
    assert table[0] == [
        "answer_1",
        "score_1",
        "start_1",
        "end_1",
        "answer_2",
        "score_2",
        "start_2",
        "end_2",
        "question",
    ]
    assert all(float(row[1]) >= float(row[5]) for row in table[1:])
    done = inside("classify", "-m", run[0], "--top", 2, "--max-answer-tokens", 3, "--json", data)
    first = json.loads(done.stdout.splitlines()[0])
    assert (first["id"], first["answers"], first["truncated"]) == (0, rows[0]["answers"], False)
    assert [one["answer"] for one in first["candidates"]] == [
        table[1][0],
        table[1][4],
    ] and 0 < first["no_answer"] < 1
    assert {"answer", "score", "start", "end"} <= first.keys()


def test_fields_of_other_names_and_tables(run, inside, tmp_path):
    (tmp_path / "t.tsv").write_text(
        "passage\tq\nAnna holds a clock.\tWho holds a clock?\n\tWho?\nAnna sits.\t\n"
    )
    named = ("--field", "passage", "--field", "q")
    table = lines(inside("classify", "-m", run[0], *named, "--threshold", 1, tmp_path / "t.tsv"))
    assert table[1][4] == "Who holds a clock?" and table[1][0] in "Anna holds a clock."
    assert table[2:] == [["NA"] * 4 + ["Who?"], ["NA"] * 4 + [""]]
    done = inside("classify", "-m", run[0], "--field", "q", tmp_path / "t.tsv")
    assert (
        done.returncode == 2
        and b"a question needs two fields, context and question; got 1" in done.stderr
    )


@pytest.mark.parametrize(
    "options, message",
    [(("--logits",), "gives no labels"), (("--per", "token"), "gives no labels")],
)
def test_options_of_labels_are_refused(run, data, inside, options, message):
    done = inside("classify", "-m", run[0], *options, data)
    assert done.returncode == 2 and message in done.stderr.decode()


def test_bad_records_and_long_questions_stop_or_are_counted(run, inside, tmp_path):
    (tmp_path / "b.jsonl").write_text(
        '{"context": "Anna sits.", "question": "Who?"}\n{"question": "x"}\n'
        + json.dumps({"context": "Anna sits.", "question": "who " * 60})
        + "\n"
    )
    done = inside("classify", "-m", run[0], tmp_path / "b.jsonl")
    assert done.returncode == 1 and b"line 2: field 'context' is missing" in done.stderr
    done = inside("classify", "-m", run[0], "--on-error", "blank", tmp_path / "b.jsonl")
    assert (
        lines(done)[2] == ["NA"] * 4 + [""] and b"1 record longer than the context" in done.stderr
    )
    assert (
        inside(
            "classify",
            "-m",
            run[0],
            "--on-error",
            "skip",
            "--on-long",
            "error",
            tmp_path / "b.jsonl",
        ).returncode
        == 1
    )
    done = inside("classify", "-m", run[0], stdin=b"Who?\n")
    assert (
        done.returncode == 1
        and b"standard input, line 1: is plain text: a question is a row with" in done.stderr
    )


def test_a_published_bert_learns_answers_with_a_new_head(berts, data, inside, tmp_path):
    done = inside(
        "train",
        data,
        "--preset",
        "qa",
        "--from",
        berts / "bare",
        "-o",
        tmp_path / "run",
        "--steps",
        2,
        "--set",
        "train.batch_tokens=256",
    )
    message = done.stderr.decode()
    assert (
        done.returncode == 0 and "the head is new: head.output.weight, head.output.bias" in message
    )
    assert "context is 24 tokens, all that" in message
    table = lines(inside("classify", "-m", tmp_path / "run", "--threshold", 1, data))
    assert len(table) == 61
    again = inside(
        "train", data, "--from", tmp_path / "run", "-o", tmp_path / "again", "--steps", 1
    )
    assert (
        again.returncode == 0
        and b"span objective" in again.stderr
        and b"the head is new" not in again.stderr
    )


@pytest.mark.parametrize(
    "text, more, code, message",
    [
        (
            '{"context": "Anna sits.", "question": "Who?", '
            '"answers": [{"text": "Anna", "answer_start": 2}]}\n',
            (),
            1,
            "line 1: answer 'Anna' is not at character 2 of the context, but 'na s'",
        ),
        (
            '{"context": "Anna sits.", "question": "", "answers": []}\n',
            (),
            1,
            "line 1: field 'question' is empty",
        ),
        (
            "Anna sits.\n",
            ("--format", "text"),
            2,
            "answers are learned from rows with context, question and answers",
        ),
        (
            '{"context": "Anna sits.", "question": "Who?", "answers": []}\n',
            ("--field", "context"),
            2,
            "try --fields context=context,question=question,answers=answers",
        ),
    ],
)
def test_bad_training_rows_are_reported_in_one_line(inside, tmp_path, text, more, code, message):
    (tmp_path / "bad.jsonl").write_text(text)
    done = inside(
        "train",
        tmp_path / "bad.jsonl",
        "-o",
        tmp_path / "run",
        "--preset",
        "qa",
        *SMALL,
        *more,
        "--steps",
        1,
    )
    assert (
        done.returncode == code
        and message in done.stderr.decode()
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("complete", [0, 1, 2.5, 61])
def test_continue_gives_the_same_file(run, data, inside, tmp_path, complete):
    whole = inside("classify", "-m", run[0], data).stdout
    rows = whole.splitlines(keepends=True)
    (tmp_path / "out.part").write_bytes(
        b"".join(rows[: int(complete)]) + (rows[int(complete)][:3] if complete % 1 else b"")
    )
    done = inside("classify", "-m", run[0], "-o", tmp_path / "out", "--continue", data)
    assert done.returncode == 0 and (tmp_path / "out").read_bytes() == whole
