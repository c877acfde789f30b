"""What all commands have in common: their help, checks of what was typed, completion, values."""

import functools
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from lmcli.config import duration
from lmcli.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Option = Callable[[Callable[..., Any]], Callable[..., Any]]

GROUPS = ("What", "Data", "Model", "Budget", "Output", "Machine")  # of options, in this order
SHORT_EXAMPLES = 5  # of which --help shows so many, and --help-all all
HELP_ALL = "lmcli.help_all"  # in a context's `meta` with --help-all
TYPED = "lmcli.typed"  # in a context's `meta`: all words of the command
UNBROKEN = "\xa0"  # a space at which no line ends
OPTION_WIDTH = 28  # columns of options in a help page


class Arguments(SimpleNamespace):
    """The values of a command's arguments and options by name, as in `argparse.Namespace`."""


def command(
    examples: str, guide: str = ""
) -> Callable[[Callable[[Arguments], Any]], click.Command]:
    """Makes a command of a function that takes `Arguments`.

    Its help begins with the examples, and ends in the name of its guide.
    """

    def decorate(function: Callable[[Arguments], Any]) -> click.Command:
        @functools.wraps(function)
        def callback(**values: Any) -> Any:
            _refuse_invalid_text(values)
            return function(Arguments(**values))

        lines = [line.strip() for line in examples.strip().splitlines()]
        create = click.command(cls=Command, examples=lines, guide=guide)
        help_all = click.option(
            "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all
        )
        return create(help_all(callback))

    return decorate


