"""How far a command's work is: told where it is done, shown by a watcher, by default by nobody.

Stages nest: what begins while an item of another stage is in work tells how much of it is done.
"""

import io
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class Watcher(Protocol):
    """What shows the stages."""

    def told(self) -> None:
        """Is called after each change."""

    def hidden(self, text: bytes) -> AbstractContextManager[Any]:
        """Hides them while text that ends so is written."""


@dataclass(eq=False)
class Stage:
    """Work on `total` units; None: on as many as its input has (see `inputs`), if that is known.

    Of the `done` units, `skipped` were done before. `begun` is when the first one was begun, and
    `seconds` what the stage is expected to take, 0 if unknown.
    """

    label: str = ""
    unit: str = "records"
    total: float | None = None
    done: float = 0.0
    skipped: float = 0.0
    begun: float | None = None
    seconds: float = 0.0
    in_work: float = 0.0
    inner: float = 0.0  # the share of the item in work that was shown
    read: float = 0.0
    files: Mapping[str, int | None] = field(default_factory=dict)  # of the input, with their sizes
    opened: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """Starts its clock, once."""
        self.begun = self.begun or time.monotonic()

    def age(self, now: float) -> float:
        """Seconds since it was begun."""
        return 0.0 if self.begun is None else max(0.0, now - self.begun)

    def skip(self, amount: float) -> None:
        """Counts units that were done before."""
        self.skipped += amount
        self.done += amount

    def advance(self, amount: float = 1.0) -> None:
        """Counts units that are done now."""
        self.begin()
        self.done += amount
        self.in_work = self.inner = 0.0
        _told()

    @contextmanager
    def item(self, size: float = 1.0) -> Iterator[None]:
        """Work on so many units; stages inside tell how many of them are done."""
        self.begin()
        self.in_work, self.inner = size, 0.0
        yield
        self.advance(size)

    def share(self, done: float) -> float | None:
        """The share that is done with so many units, if known."""
        if self.total is not None:
            return min(1.0, done / self.total) if self.total else 1.0
        if (size := self.input_size()) is None:
            return None
        share = min(1.0, self.input_position() / size) if size else 1.0
        return share * min(1.0, done / self.read) if self.read else share

    def input_size(self) -> int | None:
        """The bytes of all files; None without files, and if one is a pipe."""
        sizes = [size for size in self.files.values() if size is not None]
        return sum(sizes) if sizes and len(sizes) == len(self.files) else None

    def input_position(self) -> int:
        """How many of these bytes were read."""
        if not self.opened:
            return 0
        # copies: another thread may open the next file meanwhile
        files, (*before, (newest, handle)) = self.files, list(self.opened.items())
        try:
            position = handle.tell()
        except (OSError, ValueError, AttributeError):  # it is closed
            position = files.get(newest) or 0
        return position + sum(files.get(name) or 0 for name, _ in before)


_stages = [Stage()]
_watcher: Watcher | None = None


def watch(watcher: Watcher | None) -> None:
    """Lets this watcher show the stages from now on; None: nobody."""
    global _watcher
    with hidden():
        _stages[:] = [Stage()]
        _watcher = watcher


def is_watched() -> bool:
    """True if somebody shows the stages."""
    return _watcher is not None


def is_watched_by(watcher: Watcher) -> bool:
    """True if this one shows the stages."""
    return _watcher is watcher


def _told() -> None:
    if _watcher:
        _watcher.told()


def hidden(text: bytes = b"\n") -> AbstractContextManager[Any]:
    """Hides what is shown while text is written to the terminal."""
    return _watcher.hidden(text) if _watcher else nullcontext()


def stage(
    label: str = "", total: float | None = None, unit: str = "records"
) -> AbstractContextManager[Stage]:
    """A stage of work that begins now and is shown until it ends.

    One without a label is a part of another, and never shown alone.
    """
    new = Stage(label, unit, total, begun=time.monotonic())
    return _entered(new) if _watcher else nullcontext(new)


def now(label: str, seconds: float = 0.0) -> None:
    """Names what the command itself does from now on; "": nothing that has a name."""
    if _watcher:
        _stages[0] = Stage(label, begun=time.monotonic(), seconds=seconds)


@contextmanager
def _entered(stage: Stage) -> Iterator[Stage]:
    _stages.append(stage)
    try:
        yield stage
    finally:
        if stage in _stages:  # a generator may end after its command
            _stages.remove(stage)


def current() -> Stage:
    """The innermost stage; without any, that of the command."""
    return _stages[-1]


class Shown(NamedTuple):
    """The stage that is shown, its units that are done, and the share of it, if known."""

    stage: Stage
    done: float
    share: float | None


def shown() -> Shown:
    """The outermost stage with an item in work, else the innermost with a label."""
    stages = list(_stages)
    visible = [k for k, each in enumerate(stages) if not k or each.label]
    first = next((k for k in visible if stages[k].in_work), visible[-1])
    share: float | None = 0.0
    for each in reversed(stages[first:]):
        each.inner = max(each.inner, share or 0.0)  # also when the stages inside have ended
        done = each.done + each.in_work * each.inner
        if each.unit == "bytes" and each.files:
            done = each.input_position()
        share = each.share(done)
    return Shown(stages[first], done, share)


def inputs(files: Iterable[str]) -> None:
    """Tells the names of the files that the innermost stage reads; "-" is standard input."""
    if _watcher:
        current().files, current().opened = {name: _size(name) for name in files}, {}


def _size(name: str) -> int | None:
    """The bytes of a regular file; None for any other, and for one that is not read in order."""
    try:
        facts = os.fstat(sys.stdin.fileno()) if name == "-" else os.stat(name)
    except (OSError, ValueError):
        return None
    regular = stat.S_ISREG(facts.st_mode) and not name.endswith(".parquet")
    return facts.st_size if regular else None


def opened(name: str, handle: Any) -> None:
    """Tells that a file is read through this handle of its bytes from now on."""
    for each in reversed(_stages) if _watcher else ():
        if name in each.files:
            each.opened.pop(name, None)
            each.opened[name] = handle
            return


def read(count: int) -> None:
    """Tells that so many records of the files were read."""
    for each in reversed(_stages) if _watcher else ():
        if each.files:
            each.read += count
            return


class TerminalFile(io.FileIO):
    """A terminal that text is written to; what is shown there is hidden meanwhile."""

    def write(self, data: Any) -> int:
        """Writes bytes."""
        with hidden(bytes(data[-1:])):
            return super().write(data)
