"""`lm evaluate`: figures of predictions and of models, comparisons, and errors."""

import json
import os
import pty
import subprocess
import sys

import pytest

ROWS = [
    {"text": "The baker went home.", "label": "good", "by": "a"},
    {"text": "A b c", "label": "bad", "by": "b"},
    {"text": "she said no", "label": "good", "by": "a"},
    {"text": "went", "label": "bad", "by": 3},
    {"text": "", "label": "so so", "by": None},
]


@pytest.fixture
def file(tmp_path):
    """file(name, *rows): a file of lines; rows that are not text are written as JSON."""

    def make(name: str, *rows) -> str:
        path = tmp_path / name
        path.write_text(
            "".join(
                (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
                for row in rows
            )
        )
        return str(path)

    return make


@pytest.fixture(scope="module")
def classifier(small_model, small_tokenizer, tmp_path_factory):
    """classifier(seed=0, **config): the folder of a small random BERT with three labels."""
    from lmcli.checkpoints import folder as checkpoints
    from lmcli.checkpoints.families import FAMILIES
    from lmcli.config import GenerateConfig

    models = {}

    def build(seed: int = 0, head: str = "sequence", **options):
        key = (seed, head, *options.items())
        if key not in models:
            family = FAMILIES["bert"]
            chosen = {
                key: value
                for choices in family.choices.values()
                for key, value in choices[0][1].items()
            }
            model = small_model(
                seed,
                **{
                    **family.options_for(head),
                    **chosen,
                    "model_type": "bert",
                    "shape": "encoder",
                    "head": head,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 24,
                    "vocab_size": 400,
                    "labels": ("bad", "good", "so so") if head == "sequence" else (),
                    **options,
                },
            )
            models[key] = tmp_path_factory.mktemp(head)
            checkpoints.save(models[key], model, small_tokenizer, GenerateConfig())
        return models[key]

    return build


def table(done) -> list[dict[str, str]]:
    """The lines of a TSV as {column: cell}."""
    assert done.returncode == 0, done.stderr.decode()
    header, *lines = (line.split("\t") for line in done.stdout.decode().splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def values(lines, **where) -> dict[str, str]:
    """{metric: value} of the lines with these cells."""
    return {
        line["metric"]: line["value"]
        for line in lines
        if all(line[key] == value for key, value in where.items())
    }


def test_figures_of_predictions_for_labels(inside, file):
    done = inside(
        "evaluate",
        file("rows.jsonl", *ROWS),
        "--predictions",
        file("p.txt", "good", "bad", "bad", "bad", ""),
    )
    output = values(table(done), label="NA")
    assert (
        output["records"],
        output["empty"],
        output["accuracy"],
        output["majority_accuracy"],
    ) == ("5", "1", "0.6", "0.4")
    bad = values(table(done), label="bad", given="NA")
    assert (bad["precision"], bad["recall"], bad["f1"]) == ("0.666667", "1", "0.8")
    assert values(table(done), label="so so")["precision"] == "NA"  # never predicted: NA, not 0
    confusion = {
        (line["label"], line["given"]): line["value"]
        for line in table(done)
        if line["metric"] == "confusion"
    }
    assert confusion == {
        ("good", "good"): "1",
        ("good", "bad"): "1",
        ("bad", "bad"): "2",
        ("so so", "NA"): "1",
    }
    message = done.stderr.decode()
    assert "1 of 5 predictions are empty" in message and "averages count as 0: so so" in message
    accuracy = next(line for line in table(done) if line["metric"] == "accuracy")
    assert 0 <= float(accuracy["low"]) < 0.6 < float(accuracy["high"]) <= 1
    assert (
        inside(
            "evaluate",
            file("rows.jsonl", *ROWS),
            "--predictions",
            file("p.txt", *["bad"] * 5),
            "-q",
        ).stderr
        == b""
    )


def test_labels_in_plain_lines(inside, file):
    right, predictions = file("right.txt", "1", "0", "1"), file("given.txt", "1", "0", "0")
    done = inside(
        "evaluate",
        "--task",
        "classify",
        "--references",
        right,
        "--predictions",
        predictions,
        "--metric",
        "accuracy",
    )
    assert values(table(done))["accuracy"] == "0.666667"
    done = inside(
        "evaluate",
        "--task",
        "classify",
        "--references",
        file("gap.txt", "1", ""),
        "--predictions",
        predictions,
    )
    assert done.returncode == 1 and b"gap.txt, line 2: field 'text' has no label" in done.stderr


def test_json_is_one_object(inside, file):
    done = inside(
        "evaluate",
        file("rows.jsonl", *ROWS),
        "--json",
        "--predictions",
        file("p.txt", *["bad"] * 5),
    )
    (output,) = map(json.loads, done.stdout.splitlines())
    assert output["task"] == "classify" and output["figures"]["accuracy"]["value"] == 0.4
    assert output["confusion"] == {
        "labels": ["bad", "good", "so so"],
        "counts": [[2, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0]],
    }
    assert output["labels"]["good"]["precision"] == {"value": None, "low": None, "high": None}
    assert output["figures"]["mcc"]["value"] is None  # only one label was predicted
    assert (output["resamples"], output["seed"], output["signatures"]) == (1000, 0, {})


def test_two_files_of_predictions_are_compared(inside, file):
    rows = file("rows.jsonl", *[{"text": "a", "label": label} for label in ["x", "y"] * 10])
    first, second = file("first.txt", *["x"] * 20), file("second.txt", *["x", "y"] * 9, "x", "x")
    output = table(inside("evaluate", rows, "--predictions", first, "--predictions", second))
    accuracy = [line for line in output if line["metric"] == "accuracy"]
    assert [line["value"] for line in accuracy] == ["0.5", "0.95"] and accuracy[0][
        "difference"
    ] == "NA"
    assert (accuracy[1]["difference"], accuracy[1]["p"], accuracy[1]["test"]) == (
        "0.45",
        "0.00390625",
        "mcnemar",
    )  # 2/2⁹
    assert (
        0.1
        < float(accuracy[1]["difference_low"])
        < 0.45
        < float(accuracy[1]["difference_high"])
        < 0.8
    )
    f1 = next(line for line in output if line["metric"] == "f1_macro" and line["system"] == second)
    assert f1["test"] == "randomization" and float(f1["p"]) < 0.02
    again = inside("evaluate", rows, "--predictions", first, "--predictions", second)
    assert table(again) == output  # the seed is fixed
    other = inside("evaluate", rows, "--predictions", first, "--predictions", second, "--seed", 1)
    assert table(other) != output
    none = table(
        inside("evaluate", rows, "--predictions", first, "--predictions", second, "--resamples", 0)
    )
    assert {line["low"] for line in none} == {line["p"] for line in none} == {"NA"}


def test_groups(inside, file):
    done = inside(
        "evaluate",
        file("rows.jsonl", *ROWS),
        "--by",
        "by",
        "--predictions",
        file("p.txt", *["good"] * 5),
    )
    output = table(done)
    assert list(dict.fromkeys(line["group"] for line in output)) == ["3", "NA", "a", "b", "(all)"]
    assert [values(output, group=group)["accuracy"] for group in ("a", "b", "(all)")] == [
        "1",
        "0",
        "0.4",
    ]
    assert values(output, group="a")["records"] == "2"


def test_metric_selects_figures_and_suggests_the_nearest_name(inside, file):
    arguments = (
        "evaluate",
        file("rows.jsonl", *ROWS),
        "--predictions",
        file("p.txt", *["bad"] * 5),
    )
    output = {
        line["metric"]
        for line in table(inside(*arguments, "--metric", "accuracy", "--metric", "f1_macro"))
    }
    assert output == {"records", "empty", "majority_accuracy", "accuracy", "f1_macro"}
    assert "f1_micro" in values(table(inside(*arguments, "--metric", "f1")))
    done = inside(*arguments, "--metric", "acuracy")
    assert done.returncode == 2 and b"did you mean 'accuracy'?" in done.stderr
    assert inside(*arguments, "--metric", "bleu").returncode == 2


def test_figures_of_texts(inside, file):
    pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    texts = [
        "Ein Mann mit einem orangefarbenen Hut.",
        "Zwei Hunde laufen über das Gras.",
        "Nichts davon ist wahr.",
    ]
    right, copy = file("right.txt", *texts), file("copy.txt", *texts)
    done = inside(
        "evaluate",
        "--references",
        right,
        "--predictions",
        copy,
        "--metric",
        "bleu",
        "--metric",
        "chrf",
    )
    assert values(table(done))["bleu"] == values(table(done))["chrf"] == "100"
    assert b"bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in done.stderr
    rows = file("rows.jsonl", *({"source": "x", "target": text} for text in texts))
    output = values(
        table(
            inside("evaluate", rows, "--predictions", file("p.txt", texts[0], "", "ist das wahr"))
        )
    )
    assert (
        0 < float(output["bleu"]) < 100
        and output["identical"] == "0.333333"
        and output["empty"] == "1"
    )
    done = inside(
        "evaluate", rows, "--predictions", copy, "--bleu-tokenizer", "char", "--metric", "bleu"
    )
    assert b"tok:char" in done.stderr


def test_the_signature_of_rouge_names_the_stemmer(inside, file):
    pytest.importorskip("rouge_score", reason="pip install 'lmcli[eval]'")
    rows = file(
        "rows.jsonl",
        {"document": "x", "summary": "two cats running"},
        {"document": "y", "summary": ""},
    )
    for option, figure in (
        ("--no-stemmer", "0.166667"),
        ("--stemmer", "0.333333"),
    ):  # cats is cat then
        done = inside(
            "evaluate",
            rows,
            "--predictions",
            file("p.txt", "two cat ran", ""),
            option,
            "--metric",
            "rouge1",
        )
        assert (
            values(table(done))["rouge1"] == figure
            and b"1 of 2 references are empty" in done.stderr
        )
        assert (b"stemmer:yes" if option == "--stemmer" else b"stemmer:no") in done.stderr
    assert set(values(table(done))) == {"records", "empty", "rouge1"}


def test_answers(inside, file):
    rows = file(
        "rows.jsonl",
        {
            "question": "q",
            "context": "c",
            "answers": [{"text": "the Eiffel Tower", "answer_start": 0}],
        },
        {
            "question": "q",
            "context": "c",
            "answers": {"text": ["1889", "in 1889"], "answer_start": [0, 1]},
        },
    )
    done = inside(
        "evaluate",
        rows,
        "--predictions",
        file("p.jsonl", {"text": "Eiffel tower!"}, {"text": "May 1889"}),
    )
    output = values(table(done))
    assert (output["exact_match"], output["token_f1"]) == (
        "0.5",
        "0.833333",
    ) and b"squad: version:1.1" in done.stderr
    rows = file(
        "more.jsonl",
        {"question": "q", "context": "c", "answers": []},
        {"question": "q", "context": "c", "answers": ["x"]},
    )
    done = inside("evaluate", rows, "--predictions", file("p.txt", "", "y"))
    output = values(table(done))
    assert (
        output["exact_match"],
        output["exact_match_unanswerable"],
        output["exact_match_answerable"],
    ) == ("0.5", "1", "0")
    assert b"version:2.0" in done.stderr


def test_multi_label_predictions(inside, file):
    rows = file(
        "rows.jsonl",
        {"text": "a", "labels": ["x", "y"]},
        {"text": "b", "labels": []},
        {"text": "c", "labels": ["x"]},
    )
    output = values(table(inside("evaluate", rows, "--predictions", file("p.txt", "y,x", "", "y"))))
    assert (
        output["exact_set"] == "0.666667"
        and "accuracy" not in output
        and "mcc" not in output
        and "confusion" not in output
    )


def test_one_class_and_one_record(inside, file):
    done = inside("evaluate", file("rows.jsonl", ROWS[0]), "--predictions", file("p.txt", "good"))
    output = values(table(done), label="NA")
    assert (output["accuracy"], output["mcc"]) == ("1", "NA")
    # the rates of one record have an interval, figures by the bootstrap have none
    intervals = {line["metric"]: (line["low"], line["high"]) for line in table(done)}
    assert intervals["f1_macro"] == intervals["mcc"] == ("NA", "NA")
    assert intervals["accuracy"] == intervals["recall"] == ("0.206549", "1")


@pytest.mark.parametrize(
    "rows, lines, message",
    [
        (
            5,
            3,
            [
                "p.txt: 3 predictions for 5 records",
                "the first without one is",
                "rows.jsonl, line 4",
            ],
        ),
        (
            2,
            3,
            [
                "p.txt: 3 predictions for 2 records",
                "the first without a record is",
                "p.txt, line 3",
            ],
        ),
    ],
)
def test_files_of_different_length(inside, file, rows, lines, message):
    done = inside(
        "evaluate",
        file("rows.jsonl", *ROWS[:rows]),
        "--predictions",
        file("p.txt", *["good"] * lines),
    )
    assert (
        done.returncode == 1
        and done.stdout == b""
        and all(text in done.stderr.decode() for text in message)
    )
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["empty.jsonl", "--predictions", "p.txt"], 1, "empty.jsonl: no records in it"),
        (["odd.jsonl", "--predictions", "p.txt"], 2, "which task? a row with 'a' does not show it"),
        (
            ["odd.jsonl", "--predictions", "p.txt", "--task", "qa"],
            1,
            "odd.jsonl, line 1: no reference",
        ),
        (
            ["bad.jsonl", "--predictions", "p.txt", "--task", "qa"],
            1,
            "bad.jsonl, line 1: invalid JSON",
        ),
        (["none.jsonl", "--predictions", "p.txt"], 1, "none.jsonl: no such file"),
        (["rows.jsonl", "--predictions", "none.txt"], 1, "none.txt: cannot read"),
        (["rows.jsonl"], 2, "rows.jsonl, line 1: this record has no prediction"),
        (
            ["--references", "p.txt", "--predictions", "p.txt"],
            2,
            "which task? plain text does not show it",
        ),
        (
            ["--references", "p.txt", "--predictions", "p.txt", "--metric", "blue"],
            2,
            "did you mean 'bleu'?",
        ),
        (
            ["rows.jsonl", "--predictions", "p.txt", "--by", "topic"],
            1,
            "no field 'topic' to group by",
        ),
        (
            ["rows.jsonl", "--predictions", "p.txt", "--pairs", "--task", "qa"],
            2,
            "exclude each other",
        ),
        (["rows.jsonl", "--predictions", "p.txt", "--pairs"], 1, "no pair of fields"),
        (["--predictions", "-"], 2, "standard input has the predictions"),
        (["rows.jsonl", "-m", "none"], 1, "none"),
    ],
)
def test_errors_are_reported_in_two_lines(
    inside, file, tmp_path, monkeypatch, arguments, code, message
):
    (
        file("rows.jsonl", *ROWS),
        file("p.txt", "good"),
        file("empty.jsonl"),
        file("odd.jsonl", {"a": 1}),
    )
    file("bad.jsonl", "{")
    monkeypatch.chdir(tmp_path)
    done = inside("evaluate", *arguments)
    assert (done.returncode, done.stdout) == (code, b"") and message in done.stderr.decode()
    assert done.stderr.count(b"\n") <= 2


