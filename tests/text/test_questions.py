"""Questions about contexts: rows, tokens of answers, windows, and spans back to text."""

import json
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcli.config import TokenizerConfig
from lmcli.errors import UsageError, UserError
from lmcli.text import questions
from lmcli.text.answers import posed
from lmcli.text.documents import Layout
from lmcli.text.questions import NONE, Framing, Read, Span, Windows, best_spans, text_of
from lmcli.text.tokenizer import learn, load
from lmcli.text.windows import overlapping

CONTEXT = "The baker of Zürich, who was   old, sold 12 loaves a day. Nobody knew why."
LAYOUT = {"fields": ("context", "question"), "answers": "answers"}


def row(context=CONTEXT, question="Who sold loaves?", answer="baker of Zürich", start=4, **fields):
    return {"context": context, "question": question, "answers": [{"text": answer, "answer_start": start}], **fields}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return learn([CONTEXT] * 20, TokenizerConfig(vocab_size=300), "encoder")


@pytest.fixture
def build(tmp_path, tokenizer):
    """build(*rows): Questions of a file with these rows."""
    def call(*rows, layout=None):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        layout = layout or Layout(**LAYOUT)
        return questions.build(*layout.survey([str(tmp_path / "q.jsonl")]), layout, tokenizer)
    return call


class TestRows:
    def test_both_forms_of_answers_and_none_are_read(self):
        listed = posed(row(), "context", "question", "answers")
        assert listed.answers == [("baker of Zürich", 4, 19)]
        columns = row(answers={"text": ["baker of Zürich"], "answer_start": [4]})
        assert posed(columns, "context", "question", "answers") == listed
        for empty in ([], {"text": [], "answer_start": []}):
            assert posed(row(answers=empty), "context", "question", "answers").answers == []

    def test_space_around_an_answer_does_not_belong_to_it(self):
        found = posed(row(answer=" old, ", start=30), "context", "question", "answers").answers
        assert found == [("old,", 31, 35)] and CONTEXT[31:35] == "old,"

    @pytest.mark.parametrize("changed, told", [
        ({"start": 5}, "answer 'baker of Zürich' does not stand at character 5 of the context, 'aker of Zürich,' does"),
        ({"start": 70}, "cannot start at 70 of a context of 74 characters"), ({"start": -1}, "cannot start at -1"),
        ({"start": "4"}, "cannot start at '4'"), ({"start": True}, "cannot start at True"),
        ({"answer": " "}, "an answer's text is ' '"), ({"answer": None}, "an answer's text is None"),
        ({"question": " "}, "field 'question' is empty"), ({"context": ""}, "field 'context' is empty"),
        ({"question": 3}, "field 'question' is missing or not a text"),
        ({"answers": "baker"}, "field 'answers' is missing or no list of objects with text and answer_start"),
        ({"answers": {"text": ["baker"], "answer_start": []}}, "field 'answers' is missing or no list"),
        ({"answers": None}, "field 'answers' is missing")])
    def test_a_row_that_poses_nothing_names_file_and_line(self, build, tmp_path, changed, told):
        with pytest.raises(UserError) as error:
            build(row(), row(**changed))
        assert told in error.value.what and error.value.where == f"{tmp_path / 'q.jsonl'}, line 2"
        assert len(build(row(), row(**changed), layout=Layout(**LAYOUT, on_error="skip"))) == 1


