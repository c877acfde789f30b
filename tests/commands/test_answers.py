"""`lm train` on questions and `lm classify` with what came of it, as a shell sees them."""

import json
import random

import pytest
import yaml

SMALL = ("--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=2", "--set", "model.num_attention_heads=4",
         "--set", "tokenizer.vocab_size=400", "--set", "train.context=28",
         "--set", "train.learning_rate=0.01", "--set", "train.batch_tokens=512")
NAMES = ("Anna", "Björn", "Clara", "David", "Emil", "Frida")
THINGS = ("a clock", "two loaves", "the old map", "five books")


@pytest.fixture(scope="module")
def rows():
    """Questions who holds something, some of them without an answer."""
    draw, found = random.Random(0), []
    for i in range(60):
        people = draw.sample(NAMES, 4)
        context = " ".join(f"{name} holds {thing}." for name, thing in zip(people, THINGS))
        thing = draw.choice(THINGS)
        name = people[THINGS.index(thing)]
        answers = [{"text": name, "answer_start": context.index(name)}] if i % 6 else []
        found.append({"id": i, "context": context if answers else context.replace(thing, "nothing"),
                      "question": f"Who holds {thing}?", "answers": answers})
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(data, lm):
    """(folder, what was said) of a run of 12 steps on the preset's architecture."""
    folder = data.parent / "run"
    done = lm("train", data, "-o", folder, "--preset", "qa", *SMALL, "--steps", 12, "--threads", 1)
    assert done.returncode == 0, done.stderr.decode()
    return folder, done.stderr.decode()


def lines(done):
    assert done.returncode == 0, done.stderr.decode()
    return [line.split("\t") for line in done.stdout.decode().split("\n")[:-1]]


def test_figures_are_told_and_kept(run):
    folder, told = run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["train"]["objective"] == "span" and recipe["data"]["answers"] == "answers"
    assert "span objective" in told and "contexts have no room in 28 tokens: they are read in windows" in told
    result = recipe["result"]
    assert f"{result['val_loss']:.4f} nats/position (guessing: {result['val_guessing']:.3f})" in told
    assert f"{result['val_exact_match']:.1%} exact · F1 {result['val_f1']:.1%}" in told
    assert result["val_questions"] == 6 and result["val_targets"] > 12
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    card = (folder / "README.md").read_text()
    assert "question-answering" in card and f"| exact match | {result['val_exact_match']:.1%} |" in card


def test_the_figures_are_those_of_lm_classify(run, rows, inside, tmp_path):
    from lmcli.text.answers import exact_match, token_f1

    folder, _ = run
    held = rows[9::10]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    found = [json.loads(line)["answer"] for line in
             inside("classify", "-m", folder, "--json", tmp_path / "held.jsonl").stdout.splitlines()]
    right = [[answer["text"] for answer in row["answers"]] for row in held]
    result = yaml.safe_load((folder / "recipe.yaml").read_text())["result"]
    assert result["val_exact_match"] == pytest.approx(sum(map(exact_match, found, right)) / 6)
    assert result["val_f1"] == pytest.approx(sum(map(token_f1, found, right)) / 6)


def test_transformers_loads_the_folder_as_it_is(run):
    import transformers

    kind = transformers.ModernBertForQuestionAnswering
    _, told = kind.from_pretrained(run[0], output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_run_stopped_after_a_step_resumes_to_the_same_bits(data, run, inside, stopped_after_five, tmp_path):
    stopped = stopped_after_five("train", data, "-o", tmp_path / "run", "--preset", "qa", *SMALL, "--steps", 12,
                                 "--threads", 1)
    assert stopped.returncode == 130
    assert inside("train", "--resume", tmp_path / "run", "--threads", 1).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run[0] / "model.safetensors").read_bytes()


def test_an_answer_a_line_with_its_bytes(run, rows, data, inside):
    found = lines(inside("classify", "-m", run[0], "--threshold", 1, data))
    assert found[0] == ["answer", "score", "start", "end", "question"] and len(found) == 61
    for row, (answer, score, start, end, question) in zip(rows, found[1:]):
        assert row["context"].encode()[int(start):int(end)].decode() == answer and question == row["question"]
        assert 0 < float(score) < 1
    never = lines(inside("classify", "-m", run[0], "--threshold", 0, "--no-header", data))
    assert never[0] == ["NA"] * 4 + [rows[0]["question"]] and len(never) == 60


def test_the_likeliest_answers_side_by_side_and_as_json(run, rows, data, inside):
    found = lines(inside("classify", "-m", run[0], "--top", 2, "--max-answer-tokens", 3, data))
    assert found[0] == ["answer_1", "score_1", "start_1", "end_1", "answer_2", "score_2", "start_2", "end_2", "question"]
    assert all(float(row[1]) >= float(row[5]) for row in found[1:])
    done = inside("classify", "-m", run[0], "--top", 2, "--max-answer-tokens", 3, "--json", data)
    first = json.loads(done.stdout.splitlines()[0])
    assert (first["id"], first["answers"], first["truncated"]) == (0, rows[0]["answers"], False)
    assert [one["answer"] for one in first["candidates"]] == [found[1][0], found[1][4]] and 0 < first["no_answer"] < 1
    assert {"answer", "score", "start", "end"} <= first.keys()


