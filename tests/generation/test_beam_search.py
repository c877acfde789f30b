"""Beam search against transformers: the same sequences with the same scores."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig


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
    for start in range(1, 13):
        prompt = [0, start, 400 - 13 * start]
        free = decoder(
            ours, num_beams=beams, max_new_tokens=12, length_penalty=length_penalty
        ).beams([prompt], beams)[0]
        # stop tokens that occur: from good beams, at an early, a middle or a late step
        ends = [free[0].tokens[start % 12], free[-1].tokens[(5 * start) % 12]]
        for stop_ids in ([], ends[:1], ends):
            lm = decoder(
                ours,
                stop_ids=stop_ids,
                num_beams=beams,
                max_new_tokens=12,
                length_penalty=length_penalty,
            )
            results = assert_same(lm, model, prompt, beams)
            ended += sum(result.finish_reason == "stop" for result in results)
    assert ended > 10


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


@pytest.mark.parametrize("length_penalty", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "stop_ids",
    [[], [2], [426], [426, 432]],
    ids=str,  # 426 is the full stop, 432 the comma
)
def test_a_trained_model_gives_the_texts_of_transformers(stop_ids, length_penalty, shared, decoder):
    folder = shared / "models" / "stories260K"
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), checkpoints.load(folder)
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


def test_stop_strings_cut_beams_too(pair, decoder):
    ours, _ = pair
    free = decoder(ours, num_beams=4).beams([[0, 5]], 1)[0][0]
    stop = free.text[3:5]
    result = decoder(ours, num_beams=4, stop_strings=[stop]).beams([[0, 5]], 1)[0][0]
    assert (result.text, result.finish_reason) == (free.text[: free.text.index(stop)], "stop")
