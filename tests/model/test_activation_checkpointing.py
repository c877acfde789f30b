"""Activation checkpointing: the same values and gradients, with less kept for backward."""

import subprocess
import sys
import weakref

import pytest
import torch

from lmcli.kernels.fast_path import FastBlock
from lmcli.model.activation_checkpointing import set_activation_checkpointing
from lmcli.model.attention import EncoderOutput

SHAPES = {
    "decoder": {},
    "decoder with plain operations": {"hidden_act": "gelu", "gated_mlp": False},
    "decoder with a window": {
        "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    "encoder": {
        "shape": "encoder",
        "query_key_norm": False,
        "norm": "layer",
        "num_key_value_heads": 4,
    },
    "encoder-decoder": {
        "shape": "encoder-decoder",
        "positions": "relative",
        "query_key_norm": False,
        "num_key_value_heads": 4,
    },
}


def loss(model):
    """A number that depends on every hidden state, with padding and encoder output if possible."""
    ids = torch.randint(401, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:] = False
    if model.config.shape == "encoder-decoder":
        hidden = model.hidden(ids[:, :7], encoder_output=model.encode(ids, mask))
    else:
        hidden = model.hidden(ids, mask if model.config.shape == "encoder" else None)
    return model.head(hidden).float().logsumexp(-1).square().mean()


def gradients(model, checkpointing: bool, seed: int = 5) -> tuple[float, dict]:
    set_activation_checkpointing(model, checkpointing)
    model.zero_grad()
    torch.manual_seed(seed)
    result = loss(model)
    result.backward()
    return result.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients_are_the_same(small_model, options, dropout, dtype):
    model = small_model(**options).to(dtype).train()
    model.set_training_dtype(dtype)
    model.set_dropout(dropout)
    plain, expected = gradients(model, checkpointing=False)
    again, result = gradients(model, checkpointing=True)
    assert again == plain
    for name, gradient in expected.items():
        assert gradient is not None and gradient.any(), name
        # a source's gradients from several blocks are added in another order
        added = model.config.shape == "encoder-decoder"
        torch.testing.assert_close(
            result[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item() * added
        )
    assert dropout == 0 or gradients(model, True, seed=6)[0] != plain


def test_random_numbers_afterwards_are_the_same(small_model):
    model = small_model().train()
    model.set_dropout(0.3)
    drawn = []
    for checkpointing in (False, True):
        gradients(model, checkpointing)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_bfloat16_activations_are_computed_again_in_bfloat16(small_model):
    model = small_model().train()
    model.set_training_dtype(torch.bfloat16)
    plain, expected = gradients(model, checkpointing=False)
    again, result = gradients(model, checkpointing=True)
    assert again == plain
    assert all(torch.equal(result[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_blocks_keep_only_their_inputs(small_model, options):
    model = small_model(**options).train()
    counts = []
    for checkpointing in (False, True):
        set_activation_checkpointing(model, checkpointing)
        packed = []

        def pack(x, packed=packed):
            y = x.detach()  # a tensor of its own, alive as long as the graph keeps it
            packed.append(weakref.ref(y))
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            result = loss(model)
        counts.append(sum(reference() is not None for reference in packed))
        assert result.requires_grad
    assert counts[1] < counts[0] / 2  # embedding, last norm and head keep the rest


def test_each_block_runs_twice_in_training_and_once_without_gradients(small_model, monkeypatch):
    model, ran, forward = small_model().train(), [], FastBlock.forward
    monkeypatch.setattr(FastBlock, "forward", lambda *args: ran.append(1) or forward(*args))
    gradients(model, checkpointing=True)
    assert len(ran) == 2 * len(model.blocks())
    ran.clear()
    with torch.no_grad():
        loss(model)
    model.eval()
    loss(model)
    assert len(ran) == 2 * len(model.blocks())


def test_encoder_output_gets_its_gradient_through_the_decoder(small_model):
    model = small_model(**SHAPES["encoder-decoder"]).train()
    result = []
    for checkpointing in (False, True):
        set_activation_checkpointing(model, checkpointing)
        states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.hidden(
            torch.arange(8).view(2, 4), encoder_output=EncoderOutput(states)
        ).square().sum().backward()
        result.append(states.grad)
    assert result[0].any()
    torch.testing.assert_close(*result)


def test_nothing_is_imported_when_memory_is_short():
    script = """if True:
        import sys, torch
        from lmcli.model.activation_checkpointing import checkpointed
        layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
        before = set(sys.modules)
        checkpointed(layer, layer, x).sum().backward()
        assert x.grad.any() and layer.weight.grad.any()
        print(sorted(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done
