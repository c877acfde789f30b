"""A training step on several devices: rows and memory of each, and time for communication.

Two layouts on N devices. Data parallel: all weights on each device, gradients summed once a step;
a ring sends 2·(N−1)/N times their bytes (Patarasuk & Yuan 2009). Sharded: an Nth of everything on
each device, one block gathered at a time (ZeRO-3, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023);
3·(N−1)/N times the bytes for each micro-batch. Nothing is measured here.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lmcli.config import ModelConfig
from lmcli.distributed.data_parallel import BUCKET_BYTES
from lmcli.distributed.process_group import require_gpus
from lmcli.model.memory import MASTER, Memory, fits_on_one, sharded_memory

# messages of a step beside its data (next step, gradients, memory); a sum goes both ways
SMALL_MESSAGES = 6


class Link(NamedTuple):
    """The connection of two devices: bytes/s each way, and latency in seconds.

    A message to all devices takes the latency for each doubling of their number (a tree).
    """

    bytes_per_second: float
    latency: float


NETWORK = Link(25e9, 2e-5)  # a 200 Gbit/s port for each device
# gloo between two processes of one machine: 4 MB in 6 ms, 40 MB in 67 ms, one number in 0.3 ms
LOCAL_LINK = Link(0.6e9, 1.5e-4)


class DeviceGroup(NamedTuple):
    """`size` devices and their link; `local` processes share this machine's processor."""

    size: int = 1
    link: Link = NETWORK
    local: bool = False


SINGLE_DEVICE = DeviceGroup()


def device_groups(
    counts: Iterable[int], processes: int, bytes_per_second: float | None, device: torch.device
) -> list[DeviceGroup]:
    """The groups to plan for: one for each of `counts`, or one of `processes` on this machine.

    Processes have a GPU each or share the processor. `bytes_per_second` None: a default.
    Raises UsageError for more processes than GPUs.
    """
    local = processes > 1 and device.type == "cpu"
    require_gpus(processes, device, "--devices plans for more GPUs like this one")
    link = LOCAL_LINK if local else NETWORK
    link = link._replace(bytes_per_second=bytes_per_second) if bytes_per_second else link
    return [DeviceGroup(count, link, local) for count in dict.fromkeys(counts or [processes])]


class DeviceShare(NamedTuple):
    """The busiest device's share of a step: rows, rows per forward pass, and forward passes.

    `idle` devices get no rows.
    """

    rows: int
    rows_at_once: int
    passes: int
    idle: int


class DeviceLayout(NamedTuple):
    """How a model is laid out on devices.

    `sharding` is "none" (one device), "data parallel" or "sharded"; `memory` is that of one device;
    `sent` are the bytes it sends in a step; `messages` are those that all devices wait for.
    """

    sharding: str
    memory: Memory
    sent: float = 0.0
    messages: int = 0

    def seconds(self, group: DeviceGroup) -> float:
        """Seconds of a step in which a device only communicates."""
        doublings = math.ceil(math.log2(group.size))
        waiting = self.messages * doublings * group.link.latency
        return self.sent / group.link.bytes_per_second + waiting

    def update_shards(self, group: DeviceGroup) -> int:
        """The number of devices that share the update of the weights."""
        return group.size if self.sharding == "sharded" else 1


def share_rows(rows: int, max_rows: int, count: int) -> DeviceShare:
    """The busiest of `count` devices' share of a step of `rows`, as data_parallel deals them.

    A forward pass has at most `max_rows`, fewer if otherwise a device would have none. 16 rows on
    3 devices make passes of 5, 5, 5 and 1, the first device has two of them:
    share_rows(16, 128, 3) == (6, 5, 2, 0).
    """
    at_once = max(1, min(max_rows, rows // count))
    passes = [min(at_once, rows - start) for start in range(0, rows, at_once)]
    shares = [passes[rank::count] for rank in range(min(count, len(passes)))]
    busiest = max(shares, key=sum)
    return DeviceShare(sum(busiest), at_once, len(busiest), count - len(shares))


def choose_layout(
    config: ModelConfig, needed: Memory, passes: int, count: int, available: float
) -> DeviceLayout:
    """The layout on `count` devices that `lm train` would choose.

    `needed` is the memory of training on one device, `available` the bytes of each device. If only
    a smaller micro-batch would help, the layout is data parallel.
    """
    if count == 1:
        return DeviceLayout("none", needed)
    if fits_on_one(needed, available):
        return data_parallel(config, needed, count)
    return sharded(config, needed, count, passes)


def data_parallel(config: ModelConfig, needed: Memory, count: int) -> DeviceLayout:
    """All weights on each device.

    A bucket of gradients is copied before it is sent, when the activations have been freed.
    """
    bucket = min(needed.gradients, BUCKET_BYTES + MASTER * config.vocab_size * config.hidden_size)
    memory = needed._replace(update=max(needed.update, bucket))
    messages = SMALL_MESSAGES + 2 * math.ceil(needed.gradients / BUCKET_BYTES)
    return DeviceLayout(
        "data parallel", memory, 2 * (count - 1) / count * needed.gradients, messages
    )


def sharded(config: ModelConfig, needed: Memory, count: int, passes: int) -> DeviceLayout:
    """An equal share of everything on each device; each pass gathers the weights twice."""
    encoder_layers = config.num_encoder_layers * (config.shape == "encoder-decoder")
    gathers = 1 + config.num_hidden_layers + encoder_layers
    sent = passes * (count - 1) / count * (2 * needed.weights + needed.gradients)
    memory = sharded_memory(config, needed, count)
    return DeviceLayout("sharded", memory, sent, SMALL_MESSAGES + 3 * passes * gathers)


def assumptions(groups: list[DeviceGroup], device: str) -> list[str]:
    """What plans for these groups assume, a line each; nothing for one device.

    `device` names one device.
    """
    counts, link = [group.size for group in groups], groups[0].link
    if max(counts) == 1:
        return []
    speed = (
        f"{link.bytes_per_second / 1e9:g} GB/s each way between two of them, "
        f"{1e6 * link.latency:g} µs for each doubling of their number, no computing meanwhile"
    )
    if groups[0].local:
        first = (
            f"{counts[0]} processes on this machine ({device}, an equal share of the memory each), "
            f"measured with all of them at work; {speed}"
        )
    else:
        numbers = ", ".join(f"{count:,}" for count in counts)
        first = (
            f"{numbers} devices like this one ({device}), each as fast as measured here with its "
            f"share of a step; {speed}"
        )
    return [
        first,
        "data parallel: float32 gradients are summed once a step (2 (N − 1)/N · 4 bytes sent for "
        "each parameter); sharded, if that does not fit: weights are gathered too "
        "(3 (N − 1)/N · 4 bytes for each micro-batch); starting, tokenizing, evaluating and "
        "saving take as long as on one device",
    ]