def test_a_classifier_and_its_own_predictions_agree(inside, file, classifier):
    rows = file("rows.jsonl", *ROWS)
    written = inside("classify", "-m", classifier(), "--json", rows).stdout
    output = table(inside("evaluate", "-m", classifier(), rows))
    piped = table(inside("evaluate", "--format", "jsonl", stdin=written))
    lines = table(
        inside(
            "evaluate",
            rows,
            "--predictions",
            file(
                "p.tsv", *inside("classify", "-m", classifier(), rows).stdout.decode().splitlines()
            ),
        )
    )
    costs = {"parameters", "disk_bytes", "memory_bytes", "records_per_second"}
    assert [line for line in output if line["metric"] not in costs] == piped == lines
    message = values(output)
    assert (
        int(message["parameters"]) > 1000
        and int(message["disk_bytes"]) > 4 * int(message["parameters"]) * 0.9
    )
    assert float(message["records_per_second"]) > 0 and (
        message["memory_bytes"] == "NA" or int(message["memory_bytes"]) > 10**7
    )
    assert values(piped)["empty"] == "1"  # the blank one


def test_models_side_by_side(inside, file, classifier):
    rows = file("rows.jsonl", *ROWS * 4)
    output = table(inside("evaluate", "-m", classifier(), "-m", classifier(1), rows))
    one, two = (values(output, system=str(classifier(seed))) for seed in (0, 1))
    single = values(table(inside("evaluate", "-m", classifier(1), rows)))
    assert two["accuracy"] == single["accuracy"] and one["parameters"] == two["parameters"]
    paired = next(
        line for line in output if line["metric"] == "accuracy" and line["difference"] != "NA"
    )
    assert float(paired["difference"]) == pytest.approx(
        float(two["accuracy"]) - float(one["accuracy"]), abs=1e-5
    )
    assert 0 < float(paired["p"]) <= 1


