"""Tasks: which records they have, which figures, which models can do them, and the predictions these make."""

import difflib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lmcli.analysis import text_metrics
from lmcli.analysis.benchmark import peak_memory
from lmcli.checkpoints import folder, hub
from lmcli.config import ModelConfig
from lmcli.errors import UsageError, UserError
from lmcli.inference.crew import ALONE, Crew, Errand
from lmcli.inference.scoring import Question
from lmcli.text.asked import PAIR_FIELDS
from lmcli.text.documents import pin_stdin
from lmcli.text.fields import known_pair
from lmcli.text.labelled import FORMS, SAID, Data, Form, Labelled, first_row
from lmcli.text.records import Record

Prediction = tuple[str, ...]  # labels, or one text; () for none


@dataclass(frozen=True)
class Task:
    """A task: how its rows look, what it is measured by unless asked otherwise, what it can be measured by, and the
    (shape, head) of models that can do it, with what they are."""

    name: str
    form: Form
    figures: tuple[str, ...]
    offered: tuple[str, ...]
    models: tuple[tuple[str, str], ...]
    needs: str


LABELS = ("accuracy", "exact_set", "precision", "recall", "f1", "mcc", "confusion")
AVERAGES = tuple(f"{name}_{kind}" for name in ("precision", "recall", "f1") for kind in ("macro", "micro"))
TEXTS = tuple(name for metric, names in text_metrics.FIGURES.items() if metric != "pairs" for name in names)
WRITERS = (("encoder-decoder", "lm"), ("decoder", "lm"))
A_WRITER = "an encoder–decoder or a language model"
TASKS = {task.name: task for task in (
    Task("classify", FORMS["labels"], LABELS, (*LABELS, *AVERAGES), (("encoder", "sequence"),), "a classifier of texts"),
    Task("translate", FORMS["texts"], ("bleu", "chrf", "identical"), TEXTS, WRITERS, A_WRITER),
    Task("summarize", FORMS["texts"], ("rouge1", "rouge2", "rougeL"), TEXTS, WRITERS, A_WRITER),
    Task("qa", FORMS["answers"], ("exact_match", "token_f1"), ("exact_match", "token_f1"), (("encoder", "span"), *WRITERS),
         f"a question-answering model, {A_WRITER}"),
    Task("pairs", FORMS["pairs"], ("first_likelier",), ("first_likelier",), (*WRITERS, ("encoder", "lm")),
         "a language model of any shape"))}


def find(asked: str, row: Record | None, where: str, head: tuple[str, str] | None, metrics: Sequence[str]) -> Task:
    """The task asked for, or with "auto" the one that the fields of the first row tell, else the figures or the model.

    Raises UsageError where nothing tells.
    """
    if asked != "auto":
        return TASKS[asked]
    name = None
    if row is not None and row.fields is not None:
        name = _by_fields(row.fields)
    elif head is not None:
        name = next((task.name for task in TASKS.values() if task.models[0] == head), None)
    if name is None:
        name = next((task.name for metric in metrics for task in TASKS.values()
                     if any(_picks(metric, figure) for figure in task.figures)), None)
    for metric in metrics if name is None else ():
        if not any(_picks(metric, figure) for task in TASKS.values() for figure in task.offered):
            raise _unknown(metric, [figure for task in TASKS.values() for figure in task.figures], "of any task")
    if name is None:
        told = "plain text" if row is None or row.fields is None else f"a row with {', '.join(map(repr, row.fields))}"
        raise UsageError(f"which task? {told} does not tell", where=where, hint=f"--task {', '.join(TASKS)}" + (
            "; --format jsonl where it is JSON Lines" if told == "plain text" else ""))
    return TASKS[name]


def _by_fields(row: Mapping[str, Any]) -> str | None:
    if any(all(name in row for name in names) for names in PAIR_FIELDS):
        return "pairs"
    if "answers" in row or ("question" in row and "answer" in row):
        return "qa"
    if any(name in row for name in FORMS["labels"].references):
        return "classify"
    if any(name in row for name in (*FORMS["texts"].references, *SAID)):
        return "summarize" if "summary" in row or "highlights" in row else "translate"
    return None


def _picks(metric: str, figure: str) -> bool:
    """Whether a name picks a figure: its own, or the part before an underscore."""
    return metric == figure or figure.startswith(f"{metric}_")


def picked(task: Task, names: Sequence[str]) -> tuple[str, ...]:
    """The figures that --metric names pick of a task; those it has by default when there are none.

    Raises UsageError for a name that picks nothing, with the nearest one.
    """
    for name in names:
        if not any(_picks(name, figure) for figure in task.offered):
            raise _unknown(name, task.offered, f"of the task {task.name}")
    return tuple(one for one in task.offered if any(_picks(name, one) for name in names)) if names else task.figures


