"""Memory of training, by the configuration: beside the tensors that autograd really keeps, and the optimizers' states."""

import dataclasses

import pytest
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.model import cost, fused, head_loss, kernels, likelihood, memory
from lmcli.model.adapters import Lora, put_on
from lmcli.model.transformer import Transformer
from lmcli.recipes import preset_names, resolve
from lmcli.training import optimizers

SIZES = {"vocab_size": 512, "max_position_embeddings": 256, "hidden_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 4}
needs_kernels = pytest.mark.skipif(bool(kernels.problem()), reason="no compiled kernels here")


def config(**options) -> ModelConfig:
    return ModelConfig(**{**SIZES, **options}).complete()


def kept(known: ModelConfig, rows: int, context: int, dtype: torch.dtype, dropout: float = 0.0) -> int:
    """Bytes that the forward pass of a training step keeps for the backward pass, parameters aside."""
    torch.manual_seed(0)
    model = Transformer(known, dropout).train()
    model.initialize(0)
    model.training_dtype = dtype
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(known.vocab_size, (rows, context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = likelihood.summed_loss(model.hidden(ids).flatten(0, 1), model.head, ids.flatten())
    assert loss.requires_grad
    return sum(found.values())


def formula(known: ModelConfig, tokens: int, context: int, dtype: str, dropout: float = 0.0, **options) -> int:
    return memory.training_memory(known, TrainConfig(context=context, dropout=dropout), tokens, dtype, **options).activations


@needs_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options, context, dropout", [
    ({}, 128, 0.0), ({}, 256, 0.0), ({}, 128, 0.1), ({"max_position_embeddings": 1024}, 1024, 0.0),
    ({"num_key_value_heads": 2}, 128, 0.0), ({"head_dim": 32, "intermediate_size": 96}, 64, 0.0),
    ({"num_hidden_layers": 8, "tie_word_embeddings": False}, 128, 0.0)])
def test_activations_are_what_autograd_keeps(options, context, dropout, dtype):
    known, rows = config(**options), 4096 // context
    train = TrainConfig(context=context, dropout=dropout)
    found = memory.kept_for_backward(known, train, 4096, dtype)
    assert found == pytest.approx(kept(known, rows, context, getattr(torch, dtype), dropout), rel=0.02)
    assert found < formula(known, 4096, context, dtype, dropout)


@pytest.mark.parametrize("options", [{}, {"query_key_norm": False, "num_key_value_heads": 2},
                                     {"norm": "layer", "gated_mlp": False, "hidden_act": "gelu", "positions": "learned"}])
def test_without_kernels_they_are_close(options, monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    known, train = config(**options), TrainConfig(context=256)
    found = memory.kept_for_backward(known, train, 4096, "float32", fused=False)
    assert found == pytest.approx(kept(known, 16, 256, torch.float32), rel=0.3)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_states_are_those_of_the_optimizers(name, optimizer):
    recipe = resolve(name)
    known = dataclasses.replace(recipe.model, vocab_size=recipe.tokenizer.vocab_size, hidden_size=48, num_attention_heads=4,
                                max_position_embeddings=recipe.train.context).complete()
    train = dataclasses.replace(recipe.train, optimizer=optimizer, averaging=0.5 if optimizer == "muon" else 0.0)
    model = Transformer(known)
    made = optimizers.build(model, train)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    made.step()
    if train.averaging:
        made.average(1)
    states = sum(value.numel() * value.element_size() for weight in model.parameters()
                 for value in made.state_of(weight).values() if value.ndim)
    found = memory.training_memory(known, train, 1024)
    assert found.optimizer == pytest.approx(states, rel=0.01)  # relative positions have a table inside a block's stack
    assert found.weights == found.gradients == 4 * cost.parameters(known).total


def test_kept_weights_by_hand():
    assert memory.kept_weights(128) == 128
    assert memory.kept_weights(256) == (128 * 128 + 128 * 256) // 256 == 192
    assert memory.kept_weights(1024) == 0  # made again in the backward pass


def test_the_numbers_are_those_of_the_functions_they_describe():
    assert memory.QUERIES_AT_ONCE == fused.QUERIES_AT_ONCE and memory.KEPT_WEIGHTS == fused.KEPT_WEIGHTS
    assert memory.LOGIT_ROWS_AT_ONCE == head_loss.ROWS_AT_ONCE
    assert (memory.LOGITS_AT_ONCE, memory.FEWEST_ROWS) == (head_loss.LOGITS_AT_ONCE, head_loss.FEWEST_ROWS)


def test_smaller_micro_batches_and_recomputation_need_less():
    known = config(num_hidden_layers=8)
    whole, half = (formula(known, tokens, 256, "bfloat16") for tokens in (8192, 4096))
    assert half < whole < 2 * half
    assert formula(known, 8192, 256, "bfloat16", recompute=True) < 0.5 * whole
    assert formula(known, 8192, 256, "float32") > 1.5 * whole
    total = memory.training_memory(known, TrainConfig(), 8192)
    assert total.total == total.weights + total.gradients + total.optimizer + max(total.activations, total.update)


@pytest.mark.parametrize("targets", [("all",), ("all", "embedding", "head")], ids=str)
def test_with_lora_only_its_matrices_have_gradients_and_moments(targets):
    known, train = config(tie_word_embeddings=False), TrainConfig(lora_rank=3, lora_targets=targets)
    model = Transformer(known)
    put_on(model, Lora(3, 6.0, targets=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = memory.training_memory(known, train, 1024)
    assert (found.weights, found.gradients, found.optimizer, found.update) == (
        4 * sum(p.numel() for p in model.parameters()), 4 * trained, 8 * trained, 0)
