"""The rules of generation_config.json, by hand: what each forbids, when, and in which row."""

import pytest
import torch

from lmcli.config import GenerateConfig
from lmcli.generation.constraints import Constraints, block_repeated_ngrams, sequence_state

CPU = torch.device("cpu")


def forbidden(prompts, tokens, stop_ids=(0,), limits=None, **options) -> list[list[int]]:
    """For each row the forbidden ones of ten ids."""
    rules = Constraints(GenerateConfig(**options), list(stop_ids), 10, CPU)
    state = sequence_state(prompts, tokens, limits or [20] * len(prompts), CPU)
    scores = rules.apply(torch.ones(len(prompts), 10), state)
    return [(row == float("-inf")).nonzero()[:, 0].tolist() for row in scores]


def test_repeated_ngrams_and_short_texts():
    scores = torch.zeros(3, 6)
    history = torch.tensor([[1, 2, 3, 1], [-1, -1, -1, 1], [-1, 1, 1, 1]])
    results = block_repeated_ngrams(scores, history, 2)
    assert [(row == float("-inf")).nonzero()[:, 0].tolist() for row in results] == [[2], [], [1]]
    assert torch.equal(block_repeated_ngrams(scores, history, 5), scores)
    assert (block_repeated_ngrams(scores, history, 1) == float("-inf")).sum(1).tolist() == [3, 1, 1]


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
        GenerateConfig(min_new_tokens=3), [], 10, CPU
    ).active  # there is no end to forbid
