"""Prefixes, masked tokens, targets of a source, alternatives, and choices."""

import math

import numpy as np
import pytest
import torch

from lmcli.scoring import token_logprobs
from lmcli.scoring.scorer import Score as Figures
from lmcli.scoring.scorer import ScoringInput, choose

LINES = ["The old dog slept.", "", "The cat", " and the baker went home", "é 🙂 café", "a" * 12]


@pytest.mark.parametrize(
    "prefix", ["Once upon a time there was a man who ", "Once", "The old dog", "日本"], ids=repr
)
def test_a_prefix_is_context_only_whether_shared_or_not(prefix, scorer, monkeypatch):
    lm = scorer()
    whole, alone = lm.score([prefix + line for line in LINES]), lm.score([prefix])[0]
    results = lm.score([ScoringInput(line, prefix) for line in LINES])
    monkeypatch.setattr(token_logprobs, "WORTH_SHARING", 10**9)
    apart = lm.score([ScoringInput(line, prefix) for line in LINES])
    for line, score, one, other in zip(LINES, results, apart, whole, strict=True):
        assert (score.tokens, score.bytes) == (one.tokens, one.bytes) and score.bytes == len(
            line.encode()
        )
        assert score.logprob == pytest.approx(one.logprob, abs=1e-4)
        ids, before = lm.tokenizer.encode(prefix + line), lm.tokenizer.encode(prefix)
        if (
            ids[: len(before)] == before and len(ids) < 32
        ):  # no token over the border, one window: the chain rule holds
            assert score.logprob == pytest.approx(other.logprob - alone.logprob, abs=1e-4)


def test_a_shared_prefix_is_read_once(scorer, monkeypatch):
    lm, read = scorer(), []
    prefix = "Once upon a time there was a man who"
    plain = type(lm.model).hidden
    monkeypatch.setattr(
        type(lm.model),
        "hidden",
        lambda self, ids, *more, **options: (
            read.append(ids.numel()) or plain(self, ids, *more, **options)
        ),
    )
    lm.score([ScoringInput(" went home", prefix) for _ in range(50)])
    size, more = len(lm.tokenizer.encode(prefix)), len(lm.tokenizer.encode(" went home"))
    assert sum(read) <= 1 + size + 50 * (more + 1)


def test_a_token_over_the_border_belongs_to_the_text(scorer):
    lm = scorer()
    text = "there"
    assert len(lm.tokenizer.encode(" there")) < len(lm.tokenizer.encode(" th")) + len(
        lm.tokenizer.encode("ere")
    )
    split = lm.score([ScoringInput("ere", " th")], per="token")[0]
    whole = lm.score([" " + text], per="token")[0]
    assert split.pieces[-1].logprob == pytest.approx(whole.pieces[-1].logprob, abs=1e-5)
    assert (
        split.bytes == 3
        and sum(unit.bytes for unit in split.pieces) == 3
        and split.pieces[0].start == 0
    )


def test_alternatives_ranks_and_entropy_are_those_of_the_distribution(scorer, twin):
    lm, text = scorer(), "The old dog"
    units = lm.score([text], per="token", alternatives=3)[0].pieces
    ids = lm.tokenizer.encode(text)
    with torch.inference_mode():
        logprobs = twin[1](torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
    for unit, token, row in zip(units, ids, logprobs):
        order = row.argsort(descending=True)
        assert unit.rank == order.tolist().index(token) + 1
        assert unit.entropy == pytest.approx(
            -(row.exp() * row).sum().item() / math.log(2), abs=1e-4
        )
        assert [one.piece for one in unit.alternatives] == [
            lm.tokenizer.token_texts[i] for i in order[:3]
        ]
        np.testing.assert_allclose(
            [one.logprob for one in unit.alternatives], row[order[:3]], atol=1e-4
        )
    assert lm.score([text], per="token")[0].pieces[0].alternatives is None


def test_the_likeliest_by_sum_by_token_by_byte():
    short, long, dense = Figures(-4.0, 2, 10), Figures(-6.0, 6, 12), Figures(-6.0, 2, 24)
    assert choose([short, long, dense]) == (0, 1, 2)
    assert choose([long, long]) == (0, 0, 0)
    assert choose([Figures(None, 0, 0), short]) == (1, 1, 1)
    assert choose([]) == choose([Figures(None, 0, 0)]) == (None, None, None)


def test_the_last_word_after_a_shared_prefix_that_fills_the_context(scorer):
    """Its ending is predicted in a window of its own."""
    lm, text = scorer(), " the cat"
    for count in range(1, 40):
        prefix = "the" + " dog" * count
        if len(lm.tokenizer.encode(prefix + text)) == lm.context:
            break
    else:
        pytest.fail("no prefix fills the context")
    (alone,) = lm.score([ScoringInput(text, prefix)], per="word")
    shared = lm.score([ScoringInput(text, prefix)] * 4, per="word")
    for score in shared:
        assert [unit.logprob for unit in score.pieces] == pytest.approx(
            [unit.logprob for unit in alone.pieces], abs=1e-4
        )
