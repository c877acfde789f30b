"""Runs a command as several processes on this machine, watches them, and restarts a training run.

Also what a process needs to know that `run_processes` or torchrun started: its role and signals.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmcli.errors import EXIT_FAILED, ProcessLost, UsageError

RESTARTS = 3
SECONDS_TO_END = 10  # for the other processes once one has ended
SECONDS_TO_REPORT = 3  # for the leader to report a failed worker and exit
# path of a file to which the leader writes its run folder, for restarted processes
FOLDER_FILE_VARIABLE = "LM_RUN_FOLDER_FILE"


def is_distributed() -> bool:
    """True if torchrun or `run_processes` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """True in the process of rank 0, and without other processes."""
    return os.environ.get("RANK", "0") == "0"


def is_supervised() -> bool:
    """True if `run_processes` started this process; it reports how a process ended."""
    return FOLDER_FILE_VARIABLE in os.environ


def _restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def ignore_signals_in_worker() -> None:
    """Ignores SIGINT and SIGTERM in a worker: the leader decides when it exits.

    Not a SIGTERM from torchrun, which is meant for the worker itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if is_supervised() else signal.SIG_DFL)


def interrupt_once() -> None:
    """Lets SIGTERM interrupt the leader once: sent to a process group, it arrives twice."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def report_loss_once() -> Iterator[None]:
    """Lets only one process report ProcessLost: `run_processes` if it can, else the leader."""
    try:
        yield
    except ProcessLost:
        if not is_leader():
            os._exit(EXIT_FAILED)
        if is_supervised():
            time.sleep(SECONDS_TO_REPORT / 2)
        raise


def refuse_restart(output: str | None) -> None:
    """Raises UsageError if torchrun has restarted a command that writes to standard output."""
    if output in (None, "-") and _restart_count() > 0:
        raise UsageError(
            "a process has exited early, after results were written to standard output",
            hint="start the command again",
        )


def restart_options(
    output: str | None, resume: str | None, overwrite: bool
) -> tuple[str | None, str | None, bool]:
    """(-o, --resume, --overwrite) that make a restarted process continue the run that exists.

    Raises UsageError under torchrun without -o: a restarted command could not find its run.
    """
    file = os.environ.get(FOLDER_FILE_VARIABLE)
    folder = Path(file).read_text(encoding="utf-8") if file and os.path.isfile(file) else output
    if not folder and not resume and not file:
        raise UsageError("torchrun needs -o DIR: processes that it restarts find their run there")
    if resume or not folder or not _restart_count() or not Path(folder, "recipe.yaml").is_file():
        return output, resume, overwrite
    has_state = any(Path(folder).glob("state/step-*"))
    return (folder, folder, False) if has_state else (folder, None, True)


def record_run_folder(folder: Path) -> None:
    """Records the run folder for processes that `run_processes` restarts."""
    if file := os.environ.get(FOLDER_FILE_VARIABLE):
        Path(file).write_text(str(folder.resolve()), encoding="utf-8")


def run_processes(
    count: int, arguments: list[str], note: Callable[[str], None], advice: str = ""
) -> int:
    """Runs `lm ARGUMENTS` as `count` processes; returns the exit code of the leader.

    When a process is killed or crashes, all are restarted, up to RESTARTS times; with `advice` the
    note ends in it instead, and workers end with the leader. The leader handles Ctrl-C and SIGTERM.
    """
    attempts = 1 if advice else RESTARTS + 1
    with tempfile.TemporaryDirectory(prefix="lm-") as scratch:
        for attempt in range(1, attempts + 1):
            processes = _start(count, arguments, attempt - 1, Path(scratch) / "folder")
            with _signals_to(processes[0]):
                lost = _wait(processes, 0 if advice else SECONDS_TO_END)
            if lost is None:
                return processes[0].returncode
            code = processes[lost].returncode
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            plan = f"restarting all from the last state ({attempt} of {RESTARTS})"
            plan = plan if attempt < attempts else advice or "giving up"
            note(f"process {lost} of {count} {killed or f'failed (exit code {code})'}: {plan}")
    return 1


def threads_per_process(count: int) -> int:
    """CPU threads for each of `count` processes here; 0 if OMP_NUM_THREADS sets them."""
    return 0 if os.environ.get("OMP_NUM_THREADS") else max(1, (os.cpu_count() or 1) // count)


def _start(
    count: int, arguments: list[str], restarts: int, folder_file: Path
) -> list[subprocess.Popen]:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(threads_per_process(count) or os.environ["OMP_NUM_THREADS"]),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        FOLDER_FILE_VARIABLE: str(folder_file),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "lmcli", *arguments],
            stdin=None if rank == 0 else subprocess.DEVNULL,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _signals_to(leader: subprocess.Popen) -> Iterator[None]:
    """Forwards SIGTERM, which this process alone gets; a terminal sends Ctrl-C to all processes."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, lambda number, _: leader.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def _wait(processes: list[subprocess.Popen], seconds: float) -> int | None:
    """Waits for the leader, then up to `seconds` for each worker, and kills what still runs.

    Returns the rank of a process that was killed or failed, which ends the others, or None.
    """
    lost = _first_lost(processes)
    for process in processes:
        if not _has_ended(process, seconds if lost is None else 0):
            process.kill()
            process.wait()
    return lost


def _first_lost(processes: list[subprocess.Popen]) -> int | None:
    """The first rank that is killed, or fails while the leader runs; None once the leader ends."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                return rank
        if codes[0] is not None:
            return None
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None and not _has_ended(processes[0], SECONDS_TO_REPORT):
            return failed
        time.sleep(0.05)


def _has_ended(process: subprocess.Popen, seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None
