"""Options that several commands share, declared once."""

import functools
import math
import sys
from collections.abc import Callable

import click

from lmcli.config import duration
from lmcli.errors import UsageError


class Duration(click.ParamType):
    """Seconds, or 90s, 10m, 1h30m."""

    name = "duration"

    def convert(self, value, param, ctx) -> float:
        try:
            return value if isinstance(value, float) else duration(value)
        except ValueError as error:
            self.fail(f"{error}; say 90, 90s, 10m or 1h30m", param, ctx)


class Counts(click.ParamType):
    """Whole numbers from 1 with commas between: 8,64,512."""

    name = "counts"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(int(part) for part in value.split(",") if part.strip().isdecimal())
        if len(found) != value.count(",") + 1 or not all(found):
            self.fail(f"{value!r}: whole numbers from 1 with commas between, as in 8,64,512", param, ctx)
        return found


class Weights(click.ParamType):
    """Numbers above 0 with commas between: 3,1."""

    name = "weights"

    def convert(self, value, param, ctx) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < weight < math.inf for weight in found):
            self.fail(f"{value!r}: numbers above 0 with commas between, as in 3,1")
        return found


def _together(*decorators: Callable) -> Callable:
    def decorate(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return decorate


LISTED = "lmcli.listed fields"


def _listed(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        ctx.meta[LISTED] = tuple(name.strip() for name in value.split(","))


model = click.option("-m", "--model", envvar="LM_MODEL", metavar="DIR", show_envvar=True,
                     help="Model folder, or a name on Hugging Face's hub.")
json_output = click.option("--json", "as_json", is_flag=True, help="Write JSON Lines.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
verbose = click.option("-v", "--verbose", is_flag=True, help="Say what was chosen.")
beginning = click.option("--bos/--no-bos", "bos", default=None,
                         help="Begin each context with the beginning token, or do not; default: as the tokenizer says.")
device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
threads = click.option("--threads", type=click.IntRange(min=1), default=None,
                       help="CPU threads of a process.  [default: all cores]")
hardware = _together(
    device,
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                 help="Precision. auto: float32 to measure, bfloat16 to generate where the hardware is faster in it."),
    threads)
nproc = click.option("--nproc", type=click.IntRange(min=1), default=1, metavar="N",
                     help="So many processes on this machine work together, each on a GPU of its own where there are some.")
budgets = _together(
    click.option("--time", "time_", type=Duration(), help="Time from the start to the saved model: 90s, 10m, 1h30m."),
    click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps."),
    click.option("--tokens", type=click.IntRange(min=1), help="Training tokens."),
    click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Passes over the training text."))
batch_tokens = click.option("--batch-tokens", type=click.IntRange(min=1), default=None,
                            help="Tokens of one forward pass; changes speed, not results.")
layout = _together(
    click.option("--format", "format_", type=click.Choice(["auto", "text", "jsonl", "tsv", "csv"]), default="auto",
                 show_default=True, help="auto goes by suffix; standard input is text."),
    click.option("--fields", "listed", metavar="A,B", expose_value=False, is_eager=True, callback=_listed,
                 help="The same for several, in this order."),
    click.option("--field", "fields", multiple=True, metavar="NAME", help="Field of a JSON, TSV or CSV row to read.",
                 callback=lambda ctx, _, given: ctx.meta.get(LISTED) or given),
    click.option("--include", metavar="GLOB", help="In a directory, take only files named like this."))
reading = _together(
    layout,
    click.option("--on-error", type=click.Choice(["stop", "blank", "skip"]), default="stop", show_default=True,
                 help="A bad record: stop, write an empty result, or leave it out."))
writing = _together(
    click.option("-o", "--output", metavar="FILE", help="Write here instead of standard output, whole or not at all."),
    click.option("--continue", "resume", is_flag=True, help="Go on with the FILE.part of an interrupted run."))


def several(command: Callable) -> Callable:
    """Gives a command --nproc and the `crew` of processes that work on it, of which only the leader has something to say.

    As it stands next to the command, it sees all options: those with --continue can go on where a process was lost.
    """
    @nproc
    @functools.wraps(command)
    def working_together(nproc, **given):
        from lmcli import launch
        from lmcli.inference import crew

        context = click.get_current_context()
        if nproc > 1 and not launch.is_member():
            from lmcli.display import note

            advice = "start the command again" + ("; after -o FILE, --continue goes on" if "resume" in given else "")
            context.exit(launch.together(nproc, sys.argv[1:], note, advice))
        if not launch.is_member():
            return command(crew=crew.ALONE, **given)
        if launch.leads():
            launch.take_signals_once()
        else:
            launch.leave_signals_to_the_leader()
            given |= {"quiet": True, "verbose": False}
        with launch.telling_once(), crew.join() as own:
            launch.refuse_to_write_again(given.get("output"))
            return command(crew=own, **given)

    return working_together


def need_model(name: str | None) -> str:
    """The model's folder; UsageError when none was given."""
    if not name:
        raise UsageError("which model? none was given", hint="-m DIR, or set LM_MODEL")
    return name


def load_model(name: str | None, device: str, dtype: str, threads: int | None, verbose_: bool, generating: bool = False):
    """The lmcli.api.Model of a command's options; with -v one line says what it runs on."""
    need_model(name)
    from lmcli import api
    from lmcli.display import note

    loaded = api.load(name, device, dtype, threads or 0, training=generating)
    if verbose_:
        note(f"{name} on {loaded.placement}, context {loaded.context}")
    return loaded


def input_files(arguments: tuple[str, ...], include: str | None, quiet_: bool) -> list[str]:
    """The files of a command's FILE… arguments; says how many were left out. Standard input on a terminal is usage."""
    from lmcli.text.records import expand

    if not arguments and sys.stdin.isatty():
        raise UsageError("nothing to read: give a FILE, or pipe text in",
                         hint=f"{click.get_current_context().command_path} --help")
    files, skipped = expand(arguments, include)
    if skipped and not quiet_:
        print(f"lm: {skipped} files that are not UTF-8 text left out", file=sys.stderr)
    return files
