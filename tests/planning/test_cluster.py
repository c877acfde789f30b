"""A step on several devices, compared with figures calculated by hand."""

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data.batches import PackedRows
from lmcli.data.documents import DocumentFormat
from lmcli.distributed.data_parallel import ReplicaGroup
from lmcli.errors import UsageError
from lmcli.model import flops
from lmcli.model.device import select_device
from lmcli.model.memory import Memory, training_memory
from lmcli.planning import cluster, plan
from lmcli.planning.advice import advise
from lmcli.planning.cluster import LOCAL_LINK, NETWORK, DeviceGroup, DeviceShare, Link
from lmcli.planning.plan import Planner, Speed
from lmcli.recipes import resolve

CONFIG = ModelConfig(
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    vocab_size=4096,
    max_position_embeddings=128,
).complete()
NEEDED = Memory(weights=1000, gradients=1000, optimizer=2000, activations=5000, update=400)


@pytest.mark.parametrize(
    "rows, max_rows, count, expected",
    [
        (16, 128, 1, DeviceShare(16, 16, 1, 0)),
        (512, 16, 1, DeviceShare(512, 16, 32, 0)),
        (16, 128, 2, DeviceShare(8, 8, 1, 0)),
        (16, 128, 3, DeviceShare(6, 5, 2, 0)),
        (16, 128, 7, DeviceShare(4, 2, 2, 0)),
        (512, 16, 8, DeviceShare(64, 16, 4, 0)),
        (16, 128, 16, DeviceShare(1, 1, 1, 0)),
        (16, 128, 64, DeviceShare(1, 1, 1, 48)),
        (1, 128, 2, DeviceShare(1, 1, 1, 1)),
    ],
)
def test_rows_of_the_busiest_device(rows, max_rows, count, expected):
    assert cluster.share_rows(rows, max_rows, count) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 12, 40])
