"""The model as a whole: fresh weights, tying, causality."""

import dataclasses

import pytest
import torch

from lmcli.config import ModelConfig
from lmcli.model import fused
from lmcli.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=300, max_position_embeddings=32, hidden_size=64, num_hidden_layers=2,
                    num_attention_heads=4, tie_word_embeddings=False).complete()


def fresh(seed: int, **options) -> Transformer:
    model = Transformer(dataclasses.replace(SMALL, **options))
    model.initialize(seed)
    return model


def test_fresh_weights_follow_from_the_seed_alone():
    first, other = fresh(3).state_dict(), fresh(4).state_dict()
    torch.manual_seed(99)
    again = fresh(3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [name for name in first if first[name].ndim > 1 and not torch.equal(first[name], other[name])] == [
        name for name in first if first[name].ndim > 1 and not name.endswith(("attention.output.weight", "down.weight"))]


def test_a_fresh_model_passes_its_input_through_and_knows_nothing(difference):
    model = fresh(0)
    ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    assert difference(model.hidden(ids), model.decoder.norm(model.embedding(ids))) < 1e-6
    assert -model(ids).log_softmax(-1)[..., 7].mean().item() == pytest.approx(5.70, abs=0.05)  # ln 300 = 5.70


@pytest.mark.parametrize(("name", "deviation"), [
    ("embedding.weight", 0.3), ("head.output.weight", 0.02), ("decoder.layers.0.attention.query.weight", 0.5 / 8),
    ("decoder.layers.1.mlp.up.weight", 0.5 / 8), ("decoder.layers.1.mlp.down.weight", 0.0)])
def test_fresh_matrices_have_the_deviation_that_is_promised(name, deviation):
    assert fresh(0).get_parameter(name).std().item() == pytest.approx(deviation, rel=0.05)


def test_a_fresh_embedding_that_is_the_head_too_begins_small():
    assert fresh(0, tie_word_embeddings=True).embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_tied_head_is_the_embedding_itself(small_model):
    tied, untied = small_model(tie_word_embeddings=True), small_model(tie_word_embeddings=False)
    assert tied.head.output.weight is tied.embedding.weight
    assert untied.head.output.weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 401 * 32


def test_a_later_token_changes_no_earlier_logit(small_model):
    model = small_model()
    ids = torch.randint(0, 400, (1, 10), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 400
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert all(not torch.allclose(before[0, at], after[0, at]) for at in range(6, 10))


def test_order_of_tokens_matters(small_model):
    model = small_model()
    forth, back = model(torch.tensor([[5, 6, 7]])), model(torch.tensor([[6, 5, 7]]))
    assert not torch.allclose(forth[0, -1], back[0, -1], atol=1e-2)


def test_dropout_works_in_training_only(small_model):
    model = Transformer(SMALL, dropout=0.5)
    model.load_state_dict(small_model(**{name: getattr(SMALL, name) for name in (
        "vocab_size", "hidden_size", "num_key_value_heads", "tie_word_embeddings")}).state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_compiled_blocks_train_to_the_same_gradients_and_are_left_out_of_evaluations():
    from lmcli.model.likelihood import summed_loss

    config = ModelConfig(vocab_size=40, max_position_embeddings=16, hidden_size=16, num_hidden_layers=2,
                         num_attention_heads=2).complete()
    ids, gradients = torch.arange(34).view(2, 17), []
    for compiled in (False, True):
        model = Transformer(config)
        model.initialize(0)
        calls = []
        if compiled:
            model.compile_blocks(backend=lambda graph, _, calls=calls: calls.append(graph) or graph.forward)
        summed_loss(model.train().hidden(ids[:, :-1]).flatten(0, 1), model.head, ids[:, 1:].flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        traced = len(calls)
        assert bool(traced) == compiled
        model.eval()(ids[:, :9])
        assert len(calls) == traced
    for plain, made in zip(*gradients):
        torch.testing.assert_close(plain, made, rtol=1e-4, atol=1e-5)
    assert all("compiled" not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "norm": "layer", "gated_mlp": False, "hidden_act": "gelu"},
                                     {"attention_bias": "all"}, {"parallel_block": True}], ids=str)
@torch.no_grad()
def test_packed_rows_give_what_they_give_alone(options, small_model, difference):
    from lmcli.model.attention import Packed

    model = small_model(**options)
    rows = [torch.randint(0, 401, (2, 9)), torch.randint(0, 401, (1, 5)), torch.randint(0, 401, (3, 1))]
    together = model.hidden(torch.cat([part.flatten() for part in rows])[None], packed=Packed(((2, 9), (1, 5), (3, 1))))
    alone = torch.cat([model.hidden(part).flatten(0, 1) for part in rows])
    assert together.shape == (1, 26, 32) and difference(together[0], alone) < 1e-6
    assert difference(model.hidden(torch.cat([part.flatten() for part in rows])[None])[0], alone) > 0.1


def test_only_what_looks_at_its_own_tokens_is_packed(small_model):
    with torch.inference_mode():
        assert small_model(positions="learned", norm="layer", gated_mlp=False, hidden_act="gelu").packs
        assert not small_model(sliding_window=4).packs


@pytest.mark.parametrize("options", [
    {}, {"norm": "layer", "gated_mlp": False, "hidden_act": "gelu_new", "positions": "learned", "attention_bias": "all"},
    {"parallel_block": True}, {"post_norm": True}, {"sliding_window": 4}, {"positions": "relative"},
    {"num_key_value_heads": 2, "query_key_norm": True}], ids=str)
@pytest.mark.parametrize("kernels", [True, False])
def test_states_of_later_positions_alone_are_the_same(options, kernels, small_model, difference, monkeypatch):
    if not kernels:
        monkeypatch.setattr(fused, "active", lambda x: False)
    model = small_model(**options)
    ids = torch.randint(0, 400, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, whole = model.hidden(ids, since=7), model.hidden(ids)
    assert found.shape == (3, 4, model.config.hidden_size) and difference(found, whole[:, 7:]) < 1e-6
