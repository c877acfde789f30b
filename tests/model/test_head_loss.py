"""The loss of a language head, with and without the compiled kernels, beside torch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from lmcli.model import head_loss, kernels
from lmcli.text.batches import IGNORED

needs_kernels = pytest.mark.skipif(bool(kernels.problem()), reason="no compiled kernels here")


def head_case(words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # quarters below 32: logits that bfloat16 holds as they are, in whatever order they are summed
    hidden, weight, bias = (torch.randint(-most, most + 1, size, generator=generator) / parts for most, parts, size in (
        (1, 1, (50, 24)), (4, 4, (words, 24)), (4, 4, (words,))))
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), torch.arange(50) * 7 % words


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_what_torch_makes_beside_the_loss_is_its_gradient(smoothing, biased, monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", {"cpu": 16 * 33})  # several pieces, the last a short one
    monkeypatch.setattr(head_loss, "FEWEST_ROWS", 1)
    hidden, weight, bias, targets = head_case(33, torch.float64)
    parts = [part.requires_grad_() for part in (hidden, weight, bias)[:3 if biased else 2]]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return head_loss.cross_entropy(hidden, weight, bias, targets, smoothing)
    wanted = F.cross_entropy(F.linear(*parts), targets, label_smoothing=smoothing, reduction="sum")
    assert ours(*parts).item() == pytest.approx(wanted.item(), rel=1e-12)
    for found, right in zip(torch.autograd.grad(3 * ours(*parts), parts), torch.autograd.grad(3 * wanted, parts)):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    assert gradcheck(lambda hidden: ours(hidden, *(part.detach() for part in parts[1:])), [hidden])


@needs_kernels
def test_torch_and_the_kernels_agree_in_bfloat16(difference):
    hidden, weight, _, targets = head_case(5000, torch.bfloat16)
    logits = hidden @ weight.T
    losses, gradient = head_loss.with_gradient(logits, targets, 0.1)
    known, other = head_loss._by_kernels(logits.clone(), targets, 0.1)
    assert losses.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert difference(losses, known) < 1e-6 and difference(gradient.float(), other.float()) < 3e-3


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("words", [1, 7, 16, 33, 5000])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_losses_that_are_only_read_are_those_of_torch(words, dtype, biased):
    hidden, weight, bias, targets = head_case(words, dtype)
    logits = F.linear(hidden, weight, bias if biased else None)
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    found = head_loss.target_losses(hidden, weight, bias if biased else None, targets)
    assert found.dtype == kernels.ACCUMULATED[dtype]
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    with pytest.raises(AssertionError):
        head_loss.target_losses(hidden, weight, None, torch.full((50,), words))
    assert head_loss.target_losses(hidden[:0], weight, None, targets[:0]).shape == (0,)


@needs_kernels
@pytest.mark.parametrize(("rows", "words"), [(7, 5), (50, 1), (1, 33), (64, 64)])
@torch.no_grad()
def test_the_blocks_of_words_change_nothing(rows, words, monkeypatch):
    hidden, weight, bias, targets = head_case(33, torch.float64)
    wanted = head_loss.target_losses(hidden, weight, bias, targets)
    monkeypatch.setattr(head_loss, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(head_loss, "WORDS_AT_ONCE", words)
    np.testing.assert_allclose(head_loss.target_losses(hidden, weight, bias, targets), wanted, rtol=1e-13)


@needs_kernels
@pytest.mark.parametrize("words", [4, 2048])
@torch.no_grad()
def test_words_that_cannot_be_and_logits_that_are_no_numbers(words, monkeypatch):
    monkeypatch.setattr(head_loss, "WORDS_AT_ONCE", words)
    hidden, weight, bias, targets = head_case(33, torch.float32)
    bias[:9], bias[31] = float("-inf"), float("-inf")  # two blocks of nothing else, and the end of a third
    found = head_loss.target_losses(hidden, weight, bias, targets)
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    assert 0 < found.isinf().sum() < 50
    for nothing in (float("nan"), float("inf")):
        bias[20] = nothing
        assert head_loss.target_losses(hidden, weight, bias, targets).isnan().all()
    bias[:] = float("-inf")
    assert head_loss.target_losses(hidden, weight, bias, targets).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits_give_the_losses_of_torch(dtype, smoothing):
    """Logits up to ±1e4, among them some that are close: differences of 1 must not drown in 10,000."""
    hidden = torch.tensor([[1e4], [-1e4], [1e4], [3.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [0.9999], [-1.0], [0.5], [-0.9999]], requires_grad=True)
    targets = torch.tensor([1, 4, 2, 0])
    logits = (hidden @ weight.to(dtype).T).float()
    for row in range(4):
        found = head_loss.cross_entropy(hidden[row:row + 1], weight, None, targets[row:row + 1], smoothing)
        wanted = F.cross_entropy(logits[row:row + 1], targets[row:row + 1], label_smoothing=smoothing)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)
    for gradient in torch.autograd.grad(head_loss.cross_entropy(hidden, weight, None, targets, smoothing), [hidden, weight]):
        assert gradient.isfinite().all()


@needs_kernels
def test_a_target_outside_the_vocabulary_is_never_written_to():
    for wrong in (-1, 5, IGNORED):
        with pytest.raises(AssertionError):
            head_loss.cross_entropy(torch.ones(2, 3), torch.ones(5, 3), None, torch.tensor([0, wrong]))
