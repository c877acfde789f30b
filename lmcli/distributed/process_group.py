"""Joins the process group of torchrun or `--nproc`, sends JSON messages, reports lost processes.

Processes have torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK). They find each other by those of
torchrun (MASTER_ADDR, MASTER_PORT), with `--nproc` by a file that only this user can read: nothing
listens for them. Messages are JSON: nothing is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lmcli.distributed.launcher import STORE_FILE_VARIABLE
from lmcli.errors import ProcessLost, UsageError


def world_size() -> int:
    """World size, from torchrun's environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine, from torchrun's environment; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(timeout: timedelta, backend: str = "gloo") -> tuple[int, int]:
    """Initializes the process group; returns (rank, world size). Each process takes its own GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, size = _store()
    # torchrun's store still holds the keys and addresses of processes from before a restart
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return rank, size


def _store() -> tuple[dist.Store, int, int]:
    """(the store in which processes find each other, rank, world size)."""
    if file := os.environ.get(STORE_FILE_VARIABLE):
        size = world_size()
        return dist.FileStore(file, size), int(os.environ["RANK"]), size
    return next(rendezvous("env://"))


def require_gpus(processes: int, device: torch.device, hint: str) -> None:
    """Raises UsageError if there are more processes than GPUs: each process needs its own."""
    if processes > 1 and device.type == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes on {torch.cuda.device_count()} GPUs", where="--nproc", hint=hint
        )


def send_json(message: Any, send: Callable[[Tensor], object]) -> None:
    """Sends a message as JSON in two tensors, its size and its bytes, each by a call of `send`."""
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    send(torch.tensor([len(data)]))
    send(data)


def recv_json(receive: Callable[[Tensor], object]) -> Any:
    """Receives a message of `send_json`; `receive` fills the tensor it is called with."""
    size = torch.zeros(1, dtype=torch.int64)
    receive(size)
    data = torch.empty(int(size), dtype=torch.uint8)
    receive(data)
    return json.loads(data.numpy().tobytes())


@contextmanager
def peer_errors(where: str = "", hint: str = "start the command again") -> Iterator[None]:
    """Raises ProcessLost when communication in this context fails: another process has exited."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("another process of this run has exited early", where, hint) from error
