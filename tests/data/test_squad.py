"""Question answering: rows, answer tokens, windows, best spans, exact match and F1."""

import json
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.config import TokenizerConfig
from lmcli.data import squad
from lmcli.data.documents import DocumentFormat, survey
from lmcli.data.schema import squad_example
from lmcli.data.squad import (
    NO_ANSWER,
    QaEncoder,
    QuestionWindows,
    Span,
    WindowLogits,
    best_spans,
    exact_match,
    normalized,
    span_bytes,
    token_f1,
)
from lmcli.errors import UsageError, UserError
from lmcli.text.tokenizer import learn, load
from lmcli.text.windows import overlapping_windows

CONTEXT = "The baker of Zürich, who was   old, sold 12 loaves a day. Nobody knew why."
QA_FIELDS = {"fields": ("context", "question"), "answers": "answers"}


def row(context=CONTEXT, question="Who sold loaves?", answer="baker of Zürich", start=4, **fields):
    return {
        "context": context,
        "question": question,
        "answers": [{"text": answer, "answer_start": start}],
        **fields,
    }


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return learn([CONTEXT] * 20, TokenizerConfig(vocab_size=300), "encoder")


@pytest.fixture
def build(tmp_path, tokenizer):
    """build(*rows): Questions of a file with these rows."""

    def call(*rows, doc_format=None):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        doc_format = doc_format or DocumentFormat(**QA_FIELDS)
        surveyed = survey([str(tmp_path / "q.jsonl")], doc_format)
        return squad.build(surveyed.documents, surveyed.hashes, doc_format, tokenizer)

    return call


class TestRows:
    def test_both_forms_of_answers_and_no_answer(self):
        listed = squad_example(row(), "context", "question", "answers")
        assert listed.answers == [("baker of Zürich", 4, 19)]
        columns = row(answers={"text": ["baker of Zürich"], "answer_start": [4]})
        assert squad_example(columns, "context", "question", "answers") == listed
        for empty in ([], {"text": [], "answer_start": []}):
            assert squad_example(row(answers=empty), "context", "question", "answers").answers == []

    def test_answers_are_without_white_space_around_them(self):
        answers = squad_example(
            row(answer=" old, ", start=30), "context", "question", "answers"
        ).answers
        assert answers == [("old,", 31, 35)] and CONTEXT[31:35] == "old,"

    @pytest.mark.parametrize(
        "changed, message",
        [
            (
                {"start": 5},
                "'baker of Zürich' is not at character 5 of the context, but 'aker of Zürich,'",
            ),
            ({"start": 70}, "cannot start at 70 of a context of 74 characters"),
            ({"start": -1}, "cannot start at -1"),
            ({"start": "4"}, "cannot start at '4'"),
            ({"start": True}, "cannot start at True"),
            ({"answer": " "}, "an answer's text is ' '"),
            ({"answer": None}, "an answer's text is None"),
            ({"question": " "}, "field 'question' is empty"),
            ({"context": ""}, "field 'context' is empty"),
            ({"question": 3}, "field 'question' is not a text"),
            ({"answers": "butcher"}, "answer 'butcher' does not occur in the context"),
            (
                {"answers": {"text": ["baker"], "answer_start": []}},
                "field 'answers' is missing or no list",
            ),
            ({"answers": None}, "field 'answers' is missing"),
        ],
    )
    def test_a_bad_row_names_file_and_line(self, build, tmp_path, changed, message):
        with pytest.raises(UserError) as error:
            build(row(), row(**changed))
        assert (
            message in error.value.what and error.value.where == f"{tmp_path / 'q.jsonl'}, line 2"
        )
        assert (
            len(
                build(
                    row(), row(**changed), doc_format=DocumentFormat(**QA_FIELDS, on_error="skip")
                )
            )
            == 1
        )


