"""lm classify: the label of each text or of each of its tokens; the answer to each question."""

from itertools import islice
from typing import TYPE_CHECKING

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.output.classify import AnswerRows, LabelRows

RECORDS_PER_TASK = 512


@options.command(
    """
  echo "This is a test sentence." | lm classify -m bert-sentiment
  lm classify -m bert-sentiment --logits reviews.txt
  lm classify -m bert-topics --top 3 --json news.jsonl
  lm classify -m bert-nli --field premise,hypothesis pairs.jsonl
  lm classify -m bert-names --per token letters.txt | grep PER
  lm classify -m bert-squad questions.jsonl                    rows with context and question
  lm classify -m bert-squad --top 3 --threshold 0.9 --json questions.jsonl
""",
    guide="tasks",
)
@options.files
@options.model
@options.choice(
    "--per", values=["record", "token"], help="What gets a label.  [default: as trained]"
)
@options.number("--top", metavar="K", help="The K most likely labels or answers.")
@options.flag("--logits", help="Logits of all labels instead of probabilities.")
@options.rare(
    click.option(
        "--threshold",
        type=click.FloatRange(0, 1),
        default=0.5,
        help="Multi-label: probability from which a label applies. Questions: probability of "
        "having no answer, against the best answer, above which none is given.",
    ),
    options.number("--max-answer-tokens", help="Longest answer in tokens.  [default: 30]"),
    options.choice(
        "--on-long",
        values=["truncate", "error"],
        default="truncate",
        help="Record longer than the model's context: truncate it, or stop. (The context of a "
        "question is read in windows.)",
    ),
)
@options.section(
    "Output",
    options.rare(
        click.option(
            "--header/--no-header",
            default=None,
            help="Name the columns in a first line.  "
            "[default: with --logits, --per token, and answers]",
        )
    ),
)
@options.json_output
@options.reading
@options.writing
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.multiprocess
def classify(args: options.Arguments) -> None:
    """Classifies records (lines): label, probability and text, tab-separated, in input order.

    A multi-label model gives all labels that apply and their probabilities, joined by commas; NA if
    there is none, and for an empty record. With --json a field of the record with the name of a
    result (as label) becomes given_NAME. The tokenizer's special tokens are added. Two fields
    joined by a comma are a pair of texts, as in inference or paraphrase; several --field are
    concatenated.

    A question-answering model reads rows with context and question (or --field CONTEXT --field
    QUESTION) and finds the answer in the context: columns answer, score (its probability), start
    and end (bytes of the context) and question; NA if there is no answer.
    """
    if args.logits and args.top:
        raise UsageError("--logits and --top exclude each other", hint="leave one of them out")
    files: list[str] = []
    if args.pool.is_leader:
        files = options.input_files(args.files, args.include, args.quiet)
    from lmcli import display
    from lmcli.data.output_file import OutputFile
    from lmcli.data.rows import unfinished_batches
    from lmcli.output.classify import remote_task

    model = options.load_model(args.model, args)
    rows = _rows(args, model)
    task = remote_task(rows)
    if not args.pool.is_leader:
        return args.pool.serve(task)
    reader = rows.reader(args.format_, args.on_error)
    header = not args.as_json and (rows.header if args.header is None else args.header)
    if args.resume and rows.per_token and not args.as_json:
        raise UsageError("--continue cannot resume rows of tokens", hint="add --json")
    # a probability of each label of each record of a task is held
    size = min(RECORDS_PER_TASK, max(1, 1_000_000 // max(1, len(model.model.config.labels))))
    truncated_records = 0
    table = None if args.as_json else rows.table(args.header is not False)
    with OutputFile(args.output, args.resume, draw=table) as out:
        finished = options.write_header(out, rows.columns if header else ())
        batches = (
            batch[i : i + size]
            for batch in reader.batches(files)
            for i in range(0, len(batch), size)
        )
        todo = unfinished_batches(batches, finished)
        for (records, written), results in args.pool.map_in_order(todo, task):
            for record, (text, truncated, wrong) in islice(zip(records, results), written, None):
                model.require_sound(wrong, record.location)
                if truncated and args.on_long == "error":
                    raise UserError(
                        f"longer than the model's context of {model.context} tokens",
                        where=record.location,
                        hint="truncate such records with --on-long truncate",
                    )
                truncated_records += truncated
                out.write(text)
            out.flush()
    if truncated_records and not args.quiet:
        count = f"{truncated_records} record{'s' if truncated_records > 1 else ''} longer than the"
        display.note(f"{count} context of {model.context} tokens: truncated")
    options.report_skipped(reader.skipped, args.quiet)


def _rows(args: options.Arguments, model: "Model") -> "LabelRows | AnswerRows":
    """What is written for each record; UsageError for options the model cannot do."""
    from lmcli.output.classify import AnswerRows, ClassifyOptions, LabelRows

    style = ClassifyOptions(args.per, args.logits, args.top, args.as_json, args.fields)
    batch = args.batch_tokens or 0
    if model.model.config.head == "span":
        longest = {"max_answer_tokens": args.max_answer_tokens} if args.max_answer_tokens else {}
        answerer = model.question_answerer(
            args.threshold, **longest, count=args.top or 1, batch=batch
        )
        return AnswerRows(answerer, style)
    if args.max_answer_tokens:
        raise UsageError(
            "only a question-answering model gives answers",
            where="--max-answer-tokens",
            hint="leave it out",
        )
    return LabelRows(model.classifier(args.threshold, batch), style)