def _show_all(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta[HELP_ALL] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


class Command(click.Command):
    """A command with grouped help, which refuses two values of an option; click takes the last."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), guide: str = "", **attributes: Any
    ) -> None:
        super().__init__(*args, **attributes)
        self.examples = examples
        self.guide = guide
        for parameter in self.params:
            if not isinstance(parameter.type, click.Choice):
                vars(parameter)["shell_complete"] = functools.partial(_completions, parameter)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; with --quiet, and in a worker, `storage` prints nothing."""
        if not ctx.params.get("quiet") and os.environ.get("RANK", "0") == "0":
            from lmcli.terminal.progress_line import progress_line

            with progress_line():
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
        ctx.meta[TYPED] = arguments
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # click's parser has none
            raise
        if not ctx.resilient_parsing:  # shell completion
            self._refuse_two_values(ctx, arguments)
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the help: what the command does, examples, then options by groups.

        With --help-all it has rarely used options too, further examples and all paragraphs.
        """
        everything = ctx.meta.get(HELP_ALL, False)
        summary, *details = inspect.cleandoc(self.help or "").split("\n\n")
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(summary)
        formatter.write_paragraph()
        formatter.write(_heading("Examples"))
        for example in self.examples[: None if everything else SHORT_EXAMPLES]:
            formatter.write(_example(example, formatter.width))
        for paragraph in details if everything else ():
            formatter.write_paragraph()
            formatter.write_text(paragraph)
        formatter.write_paragraph()
        hidden = self._write_groups(formatter, everything)
        rest = f"{hidden} more options, and all in detail" if hidden else "all in detail"
        more = [] if everything else [(f"{ctx.command_path} --help-all", rest)]
        more += [(f"lm help {self.guide}", "the guide")] if self.guide else []
        if more:
            formatter.write_paragraph()
            formatter.write_dl(more)
        formatter.buffer = [text.replace(UNBROKEN, " ") for text in formatter.buffer]

    def _write_groups(self, formatter: click.HelpFormatter, everything: bool) -> int:
        """Writes the options by groups, with --help-all the rare ones too; returns how many not."""
        groups: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for option in self.params:
            if isinstance(option, click.Option) and not option.hidden and option.help:
                if vars(option).get("rare") and not everything:
                    hidden += 1
                    continue
                title = vars(option).get("section", GROUPS[0])
                text = re.sub(r"\[default.*", lambda m: m[0].replace(" ", UNBROKEN), _text(option))
                groups.setdefault(title, []).append((_names(option), text))
        width = max((len(name) for rows in groups.values() for name, _ in rows), default=0)
        width = min(width, OPTION_WIDTH)
        order = [GROUPS[0], *(title for title in groups if title not in GROUPS), *GROUPS[1:]]
        for number, title in enumerate(title for title in order if title in groups):
            if number and everything:
                formatter.write_paragraph()
            formatter.write(_heading(title))
            formatter.indent()
            formatter.write_dl(
                [(name.ljust(width), text) for name, text in groups[title]], OPTION_WIDTH
            )
            formatter.dedent()
        return hidden

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


def _heading(title: str) -> str:
    """The line above a group of a help page, bold where the terminal has it."""
    line = f"{title}:"
    return f"{line if 'NO_COLOR' in os.environ else click.style(line, bold=True)}\n"


def _example(text: str, width: int) -> str:
    """An example as lines of a help page; its remark stands above it if there is no room beside."""
    command, _, remark = (part.strip() for part in text.partition("   "))
    if len(text) + 2 > width and remark:
        text = f"{command}   {remark}"
    if len(text) + 2 > width and remark:
        above = textwrap.wrap(remark, width, initial_indent="  # ", subsequent_indent="  # ")
        return "\n".join([*above, f"  {command}\n"])
    return f"  {text}\n"


def _names(option: click.Option) -> str:
    """The names of an option and what stands for its value: -n, --steps N."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += f"/{option.secondary_opts[0]}"
    if option.is_flag:
        return names
    kinds = {click.IntRange: "N", click.FloatRange: "X", ParsedText: option.type.name.upper()}
    value = option.metavar or kinds.get(type(option.type)) or "TEXT"
    if isinstance(option.type, click.Choice):
        value = option.metavar or "|".join(_short_choices(option)) or "NAME"
    return f"{names} {value}"


def _short_choices(option: click.Option) -> Sequence[str]:
    """The choices of an option that fit beside its name; none if they are too many."""
    choices = getattr(option.type, "choices", ())
    return choices if len("|".join(choices)) < OPTION_WIDTH - 9 and not option.metavar else ()


def _text(option: click.Option) -> str:
    """What a help page says of an option: its help, its choices and its default."""
    text, _, default = (option.help or "").partition("  [default: ")
    if isinstance(option.type, click.Choice) and not _short_choices(option):
        text += f" Choices: {', '.join(option.type.choices)}."
    value = f"${option.envvar}" if option.envvar else option.default
    if isinstance(value, bool):
        value = (option.opts if value else option.secondary_opts or [""])[0]
    if option.is_flag and not option.secondary_opts:
        value = ""
    if isinstance(value, float):
        value = f"{value:g}"
    default = default.removesuffix("]") or (str(value) if isinstance(value, (str, int)) else "")
    return f"{text}  [default: {default}]" if default else text


def _completions(
    parameter: click.Parameter, context: click.Context, incomplete: str
) -> "list[CompletionItem]":
    """What a shell offers for a value of a parameter."""
    from click.shell_completion import CompletionItem

    from lmcli.catalog import completion

    metavar = parameter.metavar or ""
    names = {*parameter.opts, parameter.name or ""}
    typed = context.meta.get(TYPED, [])
    try:
        offers = completion.candidates(names, metavar, incomplete, typed)
    except Exception:  # the shell shows what was typed: there is no place for a message
        offers = []
    root = context.find_root()
    if "COMMAND" in metavar and isinstance(root.command, click.Group):
        commands = [] if typed else root.command.list_commands(root)
        offers += [(name, "", "plain") for name in commands if name.startswith(incomplete)]
    return [CompletionItem(value, type=kind, help=help or None) for value, help, kind in offers]


def print_entries(
    rows: Sequence[Mapping[str, str]],
    columns: Sequence[str],
    entry: Callable[[Any], tuple[str, ...]],
) -> None:
    """Prints rows: TSV with a header; on a terminal terms, and paragraphs beside each.

    `entry` returns both for a row. A list longer than the screen goes through the pager.
    """
    if not sys.stdout.isatty():
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        click.echo("\n".join(map("\t".join, lines)))
        return
    entries = [entry(row) for row in rows]
    total = min(shutil.get_terminal_size().columns, 110)
    width = min(max(len(term) for term, *_ in entries), total // 2)
    drawn = []
    for term, *paragraphs in entries:
        room = total - width - 2
        beside = [
            line
            for text in paragraphs
            for line in textwrap.wrap(text, room, break_on_hyphens=False)
        ]
        if len(term) > width:
            drawn.append(term)
            term = ""
        drawn += [f"{term:<{width}}  {beside[0]}", *(f"{'':{width}}  {x}" for x in beside[1:])]
    show("\n".join(drawn) + "\n")


def show(text: str) -> None:
    """Prints a text on a terminal, through the pager if it is longer than the screen."""
    if text.count("\n") < shutil.get_terminal_size().lines:
        click.echo(text, nl=False)
    else:
        click.echo_via_pager(text)


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


class ParsedText(click.ParamType):
    """The value that `parse` makes of a text; a ValueError says why it makes none."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; one that is no text, as a default, is left as it is."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _counts(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 100 and int(word) for word in words):
        raise ValueError(f"{text!r}: give whole numbers from 1, as in 8,64,512")
    return tuple(map(int, words))


def _weights(text: str) -> tuple[float, ...]:
    with suppress(ValueError):
        weights = tuple(map(float, text.split(",")))
        if all(0 < weight < math.inf for weight in weights):
            return weights
    raise ValueError(f"{text!r}: give numbers above 0, as in 3,1")


DURATION_TYPE = ParsedText("duration", duration)
COUNTS_TYPE = ParsedText("counts", _counts)
WEIGHTS_TYPE = ParsedText("weights", _weights)


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


def all_of(*decorators: Option) -> Option:
    """Several options as one decorator, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def section(title: str, *decorators: Option) -> Option:
    """Options of a group of --help."""
    return _marked("section", title, decorators)


def rare(*decorators: Option) -> Option:
    """Options that only --help-all shows."""
    return _marked("rare", True, decorators)


def _marked(name: str, value: object, decorators: Sequence[Option]) -> Option:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        count = len(vars(function).get("__click_params__", ()))
        function = all_of(*decorators)(function)
        for parameter in vars(function)["__click_params__"][count:]:
            vars(parameter)[name] = value
        return function

    return decorate
