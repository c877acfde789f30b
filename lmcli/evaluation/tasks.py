"""The tasks of `lm evaluate`: the fields of their rows, their figures, and models for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcli.config import ModelConfig
from lmcli.data.diagnostics import fields_option, rows_by_look
from lmcli.data.rows import Record
from lmcli.data.schema import (
    MINIMAL_PAIR_FIELDS,
    PAIR_SCHEMAS,
    SOURCE_TARGET,
    TASK_SCHEMAS,
    TEXT_LABEL_FIELDS,
    TaskSchema,
)
from lmcli.errors import UsageError, did_you_mean
from lmcli.evaluation.text_metrics import TEXT_FIGURES

ModelKind = tuple[str, str]  # (shape, head)


@dataclass(frozen=True)
class Task:
    """A task: the fields of its rows, its figures by default, all it offers, and who can do it.

    `models` are the kinds of models that can do it, `needs` says so in words.
    """

    name: str
    schema: TaskSchema
    default_figures: tuple[str, ...]
    figures: tuple[str, ...]
    models: tuple[ModelKind, ...]
    needs: str


CLASS_AVERAGES = tuple(
    f"{name}_{kind}" for name in ("precision", "recall", "f1") for kind in ("macro", "micro")
)
LABEL_FIGURES = ("accuracy", "exact_set", "precision", "recall", "f1", "mcc", "confusion")
GENERATION_FIGURES = tuple(
    name for source, names in TEXT_FIGURES.items() if source != "pairs" for name in names
)
GENERATORS = (("encoder-decoder", "lm"), ("decoder", "lm"))
NEEDS_GENERATOR = "an encoder–decoder or a language model"


def _generation_task(name: str, default_figures: tuple[str, ...]) -> Task:
    schema = TASK_SCHEMAS["texts"]
    return Task(name, schema, default_figures, GENERATION_FIGURES, GENERATORS, NEEDS_GENERATOR)


EVALUATION_TASKS = {
    task.name: task
    for task in (
        Task(
            "classify",
            TASK_SCHEMAS["labels"],
            LABEL_FIGURES,
            (*LABEL_FIGURES, *CLASS_AVERAGES),
            (("encoder", "sequence"),),
            "a classifier of texts",
        ),
        _generation_task("translate", ("bleu", "chrf", "identical")),
        _generation_task("summarize", TEXT_FIGURES["rouge"]),
        Task(
            "qa",
            TASK_SCHEMAS["answers"],
            TEXT_FIGURES["squad"],
            TEXT_FIGURES["squad"],
            (("encoder", "span"), *GENERATORS),
            f"a question-answering model, {NEEDS_GENERATOR}",
        ),
        Task(
            "pairs",
            TASK_SCHEMAS["pairs"],
            TEXT_FIGURES["pairs"],
            TEXT_FIGURES["pairs"],
            (*GENERATORS, ("encoder", "lm")),
            "a language model of any shape",
        ),
    )
}


def find_task(
    name: str, first: Record | None, where: str, model: ModelKind | None, metrics: Sequence[str]
) -> Task:
    """The task called `name`; for "auto" the one that the first record's fields show.

    Where these are no help, the model decides, then --metric. Raises UsageError if nothing does.
    """
    if name != "auto":
        return EVALUATION_TASKS[name]
    tasks, row = EVALUATION_TASKS.values(), first.fields if first else None
    candidates: list[str | None] = []
    if row is not None:
        candidates.append(_task_of_fields(row))
    elif model is not None:
        candidates += [task.name for task in tasks if task.models[0] == model]
    for metric in metrics:
        candidates += [task.name for task in tasks if _selects_any(metric, task.default_figures)]
    if candidate := next(filter(None, candidates), None):
        return EVALUATION_TASKS[candidate]
    for metric in metrics:
        if not any(_selects_any(metric, task.figures) for task in tasks):
            figures = [figure for task in tasks for figure in task.default_figures]
            raise _unknown_figure(metric, figures, "of any task")
    hint = f"--task {', '.join(EVALUATION_TASKS)}"
    if row is None:
        shown, look = "plain text", rows_by_look(first.text) if first else ""
        hint = f"it {look}" if look else f"{hint}; --format jsonl if it is JSON Lines"
    else:
        shown = f"a row with {', '.join(map(repr, row))}"
        pairs = model is not None and model[0] == "encoder-decoder"
        roles, what = (SOURCE_TARGET, "pairs") if pairs else (TEXT_LABEL_FIELDS, "labels")
        hint = f"{fields_option([row], roles)} if it has {what}, or {hint}"
    raise UsageError(f"which task? {shown} does not show it", where=where, hint=hint)


def _task_of_fields(row: Mapping[str, Any]) -> str | None:
    if any(all(name in row for name in names) for names in MINIMAL_PAIR_FIELDS):
        return "pairs"
    if "answers" in row or ("question" in row and "answer" in row):
        return "qa"
    if any(name in row for name in TASK_SCHEMAS["labels"].references):
        return "classify"
    composed = (schema.fields[0] for schema in PAIR_SCHEMAS if schema.composed)
    if any(name in row for name in (*TASK_SCHEMAS["texts"].references, *composed)):
        return "summarize" if "summary" in row or "highlights" in row else "translate"
    return None


def selects(metric: str, figure: str) -> bool:
    """Whether a --metric selects a figure: by its name, or by the part before an underscore."""
    return metric == figure or figure.startswith(f"{metric}_")


def _selects_any(metric: str, figures: Sequence[str]) -> bool:
    return any(selects(metric, figure) for figure in figures)


def select_figures(task: Task, metrics: Sequence[str]) -> tuple[str, ...]:
    """The figures of a task that --metric selects; its default ones without any.

    Raises UsageError for a name that selects nothing, with the nearest one.
    """
    for metric in metrics:
        if not _selects_any(metric, task.figures):
            raise _unknown_figure(metric, task.figures, f"of the task {task.name}")
    if not metrics:
        return task.default_figures
    return tuple(f for f in task.figures if any(selects(metric, f) for metric in metrics))


def _unknown_figure(name: str, known: Sequence[str], where: str) -> UsageError:
    return UsageError(
        f"no figure {name!r} {where}{did_you_mean(name, known)}",
        where="--metric",
        hint=f"choose from: {', '.join(known)}",
    )


def require_ability(task: Task, name: str, config: ModelConfig, description: str) -> None:
    """Raises UsageError if a model cannot do a task, naming what it is and what could."""
    kind = config.shape, config.head
    if kind in task.models:
        return
    able = ", ".join(other.name for other in EVALUATION_TASKS.values() if kind in other.models)
    raise UsageError(
        f"is {description} (shape {config.shape}, head {config.head}); "
        f"the task {task.name} needs {task.needs}",
        where=name,
        hint=f"use --task {able}" if able else f"give {task.needs}, or --predictions FILE",
    )
