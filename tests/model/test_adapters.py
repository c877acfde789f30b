"""Adapters: nothing at first, the written-out sum after, gradients of finite differences, and no trace when taken off."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from lmcli.errors import UsageError
from lmcli.model import fused, kernels, likelihood
from lmcli.model.adapters import Lora, LoraEmbedding, LoraLinear, adapters_of, freeze_below, put_on, take_off
from lmcli.model.dropout import dropped
from lmcli.model.layers import Linear
from lmcli.model.transformer import Transformer

IDS = torch.arange(40).view(2, 20) % 37
GPT2 = {"norm": "layer", "gated_mlp": False, "mlp_bias": True, "attention_bias": "all", "positions": "learned",
        "query_key_norm": False, "hidden_act": "gelu_new"}
SHAPES = {"decoder": {}, "gpt2": GPT2, "encoder": {"shape": "encoder", "post_norm": True, **GPT2},
          "two stacks": {"shape": "encoder-decoder", "positions": "relative", "query_key_norm": False}}
OUTER = {"tie_word_embeddings": False}  # of a model whose embedding and head may have adapters
EVERYWHERE = Lora(3, 5.0, targets=("all", "embedding", "head"))
each_shape = pytest.mark.parametrize("shape", SHAPES)


def logits(model: Transformer) -> torch.Tensor:
    return model(IDS, decoder_input_ids=IDS if model.config.shape == "encoder-decoder" else None)


def read(model: Transformer) -> torch.Tensor:
    """Logits without a gradient: as a model is used."""
    with torch.no_grad():
        return logits(model.eval())


def adapted(model: Transformer, lora: Lora = Lora(3, 5.0), **options) -> Transformer:
    """With adapters that add something."""
    put_on(model, lora, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            zero = adapter.lora_a if isinstance(adapter, LoraEmbedding) else adapter.lora_b
            zero.copy_(torch.randn(zero.shape, generator=generator))
    return model


def written_out(model: Transformer, plain: Transformer) -> Transformer:
    """The plain one with the sums in place of its matrices."""
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            product = adapter.scale * adapter.lora_b @ adapter.lora_a
            plain.get_submodule(name).weight += product.T if isinstance(adapter, LoraEmbedding) else product
    return plain


@each_shape
def test_fresh_adapters_add_nothing_and_leave_no_trace(small_model, shape):
    model = small_model(**SHAPES[shape])
    names, before = [name for name, _ in model.named_parameters()], read(model)
    put_on(model, Lora(3, 5.0))
    assert torch.equal(read(model), before)
    torch.testing.assert_close(logits(model.train()).detach(), before, rtol=1e-3, atol=1e-4)
    take_off(model)
    assert torch.equal(read(model), before) and [name for name, _ in model.named_parameters()] == names


@each_shape
def test_they_add_the_product_written_out(small_model, shape):
    model = adapted(small_model(**SHAPES[shape]))
    plain = written_out(model, small_model(**SHAPES[shape]))
    wanted, found = read(plain), read(model)
    for others in (found, logits(model.train()).detach()):
        assert (others - wanted).norm() < 1e-5 * wanted.norm()
    take_off(model, merge=True)
    assert torch.equal(read(model), found) and not adapters_of(model)


@each_shape
def test_nothing_else_is_trained(small_model, shape):
    model = adapted(small_model(**SHAPES[shape]).train())
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".lora_a", ".lora_b")), name
    per_block = {"decoder": 7, "gpt2": 6, "encoder": 6, "two stacks": 7}[shape]
    count = 2 * per_block + (2 * 11 if shape == "two stacks" else 0)
    assert len(adapters_of(model)) == count and "head" not in " ".join(adapters_of(model))


@pytest.mark.parametrize("shape", ["decoder", "gpt2", "encoder"])
def test_embedding_and_head_as_well(small_model, shape):
    """Nothing at first, the sum written out after, no trace when taken off; the loss of training and that of reading."""
    options = {**SHAPES[shape], **OUTER}
    model, plain = small_model(**options), small_model(**options)
    names, before = [name for name, _ in model.named_parameters()], read(model)
    adapted(model, EVERYWHERE)
    assert {"embedding", "head.output"} < adapters_of(model).keys()
    wanted, found = read(written_out(model, plain)), read(model)
    for others in (found, logits(model.train()).detach()):
        assert (others - wanted).norm() < 1e-5 * wanted.norm()
    losses = F.cross_entropy(wanted.flatten(0, 1), IDS.flatten(), reduction="none")
    hidden = model.hidden(IDS).flatten(0, 1)
    torch.testing.assert_close(likelihood.summed_loss(hidden, model.head, IDS.flatten()), losses.sum())
    with torch.no_grad():
        torch.testing.assert_close(likelihood.target_losses(model.eval().hidden(IDS).flatten(0, 1), model.head,
                                                            IDS.flatten()), losses)
    take_off(model, merge=True)
    assert torch.equal(read(model), found) and [name for name, _ in model.named_parameters()] == names
    put_on(model, EVERYWHERE)
    assert torch.equal(read(model), found)
    take_off(model)
    assert torch.equal(read(model), found) and not torch.equal(found, before)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_heads_loss_has_the_gradients_of_plain_autograd(small_model, monkeypatch, dropout, biased, compiled):
    """In float64, with the product written out; no gradient of the whole matrix is made."""
    if compiled and kernels.problem():
        pytest.skip("no compiled kernels here")
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda x: False)
    model = adapted(small_model(head_bias=biased, **OUTER).double().train(), Lora(3, 5.0, dropout, ("head",)))
    output, hidden = model.head.output, torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    parts = [hidden, output.lora_a, output.lora_b]
    torch.manual_seed(4)
    loss = likelihood.summed_loss(hidden, model.head, IDS.flatten(), 0.1)
    found = torch.autograd.grad(2 * loss, parts)
    torch.manual_seed(4)
    dropped = F.dropout(hidden, dropout) if dropout else hidden
    made = F.linear(hidden, output.weight, output.bias) + 5 / 3 * dropped @ output.lora_a.T @ output.lora_b.T
    wanted = F.cross_entropy(made, IDS.flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(found, torch.autograd.grad(2 * wanted, parts)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("targets", [("embedding", "head"), ("embedding",), ("head",), EVERYWHERE.targets], ids=str)
def test_the_gradients_are_those_of_the_sum(small_model, targets):
    """Of the whole model in float64, its blocks trained or not, against the same matrices written out."""
    model = adapted(small_model(**OUTER).double().train(), Lora(3, 5.0, targets=targets))
    plain = written_out(model, small_model(**OUTER).double().train())
    for one in (model, plain):
        one.training_dtype = torch.float64
        likelihood.summed_loss(one.hidden(IDS).flatten(0, 1), one.head, IDS.flatten()).backward()
    assert adapters_of(model)
    for name, adapter in adapters_of(model).items():
        whole = plain.get_submodule(name).weight.grad * 5 / 3
        whole = whole.T if isinstance(adapter, LoraEmbedding) else whole
        torch.testing.assert_close(adapter.lora_a.grad, adapter.lora_b.T @ whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(adapter.lora_b.grad, whole @ adapter.lora_a.T, rtol=1e-9, atol=1e-9)
        assert adapter.weight.grad is None


def test_an_embedding_by_hand():
    base = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    adapter = LoraEmbedding(base, torch.nn.Parameter(torch.tensor([[10.0], [1.0]])), 0.5)
    assert not adapter.lora_a.any()
    adapter.lora_a.data = torch.tensor([[0.0, 2.0, 4.0]])  # the row of id 1 gets half of 2 · (10, 1)
    ids = torch.tensor([1, 0, 1])
    assert adapter.train()(ids).tolist() == adapter.eval()(ids).tolist() == [[10.0, 2.0], [1.0, 0.0], [10.0, 2.0]]


def test_a_linear_by_hand():
    base = Linear(2, 2)
    base.weight, base.bias = (torch.nn.Parameter(torch.tensor(x)) for x in ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.0]))
    adapter = LoraLinear(base, torch.nn.Parameter(torch.tensor([[1.0, 2.0]])), 0.5, 0.0)
    adapter.lora_b.data = torch.tensor([[10.0], [0.0]])
    x = torch.tensor([1.0, 1.0])  # A x = 3, B A x = (30, 0), half of it is added
    assert adapter.train()(x).tolist() == adapter.eval()(x).tolist() == [16.5, 1.0]


def test_gradients_are_those_of_finite_differences_and_dropout_is_seen():
    def run(x, a, b):
        torch.manual_seed(2)
        adapter = LoraLinear(base, torch.nn.Parameter(a), 0.7, 0.4).train()
        del adapter.lora_a, adapter.lora_b
        adapter.lora_a, adapter.lora_b = a, b
        return adapter(x)

    base = Linear(5, 4).double().requires_grad_(False)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (2, 5), (4, 2))]
    assert gradcheck(run, parts)
    torch.manual_seed(2)
    x, a, b = parts
    wanted = F.linear(x, base.weight, base.bias) + 0.7 * F.dropout(x, 0.4) @ a.T @ b.T
    torch.testing.assert_close(run(*parts), wanted)


@pytest.mark.skipif(bool(kernels.problem()), reason="no compiled kernels here")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [Lora(3, 5.0), Lora(2, 1.0, targets=("query", "up")), Lora(3, 5.0, 1e-12)], ids=str)
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_compiled_block_has_the_gradients_of_the_plain_one(small_model, lora, frozen, recompute, monkeypatch):
    """In float64, of whatever is trained: adapters in some matrices, or blocks above frozen ones."""
    found, called = [], []
    block = fused.block
    monkeypatch.setattr(fused, "block", lambda *given: called.append(1) or block(*given))
    for plain in (False, True):
        model = small_model(num_hidden_layers=3).double().train()
        model.training_dtype = torch.float64
        model.set_recompute(recompute)
        if frozen:
            freeze_below(model, frozen)
        adapted(model, lora)
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(fused, "active", lambda x: False)
            logits(model).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-9)
    assert called


@pytest.mark.skipif(bool(kernels.problem()), reason="no compiled kernels here")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [("all",), ("value", "down")], ids=str)
def test_the_compiled_block_drops_what_adapters_read_and_nothing_else(small_model, targets, recompute, monkeypatch):
    """In float64, against plain autograd with the same masks: one for query, key and value, one each for output, gate with
    up, down."""
    share, found = 0.4, []
    torch.manual_seed(3)
    seeds = dict(zip(("query", "output", "gate", "down"), torch.randint(1 << 31, (4,)).tolist()))
    seeds |= {"key": seeds["query"], "value": seeds["query"], "up": seeds["gate"]}

    def beside(self, x):
        mask = dropped(torch.ones_like(x).flatten(0, 1), share, self.seed).view(x.shape)
        return F.linear(x * mask, self.lora_a) * self.scale, self.lora_b

    for plain in (False, True):
        model = small_model(num_hidden_layers=1).double().train()
        model.training_dtype = torch.float64
        model.set_recompute(recompute)
        adapted(model, Lora(3, 5.0, share, targets))
        for name, adapter in adapters_of(model).items():
            adapter.seed = seeds[name.rpartition(".")[2]]
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(fused, "active", lambda x: False)
                patch.setattr(LoraLinear, "beside", beside)
            torch.manual_seed(3)
            made = logits(model)
            made.square().sum().backward()
        found.append((made, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert found[0][1].keys() == found[1][1].keys() and found[0][1]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-9, atol=1e-9)


def test_frozen_layers_leave_the_rest_its_gradients(small_model):
    whole, part = (small_model(num_hidden_layers=3, tie_word_embeddings=False).double().train() for _ in range(2))
    freeze_below(part, 2)
    for model in (whole, part):
        model.training_dtype = torch.float64
        logits(model).square().sum().backward()
    for (name, one), other in zip(whole.named_parameters(), part.parameters()):
        if name.startswith(("embedding", "decoder.layers.0.", "decoder.layers.1.")):
            assert other.grad is None
        else:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9)


def test_what_is_kept_together_shares_one_a(small_model):
    model = small_model(**GPT2)
    group = tuple(f"decoder.layers.0.attention.{part}" for part in ("query", "key", "value"))
    put_on(model, Lora(3, 5.0, targets=("query", "value", "output")), [group])
    first, second, third = (model.get_submodule(name) for name in group)
    assert first.lora_a is third.lora_a and first.lora_b is not third.lora_b and not isinstance(second, LoraLinear)
    assert first.lora_a is not model.get_submodule("decoder.layers.0.attention.output").lora_a


def test_a_seed_decides_how_they_begin(small_model):
    drawn = []
    for seed in (1, 1, 2):
        model = small_model()
        put_on(model, Lora(3, 5.0), seed=seed)
        drawn.append(model.get_submodule("decoder.layers.1.mlp.up").lora_a)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 32 ** -0.5


@pytest.mark.parametrize("lora, said", [
    (Lora(2, 1.0, targets=("query", "gate")), "no block of this model has a matrix 'gate'"),
    (Lora(2, 1.0, targets=()), "lora_targets names nothing")], ids=str)
def test_targets_that_are_not_there_are_refused(small_model, lora, said):
    with pytest.raises(UsageError, match=said):
        put_on(small_model(**GPT2), lora)


@pytest.mark.parametrize("options, target, said", [
    ({"tie_word_embeddings": True}, "head", "'head' cannot have an adapter: embedding and head of this model are one"),
    ({"tie_word_embeddings": True}, "embedding", "'embedding' cannot have an adapter: embedding and head of this model are"),
    ({**SHAPES["encoder"], "head": "sequence", "labels": ("a", "b")}, "head", "this model has no head over the vocabulary"),
    ({**SHAPES["two stacks"], **OUTER}, "embedding", "'embedding' cannot have an adapter: two stacks share it")], ids=str)
def test_embeddings_and_heads_that_can_have_none_are_refused(small_model, options, target, said):
    with pytest.raises(UsageError, match=said):
        put_on(small_model(**options), Lora(2, 1.0, targets=("all", target)))


def test_a_frozen_embedding_gets_none(small_model):
    model = small_model(**OUTER)
    freeze_below(model, 2)
    with pytest.raises(UsageError, match="leaves nothing that LoRA could train"):
        put_on(model, Lora(2, 1.0, targets=("embedding",)))
    put_on(model, EVERYWHERE)
    assert list(adapters_of(model)) == ["head.output"]


def test_blocks_that_are_not_there_are_refused(small_model):
    with pytest.raises(UsageError, match="frozen_layers 3 is more than the 2 blocks there are"):
        freeze_below(small_model(), 3)
    model = small_model()
    freeze_below(model, 2)
    with pytest.raises(UsageError, match="leaves nothing that LoRA could train"):
        put_on(model, Lora(2, 1.0))