class TestTokens:
    def test_ids_ends_and_answers_also_from_the_cache(self, build, tokenizer):
        for _ in range(2):
            questions = build(row(), row(answers=[]))
            assert len(questions) == 2 and questions.answers[1].tolist() == list(NO_ANSWER)
            assert tokenizer.decode(questions.contexts[0].tolist()) == CONTEXT
            assert tokenizer.decode(questions.questions[1].tolist()) == "Who sold loaves?"
            start, end = span_bytes(
                CONTEXT.encode(), questions.ends[0], Span(*questions.answers[0], 0.0)
            )
            assert CONTEXT.encode()[start:end].decode() == "baker of Zürich"
            assert questions.tokens == len(questions.contexts.ids) + len(questions.questions.ids)
            assert questions.bytes == 2 * (len(CONTEXT.encode()) + 16)

    @given(st.text(min_size=1, max_size=40), st.data())
    def test_the_tokens_of_an_answer_contain_it_in_whole_characters(self, tokenizer, context, data):
        start = data.draw(st.integers(0, len(context) - 1))
        answer = context[start : data.draw(st.integers(start + 1, len(context)))]
        if not answer.strip():
            return
        example = squad_example(
            row(context, answer=answer, start=start), "context", "question", "answers"
        )
        ((ids, ends),) = tokenizer.encode_with_ends([context])
        first, last = squad.answer_tokens(example, ends)
        assert 0 <= first <= last < len(ids)
        low, high = span_bytes(context.encode(), ends, Span(first, last, 0.0))
        assert answer.strip() in context.encode()[low:high].decode()

    @pytest.fixture(scope="class", params=["bpe", "wordpiece"])
    def words(self, request, tokenizer):
        if request.param == "bpe":
            return tokenizer
        return load(request.getfixturevalue("shared") / "tokenizers" / "bert-minilm")

    @given(st.text(min_size=1, max_size=60), st.data())
    def test_bytes_of_any_span_are_text_of_the_context(self, words, context, data):
        ((ids, ends),) = words.encode_with_ends([context])
        if not ids:
            return
        first = data.draw(st.integers(0, len(ids) - 1))
        span = Span(first, data.draw(st.integers(first, len(ids) - 1)), 0.0)
        start, end = span_bytes(context.encode(), ends, span)
        text = context.encode()[start:end].decode()  # whole characters, or this would fail
        assert 0 <= start <= end <= len(context.encode()) and text == text.strip()


class TestWindows:
    def test_every_token_is_in_a_window_and_strides_are_as_requested(self):
        for tokens, room, stride in product(range(12), (1, 3, 5), (1, 2, 5)):
            windows = overlapping_windows(tokens, room, min(stride, room))
            assert {i for start, end in windows for i in range(start, end)} == set(range(tokens))
            assert all(end - start <= room for start, end in windows) and windows[-1][1] == tokens
            assert [b[0] - a[0] for a, b in pairwise(windows)] == [min(stride, room)] * (
                len(windows) - 1
            )
            assert not any(end == tokens for _, end in windows[:-1])

    def test_a_feature_is_the_template_around_question_and_window(self, build, tokenizer):
        questions = build(row(question="Who sold loaves? " * 3))
        encoder = QaEncoder(tokenizer, context=30, stride=5)
        windows = QuestionWindows(questions, encoder)
        question = questions.questions[0].tolist()
        cut_question = question[:13]
        assert encoder.room == 27 and len(windows) > 2 and len(question) > 13
        for i, (_, start, end) in enumerate(windows.spans.tolist()):
            ids, types, context_start = windows.feature(i)
            cls, sep = tokenizer.special_id("cls_token"), tokenizer.special_id("sep_token")
            assert ids == [cls, *cut_question, sep, *questions.contexts[0][start:end].tolist(), sep]
            assert (
                types == [0] * (len(cut_question) + 2) + [1] * (end - start + 1)
                and context_start == len(cut_question) + 2
            )
            assert windows.lengths[i] == len(ids) <= 30

    def test_targets_are_the_answer_if_the_window_contains_it_else_position_0(
        self, build, tokenizer
    ):
        questions = build(row(), row(answers=[]))
        windows = QuestionWindows(questions, QaEncoder(tokenizer, context=34, stride=4))
        batch = windows.batch(np.arange(len(windows)))
        first, last = questions.answers[0].tolist()
        inside = 0
        for (question, start, end), ids, target, may in zip(
            windows.spans.tolist(), batch.ids, batch.targets.tolist(), batch.candidates
        ):
            context_start = int(np.flatnonzero(may)[1])
            assert may.sum() == end - start + 1 and may[0]
            if question == 0 and start <= first and last < end:
                inside += 1
                assert (
                    tokenizer.decode(ids[target[0] : target[1] + 1].tolist()).strip()
                    == "baker of Zürich"
                )
            else:
                assert target == [0, 0]
            assert (
                ids[context_start : context_start + end - start].tolist()
                == questions.contexts[question][start:end].tolist()
            )
        assert 0 < inside < (windows.spans[:, 0] == 0).sum() and batch.count == 2 * len(windows)
        assert batch.token_mask is None  # all features fill the context

    def test_a_question_has_half_of_the_room_only_if_its_context_needs_the_rest(self, tokenizer):
        encoder = QaEncoder(tokenizer, context=30)
        assert [
            encoder.question_length(question, tokens)
            for question, tokens in ((5, 99), (20, 7), (20, 12), (20, 14), (99, 99))
        ] == [5, 20, 15, 13, 13]

    def test_no_room_for_both_is_a_usage_error(self, tokenizer):
        with pytest.raises(
            UsageError, match="a context of 4 tokens has no room for a question and a text"
        ):
            QaEncoder(tokenizer, context=4)


