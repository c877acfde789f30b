"""Several guessed tokens are read at once: the texts are those without guesses, to the bit."""

import functools
import random

import pytest

from lmcli.generation.prompt_lookup import GUESSES, PromptLookup
from lmcli.kernels import build
from lmcli.kernels.decoding_state import fast_state

needs_kernels = pytest.mark.skipif(build.library() is None, reason=build.problem())
REPETITIVE = [0, *[40, 50, 60, 70, 80, 90] * 4]
MIXED = [0, *random.Random(1).choices(range(4, 400), k=30)]
GREEDY = [
    {},
    {"stop_ids": [45, 60, 333], "min_new_tokens": 7},
    {"stop_strings": ("e", "th")},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "frequency_penalty": 0.4},
    {"max_new_tokens": 200},  # the window slides
    {"max_new_tokens": 1},
    {"forced_eos_token_id": 7, "exponential_decay_length_penalty": (3, 1.5)},
]
DRAWN = [{"temperature": t, "top_p": 0.9, "stop_ids": list(range(0, 400, 40))} for t in (0.3, 1.0)]
CASES = [
    *((dtype, options) for dtype in ("float32", "int8") for options in GREEDY + DRAWN),
    *((dtype, options) for dtype in ("bfloat16", "int4") for options in GREEDY[:1] + DRAWN),
]


class Guesses(PromptLookup):
    """Guesses the `truth` with mistakes at random places, and remembers how many were right."""

    truth, random, learned = (), random.Random(0), frozenset()

    def guess(self, tokens, most):
        count = min(most, self.random.randrange(0, 16))
        guess = self.truth[len(tokens) : len(tokens) + count]
        return [token if self.random.random() < 0.8 else 1 for token in guess]

    def learn(self, guessed, right):
        Guesses.learned |= {right}


class NoGuesses(PromptLookup):
    def guess(self, tokens, most):
        return []


@pytest.fixture
def texts(decoder, small_model, small_tokenizer, monkeypatch):
    """texts(guesses, prompt, **options): (result, chunks) with a kind of PromptLookup."""
    models = {}

    def run(guesses, prompt, dtype="float32", **options):
        if dtype not in models:
            model = small_model(max_position_embeddings=64, vocab_size=small_tokenizer.size)
            models[dtype] = getattr(model, dtype if dtype == "bfloat16" else "float")()
        monkeypatch.setattr("lmcli.generation.decoding.PromptLookup", guesses)
        lm = decoder(models[dtype], **{"max_new_tokens": 40, **options})
        if dtype.startswith("int"):
            lm.decoding_state = functools.partial(fast_state, models[dtype], weight_type=dtype)
        assert lm.extendable
        chunks = list(lm.stream([prompt], [5]))
        return chunks[-1].result, [chunk.text for chunk in chunks]

    return run


@needs_kernels
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_texts_and_logprobs_are_those_without_guesses(dtype, options, texts, monkeypatch):
    monkeypatch.setattr(Guesses, "learned", frozenset())
    for prompt in (REPETITIVE, MIXED):
        expected = texts(NoGuesses, prompt, dtype, **options)
        monkeypatch.setattr(Guesses, "truth", expected[0].tokens)
        for kind in (PromptLookup, Guesses):
            assert texts(kind, prompt, dtype, **options) == expected
    assert options or len(Guesses.learned) > 4  # none was right, some, all


@needs_kernels
def test_a_text_of_a_form_is_that_without_guesses(texts):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    for options in ({"regex": "(ab|cd){3,9}!"}, {"choices": ("the cat sat", "the cat ran")}):
        expected = texts(NoGuesses, REPETITIVE, **options)
        assert texts(PromptLookup, REPETITIVE, **options) == expected


def test_a_guess_is_what_followed_the_longest_last_ngram():
    lookup = PromptLookup([9, 1, 2, 3, 4, 9, 2, 3, 5, 6, 7])
    assert lookup.guess([9, 1, 2, 3], 2) == [4, 9]
    assert lookup.guess([9, 1, 2, 3], 1) == [4]
    assert lookup.guess([9, 1, 2, 3, 8, 2, 3], 2) == [8, 2]  # after the last "2 3"
    assert lookup.guess([9, 1, 2, 3, 8, 2, 3, 1], 2) == []


def test_a_guess_goes_on_into_itself():
    lookup = PromptLookup([5, 8, 8, 8])
    lookup.learn(3, 3)
    assert lookup.guess([], 99) == [8] * 7


def test_guesses_grow_while_they_are_right_and_pause_when_they_are_not():
    lookup = PromptLookup([1, 2, 3, 4, 5] * 10)
    sizes = []
    for _ in range(4):
        sizes.append(len(lookup.guess([], 99)))
        lookup.learn(sizes[-1], sizes[-1])
    assert sizes == [*GUESSES, GUESSES[-1]]
    for right, following in ((6, 7), (7, 15), (2, 3)):
        lookup.learn(15, right)
        assert len(lookup.guess([], 99)) == following
    pauses = []
    for _ in range(3):
        lookup.learn(7, 0)
        pauses.append(0)
        while not (found := lookup.guess([], 99)):
            pauses[-1] += 1
        assert len(found) == GUESSES[0]
    assert pauses == [1, 3, 7]
