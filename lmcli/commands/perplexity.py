"""lm perplexity: how well models predict files."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.byte_ranges import Document
    from lmcli.data.documents import DocumentFormat
    from lmcli.evaluation.model_comparison import DocumentGroup
    from lmcli.evaluation.signature import Signature
    from lmcli.scoring.scorer import Scorer
    from lmcli.text.tokenizer import Tokenizer

PIECES_TO_JUDGE = 20  # the tokenizers by, of a text


class Loaded(NamedTuple):
    """A model by its name, and how it scores."""

    name: str
    folder: Path
    model: "Model"
    scorer: "Scorer"


class PerplexitySource(NamedTuple):
    """A file or validation set: `documents()` reads it anew; `models` are numbers of models."""

    name: str
    bytes: int
    documents: Callable[[], Iterable["Document"]]
    format: "DocumentFormat"
    models: Sequence[int]


@options.command(
    """
  lm perplexity -m runs/s other.txt
  lm perplexity -m runs/s --validation
  lm perplexity -m runs/a -m runs/b --documents line test.txt
  lm perplexity -m runs/s --by topic articles.jsonl
  cat *.txt | lm perplexity -m runs/s --documents line
  lm perplexity -m runs/s --verify "lm-perplexity|model:…" other.txt
""",
    guide="scoring",
)
@options.files
@options.models("Model folder; several are compared with the first.")
@options.flag("--validation", help="Measure the validation set of the model's run.")
@click.option("--by", metavar="FIELD", help="One row per value of this field.")
@options.rare(
    options.number(
        "--differing",
        at_least=0,
        default=3,
        help="With several models: name the N lines that differ most from the first; "
        "with --json N of each.",
    ),
    options.flag("--eos/--no-eos", default=False, help="Score the EOS token of each document too."),
    click.option(
        "--verify",
        metavar="SIGNATURE",
        help="Measure as this signature says, and check that the result is the same.",
    ),
)
@options.documents
@options.windows
@options.bos
@options.json_output
@options.reading_documents
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.multiprocess
def perplexity(args: options.Arguments) -> None:
    """Perplexity and bits per byte, a row for each file and model.

    Every token is scored once, with at least context - stride tokens of its document before it.
    Compare bits per byte between any models, perplexity only between models with the same
    tokenizer. logprob is in nats; NAME_se is the standard error over documents. With several models
    each row has the difference of its bits per byte from the first model's, with a 95 % interval
    over documents. The last column is a signature that --verify can check; a terminal shows it with
    -v.
    What each number means: lm help numbers.
    """
    options.distinct_models(args.models)
    if args.validation and (args.files or args.by):
        raise UsageError(
            "--validation measures the run's own validation set", hint="leave out FILE and --by"
        )
    expected = _apply_signature(args) if args.verify else None
    files = []
    if args.pool.is_leader and not args.validation:
        files = options.input_files(args.files, args.include, args.quiet)
    from lmcli.data.files import display_name
    from lmcli.display import note, print_rows
    from lmcli.output import perplexity as output
    from lmcli.output.cells import short_names
    from lmcli.scoring.perplexity import remote_task
    from lmcli.terminal.wrapping import message_for

    models = [_load(name, args) for name in args.models]
    if not args.pool.is_leader:
        return args.pool.serve(*(remote_task(loaded.scorer) for loaded in models))
    if expected:
        return _verify(expected, [row["signature"] for row in _rows(args, models, files)])
    columns = output.columns("group" if args.by else "file", len(models) > 1)
    shown_files = [display_name(path) for path in files]
    names = dict(zip(shown_files, short_names(shown_files)))
    names |= dict(zip(args.models, short_names(args.models)))
    rows: list[dict[str, Any]] = []
    measured = _appended(_rows(args, models, files), rows)
    print_rows(
        map(output.json_row, measured) if args.as_json else measured,
        columns,
        args.as_json,
        lambda row: output.readable(row, names),
    )
    if args.verbose and sys.stdout.isatty() and not args.as_json:
        for row in rows:
            options.echo(message_for(sys.stdout, row["signature"]))
    for text in () if args.quiet else output.remarks(rows, names):
        note(text)


def _appended(rows: Iterable[dict[str, Any]], seen: list[dict[str, Any]]) -> Iterator[dict]:
    """The rows as they come; each is also appended to `seen`."""
    for row in rows:
        seen.append(row)
        yield row


def _load(name: str, args: options.Arguments) -> Loaded:
    model = options.load_model(name, args)
    model.require("perplexity")
    assert model.folder is not None  # it was loaded from one
    batch = args.batch_tokens or 0
    scorer = model.scorer(args.bos, args.eos, args.context, args.stride, batch)
    return Loaded(name, model.folder, model, scorer)


def _apply_signature(args: options.Arguments) -> "Signature":
    """The signature of --verify, whose settings replace those of the options."""
    from lmcli.evaluation.signature import Signature

    signature = Signature.parse(args.verify)
    for name in ("documents", "context", "stride", "dtype"):
        setattr(args, name, getattr(signature, name))
    args.bos, args.eos, args.quiet = bool(signature.bos), bool(signature.eos), True
    return signature


def _rows(
    args: options.Arguments, models: list[Loaded], files: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each file or group, and model."""
    from lmcli.evaluation import model_comparison, signature

    hashes = [signature.model_hash(loaded.folder) for loaded in models]
    tokenizers = {loaded.name: loaded.scorer.text_tokenizer for loaded in models}
    sources = _validation_sets(models) if args.validation else _sources(args, files, tokenizers)
    for source in sources:
        with progress.stage(source.name, source.bytes * len(source.models), "bytes"):
            groups = model_comparison.compare_models(
                [models[k].scorer for k in source.models],
                source.name,
                source.documents,
                source.format,
                args.by or "",
                args.differing if len(source.models) > 1 else 0,
                args.pool,
                source.models,
            )
        for group in groups:
            for position, k in enumerate(source.models):
                yield _row(args, models, k, hashes[k], group, position)


