"""Answers from windows: batches, bytes of the context, thresholds, empty inputs."""

import math

import pytest

from lmcli.config import TokenizerConfig
from lmcli.scoring.question_answering import QuestionAnswerer
from lmcli.text.tokenizer import learn

CONTEXT = "Die Bäckerin aus Köln backte 日本 Brote. " * 4 + "Nobody knew why."
QUESTIONS = ["Who baked?", "Was backte sie?", "Bäckerin?", "q " * 90]


@pytest.fixture(scope="module")
def question_answerer(small_model):
    """question_answerer(**options): one with a random encoder of context 40."""
    tokenizer = learn([CONTEXT] * 9, TokenizerConfig(vocab_size=300), "encoder")
    model = small_model(
        shape="encoder", head="span", vocab_size=tokenizer.size, max_position_embeddings=40, seed=3
    )
    return lambda **options: QuestionAnswerer(model, tokenizer, **{"threshold": 1.0, **options})


def close(a, b):
    assert (a.text, a.start, a.end, len(a.candidates)) == (
        b.text,
        b.start,
        b.end,
        len(b.candidates),
    )
    assert [one.text for one in a.candidates] == [one.text for one in b.candidates]
    assert a.score == pytest.approx(b.score, rel=1e-4) and a.no_answer == pytest.approx(
        b.no_answer, rel=1e-4
    )


def test_answers_do_not_depend_on_the_batch(question_answerer):
    contexts = [CONTEXT, CONTEXT[:50], "Köln", CONTEXT]
    together = question_answerer(count=3).answer(QUESTIONS, contexts)
    for question, context, results in zip(QUESTIONS, contexts, together):
        (alone,) = question_answerer(count=3, batch=1).answer([question], [context])
        close(alone, results)
    assert [results.truncated for results in together] == [False, False, False, True]


def test_the_bytes_of_an_answer_are_its_text(question_answerer):
    for results in question_answerer(count=8).answer(QUESTIONS, [CONTEXT] * 4):
        spans = [(one.start, one.end) for one in results.candidates]
        assert len(spans) == 8 and (results.start, results.end) == spans[0]
        for one in results.candidates:
            assert CONTEXT.encode()[one.start : one.end].decode() == one.text == one.text.strip()
        scores = [one.score for one in results.candidates]
        assert scores == sorted(scores, reverse=True) and 0 < sum(scores) + results.no_answer < 1
        assert all(b <= c for (_, b), (c, _) in zip(sorted(spans), sorted(spans)[1:]))


def test_an_answer_has_at_most_max_answer_tokens(question_answerer):
    for longest in (1, 4):
        (results,) = question_answerer(max_answer_tokens=longest, count=5).answer(
            QUESTIONS[:1], [CONTEXT]
        )
        assert all(
            len(question_answerer().tokenizer.encode(one.text)) <= longest + 1
            for one in results.candidates
        )


def test_the_threshold_is_the_share_of_no_answer(question_answerer):
    (results,) = question_answerer().answer(QUESTIONS[:1], [CONTEXT])
    share = results.no_answer / (results.no_answer + results.score)
    for threshold, given in ((share * 1.001, True), (share * 0.999, False), (0.0, False)):
        (other,) = question_answerer(threshold=threshold).answer(QUESTIONS[:1], [CONTEXT])
        assert (other.text is not None) == given and other.no_answer == pytest.approx(
            results.no_answer
        )
        assert (other.text, other.score, other.start, other.end) == (
            (results.text, results.score, results.start, results.end) if given else (None,) * 4
        )
        assert other.candidates[0].text == results.text


def test_without_text_there_is_no_answer(question_answerer):
    for results in question_answerer().answer(["", "who", ""], [CONTEXT, "", ""]):
        assert (results.text, results.score, results.no_answer, results.candidates) == (
            None,
            None,
            None,
            [],
        )
    assert question_answerer().answer([], []) == []


def test_a_smaller_stride_gives_more_windows(question_answerer):
    encoder = question_answerer(stride=3).encoder
    assert len(encoder.windows(4, 100)) > 2 * len(question_answerer().encoder.windows(4, 100))
    (results,) = question_answerer(stride=3).answer(QUESTIONS[:1], [CONTEXT])
    assert math.isfinite(results.score) and results.text in CONTEXT
