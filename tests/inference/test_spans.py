"""Answers from windows: batched as single, bytes of the context, what stands where there is nothing to say."""

import math

import pytest

from lmcli.config import TokenizerConfig
from lmcli.inference.spans import Answerer
from lmcli.text.tokenizer import learn

CONTEXT = "Die Bäckerin aus Köln backte 日本 Brote. " * 4 + "Nobody knew why."
QUESTIONS = ["Who baked?", "Was backte sie?", "Bäckerin?", "q " * 90]


@pytest.fixture(scope="module")
def answerer(small_model):
    """answerer(**options): an Answerer around a random encoder, context 40, BPE of an encoder."""
    tokenizer = learn([CONTEXT] * 9, TokenizerConfig(vocab_size=300), "encoder")
    model = small_model(shape="encoder", head="span", vocab_size=tokenizer.size, max_position_embeddings=40, seed=3)
    return lambda **options: Answerer(model, tokenizer, **{"threshold": 1.0, **options})


def close(a, b):
    assert (a.text, a.start, a.end, len(a.candidates)) == (b.text, b.start, b.end, len(b.candidates))
    assert [one.text for one in a.candidates] == [one.text for one in b.candidates]
    assert a.score == pytest.approx(b.score, rel=1e-4) and a.no_answer == pytest.approx(b.no_answer, rel=1e-4)


def test_in_a_batch_and_alone_they_are_the_same(answerer):
    contexts = [CONTEXT, CONTEXT[:50], "Köln", CONTEXT]
    together = answerer(count=3).answer(QUESTIONS, contexts)
    for question, context, found in zip(QUESTIONS, contexts, together):
        (alone,) = answerer(count=3, batch=1).answer([question], [context])
        close(alone, found)
    assert [found.truncated for found in together] == [False, False, False, True]


def test_bytes_cut_the_answer_out_of_the_context(answerer):
    for found in answerer(count=8).answer(QUESTIONS, [CONTEXT] * 4):
        spans = [(one.start, one.end) for one in found.candidates]
        assert len(spans) == 8 and (found.start, found.end) == spans[0]
        for one in found.candidates:
            assert CONTEXT.encode()[one.start:one.end].decode() == one.text == one.text.strip()
        scores = [one.score for one in found.candidates]
        assert scores == sorted(scores, reverse=True) and 0 < sum(scores) + found.no_answer < 1
        assert all(b <= c for (_, b), (c, _) in zip(sorted(spans), sorted(spans)[1:]))


def test_an_answer_has_no_more_tokens_than_asked_for(answerer):
    for longest in (1, 4):
        (found,) = answerer(longest=longest, count=5).answer(QUESTIONS[:1], [CONTEXT])
        assert all(len(answerer().tokenizer.encode(one.text)) <= longest + 1 for one in found.candidates)


def test_the_threshold_is_the_share_of_no_answer_beside_the_best(answerer):
    (found,) = answerer().answer(QUESTIONS[:1], [CONTEXT])
    share = found.no_answer / (found.no_answer + found.score)
    for threshold, given in ((share * 1.001, True), (share * 0.999, False), (0.0, False)):
        (other,) = answerer(threshold=threshold).answer(QUESTIONS[:1], [CONTEXT])
        assert (other.text is not None) == given and other.no_answer == pytest.approx(found.no_answer)
        assert (other.text, other.score, other.start, other.end) == (
            (found.text, found.score, found.start, found.end) if given else (None,) * 4)
        assert other.candidates[0].text == found.text


def test_nothing_to_read_is_nothing_said(answerer):
    for found in answerer().answer(["", "who", ""], [CONTEXT, "", ""]):
        assert (found.text, found.score, found.no_answer, found.candidates) == (None, None, None, [])
    assert answerer().answer([], []) == []


def test_stride_changes_how_often_a_text_is_read_and_little_else(answerer):
    framing = answerer(stride=3).framing
    assert len(framing.windows(4, 100)) > 2 * len(answerer().framing.windows(4, 100))
    (found,) = answerer(stride=3).answer(QUESTIONS[:1], [CONTEXT])
    assert math.isfinite(found.score) and found.text in CONTEXT
