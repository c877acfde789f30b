"""A training step shared by several devices: who has which rows, what each holds, how long they wait for each other's sums.

Two ways to lie on N devices. Whole on each, gradients summed once a step (data parallel, as `training.parallel` does it):
a ring sends 2·(N−1)/N times their bytes (Patarasuk & Yuan 2009). Or sharded, an Nth of everything on each and one block at
a time gathered (ZeRO-3, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023): 3·(N−1)/N times, for each micro-batch. Nothing
is measured here.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lmcli.config import ModelConfig
from lmcli.model.group import require_gpus
from lmcli.model.memory import MASTER, Memory, held_by_one, shared_out
from lmcli.training.parallel import BUCKET_BYTES

SMALL_MESSAGES = 6  # of a step: which is next, who has gradients, whether memory sufficed; a sum goes there and back


class Link(NamedTuple):
    """What joins two devices: bytes a second each way, and seconds that a message to all takes for each doubling of their
    number (they pass it on as a tree)."""

    bytes_per_second: float
    latency: float


NETWORK = Link(25e9, 2e-5)  # a port of 200 Gbit/s for each device
HERE = Link(0.6e9, 1.5e-4)  # gloo between two processes of one machine: 4 MB in 6 ms, 40 MB in 67, a number in 0.3


class Group(NamedTuple):
    """`count` devices and what joins them; `here` says that they are processes that share this machine's processor."""

    count: int = 1
    link: Link = NETWORK
    here: bool = False


ALONE = Group()


def groups(counts: Iterable[int], processes: int, bytes_per_second: float | None, device: torch.device) -> list[Group]:
    """The Groups to plan for: of devices like this one, by their `counts`, or of `processes` on this machine, which have a
    GPU each or share its processor. Without `bytes_per_second` these are guessed.

    Raises UsageError for more processes than GPUs.
    """
    here = processes > 1 and device.type == "cpu"
    require_gpus(processes, device, "--devices plans for more GPUs like this one")
    link = HERE if here else NETWORK
    link = link._replace(bytes_per_second=bytes_per_second) if bytes_per_second else link
    return [Group(count, link, here) for count in dict.fromkeys(counts or [processes])]


class Share(NamedTuple):
    """What the busiest device has of a step: rows, rows of its forward passes, and how many of these. `idle` devices have
    none."""

    rows: int
    rows_at_once: int
    passes: int
    idle: int


class Spread(NamedTuple):
    """How a model lies on devices: `sharding` is "none" (one device), "data parallel" (whole on each) or "sharded"; the
    Memory of one device; bytes that it sends in a step; messages in it that all wait for."""

    sharding: str
    memory: Memory
    sent: float = 0.0
    messages: int = 0

    def seconds(self, group: Group) -> float:
        """Seconds of a step in which a device only sends and waits."""
        doublings = math.ceil(math.log2(group.count))
        return self.sent / group.link.bytes_per_second + self.messages * doublings * group.link.latency

    def parts(self, group: Group) -> int:
        """Into how many parts the update of all weights is divided."""
        return group.count if self.sharding == "sharded" else 1


def share(rows: int, most: int, count: int) -> Share:
    """The Share of `count` devices in a step of `rows`, cut into forward passes of `most` rows, or fewer so that each
    device has one, and dealt in turn as `parallel.Team` does.

    Of 16 rows 3 devices make passes of 5, 5, 5 and 1; the first has two of them: share(16, 128, 3) == (6, 5, 2, 0).
    """
    at_once = max(1, min(most, rows // count))
    passes = [min(at_once, rows - start) for start in range(0, rows, at_once)]
    dealt = [passes[rank::count] for rank in range(min(count, len(passes)))]
    busiest = max(dealt, key=sum)
    return Share(sum(busiest), at_once, len(busiest), count - len(dealt))


def spread(config: ModelConfig, needed: Memory, passes: int, count: int, room: float) -> Spread:
    """The Spread over `count` devices of what one needs to train alone, as `lm train` chooses it. `room` is the bytes that
    each has; where only a smaller micro-batch would help, all stays whole on each."""
    if count == 1:
        return Spread("none", needed)
    return (data_parallel if held_by_one(needed, room) else sharded)(config, needed, count, passes)


def data_parallel(config: ModelConfig, needed: Memory, count: int, passes: int = 1) -> Spread:
    """The Spread with all weights on each device; a bucket of gradients is copied to be sent, when activations are gone."""
    bucket = min(needed.gradients, BUCKET_BYTES + MASTER * config.vocab_size * config.hidden_size)
    memory, buckets = needed._replace(update=max(needed.update, bucket)), math.ceil(needed.gradients / BUCKET_BYTES)
    return Spread("data parallel", memory, 2 * (count - 1) / count * needed.gradients, SMALL_MESSAGES + 2 * buckets)


def sharded(config: ModelConfig, needed: Memory, count: int, passes: int) -> Spread:
    """The Spread with an equal part of everything on each device. Weights are gathered for each of `passes` forward and
    backward passes."""
    gathers = 1 + config.num_hidden_layers + config.num_encoder_layers * (config.shape == "encoder-decoder")
    return Spread("sharded", shared_out(config, needed, count),
                  passes * (count - 1) / count * (2 * needed.weights + needed.gradients),
                  SMALL_MESSAGES + 3 * passes * gathers)


def assumptions(planned: list[Group], one: str) -> list[str]:
    """What plans for these groups take for granted, a line each; `one` is what a device is. Nothing for one alone."""
    counts, link = [group.count for group in planned], planned[0].link
    if max(counts) == 1:
        return []
    sums = (f"{link.bytes_per_second / 1e9:g} GB/s each way and {1e6 * link.latency:g} µs for each doubling of their "
            "number, while nothing is computed")
    if planned[0].here:
        first = (f"{counts[0]} processes on this machine (each: {one}, an equal part of the memory), as fast as measured "
                 f"with all of them at work; between two of them {sums}")
    else:
        number = ", ".join(f"{count:,}" for count in counts)
        first = (f"{number} devices: each like this one ({one}), as fast as measured here with its share of a step; "
                 f"between two of them {sums}")
    return [first, "whole on each, gradients are summed in float32 once a step (2 (N − 1)/N · 4 bytes a parameter sent); "
            "sharded, where that does not fit, weights are gathered as well (3 (N − 1)/N · 4 bytes, each micro-batch); "
            "to start, tokenize, evaluate and save takes as long as on one"]
