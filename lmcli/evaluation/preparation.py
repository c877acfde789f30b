"""From the options of `lm evaluate` to the records, their task, and a survey of all records."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmcli.checkpoints import folder, hub
from lmcli.config import ModelConfig
from lmcli.data.diagnostics import rows_by_look
from lmcli.data.files import display_name, pin
from lmcli.data.rows import Record, named_roles
from lmcli.data.schema import TASK_SCHEMAS, field_names
from lmcli.errors import UsageError, UserError, did_you_mean
from lmcli.evaluation.predictions import EvalDataset, EvalRecord, first_record
from lmcli.evaluation.systems import LabelCounts, TextCounts
from lmcli.evaluation.tasks import Task, find_task
from lmcli.evaluation.text_metrics import select_text_metrics
from lmcli.terminal import progress

RECORDS_TO_JUDGE = 100  # the models' tokenizers by


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `lm evaluate`, without files, models and the device."""

    task: str = "auto"
    metrics: tuple[str, ...] = ()
    references: str | None = None
    by: str | None = None
    format: str = "auto"
    fields: tuple[str, ...] = ()
    reference_field: str | None = None
    prediction_field: str | None = None
    bleu_tokenizer: str = "13a"
    stemmer: bool = False
    max_new_tokens: int | None = None
    num_beams: int | None = None
    stop: tuple[str, ...] = ()
    batch_tokens: int = 0
    resamples: int = 1000
    seed: int = 0


def model_configs(models: Sequence[str]) -> dict[str, ModelConfig]:
    """The configuration of each model, by its name; no weights are read."""
    return {name: folder.load_config(hub.find(name)) for name in models}


def open_dataset(
    options: EvaluationOptions, files: Sequence[str], configs: Mapping[str, ModelConfig]
) -> tuple[EvalDataset, Task]:
    """The records of files and their task; pipes are copied, so that they can be read again.

    Raises UserError if there is no record and UsageError if nothing shows the task.
    """
    references = [options.references] if options.references else []
    pinned = {name: pin(name) for name in dict.fromkeys([*files, *references])}

    # the file with the references shows the task
    sources = [pinned[name] for name in references or files]
    where = ", ".join(map(display_name, sources[:3]))
    first = first_record(sources, "auto" if references and files else options.format)
    if first is None:
        hint = "give a file with records and their labels or references, or pipe some in"
        raise UserError("no records in it", where=where, hint=hint)
    options, first = _with_roles(options, first)
    kinds = [(config.shape, config.head) for config in configs.values()]
    task = find_task(options.task, first, where, kinds[0] if kinds else None, options.metrics)

    # a list of labels, in the first record or as a model gives them, means any number of labels
    row, name = first.fields or {}, options.reference_field
    label_field = name or next((name for name in task.schema.references if name in row), "")
    fields = options.fields
    paired = len(fields) == 1 and fields[0].count(",") == 1
    dataset = EvalDataset(
        files=[pinned[name] for name in files],
        schema=task.schema,
        format=options.format,
        references=sources[0] if references else None,
        fields=tuple(fields[0].split(",")) if paired else fields,
        paired=paired,
        reference=name,
        prediction=options.prediction_field,
        multi_label=isinstance(row.get(label_field), list)
        or any(config.multi_label for config in configs.values()),
        by=options.by,
        labels=tuple(
            dict.fromkeys(label for config in configs.values() for label in config.labels)
        ),
    )
    return dataset, task