def test_lm_model_is_ignored_if_there_are_predictions(inside, file, classifier, monkeypatch):
    monkeypatch.setenv("LM_MODEL", str(classifier()))
    rows, lines = file("rows.jsonl", *ROWS), file("p.txt", *["bad"] * 5)
    predicted = file("said.jsonl", *({**row, "prediction": "bad"} for row in ROWS))
    for arguments in ((rows, "--predictions", lines), (predicted,)):
        output = values(table(inside("evaluate", *arguments)))
        assert output["accuracy"] == "0.4" and "parameters" not in output
    assert "parameters" in values(table(inside("evaluate", rows)))
    assert "parameters" in values(table(inside("evaluate", "-m", classifier(), predicted)))


def test_labels_and_inputs_that_a_model_cannot_use(inside, file, classifier):
    rows = file("rows.jsonl", ROWS[0], {"text": "a", "label": "great"})
    done = inside("evaluate", "-m", classifier(), rows)
    assert done.returncode == 1 and done.stdout == b""
    message = done.stderr.decode()
    assert (
        "rows.jsonl, line 2: label 'great' is not one of the model's labels" in message
        and "bad, good, so so" in message
    )
    done = inside("evaluate", "-m", classifier(), file("labels.txt", "good"), "--task", "classify")
    assert (
        done.returncode == 1
        and b"labels.txt, line 1: no input for the model: this plain line is read as the reference"
        in done.stderr
    )
    output = values(
        table(
            inside(
                "evaluate",
                "-m",
                classifier(),
                "--references",
                file("labels.txt", "good", "bad"),
                file("texts.txt", "The baker", "went home"),
            )
        )
    )
    assert output["records"] == "2"
    done = inside(
        "evaluate", "-m", classifier(), file("odd.jsonl", {"sentence": "a", "label": "good"})
    )
    assert done.returncode == 1 and b"no field 'text'" in done.stderr and b"--field" in done.stderr
    odd = file("odd.jsonl", {"sentence": "a", "label": "good"})
    assert (
        values(table(inside("evaluate", "-m", classifier(), "--field", "sentence", odd)))["records"]
        == "1"
    )


