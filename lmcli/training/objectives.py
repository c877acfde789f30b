"""The table of all objectives; which one a run has, and the data it is encoded into."""

from collections.abc import Callable
from dataclasses import replace

from lmcli.config import TokenizerConfig
from lmcli.data import corpus
from lmcli.data.documents import DocumentFormat, first_row
from lmcli.errors import UsageError
from lmcli.text.tokenizer import Tokenizer
from lmcli.training.datasets import Source, Split
from lmcli.training.example_objectives import CLASSIFICATION, COMPLETION, SEQ2SEQ
from lmcli.training.language_modeling import CAUSAL, MASKED
from lmcli.training.objective import EncodingInput, FirstRow, Objective, TrainingData
from lmcli.training.span_prediction import SPAN

# of those with one shape, `auto` takes the first that recognizes the data
OBJECTIVES = {row.name: row for row in (COMPLETION, CAUSAL, SEQ2SEQ, SPAN, CLASSIFICATION, MASKED)}


def resolve_objective(
    source: Source, name: str, shape: str, note: Callable[[str], None], multi_label: bool = False
) -> tuple[Objective, DocumentFormat]:
    """The objective and how its rows are read; "auto" goes by the model's shape and the first row.

    Raises UsageError if the objective needs another shape; UserError if fields are missing.
    """
    first = FirstRow(
        first_row(source.files, source.doc_format) or {},
        source.doc_format,
        source.files[0],
        multi_label,
        note,
    )
    if name == "auto":
        objective = next(
            row for row in OBJECTIVES.values() if row.shape == shape and row.recognizes(first)
        )
    else:
        objective = OBJECTIVES[name]
    if objective.shape != shape:
        raise UsageError(
            f"objective {objective.name} needs the shape {objective.shape}, not {shape}",
            where="train",
            hint="choose a preset of that shape: encoder-small, seq2seq-small, small (a decoder)",
        )
    if source.shares and not objective.mixable:
        raise UsageError(
            f"--weights mixes text, and objective {objective.name} learns from single rows",
            where="train",
            hint="leave --weights out, or for a decoder --set train.objective=causal",
        )
    return objective, objective.document_format(replace(first, objective=objective.name))


def encode(
    objective: Objective,
    split: Split,
    config: TokenizerConfig,
    context: int,
    tokenizer: Tokenizer | None,
    note: Callable[[str], None],
    labels: tuple[str, ...] = (),
) -> TrainingData:
    """The encoded training and validation sets; a tokenizer is learned if none is given.

    `labels` are those of a model that is trained further. Raises UserError for too little text.
    """
    if tokenizer is None:
        tokenizer = corpus.learn_tokenizer(
            split.training, split.source.doc_format, config, note, objective.shape
        )
    return objective.encode(EncodingInput(objective, split, tokenizer, context, note, labels))