def _row(
    args: options.Arguments,
    models: list[Loaded],
    k: int,
    model_hash: str,
    group: "DocumentGroup",
    position: int,
) -> dict[str, Any]:
    """The row of model number `k`, which is at `position` in the group."""
    from lmcli.evaluation import signature
    from lmcli.model.device import dtype_name
    from lmcli.output import perplexity as output

    figures, (name, _, model, scorer) = group.figures[position], models[k]
    if not figures.tokens:
        raise UserError(
            "no token to score",
            where=group.name,
            hint="give longer text: without a BOS token the first token is only context",
        )
    dtype = dtype_name(model.device_config.dtype)
    signed = signature.sign(figures, scorer, model_hash, group.digest, args.documents, dtype)
    difference = {}
    if len(models) > 1:
        difference = output.difference(group.pairs[position - 1] if position else None)
    return {
        "model": name,
        "group" if args.by else "file": group.name,
        **output.figures(figures),
        **difference,
        "dtype": dtype,
        "tokenizer": signed.tokenizer,
        "signature": str(signed),
    }


def _validation_sets(models: list[Loaded]) -> Iterator[PerplexitySource]:
    """The validation set of each model's own run."""
    from lmcli.checkpoints import hub
    from lmcli.runs import run_folder
    from lmcli.training import datasets

    for k, loaded in enumerate(models):
        _, _, facts = run_folder.reopen(Path(hub.find(loaded.name)))
        documents, document_format = datasets.validation_documents(
            facts["data"], facts["validation"]
        )
        yield PerplexitySource(
            "validation", documents.bytes, documents.__iter__, document_format, [k]
        )


def _sources(
    args: options.Arguments, files: list[str], tokenizers: "dict[str, Tokenizer]"
) -> Iterator[PerplexitySource]:
    """The files, each measured by all models; errors in a file are raised before its work."""
    from lmcli.data.documents import DocumentFormat, find_documents, read_pieces, survey
    from lmcli.data.files import display_name, pin

    document_format = DocumentFormat(args.documents, args.format_, args.fields, args.on_error)
    for path in files:
        name, file = display_name(path), pin(path)
        if args.by and not document_format.has_rows(file):
            raise UsageError(
                "is plain text, which has no fields to group by",
                where=name,
                hint="name another format with --format",
            )
        surveyed = survey([file], document_format)
        if not len(surveyed.documents):
            raise UserError("no text in it", where=name, hint="give a file with text")
        options.report_skipped(surveyed.skipped, args.quiet)
        pieces = islice(read_pieces(surveyed.documents, document_format), PIECES_TO_JUDGE)
        options.remark_foreign_text((piece.text for piece in pieces), tokenizers, args)
        find = functools.partial(find_documents, [file], document_format)
        size = surveyed.documents.bytes
        yield PerplexitySource(name, size, find, document_format, range(len(args.models)))


def _verify(expected: "Signature", signatures: Iterable[str]) -> None:
    """Prints the difference in nats from the signature; UserError if anything else differs."""
    from lmcli.evaluation.signature import Signature

    measured = [Signature.parse(text) for text in signatures]
    nearest = min(measured, key=lambda signature: len(expected.differences(signature)))
    if differences := expected.differences(nearest):
        other_version = expected.version != nearest.version
        raise UserError(
            f"the result is not the same: {'; '.join(differences)}",
            where="--verify",
            hint=f"try lm {expected.version}, which made it" if other_version else None,
        )
    difference = nearest.nats - expected.nats
    click.echo(f"the same: {nearest.nats:.6f} nats, {difference:+.6f} from the signature")
