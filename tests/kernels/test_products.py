"""Products of rows in few shapes: the same numbers, whatever the number of rows."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmcli.config import ModelConfig
from lmcli.data.batches import Batch
from lmcli.kernels import fused_loss, products
from lmcli.kernels.fast_path import build_model
from lmcli.model.lora import Lora, put_on
from lmcli.model.memory import LOGIT_ROWS_AT_ONCE
from lmcli.model.transformer import Transformer
from lmcli.recipes import resolve
from lmcli.training.objectives import OBJECTIVES

ROWS = (257, 300, 1000, 1023, 1025, 1500, 2300, 3073)


def values(rows, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, generator=generator).bfloat16() for size in sizes]


@pytest.mark.parametrize("rows", (1, 256, 512, *ROWS))
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_float64(rows, bias, difference):
    """Within bfloat16's rounding, as F.linear's are."""
    x, dy = values(rows, 24, 40)
    matrix, offset = values(40, 24, 1, seed=1)
    offset = offset[:, 0] if bias else None
    results = []
    for linear, dtype in ((products.linear, torch.bfloat16), (F.linear, torch.float64)):
        given = [
            t if t is None else t.detach().clone().to(dtype).requires_grad_()
            for t in (x, matrix, offset)
        ]
        y = linear(given[0][None], *given[1:])[0]
        y.backward(dy.to(dtype))
        results.append([y.detach(), *(t.grad for t in given if t is not None)])
    for ours, exact in zip(*results):
        assert difference(ours, exact) < 6e-3


@pytest.fixture
def shapes(monkeypatch):
    """The products that a thread apart has made first."""
    monkeypatch.setattr(products, "SHAPES", set())
    return products.SHAPES


def test_many_numbers_of_rows_make_few_products(shapes):
    """Each of some 50 products of a step was a shape of its own; oneDNN keeps code for each."""
    for rows in range(301, 4096, 37):
        x, dy = values(rows, 24, 40)
        (matrix,) = values(24, 40)
        products.product(x, matrix)
        products.matrix_gradient(dy, x)
    counts = {shape[0] for shape in shapes if shape[1] == 24 and shape[4:6] == (24, 40)}
    assert len(shapes) == 2 * len(counts)
    # 8 between powers of two (the lowest octave begins at 301) and multiples of 256
    assert 8 < len(counts) <= 4 * 8


def test_rows_are_padded_to_few_numbers():
    padded = [products.padded_rows(rows) for rows in range(1, 5000)]
    waste = [more / rows - 1 for rows, more in enumerate(padded, 1)]
    assert min(waste) == 0 and max(waste[127:]) < 0.125 and sum(waste[1023:4095]) / 3072 < 0.05
    assert [products.padded_rows(rows) for rows in (1, 16, 17, 129, 1025, 2048, 2049)] == [
        *(16, 16, 32, 144, 1152, 2048, 2304)
    ]


def test_regular_rows_and_float32_are_left_alone(shapes):
    x, matrix = torch.randn(1000, 24), torch.randn(24, 40)
    assert torch.equal(products.product(x, matrix), x @ matrix) and not shapes
    assert products.regular(values(3 * 256, 24)[0]) and products.regular(values(23 * 256, 24)[0])
    assert not products.regular(values(4095, 24)[0]) and products.regular(x)


class Bfloat16Products(TorchDispatchMode):
    """Collects the sizes of all bfloat16 products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            factors = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if factors[0].dtype == torch.bfloat16:
                self.sizes.add((name, *(tuple(x.shape) for x in factors)))
        return function(*args, **(kwargs or {}))


SIZES = {
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
ENCODER = {
    "num_encoder_layers": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def decoder() -> tuple[Transformer, str]:
    return build_model(ModelConfig(**SIZES, tie_word_embeddings=False).complete()), "causal"


def encoder_decoder() -> tuple[Transformer, str]:
    config = dataclasses.replace(resolve("seq2seq-small").model, **SIZES, **ENCODER)
    return build_model(config.complete()), "seq2seq"


def adapters(make, *targets):
    def adapted():
        model, objective = make()
        put_on(model, Lora(4, 8.0, 0.1, targets))
        return model, objective

    return adapted


LORA = [adapters(decoder, "all", "head"), adapters(encoder_decoder, "all")]


@pytest.mark.parametrize("make", [decoder, encoder_decoder, *LORA])
def test_batches_of_many_shapes_train_by_products_of_few(make, shapes):
    """Forty batches of other rows and lengths; each made some 30 shapes of its own before."""
    model, objective = make()
    model.train().set_training_dtype(torch.bfloat16)
    generator = np.random.default_rng(0)
    rows = set()
    with Bfloat16Products() as made:
        for _ in range(40):
            ids = generator.integers(5, 50, (generator.integers(8, 60), generator.integers(5, 40)))
            rest = ids.size % LOGIT_ROWS_AT_ONCE  # of the loss, which takes so many at once
            rows |= {ids.size, *map(products.padded_rows, (ids.size, rest))}
            decoder_ids = ids if objective == "seq2seq" else None
            batch = Batch(ids, ids, decoder_ids=decoder_ids)
            OBJECTIVES[objective].loss(model, batch).backward()
    padded = {n for n in rows if n == products.padded_rows(n) or not n % 256}
    assert {name for name, _, _ in made.sizes} <= {"mm", "addmm", "addmm_"}  # not in attention
    assert {max(*a, *b) for _, a, b in made.sizes} <= padded and len(padded) < 30
    made_first = {max(shape[0], shape[1]) for shape in shapes}
    assert made_first <= padded and 200 < len(shapes) < 600


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_irregular_rows_is_that_of_float64(rows, smoothing, difference):
    hidden, weight = values(rows, 24)[0], values(500, 24, seed=1)[0]
    targets = torch.arange(rows) % 500
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [t.clone().to(dtype).requires_grad_() for t in (hidden, weight)]
        if dtype == torch.bfloat16:
            loss = fused_loss.cross_entropy(*given, None, targets, smoothing)
        else:
            logits = F.linear(*given)
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        loss.backward()
        results.append([loss.detach()[None], *(t.grad for t in given)])
    for ours, exact in zip(*results):
        assert difference(ours, exact) < 1e-2