def _unknown(name: str, known: Sequence[str], where: str) -> UsageError:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return UsageError(f"no figure {name!r} {where}" + (f"; did you mean {near[0]!r}?" if near else ""), where="--metric",
                      hint=f"there are: {', '.join(known)}")


def require(task: Task, name: str, config: ModelConfig, what: str) -> None:
    """Raises UsageError when a model, which is `what`, cannot do a task; it names what could."""
    kind = config.shape, config.head
    if kind in task.models:
        return
    able = ", ".join(other.name for other in TASKS.values() if kind in other.models)
    raise UsageError(f"is {what} (shape {config.shape}, head {config.head}); the task {task.name} needs {task.needs}",
                     where=name, hint=f"it can do --task {able}" if able else f"give {task.needs}, or --predictions FILE")


def configurations(models: Sequence[str]) -> dict[str, ModelConfig]:
    """What each model is, by the name it was given by; no weights are read."""
    return {name: folder.configuration(hub.find(name)) for name in models}


def prepared(asked: str, files: Sequence[str], references: str | None, by: str | None, metrics: Sequence[str],
             models: Mapping[str, ModelConfig], given: Mapping[str, Any]) -> tuple[Data, Task]:
    """The records of a command's options, and the task that they are of. Standard input is kept, to be read again.

    Raises UserError when there is no record and UsageError when nothing tells the task.
    """
    names = {pin_stdin(): "standard input"} if "-" in (*files, references) else {}
    kept = [next(iter(names)) if name == "-" else name for name in (*files, *([references] if references else []))]
    right = kept[len(files):] or kept
    layout = given["format_"] if not references or not files else "auto"
    first, shown_right = first_row(right, layout), ", ".join(names.get(name, name) for name in right[:3])
    if first is None:
        raise UserError("no records in it", where=shown_right, hint="give a file with labelled records, or pipe some in")
    kinds = [(config.shape, config.head) for config in models.values()]
    task = find(asked, first, shown_right, kinds[0] if kinds else None, metrics)
    pair = tuple(given["fields"][0].split(",")) if len(given["fields"]) == 1 and given["fields"][0].count(",") == 1 else ()
    reference = given["reference_field"]
    own = reference or next((name for name in task.form.references if name in (first.fields or {})), None)
    several = isinstance((first.fields or {}).get(own), list) or any(config.multi_label for config in models.values())
    return Data(kept[:len(files)], task.form, given["format_"], kept[-1] if references else None,
                pair or tuple(given["fields"]), bool(pair), reference, given["prediction_field"], several, by, names), task


@dataclass
class Survey:
    """What all records were found to be: the group of each (empty without a field to group by), how many have an empty
    text as what is right, and whether some question has no answer."""

    records: int = 0
    groups: list[str] = field(default_factory=list)
    blank: int = 0
    unanswerable: bool = False


def survey(task: Task, data: Data, models: Mapping[str, ModelConfig]) -> Survey:
    """Reads all records once, so that what is wrong is told before the work.

    Raises UserError for bad ones, for one without a text that a model could read and for a label that
    a model does not have.
    """
    found = Survey()
    for record in data:
        found.records += 1
        if data.by:
            value = record.row[data.by]
            found.groups.append("NA" if value is None else value if isinstance(value, str) else json.dumps(value))
        if models and not record.inputs:
            inputs = " or ".join(repr(" and ".join(names)) for names in task.form.inputs)
            raise UserError("nothing for the model to read: " + (f"no field {inputs}" if record.row else "a plain line says "
                            "what is right"), where=record.place, hint="--field names another; --predictions needs none"
                            if record.row else "give FILE with what is to be read, and this as --references FILE")
        found.unanswerable |= not record.references
        found.blank += task.form.kind == "texts" and not any(text.strip() for text in record.references)
        for name, config in models.items():
            for label in record.references if config.head == "sequence" else ():
                if label not in config.labels:
                    raise UserError(f"label {label!r} is none of the model's labels", where=record.place,
                                    hint=f"the labels of {name}: {', '.join(config.labels[:20])}")
    return found


