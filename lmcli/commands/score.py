"""lm score: how likely a model finds each line, word or token."""

import sys
from collections.abc import Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import options
from lmcli.errors import UsageError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile
    from lmcli.data.schema import ScoringFields
    from lmcli.evaluation.signature import LineTotals
    from lmcli.output.score import RecordRows
    from lmcli.scoring.messages import MessageFields

# options that choose the form of the rows; any two of them exclude each other
FORMS = {
    "pairs": "--pairs",
    "choices_field": "--choices-field",
    "worst": "--worst",
    "color": "--color",
    "alternatives": "--alternatives",
}


@options.command(
    """
  lm score -m runs/s notes.txt
  echo "To be or not to be" | lm score -m runs/s --per word
  lm score -m runs/s --per token --alternatives 3 notes.txt
  git diff | lm score -m runs/s --worst 5
  lm score -m runs/s --prefix "Question: " questions.txt
  lm score -m runs/s --prefix-field question --choices-field options quiz.jsonl
  lm score -m bert --pll within-word --pairs blimp.jsonl
  lm score -m marian-en-de pairs.tsv
  lm score -m chat-model messages.jsonl
  tail -f chat.log | lm score -m runs/s --no-header
""",
    guide="scoring",
)
@options.files
@options.model
@options.choice(
    "--per", values=["record", "word", "token"], help="What gets a row.  [default: record]"
)
@options.number("--alternatives", help="Per token: its rank and the N most likely.")
@click.option("--prefix", metavar="TEXT", help="Score each record as a continuation of TEXT.")
@options.flag("--pairs", help="Two texts a row, as in BLiMP; or of two --field.")
@options.rare(
    click.option(
        "--prefix-field",
        metavar="FIELD",
        help="Score each record as a continuation of this field of its row.",
    ),
    click.option(
        "--join", metavar="TEXT", help="Put between them.  [default: a space, unless there is one]"
    ),
    click.option(
        "--choices-field", metavar="FIELD", help="Find the most likely text of this field's list."
    ),
    options.choice(
        "--pll",
        values=["original", "within-word"],
        default="original",
        help="Pseudo-log-likelihood: mask one token, or also the rest of its word.",
    ),
    options.flag("--eos/--no-eos", default=False, help="Score the EOS token of each record too."),
)
@options.section(
    "Output",
    options.number("--worst", help="Only the N records with the most bits per byte."),
    options.flag("--color", help="The text itself, colored by surprisal."),
    options.rare(
        options.choice(
            "--base",
            values=["2", "e"],
            default="2",
            help="Unit of surprisal and entropy: bits or nats; logprob is always in nats.",
        )
    ),
)
@options.bos
@options.windows
@options.header
@options.json_output
@options.reading
@options.writing
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.multiprocess
def score(args: options.Arguments) -> None:
    """Scores records (lines): natural-log probability, scored tokens, bytes, bits per byte.

    A decoder gives the log-probability of a text, and of a row with messages that of the
    assistant's last one after all before it; an encoder–decoder that of the target of a row or of a
    line source<TAB>target; an encoder the pseudo-log-likelihood (field method of --json).
    Columns are tab-separated, one line per record in input order; with --per word or token one line
    for each of those. With a BOS token a record's first token is scored too; without one it is
    only context. What each number means: lm help numbers.
    """
    per = _check(args)
    files: list[str] = []
    if args.pool.is_leader:
        files = options.input_files(args.files, args.include, args.quiet)
    from lmcli.data.length_batching import doubling_batches
    from lmcli.data.output_file import OutputFile
    from lmcli.data.rows import RowReader, unfinished_batches
    from lmcli.evaluation.signature import LineTotals
    from lmcli.model.device import dtype_name
    from lmcli.output import score as output
    from lmcli.output.cells import color_legend
    from lmcli.scoring.messages import MessageFields

    model = options.load_model(args.model, args)
    scorer = model.scorer(
        args.bos,
        args.eos,
        args.context,
        args.stride,
        args.batch_tokens or 0,
        within_word=args.pll == "within-word",
    )
    style = output.ScoreFormat(args.as_json, args.base, scorer.method, args.join)
    rows = output.row_format(style, per, **{name: getattr(args, name) for name in FORMS})
    task = output.remote_task(scorer, rows, args.alternatives or 0)
    if not args.pool.is_leader:
        return args.pool.serve(task)
    fields = _fields(args, model, scorer.method)
    reader = RowReader(args.format_, args.fields, args.on_error, fields)
    if args.color and sys.stdout.isatty() and not args.quiet:
        click.echo(f"lm: {color_legend()}", err=True)
    header = rows.columns if args.header and not args.as_json else ()
    chats = fields if isinstance(fields, MessageFields) else None
    totals = LineTotals(scorer) if args.verbose and not args.resume and chats else None
    with OutputFile(args.output, args.resume, styled=args.color) as out:
        finished = options.write_header(out, header)
        batches = (part for batch in reader.batches(files) for part in doubling_batches(batch))
        todo = unfinished_batches(batches, finished, args.pairs)
        try:
            _write(out, model, args.pool.map_in_order(todo, task), rows, totals)
        finally:  # an interrupted run reports what it has
            for text in rows.remaining():
                out.write(text)
            if (summary := rows.summary()) and not args.quiet:
                click.echo(f"lm: {summary}", err=True)
    if totals and totals.figures.tokens and chats and not chats.found:
        dtype = dtype_name(model.device_config.dtype)
        assert model.folder is not None  # it was loaded from one
        click.echo(f"lm: {totals.signature(model.folder, dtype)}", err=True)
    options.report_skipped(reader.skipped, args.quiet)


