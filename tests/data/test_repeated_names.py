"""A key that stands twice in a record, a column twice in a header: refused by name, never one."""

import json
import time

import pytest

from lmcli.data.documents import DocumentFormat, survey
from lmcli.data.rows import RowReader
from lmcli.data.schema import MESSAGES, answer_texts, squad_example
from lmcli.errors import UserError
from lmcli.evaluation.predictions import EvalDataset, first_record
from lmcli.evaluation.tasks import EVALUATION_TASKS
from lmcli.text.characters import RepeatedKey, parse_json

TWICE = '{"text": "good", "label": "x", "text": "bad"}'
READERS = {
    "records": lambda file: list(RowReader().batches([file])),
    "documents": lambda file: survey([file], DocumentFormat()),
    "labels": lambda file: survey([file], DocumentFormat(fields=("text",), label="label")),
    "evaluation": lambda file: list(EvalDataset([file], EVALUATION_TASKS["classify"].schema)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.jsonl", '{"text": "one", "label": "x"}\n' + TWICE, 2, "field 'text' stands twice"),
        ("a.tsv", "text\tlabel\ttext\na\tb\tc\n", 1, "column 'text' stands twice in the header"),
        ("a.csv", '\n"label",text,"label"\na,b,c\n', 2, "column 'label' stands twice"),
        ("b.tsv", "text\tlabel\na\tx\nb\tx\tc\n", 3, "3 cells, and the header names 2 columns"),
        ("b.csv", 'text,label\n"a,b",x\na,b,x\n', 3, "3 cells, and the header names 2 columns"),
    ],
)
def test_each_reader_names_the_line_and_what_stands_twice(
    tmp_path, reader, name, text, line, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        READERS[reader](str(tmp_path / name))
    assert message in error.value.what
    assert error.value.where.endswith(f"{name}, line {line}") and error.value.hint


def test_empty_cells_beyond_the_header_and_columns_without_a_name(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\t\t\na\tx\t\t\nb\ty\t\t\t\n")
    (batch,) = RowReader().batches([str(tmp_path / "a.tsv")])
    assert [record.text for record in batch] == ["a", "b"]


def test_inside_of_messages_and_answers(tmp_path):
    messages = '{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}'
    (tmp_path / "a.jsonl").write_text(messages)
    with pytest.raises(UserError, match="field 'role' stands twice"):
        survey([str(tmp_path / "a.jsonl")], DocumentFormat(fields=MESSAGES, chat=True))
    row = {"context": "a b", "question": "c", "answers": '{"text": ["a"], "text": ["b"]}'}
    for read in (
        lambda: answer_texts(row, "answers"),
        lambda: squad_example(row, "context", "question", "answers"),
    ):
        with pytest.raises(RepeatedKey, match="field 'text' stands twice"):
            read()


def test_a_prediction(tmp_path):
    (tmp_path / "p.txt").write_text('{"label": "x", "label": "y"}\n')
    data = EvalDataset([], EVALUATION_TASKS["classify"].schema)
    with pytest.raises(UserError, match="field 'label' stands twice"):
        list(data.read_predictions(str(tmp_path / "p.txt")))


def test_skipping_such_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + TWICE + '\n{"text": "b"}\n')
    assert len(survey([str(tmp_path / "a.jsonl")], DocumentFormat(on_error="skip")).documents) == 2
    assert first_record([str(tmp_path / "a.jsonl")], "auto").fields == {"text": "a"}


def test_values_are_those_of_the_library_and_no_slower():
    text = json.dumps({"a": [1, 2.5, None, True, {"b": "é\n"}], "c": "\ud800"}) * 1
    assert parse_json(text) == {**json.loads(text), "c": "\ufffd"}
    assert parse_json('{"a": NaN, "b": [-Infinity]}') == {"a": None, "b": [None]}
    started = time.perf_counter()
    for _ in range(20_000):
        parse_json('{"text": "good", "label": "x"}')
    assert time.perf_counter() - started < 2  # 0.04 s on an idle machine


@pytest.mark.parametrize(
    ("format", "text", "hint"),
    [
        ("jsonl", "{", "--on-error skip leaves such records out"),
        ("text", "a\n\ud800", "only UTF-8 text can be read"),
    ],
)
def test_documents_have_no_results_that_could_be_empty(tmp_path, format, text, hint):
    (tmp_path / "a").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError) as error:
        survey([str(tmp_path / "a")], DocumentFormat("line", format))
    assert error.value.hint.startswith(hint) and "blank" not in error.value.hint
