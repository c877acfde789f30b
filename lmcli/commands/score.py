"""lm score: how likely a model finds each line, word or token."""

import math
import os
import sys
from collections.abc import Iterable
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile
    from lmcli.data.schema import ScoringFields
    from lmcli.evaluation.signature import LineTotals
    from lmcli.output.score import RecordRows
    from lmcli.scoring.messages import MessageFields
    from lmcli.scoring.scorer import Scorer

# options that choose the form of the rows; any two of them exclude each other
FORMS = {
    "pairs": "--pairs",
    "choices_field": "--choices-field",
    "worst": "--worst",
    "best": "--best",
    "color": "--color",
    "html": "--html",
    "svg": "--svg",
    "alternatives": "--alternatives",
}
PAINTED = ("--color", "--html", "--svg")  # these go together
OF_ONE_MODEL = ("--pairs", "--choices-field", "--alternatives")


@options.command(
    """
  lm score -m runs/s notes.txt
  echo "To be or not to be" | lm score -m runs/s --per word
  lm score -m runs/s --per token --alternatives 3 notes.txt
  lm score -m gpt2 -m runs/s --per word --keep item,condition items.csv
  lm score -m runs/s --below 3 crawl.txt
  git diff | lm score -m runs/s --worst 5
  lm score -m runs/s --html page.html notes.txt
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
@options.models("Model folder or Hugging Face name; several: a column each.")
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
    click.option("--keep", metavar="A,B", help="These fields of the row, too; numbers records."),
    options.number("--worst", help="Only the N records (words) of most bits per byte (surprisal)."),
    options.flag("--color", help="The text itself, colored by surprisal."),
    options.rare(
        options.number("--best", help="Only those of fewest."),
        click.option("--below", type=float, metavar="X", help="Only what has less than X of it."),
        click.option("--above", type=float, metavar="X", help="Only what has more than X of it."),
        click.option("--html", metavar="FILE", help="The colored text as a page, into FILE."),
        click.option("--svg", metavar="FILE", help="The colored text as a picture, into FILE."),
        options.choice(
            "--base",
            values=["2", "e"],
            default="2",
            help="Unit of surprisal and entropy: bits or nats; logprob is always in nats.",
        ),
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

    With several models columns are called by figure and model (surprisal_gpt2), and the first model
    decides for --worst, --best, --below and --above. Models that do not fit in memory together are
    scored one after another.
    """
    per = _check(args)
    files = options.input_files(args.files, args.include, args.quiet) if args.pool.is_leader else []
    from lmcli.data.length_batching import doubling_batches
    from lmcli.data.output_file import OutputFile
    from lmcli.data.rows import RowReader, unfinished_batches
    from lmcli.display import note
    from lmcli.evaluation.signature import LineTotals
    from lmcli.output import score_forms as output
    from lmcli.scoring.messages import MessageFields
    from lmcli.scoring.one_at_a_time import score_one_at_a_time
    from lmcli.terminal.painted_text import color_legend

    models, names = _load(args)
    scorers = _scorers(models, names, args)
    _check_models(per, names, scorers)
    rows = _rows(args, per, names, scorers)
    task = output.remote_task(scorers, rows, args.alternatives or 0)
    if not args.pool.is_leader:
        return args.pool.serve(task)
    fields = _fields(args, models, scorers[0].method)
    reader = RowReader(args.format_, args.fields, args.on_error, fields, args.keep)
    if args.color and sys.stdout.isatty() and not args.quiet:
        click.echo(f"lm: {color_legend()}", err=True)
    header = rows.columns if args.header and not args.as_json else ()
    chats = fields if isinstance(fields, MessageFields) else None
    totals = LineTotals(scorers[0]) if args.verbose and not args.resume and chats else None
    draw = None if args.as_json or not rows.columns else rows.table(args.header)
    result = OutputFile(args.output, args.resume, styled=args.color, draw=draw)
    with result as out, rows.opened(names):
        finished = options.write_header(out, header)
        tokenizers = {name: scorer.text_tokenizer for name, scorer in zip(names, scorers)}
        read = options.remarked(reader.batches(files), tokenizers, args)
        batches = (part for batch in read for part in doubling_batches(batch))
        todo = unfinished_batches(batches, finished, args.pairs)
        todo = score_one_at_a_time(scorers, todo, rows.questions, rows.per)
        try:
            _write(out, models, args.pool.map_in_order(todo, task), rows, totals)
        finally:  # an interrupted run reports what it has
            for text in rows.remaining():
                out.write(text)
            if (summary := rows.summary()) and not args.quiet:
                note(summary)
    _echo_files(args.html, args.svg)
    if totals and totals.figures.tokens and chats and not chats.found:
        _write_signature(models[0], totals)
    options.report_skipped(reader.skipped, args.quiet)


def _load(args: options.Arguments) -> tuple[list["Model"], list[str]]:
    """The models and their short names; UsageError if one is given twice."""
    names = options.distinct_models(args.models)
    return [options.load_model(name, args, lazy=len(names) > 1) for name in args.models], names


def _scorers(models: list["Model"], names: list[str], args: options.Arguments) -> list[Any]:
    """A scorer for each model; StoredScorers if not all fit in memory together."""
    from lmcli.scoring.one_at_a_time import StoredScorer

    settings = args.bos, args.eos, args.context, args.stride, args.batch_tokens or 0
    makers = [partial(model.scorer, *settings, args.pll == "within-word") for model in models]
    if not _exceeds_memory(models, names, args):
        return [make() for make in makers]
    return [StoredScorer(n, make, m.unload) for n, make, m in zip(names, makers, models)]


def _exceeds_memory(models: list["Model"], names: list[str], args: options.Arguments) -> bool:
    """True, with a line about it, if the weights of several models do not fit in memory.

    Raises UserError if several processes would each need them.
    """
    from lmcli.display import note
    from lmcli.model.device import available_memory
    from lmcli.model.flops import parameters
    from lmcli.model.memory import USABLE

    if len(models) < 2:
        return False
    config, processes = models[0].device_config, args.pool.size
    free = available_memory(config.device) / (processes if config.device.type == "cpu" else 1)
    needed = sum(parameters(model.config).total for model in models) * config.dtype.itemsize
    if not free or needed <= USABLE * free:
        return False
    sizes = f"{needed / 1e9:,.1f} GB of weights, and {free / 1e9:,.1f} GB of memory are available"
    if processes > 1:
        raise UserError(
            f"a process needs {sizes}",
            where="-m",
            hint="without --nproc one model is scored after the other",
        )
    if not args.quiet:
        note(f"{', '.join(names)}: {sizes}: scored one after another, results come at the end")
    return True


def _rows(
    args: options.Arguments, per: str, names: list[str], scorers: list["Scorer"]
) -> "RecordRows":
    """How results are written."""
    from lmcli.output.score import ScoreFormat
    from lmcli.output.score_forms import RowOptions
    from lmcli.terminal.wrapping import columns_of

    style = ScoreFormat(
        args.as_json,
        args.base,
        tuple(scorer.method for scorer in scorers),
        args.join,
        tuple(names if len(names) > 1 else ()),
        args.keep,
        args.above,
        args.below,
    )
    width = columns_of(sys.stdout) if sys.stdout.isatty() and not args.output else None
    return RowOptions(**{name: getattr(args, name) for name in FORMS}).rows(style, per, width)


def _check_models(per: str, names: list[str], scorers: list["Scorer"]) -> None:
    """UsageError for models that cannot be scored side by side."""
    for name, scorer in zip(names, scorers):
        if (scorer.method == "conditional") != (scorers[0].method == "conditional"):
            raise UsageError(
                f"{name} needs a source and {names[0]} none, or the reverse",
                where="-m",
                hint="score them in two commands",
            )
        if per == "token" and scorer.text_tokenizer.hash != scorers[0].text_tokenizer.hash:
            raise UsageError(
                f"{names[0]} and {name} have different tokenizers, so their tokens differ",
                where="--per token",
                hint="compare words, with --per word",
            )


def _echo_files(*paths: str | None) -> None:
    for path in paths:
        if path and path != "-":
            options.echo(path)


def _write_signature(model: "Model", totals: "LineTotals") -> None:
    from lmcli.display import note
    from lmcli.model.device import dtype_name

    assert model.folder is not None  # it was loaded from one
    dtype = dtype_name(model.device_config.dtype)
    note(str(totals.signature(model.folder, dtype)))


def _write(
    out: "OutputFile",
    models: "list[Model]",
    scored: Iterable[Any],
    rows: "RecordRows",
    totals: "LineTotals | None",
) -> None:
    """Writes each batch of ((records, how many are written already), results) and counts it."""
    from lmcli.scoring.scorer import Score

    for (records, written), results in scored:
        for number, (record, (text, figures)) in enumerate(zip(records, results)):
            scores = [Score(*of_text) for of_text in figures]
            for k, score in enumerate(scores):
                models[k if len(models) > 1 else 0].checked(score, record.location)
            rows.count(record, scores)
            if totals:
                totals.add(record.text, scores[0])
            if number >= written:
                out.write(rows.written(text))
        out.flush()


def _check(args: options.Arguments) -> str:
    """What gets a row: record, word or token; UsageError for options that exclude each other."""
    forms = [option for name, option in FORMS.items() if getattr(args, name)]
    pieces = "token" if args.alternatives else "record"
    painted = [option for option in PAINTED if option in forms]
    ranked = [option for option in ("--worst", "--best") if option in forms]
    limits = [f"--{name}" for name in ("below", "above") if getattr(args, name) is not None]
    per = args.per or pieces
    one_form = [option for option in forms if option not in painted] + painted[:1]
    for_pieces = [option for option in one_form if option not in (*painted, *ranked)]
    many = [option for option in forms if option in OF_ONE_MODEL] if len(args.models) > 1 else []
    excluding = [
        one_form[:2] if len(one_form) > 1 else [],
        [f"--per {per}", *for_pieces[:1]] if for_pieces and per != pieces else [],
        ["--prefix", "--prefix-field"] if args.prefix and args.prefix_field else [],
        ["--pairs", "--prefix"] if args.pairs and (args.prefix or args.prefix_field) else [],
        ["several -m", *many[:1]] if many else [],
        [painted[0], "--json"] if painted and args.as_json else [],
        ["--keep", painted[0]] if painted and args.keep else [],
        [limits[0], [*painted, *for_pieces][0]] if limits and (painted or for_pieces) else [],
        ["-o", painted[0]] if painted and not args.color and args.output else [],
        *_same_file(html=args.html, svg=args.svg, color=args.color and (args.output or "-")),
        ["--continue", [*ranked, *limits, *painted][0]]
        if args.resume and (ranked or limits or (painted and painted != ["--color"]))
        else [],
    ]
    for options_ in excluding:
        if options_:
            raise UsageError(
                f"{options_[0]} and {options_[1]} exclude each other", hint="leave one of them out"
            )
    for option in limits:
        if math.isnan(getattr(args, option[2:])):
            raise UsageError("is not a number", where=option, hint="give a number, such as 3.5")
    for path in filter(None, (args.html, args.svg)):
        if not Path(path).absolute().parent.is_dir():
            raise UsageError("no such folder", where=str(Path(path).parent), hint="make it first")
    if len(limits) > 1 and not args.above < args.below:
        raise UsageError(
            f"no figure is above {args.above:g} and below {args.below:g}",
            where="--above",
            hint="give a lower one",
        )
    args.keep = _kept_fields(args.keep)
    if args.resume and per != "record" and not args.as_json:
        raise UsageError(f"--continue cannot resume rows of {per}s", hint="add --json")
    return per


def _same_file(**outputs: str | None) -> list[list[str]]:
    """The options of outputs that go into one file, two at a time."""
    paths = [(f"--{name}", os.path.abspath(path)) for name, path in outputs.items() if path]
    return [[a, b] for (a, path), (b, other) in combinations(paths, 2) if path == other]


def _kept_fields(text: str | None) -> tuple[str, ...]:
    """The fields of --keep; UsageError for an empty name, or one that stands twice."""
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"{text!r} has an empty name, or one twice", "--keep", "write A,B")
    return names


def _fields(
    args: options.Arguments, models: "list[Model]", method: str
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
    # models have templates of their own: several read no messages
    if method != "causal" or len(models) > 1:
        return None
    find_template = cache(partial(require_template, models[0].tokenizer.settings, models[0].name))
    return MessageFields(args.fields, find_template)