def brute_force(windows, most):
    """((first, last), log p) of all spans, likeliest first, and log p of no answer, in loops."""
    none = min(windows, key=lambda window: window.starts[0] + window.ends[0])
    starts = [none.starts[0], *(x for window in windows for x in window.starts[1:])]
    ends = [none.ends[0], *(x for window in windows for x in window.ends[1:])]
    total = np.log(np.exp(starts).sum()) + np.log(np.exp(ends).sum())
    spans = {}
    for window in windows:
        for i, j in product(range(1, len(window.starts)), repeat=2):
            if 0 <= j - i < most:
                span = (window.start + i - 1, window.start + j - 1)
                spans[span] = max(
                    spans.get(span, -np.inf), window.starts[i] + window.ends[j] - total
                )
    return sorted(spans.items(), key=lambda item: -item[1]), none.starts[0] + none.ends[0] - total


class TestBestSpans:
    @pytest.mark.parametrize("most", [1, 3, 30])
    @pytest.mark.parametrize("sizes", [[(0, 7)], [(0, 6), (4, 6), (8, 3)], [(0, 1)]])
    def test_best_spans_equal_brute_force(self, sizes, most):
        for seed in range(5):
            draw = np.random.default_rng(seed)
            windows = [
                WindowLogits(start, *draw.normal(size=(2, size + 1)).astype(np.float32) * 3)
                for start, size in sizes
            ]
            expected, none = brute_force(windows, most)
            spans, no_answer = best_spans(windows, most, count=4)
            assert no_answer == pytest.approx(none, rel=1e-5)
            taken: list[tuple[int, int]] = []
            for span, logprob in expected:  # greedily, without overlap
                if len(taken) < 4 and all(
                    span[1] < first or span[0] > last for first, last in taken
                ):
                    assert spans[len(taken)] == (*span, pytest.approx(logprob, rel=1e-5))
                    taken.append(span)
            assert len(spans) == len(taken)

    def test_with_one_window_all_probabilities_sum_to_one(self):
        draw = np.random.default_rng(0)
        starts, ends = draw.normal(size=(2, 6))
        share = np.exp(starts)[:, None] * np.exp(ends) / np.exp(starts).sum() / np.exp(ends).sum()
        (best,), none = best_spans([WindowLogits(0, starts, ends)])
        assert np.exp(none) == pytest.approx(share[0, 0])
        assert np.exp(best.logprob) == pytest.approx(np.triu(share[1:, 1:]).max())

    def test_a_window_without_tokens_has_no_span(self):
        assert best_spans([WindowLogits(0, np.ones(1), np.ones(1))]) == ([], 0.0)


@pytest.mark.parametrize("processor, context_start", [("bert", 4), ("roberta", 5)])
def test_the_context_begins_after_the_separators_of_each_family(
    tokenizer, processor, context_start
):
    from tokenizers import Tokenizer as Core
    from tokenizers import processors

    from lmcli.text.tokenizer import Tokenizer

    core = Core.from_str(tokenizer.core.to_str())
    kind = processors.BertProcessing if processor == "bert" else processors.RobertaProcessing
    core.post_processor = kind(("[SEP]", 3), ("[CLS]", 2))
    row = QaEncoder(Tokenizer(core), context=20).feature([7, 8], [9, 10, 11])
    assert (
        row.context_start == context_start
        and row.ids[context_start:-1] == [9, 10, 11]
        and row.ids[:3] == [2, 7, 8]
    )


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The V&A, London", "va london"),
        ("an  Answer.", "answer"),
        ("theatre a", "theatre"),
        ("«Zürich»", "«zürich»"),
        ("the", ""),
    ],
)
def test_normalized_removes_case_punctuation_articles_and_space(text, plain):
    assert normalized(text) == plain


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the brown fox", ["a quick brown fox"], 0.0, 0.8),
        ("London", ["Paris", "london."], 1.0, 1.0),
        ("in in London", ["London in"], 0.0, 0.8),  # a word counts as often as both have it
        ("Rome", ["Paris"], 0.0, 0.0),
        (None, [], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("Rome", [], 0.0, 0.0),
        (None, ["Rome"], 0.0, 0.0),
        ("Rome", ["the", "Rome"], 1.0, 1.0),
        ("the", ["the"], 1.0, 1.0),
    ],
)
def test_the_best_gold_answer_counts(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert token_f1(prediction, answers) == pytest.approx(f1)


def test_the_rules_of_both_versions():
    answers = ["the"]  # without a word when normalized
    assert (exact_match("a", answers, 1), token_f1("a", answers, 1)) == (1, 0)
    assert (exact_match("a", answers, 2), token_f1("a", answers, 2)) == (1, 1)
    assert (exact_match("", [], 1), token_f1("", [], 1)) == (0, 0)
    assert (exact_match("", [], 2), token_f1("", [], 2)) == (1, 1)
