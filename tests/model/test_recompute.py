"""Activations that the backward pass calculates again: the same values and gradients, with less kept in between."""

import subprocess
import sys
import weakref

import pytest
import torch

from lmcli.model.attention import Memory
from lmcli.model.transformer import Block

SHAPES = {
    "decoder": {}, "decoder with plain operations": {"hidden_act": "gelu", "gated_mlp": False},
    "decoder with a window": {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention")},
    "encoder": {"shape": "encoder", "query_key_norm": False, "norm": "layer", "num_key_value_heads": 4},
    "encoder-decoder": {"shape": "encoder-decoder", "positions": "relative", "query_key_norm": False,
                        "num_key_value_heads": 4}}


def loss(model):
    """A number that hangs on every hidden state; padding and an encoder's output are in it where the shape has them."""
    ids = torch.randint(401, (3, 12), generator=torch.Generator().manual_seed(1))
    real = torch.ones(3, 12, dtype=torch.bool)
    real[1, 8:] = False
    if model.config.shape == "encoder-decoder":
        hidden = model.hidden(ids[:, :7], memory=model.encode(ids, real))
    else:
        hidden = model.hidden(ids, real if model.config.shape == "encoder" else None)
    return model.head(hidden).float().logsumexp(-1).square().mean()


def gradients(model, recompute: bool, seed: int = 5) -> tuple[float, dict]:
    model.set_recompute(recompute)
    model.zero_grad()
    torch.manual_seed(seed)
    found = loss(model)
    found.backward()
    return found.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients_are_the_same(small_model, options, dropout, dtype):
    model = small_model(**options).to(dtype).train()
    model.training_dtype = dtype
    model.set_dropout(dropout)
    plain, wanted = gradients(model, recompute=False)
    again, found = gradients(model, recompute=True)
    assert again == plain
    for name, gradient in wanted.items():
        assert gradient is not None and gradient.any(), name
        # a source's gradients from several blocks are added in another order
        several = model.config.shape == "encoder-decoder"
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item() * several)
    assert dropout == 0 or gradients(model, True, seed=6)[0] != plain


def test_what_follows_draws_the_same_random_numbers(small_model):
    model = small_model().train()
    model.set_dropout(0.3)
    drawn = []
    for recompute in (False, True):
        gradients(model, recompute)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_bfloat16_activations_are_calculated_again_in_bfloat16(small_model):
    model = small_model().train()
    model.training_dtype = torch.bfloat16
    plain, wanted = gradients(model, recompute=False)
    again, found = gradients(model, recompute=True)
    assert again == plain
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_blocks_keep_nothing_but_what_enters_them(small_model, options):
    model = small_model(**options).train()
    kept = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        packed = []

        def pack(x, packed=packed):
            y = x.detach()  # a tensor of its own, alive as long as the graph keeps it
            packed.append(weakref.ref(y))
            return y
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            found = loss(model)
        kept.append(sum(reference() is not None for reference in packed))
        assert found.requires_grad
    assert kept[1] < kept[0] / 2  # the rest is of embedding, last norm and head


def test_each_block_runs_twice_in_training_and_once_without_gradients(small_model, monkeypatch):
    model, ran, true = small_model().train(), [], Block._mixed
    monkeypatch.setattr(Block, "_mixed", lambda *arguments: ran.append(1) or true(*arguments))
    gradients(model, recompute=True)
    assert len(ran) == 2 * len(model.blocks())
    ran.clear()
    with torch.no_grad():
        loss(model)
    model.eval()
    loss(model)
    assert len(ran) == 2 * len(model.blocks())


def test_the_source_gets_its_gradient_through_the_blocks_that_read_it(small_model):
    model = small_model(**SHAPES["encoder-decoder"]).train()
    found = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.hidden(torch.arange(8).view(2, 4), memory=Memory(states)).square().sum().backward()
        found.append(states.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_nothing_is_imported_when_memory_is_short():
    script = """if True:
        import sys, torch
        from lmcli.model.recompute import recomputed
        layer, x, before = torch.nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True), set(sys.modules)
        recomputed(layer, layer, x).sum().backward()
        assert x.grad.any() and layer.weight.grad.any()
        print(sorted(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done