@dataclass
class Runner:
    """A model at work on a task. `options` are those of writing (max_new_tokens, num_beams, stop, seed). Facts of the run:
    `cut` counts the texts that the model could not read whole, `seconds` the time the predictions took."""

    task: Task
    model: Any  # an lmcli.api.Model
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 0
    cut: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    records: int = field(default=0, init=False)

    def predictions(self, data: Data, crew: Crew = ALONE, place: int = 0) -> Iterator[tuple[Labelled, Prediction]]:
        """Each record with what the model says of it; those of a crew know the model by its place (see `errand`)."""
        size = 128 if self._work == self._texts else 512  # texts take long: tell how far it is
        found, began = crew.in_order(data.parts(size), Errand(self.work, partial(self._said, place))), time.perf_counter()
        for part, (predictions, cut) in found:
            self.seconds += time.perf_counter() - began
            self.records += len(part)
            self.cut += cut
            yield from zip(part, map(tuple, predictions), strict=True)
            began = time.perf_counter()

    def work(self, part: Sequence[Labelled]) -> tuple[list[Prediction], int]:
        """What the model says of some records, and how many of them it could not read whole."""
        return self._work(part)

    def _said(self, place: int, part: Sequence[Labelled]) -> tuple[int, str, list[tuple]]:
        return place, self.task.name, [(record.inputs, record.row) for record in part]

    @property
    def _work(self) -> Callable[[Sequence[Labelled]], tuple[list[Prediction], int]]:
        span = self.model.model.config.head == "span"
        return {"labels": self._labels, "texts": self._texts, "answers": self._answers if span else self._texts,
                "pairs": self._pairs}[self.task.form.kind]

    def _labels(self, part: Sequence[Labelled]) -> tuple[list[Prediction], int]:
        texts = [record.inputs if len(record.inputs) == 2 else record.inputs[0] for record in part]
        found = self.model.classify(texts, batch=self.batch)
        return [tuple(one.labels) for one in found], sum(one.truncated for one in found)

    def _texts(self, part: Sequence[Labelled]) -> tuple[list[Prediction], int]:
        config, cut = self.model.model.config, 0
        sources = [_prompt(record, config.shape == "decoder") for record in part]
        readable = [i for i, record in enumerate(part) if any(map(str.strip, record.inputs))]  # a blank one gives nothing
        options = {"temperature": 0.0} | self.options if config.shape == "decoder" else self.options
        if config.positions != "relative":
            cut = sum(len(self.model.prompt(sources[i])) > self.model.context for i in readable)
        found = self.model.generate([sources[i] for i in readable], batch=self.batch, **options) if readable else []
        texts = dict(zip(readable, (one.text.strip() for one in found)))
        return [(texts[i],) if texts.get(i) else () for i in range(len(part))], cut

    def _answers(self, part: Sequence[Labelled]) -> tuple[list[Prediction], int]:
        questions, contexts = map(list, zip(*(record.inputs for record in part)))
        found = self.model.answer(questions, contexts, batch=self.batch)
        return [(one.text,) if one.text else () for one in found], sum(one.truncated for one in found)

    def _pairs(self, part: Sequence[Labelled]) -> tuple[list[Prediction], int]:
        scores = iter(self.model.scorer(batch=self.batch).score([Question(text) for one in part for text in one.inputs]))
        both = ((first.logprob, second.logprob) for first, second in zip(scores, scores))
        return [() if None in pair else (str(pair[0] > pair[1]).lower(),) for pair in both], 0

    def facts(self, followed: bool) -> dict[str, Any]:
        """What the model costs: parameters, bytes of its weights on disk, the most memory that the process held since it
        was `followed` (see model/device.py), records a second."""
        model = self.model
        return {"parameters": sum(weight.numel() for weight in model.model.parameters()),
                "disk_bytes": sum(file.stat().st_size for file in model.folder.glob("*.safetensors")),
                "memory_bytes": peak_memory(model.placement.device) if followed else None,
                "records_per_second": self.records / self.seconds if self.seconds else None}


def errand(models: Sequence[str], runner: Callable[[str, Task], Runner]) -> Errand:
    """The predictions of whichever of the models the leader of a crew is at; `runner` loads one."""
    held: dict[int, Runner] = {}

    def work(said: tuple[int, str, list[tuple]]) -> tuple[list[Prediction], int]:
        place, task, records = said
        if place not in held:
            held.clear()  # first: memory may not do for both
            held[place] = runner(models[place], TASKS[task])
        return held[place].work([Labelled(tuple(inputs), (), None, row, "", 0) for inputs, row in records])

    return Errand(work)


def _prompt(record: Labelled, continued: bool) -> str:
    """What a model that writes is to read, as one that learnt from such rows has read it: a question with its context, and
    with `continued` what parts both sides there."""
    pair = known_pair(record.row)
    asked = f"question: {record.inputs[0]} context: {record.inputs[1]}" if len(record.inputs) == 2 else record.inputs[0]
    return asked + (pair.between if pair else "\n") if continued else asked
