"""The `lm` command group, which imports a command only when it is called; exit codes."""

import codecs
import errno
import importlib
import io
import os
import re
import sys
import time
from typing import Any

import click

from lmcli import __version__, errors
from lmcli.terminal import progress

# how a closed standard stream is opened: reading or writing it then fails, as on a closed one
CLOSED_FLAGS = (os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)
MOST_OPTIONS = 12  # of a command, named where one is unknown
STARTED_AT = time.monotonic()  # for `lm train --time`
COMMANDS = {  # with an example of each, which follows its name
    "train": ("notes.txt -o notes", "Train a model on text, or fine-tune one."),
    "generate": ('-m notes "Once"', "Continue a prompt, translate, converse."),
    "score": ("-m notes lines.txt", "Log-probability of lines, words, tokens."),
    "perplexity": ("-m notes b.txt", "Bits per byte and perplexity of files."),
    "classify": ("-m mood lines.txt", "Label and probability of each line."),
    "evaluate": ("-m mood dev.csv", "Accuracy, F1, BLEU … with intervals."),
    "tokenize": ("-m notes lines.txt", "Token ids of each line, and back."),
    "info": ("notes", "What a model or text is; which are here."),
    "plan": ("notes.txt --time 30m", "What fits that time on this machine."),
    "export": ("notes --gguf n.gguf", "GGUF, merged adapters, 8 and 4 bits."),
    "bench": ("--train", "Speed of this machine, and its limit."),
    "help": ("quickstart", "The guides, presets and their keys."),
}


class LazyGroup(click.Group):
    """Knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"lmcli.commands.{name}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names; UsageError with the nearest name."""
        name, is_option = args[0], args[0].startswith("-")
        if name in COMMANDS or is_option or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        hint = "lm --help lists the commands"
        if os.path.exists(name):
            hint = f"{name} is a file: a command comes first, as in lm train {name}"
        raise errors.UsageError(
            f"no command is named {name!r}{errors.did_you_mean(name, COMMANDS)}", hint=hint
        )

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes an example of each command and what it does: 24 lines at 80 columns."""
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] [ARGUMENTS]")
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        formatter.write_paragraph()
        examples = [(f"lm {name} {words}", what) for name, (words, what) in COMMANDS.items()]
        with formatter.indentation():
            formatter.write_dl(examples, col_max=40)
        formatter.write_paragraph()
        formatter.write_dl(
            [
                ("lm COMMAND --help", "Options of a command, with more examples."),
                ("lm help", "The topics: guides, presets, keys."),
                ("lm --install-completion", "Tab completes commands, files, models."),
            ],
            col_max=40,
        )


def _install_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    """Installs the completion of a shell, "" for the user's, and prints what was written."""
    if shell is None or context.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    from lmcli.catalog import shells

    shell = shell or shells.default_shell()
    _register_shells()
    kind = get_completion_class(shell)
    if shell not in shells.SCRIPTS or kind is None:
        raise errors.UsageError(
            f"no completion for the shell {shell!r}",
            where="--install-completion",
            hint=f"name one of {', '.join(shells.SCRIPTS)}",
        )
    script = shells.SCRIPTS[shell] % kind(lm, {}, "lm", "_LM_COMPLETE").source_vars()
    for line in shells.install(shell, script):
        click.echo(line)
    context.exit()


