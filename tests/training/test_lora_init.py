"""LoRA-GA initialization against the singular vectors of the full gradient."""

import numpy as np
import pytest
import torch
from tiny_runs import make_step

from lmcli.config import ModelConfig
from lmcli.data.batches import PackedRows
from lmcli.kernels.fast_path import build_model
from lmcli.model.lora import Lora, LoraEmbedding, adapters_of, put_on
from lmcli.model.transformer import Transformer
from lmcli.training import lora_init
from lmcli.training.train_step import TrainStep

RANK = 2
TINY = ModelConfig(
    vocab_size=40,
    max_position_embeddings=16,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
).complete()
TOGETHER = [tuple(f"decoder.layers.0.attention.{name}" for name in ("query", "key", "value"))]


def trained_model() -> Transformer:
    """A model in which gradients reach every matrix, as after some training."""
    model = build_model(TINY)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def step_of(model: Transformer) -> TrainStep:
    rows = PackedRows(np.random.default_rng(0).integers(40, size=400).astype(np.uint16), 8, 0, 0)
    return make_step(model, rows, batch_tokens=64, micro_batch_tokens=16, steps=1)


def share_kept(gradient: torch.Tensor, read: torch.Tensor, rank: int) -> float:
    """How much of the gradient (out, in), relative to the best matrix of that rank, rows span.

    Rows are (rank, in); random ones span about rank / in.
    """
    directions = torch.linalg.qr(read.double().T).Q
    best = torch.linalg.svdvals(gradient.double())[:rank].square().sum()
    return float((gradient.double() @ directions).square().sum() / best)


@pytest.mark.parametrize("rank", [RANK, 16])
def test_factor_a_spans_the_largest_directions_of_the_first_gradient(rank):
    model = trained_model()
    full_step = step_of(model)
    gradient = {}
    for batch in full_step.rows.step(0, 64, 16):
        full_step.objective.loss(model, batch).backward()
    for name, weight in model.named_parameters():
        gradient[name.removesuffix(".weight")] = weight.grad.clone()
        weight.grad = None
    put_on(model, Lora(rank, 4.0, targets=("all", "embedding", "head")), TOGETHER)
    ids = torch.arange(12).view(1, 12)
    before = model.eval()(ids).detach()
    norms = {
        name: adapter.lora_a.norm() + adapter.lora_b.norm()
        for name, adapter in adapters_of(model).items()
    }
    step = step_of(model)
    assert list(lora_init.gradient_init(step)) == []
    assert torch.equal(model.eval()(ids), before)
    assert step.counters.rows == 0 and all(p.grad is None for p in model.parameters())
    joined = torch.cat([gradient[name] for name in TOGETHER[0]])
    for name, adapter in adapters_of(model).items():
        turned = isinstance(adapter, LoraEmbedding)
        read, zero = (
            (adapter.lora_b.T, adapter.lora_a) if turned else (adapter.lora_a, adapter.lora_b)
        )
        assert not zero.any()
        torch.testing.assert_close(read.norm() + zero.norm(), norms[name])
        assert (
            share_kept(joined if name in TOGETHER[0] else gradient[name], read.detach(), rank) > 0.7
        ), name


@pytest.mark.parametrize(
    "model, lora",
    [(trained_model(), Lora(17, 4.0)), (build_model(TINY), Lora(2, 4.0, targets=("query",)))],
    ids=["a rank that a matrix cannot have", "nothing reaches the matrix"],
)
def test_an_adapter_may_keep_its_random_weights(model, lora):
    model.initialize(0)
    put_on(model, lora)
    drawn = {
        name: adapter.lora_a.clone()
        for name, adapter in adapters_of(model).items()
        if adapter.in_features == 16
    }
    list(lora_init.gradient_init(step_of(model)))
    assert all(
        torch.equal(adapter.lora_a, drawn[name])
        for name, adapter in adapters_of(model).items()
        if name in drawn
    )
    assert not any(adapter.lora_b.any() for adapter in adapters_of(model).values())
