"""Runs a command as several processes on this machine, watches them, and restarts a training run.

Also what a process needs to know that `run_processes` or torchrun started: its role and signals.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmcli.distributed.signals import handled, stop_signals
from lmcli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, ProcessLost, UsageError
from lmcli.terminal.live_region import give_back, terminal_modes

RESTARTS = 3
SECONDS_TO_END = 10  # for the other processes once one has ended
SECONDS_TO_REPORT = 3  # for the leader to keep its results and exit after a worker has ended
# exit code of a leader that has lost a worker: `run_processes` or torchrun reports or restarts
EXIT_LOST_WORKER = 75
RESUME_HINT = "lm train --resume continues from the last state"
LOOPBACK_INTERFACES = ("lo", "lo0")  # Linux, macOS
# path of a file by which processes of one machine find each other
STORE_FILE_VARIABLE = "LM_STORE_FILE"
# path of a file to which the leader writes its run folder, for restarted processes
FOLDER_FILE_VARIABLE = "LM_RUN_FOLDER_FILE"
MAX_RESTARTS_VARIABLE = "TORCHELASTIC_MAX_RESTARTS"  # torchrun's


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


def is_restarted() -> bool:
    """True if this process replaces one that has died."""
    return _restart_count() > 0


def ignore_signals_in_worker() -> None:
    """Ignores the signals that stop a command in a worker: the leader decides when it exits.

    Not a SIGTERM or SIGHUP from torchrun, which is meant for the worker itself.
    """
    for number in stop_signals():
        for_itself = number != signal.SIGINT and not is_supervised()
        signal.signal(number, signal.SIG_DFL if for_itself else signal.SIG_IGN)


@contextmanager
def report_loss_once() -> Iterator[None]:
    """Lets only one process report ProcessLost: whoever started them if it can, else the leader.

    Nothing is reported where all are restarted, since the run then goes on.
    """
    try:
        yield
    except ProcessLost:
        if not is_leader():
            os._exit(EXIT_FAILED)
        if is_supervised() or _restart_count() < int(os.environ.get(MAX_RESTARTS_VARIABLE, "0")):
            os._exit(EXIT_LOST_WORKER)
        raise


def refuse_restart(output: str | None) -> None:
    """Raises UsageError if torchrun has restarted a command that writes to standard output."""
    if output in (None, "-") and is_restarted():
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


@dataclass
class _Stop:
    """The signal that ends all processes, if one has come. SIGTERM and SIGHUP go to the leader.

    A terminal sends Ctrl-C to all processes by itself.
    """

    number: int = 0
    leader: subprocess.Popen | None = None

    def receive(self, number: int, frame: object) -> None:
        """Handles a signal; a leader that has not started yet gets it then."""
        self.number = number
        self.forward()

    def start(self, leader: subprocess.Popen) -> None:
        """Sets the leader, and sends it the signal that came while it was started."""
        self.leader = leader
        self.forward()

    def forward(self) -> None:
        """Sends the leader the signal that has come."""
        if self.leader and self.number not in (0, signal.SIGINT):
            self.leader.send_signal(self.number)


def run_processes(
    count: int, arguments: list[str], note: Callable[[str], None], advice: str = ""
) -> int:
    """Runs `lm ARGUMENTS` as `count` processes; returns the exit code of the leader.

    When a process is killed or crashes, all are restarted, up to RESTARTS times; with `advice` the
    note ends in it instead, and workers end with the leader. Nothing is restarted after Ctrl-C,
    SIGTERM or SIGHUP, which the leader handles. Raises ProcessLost if a worker has failed.
    """
    import tempfile

    attempts, stop = 1 if advice else RESTARTS + 1, _Stop()
    modes = terminal_modes(sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lm-") as scratch, handled(stop.receive):
        for attempt in range(1, attempts + 1):
            processes = _start(count, arguments, attempt - 1, Path(scratch))
            stop.start(processes[0])
            lost = _wait(processes, 0 if advice else SECONDS_TO_END)
            leader_code = processes[0].returncode
            if leader_code < 0:  # it was killed
                give_back(sys.stderr, modes)
            if lost is None and leader_code != EXIT_LOST_WORKER:
                return leader_code
            if leader_code in (EXIT_DONE, EXIT_INTERRUPTED):  # it did not need that worker any more
                return leader_code
            if lost is None:
                raise ProcessLost(_failure(processes), hint=advice or RESUME_HINT)
            plan = f"restarting all from the last state ({attempt} of {RESTARTS})"
            plan = plan if attempt < attempts else advice or "giving up"
            plan = "interrupted" if stop.number else plan
            note(f"{_ending(processes, lost)}: {plan}")
            if stop.number:
                return EXIT_INTERRUPTED
    return EXIT_FAILED


def threads_per_process(count: int) -> int:
    """CPU threads for each of `count` processes here; 0 if OMP_NUM_THREADS sets them."""
    return 0 if os.environ.get("OMP_NUM_THREADS") else max(1, (os.cpu_count() or 1) // count)


def _start(
    count: int, arguments: list[str], restarts: int, scratch: Path
) -> list[subprocess.Popen]:
    environment = _environment(count, restarts, scratch)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "lmcli", *arguments],
            stdin=None if rank == 0 else subprocess.DEVNULL,
            pass_fds=() if rank else _pipes(arguments),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def _pipes(arguments: list[str]) -> list[int]:
    """The descriptors that a shell has opened for arguments such as <(COMMAND)."""
    names = [re.fullmatch(r"/dev/fd/(\d{1,9})", argument) for argument in arguments]
    return [int(name[1]) for name in names if name and os.path.exists(name[0])]


def _environment(count: int, restarts: int, scratch: Path) -> dict[str, str]:
    """The variables of all processes, which share the folder `scratch`."""
    return {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": str(threads_per_process(count) or os.environ["OMP_NUM_THREADS"]),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        **_loopback_only(),
        STORE_FILE_VARIABLE: str(scratch / f"store-{restarts}"),
        FOLDER_FILE_VARIABLE: str(scratch / "folder"),
    }


def _loopback_only() -> dict[str, str]:
    """Variables that keep the sockets of gloo and NCCL on the loopback interface.

    They would listen on the address of this machine's name.
    """
    import socket

    names = [name for _, name in socket.if_nameindex() if name in LOOPBACK_INTERFACES]
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), names[0]) if names else {}


def _ending(processes: list[subprocess.Popen], rank: int) -> str:
    """How a process that was lost has ended."""
    code = processes[rank].returncode
    how = (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    )
    return f"process {rank} of {len(processes)} {how}"


def _failure(processes: list[subprocess.Popen]) -> str:
    """Which worker has failed, so that the leader has ended."""
    failed = (rank for rank, process in enumerate(processes) if rank and process.returncode)
    return _ending(processes, next(failed, 0))


def _wait(processes: list[subprocess.Popen], seconds: float) -> int | None:
    """Waits for the leader, then up to `seconds` for each worker, and kills what still runs.

    Returns the rank of a process that was killed or failed, which ends the others, or None.
    """
    lost = _first_lost(processes)
    # a leader that has lost a worker notices by itself, and keeps its results
    if lost:
        _has_ended(processes[0], SECONDS_TO_REPORT)
    if processes[0].returncode != EXIT_DONE:
        seconds = min(seconds, 1)
    for process in processes:
        if not _has_ended(process, seconds):
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
