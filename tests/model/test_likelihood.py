"""Log-probabilities: the one function behind loss, score and perplexity."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmcli.model import likelihood, memory
from lmcli.model.likelihood import target_logprobs


def case(
    rows: int = 11, width: int = 16, vocabulary: int = 37
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(width, vocabulary, bias=False)
    head.weight.data = torch.randn(vocabulary, width, generator=generator)
    return (
        torch.randn(rows, width, generator=generator),
        head,
        torch.randint(0, vocabulary, (rows,), generator=generator),
    )


def test_by_hand():
    # logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[1.0, 2, 5]]).log().repeat(3, 1)
    result = target_logprobs(logits, lambda x: x, torch.tensor([0, 1, 2]))
    assert result.exp().tolist() == pytest.approx([0.125, 0.25, 0.625])


def test_logprobs_are_the_log_softmax_at_the_target(difference):
    hidden, head, targets = case()
    expected = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert difference(target_logprobs(hidden, head, targets), expected) < 1e-6


@pytest.mark.parametrize("rows", [1, 3, 10, 11, 12])
def test_the_size_of_chunks_changes_nothing(rows, monkeypatch, difference):
    hidden, head, targets = case()
    whole = target_logprobs(hidden, head, targets)
    largest = []
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", {"cpu": rows * 37})
    monkeypatch.setattr(memory, "FEWEST_ROWS", 1)
    head.register_forward_hook(lambda module, inputs, logits: largest.append(len(logits)))
    result = target_logprobs(hidden, head, targets)
    assert max(largest) <= rows
    assert difference(result, whole) < 1e-6


def test_the_gradient_equals_cross_entropy(monkeypatch, difference):
    hidden, head, targets = case()
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", {"cpu": 4 * 37})
    monkeypatch.setattr(memory, "FEWEST_ROWS", 1)
    hidden.requires_grad_()
    ours = torch.autograd.grad(
        -target_logprobs(hidden, head, targets).mean(), [hidden, head.weight]
    )
    theirs = torch.autograd.grad(F.cross_entropy(head(hidden), targets), [hidden, head.weight])
    for result, expected in zip(ours, theirs, strict=True):
        assert difference(result, expected) < 1e-6


def test_bfloat16_logits_are_normalized_in_float32(difference):
    hidden, head, targets = case(vocabulary=5000)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    logits = head(hidden)
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    result = target_logprobs(hidden, head, targets)
    assert result.dtype == torch.float32
    assert difference(result, expected) < 1e-6
    in_bfloat16 = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert difference(in_bfloat16, expected) > 1e-4  # so the bound above tells the two apart


def test_large_logits_stay_finite():
    result = target_logprobs(torch.tensor([[1e4, -1e4]]), lambda x: x, torch.tensor([1]))
    assert result.tolist() == pytest.approx([-2e4])


def test_no_targets_give_no_log_probabilities():
    hidden, head, targets = case()
    assert target_logprobs(hidden[:0], head, targets[:0]).shape == (0,)


def test_distributions_equal_the_log_softmax(difference):
    hidden, head, targets = case()
    logprobs = head(hidden).log_softmax(-1)
    members = torch.arange(37) % 3 == 1
    result = likelihood.token_distributions(hidden, head, targets, members, 5)
    assert difference(result.logprobs, target_logprobs(hidden, head, targets)) < 1e-6
    assert difference(result.set_logprobs.exp(), logprobs.exp()[:, members].sum(-1)) < 1e-6
    assert (
        difference(result.entropy, torch.distributions.Categorical(logits=logprobs).entropy())
        < 1e-6
    )
    order = logprobs.argsort(-1, descending=True)
    assert result.ranks.tolist() == ((order == targets[:, None]).nonzero()[:, 1] + 1).tolist()
    assert (
        torch.equal(result.tokens, order[:, :5])
        and difference(result.best, logprobs.gather(1, order[:, :5])) < 1e-6
    )
    assert likelihood.token_distributions(hidden, head, targets, None, 99).tokens.shape == (
        11,
        37,
    )  # no more than there are
    assert likelihood.token_distributions(
        hidden[:0], head, targets[:0], members, 2
    ).set_logprobs.shape == (0,)


def test_impossible_tokens_add_nothing_to_the_entropy():
    result = likelihood.token_distributions(
        torch.tensor([[0.0, -torch.inf, 0.0]]), lambda x: x, torch.tensor([0]), None, 1
    )
    assert result.entropy.item() == pytest.approx(0.693147, abs=1e-6)
