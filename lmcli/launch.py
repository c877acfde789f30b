"""One command as several processes on this machine: started, watched, and where it trains started again if one dies."""

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

from lmcli.errors import EXIT_FAILED, Lost, UsageError

RESTARTS = 3
SECONDS_TO_END = 10  # that the others have once one has ended
SECONDS_TO_NOTICE = 3  # that the leader has to end by itself, and say why, when another has failed
FOLDER_FILE = "LM_RUN_FOLDER_FILE"  # names the file in which the leader says where its run lies, for those started again


def is_member() -> bool:
    """Whether this process was started as one of several, by torchrun or by `together`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is the first of them, or alone."""
    return os.environ.get("RANK", "0") == "0"


def is_watched() -> bool:
    """Whether it was `together`, which tells how a process has ended."""
    return FOLDER_FILE in os.environ


def leave_signals_to_the_leader() -> None:
    """Has a process that does not lead go on until the leader sends it home, or has gone.

    SIGTERM comes to all where it is sent to a group of processes, as `timeout` does, but from torchrun it is meant.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if is_watched() else signal.SIG_DFL)


def take_signals_once() -> None:
    """Has SIGTERM interrupt a leader once: sent to a group it comes twice, the second time from `together`."""
    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def telling_once() -> Iterator[None]:
    """Leaves it to the leader to say that a process is lost, and before it to `together`, which knows how it was ended."""
    try:
        yield
    except Lost:
        if not leads():
            os._exit(EXIT_FAILED)
        if is_watched():
            time.sleep(SECONDS_TO_NOTICE / 2)
        raise


def refuse_to_write_again(output: str | None) -> None:
    """Raises UsageError where torchrun has started a command again that had begun to write on standard output."""
    if output in (None, "-") and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        raise UsageError("a process has ended before its time, and what was written until then cannot be taken back",
                         hint="start the command again")


def again(output: str | None, resume: str | None, overwrite: bool) -> tuple[str | None, str | None, bool]:
    """(-o, --resume, --overwrite) of processes that may have been started again: they go on with the run there is.

    Raises UsageError where torchrun would start a command again that could not find its run then.
    """
    known = os.environ.get(FOLDER_FILE)
    folder = Path(known).read_text(encoding="utf-8") if known and os.path.isfile(known) else output
    if not folder and not resume and not known:
        raise UsageError("torchrun starts a command again where a process dies: give -o, so that the run is found then")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not restarted or resume or not folder or not (Path(folder) / "recipe.yaml").is_file():
        return output, resume, overwrite
    return (folder, folder, False) if any(Path(folder).glob("state/step-*")) else (folder, None, True)


def remember_folder(folder: Path) -> None:
    """Leaves word of where the run lies, for those started again."""
    if file := os.environ.get(FOLDER_FILE):
        Path(file).write_text(str(folder.resolve()), encoding="utf-8")


def together(count: int, arguments: list[str], note: Callable[[str], None], advice: str = "") -> int:
    """Runs `lm ARGUMENTS` as `count` processes; returns the exit code of the first, which leads.

    When one is killed or crashes all are started again, up to RESTARTS times; with `advice` never, it is told instead, and
    the others have nothing to keep and end with the leader. Ctrl-C and SIGTERM are the leader's to answer.
    """
    with tempfile.TemporaryDirectory(prefix="lm-") as room:
        for attempt in range(1 if advice else RESTARTS + 1):
            members = _started(count, arguments, attempt, Path(room) / "folder")
            with _signals_to(members[0]):
                lost = _watched(members, 0 if advice else SECONDS_TO_END)
            if lost is None:
                return members[0].returncode
            code = members[lost].returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
            onward = f"starting all again from the last state ({attempt + 1} of {RESTARTS})"
            note(f"process {lost} of {count} {how}: {advice or (onward if attempt < RESTARTS else 'giving up')}")
    return 1


def threads_of_one(count: int) -> int:
    """CPU threads that each of so many processes here gets, unless OMP_NUM_THREADS says so: then 0."""
    return 0 if os.environ.get("OMP_NUM_THREADS") else max(1, (os.cpu_count() or 1) // count)


def _started(count: int, arguments: list[str], attempt: int, folder_file: Path) -> list[subprocess.Popen]:
    threads = str(threads_of_one(count) or os.environ["OMP_NUM_THREADS"])
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": threads, "TORCHELASTIC_RESTART_COUNT": str(attempt),
              FOLDER_FILE: str(folder_file)}
    return [subprocess.Popen([sys.executable, "-m", "lmcli", *arguments], stdin=None if rank == 0 else subprocess.DEVNULL,
                             env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _signals_to(leader: subprocess.Popen) -> Iterator[None]:
    """A terminal sends Ctrl-C to all of its processes; SIGTERM comes to this one alone and is handed on."""
    def hand_on(number: int, frame: object) -> None:
        leader.send_signal(number)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _watched(members: list[subprocess.Popen], seconds: float) -> int | None:
    """Waits for the leader to end, and so many seconds for the others; returns None, or which of them died or failed and
    so ended the others."""
    lost = _first_trouble(members)
    for member in members:
        if not _ended(member, seconds if lost is None else 0):
            member.kill()
            member.wait()
    return lost


def _first_trouble(members: list[subprocess.Popen]) -> int | None:
    """The first process to be killed, or to fail while the leader goes on; None once the leader has ended."""
    while True:
        codes = [member.poll() for member in members]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                return rank
        if codes[0] is not None:
            return None
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None and not _ended(members[0], SECONDS_TO_NOTICE):
            return failed
        time.sleep(0.05)


def _ended(member: subprocess.Popen, seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        member.wait(seconds)
    return member.returncode is not None
