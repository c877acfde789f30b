"""The compiled functions compared with plain PyTorch: values and gradients.

In float32 both agree; in bfloat16 both are equally close to float64. NaN and infinity are never
hidden.
"""

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data.batches import IGNORED, Batch
from lmcli.kernels import build, calls, fused_block, fused_loss
from lmcli.kernels import causal_attention as kernel_attention
from lmcli.kernels.causal_attention import BlockShape, causal_attention
from lmcli.kernels.dropout import dropped_sum
from lmcli.kernels.fast_path import build_model
from lmcli.kernels.fused_block import BlockWeights
from lmcli.model.attention import attention
from lmcli.model.layers import rotate
from lmcli.model.likelihood import target_losses
from lmcli.model.transformer import Transformer
from lmcli.recipes import resolve
from lmcli.training import optimizers
from lmcli.training.objectives import OBJECTIVES

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories.txt"


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Skips without a compiler; with one, the kernels must work."""
    reason = build.problem()
    if reason == "LM_KERNELS=0" or reason.startswith(("not built", "no C compiler")):
        pytest.skip(reason)
    assert not reason


@contextmanager
def plain_layers():
    """Inside, models compute as without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "usable", lambda x: False)
        yield


# Each function and the same in plain PyTorch, on the same tensors


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return fused_block.rms_norm(x, weight, 1e-6)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)


def plain_gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return function


