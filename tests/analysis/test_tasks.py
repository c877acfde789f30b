"""Which task rows have, which figures it is measured by, which models can do it, and the predictions these make."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lmcli.analysis.tasks import TASKS, Runner, find, picked, require
from lmcli.config import ModelConfig
from lmcli.errors import UsageError
from lmcli.text.labelled import FORMS, Data
from lmcli.text.records import Record


def row(*names: str) -> Record:
    return Record("", "f", 1, dict.fromkeys(names, "x"))


@pytest.mark.parametrize("names, task", [
    (("text", "label"), "classify"), (("text", "labels"), "classify"), (("text", "given_label", "label"), "classify"),
    (("source", "target"), "translate"), (("messages",), "translate"),
    (("instruction", "output"), "translate"), (("prompt", "completion"), "translate"),
    (("document", "summary"), "summarize"),
    (("article", "highlights"), "summarize"), (("context", "question", "answers"), "qa"), (("question", "answer"), "qa"),
    (("sentence_good", "sentence_bad"), "pairs"), (("more", "less", "bias_type"), "pairs")])
def test_the_fields_tell_the_task(names, task):
    assert find("auto", row(*names), "f", None, ()).name == task
    assert find("summarize", row(*names), "f", None, ()).name == "summarize"


def test_where_there_are_no_fields_a_model_or_a_figure_tells_it():
    plain = Record("x", "f", 1)
    assert find("auto", plain, "f", ("encoder", "sequence"), ()).name == "classify"
    assert find("auto", plain, "f", ("encoder-decoder", "lm"), ()).name == "translate"
    assert find("auto", plain, "f", None, ("rouge1",)).name == "summarize"
    assert find("auto", plain, "f", None, ("f1",)).name == "classify"
    with pytest.raises(UsageError, match="which task"):
        find("auto", plain, "f", None, ())
    with pytest.raises(UsageError, match="did you mean 'chrf'"):
        find("auto", plain, "f", None, ("chf",))


def test_figures_by_name_and_by_stem():
    classify, translate = TASKS["classify"], TASKS["translate"]
    assert picked(classify, ()) == classify.figures and picked(translate, ()) == ("bleu", "chrf", "identical")
    assert picked(translate, ("rouge1", "bleu")) == ("bleu", "rouge1")
    assert picked(classify, ("f1",)) == ("f1", "f1_macro", "f1_micro")
    with pytest.raises(UsageError, match="no figure 'acc' of the task classify"):
        picked(classify, ("acc",))


WRITERS = {("encoder-decoder", "lm"), ("decoder", "lm")}


@pytest.mark.parametrize("task, able", [
    ("classify", {("encoder", "sequence")}), ("qa", {("encoder", "span"), *WRITERS}), ("translate", WRITERS),
    ("summarize", WRITERS),
    ("pairs", {*WRITERS, ("encoder", "lm")})])
@pytest.mark.parametrize("kind", [("decoder", "lm"), ("encoder", "lm"), ("encoder-decoder", "lm"), ("encoder", "sequence"),
                                  ("encoder", "token"), ("encoder", "span"), ("encoder", "none")], ids="-".join)
def test_what_a_model_can_do(task, able, kind):
    config = ModelConfig(shape=kind[0], head=kind[1])
    if kind in able:
        require(TASKS[task], "m", config, "a model")
        return
    with pytest.raises(UsageError) as error:
        require(TASKS[task], "m", config, "a model")
    told = str(error.value)
    assert f"the task {task} needs" in told and f"(shape {kind[0]}, head {kind[1]})" in told
    assert ("--task" in error.value.hint) == (kind in {each for one in TASKS.values() for each in one.models})


@dataclass
class Span:
    text: str | None
    truncated: bool = False


def test_a_span_model_is_asked_each_question_about_its_context(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{k}", "context": f"c{k}", "answers": []}) + "\n" for k in (1, 2)))
    asked = []

    def answer(questions, contexts, batch):
        asked.append((questions, contexts, batch))
        return [Span("yes"), Span(None, True)]
    model = SimpleNamespace(answer=answer, model=SimpleNamespace(config=ModelConfig(shape="encoder", head="span")))
    runner = Runner(TASKS["qa"], model, batch=7)
    found = list(runner.predictions(Data([str(file)], FORMS["answers"])))
    assert [given for _, given in found] == [("yes",), ()] and asked == [(["q1", "q2"], ["c1", "c2"], 7)]
    assert (runner.records, runner.cut) == (2, 1) and runner.seconds > 0


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("row, kind, asked, right, between", [
    ({"source": "a", "target": "b"}, "texts", "a", "b", "\n"), ({"prompt": "a", "completion": " b"}, "texts", "a", " b", ""),
    ({"instruction": "do", "input": "it", "output": "x"}, "texts", "do\nit", "x", "\n"),
    ({"messages": TALK}, "texts", "user: Hi\nassistant:", " Hello", ""),
    ({"question": "q", "context": "c", "answers": ["x"]}, "answers", "question: q context: c", "x", "\n")])
def test_a_model_that_writes_reads_what_it_was_trained_on(tmp_path, shape, row, kind, asked, right, between):
    file, read = tmp_path / "rows.jsonl", []
    file.write_text(json.dumps(row) + "\n")

    def generate(texts, batch, **options):
        read.append((texts, options))
        return [SimpleNamespace(text=" b\n")]
    config = ModelConfig(shape=shape, positions="relative")
    model = SimpleNamespace(generate=generate, model=SimpleNamespace(config=config))
    runner = Runner(TASKS["qa" if kind == "answers" else "translate"], model, {"num_beams": None})
    ((record, given),) = runner.predictions(Data([str(file)], FORMS[kind]))
    assert (record.references, given) == ((right,), ("b",))
    greedy = {"temperature": 0.0} if shape == "decoder" else {}
    assert read == [([asked + (between if shape == "decoder" else "")], {**greedy, "num_beams": None})]