def test_fields_of_other_names_and_tables(run, inside, tmp_path):
    (tmp_path / "t.tsv").write_text("passage\tq\nAnna holds a clock.\tWho holds a clock?\n\tWho?\nAnna sits.\t\n")
    named = ("--field", "passage", "--field", "q")
    found = lines(inside("classify", "-m", run[0], *named, "--threshold", 1, tmp_path / "t.tsv"))
    assert found[1][4] == "Who holds a clock?" and found[1][0] in "Anna holds a clock."
    assert found[2:] == [["NA"] * 4 + ["Who?"], ["NA"] * 4 + [""]]
    done = inside("classify", "-m", run[0], "--field", "q", tmp_path / "t.tsv")
    assert done.returncode == 2 and b"1 fields were named, a question has 2" in done.stderr


@pytest.mark.parametrize("options, told", [(("--logits",), "gives no labels"), (("--per", "token"), "gives no labels")])
def test_what_answers_have_not_is_usage(run, data, inside, options, told):
    done = inside("classify", "-m", run[0], *options, data)
    assert done.returncode == 2 and told in done.stderr.decode()


def test_bad_records_and_long_questions_stop_or_are_counted(run, inside, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"context": "Anna sits.", "question": "Who?"}\n{"question": "x"}\n' + json.dumps(
        {"context": "Anna sits.", "question": "who " * 60}) + "\n")
    done = inside("classify", "-m", run[0], tmp_path / "b.jsonl")
    assert done.returncode == 1 and b"line 2: field 'context' is missing" in done.stderr
    done = inside("classify", "-m", run[0], "--on-error", "blank", tmp_path / "b.jsonl")
    assert lines(done)[2] == ["NA"] * 4 + [""] and b"1 record is longer than the context" in done.stderr
    assert inside("classify", "-m", run[0], "--on-error", "skip", "--on-long", "error", tmp_path / "b.jsonl").returncode == 1
    done = inside("classify", "-m", run[0], stdin=b"Who?\n")
    assert done.returncode == 1 and b"standard input, line 1: is plain text: a question is a row with" in done.stderr


def test_a_bert_that_others_trained_learns_it_with_a_new_head(berts, data, inside, tmp_path):
    done = inside("train", data, "--preset", "qa", "--from", berts / "bare", "-o", tmp_path / "run", "--steps", 2,
                  "--set", "train.batch_tokens=256")
    told = done.stderr.decode()
    assert done.returncode == 0 and "the head is new: head.output.weight, head.output.bias" in told
    assert "context is 24 tokens, all that" in told
    found = lines(inside("classify", "-m", tmp_path / "run", "--threshold", 1, data))
    assert len(found) == 61
    again = inside("train", data, "--from", tmp_path / "run", "-o", tmp_path / "again", "--steps", 1)
    assert again.returncode == 0 and b"span objective" in again.stderr and b"the head is new" not in again.stderr


@pytest.mark.parametrize("text, more, code, told", [
    ('{"context": "Anna sits.", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 2}]}\n', (), 1,
     "line 1: answer 'Anna' does not stand at character 2 of the context, 'na s' does"),
    ('{"context": "Anna sits.", "question": "", "answers": []}\n', (), 1, "line 1: field 'question' is empty"),
    ("Anna sits.\n", ("--format", "text"), 1, "answers are learnt from rows with three fields"),
    ('{"context": "Anna sits.", "question": "Who?", "answers": []}\n', ("--field", "context"), 1, "rows with three fields")])
def test_what_cannot_be_learnt_is_told_in_a_line(inside, tmp_path, text, more, code, told):
    (tmp_path / "bad.jsonl").write_text(text)
    done = inside("train", tmp_path / "bad.jsonl", "-o", tmp_path / "run", "--preset", "qa", *SMALL, *more, "--steps", 1)
    assert done.returncode == code and told in done.stderr.decode() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0, 1, 2.5, 61])
def test_going_on_with_a_part_gives_the_same_file(run, data, inside, tmp_path, kept):
    whole = inside("classify", "-m", run[0], data).stdout
    rows = whole.splitlines(keepends=True)
    (tmp_path / "out.part").write_bytes(b"".join(rows[:int(kept)]) + (rows[int(kept)][:3] if kept % 1 else b""))
    done = inside("classify", "-m", run[0], "-o", tmp_path / "out", "--continue", data)
    assert done.returncode == 0 and (tmp_path / "out").read_bytes() == whole