def angles(positions: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turned = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(
        0, 1, width // 2
    )  # (T, D/2)
    return turned.cos().to(dtype), turned.sin().to(dtype)


def plain_split(shape: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    rows, read, heads, keys, width = shape

    def split_heads(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parts = list(x.view(rows, read, -1, width).split([heads, keys, keys], dim=2))
        for i, weight in enumerate(weights):
            parts[i] = plain_rms_norm(parts[i], weight)
        query, key, value = (part.transpose(1, 2) for part in parts)
        cos, sin = (
            torch.cat([part, part], dim=-1)[None, None] for part in angles(read, width, x.dtype)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    return split_heads


def plain_causal(
    query: Tensor, key: Tensor, value: Tensor, document_start: Tensor | None = None
) -> Tensor:
    key, value = (
        part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value)
    )
    mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    if document_start is not None:
        mask = mask & (torch.arange(len(mask)) >= document_start[:, :, None])[:, None]
    return attention(query, key, value, mask)


def first_seen(rows: int, read: int) -> Tensor:
    """(B, T): two documents in each row, with different borders."""
    return torch.stack(
        [
            torch.where(torch.arange(read) < begin, 0, begin)
            for begin in (torch.arange(rows) * 5 + 2) % read
        ]
    )


def block(
    shape: tuple[int, ...], dropout: float = 0.0, documents: bool = False
) -> Callable[..., Tensor]:
    """`fused_block.block` of x, two norms, seven matrices and perhaps two norms of heads."""
    rows, read, heads, keys, width = shape

    def function(
        x: Tensor,
        norm1: Tensor,
        norm2: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *head_norms: Tensor,
    ) -> Tensor:
        sizes = BlockShape(rows, read, heads, keys, width, width**-0.5, 1e-6, 1e-6, dropout)
        norms = (norm1, norm2, *(head_norms or (None, None)))
        weights = BlockWeights(*norms, query, key, value, output, gate, up, down)
        return fused_block.block(
            x,
            sizes,
            angles(read, width, torch.float32),
            weights,
            first_seen(rows, read) if documents else None,
        )

    return function


def plain_block(shape: tuple[int, ...], documents: bool = False) -> Callable[..., Tensor]:
    document_start = first_seen(*shape[:2]) if documents else None

    def function(
        x: Tensor,
        norm1: Tensor,
        norm2: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *head_norms: Tensor,
    ) -> Tensor:
        products = F.linear(plain_rms_norm(x, norm1), torch.cat([query, key, value]).to(x.dtype))
        mixed = (
            plain_causal(*plain_split(shape)(products, *head_norms), document_start)
            .transpose(1, 2)
            .reshape(len(x), -1)
        )
        x = x + F.linear(mixed, output.to(x.dtype))
        inner = plain_gated(F.silu)(
            F.linear(plain_rms_norm(x, norm2), torch.cat([gate, up]).to(x.dtype))
        )
        return x + F.linear(inner, down.to(x.dtype))

    return function


def wanted_words(rows: int, words: int) -> Tensor:
    return torch.arange(rows) * 7 % words


def loss(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    def summed(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused_loss.cross_entropy(
            hidden, weight, bias, wanted_words(len(hidden), len(weight)), smoothing
        )

    return summed


def plain_loss(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    def summed(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def logits_of(rows: Tensor) -> Tensor:
            return F.linear(
                rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
            )

        if hidden.dtype == torch.float64:  # the reference: target_losses would round to float32
            logits = logits_of(hidden)
            return F.cross_entropy(
                logits, wanted_words(*logits.shape), label_smoothing=smoothing, reduction="sum"
            )
        return target_losses(
            hidden, logits_of, wanted_words(len(hidden), len(weight)), smoothing
        ).sum()

    return summed


@dataclasses.dataclass
class Case:
    """A function, the plain one, and shapes of their inputs: activations, then float32 weights."""

    name: str
    function: Callable
    plain: Callable
    activations: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...], ...] = ()

    def inputs(self, dtype: torch.dtype, weight_dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The same numbers in every dtype, exact in bfloat16; weights are a quarter as large."""
        generator = torch.Generator().manual_seed(1)
        kinds = [(shape, dtype, 1.0) for shape in self.activations] + [
            (shape, weight_dtype, 0.25) for shape in self.weights
        ]
        return [
            (size * torch.randn(shape, generator=generator).bfloat16().to(kind)).requires_grad_()
            for shape, kind, size in kinds
        ]


def block_case(
    rows: int,
    read: int,
    heads: int,
    keys: int,
    width: int,
    normed: bool,
    hidden: int = 9,
    inner: int = 7,
    documents: bool = False,
) -> Case:
    shape, queries = (rows, read, heads, keys, width), heads * width
    weights = (
        (hidden,),
        (hidden,),
        (queries, hidden),
        (keys * width, hidden),
        (keys * width, hidden),
        (hidden, queries),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    )
    name = f"block {shape}, {hidden}, {inner}{', normed' * normed}{', documents' * documents}"
    return Case(
        name,
        block(shape, documents=documents),
        plain_block(shape, documents),
        ((rows * read, hidden),),
        weights + ((width,), (width,)) * normed,
    )


CASES = [
    *(
        Case(f"rms_norm {rows} x {size}", rms_norm, plain_rms_norm, ((rows, 2, size),), ((size,),))
        for rows, size in ((3, 3), (33, 17), (5, 64), (70, 100))
    ),
    *(
        block_case(2, 5, heads, keys, width, normed)
        for width, normed in product((2, 32, 34, 64, 128), (False, True))
        for heads, keys in ((3, 3), (4, 2))
    ),
    *(
        block_case(1, read, 2, 2, width, read % 2 == 0)
        for read, width in ((1, 8), (128, 34), (129, 32), (300, 6))
    ),
    block_case(1, 2, 1, 1, calls.WIDEST_HEAD, True),
    block_case(3, 11, 2, 1, 6, True, hidden=64, inner=96),
    block_case(1, 1100, 1, 1, 4, False),  # longer than the buffer
    *(
        block_case(rows, read, 4, 2, 6, True, documents=True)
        for rows, read in ((3, 7), (2, 130), (1, 1100))
    ),
    *(
        Case(
            f"gated {name}, {rows} x {size}",
            partial(fused_block.gated, curve=curve),
            plain_gated(activation),
            ((rows, 3, 2 * size),),
        )
        for name, curve, activation in (
            ("SiLU", fused_block.SILU, F.silu),
            ("GELU", fused_block.GELU_TANH, partial(F.gelu, approximate="tanh")),
        )
        for rows, size in ((1, 1), (30, 70))
    ),
    *(
        Case(
            f"cross_entropy {rows} x {words}, smoothing {smoothing}{', biased' * biased}",
            loss(smoothing),
            plain_loss(smoothing),
            ((rows, 9),),
            ((words, 9), (words,))[: 1 + biased],
        )
        for rows, words in ((1, 1), (35, 37), (1030, 50))
        for smoothing in (0.0, 0.1)
        for biased in (False, True)
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def value_and_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """All outputs, then the gradient of every input for a random gradient of the outputs."""
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(2)
    above = [
        torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
        if out.ndim
        else torch.full_like(out, 1 / 1500)
        for out in outputs
    ]  # a loss is divided by a count, which is not exact in bfloat16
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, above)]


def distance(results: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖ in float64; ‖result‖ if `exact` is 0."""
    assert results.shape == exact.shape
    return ((results.double() - exact.double()).norm() / (exact.double().norm() or 1.0)).item()


@each_case
def test_float32_equals_the_plain_functions(case):
    inputs = case.inputs(torch.float32)
    results, expected = (
        value_and_gradients(case.function, inputs),
        value_and_gradients(case.plain, inputs),
    )
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) < 1e-5


@each_case
def test_bfloat16_is_as_exact_as_the_plain_functions(case):
    exact = value_and_gradients(case.plain, case.inputs(torch.float64, torch.float64))
    inputs = case.inputs(torch.bfloat16)
    results, plain = (
        value_and_gradients(case.function, inputs),
        value_and_gradients(case.plain, inputs),
    )
    assert [ours.dtype for ours in results] == [theirs.dtype for theirs in plain]
    errors = [
        [distance(part, true) for part, true in zip(parts, exact, strict=True)]
        for parts in (results, plain)
    ]
    assert max(errors[0]) < 0.05
    assert (
        np.linalg.norm(errors[0]) <= 1.5 * np.linalg.norm(errors[1]) + 1e-6
    )  # all together: the rounding of a small tensor is luck


@each_case
def test_gradients_equal_finite_differences(case):
    assert gradcheck(case.function, case.inputs(torch.float64, torch.float64), fast_mode=True)


@pytest.mark.parametrize("read", [5, 129, 300])
def test_weights_computed_again_give_the_same_gradient(read, monkeypatch):
    case = block_case(1, read, 2, 1, 6, True)
    expected = value_and_gradients(case.function, case.inputs(torch.float32))
    monkeypatch.setattr(kernel_attention, "KEPT_WEIGHTS", 4)
    for again, first in zip(
        value_and_gradients(case.function, case.inputs(torch.float32)), expected, strict=True
    ):
        assert torch.equal(again, first)


def test_the_gradient_has_the_mask_of_dropout():
    def dropped(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return block((2, 5, 2, 1, 6), dropout=0.4)(*inputs)

    case = block_case(2, 5, 2, 1, 6, True)
    assert gradcheck(dropped, case.inputs(torch.float64, torch.float64), fast_mode=True)
    inputs = case.inputs(torch.float32)
    torch.manual_seed(4)
    assert not torch.equal(
        dropped(*inputs), block((2, 5, 2, 1, 6), dropout=0.4)(*inputs)
    )  # another seed, another mask


def test_a_sum_with_dropout_and_its_gradient():
    def summed(residual: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropped_sum(residual, x, 0.25)

    residual, x = (torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(summed, (residual, x))
    added = ((summed(residual, x) - residual) / x).detach()
    assert sorted(set(added.flatten().round(decimals=9).tolist())) == pytest.approx([0, 1 / 0.75])
    assert not torch.equal(summed(residual, x), dropped_sum(residual, x, 0.25))  # another mask


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_is_random(share):
    """The right share of 400,000 numbers is kept, in each row and column.

    Neighbors and seeds are independent.
    """
    x, masks = torch.ones(500, 800), []
    for seed in (1, 2):
        y = torch.empty_like(x)
        calls.run(
            "dropout",
            torch.float32,
            x,
            None,
            y,
            *x.shape,
            seed,
            round((1 - share) * 2**32),
            1 / (1 - share),
        )
        assert y[y > 0].unique().tolist() == pytest.approx([1 / (1 - share)])
        masks.append((y > 0).double())
    first, second = masks
    assert first.mean().item() == pytest.approx(
        1 - share, abs=4 * (share * (1 - share) / 4e5) ** 0.5
    )
    for axis in (0, 1):
        spread = (share * (1 - share) / first.shape[axis]) ** 0.5
        assert first.mean(axis).std().item() == pytest.approx(spread, rel=0.15)
    centered = [part - part.mean() for part in (first, second)]
    for one, other in (
        (centered[0][:, 1:], centered[0][:, :-1]),
        (centered[0][1:], centered[0][:-1]),
        centered,
    ):
        assert abs((one * other).mean().item()) < 5 * share * (1 - share) / 4e5**0.5


def test_no_rows():
    for case in (
        Case("", rms_norm, plain_rms_norm, ((0, 17),), ((17,),)),
        Case("", loss(0.1), plain_loss(0.1), ((0, 9),), ((37, 9),)),
    ):
        for gradient in value_and_gradients(case.function, case.inputs(torch.float32)):
            assert not gradient.any()


# NaN and infinity

SMALL_CASES = [case for case in CASES if all(np.prod(shape) < 1000 for shape in case.activations)]


def all_finite(outputs: Tensor | tuple[Tensor, ...]) -> bool:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return all(bool(output.isfinite().all()) for output in outputs)


def test_nan_and_infinity_are_never_hidden():
    """At the ends of a row of every input and of its vectors, which hold 4 to 16 numbers."""
    hidden = []
    bad_values = (float("nan"), float("inf"), float("-inf"))
    for case, dtype in product(SMALL_CASES, (torch.float32, torch.bfloat16)):
        inputs = [tensor.detach() for tensor in case.inputs(dtype)]
        for i, tensor in enumerate(inputs):
            row = tensor.view(-1, tensor.shape[-1])[0]
            ends = {0, 3, 4, 15, 16, 31, 32, len(row) - 1} & set(range(len(row)))
            for at, bad in product(sorted(ends), bad_values):
                number = row[at].item()
                row[at] = bad
                finite = all_finite(case.function(*inputs))
                # torch's loss is finite as well where only another token is impossible
                hides = finite and not all_finite(case.plain(*inputs))
                row[at] = number
                if hides:
                    hidden.append(f"{case.name}, {dtype}, input {i}, position {at}: {bad}")
    assert not hidden


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_nan_in_the_gradient_reaches_every_activation(case):
    inputs = case.inputs(torch.float32)
    outputs = case.function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    above = [torch.full_like(out, float("nan")) for out in outputs]
    for gradient in torch.autograd.grad(outputs, inputs, above):
        assert gradient.isnan().all()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-14)]
)
@pytest.mark.parametrize(
    ("keys", "read", "seen", "width"),
    [
        (4, 1, 1, 16),
        (4, 24, 24, 64),
        (2, 130, 130, 8),
        (1, 599, 600, 16),
        (2, 7, 100, 80),
        (4, 65, 65, 1),
        (1, 6, 64, 128),
    ],
)
@torch.no_grad()
def test_causal_attention_without_a_gradient(keys, read, seen, width, dtype, bound, difference):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length in ((4, read), (keys, seen), (keys, seen))
    )
    mask = torch.ones(seen, seen, dtype=torch.bool).tril()[seen - read :]
    expected = attention(
        query.double(),
        *(part.double().repeat_interleave(4 // keys, 1) for part in (key, value)),
        mask,
    )
    for strided in (
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        results = causal_attention(strided(query), strided(key), strided(value), width**-0.5)
        assert results.dtype == dtype and difference(results, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_gelu_in_place(dtype):
    x = torch.tensor(
        [-1e4, -100, *np.linspace(-12, 12, 4001), 100, 1e4, float("nan")], dtype=dtype
    )[None].repeat(3, 1)
    expected = F.gelu(x.double(), approximate="tanh")
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-13}[dtype]
    assert fused_block.gelu_tanh_(x) is x
    np.testing.assert_allclose(x.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("activation", fused_block.CURVES, ids=["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_far_from_zero_equal_torch(activation, dtype):
    """Their squares and cubes are infinite; in a vector of the processor and after it."""
    sizes = torch.tensor([50.0, 88.5, 100.0, 1e4, 1e5, 1e10, 1e13, 1e20, 1e38])
    gate, up = torch.cat([sizes, -sizes]).to(dtype), torch.full((18,), 2.0, dtype=dtype)
    right = gate.float().clone().requires_grad_()
    expected = activation(right) * 2
    expected.sum().backward()
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    close = partial(np.testing.assert_allclose, rtol=rounding, atol=1e-25)
    gate_up = torch.cat([gate, up])[None].requires_grad_()
    result = fused_block.gated(gate_up, fused_block.CURVES[activation])
    result.sum().backward()
    close(result[0].detach().float(), expected.detach())
    known = right.grad.isfinite()  # torch's own gradient of GELU is NaN from 1e20
    close(gate_up.grad[0, :18][known].float(), right.grad[known])
    assert gate_up.grad.isfinite().all()
    close(gate_up.grad[0, 18:].float(), expected.detach() / 2)
    if activation is not F.silu:
        close(fused_block.gelu_tanh_(gate.clone()[None])[0].float(), expected.detach() / 2)


@torch.no_grad()
def test_attention_with_large_scores_equals_torch(difference):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(100 * query, 100 * key, value, is_causal=True)
    assert difference(causal_attention(100 * query, 100 * key, value, 0.25), expected) < 1e-5
    query[0, 1, 30] = float("nan")
    assert causal_attention(query, key, value, 0.25).isnan().any(-1).nonzero().tolist() == [
        [0, 1, 30]
    ]


# Threads


def kernel_results() -> list[Tensor]:
    """Results of kernels for fixed inputs, without matrix products."""
    (norm,) = (case for case in CASES if case.name == "rms_norm 70 x 100")
    results = value_and_gradients(norm.function, norm.inputs(torch.bfloat16))
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        scores, gradient, logits = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((3, 50, 80), (3, 50, 80), (70, 133))
        )
        losses = torch.empty(70)
        calls.run("causal_softmax", dtype, scores, None, *scores.shape, 30, 3, 80, 0.3)
        calls.run("causal_softmax_backward", dtype, scores, gradient, *scores.shape, 30, 0.3)
        calls.run(
            "smoothed_cross_entropy",
            dtype,
            logits,
            wanted_words(70, 133),
            losses,
            *logits.shape,
            0.1,
        )
        results += [scores, gradient, logits, losses]
    return results


def test_results_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(kernel_results())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# Whole models


def step(
    model: Transformer, batch: Batch, objective: str = "causal"
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch, in nats per target."""
    model.zero_grad()
    loss = OBJECTIVES[objective].loss(model.train(), batch) / max(batch.count, 1)
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def flattened(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def random_ids(rows: int, read: int, words: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(5, words, size=(rows, read))


def decoder(randomize, **options) -> Transformer:
    sizes = {
        "vocab_size": 50,
        "max_position_embeddings": 200,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 70,
    }
    return randomize(build_model(ModelConfig(**{**sizes, **options}).complete()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_key_norm": False},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "query_key_norm": False},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
        {"head_dim": 10},
        {"norm_eps": 0},
        {"attention_bias": "all"},
        {"sliding_window": 20},
        {"mlp_bias": True},
        {"rotary_fraction": 0.5},
    ],
    ids=str,
)
def test_a_decoder_has_the_loss_and_gradients_of_a_plain_one(options, randomize):
    model, ids = decoder(randomize, **options), random_ids(2, 151)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    loss, gradients = step(model, batch)
    with plain_layers():
        plain_loss, expected = step(model, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert distance(flattened(gradients), flattened(expected)) < 1e-5
    for name, gradient in gradients.items():
        assert distance(gradient, expected[name]) < 3e-5, (
            name
        )  # norms of queries: small differences of large numbers


def test_which_kernels_run_in_training_and_scoring(randomize, monkeypatch):
    model, ids, ran = decoder(randomize), random_ids(1, 9), []
    run = calls.run
    monkeypatch.setattr(
        calls, "run", lambda name, *arguments: ran.append(name) or run(name, *arguments)
    )
    step(model, Batch(ids[:, :-1], ids[:, 1:]))
    both = ("rms_norm", "gated", "split_heads", "causal_softmax")
    assert set(ran) == {
        *both,
        *(f"{name}_backward" for name in both),
        "join_heads",
        "cross_entropy",
    }
    ran.clear()
    with torch.no_grad():
        model(torch.from_numpy(ids))
    assert set(ran) == {"rms_norm", "gated", "split_heads", "attention"}


def test_too_wide_heads_use_pytorch(randomize, monkeypatch):
    model = decoder(
        randomize, num_attention_heads=2, head_dim=calls.WIDEST_HEAD + 2, num_hidden_layers=1
    )
    ids = random_ids(1, 6)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    monkeypatch.setattr(fused_block, "block", None)
    loss, gradients = step(model, batch)
    with plain_layers():
        plain_loss, expected = step(model, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert distance(flattened(gradients), flattened(expected)) < 1e-5


def other_shapes() -> dict[str, tuple[str, Batch]]:
    ids, targets = random_ids(3, 11), random_ids(3, 11) * 3 % 50
    chosen = np.random.default_rng(1).random((3, 11)) < 0.4
    real = np.arange(11) < np.array([[11], [7], [3]])
    hidden = Batch(ids, np.where(chosen & real, targets, IGNORED), real)
    paired = Batch(ids, np.where(real, targets, IGNORED), real, random_ids(3, 11))
    return {
        "encoder-small": ("masked", hidden),
        "seq2seq-small": ("seq2seq", paired),
        "transformer-2017": ("seq2seq", paired),
    }


@pytest.mark.parametrize("preset", ["encoder-small", "seq2seq-small", "transformer-2017"])
def test_other_shapes_train_in_bfloat16_as_in_float32(preset, randomize):
    sizes = {
        "vocab_size": 50,
        "max_position_embeddings": 24,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_encoder_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    model = randomize(build_model(dataclasses.replace(resolve(preset).model, **sizes).complete()))
    objective, batch = other_shapes()[preset]
    (loss, exact), (half_loss, half) = in_both_precisions(model, batch, objective)
    with plain_layers():
        (plain_loss, plain), (_, half_plain) = in_both_precisions(model, batch, objective)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert distance(exact, plain) < 1e-5
    assert half_loss == pytest.approx(loss, rel=0.01)
    assert distance(half, exact) < 1.5 * distance(half_plain, exact) < 0.4  # NaN fails as well


def in_both_precisions(
    model: Transformer, batch: Batch, objective: str
) -> list[tuple[float, Tensor]]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model.set_training_dtype(dtype)
        loss, gradients = step(model, batch, objective)
        results.append((loss, flattened(gradients)))
    return results


def test_a_batch_without_a_masked_token_has_no_loss(randomize):
    config = dataclasses.replace(
        resolve("encoder-small").model,
        vocab_size=50,
        max_position_embeddings=24,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
    )
    model = randomize(build_model(config.complete()))
    loss, gradients = step(model, Batch(random_ids(2, 11), np.full((2, 11), IGNORED)), "masked")
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def losses_of_training(ids: np.ndarray, dtype: torch.dtype, steps: int = 60) -> np.ndarray:
    config = ModelConfig(
        vocab_size=400,
        max_position_embeddings=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        query_key_norm=True,
    )
    model = build_model(config.complete()).train()
    model.initialize(0)
    model.set_training_dtype(dtype)
    optimizer = optimizers.build(model, TrainConfig(learning_rate=0.01))
    results = []
    for rows in np.resize(ids, (steps, 8, 65)):
        loss, _ = step(model, Batch(rows[:, :-1], rows[:, 1:]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append(loss)
    return np.array(results)


def test_training_in_bfloat16_goes_as_in_float32(small_tokenizer):
    """On real text, the same batches: losses, smoothed over ten steps, differ by at most 1 %."""
    ids = np.array(small_tokenizer.encode(STORIES.read_text(encoding="utf-8")[:90_000]))
    exact, half = (losses_of_training(ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact[-10:].mean() < 0.75 * exact[:2].mean()  # it learns
    window = np.ones(10) / 10
    assert np.convolve(half, window, "valid") == pytest.approx(
        np.convolve(exact, window, "valid"), rel=0.01
    )
