"""One schema: every command reads the same texts, pairs, labels and answers from the same rows."""

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest

from lmcli.config import ModelConfig
from lmcli.data.documents import DocumentFormat, first_rows, read_pieces, read_rows, survey
from lmcli.data.rows import RowReader
from lmcli.data.schema import TASK_SCHEMAS, ScoringFields, question_prompt, sort_labels
from lmcli.errors import UserError
from lmcli.evaluation.predictions import EvalDataset
from lmcli.output.classify import AnswerRows, ClassifyOptions, LabelRows
from lmcli.training.datasets import open_sources
from lmcli.training.objectives import resolve_objective

TABLES = {"tsv": "\t", "csv": ","}
FORMATS = ["jsonl", *TABLES]
SUFFIXES = {"text": ".txt", "jsonl": ".jsonl", "tsv": ".tsv", "csv": ".csv"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTION = {"context": "A baker, of Bern.", "question": "Who?"}
GOLD = [("baker", 2, 7)]


@pytest.fixture
def write(tmp_path):
    """write(format, *rows): a file with these rows, whose fields in tables are text or JSON."""

    def call(format, *rows):
        if format == "text":
            lines = [f"{row}\n" for row in rows]
        elif format == "jsonl":
            lines = [json.dumps(row) + "\n" for row in rows]
        else:
            cells = [
                [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
                for row in rows
            ]
            if format == "tsv":
                lines = ["\t".join(row) + "\n" for row in [list(rows[0]), *cells]]
            else:
                out = io.StringIO()
                csv.writer(out, lineterminator="\n").writerows([list(rows[0]), *cells])
                lines = [out.getvalue()]
        file = tmp_path / f"rows{SUFFIXES[format]}"
        file.write_text("".join(lines), encoding="utf-8")
        return str(file)

    return call


# -- what each command reads


def trained(file, shape, objective="auto", multi_label=False, fields=()):
    """(how `lm train` reads a file, its rows, after the checks of a run)."""
    note = lambda text: None  # noqa: E731
    source = open_sources((file,), (), DocumentFormat("line", fields=fields), None, note)
    model = ModelConfig(shape=shape, multi_label=multi_label)
    _, doc_format = resolve_objective(source, objective, model, note)
    documents = survey([file], doc_format).documents
    if not doc_format.has_rows(file):
        return doc_format, []
    return doc_format, [row for _, row in read_rows(documents, doc_format)]


def trained_texts(file, fields=()):
    """The texts that `lm train` and `lm perplexity` read."""
    doc_format = DocumentFormat("line", fields=fields)
    documents = survey([file], doc_format).documents
    return [piece.text for piece in read_pieces(documents, doc_format)]


def records(file, fields=(), extract=None):
    """What the commands that process records read (tokenize, score, generate, bench)."""
    reader = RowReader("auto", fields, "stop", extract)
    return [record for batch in reader.batches([file]) for record in batch]


def classified(file, fields=()):
    """The records that `lm classify` labels."""
    model = SimpleNamespace(per_token=False, labels=("pos", "neg"))
    reader = LabelRows(model, ClassifyOptions(fields=fields)).reader("auto", "stop")
    return [record.text for batch in reader.batches([file]) for record in batch]


def asked(file):
    """(question, context) of the records that `lm classify` answers."""
    reader = AnswerRows(SimpleNamespace(), ClassifyOptions()).reader("auto", "stop")
    return [
        (record.text, *record.extra_texts) for batch in reader.batches([file]) for record in batch
    ]


def evaluated(kind, file, **options):
    """(inputs, references) of the records that `lm evaluate` reads."""
    dataset = EvalDataset([file], TASK_SCHEMAS[kind], **options)
    return [(record.inputs, record.references) for record in dataset]


# -- texts


TEXT_ROWS = [
    ({"text": "a b "}, "a b "),
    ({"text": " a", "source": "c", "prompt": "d"}, " a"),
    ({"prompt": "a", "completion": " b"}, "a b"),
    ({"source": "a", "target": "b"}, "a"),
    ({"prompt": "a b", "id": "7"}, "a b"),
    ({"text": "a b", "label": "pos"}, "a b"),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row, text", TEXT_ROWS)
def test_texts(write, format, row, text):
    file = write(format, row)
    assert trained_texts(file) == [text]
    assert [record.text for record in records(file)] == [text]
    assert classified(file) == [text]
    assert [record.text for record in records(file, extract=ScoringFields(prefix="p"))] == [text]
    if "text" in row:
        label = {**row, "label": "pos"}
        assert evaluated("labels", write(format, label)) == [((text,), ("pos",))]


def test_plain_lines(write):
    file = write("text", "a b", " c")
    assert trained_texts(file) == classified(file) == ["a b", " c"]
    assert [record.text for record in records(file)] == ["a b", " c"]
    scored = records(file, extract=ScoringFields(prefix="p"))
    assert [(record.text, record.extra_texts) for record in scored] == [
        ("a b", ("p",)),
        (" c", ("p",)),
    ]
    assert evaluated("texts", file) == [((), ("a b",)), ((), (" c",))]


@pytest.mark.parametrize("format", FORMATS)
def test_texts_of_named_fields(write, format):
    file = write(format, {"text": "no", "a": "x ", "b": "y"})
    assert trained_texts(file, fields=("a", "b")) == classified(file, ("a", "b")) == ["x y"]
    assert [record.text for record in records(file, ("a", "b"))] == ["x y"]
    assert evaluated("labels", file, fields=("a", "b"), reference="text") == [(("x y",), ("no",))]


# -- pairs


PAIR_ROWS = [
    ({"source": "a b", "target": " c"}, ("a b", " c"), "texts", FORMATS),
    ({"prompt": "a b", "completion": " c"}, ("a b", " c"), "texts", FORMATS),
    (
        {"messages": [{"role": "system", "content": "S"}, *CHAT]},
        ("system: S\nuser: Hi\nassistant:", " Hello"),
        "texts",
        ["jsonl"],
    ),
    ({"instruction": "Do", "input": "x", "output": "y"}, ("Do\nx", "y"), "texts", FORMATS),
    ({"instruction": "Do", "output": "y"}, ("Do", "y"), "texts", FORMATS),
    (
        {**QUESTION, "answers": ["baker", "A baker"]},
        (question_prompt(QUESTION["question"], QUESTION["context"]), "baker"),
        "answers",
        FORMATS,
    ),
]


@pytest.mark.parametrize(
    "format, row, pair, kind",
    [(format, row, pair, kind) for row, pair, kind, formats in PAIR_ROWS for format in formats],
)
def test_pairs(write, format, row, pair, kind):
    file = write(format, row)
    for shape, objective in (("encoder-decoder", "auto"), ("decoder", "completion")):
        doc_format, rows = trained(file, shape, objective)
        chat = doc_format.fields == ("messages",) and shape == "decoder"
        learned = ("<|system|>\nS\n<|user|>\nHi\n<|assistant|>\n", "Hello") if chat else pair
        assert [doc_format.pair(row) for row in rows] == [learned]
    ((inputs, references),) = evaluated(kind, file)
    prompt = inputs[0] if kind == "texts" else question_prompt(*inputs)
    assert (prompt, references[0]) == pair
    if "source" in row:
        (record,) = records(file, extract=ScoringFields(sources=True))
        assert (*record.extra_texts, record.text) == pair


@pytest.mark.parametrize("format", FORMATS)
def test_pairs_of_named_fields(write, format):
    file, fields = write(format, {"en": "a", "de": "b"}), ("en", "de")
    doc_format, rows = trained(file, "encoder-decoder", fields=fields)
    assert [doc_format.pair(row) for row in rows] == [("a", "b")]
    (record,) = records(file, extract=ScoringFields(fields, sources=True))
    assert (*record.extra_texts, record.text) == ("a", "b")
    assert evaluated("texts", file, fields=("en",), reference="de") == [(("a",), ("b",))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("good, bad", TASK_SCHEMAS["pairs"].inputs)
def test_minimal_pairs(write, format, good, bad):
    file = write(format, {good: "a b", bad: "b a"})
    (record,) = records(file, extract=ScoringFields(pairs=True))
    assert record.extra_texts == ("a b", "b a")
    assert evaluated("pairs", file) == [(("a b", "b a"), ())]


def test_a_tab_separates_the_texts_of_a_plain_line(write):
    file = write("text", "a b\tb a")
    (record,) = records(file, extract=ScoringFields(pairs=True))
    assert record.extra_texts == ("a b", "b a")
    (record,) = records(file, extract=ScoringFields(sources=True))
    assert (*record.extra_texts, record.text) == ("a b", "b a")


# -- labels


LABELS = [(" pos", ("pos",)), ("pos\n", ("pos",)), ("a, b", ("a, b",)), (3, ("3",))]
JSON_LABELS = [(True, "true"), (False, "false"), (2.0, "2"), (-0.0, "0"), (-3.0, "-3")]
MULTI_LABELS = [
    ("a, b ", ("a", "b")),
    ("", ()),
    ([], ()),
    ([" a", "b "], ("a", "b")),
    ([1, "b"], ("1", "b")),
]


def labels_read(file, multi_label):
    """The labels that training and evaluation read; both must be the same."""
    doc_format, rows = trained(file, "encoder", "classification", multi_label)
    labels = [doc_format.labels(row) for row in rows]
    assert [doc_format.text(row) for row in rows] == ["a b"] * len(rows)
    dataset = evaluated("labels", file, multi_label=multi_label)
    assert dataset == [(("a b",), found) for found in labels]
    return labels


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value, labels", LABELS)
def test_labels(write, format, value, labels):
    if format != "jsonl" and isinstance(value, str):
        value = value.replace("\n", " ")  # no line ends in tables
    assert labels_read(write(format, {"text": "a b", "label": value}), False) == [labels]


@pytest.mark.parametrize("value, label", JSON_LABELS)
def test_labels_that_json_has_no_text_for(write, value, label):
    assert labels_read(write("jsonl", {"text": "a b", "label": value}), False) == [(label,)]
    assert labels_read(write("jsonl", {"text": "a b", "label": [value]}), True) == [(label,)]


@pytest.mark.parametrize(
    "written, known, label",
    [
        ("True", ("false", "true"), "true"),
        ("FALSE", ("false", "true"), "false"),
        ("1.0", ("0", "1"), "1"),
        ("true", ("False", "True"), "True"),
        ("true", ("True", "TRUE"), "true"),  # which of them is not known
        ("1.5", ("1", "2"), "1.5"),
        ("pos", ("neg", "Pos"), "pos"),
    ],
)
def test_labels_of_tables_match_those_of_a_model(write, written, known, label):
    """pandas writes True and 1.0 where JSON has true and 1."""
    file = write("csv", {"text": "a b", "label": written})
    assert evaluated("labels", file, labels=known) == [(("a b",), (label,))]


def test_labels_are_sorted_by_value_however_long():
    names = ["10", "9", "b", "9" * 5000, "٣", "a", "08", "8"]
    assert sort_labels(names) == ["٣", "08", "8", "9", "10", "9" * 5000, "a", "b"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value, labels", MULTI_LABELS)
def test_several_labels(write, format, value, labels):
    if format != "jsonl" and isinstance(value, list):
        value = ",".join(map(str, value))
    assert labels_read(write(format, {"text": "a b", "label": value}), True) == [labels]


@pytest.mark.parametrize(
    "value, multi_label",
    [
        ("", False),
        ("  ", False),
        (None, False),
        (1.5, False),
        (math.nan, False),
        (math.inf, False),
        (1e300, False),
        ({"a": 1}, False),
        (["a"], False),
        (["a", "b"], False),
        ([], False),
        (1.5, True),
        ([0.5], True),
        ([["a"]], True),
    ],
)
def test_what_is_no_label_is_refused_by_all(write, value, multi_label):
    file = write("jsonl", {"text": "a b", "label": "x"}, {"text": "a b", "label": value})
    for read in (
        lambda: trained(file, "encoder", "classification", multi_label),
        lambda: evaluated("labels", file, multi_label=multi_label),
    ):
        with pytest.raises(UserError, match="label") as caught:
            read()
        assert caught.value.where == f"{file}, line 2"


# -- questions and answers


ANSWERS = [
    ([{"text": "baker", "answer_start": 2}], GOLD),
    ({"text": ["baker"], "answer_start": [2]}, GOLD),
    ([{"text": "baker"}], GOLD),
    ({"text": ["baker"]}, GOLD),
    (["baker"], GOLD),
    ("baker", GOLD),
    (["b", "Bern"], [("b", 2, 3), ("Bern", 12, 16)]),
    ([], []),
    ({"text": [], "answer_start": []}, []),
    ("", []),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("answers, gold", ANSWERS)
def test_questions_and_answers(write, format, answers, gold):
    file = write(format, {**QUESTION, "answers": answers})
    doc_format, rows = trained(file, "encoder")
    assert doc_format.answers == "answers"
    (example,) = map(doc_format.squad_example, rows)
    assert example == (QUESTION["context"], QUESTION["question"], gold)
    inputs = (QUESTION["question"], QUESTION["context"])
    assert evaluated("answers", file) == [(inputs, tuple(text for text, _, _ in gold))]
    assert asked(file) == [inputs]


@pytest.mark.parametrize("answers", [3, None, [3], [{"text": None}], {"text": "baker"}, [["a"]]])
def test_what_is_no_answer_is_refused_by_all(write, answers):
    file = write("jsonl", {**QUESTION, "answers": []}, {**QUESTION, "answers": answers})
    for read in (
        lambda: trained(file, "encoder"),
        lambda: trained(file, "encoder-decoder"),
        lambda: evaluated("answers", file),
    ):
        with pytest.raises(UserError, match="answer") as caught:
            read()
        assert caught.value.where == f"{file}, line 2"


def test_training_needs_an_answer_that_occurs_in_the_context(write):
    file = write("jsonl", {**QUESTION, "answers": ["butcher"]})
    with pytest.raises(UserError, match="answer 'butcher' does not occur in the context"):
        trained(file, "encoder")
    assert evaluated("answers", file)[0][1] == ("butcher",)


# -- bad lines, and files of every format


@pytest.mark.parametrize(
    "format, line, message",
    [
        ("jsonl", b"{", "invalid JSON"),
        ("jsonl", b"[1]", "not a JSON object"),
        ("jsonl", b"\xff", "invalid UTF-8"),
        ("tsv", b"\xff\tx", "invalid UTF-8"),
        ("csv", b'"a"b,x', "no whole CSV row"),
        ("csv", b'"a,x', "a quoted cell begins in this row and never ends"),
    ],
)
def test_a_bad_line_is_named_alike_by_all(write, format, line, message):
    file = write(format, {"text": "a b", "label": "x"})
    with open(file, "ab") as out:
        out.write(line + b"\n")
    number = 2 if format == "jsonl" else 3
    for read in (
        lambda: trained_texts(file),
        lambda: records(file),
        lambda: classified(file),
        lambda: evaluated("labels", file),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert caught.value.where == f"{file}, line {number}"


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_row_is_that_of_all_others(write, format):
    row = {"text": "a b", "label": "x"}
    file = write(format, row, {"text": "c", "label": "y"})
    assert first_rows([file], DocumentFormat(), 1)[0] == row == records(file)[0].fields
    assert next(iter(EvalDataset([file], TASK_SCHEMAS["labels"]))).row == row