def _register_shells() -> None:
    """Lets click write and serve our scripts of completion."""
    from click import shell_completion
    from click.shell_completion import CompletionItem

    from lmcli.catalog import shells

    class Bash(shell_completion.BashComplete):
        source_template = shells.SCRIPTS["bash"]

        def get_completion_args(self) -> tuple[list[str], str]:
            line = os.environ.get("COMP_LINE")
            if line is None:  # a script of click's
                return super().get_completion_args()
            words = shell_completion.split_arg_string(line)
            ends = line[-1:].isspace() and not line.endswith("\\ ")
            self.word = "" if ends or len(words) < 2 else words.pop()
            return words[1:], self.word

        def format_completion(self, item: CompletionItem[Any]) -> str:
            line, breaks = os.environ.get("COMP_LINE"), os.environ.get("COMP_BREAKS", "=:")
            if line is None or item.type != "plain":
                return super().format_completion(item)
            offer = shells.bash_offer(item.value, line, self.word, breaks)
            return f"{shells.offer_type('plain', item.value)},{offer}"

    class Zsh(shell_completion.ZshComplete):
        source_template = shells.SCRIPTS["zsh"]

        def format_completion(self, item: CompletionItem[str]) -> str:
            item.type = shells.offer_type(item.type, item.value)
            return super().format_completion(item)

    class Fish(shell_completion.FishComplete):
        source_template = shells.SCRIPTS["fish"]

    for kind in (Bash, Zsh, Fish):
        shell_completion.add_completion_class(kind)


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.version_option(__version__, message="lm %(version)s")
@click.option(
    "--install-completion",
    metavar="[SHELL]",
    is_flag=False,
    flag_value="",
    is_eager=True,
    expose_value=False,
    callback=_install_completion,
)
def lm() -> None:
    """Train and use language models; each is a folder in Hugging Face format."""


def run(arguments: list[str] | None = None) -> int:
    """Runs a command line, prints errors on standard error, and returns the exit code."""
    if "_LM_COMPLETE" in os.environ:
        return _serve_shell()
    try:
        return lm.main(arguments, prog_name="lm", standalone_mode=False) or errors.EXIT_DONE
    except errors.UserError as error:
        _print_error(error)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _print_error(_user_error(error))
        return error.exit_code
    except errors.Interrupted as stop:
        _print(str(stop))
        return errors.EXIT_INTERRUPTED
    except (click.Abort, KeyboardInterrupt):
        _print("interrupted")
        return errors.EXIT_INTERRUPTED
    except errors.ClosedPipe:
        return errors.EXIT_CLOSED_PIPE
    except SystemExit:  # click raises it for a closed pipe
        return errors.EXIT_CLOSED_PIPE
    except OSError as error:
        return _write_error(error)


def _user_error(error: click.ClickException) -> errors.UserError:
    """An error of click, in the form of our own: what, where, and what to do."""
    context: click.Context | None = getattr(error, "ctx", None)
    if context is None:
        return errors.UserError(error.format_message(), exit_code=error.exit_code)
    more, where = f"see {context.command_path} --help", None
    what, hint = error.format_message().rstrip("."), more
    name = str(getattr(error, "option_name", ""))
    names = {word: each for each in context.command.params for word in each.opts}
    parameter = getattr(error, "param", None) or names.get(name)
    if isinstance(error, click.NoSuchOption):
        long_names = [word for word in names if re.match("--(?!help)", word)]
        what = f"no such option {name}{errors.did_you_mean(name, [*long_names, '--help'], 0.6)}"
        if len(long_names) <= MOST_OPTIONS:
            hint = f"its options are {', '.join(long_names)}; {more}"
    elif parameter is not None:
        where, what = parameter.make_metavar(context), _what_is_wrong(error, parameter)
        if isinstance(parameter, click.Option):
            where, about = max(parameter.opts, key=len), (parameter.help or "").partition("  [")[0]
            hint = f"{about.partition('. ')[0].rstrip('.')}; {more}" if about else more
    elif match := re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", what):
        what = f"unexpected argument {match[1]!r}"
    return errors.UserError(what, where, hint, error.exit_code)


