"""A pool of processes that share one stream of work and return its results in input order.

The leader (rank 0) reads the input, hands items to free workers, works itself and writes.
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

from lmcli.errors import EXIT_FAILED, ProcessLost, UserError
from lmcli.terminal import progress

READ_AHEAD = 4  # items per process read before earlier ones are done: one may take as long as many
# a pipe may be silent for a long time; a process that has exited is noticed at once
IDLE_TIMEOUT = timedelta(days=365)


Convert = Callable[[Any], Any]


def _identity(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class RemoteTask:
    """Work on an item by any process; the other functions turn items and results into JSON."""

    work: Convert
    encode: Convert = _identity
    decode: Convert = _identity
    encode_result: Convert = _identity
    decode_result: Convert = _identity
    size: Callable[[Any], float] = lambda item: 0.0  # of an item, in the units of `progress`


@dataclass(eq=False)
class _Job:
    """An item and its result; the `last` job of a stream has no item, only the error of reading."""

    task: RemoteTask
    item: Any = None
    task_index: int = 0
    result: Any = None
    error: BaseException | None = None
    done: bool = False
    last: bool = False

    def take_answer(self, answer: dict[str, Any]) -> None:
        """Stores the answer of another process."""
        if "error" in answer:
            self.error = UserError(*answer["error"])
        else:
            self.result = self.task.decode_result(answer["result"])
        self.done = True

    def run(self) -> None:
        """Does the work in this process."""
        try:
            self.result = self.task.work(self.item)
        except UserError as error:
            self.error = error  # raised once all earlier results are out
        self.done = True


class WorkerPool:
    """The processes of a command; as a context manager it ends the workers when the leader ends.

    UserErrors of a worker are raised by the leader. A pool of size 1 does not communicate.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._change = threading.Condition()  # guards the fields below
        self._open: deque[_Job] = deque()
        self._failure: BaseException | None = None
        self._closing = False
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        if self.is_leader:
            self._threads = [_start_thread(self._feed, worker) for worker in range(1, size)]
        else:
            self._threads = [_start_thread(self._listen)]

    @property
    def is_leader(self) -> bool:
        """True in the process that reads and writes."""
        return not self.rank

    def map_in_order(
        self, items: Iterable[Any], task: RemoteTask, task_index: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (item, result) in input order, each as soon as it is there.

        `task_index` is the task's position in the arguments of `serve`. A thread reads ahead, so
        results appear while a slow pipe blocks. Raises errors of reading and working in input
        order; ProcessLost when a worker has exited.
        """
        if self.size == 1:
            for item in items:
                with progress.current().item(task.size(item)):
                    result = task.work(item)
                yield item, result
            return
        queue: deque[_Job] = deque()
        _start_thread(self._read, items, task, task_index, queue)
        while True:
            job = self._next_result(queue)
            if job.error:
                raise job.error
            if job.last:
                return
            progress.current().advance(task.size(job.item))
            yield job.item, job.result

    def _read(
        self, items: Iterable[Any], task: RemoteTask, task_index: int, queue: deque[_Job]
    ) -> None:
        last = _Job(task, done=True, last=True)
        try:
            for item in items:
                self._put(_Job(task, item, task_index), queue)
        except BaseException as error:
            last.error = error
        self._put(last, queue)

    def _put(self, job: _Job, queue: deque[_Job]) -> None:
        with self._change:
            self._change.wait_for(lambda: len(queue) < READ_AHEAD * self.size)
            queue.append(job)
            if not job.done:
                self._open.append(job)
            self._change.notify_all()

    def _next_result(self, queue: deque[_Job]) -> _Job:
        """The first job of the queue, once done; until then this process works on open jobs."""
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: (queue and queue[0].done) or self._failure or self._open
                )
                if queue and queue[0].done:
                    self._change.notify_all()
                    return queue.popleft()
                if self._failure:
                    raise self._failure
                job = self._open.popleft()
            progress.current().in_work = job.task.size(job.item)
            job.run()

    def _feed(self, worker: int) -> None:
        """Sends jobs to a worker, one at a time, and None at the end."""
        try:
            while (job := self._take_open()) is not None:
                _send([job.task_index, job.task.encode(job.item)], worker)
                answer = _receive(worker)
                with self._change:
                    job.take_answer(answer)
                    self._change.notify_all()
            _send(None, worker)
        except BaseException as error:
            if isinstance(error, ProcessLost):
                error.what = f"process {worker} of {self.size} has exited early"
            with self._change:
                self._failure = error
                self._change.notify_all()

    def _take_open(self) -> _Job | None:
        with self._change:
            self._change.wait_for(lambda: self._open or self._closing)
            return self._open.popleft() if self._open else None

    def serve(self, *tasks: RemoteTask) -> None:
        """Worker loop: runs the tasks that the leader sends until it ends this process."""
        while (message := self._inbox.get()) is not None:
            task_index, encoded = message
            task = tasks[task_index]
            try:
                answer = {"result": task.encode_result(task.work(task.decode(encoded)))}
            except UserError as error:
                answer = _error_answer(error)
            _send(answer, 0)

    def _listen(self) -> None:
        """Receives work from the leader; exits at once when the leader disappears."""
        try:
            message: Any = ()
            while message is not None:
                message = _receive(0)
                self._inbox.put(message)
        except ProcessLost:
            os._exit(EXIT_FAILED)  # the main thread may be busy for a long time

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        if not self.is_leader and isinstance(error, UserError):
            while self._inbox.get() is not None:
                _send(_error_answer(error), 0)
            return True
        if self.is_leader and kind is None:
            with self._change:
                self._closing = True
                self._change.notify_all()
            for thread in self._threads:
                thread.join()
        return False


LOCAL_POOL = WorkerPool()


def join() -> WorkerPool:
    """The pool that this process belongs to by its environment."""
    from lmcli.distributed import process_group

    with process_group.peer_errors():
        return WorkerPool(*process_group.join(IDLE_TIMEOUT))


def array_to_text(array: np.ndarray) -> str:
    """An array as base64, which takes a twentieth of the time of a JSON list of numbers."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def text_to_array(text: str, dtype: type) -> np.ndarray:
    """The read-only array of `array_to_text`."""
    return np.frombuffer(base64.b64decode(text), dtype)


def _start_thread(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _error_answer(error: UserError) -> dict[str, Any]:
    return {"error": [error.what, error.where, error.hint, error.exit_code]}


def _send(message: Any, rank: int) -> None:
    import torch.distributed as dist

    from lmcli.distributed import process_group

    with process_group.peer_errors():
        process_group.send_json(message, partial(dist.send, dst=rank))


def _receive(rank: int) -> Any:
    import torch.distributed as dist

    from lmcli.distributed import process_group

    with process_group.peer_errors():
        return process_group.recv_json(partial(dist.recv, src=rank))
