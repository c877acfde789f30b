"""Processes that train beside this one while it is measured: on a shared processor each is slower than one alone."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from lmcli.analysis.benchmark import TrainingWorkload
from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.model.device import Placement, place


class Company:
    """`size` processes with a placement like this one's, started when first needed and ended with this one."""

    def __init__(self, size: int, placement: Placement):
        self.size, self.placement = size, placement
        self._pipes: list[Connection] = []

    @contextmanager
    def working(self, recipe: Recipe) -> Iterator[None]:
        """All of them make steps of a recipe, from before the block until after it.

        Raises UserError where one has been ended by the system.
        """
        self._start()
        self._tell(recipe)
        yield
        self._tell(None)

    def _start(self) -> None:
        fresh = multiprocessing.get_context("spawn")  # a fork would inherit threads that are not there
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process: the others inherit this
        while len(self._pipes) < self.size:
            pipe, theirs = fresh.Pipe()
            fresh.Process(target=_member, args=(theirs, self.placement, torch.get_num_threads()), daemon=True).start()
            theirs.close()
            self._pipes.append(pipe)
        signal.signal(signal.SIGINT, before)

    def _tell(self, recipe: Recipe | None) -> None:
        try:
            for pipe in self._pipes:
                pipe.send(recipe)
            for pipe in self._pipes:
                pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError("a process that was to train beside this one has ended", where="--nproc",
                            hint="memory may be short: plan for fewer") from error


def _member(pipe: Connection, placement: Placement, threads: int) -> None:
    """Makes steps of each recipe it is told until it is told None; answers when it has begun, and when it has stopped."""
    place(placement.device.type, threads=threads)
    try:
        while True:
            if recipe := pipe.recv():
                workload = TrainingWorkload(recipe, placement)
                workload.step()
                pipe.send(True)
                while not pipe.poll():
                    workload.step()
                del workload
            else:
                pipe.send(True)
    except (EOFError, OSError):
        pass  # the one that this was company for is gone
