"""The whole model: initial weights, tying, causality, packed rows, compiled blocks."""

import dataclasses

import pytest
import torch

from lmcli.config import ModelConfig
from lmcli.kernels import fused_block
from lmcli.kernels.fast_path import build_model, can_pack, compile_blocks, packed_hidden
from lmcli.model.initialization import meta_device
from lmcli.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=300,
    max_position_embeddings=32,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    tie_word_embeddings=False,
).complete()


def new_model(seed: int, **options) -> Transformer:
    model = Transformer(dataclasses.replace(SMALL, **options))
    model.initialize(seed)
    return model


def test_a_model_without_memory_draws_no_values():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with meta_device():
        empty = build_model(SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert {(weight.device.type, weight.dtype) for weight in empty.parameters()} == {
        ("meta", torch.float32)
    }
    shapes = {name: weight.shape for name, weight in build_model(SMALL).state_dict().items()}
    assert {name: weight.shape for name, weight in empty.state_dict().items()} == shapes
    # outside the block values are drawn as ever
    assert torch.nn.Linear(4, 4).weight.abs().sum() > 0


def test_the_seed_determines_initial_weights():
    first, other = new_model(3).state_dict(), new_model(4).state_dict()
    torch.manual_seed(99)
    again = new_model(3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [
        name for name in first if first[name].ndim > 1 and not torch.equal(first[name], other[name])
    ] == [
        name
        for name in first
        if first[name].ndim > 1 and not name.endswith(("attention.output.weight", "down.weight"))
    ]


def test_a_new_model_is_the_identity_and_predicts_uniformly(difference):
    model = new_model(0)
    ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    assert difference(model.hidden(ids), model.decoder.norm(model.embedding(ids))) < 1e-6
    assert -model(ids).log_softmax(-1)[..., 7].mean().item() == pytest.approx(
        5.70, abs=0.05
    )  # ln 300 = 5.70


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", 0.3),
        ("head.output.weight", 0.02),
        ("decoder.layers.0.attention.query.weight", 0.5 / 8),
        ("decoder.layers.1.mlp.up.weight", 0.5 / 8),
        ("decoder.layers.1.mlp.down.weight", 0.0),
    ],
)
def test_deviations_of_initial_matrices(name, deviation):
    assert new_model(0).get_parameter(name).std().item() == pytest.approx(deviation, rel=0.05)


def test_deviation_of_a_tied_embedding():
    assert new_model(0, tie_word_embeddings=True).embedding.weight.std().item() == pytest.approx(
        0.02, rel=0.05
    )


def test_a_tied_head_is_the_embedding_itself(small_model):
    tied, untied = small_model(tie_word_embeddings=True), small_model(tie_word_embeddings=False)
    assert tied.head.output.weight is tied.embedding.weight
    assert untied.head.output.weight is not untied.embedding.weight
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
        == 401 * 32
    )


def test_a_later_token_changes_no_earlier_logit(small_model):
    model = small_model()
    ids = torch.randint(0, 400, (1, 10), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 400
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert all(not torch.allclose(before[0, at], after[0, at]) for at in range(6, 10))


def test_the_order_of_tokens_matters(small_model):
    model = small_model()
    forth, back = model(torch.tensor([[5, 6, 7]])), model(torch.tensor([[6, 5, 7]]))
    assert not torch.allclose(forth[0, -1], back[0, -1], atol=1e-2)


def test_dropout_works_in_training_only(small_model):
    model = Transformer(SMALL, dropout=0.5)
    model.load_state_dict(
        small_model(
            **{
                name: getattr(SMALL, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "num_key_value_heads",
                    "tie_word_embeddings",
                )
            }
        ).state_dict()
    )
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_compiled_blocks_have_the_same_gradients_and_are_for_training_only():
    from lmcli.model.likelihood import summed_loss

    config = ModelConfig(
        vocab_size=40,
        max_position_embeddings=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    ).complete()
    ids, gradients = torch.arange(34).view(2, 17), []
    for compiled in (False, True):
        model = build_model(config)
        model.initialize(0)
        calls = []
        if compiled:
            compile_blocks(
                model, backend=lambda graph, _, calls=calls: calls.append(graph) or graph.forward
            )
        summed_loss(
            model.train().hidden(ids[:, :-1]).flatten(0, 1), model.head, ids[:, 1:].flatten()
        ).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        traced = len(calls)
        assert bool(traced) == compiled
        model.eval()(ids[:, :9])
        assert len(calls) == traced
    for plain, compiled_gradient in zip(*gradients):
        torch.testing.assert_close(plain, compiled_gradient, rtol=1e-4, atol=1e-5)
    assert all("compiled" not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "learned", "norm": "layer", "gated_mlp": False, "hidden_act": "gelu"},
        {"attention_bias": "all"},
        {"parallel_block": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_packed_rows_equal_single_rows(options, small_model, difference):
    model = small_model(**options)
    texts = [
        torch.randint(0, 401, (2, 9)),
        torch.randint(0, 401, (1, 5)),
        torch.randint(0, 401, (3, 1)),
    ]
    packed = packed_hidden(model, [row for text in texts for row in text.tolist()])
    alone = torch.cat([model.hidden(text).flatten(0, 1) for text in texts])
    assert packed.shape == (1, 26, 32) and difference(packed[0], alone) < 1e-6
    joined = torch.cat([text.flatten() for text in texts])[None]
    assert difference(model.hidden(joined)[0], alone) > 0.1


def test_which_models_can_pack(small_model):
    with torch.inference_mode():
        assert can_pack(
            small_model(positions="learned", norm="layer", gated_mlp=False, hidden_act="gelu")
        )
        assert not can_pack(small_model(sliding_window=4))
        assert not can_pack(small_model(positions="relative"))
        assert not can_pack(Transformer(SMALL))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "norm": "layer",
            "gated_mlp": False,
            "hidden_act": "gelu_new",
            "positions": "learned",
            "attention_bias": "all",
        },
        {"parallel_block": True},
        {"post_norm": True},
        {"sliding_window": 4},
        {"positions": "relative"},
        {"num_key_value_heads": 2, "query_key_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", [True, False])
def test_states_from_query_start_on_are_the_same(
    options, kernels, small_model, difference, monkeypatch
):
    if not kernels:
        monkeypatch.setattr(fused_block, "active", lambda x: False)
    model = small_model(**options)
    ids = torch.randint(0, 400, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        partial, whole = model.hidden(ids, query_start=7), model.hidden(ids)
    assert (
        partial.shape == (3, 4, model.config.hidden_size)
        and difference(partial, whole[:, 7:]) < 1e-6
    )
