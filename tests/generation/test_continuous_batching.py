"""Prompts enter while others go on: the same texts as alone, in order, with bounded memory."""

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli.errors import UserError
from lmcli.generation import batch_generation
from lmcli.generation.batch_generation import generate_all, generate_each
from lmcli.generation.prompt_lookup import PromptLookup
from lmcli.generation.prompts import Prompt
from lmcli.kernels import build
from lmcli.kernels.decoding_state import weights_of
from lmcli.kernels.fast_decoding import FastDecodingState

pytestmark = pytest.mark.skipif(build.library() is None, reason=build.problem())

CONTEXT = 64
LONG, SHORT = Prompt("long", [0, 5]), Prompt("short", [0, 9, 9])


@pytest.fixture(scope="module")
def model(small_model, small_tokenizer):
    return small_model(max_position_embeddings=CONTEXT, vocab_size=small_tokenizer.size)


class Watched(FastDecodingState):
    """A state that remembers its sizes at each step, and calls `at_step`."""

    def __init__(self, *arguments):
        self.sizes, self.read = [], []  # (slots, tokens of a slot, rows); tokens read
        self.at_step = lambda number: None
        super().__init__(*arguments)

    def _read(self, tokens, starts, counts):
        self.sizes.append((*self._keys.shape[1:4:2], len(counts)))
        self.read.append(len(tokens))
        self.at_step(len(self.sizes))
        return super()._read(tokens, starts, counts)


@pytest.fixture
def watched(decoder, model):
    """watched(**options): a Decoder, and the list of its states."""

    def build_one(at_step=lambda number: None, **options):
        lm, states = decoder(model, **options), []

        def new_state(sequences, sources, capacity):
            states.append(Watched(weights_of(model), sequences, capacity))
            states[-1].at_step = at_step
            return states[-1]

        lm.decoding_state = new_state
        return lm, states

    return build_one


def some_prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(4)
    return [[0, *draw.choices(range(4, 400), k=draw.randrange(longest))] for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_are_those_of_each_prompt_alone(temperature, watched):
    # limits of 10 to 90 tokens, texts that stop by chance, and windows that slide
    lm, states = watched(
        temperature=temperature, max_length=90, stop_ids=list(range(0, 300, 8)), min_new_tokens=2
    )
    prompts = some_prompts(60, 80)
    together = generate_all(lm, prompts, 1, seed=7, batch_tokens=128)
    most = max(rows for _, _, rows in states[0].sizes)
    assert (len(states), 8 <= most <= 4 * 128) == (1, True)
    assert together == [
        generate_all(lm, [prompt], 1, seed=7 + i)[0] for i, prompt in enumerate(prompts)
    ]
    assert len({len(result.tokens) for (result,) in together}) > 5
    assert {result.finish_reason for (result,) in together} == {"stop", "length"}


def test_a_row_slides_alone(watched):
    lm, states = watched(max_new_tokens=150)
    prompts = [[0, *range(40, 100)], [0], [0, 7]]
    results = generate_all(lm, prompts, 1, seed=0)
    assert results == [
        generate_all(lm, [prompt], 1, seed=0 + i)[0] for i, prompt in enumerate(prompts)
    ]
    steps = states[0].read[1:]
    # of three rows each reads a token, or 32 in place of it: bos and the newest 31
    assert {count - 3 for count in steps} == {0, 31}
    assert len(steps) == 149


def test_memory_does_not_grow_with_the_number_of_prompts(watched):
    lm, states = watched(max_length=7, stop_ids=list(range(0, 300, 8)))
    batches = ([Prompt("", [0, *[9] * (i % 5)]) for i in range(50)] for _ in range(40))
    answered = 0
    for _, (result,) in generate_each(lm, batches, 0, batch_tokens=64):
        assert result.seed == answered
        answered += 1
    assert answered == 2000
    # 4 · 64 tokens, 7 each; a new cache has room for half as many again
    for state in states:
        assert max(rows for *_, rows in state.sizes) <= 36
        assert max(slots for slots, *_ in state.sizes) <= 54
        assert max(tokens for _, tokens, _ in state.sizes) <= 11


def test_a_prompt_is_answered_before_the_next_arrives(watched):
    lm, _ = watched(max_new_tokens=3)
    answered = threading.Event()

    def arriving():
        for prompt in (SHORT, Prompt("", None), LONG):
            yield [prompt]
            assert answered.wait(10)
            answered.clear()

    prompts = []
    for prompt, results in generate_each(lm, arriving(), 5):
        prompts.append((prompt.text, [result.seed for result in results]))
        answered.set()
    assert prompts == [("short", [5]), ("", []), ("long", [7])]


def test_a_prompt_enters_while_another_goes_on(watched):
    second = threading.Event()

    def at_step(number):
        if number == 5:
            second.set()
            time.sleep(0.05)

    def arriving():
        yield [LONG]
        second.wait(10)
        yield [SHORT]

    lm, (states) = watched(at_step, max_length=40)
    found = list(generate_each(lm, arriving(), 0, num_samples=2))
    assert [prompt for prompt, _ in found] == [LONG, SHORT]
    assert [[r.seed for r in results] for _, results in found] == [[0, 1], [2, 3]]
    assert len(states) == 1
    assert [rows for *_, rows in states[0].sizes if rows == 4]
    assert found[1][1] == generate_all(lm, [SHORT.ids], 2, seed=2)[0]


def test_what_cannot_be_read_is_reported_after_the_texts_before_it(watched):
    def arriving():
        yield [LONG, SHORT]
        raise UserError("line 3 is bad")

    lm, _ = watched(max_new_tokens=9)
    texts = generate_each(lm, arriving(), 0)
    assert [next(texts)[0], next(texts)[0]] == [LONG, SHORT]
    with pytest.raises(UserError, match="line 3"):
        next(texts)


def test_few_results_wait_for_a_long_text(watched, monkeypatch):
    monkeypatch.setattr(batch_generation, "MOST_UNWRITTEN", 4)
    monkeypatch.setattr(PromptLookup, "guess", lambda *_: [])  # a step for each token
    lm, states = watched(max_length=50)
    different = ([0] * 48 + [i] for i in range(4, 34))  # equal ones are read once
    batches = [[LONG], *([Prompt("", ids)] for ids in different)]
    assert len(list(generate_each(lm, batches, 0))) == 31
    steps = [rows for state in states for *_, rows in state.sizes]
    assert sum(steps) == 48 + 30 and max(steps) <= 4


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_rows_are_to_the_bit_those_of_states_of_their_own(model, data):
    draw = random.Random(data.draw(st.integers(0, 10**6)))
    weights = weights_of(model)

    def sequences(count):
        return [draw.choices(range(300), k=draw.randrange(1, 50)) for _ in range(count)]

    texts = sequences(draw.randrange(1, 4))
    state = FastDecodingState(weights, texts, CONTEXT)
    for _ in range(8):
        rows = [i for i, text in enumerate(texts) if len(text) < CONTEXT and draw.random() < 0.8]
        state.keep(np.array(rows, np.int64))
        new = sequences(draw.randrange(not rows, 5))
        tokens = draw.choices(range(300), k=len(rows))
        texts = [[*texts[i], token] for i, token in zip(rows, tokens)] + new
        state.extend(np.array(tokens, np.int64), new, CONTEXT)
        assert state.length == max(map(len, texts))
        for text, logits in zip(texts, state.logits, strict=True):
            np.testing.assert_array_equal(
                FastDecodingState(weights, [text], CONTEXT).logits[0], logits
            )
