"""Options that several commands share, declared once, and what commands do with them."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from lmcli import storage
from lmcli.commands.command import COUNTS_TYPE as COUNTS_TYPE
from lmcli.commands.command import DURATION_TYPE as DURATION_TYPE
from lmcli.commands.command import WEIGHTS_TYPE as WEIGHTS_TYPE
from lmcli.commands.command import Arguments as Arguments
from lmcli.commands.command import Option as Option
from lmcli.commands.command import all_of as all_of
from lmcli.commands.command import choice as choice
from lmcli.commands.command import command as command
from lmcli.commands.command import flag as flag
from lmcli.commands.command import number as number
from lmcli.commands.command import print_entries as print_entries
from lmcli.commands.command import rare as rare
from lmcli.commands.command import repeated as repeated
from lmcli.commands.command import section as section
from lmcli.commands.command import show as show
from lmcli.errors import UsageError, UserError
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile
    from lmcli.data.rows import Record
    from lmcli.text.tokenizer import Tokenizer

CHARACTERS_TO_JUDGE = 200  # a text by, unless there are fewer
files = click.argument("files", nargs=-1, metavar="[FILE]...")
data = click.argument("data", nargs=-1, metavar="DATA...")
MODEL: dict[str, Any] = {"envvar": "LM_MODEL", "metavar": "DIR"}
model = section("Model", click.option("-m", "--model", help="Folder or name on the Hub.", **MODEL))
json_output = section("Output", flag("--json", "as_json", help="Write JSON Lines."))
quiet = section("Output", flag("-q", "--quiet", help="Print nothing but results and errors."))
verbose = section("Output", rare(flag("-v", "--verbose", help="Print what was chosen.")))
bos = section(
    "Model",
    rare(
        click.option(
            "--bos/--no-bos",
            default=None,
            help="Start each context with the BOS token, or do not.  "
            "[default: as the tokenizer does]",
        )
    ),
)
windows = section(
    "Model",
    rare(
        number("--context", at_least=2, help="Tokens of a window.  [default: the model's context]"),
        number("--stride", help="New tokens of each window.  [default: half the context]"),
    ),
)
settings = section(
    "Model",
    repeated(
        "--set", "sets", metavar="KEY=VALUE", help="Change a value of the preset; see lm help keys."
    ),
)
validation = section(
    "Data", repeated("--val", metavar="FILE", help="Validation data.  [default: a tenth of DATA]")
)
documents = section(
    "Data",
    choice(
        "--documents",
        values=["file", "line", "blank"],
        default="file",
        help="Document: the file (split at <|endoftext|>), a line, a paragraph.",
    ),
)
device = section(
    "Machine",
    choice(
        "--device",
        values=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: a GPU if there is one.",
    ),
)
threads = section(
    "Machine", rare(number("--threads", help="CPU threads of a process.  [default: all cores]"))
)
hardware = all_of(
    device,
    section(
        "Machine",
        rare(
            choice(
                "--dtype",
                values=["auto", "float32", "bfloat16", "float16"],
                default="auto",
                help="Precision; auto: float32 to measure, else bfloat16 where it is faster.",
            )
        ),
    ),
    threads,
)
quantize = section(
    "Machine",
    choice(
        "--quantize", values=["int8", "int4"], help="A decoder's weights in 8 or 4 bits, on a CPU."
    ),
)
nproc = section(
    "Machine",
    rare(
        number(
            "--nproc", default=1, help="Processes on this machine, each on a GPU if there are any."
        )
    ),
)
budgets = section(
    "Budget",
    click.option(
        "--time", "time_", type=DURATION_TYPE, help="From start to saved model: 90s, 10m, 1h30m."
    ),
    number("--steps", help="Optimizer steps."),
    rare(number("--tokens", help="Training tokens.")),
    click.option(
        "--epochs",
        type=click.FloatRange(min=0, min_open=True),
        help="Passes over the training data.",
    ),
)
batch_tokens = section(
    "Machine",
    rare(
        number(
            "--batch-tokens",
            help="Tokens of one forward pass: changes speed; in bfloat16 and float16 also "
            "rounding, which can change a generated text.  [default: by memory]",
        )
    ),
)
generation_limits = section(
    "Sampling",
    number("-n", "--max-new-tokens", help="Most new tokens.  [default: the model's, or 256]"),
    repeated("--stop", metavar="TEXT", help="End a text before TEXT; may be repeated."),
    rare(
        click.option(
            "--num-beams",
            type=click.IntRange(1, 1024),
            help="Beams of a beam search.  [default: the folder's]",
        )
    ),
)
header = section(
    "Output",
    rare(
        click.option("--header/--no-header", default=True, help="Name the columns in a first line.")
    ),
)

FIELDS_KEY = "lmcli.fields"  # where --fields, which is parsed first, leaves its names for --field


def _all_fields(ctx: click.Context, _: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    listed = ctx.meta.get(FIELDS_KEY)
    if listed and names and listed != names:
        raise UsageError(
            f"--fields {','.join(listed)} and --field {' --field '.join(names)} name different "
            "fields",
            hint="give one of them",
        )
    return listed or names


def _keep_fields(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise UsageError(f"{value!r} has an empty name", where="--fields", hint="write A,B")
    ctx.meta[FIELDS_KEY] = names


row_format = section(
    "Data",
    click.option(
        "--fields",
        "listed",
        metavar="A,B",
        expose_value=False,
        is_eager=True,
        callback=_keep_fields,
        help="Columns; train and evaluate: text=A,label=B.",
    ),
    rare(
        repeated(
            "--field",
            "fields",
            metavar="NAME",
            help="One column of CSV or TSV, or field of JSON, to read; may be repeated.",
            callback=_all_fields,
        ),
        choice(
            "--format",
            "format_",
            values=["auto", "text", "jsonl", "tsv", "csv"],
            default="auto",
            help="Format of the input; auto: by suffix, standard input is text.",
        ),
    ),
)
input_format = all_of(
    row_format,
    section(
        "Data",
        rare(
            click.option(
                "--include", metavar="GLOB", help="In a directory, read only matching files."
            )
        ),
    ),
)
on_error = section(
    "Data",
    rare(
        choice(
            "--on-error",
            values=["stop", "blank", "skip"],
            default="stop",
            help="Bad record: stop, write an empty result, or skip it.",
        )
    ),
)
reading = all_of(input_format, on_error)
reading_documents = all_of(
    input_format,
    section(
        "Data",
        rare(
            choice(
                "--on-error",
                values=["stop", "skip"],
                default="stop",
                help="Bad record: stop, or skip it.",
            )
        ),
    ),
)
writing = section(
    "Output",
    click.option("-o", "--output", metavar="FILE", help="Write to FILE, complete or not at all."),
    rare(flag("--continue", "resume", help="Resume an interrupted run from its FILE.part.")),
)


def print_presets() -> None:
    """Prints a line about each shipped preset."""
    from lmcli.catalog.presets import PRESET_COLUMNS, preset_rows

    def entry(row: dict[str, str]) -> tuple[str, ...]:
        size = f"{row['parameters']}{' parameters' * row['parameters'][0].isdigit()}"
        return row["name"], row["purpose"], f"{size}, {row['budget']}; {row['data']}"

    print_entries(preset_rows(), PRESET_COLUMNS, entry)


def models(help: str) -> Option:
    """-m for several models."""
    return section(
        "Model", repeated("-m", "--model", "models", type=click.Path(), help=help, **MODEL)
    )


def training_dtype(help: str) -> Option:
    """--dtype of what trains."""
    values = ["auto", "float32", "bfloat16"]
    return section("Machine", rare(choice("--dtype", values=values, default="auto", help=help)))


def multiprocess(command: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    """Adds --nproc and `args.pool`, the processes that work on the command.

    Place it next to the function. All processes run the command, and only the leader prints.
    """

    @nproc
    @functools.wraps(command)
    def run(args: Arguments) -> Any:
        from lmcli.distributed import launcher, work_queue

        if args.nproc > 1 and not launcher.is_distributed():
            from lmcli.display import note

            hint = "start the command again"
            if "resume" in vars(args):
                hint += "; after -o FILE, --continue resumes"
            context = click.get_current_context()
            context.exit(launcher.run_processes(args.nproc, sys.argv[1:], note, hint))
        if not launcher.is_distributed():
            args.pool = work_queue.LOCAL_POOL
            return command(args)
        if not launcher.is_leader():
            launcher.ignore_signals_in_worker()
            args.quiet, args.verbose = True, False
        else:
            with suppress(UserError):  # tells of another cache, as the workers print nothing
                storage.cache_folder()
        with launcher.report_loss_once(), work_queue.join() as args.pool:
            launcher.refuse_restart(vars(args).get("output"))
            return command(args)

    return run


def need_model(name: str | None) -> str:
    """The model's folder; UsageError if -m and LM_MODEL are missing."""
    if not name:
        raise UsageError("no model was given", hint="give one with -m DIR, or set LM_MODEL")
    return name