@pytest.mark.parametrize(
    "head, row, message",
    [
        (
            "sequence",
            {"source": "a", "target": "b"},
            "the task translate needs an encoder–decoder or a language model",
        ),
        (
            "sequence",
            {"question": "a", "context": "b", "answers": []},
            "the task qa needs a question-answering model",
        ),
        ("lm", {"text": "a", "label": "b"}, "the task classify needs a classifier of texts"),
        ("span", {"good": "a", "bad": "b"}, "the task pairs needs a language model"),
    ],
)
def test_a_task_needs_a_model_of_the_right_shape(inside, file, classifier, head, row, message):
    done = inside("evaluate", "-m", classifier(head=head), file("rows.jsonl", row))
    assert (done.returncode, done.stdout) == (2, b"")
    assert (
        message in done.stderr.decode() and f"(shape encoder, head {head})" in done.stderr.decode()
    )
    assert done.stderr.count(b"\n") == 2


def test_a_multi_label_model(inside, file, classifier):
    multi_label = classifier(multi_label=True)
    rows = file(
        "rows.jsonl",
        {"text": "The baker", "labels": ["good", "bad"]},
        {"text": "went home", "labels": []},
    )
    output = table(inside("evaluate", "-m", multi_label, rows))
    assert "exact_set" in values(output)
    written = file(
        "p.txt", *inside("classify", "-m", multi_label, rows).stdout.decode().splitlines()
    )
    again = values(table(inside("evaluate", rows, "--predictions", written)))
    assert {name: value for name, value in values(output).items() if name in again} == again


