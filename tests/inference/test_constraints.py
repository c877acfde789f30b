"""The rules of generation_config.json, each by hand: what they forbid, when, and for which row."""

import pytest
import torch

from lmcli.config import GenerateConfig
from lmcli.inference.constraints import Constraints, without_repeats, written

CPU = torch.device("cpu")


def forbidden(prompts, tokens, stops=(0,), limits=None, **options) -> list[list[int]]:
    """For each row the ids of ten that are at −∞."""
    rules = Constraints(GenerateConfig(**options), list(stops), 10, CPU)
    at = written(prompts, tokens, limits or [20] * len(prompts), CPU)
    scores = rules.apply(torch.ones(len(prompts), 10), at)
    return [(row == float("-inf")).nonzero()[:, 0].tolist() for row in scores]


def test_the_example_of_the_docstring_and_short_texts():
    scores = torch.zeros(3, 6)
    history = torch.tensor([[1, 2, 3, 1], [-1, -1, -1, 1], [-1, 1, 1, 1]])
    found = without_repeats(scores, history, 2)
    assert [(row == float("-inf")).nonzero()[:, 0].tolist() for row in found] == [[2], [], [1]]
    assert torch.equal(without_repeats(scores, history, 5), scores)
    assert (without_repeats(scores, history, 1) == float("-inf")).sum(1).tolist() == [3, 1, 1]


@pytest.mark.parametrize(("prompts", "tokens", "options", "wanted"), [
    ([[1, 2, 1]], [[]], {"no_repeat_ngram_size": 2}, [[2]]),  # a decoder's prompt counts
    ([[1], [1]], [[4, 5, 4], [6, 6, 7]], {"no_repeat_ngram_size": 2}, [[5], []]),
    ([[1], [1, 2, 3]], [[], []], {"min_new_tokens": 1}, [[0], [0]]),
    ([[1], [1, 2, 3]], [[5], [5]], {"min_new_tokens": 1}, [[], []]),
    ([[1], [1, 2, 3]], [[5], [5]], {"min_length": 4}, [[0], []]),
    ([[1], [1, 2]], [[], []], {"forced_bos_token_id": 3}, [[0, 1, 2, 4, 5, 6, 7, 8, 9], []]),
    ([[1]], [[3]], {"forced_bos_token_id": 3}, [[]]),
    ([[1]], [[3, 4]], {"suppress_tokens": (2, 7, 99)}, [[2, 7]]),
    ([[1]], [[]], {"begin_suppress_tokens": (2,)}, [[2]]),
    ([[1]], [[3]], {"begin_suppress_tokens": (2,)}, [[]]),
    ([[1]], [[3]], {"begin_suppress_tokens": (2,), "forced_bos_token_id": 3}, [[2]]),
    ([[1], [1]], [[4], [5]], {"bad_words_ids": ((4, 6), (7,), (0,), (1, 5, 8))}, [[6, 7], [7, 8]]),
])
def test_what_is_forbidden(prompts, tokens, options, wanted):
    assert forbidden(prompts, tokens, **options) == wanted


def test_the_last_token_is_forced_where_a_text_has_come_to_its_limit():
    assert forbidden([[1], [1]], [[3, 4], [3, 4]], limits=[3, 4], forced_eos_token_id=0) == [list(range(1, 10)), []]


def test_without_rules_nothing_is_done():
    assert not Constraints(GenerateConfig(min_new_tokens=3), [], 10, CPU).active  # there is no end to forbid
