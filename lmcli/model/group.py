"""Processes that belong together: they find each other, tell each other JSON, and notice that one has gone.

They find each other by the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); `--nproc`
sets them itself. Nothing is ever unpickled.
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

from lmcli.errors import Lost, UsageError


def expected() -> int:
    """How many processes this one is one of, by its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(patience: timedelta, backend: str = "gloo") -> tuple[int, int]:
    """Makes this process one of the group; returns its place and how many there are. One that has a GPU takes its own."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps what processes of an earlier start have left there, their addresses too
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    return rank, size


def require_gpus(processes: int, device: torch.device, hint: str) -> None:
    """UsageError for more processes than GPUs, which each takes one of."""
    if processes > 1 and device.type == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(f"{processes} processes on {torch.cuda.device_count()} GPUs", where="--nproc", hint=hint)


def say(word: Any, hand: Callable[[Tensor], object]) -> None:
    """Gives `hand` what JSON can say, as tensors for `hear`."""
    said = torch.frombuffer(bytearray(json.dumps(word).encode()), dtype=torch.uint8)
    hand(torch.tensor([len(said)]))
    hand(said)


def hear(take: Callable[[Tensor], object]) -> Any:
    """What another process `say`s; `take` fills a tensor with what comes next."""
    size = torch.zeros(1, dtype=torch.int64)
    take(size)
    heard = torch.empty(int(size), dtype=torch.uint8)
    take(heard)
    return json.loads(heard.numpy().tobytes())


@contextmanager
def noticing(where: str = "", advice: str = "start the command again") -> Iterator[None]:
    """Lost when another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost("another process of this run has ended before its time", where, advice) from error