def _what_is_wrong(error: click.ClickException, parameter: click.Parameter) -> str:
    """The message of an error about a parameter's value, without its name."""
    if isinstance(error, click.MissingParameter):
        return "is missing"
    if isinstance(error, click.BadOptionUsage):
        return "needs a value"
    what, kind = error.message.rstrip("."), parameter.type
    value = what.partition(" is not ")[0]
    if isinstance(kind, click.Choice):
        choices = [str(choice) for choice in kind.choices]
        near = errors.did_you_mean(value.strip("'"), choices, 0.7)  # not cpu for gpu
        return f"{value} is not one of {', '.join(choices)}{near}"
    if isinstance(kind, click.IntRange | click.FloatRange) and " is not a valid " in what:
        return f"{value} is not a {'whole ' * isinstance(kind, click.IntRange)}number"
    if isinstance(kind, click.IntRange | click.FloatRange) and " range " in what:
        low, high = kind.min, kind.max
        if kind.min_open or kind.max_open:
            return f"{value} is not above {low}" if high is None else what
        limits = f"between {low} and {high}" if high is not None else f"{low} or more"
        return f"{value} is not {limits}"
    return what


def _serve_shell() -> int:
    """Writes a script of completion, or what completes a word; the shell shows no errors."""
    try:
        _register_shells()
        lm.main([], prog_name="lm")
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception:
        return errors.EXIT_FAILED
    return errors.EXIT_DONE


def _print_error(error: errors.UserError) -> None:
    """Prints an error; on a terminal the name of a file stays on its line."""
    if error.where and sys.stderr.isatty():
        from lmcli.text.characters import visible

        error = errors.UserError(error.what, visible(error.where, keep=""), error.hint)
    _print(f"error: {error}")


def _print(message: str) -> None:
    """Prints a message on standard error, wrapped on a terminal, its control characters drawn."""
    from lmcli.terminal.wrapping import message_for

    print(message_for(sys.stderr, f"lm: {message}"), file=sys.stderr)


# errors of standard output that are no fault of lm: a full disk, a closed stream
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _write_error(error: OSError) -> int:
    """Exit code for an error of standard output; reports it unless the pipe was closed.

    Raises `error` again if it has another cause.
    """
    if isinstance(error, BrokenPipeError):
        return errors.EXIT_CLOSED_PIPE
    if error.filename or error.errno not in UNWRITABLE:
        raise error
    _print(f"error: standard output: cannot write: {error.strerror}")
    return errors.EXIT_FAILED


def prepare_streams() -> None:
    """Opens closed standard streams, and makes all of them UTF-8.

    Otherwise the next file that is opened would become standard output. What is written to a closed
    standard output is an error, as of coreutils; messages that cannot be written are lost.
    """
    for number, flags in enumerate(CLOSED_FLAGS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_stream(0, "r")), "utf-8")
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_stream(1, "w")), "utf-8")
    # a file's name may have bytes that are not UTF-8: they are written as they are
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stderr is None or isinstance(sys.stderr, io.TextIOWrapper):
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Messages(2, "w", closefd=False)),
            encoding,
            "backslashreplace",
            line_buffering=True,
        )


def _stream(number: int, mode: str) -> io.FileIO:
    return io.FileIO(number, mode, closefd=False)


class _Messages(io.FileIO):
    """Standard error; what cannot be written, as to a closed terminal, is lost and ends nothing."""

    def write(self, data: Any) -> int:
        try:
            with progress.hidden(bytes(data[-1:])):
                written = super().write(data)  # None: it would have to wait
        except OSError:
            written = None
        return len(data) if written is None else written


def restart_in_utf_8() -> None:
    """Starts the command again in Python's UTF-8 mode if the locale knows ASCII only.

    Else names of files and arguments could not be UTF-8. Does nothing on Windows, and where it has
    been done.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    if encoding != "ascii" or os.name != "posix" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """The entry point. Exits without cleaning up: unloading torch would take most of a second."""
    from lmcli.distributed import signals

    restart_in_utf_8()
    prepare_streams()
    signals.interrupt_once()
    # OpenMP threads that spin long lose 5 to 20 times their speed when another program uses a
    # core; with this limit they lose half, and nothing on an idle machine (4 × 128 training, two
    # cores). Must be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps the code of so many products, a third of a megabyte each; 1,024 by default
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    try:
        code = run()
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was cleaned up after
        _print("interrupted")
        code = errors.EXIT_INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _write_error(error)
    sys.stderr.flush()
    os._exit(code)
