"""Options that several commands share, declared once, and what commands do with them."""

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from lmcli import storage
from lmcli.config import duration
from lmcli.errors import UsageError, UserError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


class Arguments(SimpleNamespace):
    """The values of a command's arguments and options by name, as in `argparse.Namespace`."""


def command(examples: str) -> Callable[[Callable[[Arguments], Any]], click.Command]:
    """Makes a command of a function that takes `Arguments`; its help ends in the examples."""

    def decorate(function: Callable[[Arguments], Any]) -> click.Command:
        @functools.wraps(function)
        def callback(**values: Any) -> Any:
            _refuse_invalid_text(values)
            return function(Arguments(**values))

        epilog = f"\b\nExamples:\n{examples.strip(chr(10))}"
        return click.command(cls=Command, epilog=epilog)(callback)

    return decorate


class Command(click.Command):
    """A command that refuses two values of an option; click would take the last one."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; with --quiet, and in a worker, `storage` prints nothing."""
        if not ctx.params.get("quiet") and os.environ.get("RANK", "0") == "0":
            return super().invoke(ctx)
        import logging

        logger = logging.getLogger("lmcli")
        logger.setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        finally:
            logger.setLevel(logging.NOTSET)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments that are left over; UsageError naming the first option given twice."""
        arguments = list(args)  # click empties `args`
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # shell completion
            self._refuse_two_values(ctx, arguments)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options under the headings that `section` gave them."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record and isinstance(option, click.Option):
                groups.setdefault(vars(option).get("section", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def _refuse_two_values(self, ctx: click.Context, args: list[str]) -> None:
        single = [
            option
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and not (option.multiple or option.count)
        ]
        for option in single:
            option.multiple = True  # the parser then keeps all values
        try:
            values_of, _, _ = self.make_parser(ctx).parse_args(args)
        finally:
            for option in single:
                option.multiple = False
        for option in single:
            texts = list(dict.fromkeys(values_of.get(option.name or "") or ()))
            # 90 and 90s are one value
            values = [option.type_cast_value(ctx, text) for text in texts]
            if any(value != values[0] for value in values):
                name = max(option.opts, key=len)
                if option.is_flag:
                    texts = [(option.opts if text else option.secondary_opts)[0] for text in texts]
                raise UsageError(
                    f"{name} is given {len(texts)} values: {' and '.join(map(str, texts))}",
                    hint="give one of them",
                )


PATHS = re.compile(r"\b(FILE|DATA|GLOB)\b")  # in the metavar of what names files of data


def _refuse_invalid_text(values: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments with bytes that are not UTF-8, unless they name files.

    safetensors cannot read a model in a folder with such a name.
    """
    from lmcli.text.characters import SURROGATE

    for parameter in click.get_current_context().command.params:
        if PATHS.search(parameter.metavar or ""):
            continue
        value = values.get(parameter.name or "")
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and SURROGATE.search(text) for text in texts):
            argument = isinstance(parameter, click.Argument)
            raise UsageError(
                "invalid UTF-8 in an argument",
                where=None if argument else parameter.opts[0],
                hint="pipe the text in, with --on-error" if argument else "write it in UTF-8",
            )


class Duration(click.ParamType):
    """Seconds, or 90s, 10m, 1h30m."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The value in seconds."""
        try:
            return value if isinstance(value, float) else duration(value)
        except ValueError as error:
            self.fail(f"{error}; write it as 90, 90s, 10m or 1h30m", param, ctx)


class Counts(click.ParamType):
    """Whole numbers from 1 with commas between: 8,64,512."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        words = (word.strip() for word in value.split(","))
        numbers = tuple(int(word) for word in words if word.isdecimal() and len(word) < 100)
        if len(numbers) != value.count(",") + 1 or not all(numbers):
            self.fail(f"{value!r}: give whole numbers from 1, as in 8,64,512", param, ctx)
        return numbers


class Weights(click.ParamType):
    """Numbers above 0 with commas between: 3,1."""

    name = "weights"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The weights."""
        if isinstance(value, tuple):
            return value
        try:
            weights = tuple(float(word) for word in value.split(","))
        except ValueError:
            weights = ()
        if not weights or not all(0 < weight < math.inf for weight in weights):
            self.fail(f"{value!r}: give numbers above 0, as in 3,1", param, ctx)
        return weights


def flag(*names: str, help: str, **attributes: Any) -> Option:
    """An option without a value."""
    return click.option(*names, is_flag=True, help=help, **attributes)


def choice(*names: str, values: Sequence[str], help: str, **attributes: Any) -> Option:
    """An option with one of several values."""
    return click.option(*names, type=click.Choice(values), help=help, **attributes)


def number(*names: str, help: str, at_least: int = 1, **attributes: Any) -> Option:
    """An option with a whole number."""
    return click.option(*names, type=click.IntRange(min=at_least), help=help, **attributes)


def repeated(*names: str, metavar: str, help: str, **attributes: Any) -> Option:
    """An option that may be given several times."""
    return click.option(*names, multiple=True, metavar=metavar, help=help, **attributes)