def test_a_span_model_and_its_own_answers_agree(inside, file, berts):
    rows = file(
        "rows.jsonl",
        *(
            {
                "question": "Who went home?",
                "context": f"The baker went home, {name} did not.",
                "answers": [{"text": "The baker", "answer_start": 0}],
            }
            for name in ("Ada", "Grace")
        ),
    )
    direct = table(inside("evaluate", "-m", berts / "answers", rows))
    piped = table(
        inside(
            "evaluate",
            "--format",
            "jsonl",
            stdin=inside("classify", "-m", berts / "answers", "--json", rows).stdout,
        )
    )
    lines = table(
        inside(
            "evaluate",
            rows,
            "--predictions",
            file(
                "p.txt",
                *inside("classify", "-m", berts / "answers", rows).stdout.decode().splitlines(),
            ),
        )
    )
    assert piped == lines == [line for line in direct if line["metric"] in values(piped)]
    assert set(values(piped)) == {"records", "empty", "exact_match", "token_f1"}


def test_an_encoder_decoder_uses_the_beams_of_its_folder(inside, file, marian):
    pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    import lmcli

    sources = [
        "The baker went home.",
        "",
        "She said no, and no again, and again and again, and went home to the baker.",
    ]
    model = lmcli.load(marian, device="cpu")
    texts = model.generate([sources[0], sources[2]], seed=0, on_long="truncate")
    written = [output.text.strip() for output in texts]
    rows = file(
        "rows.jsonl",
        *(
            {"source": source, "target": target}
            for source, target in zip(sources, [written[0], "Nein.", "x"])
        ),
    )
    done = inside(
        "evaluate",
        "-m",
        marian,
        rows,
        "--metric",
        "identical",
        "--metric",
        "chrf",
        "--resamples",
        100,
    )
    output = values(table(done))
    assert (
        output["identical"] == ("0.333333" if written[1] != "x" else "0.666667")
        and int(output["empty"]) >= 1
    )
    assert b"1 of 3 records are longer than the context of 32 tokens" in done.stderr


