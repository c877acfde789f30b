"""The loss of a language head, with and without compiled kernels, compared with torch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from lmcli.data.batches import IGNORED
from lmcli.kernels import build, calls, fused_loss
from lmcli.model import memory

needs_kernels = pytest.mark.skipif(bool(build.problem()), reason="no compiled kernels here")


def head_case(words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # quarters below 32: bfloat16 holds the logits exactly, in any order of summation
    hidden, weight, bias = (
        torch.randint(-most, most + 1, size, generator=generator) / parts
        for most, parts, size in ((1, 1, (50, 24)), (4, 4, (words, 24)), (4, 4, (words,)))
    )
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), torch.arange(50) * 7 % words


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_computes_the_gradient_with_the_loss(smoothing, biased, monkeypatch):
    monkeypatch.setattr(calls, "usable", lambda x: False)
    # several chunks, the last a short one
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", {"cpu": 16 * 33})
    monkeypatch.setattr(memory, "FEWEST_ROWS", 1)
    hidden, weight, bias, targets = head_case(33, torch.float64)
    parts = [part.requires_grad_() for part in (hidden, weight, bias)[: 3 if biased else 2]]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused_loss.cross_entropy(hidden, weight, bias, targets, smoothing)

    expected = F.cross_entropy(
        F.linear(*parts), targets, label_smoothing=smoothing, reduction="sum"
    )
    assert ours(*parts).item() == pytest.approx(expected.item(), rel=1e-12)
    for result, right in zip(
        torch.autograd.grad(3 * ours(*parts), parts), torch.autograd.grad(3 * expected, parts)
    ):
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
    assert gradcheck(lambda hidden: ours(hidden, *(part.detach() for part in parts[1:])), [hidden])


@needs_kernels
def test_torch_and_the_kernels_agree_in_bfloat16(difference):
    hidden, weight, _, targets = head_case(5000, torch.bfloat16)
    logits = hidden @ weight.T
    losses, gradient = fused_loss.with_gradient(logits, targets, 0.1)
    known, other = fused_loss._with_gradient_by_kernels(logits.clone(), targets, 0.1)
    assert losses.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert difference(losses, known) < 1e-6 and difference(gradient.float(), other.float()) < 3e-3


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("words", [1, 7, 16, 33, 5000])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_losses_without_gradient_equal_torch(words, dtype, biased):
    hidden, weight, bias, targets = head_case(words, dtype)
    logits = F.linear(hidden, weight, bias if biased else None)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    result = fused_loss.target_losses(hidden, weight, bias if biased else None, targets)
    assert result.dtype == calls.ACCUMULATED[dtype]
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fused_loss.target_losses(hidden, weight, None, torch.full((50,), words))
    assert fused_loss.target_losses(hidden[:0], weight, None, targets[:0]).shape == (0,)


@needs_kernels
@pytest.mark.parametrize(("rows", "words"), [(7, 5), (50, 1), (1, 33), (64, 64)])
@torch.no_grad()
def test_the_size_of_blocks_changes_nothing(rows, words, monkeypatch):
    hidden, weight, bias, targets = head_case(33, torch.float64)
    expected = fused_loss.target_losses(hidden, weight, bias, targets)
    monkeypatch.setattr(fused_loss, "LOGIT_ROWS_AT_ONCE", rows)
    monkeypatch.setattr(fused_loss, "WORDS_AT_ONCE", words)
    np.testing.assert_allclose(
        fused_loss.target_losses(hidden, weight, bias, targets), expected, rtol=1e-13
    )


@needs_kernels
@pytest.mark.parametrize("words", [4, 2048])
@torch.no_grad()
def test_impossible_tokens_and_logits_that_are_not_finite(words, monkeypatch):
    monkeypatch.setattr(fused_loss, "WORDS_AT_ONCE", words)
    hidden, weight, bias, targets = head_case(33, torch.float32)
    bias[:9], bias[31] = (
        float("-inf"),
        float("-inf"),
    )  # two blocks of nothing else, and the end of a third
    result = fused_loss.target_losses(hidden, weight, bias, targets)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)
    assert 0 < result.isinf().sum() < 50
    for nothing in (float("nan"), float("inf")):
        bias[20] = nothing
        assert fused_loss.target_losses(hidden, weight, bias, targets).isnan().all()
    bias[:] = float("-inf")
    assert fused_loss.target_losses(hidden, weight, bias, targets).isnan().all()


INF, NAN = float("inf"), float("nan")
# logits of one row, of which torch's loss and gradient are known; the target is the first
STRANGE_LOGITS = {
    "impossible": [0.5, -INF, 2.0, -1.0, -INF, 0.0],
    "impossible target": [-INF, 0.5, 2.0, -1.0, -INF, 0.0],
    "only the target": [2.0, -INF, -INF, -INF, -INF, -INF],
    "nothing": [-INF] * 6,
    "infinite": [0.5, INF, 2.0, -1.0, 0.0, 1.0],
    "infinite target": [INF, 0.5, 2.0, -1.0, 0.0, 1.0],
    "not a number": [0.5, NAN, 2.0, -1.0, 0.0, 1.0],
    "huge": [0.5, 3e38, -3e38, -1.0, 0.0, 1.0],
}


@pytest.mark.parametrize("by_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", STRANGE_LOGITS)
def test_losses_and_gradients_of_strange_logits_equal_torch(name, smoothing, dtype, by_kernels):
    # rows of one and of many vectors; in the second the target is the last
    rows = [torch.tensor(STRANGE_LOGITS[name], dtype=dtype)]
    rows.append(torch.cat([torch.linspace(-1, 1, 35).to(dtype), rows[0].flip(0)]))
    for logits, target in zip(rows, (0, 40)):
        targets = torch.tensor([target])
        known = logits[None].to(calls.ACCUMULATED[dtype]).requires_grad_()
        expected = F.cross_entropy(known, targets, reduction="none", label_smoothing=smoothing)
        expected.sum().backward()
        compute = fused_loss._with_gradient_by_kernels if by_kernels else fused_loss.with_gradient
        losses, gradient = compute(logits[None].clone(), targets, smoothing)
        np.testing.assert_allclose(losses, expected.detach(), rtol=1e-5, atol=1e-6)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        np.testing.assert_allclose(gradient.double(), known.grad.double(), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_impossible_token_leaves_the_training_loss_finite(dtype):
    hidden, weight, bias, targets = (part[:33] for part in head_case(33, dtype))
    bias[5], targets = -INF, torch.where(targets[:33] == 5, 6, targets[:33])
    parts = [part.float().requires_grad_() for part in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(*parts), targets, reduction="sum")
    right = torch.autograd.grad(expected, parts)
    parts = [part.requires_grad_() for part in (hidden, weight, bias)]
    result = fused_loss.cross_entropy(*parts, targets)
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(result, parts), right):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_large_logits_equal_torch(dtype, smoothing):
    """Logits up to ±1e4, some of them close: a difference of 1 must not be lost in 10,000."""
    hidden = torch.tensor([[1e4], [-1e4], [1e4], [3.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [0.9999], [-1.0], [0.5], [-0.9999]], requires_grad=True)
    targets = torch.tensor([1, 4, 2, 0])
    logits = (hidden @ weight.to(dtype).T).float()
    for row in range(4):
        result = fused_loss.cross_entropy(
            hidden[row : row + 1], weight, None, targets[row : row + 1], smoothing
        )
        expected = F.cross_entropy(
            logits[row : row + 1], targets[row : row + 1], label_smoothing=smoothing
        )
        assert result.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for gradient in torch.autograd.grad(
        fused_loss.cross_entropy(hidden, weight, None, targets, smoothing), [hidden, weight]
    ):
        assert gradient.isfinite().all()


@needs_kernels
def test_a_target_outside_the_vocabulary_is_refused():
    for wrong in (-1, 5, IGNORED):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            fused_loss.cross_entropy(
                torch.ones(2, 3), torch.ones(5, 3), None, torch.tensor([0, wrong])
            )
