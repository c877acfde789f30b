"""The errors a user can fix, and the exit codes of `lm`."""

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


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP, once the work so far is saved (exit code 130); how to resume."""


class ClosedPipe(Exception):
    """The reader of standard output is gone, as with `| head` (exit code 141, nothing printed)."""


class ProcessLost(UserError):
    """Another process of the same run has ended; this one cannot continue (exit code 1)."""
