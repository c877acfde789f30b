"""Several processes around one stream of work: the first reads, hands out and writes, and all of them work.

A part of the input goes to whichever process is free, and what was found of it comes back in the order of the parts: the
output is that of one process.
"""

import base64
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from lmcli.errors import EXIT_FAILED, Lost, UserError

READ_AHEAD = 4  # parts a process that are read before those before them are written: a large one may take as long as several
PATIENCE = timedelta(days=365)  # a pipe may be quiet for long; one who is gone is noticed at once


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Errand:
    """Work on a part that any process can do: `work` makes of a part what JSON can say. `said` makes that of a part, and
    `heard` the part again."""

    work: Callable[[Any], Any]
    said: Callable[[Any], Any] = _same
    heard: Callable[[Any], Any] = _same


@dataclass(eq=False)
class _Job:
    """A part on its way; the `last` one of a stream has no part, and the error that ended the reading."""

    part: Any = None
    errand: Errand | None = None
    key: int = 0
    found: Any = None
    error: BaseException | None = None
    done: bool = False
    last: bool = False

    def answer(self, answer: dict[str, Any]) -> None:
        """Takes what another process has found."""
        self.found = answer.get("found")
        self.error = UserError(*answer["error"]) if "error" in answer else None
        self.done = True

    def work(self) -> None:
        """Does it here."""
        try:
            self.found = self.errand.work(self.part)
        except UserError as error:
            self.error = error  # told when what lies before it has been written
        self.done = True


class Crew:
    """The processes of a command. `rank` is this one's place, 0 leads; a crew of one talks to nobody.

    As a context it ends well for all when the leader's block does; what a user can mend in another process is the
    leader's to tell.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._change = threading.Condition()  # guards all that follows
        self._open: deque[_Job] = deque()
        self._trouble: BaseException | None = None
        self._closing = False
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        others = range(1, size) if self.leads else ()
        self._threads = [threading.Thread(target=self._hand_out, args=(other,), daemon=True) for other in others]
        if not self.leads:
            self._threads = [threading.Thread(target=self._listen, daemon=True)]
        for thread in self._threads:
            thread.start()

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads and writes."""
        return not self.rank

    def in_order(self, parts: Iterable[Any], errand: Errand, key: int = 0) -> Iterator[tuple[Any, Any]]:
        """(part, what was found of it), in order and as soon as it is there. `key` is the place of the errand among those
        that the others `follow`.

        Some parts are read ahead, in a thread: so a slow pipe is answered while nothing more comes. Raises what the
        reading or the work on a part raised, after what lies before it; Lost when another process has gone.
        """
        if self.size == 1:
            for part in parts:
                yield part, errand.work(part)
            return
        line: deque[_Job] = deque()
        threading.Thread(target=self._read, args=(parts, errand, key, line), daemon=True).start()
        while True:
            job = self._first_of(line)
            if job.error:
                raise job.error
            if job.last:
                return
            yield job.part, job.found

    def _read(self, parts: Iterable[Any], errand: Errand, key: int, line: deque[_Job]) -> None:
        last = _Job(done=True, last=True)
        try:
            for part in parts:
                self._put(_Job(part, errand, key), line)
        except BaseException as error:
            last.error = error
        self._put(last, line)

    def _put(self, job: _Job, line: deque[_Job]) -> None:
        with self._change:
            self._change.wait_for(lambda: len(line) < READ_AHEAD * self.size)
            line.append(job)
            if not job.done:
                self._open.append(job)
            self._change.notify_all()

    def _first_of(self, line: deque[_Job]) -> _Job:
        """The first job of the line when it is done; until then this process works on those that nobody has taken."""
        while True:
            with self._change:
                self._change.wait_for(lambda: (line and line[0].done) or self._trouble or self._open)
                if line and line[0].done:
                    self._change.notify_all()
                    return line.popleft()
                if self._trouble:
                    break
                job = self._open.popleft()
            job.work()
        raise self._trouble

    def _hand_out(self, other: int) -> None:
        """Has another process work, one job after the other, and sends it home at the end."""
        try:
            while (job := self._next()) is not None:
                _send([job.key, job.errand.said(job.part)], other)
                answer = _receive(other)
                with self._change:
                    job.answer(answer)
                    self._change.notify_all()
            _send(None, other)
        except BaseException as error:
            if isinstance(error, Lost):
                error.what = f"process {other} of {self.size} has ended before its time"
            with self._change:
                self._trouble = error
                self._change.notify_all()

    def _next(self) -> _Job | None:
        with self._change:
            self._change.wait_for(lambda: self._open or self._closing)
            return self._open.popleft() if self._open else None

    def follow(self, *errands: Errand) -> None:
        """Runs the errands that the leader sends this process on, until it sends it home."""
        while (word := self._inbox.get()) is not None:
            key, said = word
            try:
                answer = {"found": errands[key].work(errands[key].heard(said))}
            except UserError as error:
                answer = _told(error)
            _send(answer, 0)

    def _listen(self) -> None:
        """Takes what the leader says. Once that has gone nothing is left to do, and this process may be at work for long."""
        try:
            word = ()
            while word is not None:
                word = _receive(0)
                self._inbox.put(word)
        except Lost:
            os._exit(EXIT_FAILED)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> bool:
        if not self.leads and isinstance(error, UserError):
            while self._inbox.get() is not None:
                _send(_told(error), 0)
            return True
        if self.leads and kind is None:
            with self._change:
                self._closing = True
                self._change.notify_all()
            for thread in self._threads:
                thread.join()
        return False


ALONE = Crew()


def join() -> Crew:
    """The crew that this process belongs to, by its environment."""
    from lmcli.model import group

    with group.noticing():
        return Crew(*group.join(PATIENCE))


def packed(numbers: np.ndarray) -> str:
    """An array as JSON can say it, in a twentieth of the time that its numbers would take; `unpacked` makes it again."""
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def unpacked(text: str, dtype: type) -> np.ndarray:
    """The array, read-only."""
    return np.frombuffer(base64.b64decode(text), dtype)


def _told(error: UserError) -> dict[str, Any]:
    return {"error": [error.what, error.where, error.hint, error.exit_code]}


def _send(word: Any, to: int) -> None:
    import torch.distributed as dist

    from lmcli.model import group

    with group.noticing():
        group.say(word, partial(dist.send, dst=to))


def _receive(source: int) -> Any:
    import torch.distributed as dist

    from lmcli.model import group

    with group.noticing():
        return group.hear(partial(dist.recv, src=source))
