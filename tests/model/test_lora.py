"""LoRA: no effect at first, the explicit sum later, exact gradients, no trace when taken off."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from lmcli.errors import UsageError
from lmcli.kernels import build, calls, fused_block
from lmcli.kernels.dropout import dropped
from lmcli.model import likelihood
from lmcli.model.activation_checkpointing import set_activation_checkpointing
from lmcli.model.initialization import meta_device
from lmcli.model.layers import Linear
from lmcli.model.lora import Lora, LoraEmbedding, LoraLinear, adapters_of, freeze_below, put_on
from lmcli.model.transformer import Transformer

IDS = torch.arange(40).view(2, 20) % 37
GPT2 = {
    "norm": "layer",
    "gated_mlp": False,
    "mlp_bias": True,
    "attention_bias": "all",
    "positions": "learned",
    "query_key_norm": False,
    "hidden_act": "gelu_new",
}
SHAPES = {
    "decoder": {},
    "gpt2": GPT2,
    "encoder": {"shape": "encoder", "post_norm": True, **GPT2},
    "two stacks": {"shape": "encoder-decoder", "positions": "relative", "query_key_norm": False},
}
OUTER = {"tie_word_embeddings": False}  # embedding and head may have adapters
EVERYWHERE = Lora(3, 5.0, targets=("all", "embedding", "head"))
each_shape = pytest.mark.parametrize("shape", SHAPES)


def logits(model: Transformer) -> torch.Tensor:
    return model(IDS, decoder_input_ids=IDS if model.config.shape == "encoder-decoder" else None)


def read(model: Transformer) -> torch.Tensor:
    """Logits without a gradient, as in use."""
    with torch.no_grad():
        return logits(model.eval())


def adapted(model: Transformer, lora: Lora = Lora(3, 5.0), **options) -> Transformer:
    """The model with adapters that have an effect."""
    put_on(model, lora, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            zero = adapter.lora_a if isinstance(adapter, LoraEmbedding) else adapter.lora_b
            zero.copy_(torch.randn(zero.shape, generator=generator))
    return model


def explicit(model: Transformer, plain: Transformer) -> Transformer:
    """The plain model with the sums as its matrices."""
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            product = adapter.scale * adapter.lora_b @ adapter.lora_a
            plain.get_submodule(name).weight += (
                product.T if isinstance(adapter, LoraEmbedding) else product
            )
    return plain


def take_off(model, merge: bool = False) -> None:
    """Replaces all adapters by plain modules; `merge` adds the updates to their weights."""
    for name, adapter in adapters_of(model).items():
        plain: torch.nn.Embedding | Linear
        with meta_device():
            if isinstance(adapter, LoraEmbedding):
                plain = torch.nn.Embedding(*adapter.weight.shape)
            else:
                plain = Linear(adapter.in_features, adapter.out_features)
                plain.bias = adapter.bias
        plain.weight = torch.nn.Parameter(adapter.matrix.detach()) if merge else adapter.weight
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain.train(model.training))


@each_shape
def test_new_adapters_add_nothing_and_leave_no_trace(small_model, shape):
    model = small_model(**SHAPES[shape])
    names, before = [name for name, _ in model.named_parameters()], read(model)
    put_on(model, Lora(3, 5.0))
    assert torch.equal(read(model), before)
    torch.testing.assert_close(logits(model.train()).detach(), before, rtol=1e-3, atol=1e-4)
    take_off(model)
    assert (
        torch.equal(read(model), before) and [name for name, _ in model.named_parameters()] == names
    )


@each_shape
def test_adapters_add_the_explicit_product(small_model, shape):
    model = adapted(small_model(**SHAPES[shape]))
    plain = explicit(model, small_model(**SHAPES[shape]))
    expected, results = read(plain), read(model)
    for others in (results, logits(model.train()).detach()):
        assert (others - expected).norm() < 1e-5 * expected.norm()
    take_off(model, merge=True)
    assert torch.equal(read(model), results) and not adapters_of(model)


@each_shape
def test_only_adapters_are_trained(small_model, shape):
    model = adapted(small_model(**SHAPES[shape]).train())
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".lora_a", ".lora_b")), name
    per_block = {"decoder": 7, "gpt2": 6, "encoder": 6, "two stacks": 7}[shape]
    count = 2 * per_block + (2 * 11 if shape == "two stacks" else 0)
    assert len(adapters_of(model)) == count and "head" not in " ".join(adapters_of(model))


@pytest.mark.parametrize("shape", ["decoder", "gpt2", "encoder"])
def test_adapters_of_embedding_and_head(small_model, shape):
    """As above, and the losses in training and evaluation."""
    options = {**SHAPES[shape], **OUTER}
    model, plain = small_model(**options), small_model(**options)
    names, before = [name for name, _ in model.named_parameters()], read(model)
    adapted(model, EVERYWHERE)
    assert {"embedding", "head.output"} < adapters_of(model).keys()
    expected, results = read(explicit(model, plain)), read(model)
    for others in (results, logits(model.train()).detach()):
        assert (others - expected).norm() < 1e-5 * expected.norm()
    losses = F.cross_entropy(expected.flatten(0, 1), IDS.flatten(), reduction="none")
    hidden = model.hidden(IDS).flatten(0, 1)
    torch.testing.assert_close(
        likelihood.summed_loss(hidden, model.head, IDS.flatten()), losses.sum()
    )
    with torch.no_grad():
        torch.testing.assert_close(
            likelihood.target_losses(
                model.eval().hidden(IDS).flatten(0, 1), model.head, IDS.flatten()
            ),
            losses,
        )
    take_off(model, merge=True)
    assert (
        torch.equal(read(model), results)
        and [name for name, _ in model.named_parameters()] == names
    )
    put_on(model, EVERYWHERE)
    assert torch.equal(read(model), results)
    take_off(model)
    assert torch.equal(read(model), results) and not torch.equal(results, before)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_the_head_has_the_gradients_of_plain_autograd(
    small_model, monkeypatch, dropout, biased, compiled
):
    """In float64, compared with the explicit product."""
    if compiled and build.problem():
        pytest.skip("no compiled kernels here")
    if not compiled:
        monkeypatch.setattr(calls, "usable", lambda x: False)
    model = adapted(
        small_model(head_bias=biased, **OUTER).double().train(), Lora(3, 5.0, dropout, ("head",))
    )
    output, hidden = model.head.output, torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    parts = [hidden, output.lora_a, output.lora_b]
    torch.manual_seed(4)
    loss = likelihood.summed_loss(hidden, model.head, IDS.flatten(), 0.1)
    results = torch.autograd.grad(2 * loss, parts)
    torch.manual_seed(4)
    dropped = F.dropout(hidden, dropout) if dropout else hidden
    output_logits = (
        F.linear(hidden, output.weight, output.bias)
        + 5 / 3 * dropped @ output.lora_a.T @ output.lora_b.T
    )
    expected = F.cross_entropy(output_logits, IDS.flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for one, other in zip(results, torch.autograd.grad(2 * expected, parts)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "targets", [("embedding", "head"), ("embedding",), ("head",), EVERYWHERE.targets], ids=str
)
def test_gradients_follow_from_those_of_the_sum(small_model, targets):
    """In float64, with blocks trained or not, compared with the explicit matrices."""
    model = adapted(small_model(**OUTER).double().train(), Lora(3, 5.0, targets=targets))
    plain = explicit(model, small_model(**OUTER).double().train())
    for one in (model, plain):
        one.set_training_dtype(torch.float64)
        likelihood.summed_loss(one.hidden(IDS).flatten(0, 1), one.head, IDS.flatten()).backward()
    assert adapters_of(model)
    for name, adapter in adapters_of(model).items():
        whole = plain.get_submodule(name).weight.grad * 5 / 3
        whole = whole.T if isinstance(adapter, LoraEmbedding) else whole
        torch.testing.assert_close(
            adapter.lora_a.grad, adapter.lora_b.T @ whole, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            adapter.lora_b.grad, whole @ adapter.lora_a.T, rtol=1e-9, atol=1e-9
        )
        assert adapter.weight.grad is None


def test_an_embedding_by_hand():
    base = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    adapter = LoraEmbedding(base, torch.nn.Parameter(torch.tensor([[10.0], [1.0]])), 0.5)
    assert not adapter.lora_a.any()
    adapter.lora_a.data = torch.tensor(
        [[0.0, 2.0, 4.0]]
    )  # the row of id 1 gets half of 2 · (10, 1)
    ids = torch.tensor([1, 0, 1])
    assert (
        adapter.train()(ids).tolist()
        == adapter.eval()(ids).tolist()
        == [[10.0, 2.0], [1.0, 0.0], [10.0, 2.0]]
    )


def test_a_linear_by_hand():
    base = Linear(2, 2)
    base.weight, base.bias = (
        torch.nn.Parameter(torch.tensor(x)) for x in ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.0])
    )
    adapter = LoraLinear(base, torch.nn.Parameter(torch.tensor([[1.0, 2.0]])), 0.5, 0.0)
    adapter.lora_b.data = torch.tensor([[10.0], [0.0]])
    x = torch.tensor([1.0, 1.0])  # A x = 3, B A x = (30, 0), half of it is added
    assert adapter.train()(x).tolist() == adapter.eval()(x).tolist() == [16.5, 1.0]


def test_gradients_equal_finite_differences_with_dropout():
    def run(x, a, b):
        torch.manual_seed(2)
        adapter = LoraLinear(base, torch.nn.Parameter(a), 0.7, 0.4).train()
        del adapter.lora_a, adapter.lora_b
        adapter.lora_a, adapter.lora_b = a, b
        return adapter(x)

    base = Linear(5, 4).double().requires_grad_(False)
    parts = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (2, 5), (4, 2))
    ]
    assert gradcheck(run, parts)
    torch.manual_seed(2)
    x, a, b = parts
    expected = F.linear(x, base.weight, base.bias) + 0.7 * F.dropout(x, 0.4) @ a.T @ b.T
    torch.testing.assert_close(run(*parts), expected)


@pytest.mark.skipif(bool(build.problem()), reason="no compiled kernels here")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "lora", [Lora(3, 5.0), Lora(2, 1.0, targets=("query", "up")), Lora(3, 5.0, 1e-12)], ids=str
)
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_fused_block_has_the_gradients_of_the_plain_one(
    small_model, lora, frozen, checkpointing, monkeypatch
):
    """In float64, with adapters in some matrices, or blocks above frozen ones."""
    results, called = [], []
    block = fused_block.block
    monkeypatch.setattr(fused_block, "block", lambda *args: called.append(1) or block(*args))
    for plain in (False, True):
        model = small_model(num_hidden_layers=3).double().train()
        model.set_training_dtype(torch.float64)
        set_activation_checkpointing(model, checkpointing)
        if frozen:
            freeze_below(model, frozen)
        adapted(model, lora)
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(fused_block, "active", lambda x: False)
            logits(model).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys() and results[0]
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-9)
    assert called


@pytest.mark.skipif(bool(build.problem()), reason="no compiled kernels here")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [("all",), ("value", "down")], ids=str)
def test_the_fused_block_applies_dropout_to_what_adapters_read(
    small_model, targets, checkpointing, monkeypatch
):
    """In float64, compared with plain autograd with the same masks.

    There is one for query, key and value, one for output, one for gate and up, and one for down.
    """
    share, results = 0.4, []
    torch.manual_seed(3)
    seeds = dict(zip(("query", "output", "gate", "down"), torch.randint(1 << 31, (4,)).tolist()))
    seeds |= {"key": seeds["query"], "value": seeds["query"], "up": seeds["gate"]}

    def lora_branch(self, x):
        mask = dropped(torch.ones_like(x).flatten(0, 1), share, self.seed).view(x.shape)
        return F.linear(x * mask, self.lora_a) * self.scale, self.lora_b

    for plain in (False, True):
        model = small_model(num_hidden_layers=1).double().train()
        model.set_training_dtype(torch.float64)
        set_activation_checkpointing(model, checkpointing)
        adapted(model, Lora(3, 5.0, share, targets))
        for name, adapter in adapters_of(model).items():
            adapter.seed = seeds[name.rpartition(".")[2]]
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(fused_block, "active", lambda x: False)
                patch.setattr(LoraLinear, "lora_branch", lora_branch)
            torch.manual_seed(3)
            output_logits = logits(model)
            output_logits.square().sum().backward()
        results.append(
            (
                output_logits,
                {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
            )
        )
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    assert results[0][1].keys() == results[1][1].keys() and results[0][1]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-9)


def test_frozen_layers_do_not_change_other_gradients(small_model):
    whole, part = (
        small_model(num_hidden_layers=3, tie_word_embeddings=False).double().train()
        for _ in range(2)
    )
    freeze_below(part, 2)
    for model in (whole, part):
        model.set_training_dtype(torch.float64)
        logits(model).square().sum().backward()
    for (name, one), other in zip(whole.named_parameters(), part.parameters()):
        if name.startswith(("embedding", "decoder.layers.0.", "decoder.layers.1.")):
            assert other.grad is None
        else:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9)


def test_matrices_joined_in_a_file_share_a(small_model):
    model = small_model(**GPT2)
    group = tuple(f"decoder.layers.0.attention.{part}" for part in ("query", "key", "value"))
    put_on(model, Lora(3, 5.0, targets=("query", "value", "output")), [group])
    first, second, third = (model.get_submodule(name) for name in group)
    assert (
        first.lora_a is third.lora_a
        and first.lora_b is not third.lora_b
        and not isinstance(second, LoraLinear)
    )
    assert first.lora_a is not model.get_submodule("decoder.layers.0.attention.output").lora_a


def test_a_seed_determines_the_initial_weights(small_model):
    drawn = []
    for seed in (1, 1, 2):
        model = small_model()
        put_on(model, Lora(3, 5.0), seed=seed)
        drawn.append(model.get_submodule("decoder.layers.1.mlp.up").lora_a)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 32**-0.5


@pytest.mark.parametrize(
    "lora, message",
    [
        (Lora(2, 1.0, targets=("query", "gate")), "no block of this model has a matrix 'gate'"),
        (Lora(2, 1.0, targets=()), "lora_targets is empty"),
    ],
    ids=str,
)
def test_unknown_targets_are_refused(small_model, lora, message):
    with pytest.raises(UsageError, match=message):
        put_on(small_model(**GPT2), lora)


@pytest.mark.parametrize(
    "options, target, message",
    [
        (
            {"tie_word_embeddings": True},
            "head",
            "'head' cannot have an adapter: embedding and head of this model share one",
        ),
        (
            {"tie_word_embeddings": True},
            "embedding",
            "'embedding' cannot have an adapter: embedding and head of this model share",
        ),
        (
            {**SHAPES["encoder"], "head": "sequence", "labels": ("a", "b")},
            "head",
            "this model has no head over the vocabulary",
        ),
        (
            {**SHAPES["two stacks"], **OUTER},
            "embedding",
            "'embedding' cannot have an adapter: encoder and decoder share the embedding",
        ),
    ],
    ids=str,
)
def test_impossible_adapters_of_embedding_and_head_are_refused(
    small_model, options, target, message
):
    with pytest.raises(UsageError, match=message):
        put_on(small_model(**options), Lora(2, 1.0, targets=("all", target)))


def test_a_frozen_embedding_gets_no_adapter(small_model):
    model = small_model(**OUTER)
    freeze_below(model, 2)
    with pytest.raises(UsageError, match="leaves nothing that LoRA could train"):
        put_on(model, Lora(2, 1.0, targets=("embedding",)))
    put_on(model, EVERYWHERE)
    assert list(adapters_of(model)) == ["head.output"]


def test_freezing_too_many_blocks_is_refused(small_model):
    with pytest.raises(UsageError, match="frozen_layers 3 is more than the 2 blocks there are"):
        freeze_below(small_model(), 3)
    model = small_model()
    freeze_below(model, 2)
    with pytest.raises(UsageError, match="leaves nothing that LoRA could train"):
        put_on(model, Lora(2, 1.0))
