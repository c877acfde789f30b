"""The table of all objectives; which one a run has, and the data it is encoded into."""

from collections.abc import Callable
from dataclasses import replace

from lmcli.config import ModelConfig, TokenizerConfig
from lmcli.data import corpus
from lmcli.data.documents import DocumentFormat, first_rows
from lmcli.data.files import display_name
from lmcli.errors import UsageError
from lmcli.terminal import progress
from lmcli.text.tokenizer import Tokenizer
from lmcli.training.datasets import FirstRows, Source, Split
from lmcli.training.example_objectives import CLASSIFICATION, COMPLETION, SEQ2SEQ
from lmcli.training.language_modeling import CAUSAL, MASKED
from lmcli.training.objective import EncodingInput, Objective, TrainingData
from lmcli.training.span_prediction import SPAN

FIRST_ROWS = 100  # that are looked at for their fields
# `auto` takes the first that recognizes the data, else the last one of the model's shape
OBJECTIVES = {row.name: row for row in (SPAN, CLASSIFICATION, SEQ2SEQ, COMPLETION, CAUSAL, MASKED)}


def resolve_objective(
    source: Source,
    name: str,
    model: ModelConfig,
    note: Callable[[str], None],
    command: str = "lm train DATA",
    any_shape: bool = False,
) -> tuple[Objective, DocumentFormat]:
    """The objective and how its rows are read; "auto" goes by the model and the first rows.

    With `any_shape` the model may be another one. `command` is the command line so far, for
    messages. Raises UsageError if the objective needs another shape, and if the data have not the
    fields it needs.
    """
    with_rows = [file for file in source.files if source.doc_format.has_rows(file)]
    first = FirstRows(
        first_rows(source.files, source.doc_format, FIRST_ROWS),
        source.doc_format,
        (with_rows or source.files)[0],
        note,
        model.multi_label,
        command,
        may_classify=name == "auto" and (any_shape or model.shape == CLASSIFICATION.shape),
    )
    objective = OBJECTIVES[name] if name != "auto" else _recognized(first, model, any_shape)
    if objective.shape != model.shape and not any_shape:
        raise UsageError(
            f"objective {objective.name} needs the shape {objective.shape}, not {model.shape}",
            where="train",
            hint="choose a preset of that shape: encoder-small, seq2seq-small, small (a decoder)",
        )
    if source.shares and not objective.mixable:
        raise UsageError(
            f"--weights mixes text, and objective {objective.name} learns from single rows",
            where="train",
            hint="leave --weights out, or for a decoder --set train.objective=causal",
        )
    try:
        doc_format = objective.document_format(replace(first, learns=objective.learns))
    except UsageError as error:
        other = next((row for row in OBJECTIVES.values() if row.recognizes(first)), objective)
        if other is objective or not other.preset:
            raise
        hint = f"{error.hint}; --preset {other.preset} learns from these fields"
        raise UsageError(error.what, error.where, hint) from error
    for file in (*source.files, *source.validation_files) if doc_format.has_examples else ():
        if not doc_format.has_rows(file):
            raise UsageError(
                f"{objective.learns}, and this is plain text",
                where=display_name(file),
                hint="leave it out, or name the format of all files with --format",
            )
    return objective, doc_format


def _recognized(first: FirstRows, model: ModelConfig, any_shape: bool) -> Objective:
    """The objective that the fields show, else that of the model's head, else of its shape.

    Raises UsageError for a head that no objective trains.
    """
    rows = [row for row in OBJECTIVES.values() if any_shape or row.shape == model.shape]
    if recognized := next((row for row in rows if row.recognizes(first)), None):
        return recognized
    *_, usual = (row for row in rows if row.shape == model.shape)
    if model.head in ("none", usual.head):
        return usual
    if own := next((row for row in rows if row.head == model.head), None):
        return own
    raise UsageError(
        f"no objective trains a model with the head {model.head}",
        where="--from",
        hint=f"--set train.objective={usual.name} gives it a new head",
    )


def encode(
    objective: Objective,
    split: Split,
    config: TokenizerConfig,
    context: int,
    tokenizer: Tokenizer | None,
    note: Callable[[str], None],
    labels: tuple[str, ...] = (),
    deadline: float | None = None,
) -> TrainingData:
    """The encoded training and validation sets; a tokenizer is learned if none is given.

    `labels` are those of a model that is trained further. Raises UserError for too little text, and
    for a tokenizer that is not learned by the `deadline` (of `time.monotonic`).
    """
    if tokenizer is None:
        progress.now("learning the tokenizer")
        tokenizer = corpus.learn_tokenizer(
            split.training, split.source.doc_format, config, note, objective.shape, deadline
        )
    progress.now("tokenizing the data")
    return objective.encode(EncodingInput(objective, split, tokenizer, context, note, labels))