def _write(
    out: "OutputFile",
    model: "Model",
    scored: Iterable[Any],
    rows: "RecordRows",
    totals: "LineTotals | None",
) -> None:
    """Writes each batch of ((records, how many are written already), results) and counts it."""
    from lmcli.scoring.scorer import Score

    for (records, written), results in scored:
        for number, (record, (text, figures)) in enumerate(zip(records, results)):
            scores = [Score(*of_text) for of_text in figures]
            for score in scores:
                model.checked(score, record.location)
            rows.count(record, scores)
            if totals:
                totals.add(record.text, scores[0])
            if number >= written:
                out.write(text)
        out.flush()


def _check(args: options.Arguments) -> str:
    """What gets a row: record, word or token; UsageError for options that exclude each other."""
    forms = [option for name, option in FORMS.items() if getattr(args, name)]
    pieces = "token" if args.alternatives else "record"
    per = args.per or pieces
    excluding = [
        forms[:2] if len(forms) > 1 else [],
        [f"--per {per}", forms[0]] if forms and per != pieces else [],
        ["--prefix", "--prefix-field"] if args.prefix and args.prefix_field else [],
        ["--pairs", "--prefix"] if args.pairs and (args.prefix or args.prefix_field) else [],
        ["--color", "--json"] if args.color and args.as_json else [],
        ["--continue", "--worst"] if args.resume and args.worst else [],
    ]
    for options_ in excluding:
        if options_:
            raise UsageError(
                f"{options_[0]} and {options_[1]} exclude each other", hint="leave one of them out"
            )
    if args.resume and per != "record" and not args.as_json:
        raise UsageError(f"--continue cannot resume rows of {per}s", hint="add --json")
    return per


def _fields(
    args: options.Arguments, model: "Model", method: str
) -> "ScoringFields | MessageFields | None":
    """The fields that a row is scored by; None for its text alone."""
    from lmcli.data.schema import ScoringFields
    from lmcli.scoring.messages import MessageFields
    from lmcli.text.chat_template import require_template

    fields = ScoringFields(
        args.fields,
        args.pairs,
        method == "conditional",
        args.prefix or "",
        args.prefix_field or "",
        args.choices_field or "",
    )
    if fields != ScoringFields(args.fields):
        return fields
    find_template = cache(partial(require_template, model.tokenizer.settings, model.name))
    return MessageFields(args.fields, find_template) if method == "causal" else None