def test_a_decoder_generates_greedily_and_judges_pairs(inside, file, trained):
    folder, _ = trained
    import lmcli

    model = lmcli.load(folder, device="cpu")
    text = model.generate("The baker", temperature=0.0, max_new_tokens=4)[0].text
    rows = file("rows.jsonl", {"prompt": "The baker", "completion": text})
    assert (
        values(table(inside("evaluate", "-m", folder, rows, "-n", 4, "--metric", "identical")))[
            "identical"
        ]
        == "1"
    )
    pairs = [
        {"good": "The baker went home.", "bad": "home went baker The.", "kind": "order"},
        {"good": "zqx", "bad": "the", "kind": "word"},
    ]
    blimp = file("pairs.jsonl", *pairs)
    rate = inside("score", "-m", folder, "--pairs", "--json", blimp)
    expected = [json.loads(line)["first_likelier"] for line in rate.stdout.splitlines()]
    output = table(inside("evaluate", "-m", folder, "--by", "kind", "--pairs", blimp))
    assert [values(output, group=kind)["first_likelier"] for kind in ("order", "word")] == [
        str(int(one)) for one in expected
    ]
    again = table(inside("evaluate", "--format", "jsonl", stdin=rate.stdout))
    assert values(again)["first_likelier"] == values(output, group="(all)")["first_likelier"]