def _with_roles(options: EvaluationOptions, first: Record) -> tuple[EvaluationOptions, Record]:
    """`--fields text=review,label=stars` as --field and --reference-field, and its first record.

    Raises UsageError for a role that no task has, and if only some fields have a role.
    """
    row = dict(first.fields or {})
    roles = named_roles(options.fields, row)
    if not roles:
        return options, first
    inputs = [name for schema in TASK_SCHEMAS.values() for names in schema.inputs for name in names]
    references = [name for schema in TASK_SCHEMAS.values() for name in schema.references]
    columns = [name for role in references for name in roles.get(role, ())]
    unknown = next((role for role in roles if role not in (*inputs, *references)), None)
    what = ""
    if unknown is not None:
        what = f"{unknown!r} is no role here"
    elif sum(map(len, roles.values())) < len(options.fields):
        example = next(name for name in options.fields if named_roles([name], row))
        what = f"not all fields have a role, as {example!r} has"
    elif len(columns) > 1:
        what = f"{columns[0]!r} and {columns[1]!r} are both the reference"
    if not what and (missing := set().union(*roles.values()) - row.keys()):
        column = min(missing)
        raise UsageError(
            f"no column {column!r}{did_you_mean(column, row)}",
            where="--fields",
            hint=f"the columns in {display_name(first.file)}: {field_names(row)}",
        )
    if what:
        raise UsageError(what, where="--fields", hint="write text=COLUMN,label=COLUMN")
    ordered = sorted((role for role in roles if role in inputs), key=inputs.index)
    row |= {role: row[names[0]] for role, names in roles.items() if names[0] in row}
    options = replace(
        options,
        fields=tuple(name for role in ordered for name in roles[role]),
        reference_field=columns[0] if columns else options.reference_field,
    )
    return options, replace(first, fields=row)


@dataclass
class DatasetSurvey:
    """Facts of all records: their number, groups (by the field `by`) and how many lack a text.

    `unanswerable` says whether some question has no answer. `texts` are the first inputs.
    """

    records: int = 0
    groups: list[str] = field(default_factory=list)
    empty_references: int = 0
    unanswerable: bool = False
    texts: list[str] = field(default_factory=list)


def survey_dataset(
    task: Task, dataset: EvalDataset, configs: Mapping[str, ModelConfig]
) -> DatasetSurvey:
    """Reads all records once, so that errors in them come before the work.

    Raises UserError for a bad record, for one without an input for a model, and for a label that
    a model does not have.
    """
    survey = DatasetSurvey()
    for record in _read(dataset):
        survey.records += 1
        if dataset.by:
            value = record.row[dataset.by]
            name = value if isinstance(value, str) else json.dumps(value)
            survey.groups.append("NA" if value is None else name)
        if configs and not record.inputs:
            raise _no_input(task, record)
        if survey.records <= RECORDS_TO_JUDGE:
            survey.texts += record.inputs
        survey.unanswerable |= not record.references
        if task.schema.kind == "texts" and not any(text.strip() for text in record.references):
            survey.empty_references += 1
        for name, config in configs.items():
            for label in record.references if config.head == "sequence" else ():
                if label not in config.labels:
                    raise UserError(
                        f"label {label!r} is not one of the model's labels",
                        where=record.location,
                        hint=f"the labels of {name} are {', '.join(config.labels[:20])}",
                    )
    return survey


def _read(dataset: EvalDataset) -> Iterator[EvalRecord]:
    with progress.stage("reading", unit="bytes"):
        yield from dataset


def _no_input(task: Task, record: EvalRecord) -> UserError:
    if not record.row:
        # a label has its plain name last, other references have it first
        references = task.schema.references[:: -1 if task.schema.kind == "labels" else 1]
        needed = " and ".join(task.schema.inputs[0] + references[:1])
        problem = f"this plain line is read as the reference, without an input ({needed})"
        look = rows_by_look(record.references[0] if record.references else "")
        hint = (
            f"it {look}"
            if look
            else (
                f"give rows with {needed} (.jsonl, .tsv, .csv), or plain inputs in FILE and their "
                f"references, line by line, in --references FILE"
            )
        )
    else:
        names = " or ".join(repr(" and ".join(names)) for names in task.schema.inputs)
        problem, hint = f"no field {names}", "name another with --field, or use --predictions"
    return UserError(f"no input for the model: {problem}", where=record.location, hint=hint)


def new_counts(
    options: EvaluationOptions, dataset: EvalDataset, figures: Sequence[str], survey: DatasetSurvey
) -> LabelCounts | TextCounts:
    """Empty counts for a system. Raises UserError if a metric's library is not installed."""
    if dataset.schema.kind == "labels":
        return LabelCounts(dataset.multi_label)
    squad_version = 2 if survey.unanswerable else 1
    return TextCounts(
        select_text_metrics(figures, options.bleu_tokenizer, options.stemmer, squad_version)
    )