def budget(args: Arguments) -> dict[str, float | None]:
    """--time, --steps, --tokens and --epochs, by their keys of `train`."""
    return {"time": args.time_, "steps": args.steps, "tokens": args.tokens, "epochs": args.epochs}


def distinct_models(names: tuple[str, ...], needed: bool = True) -> list[str]:
    """The short names of several -m; UsageError for none if one is `needed`, and for one twice."""
    from lmcli.output.cells import short_names

    if needed:
        need_model(names[0] if names else None)
    short = short_names(names)
    if twice := next((name for name in short if short.count(name) > 1), None):
        raise UsageError(f"{twice} is given twice", where="-m", hint="leave one of them out")
    return short


def load_model(
    name: str | None, args: Arguments, generating: bool = False, lazy: bool = False
) -> "Model":
    """Loads a model with --device, --dtype and --threads; with -v prints what it runs on."""
    name = need_model(name)
    from lmcli import api
    from lmcli.display import note

    quantize = vars(args).get("quantize") or ""
    with progress.stage(f"loading {name}"):
        options = args.device, args.dtype, args.threads or 0, generating, quantize, lazy
        model = api.load(name, *options)
    if vars(args).get("verbose"):  # lm bench has no -v
        note(f"{name} on {model.runs_on}, context {model.context}")
    return model


