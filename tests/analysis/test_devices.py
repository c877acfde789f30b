"""A step shared by several devices, against figures worked out by hand."""

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lmcli.analysis import advice, devices, planning
from lmcli.analysis.devices import HERE, NETWORK, Group, Link, Share
from lmcli.analysis.planning import Planner, Speed
from lmcli.config import ModelConfig, TrainConfig
from lmcli.errors import UsageError
from lmcli.model import cost
from lmcli.model.device import place
from lmcli.model.memory import Memory, training_memory
from lmcli.recipes import resolve
from lmcli.text.batches import PackedRows
from lmcli.text.documents import Layout
from lmcli.training.parallel import Team

CONFIG = ModelConfig(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096,
                     max_position_embeddings=128).complete()
NEEDED = Memory(weights=1000, gradients=1000, optimizer=2000, activations=5000, update=400)


@pytest.mark.parametrize("rows, most, count, expected", [
    (16, 128, 1, Share(16, 16, 1, 0)), (512, 16, 1, Share(512, 16, 32, 0)), (16, 128, 2, Share(8, 8, 1, 0)),
    (16, 128, 3, Share(6, 5, 2, 0)), (16, 128, 7, Share(4, 2, 2, 0)), (512, 16, 8, Share(64, 16, 4, 0)),
    (16, 128, 16, Share(1, 1, 1, 0)), (16, 128, 64, Share(1, 1, 1, 48)), (1, 128, 2, Share(1, 1, 1, 1))])
def test_who_has_which_rows(rows, most, count, expected):
    assert devices.share(rows, most, count) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 12, 40])
