"""Word probabilities sum to one over all next words: by brute force, with nine tokens."""

import math

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lmcli.scoring.scorer import Scorer, ScoringInput
from lmcli.text.tokenizer import Tokenizer

END, A, B, SPACE, SPACE_A, SPACE_B, AB, SPACE_AB, LINE = range(9)
VOCABULARY = {
    "<|endoftext|>": END,
    "a": A,
    "b": B,
    "Ġ": SPACE,
    "Ġa": SPACE_A,
    "Ġb": SPACE_B,
    "ab": AB,
    "Ġab": SPACE_AB,
    "Ċ": LINE,
}
TEXTS = {
    END: "",
    A: "a",
    B: "b",
    SPACE: " ",
    SPACE_A: " a",
    SPACE_B: " b",
    AB: "ab",
    SPACE_AB: " ab",
    LINE: "\n",
}
# a word has ended before these tokens
BEFORE_A_WORD = (END, SPACE, SPACE_A, SPACE_B, SPACE_AB, LINE)
DEPTH = 3


@pytest.fixture(scope="module")
def nine() -> Tokenizer:
    """A tokenizer of words of a and b, spaces and line ends."""
    core = tokenizers.Tokenizer(
        models.BPE(VOCABULARY, [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ġa", "b")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return Tokenizer(core)


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(vocab_size=9)


def following(model, ids: list[int]) -> torch.Tensor:
    """Probabilities (9,) float64 of the next token after bos and these ids."""
    with torch.inference_mode():
        return model(torch.tensor([[END, *ids]]))[0, -1].double().softmax(-1)


def continuations(model, before: list[int]) -> tuple[dict[tuple[int, ...], float], float]:
    """({tokens of a next word or the end: probability}, probability of longer words).

    Given that a word has ended. Every sequence of tokens is tried, also those that the tokenizer
    would not produce.
    """
    probabilities, left = {}, 0.0
    ended = following(model, before)[list(BEFORE_A_WORD)].sum().item()

    def extend(ids: tuple[int, ...], probability: float) -> None:
        nonlocal left
        chances = following(model, [*before, *ids])
        in_word = any(TEXTS[token].strip() for token in ids)
        for token in range(9):
            chance = probability * chances[token].item()
            if not ids and token not in BEFORE_A_WORD:
                continue  # the word before would continue
            if token == END and not in_word:
                probabilities[(*ids, END)] = probabilities.get((*ids, END), 0.0) + chance
            elif in_word and token in BEFORE_A_WORD:
                probabilities[ids] = probabilities.get(ids, 0.0) + chance
            elif len(ids) < DEPTH:
                extend((*ids, token), chance)
            else:
                left += chance

    extend((), 1 / ended)
    return probabilities, left


@pytest.mark.parametrize("before", ["a", "ab b", "b a\nab"], ids=repr)
def test_all_possible_next_words_sum_to_one(before, nine, model):
    probabilities, left = continuations(model, nine.encode(before))
    assert 0 < left < 0.99 and sum(probabilities.values()) + left == pytest.approx(1.0, abs=1e-5)
    lm, closed, rest, checked = Scorer(model, nine, [END]), 0.0, left, 0
    for ids, probability in probabilities.items():
        text = "".join(map(TEXTS.get, ids))
        if END in ids or list(ids) != nine.encode(before + text)[len(nine.encode(before)) :]:
            rest += probability  # the end, and tokens that the tokenizer does not produce
            continue
        (unit,) = lm.score([ScoringInput(text, before)], per="word")[0].pieces
        assert unit.piece == text.strip()
        assert math.exp(unit.logprob) == pytest.approx(probability, rel=1e-4)
        closed, checked = closed + math.exp(unit.logprob), checked + 1
    assert checked > 12 and closed + rest == pytest.approx(1.0, abs=1e-5)


def test_the_first_word_has_no_word_before_it(nine, model):
    (unit,) = Scorer(model, nine, [END]).score(["ab"], per="word")[0].pieces
    ends = following(model, [AB])[list(BEFORE_A_WORD)].sum()
    assert math.exp(unit.logprob) == pytest.approx(
        (following(model, [])[AB] * ends).item(), rel=1e-5
    )


def test_words_add_up_to_their_tokens_and_the_ending_of_the_last(nine, model):
    lm, text = Scorer(model, nine, [END]), "a ab\nbb  a "
    words, tokens = (lm.score([text], per=per)[0].pieces for per in ("word", "token"))
    last = text.index("a ", 8) + 1  # after the last word: this space belongs to no word
    ids = nine.encode(text)
    cut = [unit.start for unit in tokens].index(last)
    ends = following(model, ids[:cut])[list(BEFORE_A_WORD)].sum().log().item()
    assert [unit.piece for unit in words] == ["a", "ab", "bb", "a"]
    assert sum(unit.logprob for unit in words) == pytest.approx(
        sum(unit.logprob for unit in tokens[:cut]) + ends, abs=1e-4
    )


def test_a_word_at_the_end_of_a_full_window_is_scored(nine, model):
    """The ending of a word is predicted after its last token, which a window must read."""
    text = "ab " * 40 + "b"
    for context, stride in ((8, 4), (8, 8), (32, 16)):
        lm = Scorer(model, nine, [END], context=context, stride=stride)
        tokens, words = (lm.score([text], per=per)[0] for per in ("token", "word"))
        assert len(words.pieces) == 41 and all(unit.logprob < 0 for unit in words.pieces)
        assert (words.logprob, words.tokens) == (
            pytest.approx(tokens.logprob, abs=1e-4),
            tokens.tokens,
        )


def test_a_token_may_span_two_words(nine, model):
    core = tokenizers.Tokenizer(models.BPE({**VOCABULARY, "aĠa": 9}, [("a", "Ġa"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    lumped = Tokenizer(core)
    assert [lumped.token_texts[i] for i in lumped.encode("a a b")] == ["a a", " ", "b"]


def test_tokens_that_start_a_word(nine):
    assert nine.token_texts == ["<|endoftext|>", "a", "b", " ", " a", " b", "ab", " ab", "\n"]
    assert nine.word_starts == [i in BEFORE_A_WORD for i in range(9)]
