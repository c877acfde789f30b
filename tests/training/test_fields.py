"""Which task follows from the fields of the data and the preset; what is refused, and how."""

import json

import pytest

from lmcli import recipes
from lmcli.config import ModelConfig
from lmcli.data.diagnostics import fields_option, guess_fields, hidden_rows
from lmcli.data.documents import DocumentFormat
from lmcli.errors import UsageError
from lmcli.training import datasets
from lmcli.training.objectives import resolve_objective

REVIEWS = "review,sentiment\n" + "".join(
    f"film {i} was {'good' if i % 2 else 'bad'},{'pos' if i % 2 else 'neg'}\n" for i in range(30)
)
LABELED = REVIEWS.replace("review,sentiment", "text,label", 1)
PAIRS = "source,target\n" + "ein Haus,a house\n" * 30
PROMPTS = "prompt,completion\n" + "a, b\n" * 30
QUESTIONS = "context,question,answers\n" + "Anna sits.,Who?,Anna\n" * 30
PLAIN = "a line of text\n" * 30


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """resolve(text, preset, fields…): (objective, DocumentFormat, notes), by file name and head."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))

    def call(text, preset="auto", *fields, name="data.csv", head="lm", shape="", **options):
        file, notes = tmp_path / name, []
        file.write_text(text)
        recipe = recipes.resolve(preset)
        model = ModelConfig(shape=shape or recipe.model.shape, head=head)
        source = datasets.open_sources(
            (str(file),), (), DocumentFormat(fields=fields), None, notes.append, **options
        )
        objective, doc_format = resolve_objective(
            source,
            recipe.train.objective,
            model,
            notes.append,
            f"lm train {name}",
            any_shape=preset == "auto" and not shape,
        )
        return objective, doc_format, notes

    return call


@pytest.mark.parametrize(
    "text, objective, preset",
    [
        (LABELED, "classification", "classify"),
        (PAIRS, "seq2seq", "translate"),
        (QUESTIONS, "span", "qa"),
        (PROMPTS, "completion", ""),
        ("text,id\n" + "a,1\n" * 30, "causal", ""),
        ("text,source,target\n" + "a,b,c\n" * 30, "causal", ""),
    ],
    ids=["labels", "pairs", "questions", "completions", "text", "text beside a pair"],
)
def test_auto_takes_the_task_that_the_fields_show(resolve, text, objective, preset):
    chosen, _, _ = resolve(text)
    assert (chosen.name, chosen.preset) == (objective, preset)
    if preset:
        assert recipes.resolve(preset).model.shape == chosen.shape


@pytest.mark.parametrize(
    "fields",
    [
        ("text=review", "label=sentiment"),
        ("label=sentiment", "text=review"),
        ("text = review", "label= sentiment"),
        ("review", "sentiment"),
    ],
)
@pytest.mark.parametrize("preset", ["classify", "finetune-classify"])
def test_fields_by_role_or_in_order(resolve, preset, fields):
    objective, doc_format, _ = resolve(REVIEWS, preset, *fields, shape="encoder")
    assert (objective.name, doc_format.fields, doc_format.label) == (
        "classification",
        ("review",),
        "sentiment",
    )


@pytest.mark.parametrize(
    "text, fields, objective, read",
    [
        (REVIEWS, ("text=review", "label=sentiment"), "classification", ("review",)),
        (REVIEWS, ("text=review",), "causal", ("review",)),
        (REVIEWS, ("source=review", "target=sentiment"), "seq2seq", ("review", "sentiment")),
        (REVIEWS, ("target=review", "source=sentiment"), "seq2seq", ("sentiment", "review")),
        (REVIEWS, ("completion=sentiment", "prompt=review"), "completion", ("review", "sentiment")),
        (LABELED, ("label", "text"), "classification", ("text",)),
        (LABELED, ("text",), "causal", ("text",)),
        (PAIRS, ("target", "source"), "seq2seq", ("target", "source")),
        (
            QUESTIONS,
            ("question=question", "answers=answers", "context=context"),
            "span",
            ("context", "question"),
        ),
        (
            "a,b,c\n" + "x,y,pos\nz,w,neg\n" * 9,
            ("text=a", "label=c", "text=b"),
            "classification",
            ("a", "b"),
        ),
        ("a=b\n" + "x\n" * 30, ("a=b",), "causal", ("a=b",)),  # a column of this name
    ],
)
def test_fields_named_for_auto(resolve, text, fields, objective, read):
    chosen, doc_format, _ = resolve(text, "auto", *fields)
    assert (chosen.name, doc_format.fields) == (objective, read)


@pytest.mark.parametrize(
    "text, preset, fields, expected",
    [
        (REVIEWS, "classify", (), "lm train data.csv --fields text=review,label=sentiment"),
        (REVIEWS, "auto", (), "lm train data.csv --fields text=review,label=sentiment"),
        (REVIEWS, "auto", (), "a language model: lm train data.csv --fields text=review"),
        (REVIEWS, "small", (), "lm train data.csv --fields text=review"),
        (REVIEWS, "encoder-small", (), "--fields text=review,label=sentiment"),
        (REVIEWS, "translate", (), "--fields source=review,target=sentiment"),
        (REVIEWS, "qa", (), "--fields context=review,question=sentiment,answers=NAME"),
        (LABELED, "translate", (), "--preset classify learns from these fields"),
        (PAIRS, "classify", (), "--preset translate learns from these fields"),
        (PAIRS, "classify", (), "columns in its first line: 'source', 'target'"),
        (QUESTIONS, "classify", (), "--preset qa learns from these fields"),
        (REVIEWS, "classify", ("review",), "a classifier learns from rows with text and label"),
        (REVIEWS, "classify", ("text=review",), "no column 'label'"),
        (REVIEWS, "classify", ("text=reviw", "label=sentiment"), "did you mean 'review'?"),
        (REVIEWS, "classify", ("text=review", "target=sentiment"), "'target' is no role here"),
        (REVIEWS, "classify", ("text=review", "sentiment"), "and 'sentiment' does not"),
        (REVIEWS, "classify", ("label=review", "label=sentiment"), "a classifier learns"),
        (REVIEWS, "small", ("text=review", "label=sentiment"), "'label' is no role here"),
        (REVIEWS, "small", ("text",), "no column 'text'"),
        (REVIEWS, "translate", ("review",), "learns from rows with source and target"),
        (REVIEWS, "qa", ("review", "sentiment"), "context, question and answers"),
        ("text,label\n" + "a,\n" * 30, "auto", (), "field 'label' has no label"),
    ],
)
def test_what_has_not_the_fields_is_refused_with_a_command_that_works(
    resolve, text, preset, fields, expected
):
    with pytest.raises(UsageError) as caught:
        resolve(text, preset, *fields)
    assert expected in str(caught.value) and caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("preset", ["classify", "translate", "qa", "summarize", "seq2seq-small"])
def test_presets_for_rows_refuse_plain_text(resolve, preset):
    with pytest.raises(UsageError, match="and this is plain text") as caught:
        resolve(PLAIN, preset, name="data.txt")
    assert "JSON Lines, TSV or CSV" in caught.value.hint


@pytest.mark.parametrize("head", ["sequence", "span", "token"])
def test_a_model_with_another_head_does_not_become_a_language_model_in_silence(resolve, head):
    for text, name in ((PLAIN, "data.txt"), (REVIEWS, "data.csv")):
        with pytest.raises(UsageError):
            resolve(text, "finetune", name=name, head=head, shape="encoder")
    if head == "sequence":
        fields = ("review", "sentiment")
        objective, _, _ = resolve(REVIEWS, "finetune", *fields, head=head, shape="encoder")
        assert objective.name == "classification"


@pytest.mark.parametrize(
    "text, preset, fields, note",
    [
        (LABELED, "small", (), "of 'text'; not read: 'label'; --preset classify learns labels"),
        (
            LABELED.replace("label", "stars", 1),
            "auto",
            (),
            "of 'text'; not read: 'stars'; --fields text=text,label=stars learns labels",
        ),
        (
            REVIEWS,
            "encoder-small",
            ("review", "sentiment"),
            "of 'review' + 'sentiment' as one text; "
            "--fields text=review,label=sentiment learns labels",
        ),
        (PAIRS, "small", (), "only source is read"),
        ("text,id\n" + "".join(f"a,{i}\n" for i in range(30)), "auto", (), "not read: 'id'"),
    ],
)
def test_a_language_model_says_what_it_does_not_read(resolve, text, preset, fields, note):
    (found,) = resolve(text, preset, *fields)[-1]
    assert note in found


def test_rows_that_are_read_as_text_are_noticed(resolve):
    rows = '{"text": "a", "label": "x"}\n' * 30
    notes = resolve(rows, "small", name="data.json")[-1]
    assert notes[0].endswith("is read as plain text, and looks like JSON Lines: add --format jsonl")
    assert resolve(PLAIN, "small", name="data.txt")[-1] == []
    with pytest.raises(UsageError, match="which has no fields"):
        resolve(PLAIN, "small", "text", name="data.txt")


@pytest.mark.parametrize(
    "content, advice",
    [
        ('{"text": "a"}\n', "JSON Lines"),
        ('[\n {"text": "a"}\n]', "JSON array"),
        ("text\tlabel\na\tb\n", "TSV"),
        ('"text","label"\na,b\n', "CSV"),
        ("a text, and a label\n", ""),
        ("[1] a footnote\n", ""),
        ("{ braces }\n", ""),
        ("", ""),
    ],
)
def test_hidden_rows(tmp_path, content, advice):
    (tmp_path / "a").write_text(content)
    found = hidden_rows(str(tmp_path / "a"))
    assert (advice in found) if advice else found == ""


def test_files_without_rows_among_rows_are_refused_before_they_are_read(resolve, tmp_path):
    (tmp_path / "plain.txt").write_text(PLAIN)
    (tmp_path / "rows.csv").write_text(LABELED)
    both = str(tmp_path / "rows.csv"), str(tmp_path / "plain.txt")
    for data, val in ((both, ()), (both[:1], both[1:])):
        source = datasets.open_sources(data, val, DocumentFormat(), None, print)
        with pytest.raises(UsageError, match="and this is plain text") as caught:
            resolve_objective(source, "auto", ModelConfig(), print, any_shape=True)
        assert caught.value.where == both[1]


def test_a_label_in_a_later_row_counts(resolve):
    """The rows are classified, and the one without a label is an error of its line."""
    rows = [{"text": "a"}, {"text": "b", "label": "x"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert resolve(text, name="data.jsonl")[0].name == "classification"


class TestGuesses:
    def test_texts_are_long_and_labels_recur(self):
        rows = [{"id": i, "split": "train", "x": f"some text {i}", "y": i % 2} for i in range(9)]
        assert guess_fields(rows, ("text", "label")) == {"text": "x", "label": "y"}
        assert guess_fields([{"a": "x"}], ("text", "label")) == {"text": "a"}
        assert guess_fields([], ("text", "label")) == {}

    def test_names_that_the_shell_or_the_list_would_split_are_quoted(self):
        rows = [{"a b, c": "some text", "d": "e"}]
        option = "--field 'text=a b, c' --field label=d"
        assert fields_option(rows, ("text", "label")) == option
        assert fields_option([{"a b": "text"}], ("text",)) == "--fields 'text=a b'"
