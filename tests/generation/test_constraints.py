"""The rules of generation_config.json, by hand: what each forbids, when, and in which row."""

import numpy as np
import pytest

from lmcli.config import GenerateConfig
from lmcli.generation.constraints import Constraints, block_repeated_ngrams, sequence_state


def blocked(scores) -> list[list[int]]:
    return [np.nonzero(row == -np.inf)[0].tolist() for row in scores]


def forbidden(prompts, tokens, stop_ids=(0,), limits=None, **options) -> list[list[int]]:
    """For each row the forbidden ones of ten ids."""
    rules = Constraints(GenerateConfig(**options), list(stop_ids), 10)
    state = sequence_state(prompts, tokens, limits or [20] * len(prompts))
    scores = rules.apply(np.ones((len(prompts), 10), np.float32), state)
    return blocked(scores)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [[1, 2, 3], [1], [1]]), (2, [[2], [], [1]]), (5, [[], [], []])]
)
def test_repeated_ngrams_and_short_texts(size, expected):
    scores = np.zeros((3, 6), np.float32)
    block_repeated_ngrams(scores, np.array([[1, 2, 3, 1], [-1, -1, -1, 1], [-1, 1, 1, 1]]), size)
    assert blocked(scores) == expected


@pytest.mark.parametrize(
    ("prompts", "tokens", "options", "expected"),
    [
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
        (
            [[1], [1]],
            [[4], [5]],
            {"bad_words_ids": ((4, 6), (7,), (0,), (1, 5, 8))},
            [[6, 7], [7, 8]],
        ),
    ],
)
def test_forbidden_ids(prompts, tokens, options, expected):
    assert forbidden(prompts, tokens, **options) == expected


def test_the_last_token_is_forced_at_the_limit():
    assert forbidden([[1], [1]], [[3, 4], [3, 4]], limits=[3, 4], forced_eos_token_id=0) == [
        list(range(1, 10)),
        [],
    ]


def test_without_rules_nothing_is_done():
    assert not Constraints(
        GenerateConfig(min_new_tokens=3), [], 10
    ).active  # there is no end to forbid
