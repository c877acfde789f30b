"""Log-probabilities by every family with a language head, against loops around transformers.

LM_SCORED_TEXTS=500 sets the number of texts per family (default 60).
"""

import os
import random
from functools import cache

import pytest
import torch
from random_checkpoints import CASES, Case, pair

from lmcli.checkpoints import folder as checkpoints
from lmcli.scoring.token_logprobs import CausalLogprobs, MaskedLogprobs, ScoreFields, ScoreRequest

LANGUAGE = list({case.family: case for case in reversed(CASES) if case.head == "lm"}.values())
BOUND = 1e-4  # nats a text
COUNT = int(os.environ.get("LM_SCORED_TEXTS", "60"))
FIRST, LAST, MASK = 2, 2, 3  # 1 is a RoBERTa's padding


def sequences(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    drawn = random.Random(seed)
    return [
        [drawn.randrange(4, 41) for _ in range(drawn.randint(1, longest))] for _ in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    @cache
    def get(case: Case):
        return pair(case, tmp_path_factory.mktemp("case"), checkpoints.load)

    return get


def backend(
    case: Case, model, batch: int, within_word: bool = False
) -> CausalLogprobs | MaskedLogprobs:
    if case.shape == "encoder":
        return MaskedLogprobs(model, [FIRST], [LAST], MASK, 36, 18, batch, within_word)
    return CausalLogprobs(model, [FIRST], 36, 18, batch)


@torch.inference_mode()
def causal(model, ids: list[int], source: list[int] | None) -> float:
    """The log-probability of ids after FIRST."""
    if source is None:
        logits = model(torch.tensor([[FIRST, *ids[:-1]]])).logits[0]
    else:
        logits = model(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[FIRST, *ids[:-1]]])
        ).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).double().sum().item()


@torch.inference_mode()
def pseudo(model, ids: list[int], words: list[int] | None = None) -> float:
    """The pseudo-log-likelihood of ids; with `words` the rest of a word is masked too."""
    rows = []
    for at in range(len(ids)):
        rows.append(
            [
                FIRST,
                *(
                    MASK if k == at or (words and k > at and words[k] == words[at]) else token
                    for k, token in enumerate(ids)
                ),
                LAST,
            ]
        )
    logprobs = model(torch.tensor(rows)).logits.log_softmax(-1)
    return sum(logprobs[at, at + 1, token].item() for at, token in enumerate(ids))


@pytest.mark.parametrize("case", LANGUAGE, ids=str)
def test_each_text_in_any_batch_and_order(case, pairs):
    both, count = pairs(case), COUNT
    texts = sequences(count, 34 if case.shape != "encoder" else 20)
    sources = sequences(count, 30, seed=2) if case.shape == "encoder-decoder" else [None] * count
    expected = [
        pseudo(both.theirs, ids) if case.shape == "encoder" else causal(both.theirs, ids, source)
        for ids, source in zip(texts, sources)
    ]
    for batch, seed in ((1, None), (300, 5), (5000, 6)):
        order = (
            list(range(count)) if seed is None else random.Random(seed).sample(range(count), count)
        )
        order = order[:30] if batch == 1 else order
        results = backend(case, both.ours, batch).compute(
            [ScoreRequest(texts[i], source=sources[i] or ()) for i in order], ScoreFields()
        )
        worst = max(
            abs(scores.logprobs.sum(dtype="float64") - expected[i])
            for i, scores in zip(order, results)
        )
        assert worst < BOUND, f"{case}: {worst:.1e} nats with batches of {batch} tokens"


@pytest.mark.parametrize("case", [case for case in LANGUAGE if case.shape == "encoder"], ids=str)
def test_the_rest_of_a_word_is_masked_with_its_tokens(case, pairs):
    both, drawn = pairs(case), random.Random(3)
    texts = sequences(40, 15, seed=4)
    words = [sorted(drawn.randrange(6) for _ in ids) for ids in texts]
    results = backend(case, both.ours, 400, within_word=True).compute(
        [ScoreRequest(ids, words=own) for ids, own in zip(texts, words)], ScoreFields()
    )
    for ids, own, scores in zip(texts, words, results):
        assert scores.logprobs.sum() == pytest.approx(pseudo(both.theirs, ids, own), abs=BOUND)
    plain = backend(case, both.ours, 400).compute(
        [ScoreRequest(ids) for ids in texts], ScoreFields()
    )
    assert any(abs(a.logprobs.sum() - b.logprobs.sum()) > 0.01 for a, b in zip(results, plain))


def test_a_text_longer_than_the_context_is_scored_in_windows(pairs):
    both = pairs(next(case for case in LANGUAGE if case.family == "bert"))
    (ids,) = [[token for part in sequences(20, 12, seed=7) for token in part][:60]]
    (scores,) = backend(both.case, both.ours, 400).compute([ScoreRequest(ids)], ScoreFields())
    assert len(scores.logprobs) == 60 and not torch.tensor(scores.logprobs).isnan().any()
    with torch.inference_mode():  # token 40 in the second window of 34, which ends at 52
        row = [FIRST, *ids[18:40], MASK, *ids[41:52], LAST]
        expected = both.theirs(torch.tensor([row])).logits[0, 23].log_softmax(-1)[ids[40]].item()
    assert scores.logprobs[40] == pytest.approx(expected, abs=1e-4)
