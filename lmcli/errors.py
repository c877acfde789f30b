"""The errors a user can fix, the nearest known word, and the exit codes of `lm`."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141


class UserError(Exception):
    """A mistake the user can fix: what is wrong, where, and what to do.

    Printed as one or two lines, never as a traceback. `exit_code` is 1 when the work failed and 2
    when the command line (or a preset, which is a command line in a file) was wrong.
    """

    def __init__(
        self,
        what: str,
        where: str | None = None,
        hint: str | None = None,
        exit_code: int = EXIT_FAILED,
    ):
        super().__init__(what)
        self.what, self.where, self.hint, self.exit_code = what, where, hint, exit_code

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n  {self.hint}" if self.hint else message


class UsageError(UserError):
    """The command line or a preset asks for something impossible (exit code 2)."""

    def __init__(self, what: str, where: str | None = None, hint: str | None = None):
        super().__init__(what, where, hint, EXIT_USAGE)


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known words that are most like this one, the nearest first, whatever their case.

    Of words that begin with it, if it has three letters, the shortest comes before all others.
    """
    import difflib

    words, word = {each.lower(): each for each in known}, word.lower()
    longer = [each for each in words if each.startswith(word) and len(word.strip("-")) >= 3]
    near = sorted(longer, key=len) + difflib.get_close_matches(word, words, count, cutoff)
    return [words[each] for each in list(dict.fromkeys(near))[:count]]


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The end of a message with the nearest known word; "" if none is near.

    >>> did_you_mean("trian", ("train", "plan")), did_you_mean("x", ("train",))
    ("; did you mean 'train'?", '')
    """
    return "".join(f"; did you mean {near!r}?" for near in nearest(word, known, cutoff=cutoff))


def import_extra(module: str, extra: str, what: str, where: str | None = None) -> ModuleType:
    """A module of an optional package; UserError, which names the extra that has it, without it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(what, where, f"pip install 'lmcli[{extra}]'") from error


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP, once the work so far is saved (exit code 130); how to resume."""


class ClosedPipe(Exception):
    """The reader of standard output is gone, as with `| head` (exit code 141, nothing printed)."""


class ProcessLost(UserError):
    """Another process of the same run has ended; this one cannot continue (exit code 1)."""