@pytest.mark.parametrize("batch_tokens, most", [(2048, 16384), (2048, 256), (1000, 300)])
def test_rows_are_dealt_as_training_deals_them(count, batch_tokens, most):
    rows = PackedRows(torch.zeros(4000, dtype=torch.int64).numpy(), 64, 0, 1)
    batches = rows.step(0, batch_tokens, max(1, min(most, batch_tokens // count)))  # as in loop.Run
    dealt = [sum(batch.rows for batch, _ in Team(rank, count).share(batches)) for rank in range(count)]
    share = devices.share(batch_tokens // 64, most // 64, count)
    assert (share.rows, share.rows_at_once, share.idle) == (max(dealt), batches[0].rows, dealt.count(0))


def test_one_device_holds_what_it_did_and_talks_to_nobody():
    spread = devices.spread(CONFIG, NEEDED, 3, 1, room=10)
    assert (spread.sharding, spread.memory, spread.seconds(Group())) == ("none", NEEDED, 0)


def test_gradients_summed_by_a_ring():
    spread = devices.data_parallel(CONFIG, NEEDED, 8)
    assert spread.sent == 2 * 7 / 8 * 1000 and spread.messages == 6 + 2
    assert spread.seconds(Group(8, Link(1000, 0.001))) == pytest.approx(1.75 + 8 * 3 * 0.001)
    assert spread.memory == NEEDED._replace(update=1000)  # all of so few gradients, copied to be sent
    many = devices.data_parallel(CONFIG, NEEDED._replace(gradients=10**9), 2)
    assert many.sent == 10**9 and many.messages == 6 + 2 * 15
    assert many.memory.update == (64 << 20) + 4 * 4096 * 256  # a bucket ends once it is full, so with one tensor more


def test_a_sharded_model_is_whole_in_one_block_at_a_time():
    block = 4 * 256 * 256 + 3 * 256 * CONFIG.intermediate_size + 2 * 256 + 2 * 64 * CONFIG.query_key_norm
    total = cost.parameters(CONFIG).total
    outside = total - 8 * block
    assert outside == 4096 * 256 * (1 if CONFIG.tie_word_embeddings else 2) + 256
    needed = training_memory(CONFIG, TrainConfig(optimizer="adamw"), 2048)
    spread = devices.sharded(CONFIG, needed, 8, 2)
    assert spread.memory.weights == 4 * total // 8 + 4 * (block + outside) == spread.memory.gradients
    assert spread.memory.optimizer == 8 * total // 8 and spread.memory.activations == needed.activations
    assert spread.sent == 2 * 3 * 7 / 8 * 4 * total and spread.messages == 6 + 2 * 3 * 9
    assert spread.parts(Group(8)) == 8 and devices.data_parallel(CONFIG, needed, 8).parts(Group(8)) == 1


@pytest.mark.parametrize("preset", ["base", "encoder-small", "seq2seq-small"])
def test_more_devices_hold_less_each_and_wait_longer(preset):
    recipe = resolve(preset, ("model.vocab_size=8000",), {"steps": 1})
    config = dataclasses.replace(recipe.model, max_position_embeddings=recipe.train.context).complete()
    needed = training_memory(config, recipe.train, 1024)
    spreads = [devices.sharded(config, needed, count, 1) for count in (2, 8, 64, 512)]
    sizes = [spread.memory.total for spread in spreads]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sum(spreads[-1].memory[:3]) < sum(needed[:3])
    for way in (devices.sharded(config, needed, 8, 1), devices.data_parallel(config, needed, 8)):
        waits = [way.seconds(Group(8, Link(speed, 1e-5))) for speed in (1e9, 1e10, 1e11)]
        assert waits == sorted(waits, reverse=True)
    waits = [devices.data_parallel(config, needed, count).seconds(Group(count)) for count in (2, 8, 64, 512)]
    assert waits == sorted(waits) and waits[-1] < math.inf


@pytest.mark.parametrize("needed, sharding", [
    ((100, 100, 200, 500, 0), "data parallel"),  # fits whole
    ((4000, 4000, 8000, 500, 0), "sharded"),  # more than four fifths, without any activations
    ((100, 100, 200, 20_000, 0), "data parallel"),  # activations do not fit: fewer rows at once help
    ((40_000, 40_000, 80_000, 20_000, 0), "sharded")])
def test_what_does_not_fit_whole_is_sharded(needed, sharding):
    assert devices.spread(CONFIG, Memory(*needed), 1, 8, room=10_000).sharding == sharding


def test_groups():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert devices.groups([], 1, None, cpu) == [Group(1, NETWORK)]
    assert devices.groups([8, 64, 8], 1, 5e10, cuda) == [Group(8, NETWORK._replace(bytes_per_second=5e10)),
                                                      Group(64, NETWORK._replace(bytes_per_second=5e10))]
    assert devices.groups([], 2, None, cpu) == [Group(2, HERE, here=True)]
    assert devices.groups([2], 1, None, cpu) == [Group(2, NETWORK)]


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.groups([], 2, None, torch.device("cuda")) == [Group(2, NETWORK)]
    with pytest.raises(UsageError, match="4 processes on 2 GPUs"):
        devices.groups([], 4, None, torch.device("cuda"))


def test_what_is_taken_for_granted():
    assert devices.assumptions([Group()], "cpu") == []
    first, second = devices.assumptions([Group(8), Group(512)], "an H100, bfloat16")
    assert first.startswith("8, 512 devices: each like this one (an H100, bfloat16)")
    assert "25 GB/s each way and 20 µs" in first and "2 (N − 1)/N · 4 bytes a parameter" in second
    here = devices.assumptions([Group(2, HERE, True)], "cpu, 1 threads")
    assert here[0].startswith("2 processes on this machine (each: cpu, 1 threads, an equal part of the memory)")


@pytest.fixture
def planner(tmp_path, monkeypatch):
    """A Planner whose device takes 1 ms a token, 2 where it has one row, and 0.1 s an update."""
    file = tmp_path / "story.txt"
    file.write_text("".join(f"The baker of number {i} went home and slept.\n" for i in range(2000)))
    recipe = resolve("tiny", (), {"steps": 10})
    made = Planner(planning.read((str(file),), (), Layout(), None, recipe, lambda text: None), place("cpu", "float32"))
    made.process = 10**8
    monkeypatch.setattr(made, "_measured", lambda probe, vocabulary, seconds: Speed(
        0.002 if probe.train.batch_tokens == probe.train.context else 0.001, 0.1, 1e-5))
    return made


SMALL = ("model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "train.context=16",
         "train.batch_tokens=64", "tokenizer.vocab_size=300")


def test_a_group_of_one_is_the_plain_plan(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    plain = planner.plan("tiny", recipe)
    assert plain == planner.plan("tiny", recipe, Group(1, Link(1.0, 1.0)))
    assert plain == planner.plan("tiny", recipe, Group(1, HERE, True))
    assert (plain.devices, plain.sharding, plain.interconnect, plain.speedup) == (1, "none", None, 1.0)


def test_several_devices_have_less_to_do_and_wait(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})  # 4 rows of 16 tokens a step
    one, two = planner.plan("tiny", recipe), planner.plan("tiny", recipe, Group(2, Link(1e6, 0.001)))
    waited = 4 * two.parameters / 1e6 + 8 * 0.001
    assert one.tokens_per_second == pytest.approx(64 / (0.064 + 0.1))
    assert two.tokens_per_second == pytest.approx(64 / (0.032 + 0.1 + waited))
    assert two.speedup == pytest.approx((0.064 + 0.1) / (0.032 + 0.1 + waited))
    assert two.seconds_communicating == pytest.approx(10 * waited)
    # what is not a step takes as long, but the others read the text after the first
    assert two.seconds - one.seconds == pytest.approx(10 * (waited - 0.032) + planner.text.seconds)
    assert (two.tokens, two.steps, two.epochs, two.bits_per_byte) == (one.tokens, one.steps, one.epochs, one.bits_per_byte)
    assert (two.micro_batch_tokens, two.idle_devices, two.sharding) == (32, 0, "data parallel")
    assert two.activations < one.activations and two.memory < one.memory


def test_in_the_same_time_several_read_more(planner):
    recipe = resolve("tiny", (*SMALL, "train.batch_tokens=2048"), {"time": 60.0})
    plans = [planner.plan("tiny", recipe, Group(count)) for count in (1, 2, 8, 64)]
    assert [plan.tokens for plan in plans] == sorted({plan.tokens for plan in plans})
    assert {plan.seconds for plan in plans} == {60.0}


def test_idle_devices_are_told(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    few, many = (planner.plan("tiny", recipe, Group(count)) for count in (4, 64))
    assert (few.idle_devices, many.idle_devices) == (0, 60)
    said = [advice.advise([plan])[0][0].advice for plan in (few, many)]
    assert said[0] == ("4 devices are only 1.2 × as fast as one: each computes too little beside what it sends and updates; "
                       "raise train.batch_tokens")
    parted = dataclasses.replace(few, sharding="sharded", micro_batch_tokens=8)  # sends for each micro-batch
    assert advice.advise([parted])[0][0].advice.endswith("raise train.micro_batch_tokens")
    assert said[1] == "64 devices share 4 rows a step: 60 of them idle; raise train.batch_tokens"


def test_processes_here_share_the_memory_and_are_not_compared(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    one, two = planner.plan("tiny", recipe), planner.plan("tiny", recipe, Group(2, HERE, True))
    assert two.machine_memory == one.machine_memory // 2 and two.speedup is None and two.interconnect == 6e8


@pytest.mark.parametrize("others, at_work", [(1, True), (10**6, False)])  # so many would not have memory
def test_company_is_at_work_while_a_process_is_measured(planner, others, at_work):
    recipe, told = resolve("tiny", (*SMALL, "model.vocab_size=300"), {"steps": 1}), []
    recipe = dataclasses.replace(recipe, model=recipe.model.complete())
    planner.company = SimpleNamespace(size=others, working=lambda recipe: nullcontext(told.append(recipe)))
    with planner._beside(recipe, 64):
        assert told == [recipe] * at_work


def test_a_model_too_large_for_a_device_is_sharded(planner, monkeypatch):
    monkeypatch.setattr(planning, "machine_memory", lambda device: 13 * 10**8)
    recipe = resolve("base", ("train.batch_tokens=8192", "tokenizer.vocab_size=300"), {"steps": 10})
    one, eight = planner.plan("base", recipe), planner.plan("base", recipe, Group(8))
    assert not one.fits and eight.fits and eight.sharding == "sharded"
    assert eight.memory == eight.process + eight.weights + eight.gradients + eight.optimizer + eight.activations
    plans, _ = advice.advise([dataclasses.replace(one, devices=8)])
    assert plans[0].advice.startswith(f"needs {one.memory / 1e9:.1f} GB of memory on each device, 1.3 GB are there")
