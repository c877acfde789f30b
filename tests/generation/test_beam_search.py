"""Beam search against transformers: the same sequences with the same scores."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.generation.batch_generation import generate_all
from lmcli.kernels import build
from lmcli.kernels.decode_step import largest_columns


def theirs(model, prompt: list[int], decoder, count: int) -> list[tuple[list[int], float]]:
    """(tokens with their stop token, score) of `count` beams by transformers."""
    config = decoder.config
    results = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=config.num_beams,
        num_return_sequences=count,
        max_new_tokens=config.max_new_tokens,
        length_penalty=config.length_penalty,
        eos_token_id=decoder.stop_ids or None,
        pad_token_id=399,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = []
    for ids, score in zip(
        results.sequences[:, len(prompt) :].tolist(), results.sequences_scores.tolist(), strict=True
    ):
        end = next((i for i, token in enumerate(ids) if token in decoder.stop_ids), len(ids) - 1)
        sequences.append((ids[: end + 1], score))
    return sequences


def assert_same(decoder, model, prompt: list[int], count: int) -> list:
    results, expected = decoder.beams([prompt], count)[0], theirs(model, prompt, decoder, count)
    assert [result.tokens for result in results] == [ids for ids, _ in expected]
    power = decoder.config.length_penalty
    scores = [sum(result.token_logprobs) / len(result.tokens) ** power for result in results]
    assert scores == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-5)
    return results


@pytest.fixture(scope="module")
def pair(small_model, small_tokenizer, tmp_path_factory):
    """Our model, sharpened so that scores are not nearly equal, and transformers' copy of it."""
    folder = tmp_path_factory.mktemp("beams")
    model = small_model(
        max_position_embeddings=64, vocab_size=small_tokenizer.size, tie_word_embeddings=False
    )
    with torch.no_grad():
        model.head.output.weight *= 2
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig())
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("length_penalty", [1.0, 0.5, 2.0, 0.0, -1.0])
@pytest.mark.parametrize("beams", [2, 4, 7])
def test_the_same_beams_as_transformers(beams, length_penalty, pair, decoder):
    ours, model = pair
    ended = 0
    for start in range(1, 13, 2):
        prompt = [0, start, 400 - 13 * start]
        free = decoder(
            ours, num_beams=beams, max_new_tokens=12, length_penalty=length_penalty
        ).beams([prompt], beams)[0]
        # stop tokens that occur: from good beams, at an early, a middle or a late step
        ends = [free[0].tokens[start % 12], free[-1].tokens[(5 * start) % 12]]
        lm = decoder(
            ours,
            stop_ids=([], ends[:1], ends)[start % 3],
            num_beams=beams,
            max_new_tokens=12,
            length_penalty=length_penalty,
        )
        results = assert_same(lm, model, prompt, beams)
        ended += sum(result.finish_reason == "stop" for result in results)
    assert ended


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_than_all_beams_are_the_best_ones(count, pair, decoder):
    ours, model = pair
    lm = decoder(ours, stop_ids=[3, 33, 133], num_beams=4, max_new_tokens=8)
    assert [result.tokens for result in assert_same(lm, model, [0, 7], 4)[:count]] == [
        result.tokens for result in assert_same(lm, model, [0, 7], count)
    ]


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_short_and_long_searches(steps, pair, decoder):
    ours, model = pair
    for stop_ids in ([], [5, 105, 205, 305]):
        assert_same(
            decoder(ours, stop_ids=stop_ids, num_beams=4, max_new_tokens=steps), model, [0, 9, 8], 4
        )


@pytest.fixture(scope="module")
def trained(shared):
    """A trained model of others as transformers and as we load it."""
    folder = shared / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder), checkpoints.load(folder)


@pytest.mark.parametrize("length_penalty", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "stop_ids",
    [[], [2], [426], [426, 432]],
    ids=str,  # 426 is the full stop, 432 the comma
)
def test_a_trained_model_gives_the_texts_of_transformers(
    stop_ids, length_penalty, trained, decoder
):
    model, loaded = trained
    for text in ("Once upon a time", "The dog", ""):
        lm = decoder(
            loaded.model,
            stop_ids=stop_ids,
            num_beams=4,
            max_new_tokens=24,
            length_penalty=length_penalty,
        )
        lm.tokenizer = loaded.tokenizer
        results = assert_same(lm, model, [1, *loaded.tokenizer.encode(text)], 4)
        assert len({result.text for result in results}) > 1


