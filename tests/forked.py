"""Processes that are forked from one which has imported torch, in 0.1 in place of 2 seconds.

LmPopen is a subprocess.Popen of `lm`: with its own signals, streams, environment and session, as
one that Python starts.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import reduction

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(
    [
        "filelock",
        "lmcli.display",
        "lmcli.output.evaluate",
        "lmcli.output.perplexity",
        "lmcli.planning.auto_preset",
        "lmcli.runs.resume",
        "lmcli.runs.resume_check",
        "lmcli.runs.start",
        "lmcli.commands.evaluate",
        "lmcli.commands.generate",
        "lmcli.commands.train",
        "rich.console",
        "safetensors.torch",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)


class Descriptor:
    """A file descriptor that a process which is started by CONTEXT gets as an argument."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(sent) -> int:
    return sent.detach()


def become_lm(arguments, environment, folder, streams, session) -> None:
    """Runs `lm ARGUMENTS` in this process, as `python -m lmcli` does, and exits."""
    if session:
        os.setsid()
    for number in signal.valid_signals():  # as a new program has them
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        if stream != number:
            os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    from lmcli import commands

    gc.freeze()  # no collection of garbage goes through all that was imported
    os.fsync = lambda handle: None  # as in conftest.py
    sys.argv = ["lm", *arguments]
    for module in ("lmcli.commands", "lmcli.commands.train", "lmcli.commands.plan"):
        if module in sys.modules:  # imported long ago, before the fork
            sys.modules[module].STARTED_AT = time.monotonic()
    subprocess.Popen = ChildPopen  # for --nproc
    try:
        commands.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


class LmPopen(subprocess.Popen):
    """A subprocess.Popen that forks if the command is `python -m lmcli`."""

    process = None

    def _execute_child(self, command, program, prepare, close, passed, folder, environment, *rest):
        arguments = None if isinstance(command, str) else [*map(os.fspath, command)]
        lm = [sys.executable, "-m", "lmcli"]
        if sys.platform != "linux" or prepare or not arguments or arguments[:3] != lm:
            return super()._execute_child(
                command, program, prepare, close, passed, folder, environment, *rest
            )
        ends = rest[3:9]  # of three pipes: the child's, ours; −1: as this process
        streams = [end if end >= 0 else i for i, end in enumerate((ends[0], ends[3], ends[5]))]
        environment = {**(os.environ if environment is None else environment)}
        session = rest[14]
        self.start_lm(arguments[3:], environment, folder or os.getcwd(), streams, session)
        self._child_created = True
        self._close_pipe_fds(*ends)

    def start_lm(self, arguments, environment, folder, streams, session) -> None:
        """Starts the process and sets `pid`."""
        streams = [Descriptor(stream) for stream in streams]
        self.process = CONTEXT.Process(
            target=become_lm, args=(arguments, environment, folder, streams, session)
        )
        self.process.start()
        self.pid = self.process.pid

    def _internal_poll(self, *arguments, **options):
        if self.process is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None:
            self.returncode = self.process.exitcode
        return self.returncode

    def _wait(self, timeout):
        if self.process is None:
            return super()._wait(timeout)
        if self.returncode is None:
            self.process.join(timeout)
            if self._internal_poll() is None:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


class ChildPopen(LmPopen):
    """The same in a forked `lm`, whose children can be forked from it, since it has one thread."""

    def start_lm(self, arguments, environment, folder, streams, session) -> None:
        """Starts the process and sets `pid`."""
        self.pid = os.fork()
        if not self.pid:
            become_lm(arguments, environment, folder, streams, session)
