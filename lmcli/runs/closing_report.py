"""What a run has reached, what its figure means, and what to do next, for the end of the screen."""

import math
import os
import shlex
from contextlib import suppress
from dataclasses import replace

from lmcli.data.documents import read_pieces
from lmcli.errors import UserError
from lmcli.runs.run import TrainingRun
from lmcli.scoring import baselines
from lmcli.terminal import progress
from lmcli.terminal.training_state import Comparison, Report, clock


def report(run: TrainingRun) -> Report:
    """The report of a finished run. Measures gzip and an n-gram model, in about a second."""
    record, result = run.record, run.record.result
    best, steps = result["best_step"], result["steps"]
    selection = run.objective.selection(record.recipe.train)
    when = f"best at step {best:,} of {steps:,} ({selection})" if best else "as before training"
    figures = [
        *record.headline.split(" · "),
        when,
        f"{result['tokens']:,} tokens",
        f"{result['epochs']:.2f} epochs",
        f"in {clock(result['seconds'])}",
    ]
    example = record.example(str(run.folder))
    if not (path := os.path.relpath(example.data)).startswith(os.pardir):
        example = replace(example, data=path)
    usage = example.shell(run.objective.card.usage)
    longer = f"lm train --resume {shlex.quote(str(run.folder))} --time 10m"
    comparison = None
    with suppress(UserError):  # a file of the data has gone meanwhile: the run is done without it
        comparison = _comparison(run)
    return Report(str(run.folder), figures, comparison, [*usage.split("\n"), longer])


def _comparison(run: TrainingRun) -> Comparison | None:
    """The run's figure beside baselines on the same validation set, if there are any."""
    result = run.record.result
    if run.record.data.bytes_per_token and "val_bits_per_byte" in result:
        return _text_comparison(run, result["val_bits_per_byte"])
    if frequent := run.record.data.most_frequent:
        label, share = frequent
        return Comparison(
            "accuracy on the validation set, more is better",
            {"this model": result["val_accuracy"], "one label": share},
            f"One label: always {label!r}, the most frequent one.",
        )
    if "val_unigram_entropy" in result and math.isfinite(result["val_loss"]):
        return Comparison(
            f"nats per {run.objective.target} on the validation set, fewer are better",
            {"this model": result["val_loss"], "unigram": result["val_unigram_entropy"]},
            "Unigram knows only how frequent each answer is.",
        )
    return None


def _text_comparison(run: TrainingRun, value: float) -> Comparison:
    progress.now("comparing with gzip and a 5-gram model")
    record = run.record
    pieces = read_pieces(record.data.measured, record.source.doc_format)
    values = {"this model": value}
    remark = ""
    if ngram := _ngram_bits_per_byte(run):
        values["5-gram"], tokens = ngram
        remark = f"The 5-gram model (Kneser-Ney) is counted on {tokens:,} of the training tokens. "
    values["gzip"] = baselines.gzip_bits_per_byte(piece.text for piece in pieces)
    remark += "Gzip sees the validation set alone."
    return Comparison("bits per byte on the validation set, fewer are better", values, remark)


def _ngram_bits_per_byte(run: TrainingRun) -> tuple[float, int] | None:
    """(bits per byte of an n-gram model, tokens it is counted on): no more than the run has read.

    None for more validation text than is read in a second.
    """
    data, result = run.record.data, run.record.result
    documents = data.validation_ids
    training = data.training_ids(min(result["tokens"], baselines.MOST_TOKENS))
    if training is None or sum(map(len, documents)) > baselines.MOST_TOKENS:
        return None
    start = data.tokenizer.prefix
    logs = baselines.ngram_logprobs(training, documents, data.tokenizer.size, start)
    skipped = 0 if start else 1  # a first token without any before it is not scored
    nats = -sum(float(each[skipped:].sum()) for each in logs)
    return nats / math.log(2) / result["val_bytes"], len(training)