def test_beams_are_no_worse_than_greedy(pair, decoder):
    ours, _ = pair
    greedy = decoder(ours, max_new_tokens=6).generate([[0, 5]], [0])[0]
    best = decoder(ours, num_beams=16, max_new_tokens=6).beams([[0, 5]], 1)[0][0]
    assert sum(best.token_logprobs) >= sum(greedy.token_logprobs)


def test_with_a_beam_for_every_sequence_the_search_is_exhaustive(pair, decoder):
    """Two tokens after the prompt, by brute force over all pairs."""
    ours, _ = pair
    size = ours.config.vocab_size
    with torch.no_grad():
        first = ours(torch.tensor([[0, 5]]))[0, -1].log_softmax(-1)
        rows = torch.stack(
            [torch.full((size,), 0), torch.full((size,), 5), torch.arange(size)], dim=1
        )
        both = first[:, None] + ours(rows)[:, -1].log_softmax(-1)
    best = both.flatten().topk(3)
    results = decoder(ours, num_beams=600, max_new_tokens=2).beams([[0, 5]], 3)[
        0
    ]  # more beams than ids
    assert [result.tokens for result in results] == [
        list(divmod(i, size)) for i in best.indices.tolist()
    ]
    assert [sum(result.token_logprobs) for result in results] == pytest.approx(
        best.values.tolist(), abs=1e-4
    )


def test_a_search_ends_at_the_context(pair, decoder):
    ours, _ = pair
    for length in (60, 63, 64, 100):
        result = decoder(ours, num_beams=3, max_new_tokens=100).beams([[0, *range(1, length)]], 1)[
            0
        ][0]
        assert result.finish_reason == "length"
        assert 0 < len(result.tokens) <= 33


def test_beams_do_not_depend_on_a_longer_prompt_that_ends_first(pair, decoder):
    ours, _ = pair
    search = decoder(ours, num_beams=4, max_new_tokens=40)
    prompts = [[0, *range(7, 50)], [0, 5, 9], [0, 8]]  # the first has room for 20 tokens
    alone = [search.beams([prompt], 4)[0] for prompt in prompts]
    together = search.beams(prompts, 4)
    assert [[text.tokens for text in texts] for texts in together] == [
        [text.tokens for text in texts] for texts in alone
    ]
    assert len(alone[0][0].tokens) < len(alone[1][0].tokens)


