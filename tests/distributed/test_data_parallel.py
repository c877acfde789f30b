"""Replica groups: sharding of batches, sums of gradients, lost peers.

Whole runs of several processes are in commands/test_several_processes.py.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from forked import CONTEXT
from torch import nn

from lmcli.distributed import data_parallel, launcher
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup
from lmcli.errors import ProcessLost


def test_every_item_is_the_work_of_one_process():
    items = list(range(10))
    shards = [ReplicaGroup(rank, 4).shard(items) for rank in range(4)]
    assert shards[0] == [(0, True), (4, True), (8, True)]
    assert sorted(item for shard in shards for item, _ in shard) == items
    assert [item for item, _ in SINGLE_PROCESS.shard(items)] == items


def test_a_single_process_does_not_communicate():
    weight = nn.Parameter(torch.ones(2))
    loss = torch.tensor(3.0)
    assert SINGLE_PROCESS.is_leader
    assert SINGLE_PROCESS.any_rank(True) and not SINGLE_PROCESS.any_rank(False)
    SINGLE_PROCESS.broadcast({"a": 1})
    assert SINGLE_PROCESS.add_gradients([weight], loss) is loss and weight.grad is None


def test_buckets_keep_order_and_dtype():
    tensors = [torch.zeros(3), torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1)]
    assert [len(bucket) for bucket in data_parallel._buckets(tensors)] == [2, 1, 1]
    assert list(data_parallel._buckets([])) == []


def listening_addresses() -> set[str]:
    """The local addresses at which this process listens, as /proc/net shows them."""
    links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes}


def run_rank(rank: int, environment: dict, queue) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    data_parallel.BUCKET_BYTES = 16  # several buckets
    replicas = data_parallel.join()
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1)])
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(rank + 1.0)
    replicas.broadcast_weights(model)
    first, second, unused = model
    first.weight.grad = torch.full((2, 3), 1.0 + rank)
    if rank:
        second.bias.grad = torch.ones(2)  # the other has none
    loss = replicas.add_gradients(model.parameters(), torch.tensor(10.0 * (rank + 1)))
    result = {
        "weights": {weight.mean().item() for weight in model.parameters()},
        "loss": loss.item(),
        "first": first.weight.grad.unique().tolist(),
        "second": second.bias.grad.tolist(),
        "unused": unused.weight.grad,
        "any": (replicas.any_rank(rank == 1), replicas.any_rank(False)),
        "listening": listening_addresses() if sys.platform == "linux" else set(),
    }
    if replicas.is_leader:
        replicas.broadcast("go on")
    else:
        result["received"] = replicas.receive()
    queue.put((rank, result))
    if rank:
        try:
            replicas.receive()  # the leader has exited without a message
        except ProcessLost as error:
            queue.put((rank, str(error)))


def test_two_processes_sum_gradients_and_report_a_lost_leader(tmp_path):
    environment = launcher._environment(2, 0, tmp_path)
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=run_rank, args=(rank, environment, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in range(3)]
    for process in processes:
        process.join(30)
    results = dict(answers[:2])
    for rank in range(2):
        assert results[rank]["weights"] == {1.0} and results[rank]["loss"] == 30.0
        assert results[rank]["first"] == [3.0] and results[rank]["second"] == [1.0, 1.0]
        assert results[rank]["unused"] is None and results[rank]["any"] == (True, False)
        assert results[rank]["listening"] <= {"0100007F"}  # 127.0.0.1
    assert results[1]["received"] == "go on"
    assert answers[2][0] == 1 and "another process of this run has exited early" in answers[2][1]


@pytest.mark.parametrize("size", [1, 2])
def test_each_process_draws_different_random_numbers(size):
    drawn = []
    for rank in range(2):
        torch.manual_seed(5)
        ReplicaGroup(rank, size).seed(1, 3)
        drawn.append(torch.rand(1).item())
    assert (drawn[0] == drawn[1]) == (size == 1)
