"""Training memory from the configuration, compared with autograd's tensors and optimizer states."""

import dataclasses

import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.kernels import build, calls
from lmcli.kernels.fast_path import build_model
from lmcli.model import flops, likelihood, memory
from lmcli.model.lora import Lora, put_on
from lmcli.model.transformer import Transformer
from lmcli.recipes import preset_names, resolve
from lmcli.training import optimizers

SIZES = {
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
needs_kernels = pytest.mark.skipif(bool(build.problem()), reason="no compiled kernels here")


def config(**options) -> ModelConfig:
    return ModelConfig(**{**SIZES, **options}).complete()


def bytes_kept(
    model_config: ModelConfig, rows: int, context: int, dtype: torch.dtype, dropout: float = 0.0
) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters."""
    torch.manual_seed(0)
    model = build_model(model_config, dropout).train()
    model.initialize(0)
    model.set_training_dtype(dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    estimate = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            estimate[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(model_config.vocab_size, (rows, context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = likelihood.summed_loss(model.hidden(ids).flatten(0, 1), model.head, ids.flatten())
    assert loss.requires_grad
    return sum(estimate.values())


def formula(
    model_config: ModelConfig,
    tokens: int,
    context: int,
    dtype: str,
    dropout: float = 0.0,
    **options,
) -> int:
    return memory.training_memory(
        model_config, TrainConfig(context=context, dropout=dropout), tokens, dtype, **options
    ).activations


@needs_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "options, context, dropout",
    [
        ({}, 128, 0.0),
        ({}, 256, 0.0),
        ({}, 128, 0.1),
        ({"max_position_embeddings": 1024}, 1024, 0.0),
        ({"num_key_value_heads": 2}, 128, 0.0),
        ({"head_dim": 32, "intermediate_size": 96}, 64, 0.0),
        ({"num_hidden_layers": 8, "tie_word_embeddings": False}, 128, 0.0),
    ],
)
def test_activations_equal_what_autograd_keeps(options, context, dropout, dtype):
    model_config, rows = config(**options), 4096 // context
    train = TrainConfig(context=context, dropout=dropout)
    estimate = memory.MicroBatch(model_config, train, 4096, memory.SIZES[dtype]).kept()
    assert estimate == pytest.approx(
        bytes_kept(model_config, rows, context, getattr(torch, dtype), dropout), rel=0.02
    )
    assert estimate < formula(model_config, 4096, context, dtype, dropout)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_key_norm": False, "num_key_value_heads": 2},
        {"norm": "layer", "gated_mlp": False, "hidden_act": "gelu", "positions": "learned"},
    ],
)
def test_activations_without_kernels_are_close(options, monkeypatch):
    monkeypatch.setattr(calls, "usable", lambda x: False)
    model_config, train = config(**options), TrainConfig(context=256)
    estimate = memory.MicroBatch(model_config, train, 4096, 4, kernels=False).kept()
    assert estimate == pytest.approx(bytes_kept(model_config, 16, 256, torch.float32), rel=0.3)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_states_equal_those_of_the_optimizers(name, optimizer):
    recipe = resolve(name)
    model_config = dataclasses.replace(
        recipe.model,
        vocab_size=recipe.tokenizer.vocab_size,
        hidden_size=48,
        num_attention_heads=4,
        max_position_embeddings=recipe.train.context,
    ).complete()
    train = dataclasses.replace(
        recipe.train, optimizer=optimizer, averaging=0.5 if optimizer == "muon" else 0.0
    )
    model = Transformer(model_config)
    optimizer_ = optimizers.build(model, train)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer_.step()
    if train.averaging:
        optimizer_.average(1)
    states = sum(
        value.numel() * value.element_size()
        for weight in model.parameters()
        for value in optimizer_.state_of(weight).values()
        if value.ndim
    )
    estimate = memory.training_memory(model_config, train, 1024)
    assert estimate.optimizer == pytest.approx(
        states, rel=0.01
    )  # relative positions have a table inside a block's stack
    assert estimate.weights == estimate.gradients == 4 * flops.parameters(model_config).total


def test_kept_weights_by_hand():
    assert memory.kept_weights(128) == 128
    assert memory.kept_weights(256) == (128 * 128 + 128 * 256) // 256 == 192
    assert memory.kept_weights(1024) == 0  # computed again in the backward pass


def test_smaller_micro_batches_and_checkpointing_need_less():
    model_config = config(num_hidden_layers=8)
    whole, half = (formula(model_config, tokens, 256, "bfloat16") for tokens in (8192, 4096))
    assert half < whole < 2 * half
    assert formula(model_config, 8192, 256, "bfloat16", checkpointing=True) < 0.5 * whole
    assert formula(model_config, 8192, 256, "float32") > 1.5 * whole
    total = memory.training_memory(model_config, TrainConfig(), 8192)
    assert total.total == total.weights + total.gradients + total.optimizer + max(
        total.activations, total.update
    )


@pytest.mark.parametrize("targets", [("all",), ("all", "embedding", "head")], ids=str)
def test_with_lora_only_its_matrices_have_gradients_and_moments(targets):
    model_config, train = (
        config(tie_word_embeddings=False),
        TrainConfig(lora_rank=3, lora_targets=targets),
    )
    model = Transformer(model_config)
    put_on(model, Lora(3, 6.0, targets=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimate = memory.training_memory(model_config, train, 1024)
    assert (estimate.weights, estimate.gradients, estimate.optimizer, estimate.update) == (
        4 * sum(p.numel() for p in model.parameters()),
        4 * trained,
        8 * trained,
        0,
    )
