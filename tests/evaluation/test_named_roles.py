"""`lm evaluate --fields ROLE=COLUMN`: the columns that `lm train` was given, for the same file."""

import pytest

from lmcli.errors import UsageError
from lmcli.evaluation.preparation import EvaluationOptions, open_dataset


@pytest.fixture
def reviews(tmp_path):
    file = tmp_path / "reviews.csv"
    file.write_text("stars,review\n5,very good\n1,very bad\n")
    return str(file)


@pytest.mark.parametrize(
    "fields", [("text=review", "label=stars"), ("label=stars", "text=review")], ids=str
)
def test_roles_name_the_columns_and_show_the_task(reviews, fields):
    dataset, task = open_dataset(EvaluationOptions(fields=fields), [reviews], {})
    assert task.name == "classify"
    records = [(record.inputs, record.references) for record in dataset]
    assert records == [(("very good",), ("5",)), (("very bad",), ("1",))]


def test_inputs_are_in_the_order_of_their_task(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text('{"doc": "It was Ann.", "q": "Who?", "a": ["Ann"]}\n')
    fields = ("context=doc", "answers=a", "question=q")
    dataset, task = open_dataset(EvaluationOptions(fields=fields), [str(file)], {})
    (record,) = dataset
    assert task.name == "qa" and record.inputs == ("Who?", "It was Ann.")


@pytest.mark.parametrize(
    "fields, message",
    [
        (("txt=review", "label=stars"), "'txt' is no role here"),
        (("text=review", "label=stars", "label=review"), "'stars' and 'review' are both"),
        (("text=review", "stars"), "not all fields have a role, as 'text=review' has"),
    ],
)
def test_other_roles_are_refused(reviews, fields, message):
    with pytest.raises(UsageError, match=message):
        open_dataset(EvaluationOptions(fields=fields), [reviews], {})