class TestTokens:
    def test_ids_places_and_answers_come_back_from_the_cache_too(self, build, tokenizer):
        for _ in range(2):
            found = build(row(), row(answers=[]))
            assert len(found) == 2 and found.answers[1].tolist() == list(NONE)
            assert tokenizer.decode(found.contexts[0].tolist()) == CONTEXT
            assert tokenizer.decode(found.questions[1].tolist()) == "Who sold loaves?"
            start, end = text_of(CONTEXT.encode(), found.ends[0], Span(*found.answers[0], 0.0))
            assert CONTEXT.encode()[start:end].decode() == "baker of Zürich"
            assert found.tokens == len(found.contexts.ids) + len(found.questions.ids)
            assert found.bytes == 2 * (len(CONTEXT.encode()) + 16)

    @given(st.text(min_size=1, max_size=40), st.data())
    def test_the_tokens_of_an_answer_hold_it_and_cut_whole_characters(self, tokenizer, context, data):
        start = data.draw(st.integers(0, len(context) - 1))
        answer = context[start:data.draw(st.integers(start + 1, len(context)))]
        if not answer.strip():
            return
        found = posed(row(context, answer=answer, start=start), "context", "question", "answers")
        (ids, ends), = tokenizer.encode_with_ends([context])
        first, last = questions.answer_tokens(found, ends)
        assert 0 <= first <= last < len(ids)
        low, high = text_of(context.encode(), ends, Span(first, last, 0.0))
        assert answer.strip() in context.encode()[low:high].decode()

    @pytest.fixture(scope="class", params=["bpe", "wordpiece"])
    def words(self, request, tokenizer):
        if request.param == "bpe":
            return tokenizer
        return load(request.getfixturevalue("shared") / "tokenizers" / "bert-minilm")

    @given(st.text(min_size=1, max_size=60), st.data())
    def test_bytes_of_any_span_are_text_of_the_context(self, words, context, data):
        (ids, ends), = words.encode_with_ends([context])
        if not ids:
            return
        first = data.draw(st.integers(0, len(ids) - 1))
        span = Span(first, data.draw(st.integers(first, len(ids) - 1)), 0.0)
        start, end = text_of(context.encode(), ends, span)
        text = context.encode()[start:end].decode()  # whole characters, or this would fail
        assert 0 <= start <= end <= len(context.encode()) and text == text.strip()


class TestWindows:
    def test_every_token_lies_in_a_window_and_strides_are_as_asked(self):
        for tokens, room, stride in product(range(12), (1, 3, 5), (1, 2, 5)):
            found = overlapping(tokens, room, min(stride, room))
            assert {i for start, end in found for i in range(start, end)} == set(range(tokens))
            assert all(end - start <= room for start, end in found) and found[-1][1] == tokens
            assert [b[0] - a[0] for a, b in pairwise(found)] == [min(stride, room)] * (len(found) - 1)
            assert not any(end == tokens for _, end in found[:-1])

    def test_a_row_is_the_template_and_types_around_question_and_window(self, build, tokenizer):
        found = build(row(question="Who sold loaves? " * 3))
        framing = Framing(tokenizer, context=30, stride=5)
        windows = Windows(found, framing)
        question = found.questions[0].tolist()
        kept = question[:13]
        assert framing.room == 27 and len(windows) > 2 and len(question) > 13
        for i, (_, start, end) in enumerate(windows.places.tolist()):
            ids, types, lead = windows.framed(i)
            cls, sep = tokenizer.special("cls_token"), tokenizer.special("sep_token")
            assert ids == [cls, *kept, sep, *found.contexts[0][start:end].tolist(), sep]
            assert types == [0] * (len(kept) + 2) + [1] * (end - start + 1) and lead == len(kept) + 2
            assert windows.lengths[i] == len(ids) <= 30

    def test_targets_are_the_answer_where_the_window_has_all_of_it_else_position_0(self, build, tokenizer):
        found = build(row(), row(answers=[]))
        windows = Windows(found, Framing(tokenizer, context=34, stride=4))
        batch = windows.batch(np.arange(len(windows)))
        first, last = found.answers[0].tolist()
        inside = 0
        for (question, start, end), ids, target, may in zip(windows.places.tolist(), batch.ids, batch.targets.tolist(),
                                                            batch.candidates):
            lead = int(np.flatnonzero(may)[1])
            assert may.sum() == end - start + 1 and may[0]
            if question == 0 and start <= first and last < end:
                inside += 1
                assert tokenizer.decode(ids[target[0]:target[1] + 1].tolist()).strip() == "baker of Zürich"
            else:
                assert target == [0, 0]
            assert ids[lead:lead + end - start].tolist() == found.contexts[question][start:end].tolist()
        assert 0 < inside < (windows.places[:, 0] == 0).sum() and batch.count == 2 * len(windows)
        assert batch.real is None  # all of them fill the context

    def test_a_question_is_cut_to_half_of_the_room_only_where_its_context_needs_the_rest(self, tokenizer):
        framing = Framing(tokenizer, context=30)
        assert [framing.kept(question, tokens) for question, tokens in ((5, 99), (20, 7), (20, 12), (20, 14), (99, 99))] == [
            5, 20, 15, 13, 13]

    def test_no_room_for_both_is_told(self, tokenizer):
        with pytest.raises(UsageError, match="a context of 4 tokens has no room for a question and a text"):
            Framing(tokenizer, context=4)


