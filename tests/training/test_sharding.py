"""What processes that share out a model do with it; whole runs of several are in commands/test_several_processes.py."""

import multiprocessing
import os

import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UserError
from lmcli.model.transformer import Transformer
from lmcli.training import optimizers, parallel, sharding
from lmcli.training.sharding import ShardedTeam

SIZE = 3
MATRICES = [(10, 6), (4, 9), (2, 5), (7, 3)]  # so few rows that some processes have none


def test_every_process_makes_as_many_passes():
    parts = list("abcdefg")
    shared = [ShardedTeam(rank, SIZE).share(parts) for rank in range(SIZE)]
    assert [len(own) for own in shared] == [3, 3, 3]
    assert sorted(part for own in shared for part, counts in own if counts) == parts
    assert shared[1][2] == ("a", False)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_rows_are_parted_as_torch_does(count):
    chunks = [len(part) for part in torch.arange(count).chunk(4)]
    assert [sharding._rows(count, rank, 4) for rank in range(4)] == chunks + [0] * (4 - len(chunks))


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot use"):
        sharding.sizes(tmp_path)


def model() -> Transformer:
    """The same one in every process."""
    found = Transformer(ModelConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=17,
                                    max_position_embeddings=8).complete())
    found.initialize(1)
    for weight in found.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return found


def member(rank: int, port: int, folder, queue) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel.join()
    team, found = ShardedTeam(rank, SIZE), {}
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(shape, generator=generator).bfloat16() for shape in MATRICES]
    own = [_own(matrix, rank) for matrix in whole]
    made = team.on_whole(whole, own, lambda matrices: [matrix.flip(0) * len(matrix) for matrix in matrices])
    few = team.on_whole(whole[:1], own[:1], lambda matrices: [2 * matrix for matrix in matrices])
    found["on fewer than processes"] = torch.equal(few[0], 2 * own[0])
    found["on whole"] = all(torch.equal(part, _own(matrix.flip(0) * len(matrix), rank)) for part, matrix in zip(made, whole))
    found["norm"] = team.norm([part.float() for part in own if part.numel()])

    sharded, alone = model(), model()
    team.distribute(sharded, torch.device("cpu"))
    found["rows"] = next(len(parallel.local(weight)) for weight in sharded.parameters())
    for one in (sharded, alone):
        rule = optimizers.build(one, TrainConfig(optimizer="muon"), team if one is sharded else parallel.ALONE)
        ids = torch.arange(14).view(2, 7)
        one.head(one.hidden(ids)).float().square().mean().div(SIZE if one is sharded else 1).backward()
        norm = rule.clip(1e-3)
        rule.step()
        found[f"norm of {'all' if one is sharded else 'one'}"] = norm
    states = {f"{name}.momentum_buffer": value["momentum_buffer"] for name, weight in sharded.named_parameters()
              if "momentum_buffer" in (value := rule.state_of(weight))}
    assert not states  # that is the other's
    sharding.write(folder, {name: weight.detach() for name, weight in sharded.named_parameters()})
    if team.leads:
        team.tell("go on")
    else:
        assert team.hear() == "go on"
    told = team.hear() if not team.leads else None  # of what the leader asks for
    gathered = team.whole(sharded)
    assert (gathered is None) == (told == ["whole"])
    if team.leads:
        pairs = zip(gathered.named_parameters(), alone.named_parameters())
        found["apart"] = max(float((a - b).norm() / b.norm()) for (_, a), (_, b) in pairs)
        gathered.hidden(ids)
        read = {name: torch.empty_like(weight) for name, weight in alone.named_parameters()}
        sharding.read(folder, read)
        found["read"] = all(torch.equal(weight, read[name]) for name, weight in gathered.named_parameters())
        found["sizes"] = sharding.sizes(folder) == {name: weight.shape for name, weight in alone.named_parameters()}
    queue.put((rank, found))


def _own(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    first = sum(sharding._rows(len(matrix), other, SIZE) for other in range(rank))
    return matrix[first:first + sharding._rows(len(matrix), rank, SIZE)]


def test_three_processes_hold_one_model(tmp_path):
    from lmcli.launch import _free_port
    context, port = multiprocessing.get_context("spawn"), _free_port()
    queue = context.Queue()
    processes = [context.Process(target=member, args=(rank, port, tmp_path, queue)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
    generator = torch.Generator().manual_seed(3)
    norm = torch.cat([torch.randn(shape, generator=generator).bfloat16().float().flatten() for shape in MATRICES]).norm()
    for own in found.values():
        assert own["on whole"] and own["norm"] == pytest.approx(float(norm), rel=1e-6)
        assert own["norm of all"] == pytest.approx(own["norm of one"], rel=1e-5)
    assert [found[rank]["rows"] for rank in range(SIZE)] == [6, 6, 5]
    assert found[0]["apart"] < 1e-3 and found[0]["read"] and found[0]["sizes"]
