"""Sharded models: equal work, full matrices, gathering, files.

Whole runs of several processes are in commands/test_several_processes.py.
"""

import os

import pytest
import torch
from forked import CONTEXT

from lmcli.config import ModelConfig, TrainConfig
from lmcli.distributed import data_parallel, sharding
from lmcli.distributed.launcher import STORE_FILE_VARIABLE
from lmcli.distributed.sharding import ShardedGroup
from lmcli.errors import UserError
from lmcli.kernels import fast_path
from lmcli.model.transformer import Transformer
from lmcli.training import optimizers

pytestmark = pytest.mark.slow

SIZE = 3
MATRICES = [(10, 6), (4, 9), (2, 5), (7, 3)]  # few rows: some processes have none


def test_every_process_makes_equally_many_passes():
    items = list("abcdefg")
    shards = [ShardedGroup(rank, SIZE).shard(items) for rank in range(SIZE)]
    assert [len(shard) for shard in shards] == [3, 3, 3]
    assert sorted(item for shard in shards for item, counts in shard if counts) == items
    assert shards[1][2] == ("a", False)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_rows_are_split_as_by_torch_chunk(count):
    chunks = [len(chunk) for chunk in torch.arange(count).chunk(4)]
    assert [sharding.rows_of_rank(count, rank, 4) for rank in range(4)] == chunks + [0] * (
        4 - len(chunks)
    )


def test_an_error_names_the_folder_of_damaged_files(tmp_path):
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot use"):
        sharding.read_shapes(tmp_path)


def build_model() -> Transformer:
    """The same model in every process."""
    model = fast_path.build_model(
        ModelConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=17,
            max_position_embeddings=8,
        ).complete()
    )
    model.initialize(1)
    for weight in model.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return model


def run_rank(rank: int, folder, queue) -> None:
    store = str(folder / "store")
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(SIZE), STORE_FILE_VARIABLE: store})
    torch.set_num_threads(1)
    data_parallel.join()
    replicas, result = ShardedGroup(rank, SIZE), {}
    generator = torch.Generator().manual_seed(3)
    full = [torch.randn(shape, generator=generator).bfloat16() for shape in MATRICES]
    shards = [_shard(matrix, rank) for matrix in full]
    updated = replicas.on_full_matrices(
        full, shards, lambda matrices: [matrix.flip(0) * len(matrix) for matrix in matrices]
    )
    few = replicas.on_full_matrices(
        full[:1], shards[:1], lambda matrices: [2 * matrix for matrix in matrices]
    )
    result["fewer matrices than processes"] = torch.equal(few[0], 2 * shards[0])
    result["full matrices"] = all(
        torch.equal(shard, _shard(matrix.flip(0) * len(matrix), rank))
        for shard, matrix in zip(updated, full)
    )
    result["norm"] = replicas.gradient_norm([shard.float() for shard in shards if shard.numel()])

    sharded, unsharded = build_model(), build_model()
    replicas.distribute(sharded, torch.device("cpu"))
    result["rows"] = next(len(data_parallel.local_shard(weight)) for weight in sharded.parameters())
    for model in (sharded, unsharded):
        rule = optimizers.build(
            model,
            TrainConfig(optimizer="muon"),
            replicas if model is sharded else data_parallel.SINGLE_PROCESS,
        )
        ids = torch.arange(14).view(2, 7)
        model.head(model.hidden(ids)).float().square().mean().div(
            SIZE if model is sharded else 1
        ).backward()
        norm = rule.clip(1e-3)
        rule.step()
        result[f"norm of {'sharded' if model is sharded else 'unsharded'}"] = norm
    states = {
        f"{name}.momentum_buffer": value["momentum_buffer"]
        for name, weight in sharded.named_parameters()
        if "momentum_buffer" in (value := rule.state_of(weight))
    }
    assert not states  # `rule` is the unsharded model's
    sharding.write(folder, {name: weight.detach() for name, weight in sharded.named_parameters()})
    if replicas.is_leader:
        replicas.broadcast("go on")
    else:
        assert replicas.receive() == "go on"
    message = None if replicas.is_leader else replicas.receive()
    gathered = replicas.gather(sharded)
    assert (gathered is None) == (message == ["gather"])
    if replicas.is_leader:
        pairs = zip(gathered.named_parameters(), unsharded.named_parameters())
        result["largest difference"] = max(
            float((a - b).norm() / b.norm()) for (_, a), (_, b) in pairs
        )
        gathered.hidden(ids)
        tensors = {name: torch.empty_like(weight) for name, weight in unsharded.named_parameters()}
        sharding.read(folder, tensors)
        result["read"] = all(
            torch.equal(weight, tensors[name]) for name, weight in gathered.named_parameters()
        )
        result["shapes"] = sharding.read_shapes(folder) == {
            name: weight.shape for name, weight in unsharded.named_parameters()
        }
    queue.put((rank, result))


def _shard(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    first = sum(sharding.rows_of_rank(len(matrix), other, SIZE) for other in range(rank))
    return matrix[first : first + sharding.rows_of_rank(len(matrix), rank, SIZE)]


def test_three_processes_hold_one_model(tmp_path):
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=run_rank, args=(rank, tmp_path, queue)) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
    generator = torch.Generator().manual_seed(3)
    norm = torch.cat(
        [torch.randn(shape, generator=generator).bfloat16().float().flatten() for shape in MATRICES]
    ).norm()
    for result in results.values():
        assert result["full matrices"] and result["norm"] == pytest.approx(float(norm), rel=1e-6)
        assert result["norm of sharded"] == pytest.approx(result["norm of unsharded"], rel=1e-5)
        assert result["fewer matrices than processes"]
    assert [results[rank]["rows"] for rank in range(SIZE)] == [6, 6, 5]
    assert results[0]["largest difference"] < 1e-3
    assert results[0]["read"] and results[0]["shapes"]
