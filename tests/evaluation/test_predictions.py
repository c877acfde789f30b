"""Records to evaluate and their predictions: all forms they come in, and errors of bad ones."""

import json

import pytest

from lmcli.data.schema import TASK_SCHEMAS, answer_texts
from lmcli.errors import UsageError, UserError
from lmcli.evaluation.predictions import (
    EvalDataset,
    parse_prediction,
    with_predictions,
    zip_records,
)


@pytest.fixture
def file(tmp_path):
    """file(name, *rows): a file of lines; rows that are not strings are written as JSON."""

    def make(name: str, *rows) -> str:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
        return str(path)

    return make


def data(kind: str, *files: str, **options) -> EvalDataset:
    return EvalDataset(list(files), TASK_SCHEMAS[kind], **options)


@pytest.mark.parametrize(
    "kind, row, inputs, references",
    [
        ("labels", {"text": "a b", "label": "good"}, ("a b",), ("good",)),
        ("labels", {"text": "a b", "label": 1}, ("a b",), ("1",)),
        ("texts", {"source": "a", "target": "b"}, ("a",), ("b",)),
        ("texts", {"source": "a", "target": ["b", "c"]}, ("a",), ("b", "c")),
        ("texts", {"prompt": "a", "completion": "b"}, ("a",), ("b",)),
        ("texts", {"article": "a", "highlights": "b"}, ("a",), ("b",)),
        (
            "answers",
            {"context": "c", "question": "q", "answers": [{"text": "x", "answer_start": 0}]},
            ("q", "c"),
            ("x",),
        ),
        (
            "answers",
            {"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}},
            ("q", "c"),
            (),
        ),
        ("answers", {"question": "q", "answers": ["x", "y"]}, (), ("x", "y")),
        ("pairs", {"good": "a", "bad": "b"}, ("a", "b"), ()),
    ],
)
def test_rows_of_every_task(file, kind, row, inputs, references):
    (record,) = data(kind, file("rows.jsonl", row))
    assert (record.inputs, record.references, record.row) == (inputs, references, row)


def test_tables_and_plain_lines(file):
    (record,) = data("labels", file("rows.tsv", "text\tlabel", "a b\tgood"))
    assert (record.inputs, record.references, record.line) == (("a b",), ("good",), 2)
    (record,) = data(
        "answers", file("rows.csv", "question,context,answers", 'q,c,"[""x"", ""y""]"')
    )
    assert record.references == ("x", "y")
    (record,) = data("texts", file("right.txt", "ein Haus"))
    assert (record.inputs, record.references) == ((), ("ein Haus",))
    (record,) = data(
        "texts", file("asked.txt", "a house"), references=file("right.txt", "ein Haus")
    )
    assert (record.inputs, record.references) == (("a house",), ("ein Haus",))


def test_fields_of_other_names(file):
    rows = file("rows.jsonl", {"premise": "a", "hypothesis": "b", "gold": "yes"})
    (record,) = data(
        "labels", rows, fields=("premise", "hypothesis"), paired=True, reference="gold"
    )
    assert (record.inputs, record.references) == (("a", "b"), ("yes",))
    (record,) = data("labels", rows, fields=("premise", "hypothesis"), reference="gold")
    assert record.inputs == ("ab",)


@pytest.mark.parametrize(
    "value, found",
    [
        ([{"text": "x"}], ("x",)),
        ({"text": ["x", "y"]}, ("x", "y")),
        (["x"], ("x",)),
        ([], ()),
        ("", ()),
        ("x", ("x",)),
        ('["x", "y"]', ("x", "y")),
        ("[sic] is what it says", ("[sic] is what it says",)),
    ],
)
def test_answers_in_every_form(value, found):
    assert answer_texts({"answers": value}, "answers") == found


@pytest.mark.parametrize(
    "lines, kind, found",
    [
        (("good", "", "bad"), "labels", [("good",), (), ("bad",)]),
        (("good\t0.9\ta text", "NA\tNA\t"), "labels", [("good",), ()]),  # lm classify
        (
            ("label\tprobability\ttext", "good\t0.9\ta text"),
            "labels",
            [("good",)],
        ),  # lm classify --header
        (
            (
                {"text": "a", "label": "good", "labels": ["good"]},
                {"text": "", "label": None, "labels": []},
            ),
            "labels",
            [("good",), ()],
        ),  # lm classify --json
        (
            ({"prompt": "a", "text": "b\nc"}, {"prompt": "", "text": ""}),
            "texts",
            [("b\nc",), ()],
        ),  # lm generate --json
        (("b c", "{d}"), "texts", [("b c",), ("{d}",)]),
        (({"answer": "x"}, {"answer": None}), "answers", [("x",), ()]),
        (
            ("answer\tscore\tstart\tend\tquestion", "x y\t0.9\t0\t3\tq", "NA\tNA\tNA\tNA\tq"),
            "answers",
            [("x y",), ()],
        ),
        (
            (
                {"good": "a", "bad": "b", "first_likelier": True},
                {"first_likelier": False},
                {"first_likelier": None},
            ),
            "pairs",
            [("true",), ("false",), ()],
        ),
    ],
)  # lm score --pairs --json
def test_predictions_as_commands_write_them(file, lines, kind, found):
    assert [given for given, _ in data(kind).read_predictions(file("p.txt", *lines))] == found


def test_several_labels(file):
    rows = file("rows.jsonl", {"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []})
    assert [record.references for record in data("labels", rows, multi_label=True)] == [
        ("x", "y"),
        (),
    ]
    assert [
        given
        for given, _ in data("labels", multi_label=True).read_predictions(
            file("p.txt", "x,y\t0.9,0.8\ta", "NA\tNA\tb")
        )
    ] == [("x", "y"), ()]
    with pytest.raises(UserError, match="has 2 labels, where the first record has one"):
        list(data("labels", rows))


def test_rows_with_their_predictions(file):
    rows = file("rows.jsonl", {"text": "a", "label": "good", "prediction": "bad"})
    assert [given for _, given in with_predictions(data("labels", rows), None)] == [("bad",)]
    rows = file(
        "both.jsonl", {"text": "a", "given_label": "good", "label": "bad", "labels": ["bad"]}
    )
    ((record, given),) = with_predictions(
        data("labels", rows), None
    )  # lm classify --json of labelled records
    assert (record.references, given) == (("good",), ("bad",))
    rows = file("qa.jsonl", {"question": "q", "context": "c", "answers": ["x"], "answer": "y"})
    assert [given for _, given in with_predictions(data("answers", rows), None)] == [("y",)]
    with pytest.raises(UsageError, match="has no prediction"):
        list(
            with_predictions(data("labels", file("c.jsonl", {"text": "a", "label": "good"})), None)
        )


@pytest.mark.parametrize(
    "records, lines, message",
    [
        (3, 1, ["1 predictions for 3 records", "the first without one is", "rows.jsonl, line 2"]),
        (1, 3, ["3 predictions for 1 records", "the first without a record is", "p.txt, line 2"]),
    ],
)
def test_files_of_different_length(file, records, lines, message):
    rows = data("labels", file("rows.jsonl", *[{"text": "a", "label": "x"}] * records))
    with pytest.raises(UserError) as error:
        list(with_predictions(rows, file("p.txt", *["x"] * lines)))
    assert (
        all(text in str(error.value) for text in message) and str(error.value).index("p.txt") < 200
    )


def test_references_of_another_length(file):
    with pytest.raises(UserError, match="1 references for 2 records"):
        list(data("texts", file("asked.txt", "a", "b"), references=file("right.txt", "c")))


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("labels", {"text": "a"}, "no reference"),
        ("labels", {"text": "a", "label": None}, "has no label"),
        ("labels", {"text": "a", "label": 0.5}, "which is no label"),
        ("labels", {"text": 7, "label": "x"}, "not a text"),
        ("texts", {"source": "a", "target": 3}, "not a text"),
        ("answers", {"answers": 3}, "no list of answers"),
        ("pairs", {"a": "b"}, "no pair of fields"),
    ],
)
def test_bad_rows_are_named(file, kind, row, message):
    good = {
        "text": "a",
        "label": "x",
        "source": "a",
        "target": "b",
        "answers": [],
        "good": "a",
        "bad": "b",
    }
    with pytest.raises(UserError, match=message) as error:
        list(data(kind, file("rows.jsonl", good, row)))
    assert error.value.where.endswith("rows.jsonl, line 2") and error.value.hint


def test_bad_lines_are_named(file):
    with pytest.raises(UserError, match="invalid JSON") as error:
        list(data("labels", file("rows.jsonl", "{")))
    assert error.value.where.endswith("rows.jsonl, line 1")
    assert "take it out" in error.value.hint
    with open(file("p.txt"), "wb") as out:
        out.write(b"good\n\xff\n")
    with pytest.raises(UserError, match="invalid UTF-8") as error:
        list(data("labels").read_predictions(out.name))
    assert error.value.where.endswith("p.txt, line 2") and "take it out" in error.value.hint
    with pytest.raises(UserError, match="no prediction: none of the fields"):
        list(data("labels").read_predictions(file("p.jsonl", {"a": 1})))
    with pytest.raises(UserError, match="no field 'topic' to group by"):
        list(data("labels", file("rows.jsonl", {"text": "a", "label": "x"}), by="topic"))
    with pytest.raises(ValueError, match="neither true nor false"):
        parse_prediction("maybe", "pairs", False, "prediction")


def test_zip_records_of_nothing():
    assert list(zip_records([], [], "f", "predictions")) == []