@pytest.mark.parametrize(
    "name, field, metric, perfect",
    [
        ("translation/multi30k.test2016.en-de.jsonl", lambda row: row["target"], "bleu", "100"),
        ("qa/squad-dev-small.jsonl", lambda row: row["answers"][-1]["text"], "token_f1", "1"),
        ("classification/sst2.dev.jsonl", lambda row: row["label"], "mcc", "1"),
    ],
)
def test_the_references_score_perfectly_on_real_data(
    inside, file, shared, name, field, metric, perfect
):
    if metric == "bleu":
        pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    rows = [json.loads(line) for line in (shared / name).read_text().splitlines()]
    predictions = file("p.txt", *map(field, rows))
    output = table(
        inside("evaluate", shared / name, "--predictions", predictions, "--metric", metric)
    )
    (figure,) = (line for line in output if line["metric"] == metric)
    # all samples agree: the bootstrap says nothing about the spread
    assert (figure["value"], figure["low"], figure["high"]) == (perfect, "NA", "NA")
    assert values(output)["records"] == str(len(rows)) and values(output)["empty"] == "0"


def test_the_cost_of_models_is_shown_with_their_first_figure(inside, file, classifier):
    from lmcli.evaluation import systems
    from lmcli.evaluation.systems import LabelCounts, System
    from lmcli.evaluation.tasks import EVALUATION_TASKS
    from lmcli.output.evaluate import EvaluationFormat

    models = []
    for name, predictions in (("runs/a", "bad"), ("runs/b", "good")):
        models.append(
            System(
                name,
                LabelCounts(False),
                [],
                {
                    "parameters": 1234,
                    "disk_bytes": 5_000_000,
                    "memory_bytes": None,
                    "records_per_second": 12.345,
                },
            )
        )
        models[-1].counts.add([["good"], ["bad"], ["good"]], [[predictions]] * 3)
        models[-1].empty += [False] * 3
    results = list(systems.evaluate_systems(models, (), ("accuracy",), 100, 0))
    task = EVALUATION_TASKS["classify"]
    header, (first, second) = list(EvaluationFormat(task, True, False, 100, 0).tables(results))[-1]
    titles = [each if isinstance(each, str) else each.title for each in header]
    assert [title if isinstance(title, str) else title[0] for title in titles] == [
        "model",
        "accuracy",
        "95 % interval",
        "difference from a",
        "p",
        "parameters",
        "MB on disk",
        "MB of memory",
        "records/s",
    ]
    assert (
        first[0] == "a"
        and first[1] == ("0.3333", "0.333")
        and first[5:] == ["1,234", "5.0", "", "12.3"]
    )
    assert second[3][0].startswith("+0.3333 [") and second[4] == "1"


def test_tables_on_a_terminal(file, environment):
    rows, lines, other = (
        file("rows.jsonl", *ROWS),
        file("p.txt", *["bad"] * 5),
        file("q.txt", *["good"] * 4, ""),
    )
    command = [
        sys.executable,
        "-m",
        "lmcli",
        "evaluate",
        rows,
        "--predictions",
        lines,
        "--predictions",
        other,
        "-q",
    ]
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*command, "--by", "by"], stdout=follower, env={**environment, "COLUMNS": "120"}
    ) as process:
        os.close(follower)
        drawn = b""
        try:
            while chunk := os.read(leader, 1 << 16):
                drawn += chunk
        except OSError:
            pass  # how Linux tells the end of a terminal
        assert process.wait() == 0
    os.close(leader)
    text = drawn.decode()
    for part in (
        "95 % interval",
        "difference from p.txt",
        "majority_accuracy",
        "q.txt: true \\ predicted",
        "(none)",
        "precision",
    ):
        assert part in text, part


def test_a_closed_pipe_ends_the_command(file, piped):
    rows, lines = file("rows.jsonl", *ROWS), file("p.txt", *["bad"] * 5)
    done = piped(0, "evaluate", rows, "--predictions", lines, "-q")
    assert done.returncode == 141 and done.stderr == b""