def brute_force(windows, most):
    """((first, last), log p) of all spans, likeliest first, and the log p of none; by definition, in loops."""
    none = min(windows, key=lambda read: read.starts[0] + read.ends[0])
    starts = [none.starts[0], *(x for read in windows for x in read.starts[1:])]
    ends = [none.ends[0], *(x for read in windows for x in read.ends[1:])]
    total = np.log(np.exp(starts).sum()) + np.log(np.exp(ends).sum())
    found = {}
    for read in windows:
        for i, j in product(range(1, len(read.starts)), repeat=2):
            if 0 <= j - i < most:
                place = (read.start + i - 1, read.start + j - 1)
                found[place] = max(found.get(place, -np.inf), read.starts[i] + read.ends[j] - total)
    return sorted(found.items(), key=lambda item: -item[1]), none.starts[0] + none.ends[0] - total


class TestBestSpans:
    @pytest.mark.parametrize("most", [1, 3, 30])
    @pytest.mark.parametrize("sizes", [[(0, 7)], [(0, 6), (4, 6), (8, 3)], [(0, 1)]])
    def test_they_are_those_of_brute_force(self, sizes, most):
        for seed in range(5):
            draw = np.random.default_rng(seed)
            windows = [Read(start, *draw.normal(size=(2, size + 1)).astype(np.float32) * 3) for start, size in sizes]
            wanted, none = brute_force(windows, most)
            found, no_answer = best_spans(windows, most, count=4)
            assert no_answer == pytest.approx(none, rel=1e-5)
            taken: list[tuple[int, int]] = []
            for place, logprob in wanted:  # greedily, those that overlap no likelier one
                if len(taken) < 4 and all(place[1] < first or place[0] > last for first, last in taken):
                    assert found[len(taken)] == (*place, pytest.approx(logprob, rel=1e-5))
                    taken.append(place)
            assert len(found) == len(taken)

    def test_with_one_window_all_probabilities_sum_to_one(self):
        draw = np.random.default_rng(0)
        starts, ends = draw.normal(size=(2, 6))
        share = np.exp(starts)[:, None] * np.exp(ends) / np.exp(starts).sum() / np.exp(ends).sum()
        (best,), none = best_spans([Read(0, starts, ends)])
        assert np.exp(none) == pytest.approx(share[0, 0])
        assert np.exp(best.logprob) == pytest.approx(np.triu(share[1:, 1:]).max())

    def test_a_window_without_tokens_has_no_span(self):
        assert best_spans([Read(0, np.ones(1), np.ones(1))]) == ([], 0.0)


@pytest.mark.parametrize("processor, lead", [("bert", 4), ("roberta", 5)])
def test_the_context_begins_behind_each_familys_own_separators(tokenizer, processor, lead):
    from tokenizers import Tokenizer as Core
    from tokenizers import processors

    from lmcli.text.tokenizer import Tokenizer

    core = Core.from_str(tokenizer.core.to_str())
    kind = processors.BertProcessing if processor == "bert" else processors.RobertaProcessing
    core.post_processor = kind(("[SEP]", 3), ("[CLS]", 2))
    row = Framing(Tokenizer(core), context=20).row([7, 8], [9, 10, 11])
    assert row.lead == lead and row.ids[lead:-1] == [9, 10, 11] and row.ids[:3] == [2, 7, 8]
