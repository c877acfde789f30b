"""Probabilities of words: those of all that could follow sum to one, counted by brute force over a vocabulary of nine."""

import math

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lmcli.inference.scoring import Question, Scorer
from lmcli.text.tokenizer import Tokenizer

END, A, B, SPACE, SPACE_A, SPACE_B, AB, SPACE_AB, LINE = range(9)
SPELT = {"<|endoftext|>": END, "a": A, "b": B, "Ġ": SPACE, "Ġa": SPACE_A, "Ġb": SPACE_B, "ab": AB, "Ġab": SPACE_AB,
         "Ċ": LINE}
TEXTS = {END: "", A: "a", B: "b", SPACE: " ", SPACE_A: " a", SPACE_B: " b", AB: "ab", SPACE_AB: " ab", LINE: "\n"}
BEFORE_A_WORD = (END, SPACE, SPACE_A, SPACE_B, SPACE_AB, LINE)  # a word has ended where one of these follows
DEPTH = 3


@pytest.fixture(scope="module")
def nine() -> Tokenizer:
    """Words of a and b, spaces and line ends."""
    core = tokenizers.Tokenizer(models.BPE(SPELT, [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ġa", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return Tokenizer(core)


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(vocab_size=9)


def following(model, ids: list[int]) -> torch.Tensor:
    """Probabilities (9,) of what follows the beginning and these ids, in float64."""
    with torch.inference_mode():
        return model(torch.tensor([[END, *ids]]))[0, -1].double().softmax(-1)


def continuations(model, before: list[int]) -> tuple[dict[tuple[int, ...], float], float]:
    """({tokens of each next word, and of the end: its probability}, what is left for longer ones), given that a word has
    ended: every string of tokens is tried, however the tokenizer would cut its text."""
    found, left = {}, 0.0
    given = following(model, before)[list(BEFORE_A_WORD)].sum().item()

    def go(ids: tuple[int, ...], probability: float) -> None:
        nonlocal left
        chances = following(model, [*before, *ids])
        in_word = any(TEXTS[token].strip() for token in ids)
        for token in range(9):
            chance = probability * chances[token].item()
            if not ids and token not in BEFORE_A_WORD:
                continue  # the word before would go on
            if token == END and not in_word:
                found[(*ids, END)] = found.get((*ids, END), 0.0) + chance
            elif in_word and token in BEFORE_A_WORD:
                found[ids] = found.get(ids, 0.0) + chance
            elif len(ids) < DEPTH:
                go((*ids, token), chance)
            else:
                left += chance

    go((), 1 / given)
    return found, left


@pytest.mark.parametrize("before", ["a", "ab b", "b a\nab"], ids=repr)
def test_all_words_that_could_follow_sum_to_one(before, nine, model):
    found, left = continuations(model, nine.encode(before))
    assert 0 < left < 0.99 and sum(found.values()) + left == pytest.approx(1.0, abs=1e-5)
    lm, closed, rest, checked = Scorer(model, nine, [END]), 0.0, left, 0
    for ids, probability in found.items():
        text = "".join(map(TEXTS.get, ids))
        if END in ids or list(ids) != nine.encode(before + text)[len(nine.encode(before)):]:
            rest += probability  # the end, and tokens that nobody would write this text with
            continue
        (unit,) = lm.score([Question(text, before)], per="word")[0].pieces
        assert unit.piece == text.strip()
        assert math.exp(unit.logprob) == pytest.approx(probability, rel=1e-4)
        closed, checked = closed + math.exp(unit.logprob), checked + 1
    assert checked > 12 and closed + rest == pytest.approx(1.0, abs=1e-5)


def test_at_the_start_of_a_text_nothing_is_given(nine, model):
    (unit,) = Scorer(model, nine, [END]).score(["ab"], per="word")[0].pieces
    ends = following(model, [AB])[list(BEFORE_A_WORD)].sum()
    assert math.exp(unit.logprob) == pytest.approx((following(model, [])[AB] * ends).item(), rel=1e-5)


def test_words_add_up_to_their_tokens_and_the_end_of_the_last(nine, model):
    lm, text = Scorer(model, nine, [END]), "a ab\nbb  a "
    words, tokens = (lm.score([text], per=per)[0].pieces for per in ("word", "token"))
    last = text.index("a ", 8) + 1  # behind the last word: the space there belongs to none
    ids = nine.encode(text)
    cut = [unit.start for unit in tokens].index(last)
    ends = following(model, ids[:cut])[list(BEFORE_A_WORD)].sum().log().item()
    assert [unit.piece for unit in words] == ["a", "ab", "bb", "a"]
    assert sum(unit.logprob for unit in words) == pytest.approx(
        sum(unit.logprob for unit in tokens[:cut]) + ends, abs=1e-4)


def test_a_word_at_the_end_of_a_full_window_is_followed_by_one_more(nine, model):
    """The end of a word is read behind its last token, for which a window must have room."""
    text = "ab " * 40 + "b"
    for context, stride in ((8, 4), (8, 8), (32, 16)):
        lm = Scorer(model, nine, [END], context=context, stride=stride)
        tokens, words = (lm.score([text], per=per)[0] for per in ("token", "word"))
        assert len(words.pieces) == 41 and all(unit.logprob < 0 for unit in words.pieces)
        assert (words.logprob, words.tokens) == (pytest.approx(tokens.logprob, abs=1e-4), tokens.tokens)


def test_a_token_over_two_words_leaves_both_without_a_figure(nine, model):
    core = tokenizers.Tokenizer(models.BPE({**SPELT, "aĠa": 9}, [("a", "Ġa"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    lumped = Tokenizer(core)
    assert [lumped.token_texts[i] for i in lumped.encode("a a b")] == ["a a", " ", "b"]


def test_where_the_vocabulary_marks_spaces(nine):
    assert nine.token_texts == ["<|endoftext|>", "a", "b", " ", " a", " b", "ab", " ab", "\n"]
    assert nine.word_starts == [i in BEFORE_A_WORD for i in range(9)]