def input_files(paths: tuple[str, ...], include: str | None, quiet: bool) -> list[str]:
    """The files of FILE… arguments; reports how many were skipped.

    Raises UsageError if standard input, the default, is a terminal.
    """
    from lmcli.data.files import expand

    if not paths and sys.stdin.isatty():
        raise UsageError(
            "nothing to read: give a FILE, or pipe text in",
            hint=f"see {click.get_current_context().command_path} --help",
        )
    names, skipped = expand(paths, include)
    if skipped and not quiet:
        print(f"lm: {skipped} files that are not UTF-8 text left out", file=sys.stderr)
    return names


def echo(text: object) -> None:
    """Prints a result on standard output, on a terminal with its control characters drawn."""
    from lmcli.text.characters import for_stream

    click.echo(for_stream(str(text), sys.stdout))


def remark_foreign_text(
    texts: Iterable[str],
    tokenizers: "dict[str, Tokenizer]",
    args: Arguments,
    advice: str = "its figures say little: take a model of this language",
) -> None:
    """Prints a line for each model whose tokenizer is not made for the texts, and drops it.

    So a model is named once, however many texts there are.
    """
    from lmcli.data.diagnostics import foreign_text
    from lmcli.display import note

    texts = list(texts)
    for name, tokenizer in [] if args.quiet else list(tokenizers.items()):
        if remark := foreign_text(texts, tokenizer, advice):
            note(f"{name}: {remark}")
            del tokenizers[name]


def remarked(
    batches: "Iterable[list[Record]]",
    tokenizers: "dict[str, Tokenizer]",
    args: Arguments,
    **advice: str,
) -> "Iterator[list[Record]]":
    """The batches as they come, with remarks on standard error about their first records."""
    texts: list[str] = []
    judged = args.quiet
    for batch in batches:
        if not judged:
            if batch and not texts and args.format_ == "auto":
                _remark_rows(batch[0])
            texts += [record.text for record in batch]
            if judged := sum(map(len, texts)) >= CHARACTERS_TO_JUDGE:
                remark_foreign_text(texts, tokenizers, args, **advice)
        yield batch
    if not judged:
        remark_foreign_text(texts, tokenizers, args, **advice)


def _remark_rows(first: "Record") -> None:
    """Prints a line if a file or pipe that is read as plain text looks like rows."""
    from lmcli.data.diagnostics import rows_by_look
    from lmcli.data.files import display_name
    from lmcli.display import note

    if first.fields is None and (advice := rows_by_look(first.text.lstrip())):
        note(f"{display_name(first.file)} is read as plain text, and {advice}")


def report_skipped(count: int, quiet: bool) -> None:
    """Prints how many bad records --on-error skip has skipped."""
    if count and not quiet:
        click.echo(f"lm: {count} bad records left out", err=True)


def write_header(out: "OutputFile", columns: Sequence[str]) -> int:
    """Writes the names of the columns, if any; returns the number of records --continue skips.

    A resumed file has its header already, and a table that is drawn has titles of its own.
    """
    from lmcli.data.output_file import escaped

    if columns and not out.resumed_lines and not out.draws:
        out.header = "\t".join(map(escaped, columns)) + "\n"
    finished = max(0, out.resumed_lines - bool(columns))
    progress.current().skip(finished)
    return finished
