"""Schedules, optimizers and states: the arithmetic of a step and of resuming."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data.batches import Batch, ExampleRows
from lmcli.kernels.fast_path import build_model
from lmcli.model.transformer import Transformer
from lmcli.runs.initial_model import set_trainable
from lmcli.training import optimizers, resume_state, schedules, train_step
from lmcli.training.objectives import OBJECTIVES

SHARES = st.floats(0, 1)
TINY = ModelConfig(
    vocab_size=40,
    max_position_embeddings=16,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
).complete()


@given(SHARES, st.floats(0, 0.9), st.sampled_from(["linear", "cosine", "constant"]))
def test_factors_lie_between_0_and_1_and_end_at_0(share, warmup, schedule):
    assert 0 <= schedules.factor(schedule, share, warmup) <= 1
    assert schedules.factor(schedule, warmup, warmup) == 1
    assert abs(schedules.factor(schedule, 1.0, warmup) - (schedule == "constant")) < 1e-9


@given(st.lists(SHARES, min_size=2, max_size=20).map(sorted), st.floats(0, 0.5))
def test_rates_fall_after_warmup(shares, warmup):
    after = [schedules.factor("cosine", share, warmup) for share in shares if share >= warmup]
    assert after == sorted(after, reverse=True)


def test_the_first_budget_reached_ends_a_run():
    used = schedules.Progress(steps=50, tokens=900, epochs=0.1, seconds=30.0)
    assert used.share(TrainConfig(steps=100)) == 0.5
    assert used.share(TrainConfig(steps=100, tokens=1000)) == 0.9
    assert used.share(TrainConfig(epochs=0.05)) == 1.0
    assert used.share(TrainConfig(time=60)) == 0.5
    assert used.share(TrainConfig(time=60), seconds_before=10, seconds_after=10) == 0.5
    assert used.share(TrainConfig(time=60), seconds_before=10, seconds_after=55) == 1.0


def packed(rows: torch.Tensor) -> Batch:
    return Batch(rows[:, :-1].numpy(), rows[:, 1:].numpy())


def model(**options) -> Transformer:
    trained = build_model(replace(TINY, **options))
    trained.initialize(0)
    return trained


def test_every_parameter_is_in_exactly_one_group():
    for rule in ("adamw", "muon"):
        trained = model()
        optimizer_ = optimizers.build(trained, TrainConfig(optimizer=rule))
        grouped = [id(p) for group in optimizer_.groups for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in trained.parameters())
        decayed = {
            id(p) for group in optimizer_.groups if group.weight_decay for p in group.parameters
        }
        assert decayed == {
            id(p)
            for name, p in trained.named_parameters()
            if p.ndim == 2 and name != "embedding.weight"
        }


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"shape": "encoder", "head": "sequence", "labels": ("a", "b")},
        {"shape": "encoder-decoder", "num_encoder_layers": 3},
    ],
    ids=str,
)
def test_rates_fall_with_depth(rule, options):
    trained = model(**options)
    blocks = [
        f"{stack}.layers.{i}."
        for stack in ("encoder", "decoder")
        if getattr(trained, stack) is not None
        for i in range(len(getattr(trained, stack).layers))
    ]
    optimizer_ = optimizers.build(
        trained,
        TrainConfig(optimizer=rule, learning_rate=1.0, matrix_learning_rate=2.0, layer_decay=0.5),
    )
    rates = {id(p): group.peak_rate for group in optimizer_.groups for p in group.parameters}
    for name, parameter in trained.named_parameters():
        full = 2.0 if rule == "muon" and parameter.ndim == 2 and ".layers." in name else 1.0
        if name.startswith("head.") or name == f"{blocks[-1].partition('.')[0]}.norm.weight":
            depth = 0
        elif name == "encoder.norm.weight":  # of two stacks
            depth = len(trained.decoder.layers)
        else:
            depth = next(
                (len(blocks) - i for i, block in enumerate(blocks) if name.startswith(block)),
                len(blocks) + 1,
            )
        assert rates.pop(id(parameter)) == full * 0.5**depth, name
    assert not rates


def test_frozen_weights_are_in_no_group_and_adamw_trains_lora():
    trained = model()
    set_trainable(trained, TrainConfig(lora_rank=3, frozen_layers=1))
    optimizer_ = optimizers.build(
        trained, TrainConfig(optimizer="muon", learning_rate=0.5, matrix_learning_rate=0.7)
    )
    grouped = {
        id(p)
        for group in optimizer_.groups
        for p in group.parameters
        if group.peak_rate == 0.5 and not group.weight_decay
    }
    expected = {
        id(p) for name, p in trained.named_parameters() if name.endswith((".lora_a", ".lora_b"))
    }
    assert grouped == expected and len(expected) == 2 * 7
    assert sum(len(group.parameters) for group in optimizer_.groups) == len(expected)
    assert optimizer_.state_of(trained.embedding.weight) == {}


def test_adamw_trains_adapters_of_embedding_and_head_without_decay():
    trained = model(tie_word_embeddings=False)
    set_trainable(trained, TrainConfig(lora_rank=3, lora_targets=("embedding", "head")))
    (group,) = (
        group for group in optimizers.build(trained, TrainConfig()).groups if group.parameters
    )
    adapters = (trained.embedding, trained.head.output)
    assert group.weight_decay == 0.0 and {id(p) for p in group.parameters} == {
        id(p) for adapter in adapters for p in (adapter.lora_a, adapter.lora_b)
    }


@pytest.mark.parametrize("targets", [("all",), ("all", "embedding", "head")], ids=str)
def test_a_state_with_adapters_is_restored(targets, tmp_path):
    trained = [model(tie_word_embeddings=False) for _ in range(2)]
    optimizer = []
    for first_model in trained:
        set_trainable(first_model, TrainConfig(lora_rank=3, lora_targets=targets))
        optimizer.append(optimizers.build(first_model, TrainConfig()))
    batch = packed(torch.arange(34).view(2, 17) % 40)
    for _ in range(2):
        OBJECTIVES["causal"].loss(trained[0], batch).backward()
        optimizer[0].step()
        optimizer[0].zero_grad()
    resume_state.save(tmp_path, resume_state.Counters(step=2), trained[0], optimizer[0])
    assert resume_state.newest(tmp_path, print).restore(trained[1], optimizer[1]).step == 2
    for first_model, build in zip(trained, optimizer):
        OBJECTIVES["causal"].loss(first_model, batch).backward()
        build.step()
    for (name, first_model), other in zip(trained[0].named_parameters(), trained[1].parameters()):
        assert torch.equal(first_model, other), name


def test_one_adamw_step_equals_torch_written_out():
    trained = model()
    optimizer_ = optimizers.build(
        trained, TrainConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    )
    batch = packed(torch.arange(34).view(2, 17) % 40)
    (OBJECTIVES["causal"].loss(trained, batch) / batch.count).backward()
    weight = trained.get_parameter("decoder.layers.0.mlp.gate.weight")
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer_.set_factor(0.5)
    optimizer_.step()
    rate = 0.005
    # at the first step both bias corrections cancel: m̂ = g, v̂ = g²
    expected = before * (1 - rate * 0.1) - rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)


def test_the_causal_loss_is_cross_entropy():
    trained, rows = model(), torch.arange(34).view(2, 17) % 40
    loss = OBJECTIVES["causal"].loss(trained, packed(rows))
    expected = torch.nn.functional.cross_entropy(
        trained(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    assert packed(rows).count == packed(rows).tokens == 32


def stepped(trained, optimizer_, count: int) -> None:
    for _ in range(count):
        optimizer_.zero_grad()
        batch = packed(torch.randint(40, (2, 17)))
        (OBJECTIVES["causal"].loss(trained, batch) / batch.count).backward()
        optimizer_.step()


def test_a_restored_state_continues_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    first = model()
    optimizer_ = optimizers.build(first, TrainConfig())
    stepped(first, optimizer_, 3)
    resume_state.save(tmp_path, resume_state.Counters(step=3, rows=6), first, optimizer_)
    stepped(first, optimizer_, 3)

    second = build_model(TINY)
    again = optimizers.build(second, TrainConfig())
    torch.manual_seed(99)
    assert resume_state.newest(tmp_path, print).restore(second, again) == resume_state.Counters(
        step=3, rows=6
    )
    stepped(second, again, 3)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, second.get_parameter(name)), name


def test_two_states_are_kept_and_a_note_names_a_damaged_one(tmp_path):
    trained = model()
    optimizer_ = optimizers.build(trained, TrainConfig())
    for step in (1, 2, 3):
        stepped(trained, optimizer_, 1)
        resume_state.save(tmp_path, resume_state.Counters(step=step), trained, optimizer_)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]
    (tmp_path / "step-000000003" / "weights.safetensors").write_bytes(b"broken")
    notes = []
    assert resume_state.newest(tmp_path, notes.append).restore(trained, optimizer_).step == 2
    assert len(notes) == 1 and "step-000000003" in notes[0]


def test_adamw_is_that_of_torch_to_the_bit():
    ours, theirs = (
        [
            torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
            for i, shape in enumerate(((8, 12), (7,), (1, 3)))
        ]
        for _ in range(2)
    )
    optimizer_ = optimizers.AdamW(
        [
            optimizers.ParameterGroup(ours[:2], 0.01, 0.1),
            optimizers.ParameterGroup(ours[2:], 0.02, 0.0),
        ]
    )
    reference = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "lr": 0.02}],
        lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    for _ in range(3):
        for mine, its in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape)
            its.grad = mine.grad.clone()
        optimizer_.step()
        reference.step()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs))


def test_clipping_is_that_of_torch():
    for most in (0.0, 0.5, 100.0):
        ours, theirs = model(), model()
        for trained in (ours, theirs):
            (
                OBJECTIVES["causal"].loss(trained, packed(torch.arange(34).view(2, 17))) / 32
            ).backward()
        norm = optimizers.build(ours, TrainConfig()).clip(most)
        reference = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most or float("inf"))
        assert abs(norm - float(reference)) < 1e-6 * norm
        for mine, its in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(mine.grad, its.grad)


def test_muon_is_that_of_torch_except_for_orthogonalization(monkeypatch):
    from torch.optim import _muon

    monkeypatch.setattr(
        optimizers,
        "orthogonal",
        lambda matrices: torch.stack(
            [
                _muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
                for matrix in matrices
            ]
        ),
    )
    ours, theirs = (
        [
            torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
            for i, shape in enumerate(((8, 12), (12, 8), (8, 12), (16, 4)))
        ]
        for _ in range(2)
    )
    optimizer_, reference = (
        optimizers.Muon([optimizers.ParameterGroup(ours, 0.02, 0.1)]),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1),
    )
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        for mine, its in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        optimizer_.step()
        reference.step()
    for mine, its in zip(ours, theirs):
        assert (
            (mine - its).norm() / (0.06 * its.numel() ** 0.5)
        ).item() < 0.01  # bfloat16 products in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_computes_in_the_precision_of_the_forward_pass(monkeypatch, dtype):
    trained, seen, whole = model(), set(), optimizers.orthogonal

    def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
        seen.add(matrices.dtype)
        return whole(matrices)

    monkeypatch.setattr(optimizers, "orthogonal", orthogonal)
    trained.set_training_dtype(dtype)
    OBJECTIVES["causal"].loss(trained, packed(torch.arange(34).view(2, 17))).backward()
    optimizers.build(trained, TrainConfig(optimizer="muon")).step()
    assert seen == {dtype}


def test_orthogonal_updates_are_near_the_polar_factor():
    for shape in ((3, 24, 24), (1, 8, 40), (2, 192, 512)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        updates = optimizers.orthogonal(matrices.bfloat16()).float()
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        assert (updates - left @ right).norm() / (left @ right).norm() < 0.28
        # a square one has values near 0; bfloat16 adds to 1.28
        grown = torch.linalg.svdvals(updates)[values > 0.02 * values[:, :1]]
        assert grown.min() > 0.65 and grown.max() < 1.65


def test_a_gradient_of_zeros_updates_nothing():
    assert not optimizers.orthogonal(torch.zeros(2, 8, 12).bfloat16()).any()


@pytest.mark.parametrize(
    ("rows", "dtype", "times"),
    [(True, "bfloat16", 10), (True, "float32", 0), (False, "bfloat16", 0)],
)
def test_freed_memory_goes_back_in_a_200th_of_the_time(rows, dtype, times, monkeypatch):
    """400 steps of a second; to give memory back takes 0.2 s."""
    now, calls = [0.0], []
    monkeypatch.setattr(train_step.time, "monotonic", lambda: now[0])

    def trim():
        calls.append(now[0])
        now[0] += 0.2

    monkeypatch.setattr(train_step.device, "trim_memory", trim)
    examples = ExampleRows(np.ones(5), lambda chosen: None, 0) if rows else None
    config = SimpleNamespace(device=torch.device("cpu"), dtype=getattr(torch, dtype))
    step = SimpleNamespace(rows=examples, device_config=config, _next_trim=0.0)
    for _ in range(400):
        train_step.TrainStep._trim_memory(step)
        now[0] += 1
    assert len(calls) == times
