"""Which task rows have, its figures, which models can do it, and their predictions."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lmcli.config import ModelConfig
from lmcli.data.rows import Record
from lmcli.data.schema import TASK_SCHEMAS
from lmcli.errors import UsageError
from lmcli.evaluation.model_predictions import ModelPredictor
from lmcli.evaluation.predictions import EvalDataset
from lmcli.evaluation.preparation import EvaluationOptions
from lmcli.evaluation.tasks import EVALUATION_TASKS, find_task, require_ability, select_figures
from lmcli.text.chat_template import DEFAULT_TEMPLATE


def row(*names: str) -> Record:
    return Record("", "f", 1, dict.fromkeys(names, "x"))


@pytest.mark.parametrize(
    "names, task",
    [
        (("text", "label"), "classify"),
        (("text", "labels"), "classify"),
        (("text", "given_label", "label"), "classify"),
        (("source", "target"), "translate"),
        (("messages",), "translate"),
        (("instruction", "output"), "translate"),
        (("prompt", "completion"), "translate"),
        (("document", "summary"), "summarize"),
        (("article", "highlights"), "summarize"),
        (("context", "question", "answers"), "qa"),
        (("question", "answer"), "qa"),
        (("sentence_good", "sentence_bad"), "pairs"),
        (("more", "less", "bias_type"), "pairs"),
    ],
)
def test_the_fields_show_the_task(names, task):
    assert find_task("auto", row(*names), "f", None, ()).name == task
    assert find_task("summarize", row(*names), "f", None, ()).name == "summarize"


def test_without_fields_the_model_or_the_metrics_show_the_task():
    plain = Record("x", "f", 1)
    assert find_task("auto", plain, "f", ("encoder", "sequence"), ()).name == "classify"
    assert find_task("auto", plain, "f", ("encoder-decoder", "lm"), ()).name == "translate"
    assert find_task("auto", plain, "f", None, ("rouge1",)).name == "summarize"
    assert find_task("auto", plain, "f", None, ("f1",)).name == "classify"
    with pytest.raises(UsageError, match="which task"):
        find_task("auto", plain, "f", None, ())
    with pytest.raises(UsageError, match="did you mean 'chrf'"):
        find_task("auto", plain, "f", None, ("chf",))


def test_figures_are_selected_by_name_and_by_stem():
    classify, translate = EVALUATION_TASKS["classify"], EVALUATION_TASKS["translate"]
    assert select_figures(classify, ()) == classify.default_figures and select_figures(
        translate, ()
    ) == ("bleu", "chrf", "identical")
    assert select_figures(translate, ("rouge1", "bleu")) == ("bleu", "rouge1")
    assert select_figures(classify, ("f1",)) == ("f1", "f1_macro", "f1_micro")
    with pytest.raises(UsageError, match="no figure 'acc' of the task classify"):
        select_figures(classify, ("acc",))


GENERATORS = {("encoder-decoder", "lm"), ("decoder", "lm")}


@pytest.mark.parametrize(
    "task, able",
    [
        ("classify", {("encoder", "sequence")}),
        ("qa", {("encoder", "span"), *GENERATORS}),
        ("translate", GENERATORS),
        ("summarize", GENERATORS),
        ("pairs", {*GENERATORS, ("encoder", "lm")}),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        ("decoder", "lm"),
        ("encoder", "lm"),
        ("encoder-decoder", "lm"),
        ("encoder", "sequence"),
        ("encoder", "token"),
        ("encoder", "span"),
        ("encoder", "none"),
    ],
    ids="-".join,
)
def test_a_model_is_refused_for_a_task_it_cannot_do(task, able, kind):
    config = ModelConfig(shape=kind[0], head=kind[1])
    if kind in able:
        require_ability(EVALUATION_TASKS[task], "m", config, "a model")
        return
    with pytest.raises(UsageError) as error:
        require_ability(EVALUATION_TASKS[task], "m", config, "a model")
    message = str(error.value)
    assert f"the task {task} needs" in message and f"(shape {kind[0]}, head {kind[1]})" in message
    able = {each for other in EVALUATION_TASKS.values() for each in other.models}
    assert ("--task" in error.value.hint) == (kind in able)


@dataclass
class Span:
    text: str | None
    truncated: bool = False


def test_a_span_model_answers_each_question_about_its_context(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": f"q{k}", "context": f"c{k}", "answers": []}) + "\n"
            for k in (1, 2)
        )
    )
    calls = []

    def answer(questions, contexts, batch):
        calls.append((questions, contexts, batch))
        return [Span("yes"), Span(None, True)]

    model = SimpleNamespace(
        answer=answer, model=SimpleNamespace(config=ModelConfig(shape="encoder", head="span"))
    )
    options = EvaluationOptions(batch_tokens=7)
    predictor = ModelPredictor(EVALUATION_TASKS["qa"], model, options)
    pairs = list(predictor.predict_all(EvalDataset([str(file)], TASK_SCHEMAS["answers"])))
    assert [predicted for _, predicted in pairs] == [("yes",), ()]
    assert calls == [(["q1", "q2"], ["c1", "c2"], 7)]
    assert (predictor.records, predictor.truncated) == (2, 1) and predictor.seconds > 0


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder", "decoder with a template"])
@pytest.mark.parametrize(
    "row, kind, source, target, separator",
    [
        ({"source": "a", "target": "b"}, "texts", "a", "b", "\n"),
        ({"prompt": "a", "completion": " b"}, "texts", "a", " b", ""),
        ({"instruction": "do", "input": "it", "output": "x"}, "texts", "do\nit", "x", "\n"),
        ({"messages": CHAT}, "texts", "user: Hi\nassistant:", " Hello", ""),
        (
            {"question": "q", "context": "c", "answers": ["x"]},
            "answers",
            "question: q context: c",
            "x",
            "\n",
        ),
    ],
)
def test_a_generator_reads_the_source_as_in_training(
    tmp_path, shape, row, kind, source, target, separator
):
    file, calls = tmp_path / "rows.jsonl", []
    file.write_text(json.dumps(row) + "\n")

    def generate(texts, batch, **options):
        calls.append((texts, options))
        return [SimpleNamespace(text=" b\n")]

    shape, _, template = shape.partition(" ")
    settings = {"chat_template": DEFAULT_TEMPLATE, "bos_token": "<s>"} if template else {}
    config = ModelConfig(shape=shape, positions="relative")
    model = SimpleNamespace(
        generate=generate,
        model=SimpleNamespace(config=config),
        tokenizer=SimpleNamespace(settings=settings),
    )
    task = EVALUATION_TASKS["qa" if kind == "answers" else "translate"]
    options = EvaluationOptions(num_beams=3, max_new_tokens=5, stop=("x",), seed=1)
    predictor = ModelPredictor(task, model, options)
    ((record, predicted),) = predictor.predict_all(EvalDataset([str(file)], TASK_SCHEMAS[kind]))
    assert (record.references, predicted) == ((target,), ("b",))
    expected = {"num_beams": 3, "max_new_tokens": 5, "stop": ("x",), "seed": 1, "bos": None}
    if template and "messages" in row:
        source, expected["bos"] = "<s><|user|>\nHi\n<|assistant|>\n", False
    expected["on_long"] = "truncate"
    if shape == "decoder":
        expected |= {"temperature": 0.0, "on_long": "slide"}  # greedy
    assert calls == [([source + (separator if shape == "decoder" else "")], expected)]
