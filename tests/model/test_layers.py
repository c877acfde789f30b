"""Layers compared with transformers' modules, and the sizes that a configuration derives."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from lmcli.config import ModelConfig
from lmcli.errors import UsageError
from lmcli.model.layers import MLP, RMSNorm, rotary_embedding, rotate


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_transformers(scale, eps, difference, randomize):
    ours, theirs = randomize(RMSNorm(48, eps)), randomize(LlamaRMSNorm(48, eps))
    x = scale * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    assert difference(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [6, 16])
def test_rotary_positions_equal_transformers(theta, head_dim, difference):
    config = Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.tensor([[0, 1, 2, 30, 500], [7, 8, 9, 10, 11]])
    query = torch.randn(2, 4, 5, head_dim, generator=torch.Generator().manual_seed(1))
    cos, sin = Qwen3RotaryEmbedding(config)(query, positions)
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    assert (
        difference(
            rotate(query, *rotary_embedding(positions, ModelConfig(head_dim=head_dim), theta)),
            expected,
        )
        < 1e-5
    )


def test_rotary_embedding_keeps_lengths_and_depends_on_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def rotated(x, at):
        return rotate(x, *rotary_embedding(torch.tensor([[at]]), ModelConfig(head_dim=8), 10_000.0))

    assert rotated(query, 9).norm().item() == pytest.approx(query.norm().item(), rel=1e-6)
    near, far = (rotated(query, at + 3) * rotated(key, at) for at in (0, 40))
    assert near.sum().item() == pytest.approx(far.sum().item(), rel=1e-4)
    assert near.sum().item() != pytest.approx((query * key).sum().item(), rel=1e-2)


def test_gated_mlp_equals_transformers(difference, randomize):
    ours = randomize(
        MLP(ModelConfig(vocab_size=2, hidden_size=24, intermediate_size=40).complete(), 40)
    )
    theirs = randomize(Qwen3MLP(Qwen3Config(hidden_size=24, intermediate_size=40)))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    assert difference(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize(
    ("options", "derived"),
    [
        (
            {"hidden_size": 256, "num_attention_heads": 4},
            {"intermediate_size": 704, "num_key_value_heads": 4, "head_dim": 64},
        ),
        (
            {"hidden_size": 96, "num_attention_heads": 6},
            {"intermediate_size": 256, "num_key_value_heads": 6, "head_dim": 16},
        ),
        (
            {
                "hidden_size": 64,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "intermediate_size": 172,
            },
            {"intermediate_size": 172, "num_key_value_heads": 4, "head_dim": 8},
        ),
        # a head width of its own need not divide the hidden size
        (
            {"hidden_size": 50, "num_attention_heads": 4, "head_dim": 6},
            {"intermediate_size": 160, "head_dim": 6},
        ),
    ],
)
def test_missing_sizes_are_derived(options, derived):
    config = ModelConfig(**options).complete()
    assert {key: getattr(config, key) for key in derived} == derived
    assert config.complete() == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size": 50, "num_attention_heads": 4},
            "num_attention_heads 4 does not divide hidden_size 50",
        ),
        (
            {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads 3 does not divide",
        ),
        ({"hidden_size": 36, "num_attention_heads": 4}, "head_dim 9 is odd"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig(**options).complete()