def _all_of(*decorators: Option) -> Option:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def section(title: str, *decorators: Option) -> Option:
    """Options that stand under a heading of their own in --help."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = _all_of(*decorators)(function)
        for parameter in function.__click_params__[-len(decorators) :]:  # type: ignore[attr-defined]
            vars(parameter)["section"] = title
        return function

    return decorate


files = click.argument("files", nargs=-1, metavar="[FILE]...")
data = click.argument("data", nargs=-1, metavar="DATA...")
MODEL: dict[str, Any] = {"envvar": "LM_MODEL", "metavar": "DIR", "show_envvar": True}
model = click.option(
    "-m", "--model", help="Model folder, or a name on the Hugging Face Hub.", **MODEL
)
json_output = flag("--json", "as_json", help="Write JSON Lines.")
quiet = flag("-q", "--quiet", help="Print nothing but results and errors.")
verbose = flag("-v", "--verbose", help="Print what was chosen.")
bos = click.option(
    "--bos/--no-bos",
    default=None,
    help="Start each context with the BOS token, or do not.  [default: as the tokenizer does]",
)
windows = _all_of(
    number("--context", at_least=2, help="Tokens of a window.  [default: the model's context]"),
    number("--stride", help="New tokens of each window.  [default: half the context]"),
)
settings = repeated(
    "--set", "sets", metavar="SECTION.KEY=VALUE", help="Override one value of the preset."
)
validation = repeated("--val", metavar="FILE", help="Validation data, instead of a tenth of DATA.")
documents = choice(
    "--documents",
    values=["file", "line", "blank"],
    default="file",
    show_default=True,
    help="Document: the whole file (split at <|endoftext|>), a line, or a paragraph.",
)
device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True
)
threads = number("--threads", help="CPU threads of a process.  [default: all cores]")
hardware = _all_of(
    device,
    choice(
        "--dtype",
        values=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Precision; auto: float32 to measure, else bfloat16 where it is faster.",
    ),
    threads,
)
quantize = choice(
    "--quantize", values=["int8", "int4"], help="A decoder on a CPU: weights in 8 or 4 bit, faster."
)
nproc = number(
    "--nproc", default=1, metavar="N", help="Processes on this machine, each on its own GPU if any."
)
budgets = _all_of(
    click.option(
        "--time", "time_", type=Duration(), help="Time from start to saved model: 90s, 10m, 1h30m."
    ),
    number("--steps", help="Optimizer steps."),
    number("--tokens", help="Training tokens."),
    click.option(
        "--epochs",
        type=click.FloatRange(min=0, min_open=True),
        help="Passes over the training data.",
    ),
)
batch_tokens = number(
    "--batch-tokens",
    help="Tokens of one forward pass: changes speed; in bfloat16 and float16 also rounding, which "
    "can change a generated text.",
)
generation_limits = _all_of(
    number("-n", "--max-new-tokens", help="New tokens at most.  [default: the folder's, else 256]"),
    click.option(
        "--num-beams",
        type=click.IntRange(1, 1024),
        help="Beams of a beam search.  [default: the folder's]",
    ),
    repeated("--stop", metavar="TEXT", help="End a text before TEXT; may be repeated."),
)
header = click.option(
    "--header/--no-header", default=True, help="Name the columns in a first line."
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


row_format = _all_of(
    choice(
        "--format",
        "format_",
        values=["auto", "text", "jsonl", "tsv", "csv"],
        default="auto",
        show_default=True,
        help="auto: by suffix; standard input is text.",
    ),
    repeated(
        "--field",
        "fields",
        metavar="NAME",
        help="Field of a JSON, TSV or CSV row to read; may be repeated.",
        callback=_all_fields,
    ),
    click.option(
        "--fields",
        "listed",
        metavar="A,B",
        expose_value=False,
        is_eager=True,
        callback=_keep_fields,
        help="Several fields, in this order (instead of --field). lm train takes ROLE=NAME too.",
    ),
)
input_format = _all_of(
    row_format,
    click.option("--include", metavar="GLOB", help="In a directory, read only matching files."),
)
on_error = choice(
    "--on-error",
    values=["stop", "blank", "skip"],
    default="stop",
    show_default=True,
    help="Bad record: stop, write an empty result, or skip it.",
)
reading = _all_of(input_format, on_error)
reading_documents = _all_of(
    input_format,
    choice(
        "--on-error",
        values=["stop", "skip"],
        default="stop",
        show_default=True,
        help="Bad record: stop, or skip it.",
    ),
)
writing = _all_of(
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write to FILE, complete or not at all, not to standard output.",
    ),
    flag("--continue", "resume", help="Resume an interrupted run from its FILE.part."),
)


def models(help: str) -> Option:
    """-m for several models."""
    return repeated("-m", "--model", "models", type=click.Path(), help=help, **MODEL)


def training_dtype(help: str) -> Option:
    """--dtype of what trains."""
    values = ["auto", "float32", "bfloat16"]
    return choice("--dtype", values=values, default="auto", help=help)


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


def load_model(name: str | None, args: Arguments, generating: bool = False) -> "Model":
    """Loads a model with --device, --dtype and --threads; with -v prints what it runs on."""
    name = need_model(name)
    from lmcli import api
    from lmcli.display import note

    quantize = vars(args).get("quantize") or ""
    model = api.load(name, args.device, args.dtype, args.threads or 0, generating, quantize)
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


def report_skipped(count: int, quiet: bool) -> None:
    """Prints how many bad records --on-error skip has skipped."""
    if count and not quiet:
        click.echo(f"lm: {count} bad records left out", err=True)


def write_header(out: "OutputFile", columns: Sequence[str]) -> int:
    """Writes the names of the columns, if any; returns the number of records --continue skips.

    A resumed file has its header already.
    """
    if columns and not out.resumed_lines:
        out.write("\t".join(columns) + "\n")
    return max(0, out.resumed_lines - bool(columns))