def test_stop_strings_cut_beams_too(pair, decoder):
    ours, _ = pair
    free = decoder(ours, num_beams=4).beams([[0, 5]], 1)[0][0]
    stop = free.text[3:5]
    result = decoder(ours, num_beams=4, stop_strings=[stop]).beams([[0, 5]], 1)[0][0]
    assert (result.text, result.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def every_text(model, prompt: list[int], stop: int, steps: int) -> dict[tuple[int, ...], float]:
    """All texts of at most `steps` tokens that end with `stop` or there, with log-probability."""
    texts, unfinished = {}, {(): 0.0}
    for step in range(steps):
        longer = {}
        for text, logprob in unfinished.items():
            with torch.no_grad():
                logprobs = model(torch.tensor([[*prompt, *text]]))[0, -1].log_softmax(-1)
            for token, value in enumerate(logprobs.tolist()):
                done = token == stop or step == steps - 1
                (texts if done else longer)[*text, token] = logprob + value
        unfinished = longer
    return texts


@pytest.mark.parametrize("early_stopping", ["false", "true", "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -2.0, -10.0, 10.0])
def test_more_beams_than_texts_give_every_text_once(
    length_penalty, early_stopping, decoder, small_model
):
    model = small_model(vocab_size=4, max_position_embeddings=16)
    lm = decoder(
        model,
        stop_ids=[2],
        num_beams=50,
        max_new_tokens=3,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    expected = {
        text: logprob / len(text) ** length_penalty
        for text, logprob in every_text(model, [0, 3], 2, 3).items()
    }
    assert len(expected) == 1 + 3 + 9 * 4
    results = [tuple(result.tokens) for result in lm.beams([[0, 3]], 50)[0]]
    assert set(results) == set(expected) and len(results) == len(expected)
    scores = [expected[text] for text in results]
    assert all(a >= b - 1e-5 * abs(b) for a, b in pairwise(scores))
    asked = generate_all(lm, [[0, 3], [0, 1]], 50, seed=0)
    assert [len(texts) for texts in asked] == [41, 41]  # a 41st that says what is wrong
    assert {texts[-1].problem for texts in asked} == {
        "only 40 texts found, fewer than --num-samples 50"
    }


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": -10.0},  # scores far below -1e9
        {"length_penalty": -10.0, "max_new_tokens": 1},
        {"length_penalty": 10.0, "early_stopping": "never"},
        {"min_new_tokens": 30},  # more than may come
        {"no_repeat_ngram_size": 1, "max_new_tokens": 60},  # no token is left
        {"suppress_tokens": tuple(range(8))},
        {"suppress_tokens": tuple(range(7)), "no_repeat_ngram_size": 2},
        {"suppress_tokens": tuple(range(8)), "forced_eos_token_id": 2},
        {"bad_words_ids": tuple((token,) for token in range(8))},
        {"repetition_penalty": 100.0},
        {"max_length": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("beams", [1, 2, 12])
def test_every_prompt_has_its_text_whatever_is_forbidden(options, beams, decoder, small_model):
    model = small_model(vocab_size=8, max_position_embeddings=16)
    prompts = [[0], [0, 5], [0, 5, 2, 7, 6], [3] * 40]
    options = {"max_new_tokens": 6, **options}
    lm = decoder(model, stop_ids=[2], num_beams=beams, **options)
    ((first,), (second,), (third,), (fourth,)) = generate_all(lm, prompts, 1, seed=0)
    forbidden = {*options.get("suppress_tokens", ())} | {
        word[0] for word in options.get("bad_words_ids", ())
    }
    forbidden -= {options.get("forced_eos_token_id"), 2 if "bad_words_ids" in options else None}
    for prompt, result in zip(prompts, (first, second, third, fourth)):
        assert not result.problem and result.finish_reason in ("stop", "length")
        assert len(result.tokens) == len(result.token_logprobs) <= options["max_new_tokens"]
        assert not forbidden & set(result.tokens) and 2 not in result.tokens[:-1]
        if options.get("no_repeat_ngram_size") == 1:
            assert not set(prompt[-15:]) & set(result.tokens)
            assert len(set(result.tokens)) == len(result.tokens)
    if options.get("suppress_tokens") == tuple(range(8)) and "forced_eos_token_id" not in options:
        assert [first.tokens, first.text, first.finish_reason] == [[], "", "stop"]


@pytest.mark.parametrize("context", [2, 3, 4])
def test_the_smallest_contexts_have_texts(context, decoder, small_model):
    model = small_model(max_position_embeddings=context)
    lm = decoder(model, num_beams=3, max_new_tokens=5)
    for prompt in ([0], [0, 5], [0, 5, 6, 7, 8, 9]):
        ((result,),) = generate_all(lm, [prompt], 1, seed=0)
        assert 1 <= len(result.tokens) < context and not result.problem


@pytest.mark.skipif(build.library() is None, reason=build.problem())
@pytest.mark.parametrize("size", [3, 64, 150, 1000])
def test_largest_columns_of_rows(size):
    scores = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    scores[1] = scores[1].round()  # equal ones
    scores[2, :-2] = -torch.inf
    scores[3, size // 2] = torch.nan
    for count in (1, 4, 2 * size):
        columns = largest_columns(scores.numpy(), count)
        expected = scores.topk(min(count, size)).values
        assert torch.equal(
            scores.gather(1, torch.from_numpy(columns)).nan_to_num(9), expected.nan_to_num(9)
        )
        assert all(len(set(row)) == len(row) for row in columns.tolist())
    assert columns[1].tolist() == scores[1].argsort(descending=True, stable=True).tolist()
