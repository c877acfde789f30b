"""Attention: readable and fast, with masks and padding, and with the key–value cache."""

import pytest
import torch

from lmcli.config import ModelConfig
from lmcli.kernels import calls
from lmcli.kernels.fast_path import FastAttention
from lmcli.model.attention import KeyValueCache, attention, attention_mask, causal_mask
from lmcli.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_gradients():
    """As in use; with gradients, a CPU uses plain products for short rows."""
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_query_by_hand():
    # scores (2, 0)/√4 = (1, 0), so the weights are e/(e+1) and 1/(e+1)
    query = torch.tensor([[[[1.0, 1, 1, 1]]]])
    key = torch.tensor([[[[0.5, 0.5, 0.5, 0.5], [0.0, 0, 0, 0]]]])
    value = torch.tensor([[[[1.0, 0, 0, 0], [0.0, 1, 0, 0]]]])
    assert attention(query, key, value, None).flatten().tolist() == pytest.approx(
        [0.7310586, 0.2689414, 0, 0]
    )


@pytest.mark.parametrize("kind", ["none", "causal", "random"])
def test_fast_attention_equals_the_readable_one(kind, difference):
    query, key, value = random(2, 3, 7, 8), random(2, 3, 9, 8, seed=2), random(2, 3, 9, 8, seed=3)
    mask = {
        "none": None,
        "causal": causal_mask(7, 9, CPU),
        "random": (random(2, 1, 7, 9, seed=4) > 0) | (torch.arange(9) == 0),
    }[kind]
    result = fast_attention(causal=False).attend(query, key, value, mask)
    assert difference(result, attention(query, key, value, mask)) < 1e-6


@pytest.mark.parametrize("kernels", [True, False])
def test_causal_without_a_mask_equals_the_mask(kernels, monkeypatch, difference):
    if not kernels:
        monkeypatch.setattr(calls, "usable", lambda x: False)
    query, key, value = random(2, 3, 7, 8), random(2, 3, 7, 8, seed=2), random(2, 3, 7, 8, seed=3)
    expected = attention(query, key, value, causal_mask(7, 7, CPU))
    result = fast_attention(causal=True).attend(query, key, value, None)
    assert difference(result, expected) < 1e-6


def fast_attention(causal: bool) -> FastAttention:
    """The attention of a fast model with 3 heads of size 8."""
    config = ModelConfig(vocab_size=2, hidden_size=24, num_attention_heads=3).complete()
    return FastAttention(config, 0, 3, 8, causal)


def plain(model: Transformer) -> Transformer:
    """The same model without the fast path."""
    model_without = Transformer(model.config).eval()
    model_without.load_state_dict(model.state_dict())
    return model_without


def test_masks_by_hand():
    token_mask = torch.tensor([[False, True, True]])
    assert (
        attention_mask(2, 3, True, 0, None, CPU) is None
        and attention_mask(3, 3, False, 3, None, CPU) is None
    )
    assert attention_mask(2, 3, True, 0, token_mask, CPU).tolist() == [
        [[[False, True, False], [False, True, True]]]
    ]
    assert attention_mask(2, 3, True, 2, None, CPU).tolist() == [
        [[[True, True, False], [False, True, True]]]
    ]
    assert attention_mask(3, 3, False, 1, None, CPU).tolist() == [
        [[[True, True, False], [True, True, True], [False, True, True]]]
    ]
    # padding attends to itself too, so that its softmax exists
    assert attention_mask(3, 3, False, 0, token_mask, CPU).tolist() == [
        [[[True, True, True], [False, True, True], [False, True, True]]]
    ]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (3, 9) of texts of 9, 4 and 1 tokens, padded on one side, and their attention mask."""
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 4, 1)):
        at = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, at] = torch.arange(1, length + 1) * 31 % 400
        mask[row, at] = 1
    return ids, mask


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_model_gives_the_same_with_and_without_the_fast_path(
    heads, side, small_model, difference
):
    model = small_model(num_key_value_heads=heads)
    ids, mask = (padded("left")[0], None) if side == "none" else padded(side)
    assert difference(model(ids, mask), plain(model)(ids, mask)) < 1e-5


@pytest.mark.parametrize("length", [9, 160])
def test_training_computes_what_inference_computes(length, small_model, difference):
    model = small_model()
    ids = torch.randint(0, 400, (2, length), generator=torch.Generator().manual_seed(1))
    inferred = model(ids)
    with torch.enable_grad():
        trained = model(ids)
        assert trained.requires_grad
    assert difference(trained.detach(), inferred) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("query_key_norm", [True, False])
def test_padding_changes_nothing_for_tokens(side, query_key_norm, small_model, difference):
    model = small_model(query_key_norm=query_key_norm)
    ids, mask = padded(side)
    padded_together = model(ids, mask)
    for row in range(3):
        tokens = mask[row].bool()
        assert difference(padded_together[row, tokens], model(ids[row, tokens][None])[0]) < 1e-5


def test_positions_count_tokens_only(small_model, difference):
    """Also with padding in the middle, as between a padded prompt and its continuation."""
    model = small_model()
    gap = model(torch.tensor([[5, 6, 0, 0, 0, 7, 8]]), torch.tensor([[1, 1, 0, 0, 0, 1, 1]]))[0]
    assert difference(gap[[0, 1, 5, 6]], model(torch.tensor([[5, 6, 7, 8]]))[0]) < 1e-5


def test_ids_of_padding_change_nothing(small_model):
    model = small_model()
    for side in ("left", "right"):
        ids, mask = padded(side)
        other = torch.where(mask.bool(), ids, 399)
        assert torch.equal(model(ids, mask)[mask.bool()], model(other, mask)[mask.bool()])


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    "steps", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [4, 4, 4], [12], [11, 1], [1, 11]]
)
def test_steps_with_the_cache_equal_one_pass(heads, steps, small_model, difference):
    fast = small_model(num_key_value_heads=heads)
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    for model in (fast, plain(fast)):
        cache = KeyValueCache(model.config, 2, 12, torch.device("cpu"), torch.float32)
        logits = [model(columns, cache=cache) for columns in ids.split(steps, dim=1)]
        assert cache.length == 12
        assert difference(torch.cat(logits, dim=1), model(ids)) < 1e-5


def test_the_cache_with_padding_on_the_left_equals_single_rows(small_model, difference):
    model = small_model()
    ids, mask = padded("left")
    more = torch.randint(0, 400, (3, 5), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(model.config, 3, 14, torch.device("cpu"), torch.float32)
    model(ids, mask, cache)
    for step in range(5):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        result = model(more[:, step : step + 1], mask, cache)
    for row in range(3):
        alone = torch.cat([ids[row][mask[row, :9].bool()], more[row]])[None]
        assert difference(result[row, -1], model(alone)[0, -1]) < 1e-5


def test_rows_of_the_cache_can_be_dropped_doubled_and_reordered(small_model, difference):
    model = small_model()
    ids = torch.randint(0, 400, (3, 6), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(model.config, 3, 7, torch.device("cpu"), torch.float32)
    model(ids, cache=cache)
    rows = torch.tensor([2, 0, 2, 2])
    cache.keep_rows(rows)
    following = torch.tensor([[5], [6], [7], [8]])
    expected = model(torch.cat([ids[rows], following], dim=1))[:, -1]
    assert difference(model(following, cache=cache)[:, -1], expected) < 1e-5