@pytest.mark.parametrize("batch_tokens, most", [(2048, 16384), (2048, 256), (1000, 300)])
def test_rows_are_dealt_as_training_deals_them(count, batch_tokens, most):
    rows = PackedRows(torch.zeros(4000, dtype=torch.int64).numpy(), 64, 0, 1)
    batches = rows.step(
        0, batch_tokens, max(1, min(most, batch_tokens // count))
    )  # as in TrainStep
    shares = [
        sum(batch.rows for batch, _ in ReplicaGroup(rank, count).shard(batches))
        for rank in range(count)
    ]
    share = cluster.share_rows(batch_tokens // 64, most // 64, count)
    assert (share.rows, share.rows_at_once, share.idle) == (
        max(shares),
        batches[0].rows,
        shares.count(0),
    )


def test_one_device_does_not_communicate():
    layout = cluster.choose_layout(CONFIG, NEEDED, 3, 1, available=10)
    assert (layout.sharding, layout.memory, layout.seconds(DeviceGroup())) == ("none", NEEDED, 0)


def test_gradients_are_summed_by_a_ring():
    layout = cluster.data_parallel(CONFIG, NEEDED, 8)
    assert layout.sent == 2 * 7 / 8 * 1000 and layout.messages == 6 + 2
    assert layout.seconds(DeviceGroup(8, Link(1000, 0.001))) == pytest.approx(1.75 + 8 * 3 * 0.001)
    assert layout.memory == NEEDED._replace(
        update=1000
    )  # all of so few gradients, copied to be sent
    many = cluster.data_parallel(CONFIG, NEEDED._replace(gradients=10**9), 2)
    assert many.sent == 10**9 and many.messages == 6 + 2 * 15
    assert (
        many.memory.update == (64 << 20) + 4 * 4096 * 256
    )  # a bucket ends once it is full, so with one tensor more


def test_sharding_gathers_one_block_at_a_time():
    block = (
        4 * 256 * 256
        + 3 * 256 * CONFIG.intermediate_size
        + 2 * 256
        + 2 * 64 * CONFIG.query_key_norm
    )
    total = flops.parameters(CONFIG).total
    outside = total - 8 * block
    assert outside == 4096 * 256 * (1 if CONFIG.tie_word_embeddings else 2) + 256
    needed = training_memory(CONFIG, TrainConfig(optimizer="adamw"), 2048)
    layout = cluster.sharded(CONFIG, needed, 8, 2)
    assert (
        layout.memory.weights == 4 * total // 8 + 4 * (block + outside) == layout.memory.gradients
    )
    assert (
        layout.memory.optimizer == 8 * total // 8
        and layout.memory.activations == needed.activations
    )
    assert layout.sent == 2 * 3 * 7 / 8 * 4 * total and layout.messages == 6 + 2 * 3 * 9
    assert (
        layout.update_shards(DeviceGroup(8)) == 8
        and cluster.data_parallel(CONFIG, needed, 8).update_shards(DeviceGroup(8)) == 1
    )


@pytest.mark.parametrize("preset", ["base", "encoder-small", "seq2seq-small"])
def test_more_devices_need_less_memory_each_and_communicate_more(preset):
    recipe = resolve(preset, ("model.vocab_size=8000",), {"steps": 1})
    config = dataclasses.replace(
        recipe.model, max_position_embeddings=recipe.train.context
    ).complete()
    needed = training_memory(config, recipe.train, 1024)
    layouts = [cluster.sharded(config, needed, count, 1) for count in (2, 8, 64, 512)]
    sizes = [layout.memory.total for layout in layouts]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sum(layouts[-1].memory[:3]) < sum(needed[:3])
    for way in (cluster.sharded(config, needed, 8, 1), cluster.data_parallel(config, needed, 8)):
        waits = [way.seconds(DeviceGroup(8, Link(speed, 1e-5))) for speed in (1e9, 1e10, 1e11)]
        assert waits == sorted(waits, reverse=True)
    waits = [
        cluster.data_parallel(config, needed, count).seconds(DeviceGroup(count))
        for count in (2, 8, 64, 512)
    ]
    assert waits == sorted(waits) and waits[-1] < math.inf


@pytest.mark.parametrize(
    "needed, sharding",
    [
        ((100, 100, 200, 500, 0), "data parallel"),  # fits whole
        ((4000, 4000, 8000, 500, 0), "sharded"),  # more than four fifths, without any activations
        (
            (100, 100, 200, 20_000, 0),
            "data parallel",
        ),  # activations do not fit: fewer rows at once help
        ((40_000, 40_000, 80_000, 20_000, 0), "sharded"),
    ],
)
def test_a_model_that_does_not_fit_one_device_is_sharded(needed, sharding):
    assert (
        cluster.choose_layout(CONFIG, Memory(*needed), 1, 8, available=10_000).sharding == sharding
    )


def test_groups():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cluster.device_groups([], 1, None, cpu) == [DeviceGroup(1, NETWORK)]
    assert cluster.device_groups([8, 64, 8], 1, 5e10, cuda) == [
        DeviceGroup(8, NETWORK._replace(bytes_per_second=5e10)),
        DeviceGroup(64, NETWORK._replace(bytes_per_second=5e10)),
    ]
    assert cluster.device_groups([], 2, None, cpu) == [DeviceGroup(2, LOCAL_LINK, local=True)]
    assert cluster.device_groups([2], 1, None, cpu) == [DeviceGroup(2, NETWORK)]


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cluster.device_groups([], 2, None, torch.device("cuda")) == [DeviceGroup(2, NETWORK)]
    with pytest.raises(UsageError, match="4 processes on 2 GPUs"):
        cluster.device_groups([], 4, None, torch.device("cuda"))


def test_assumptions():
    assert cluster.assumptions([DeviceGroup()], "cpu") == []
    first, second = cluster.assumptions([DeviceGroup(8), DeviceGroup(512)], "an H100, bfloat16")
    assert first.startswith("8, 512 devices like this one (an H100, bfloat16), each as fast")
    assert "25 GB/s each way" in first and "20 µs" in first
    assert "2 (N − 1)/N · 4 bytes sent for each parameter" in second
    here = cluster.assumptions([DeviceGroup(2, LOCAL_LINK, True)], "cpu, 1 threads")
    assert here[0].startswith(
        "2 processes on this machine (cpu, 1 threads, an equal share of the memory each)"
    )


@pytest.fixture
def planner(tmp_path, monkeypatch):
    """A Planner whose device takes 1 ms a token, 2 where it has one row, and 0.1 s an update."""
    file = tmp_path / "story.txt"
    file.write_text("".join(f"The baker of number {i} went home and slept.\n" for i in range(2000)))
    recipe = resolve("tiny", (), {"steps": 10})
    planner = Planner(
        plan.read_text((str(file),), (), DocumentFormat(), None, recipe, lambda text: None),
        select_device("cpu", "float32"),
    )
    planner.process = 10**8
    monkeypatch.setattr(
        planner,
        "_measure",
        lambda probe, vocabulary, seconds: Speed(
            0.002 if probe.train.batch_tokens == probe.train.context else 0.001, 0.1, 1e-5
        ),
    )
    return planner


SMALL = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "train.context=16",
    "train.batch_tokens=64",
    "tokenizer.vocab_size=300",
)


def test_a_group_of_one_is_the_plain_plan(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    plain = planner.plan("tiny", recipe)
    assert plain == planner.plan("tiny", recipe, DeviceGroup(1, Link(1.0, 1.0)))
    assert plain == planner.plan("tiny", recipe, DeviceGroup(1, LOCAL_LINK, True))
    assert (plain.devices, plain.sharding, plain.interconnect, plain.speedup) == (
        1,
        "none",
        None,
        1.0,
    )


def test_several_devices_have_less_to_do_and_wait(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})  # 4 rows of 16 tokens a step
    one, two = (
        planner.plan("tiny", recipe),
        planner.plan("tiny", recipe, DeviceGroup(2, Link(1e6, 0.001))),
    )
    waited = 4 * two.parameters / 1e6 + 8 * 0.001
    assert one.tokens_per_second == pytest.approx(64 / (0.064 + 0.1))
    assert two.tokens_per_second == pytest.approx(64 / (0.032 + 0.1 + waited))
    assert two.speedup == pytest.approx((0.064 + 0.1) / (0.032 + 0.1 + waited))
    assert two.seconds_communicating == pytest.approx(10 * waited)
    # what is not a step takes as long, but the others read the text after the first
    assert two.seconds - one.seconds == pytest.approx(10 * (waited - 0.032) + planner.text.seconds)
    assert (two.tokens, two.steps, two.epochs, two.bits_per_byte) == (
        one.tokens,
        one.steps,
        one.epochs,
        one.bits_per_byte,
    )
    assert (two.micro_batch_tokens, two.idle_devices, two.sharding) == (32, 0, "data parallel")
    assert two.activations < one.activations and two.memory < one.memory


def test_several_devices_read_more_in_the_same_time(planner):
    recipe = resolve("tiny", (*SMALL[:4], *SMALL[5:], "train.batch_tokens=2048"), {"time": 60.0})
    plans = [planner.plan("tiny", recipe, DeviceGroup(count)) for count in (1, 2, 8, 64)]
    assert [plan.tokens for plan in plans] == sorted({plan.tokens for plan in plans})
    assert {plan.seconds for plan in plans} == {60.0}


def test_advice_for_too_many_devices(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    few, many = (planner.plan("tiny", recipe, DeviceGroup(count)) for count in (4, 64))
    assert (few.idle_devices, many.idle_devices) == (0, 60)
    sentences = [advise([plan])[0][0].advice for plan in (few, many)]
    assert sentences[0] == (
        "4 devices are only 1.2 times as fast as one: communication and updates take longer than "
        "the computation; raise train.batch_tokens"
    )
    sharded = dataclasses.replace(
        few, sharding="sharded", micro_batch_tokens=8
    )  # sends for each micro-batch
    assert advise([sharded])[0][0].advice.endswith("raise train.micro_batch_tokens")
    assert sentences[1] == "a step has 4 rows for 64 devices: 60 are idle; raise train.batch_tokens"


def test_local_processes_share_the_memory_and_have_no_speedup(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    one, two = (
        planner.plan("tiny", recipe),
        planner.plan("tiny", recipe, DeviceGroup(2, LOCAL_LINK, True)),
    )
    assert (
        two.machine_memory == one.machine_memory // 2
        and two.speedup is None
        and two.interconnect == 6e8
    )


@pytest.mark.parametrize(
    "others, at_work", [(1, True), (10**6, False)]
)  # so many would not have memory
def test_the_background_load_trains_while_a_process_is_measured(planner, others, at_work):
    recipe, trained = resolve("tiny", (*SMALL, "model.vocab_size=300"), {"steps": 1}), []
    recipe = dataclasses.replace(recipe, model=recipe.model.complete())
    planner.load = SimpleNamespace(
        size=others, training=lambda recipe: nullcontext(trained.append(recipe))
    )
    with planner._background_load(recipe, 64):
        assert trained == [recipe] * at_work


def test_a_model_too_large_for_a_device_is_sharded(planner, monkeypatch):
    monkeypatch.setattr(plan, "machine_memory", lambda device: 13 * 10**8)
    recipe = resolve("base", ("train.batch_tokens=8192", "tokenizer.vocab_size=300"), {"steps": 10})
    one, eight = planner.plan("base", recipe), planner.plan("base", recipe, DeviceGroup(8))
    assert not one.fits and eight.fits and eight.sharding == "sharded"
    assert (
        eight.memory
        == eight.process + eight.weights + eight.gradients + eight.optimizer + eight.activations
    )
    plans, _ = advise([dataclasses.replace(one, devices=8)])
    assert plans[0].advice.startswith(
        f"needs {one.memory / 1e9:.1f} GB of memory on each device, the machine has 1.3 GB"
    )
