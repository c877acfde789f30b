"""All objectives against the losses of transformers' models, and their figures by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lmcli.checkpoints.config_json import write_config
from lmcli.config import ModelConfig
from lmcli.data.batches import IGNORED, Batch
from lmcli.kernels.fast_path import build_model
from lmcli.model.transformer import Transformer
from lmcli.recipes import resolve
from lmcli.storage import write_tensors, write_text
from lmcli.training.objective import TargetFigures, evaluate
from lmcli.training.objectives import OBJECTIVES

SIZES = {
    "vocab_size": 53,
    "max_position_embeddings": 24,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_encoder_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def both(randomize, tmp_path):
    """both(preset, **options): a random model of ours and the same in transformers."""
    import dataclasses
    import json

    import transformers

    from lmcli.checkpoints.config_json import family_of
    from lmcli.checkpoints.weights import file_tensors

    def make(preset, **options) -> tuple[Transformer, torch.nn.Module]:
        config = dataclasses.replace(resolve(preset).model, **{**SIZES, **options}).complete()
        ours = randomize(build_model(config))
        write_text(tmp_path / "config.json", json.dumps(write_config(config, "float32")))
        write_tensors(tmp_path / "model.safetensors", file_tensors(ours, family_of(config)))
        kind = getattr(transformers, family_of(config).heads[config.head])
        return ours, kind.from_pretrained(tmp_path).eval()

    return make


def ids(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 53, size=(rows, width))


@torch.no_grad()
def test_masked_loss_is_that_of_transformers(both):
    ours, theirs = both("encoder-small")
    targets = np.where(np.random.default_rng(1).random((3, 11)) < 0.3, ids(3, 11), IGNORED)
    batch = Batch(ids(3, 11, 2), targets)
    expected = theirs(input_ids=torch.from_numpy(batch.ids), labels=torch.from_numpy(targets)).loss
    assert OBJECTIVES["masked"].loss(ours, batch).item() / batch.count == pytest.approx(
        expected.item(), rel=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("preset", ["seq2seq-small", "transformer-2017"])
def test_seq2seq_loss_is_that_of_transformers(preset, both):
    ours, theirs = both(preset, decoder_start_token_id=0)
    targets = ids(3, 7, 3)
    targets[1, 4:] = IGNORED
    token_mask = np.ones((3, 9), dtype=bool)
    token_mask[2, 5:] = False
    inputs = np.concatenate(
        [np.zeros((3, 1), dtype=np.int64), np.where(targets == IGNORED, 0, targets)[:, :-1]], axis=1
    )
    batch = Batch(np.where(token_mask, ids(3, 9, 4), 0), targets, token_mask, inputs)
    expected = theirs(
        input_ids=torch.from_numpy(batch.ids),
        attention_mask=torch.from_numpy(token_mask).long(),
        labels=torch.from_numpy(targets),
    ).loss
    assert OBJECTIVES["seq2seq"].loss(ours, batch).item() / batch.count == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert batch.tokens == 23 + 18


@torch.no_grad()
def test_classification_loss_is_that_of_transformers(both):
    ours, theirs = both("encoder-small", head="sequence", labels=("a", "b", "c"), head_bias=False)
    token_mask = np.arange(9) < np.array([[9], [4], [6]])
    batch = Batch(np.where(token_mask, ids(3, 9), 0), np.array([2, 0, 1]), token_mask)
    expected = theirs(
        input_ids=torch.from_numpy(batch.ids),
        attention_mask=torch.from_numpy(token_mask).long(),
        labels=torch.from_numpy(batch.targets),
    ).loss
    assert OBJECTIVES["classification"].loss(ours, batch).item() / 3 == pytest.approx(
        expected.item(), rel=1e-5
    )


@torch.no_grad()
def test_mean_pooling_is_that_of_transformers(both):
    ours, theirs = both("classify", head="sequence", labels=("a", "b", "c"), head_bias=False)
    token_mask = torch.from_numpy(np.arange(9) < np.array([[9], [4], [6]]))
    read = torch.where(token_mask, torch.from_numpy(ids(3, 9)), 0)
    torch.testing.assert_close(
        ours(read, token_mask), theirs(input_ids=read, attention_mask=token_mask.long()).logits
    )
    torch.testing.assert_close(ours(read), theirs(input_ids=read).logits)
    assert theirs.config.classifier_pooling == "mean"


@torch.no_grad()
def test_multi_label_loss_is_that_of_transformers(both):
    ours, theirs = both(
        "encoder-small", head="sequence", labels=("a", "b", "c"), head_bias=False, multi_label=True
    )
    batch = Batch(
        ids(4, 9), np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=np.float32)
    )
    expected = theirs(input_ids=torch.from_numpy(batch.ids), labels=torch.from_numpy(batch.targets))
    actual = OBJECTIVES["classification"].loss(ours, batch).item()
    assert actual / 12 == pytest.approx(
        expected.loss.item(), rel=1e-5
    )  # theirs is a mean over labels as well
    figures = evaluate(
        OBJECTIVES["classification"], ours, [batch], TargetFigures("text", metric="accuracy")
    )
    assert (figures.targets, figures.loss) == (4, pytest.approx(3 * expected.loss.item(), rel=1e-5))
    assert (
        figures.correct
        == ((expected.logits > 0) == (torch.from_numpy(batch.targets) > 0)).all(-1).sum().item()
    )
    assert figures.criterion == 1 - figures.correct / 4


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_key_norm": False, "num_key_value_heads": 1},
        {
            "positions": "learned",
            "norm": "layer",
            "hidden_act": "gelu_new",
            "gated_mlp": False,
            "attention_bias": "all",
            "mlp_bias": True,
            "query_key_norm": False,
        },
    ],
    ids=["qwen3", "llama", "gpt2"],
)
def test_masked_documents_have_the_hidden_states_of_each_alone(options, randomize):
    """One packed row against separate rows, by the kernels and by plain PyTorch."""
    model = randomize(
        build_model(ModelConfig(**{**SIZES, "num_attention_heads": 2, **options}).complete())
    )
    row = ids(1, 22)
    starts = [0, 5, 6, 13, 22]
    document_start = np.concatenate(
        [np.full(last - first, first) for first, last in pairwise(starts)]
    )[None]
    actual = model.hidden(torch.from_numpy(row), document_start=torch.from_numpy(document_start))[0]
    separate = torch.cat(
        [model.hidden(torch.from_numpy(row[:, first:last]))[0] for first, last in pairwise(starts)]
    )
    torch.testing.assert_close(actual, separate, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        trained = (
            model.train()
            .requires_grad_()
            .hidden(torch.from_numpy(row), document_start=torch.from_numpy(document_start))[0]
        )
    torch.testing.assert_close(trained.detach(), separate, rtol=1e-4, atol=1e-4)
    joint = model.hidden(torch.from_numpy(row))[0]
    assert (joint - separate)[starts[1] :].abs().max() > 0.01


@torch.no_grad()
def test_span_loss_is_that_of_transformers(both):
    ours, theirs = both("encoder-small", head="span", head_bias=False)
    token_mask = np.arange(9) < np.array([[9], [6], [4]])
    batch = Batch(
        np.where(token_mask, ids(3, 9), 0),
        np.array([[2, 5], [0, 0], [3, 3]]),
        token_mask,
        types=np.ones((3, 9), dtype=np.int64),
    )
    starts, ends = torch.from_numpy(batch.targets).T
    expected = theirs(
        input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(token_mask).long()
    )
    allowed = torch.from_numpy(token_mask)
    each = [
        torch.nn.functional.cross_entropy(logits.masked_fill(~allowed, -torch.inf), positions)
        for logits, positions in ((expected.start_logits, starts), (expected.end_logits, ends))
    ]
    batch.candidates = token_mask
    assert batch.count == 6 and batch.tokens == 19
    for smoothing in (0.0, 0.1):  # which is for words
        actual = OBJECTIVES["span"].loss(ours, batch, smoothing).item() / batch.count
        assert actual == pytest.approx(sum(each).item() / 2, rel=1e-5)
    figures = evaluate(OBJECTIVES["span"], ours, [batch], TargetFigures("position"))
    correct = [
        (logits.masked_fill(~allowed, -torch.inf).argmax(-1) == positions).sum().item()
        for logits, positions in ((expected.start_logits, starts), (expected.end_logits, ends))
    ]
    assert figures.targets == 6 and figures.correct == sum(correct)
    assert figures.criterion == pytest.approx(actual, rel=1e-5)


def test_label_smoothing_is_that_of_torch():
    model = build_model(ModelConfig(**{**SIZES, "num_attention_heads": 2}).complete())
    model.initialize(0)
    rows = ids(2, 9)
    batch = Batch(rows[:, :-1], rows[:, 1:])
    actual = OBJECTIVES["causal"].loss(model, batch, smoothing=0.2)
    logits = model(torch.from_numpy(batch.ids))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        torch.from_numpy(batch.targets).flatten(),
        reduction="sum",
        label_smoothing=0.2,
    )
    torch.testing.assert_close(actual, expected)


def test_figures_do_not_count_the_closing_token():
    model = build_model(ModelConfig(**{**SIZES, "num_attention_heads": 2}).complete())
    model.initialize(0)
    rows = ids(4, 9)
    rows[:, -1] = 1
    batch = Batch(rows[:, :-1], rows[:, 1:])
    figures = evaluate(
        OBJECTIVES["causal"],
        model.eval(),
        [batch, batch],
        TargetFigures("token", end=1, bytes=100, entropy=2.0),
    )
    assert figures.targets == 2 * 4 * 7
    logprobs = model(torch.from_numpy(batch.ids)).log_softmax(-1)[:, :-1]
    targets = torch.from_numpy(batch.targets)[:, :-1, None].contiguous()
    total = 2 * logprobs.gather(-1, targets).sum().item()
    assert figures.logprob == pytest.approx(total, rel=1e-5)
    assert figures.criterion == pytest.approx(-total / 56, rel=1e-5)
    assert figures.bits_per_byte == pytest.approx(-total / math.log(2) / 100, rel=1e-5)
    assert figures.correct == 2 * int((logprobs.argmax(-1) == targets[..., 0]).sum())
    assert "nats/token" in figures.headline() and figures.metrics()["val_unigram_entropy"] == 2.0
