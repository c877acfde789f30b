"""What processes of a team share out and add up; whole runs of several are in commands/test_several_processes.py."""

import multiprocessing
import os

import pytest
import torch
from torch import nn

from lmcli.errors import Lost
from lmcli.training import parallel
from lmcli.training.parallel import ALONE, Team


def test_every_part_is_one_process_work():
    parts = list(range(10))
    shared = [Team(rank, 4).share(parts) for rank in range(4)]
    assert shared[0] == [(0, True), (4, True), (8, True)]
    assert sorted(part for own in shared for part, _ in own) == parts
    assert [part for part, _ in ALONE.share(parts)] == parts


def test_a_team_of_one_talks_to_nobody():
    weight = nn.Parameter(torch.ones(2))
    loss = torch.tensor(3.0)
    assert ALONE.leads and ALONE.any(True) and not ALONE.any(False)
    ALONE.tell({"a": 1})
    assert ALONE.add_gradients([weight], loss) is loss and weight.grad is None


def test_buckets_keep_order_and_precision():
    tensors = [torch.zeros(3), torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1)]
    assert [len(bucket) for bucket in parallel._buckets(tensors)] == [2, 1, 1]
    assert list(parallel._buckets([])) == []


def member(rank: int, port: int, queue) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel.BUCKET_BYTES = 16  # several buckets
    team = parallel.join()
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1)])
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(rank + 1.0)
    team.share_weights(model)
    first, second, unused = model
    first.weight.grad = torch.full((2, 3), 1.0 + rank)
    if rank:
        second.bias.grad = torch.ones(2)  # the other has none
    loss = team.add_gradients(model.parameters(), torch.tensor(10.0 * (rank + 1)))
    found = {"weights": {weight.mean().item() for weight in model.parameters()}, "loss": loss.item(),
             "first": first.weight.grad.unique().tolist(), "second": second.bias.grad.tolist(),
             "unused": unused.weight.grad, "any": (team.any(rank == 1), team.any(False))}
    if team.leads:
        team.tell("go on")
    else:
        found["heard"] = team.hear()
    queue.put((rank, found))
    if rank:
        try:
            team.hear()  # the leader has gone without a word
        except Lost as error:
            queue.put((rank, str(error)))


def test_two_processes_have_one_sum_and_notice_who_is_gone():
    from lmcli.launch import _free_port
    context, port = multiprocessing.get_context("spawn"), _free_port()
    queue = context.Queue()
    processes = [context.Process(target=member, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in range(3)]
    for process in processes:
        process.join(30)
    found = dict(answers[:2])
    for rank in range(2):
        assert found[rank]["weights"] == {1.0} and found[rank]["loss"] == 30.0
        assert found[rank]["first"] == [3.0] and found[rank]["second"] == [1.0, 1.0]
        assert found[rank]["unused"] is None and found[rank]["any"] == (True, False)
    assert found[1]["heard"] == "go on"
    assert answers[2][0] == 1 and "another process of this run has ended" in answers[2][1]


@pytest.mark.parametrize("size", [1, 2])
def test_each_process_draws_its_own_numbers(size):
    drawn = []
    for rank in range(2):
        torch.manual_seed(5)
        Team(rank, size).seed(1, 3)
        drawn.append(torch.rand(1).item())
    assert (drawn[0] == drawn[1]) == (size == 1)
