"""Processes that train while this one is measured: on a shared processor each of them is slower."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.model.device import DeviceConfig, select_device
from lmcli.planning.benchmark import TrainingWorkload


class BackgroundLoad:
    """`size` processes on this device, started at first use; they end with this process."""

    def __init__(self, size: int, device_config: DeviceConfig):
        self.size, self.device_config = size, device_config
        self._pipes: list[Connection] = []

    @contextmanager
    def training(self, recipe: Recipe) -> Iterator[None]:
        """Lets all processes train by a recipe while the block runs.

        Raises UserError if the system has ended one of them.
        """
        self._start()
        self._send(recipe)
        yield
        self._send(None)

    def _start(self) -> None:
        # a fork would inherit the locks of threads that do not exist in the child
        context = multiprocessing.get_context("spawn")
        # Ctrl-C is for this process only; children inherit that they ignore it
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        while len(self._pipes) < self.size:
            pipe, child_pipe = context.Pipe()
            arguments = (child_pipe, self.device_config, torch.get_num_threads())
            context.Process(target=_train, args=arguments, daemon=True).start()
            child_pipe.close()
            self._pipes.append(pipe)
        signal.signal(signal.SIGINT, handler)

    def _send(self, recipe: Recipe | None) -> None:
        """Sends a recipe (None: stop) to all processes and waits for their answers."""
        try:
            for pipe in self._pipes:
                pipe.send(recipe)
            for pipe in self._pipes:
                pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                "a process of the background load has ended",
                where="--nproc",
                hint="plan for fewer processes if memory is short",
            ) from error


def _train(pipe: Connection, device_config: DeviceConfig, threads: int) -> None:
    """Child process: trains by each recipe it receives until it receives None; answers both."""
    select_device(device_config.device.type, threads=threads)
    try:
        while True:
            if recipe := pipe.recv():
                workload = TrainingWorkload(recipe, device_config)
                workload.step()
                pipe.send(True)
                while not pipe.poll():
                    workload.step()
                del workload
            else:
                pipe.send(True)
    except (EOFError, OSError):
        pass  # the parent process has ended
