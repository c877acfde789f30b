"""Continuations: the same alone or in a batch, with cache or without, streamed or whole; where they stop."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# ragged, one token long, and one that fills the context of 64 almost to its end
PROMPTS = [[0, 5, 9], [0], [0, *range(40, 101)], [0, *range(100, 130)], [0, 300, 301, 302, 303], [0, 7] * 20]


def plain_greedy(model, beginning: list[int], prompt: list[int], steps: int) -> list[int]:
    """The slow way: the whole window through the model for every token; past the context it keeps the newer half."""
    context, window, tokens = model.config.max_position_embeddings, list(prompt), []
    for _ in range(steps):
        if len(window) > context:
            window = beginning + window[-(context // 2 - len(beginning)):]
        with torch.no_grad():
            token = model(torch.tensor([window]))[0, -1].argmax().item()
        tokens, window = [*tokens, token], [*window, token]
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("steps", [1, 20, 200])
def test_greedy_is_the_likeliest_token_of_a_plain_loop_also_past_the_context(steps, use_cache, decoder):
    lm = decoder(max_new_tokens=steps, use_cache=use_cache)
    found = lm.generate(PROMPTS, [0] * len(PROMPTS))
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result.tokens == plain_greedy(lm.model, [0], prompt, steps)
        assert (result.finish_reason, len(result.token_logprobs)) == ("length", steps)


def test_a_model_without_a_beginning_slides_without_one(decoder):
    lm = decoder(beginning=(), max_new_tokens=150)
    assert lm.generate([[5, 6]], [0])[0].tokens == plain_greedy(lm.model, [], [5, 6], 150)


@pytest.mark.parametrize("context", [2, 3, 4, 5])
def test_the_smallest_contexts_slide_too(context, decoder, small_model):
    model = small_model(max_position_embeddings=context)
    with_cache, without = (decoder(model, use_cache=use, max_new_tokens=12).generate([[0, 5]], [0])[0].tokens
                           for use in (True, False))
    assert with_cache == without and len(without) == 12


@pytest.mark.parametrize("length", [63, 64, 65, 66, 200])
def test_prompts_at_and_past_the_context(length, decoder):
    lm = decoder(max_new_tokens=5)
    prompt = [0, *(i * 7 % 390 for i in range(length - 1))]
    assert lm.generate([prompt], [0])[0].tokens == plain_greedy(lm.model, [0], prompt, 5)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(len(PROMPTS))), st.integers(1, len(PROMPTS)), st.sampled_from([0.0, 1.0]))
def test_a_text_depends_on_its_prompt_and_seed_alone(decoder, alone_by_temperature, order, count, temperature):
    lm = decoder(max_new_tokens=12, temperature=temperature, stops=[17, 30, 44, 390])
    chosen = order[:count]
    together = lm.generate([PROMPTS[i] for i in chosen], [100 + i for i in chosen])
    for i, result in zip(chosen, together, strict=True):
        alone = alone_by_temperature[temperature][i]
        assert (result.tokens, result.text, result.seed) == (alone.tokens, alone.text, 100 + i)
        assert result.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def alone_by_temperature(decoder):
    """Every prompt continued on its own, greedily and drawn."""
    return {temperature: [decoder(max_new_tokens=12, temperature=temperature, stops=[17, 30, 44, 390]).generate(
        [prompt], [100 + i])[0] for i, prompt in enumerate(PROMPTS)] for temperature in (0.0, 1.0)}


def test_a_long_row_that_stops_early_leaves_the_others_their_room(decoder):
    """The long prompt fills the cache almost; once it is gone, the short one goes on far past what was left of it."""
    long, short = PROMPTS[2], PROMPTS[0]
    first = decoder(max_new_tokens=1).generate([long], [0])[0].tokens[0]
    lm = decoder(max_new_tokens=50, stops=[first])
    wanted = [lm.generate([prompt], [0])[0] for prompt in (long, short)]
    assert len(wanted[0].tokens) == 1 and len(wanted[1].tokens) > 10
    assert [result.tokens for result in lm.generate([long, short], [0, 0])] == [result.tokens for result in wanted]


def test_log_probabilities_are_the_models_own_before_temperature_and_filters(decoder):
    lm = decoder(temperature=3.0, top_k=5, repetition_penalty=1.3, max_new_tokens=15)
    result = lm.generate([[0, 5, 9]], [1])[0]
    ids = torch.tensor([[0, 5, 9, *result.tokens]])
    with torch.no_grad():
        wanted = lm.model(ids).log_softmax(-1)[0, 2:-1].gather(1, ids[0, 3:, None])[:, 0]
    assert result.token_logprobs == pytest.approx(wanted.tolist(), abs=1e-5)


def test_draws_follow_the_models_probabilities(decoder):
    lm = decoder(temperature=1.0, top_k=4, max_new_tokens=1)
    draws = 2000
    found = torch.tensor([result.tokens[0] for result in lm.generate([[0, 5]] * draws, list(range(draws)))])
    with torch.no_grad():
        likeliest = lm.model(torch.tensor([[0, 5]]))[0, -1].topk(4)
    counts = found.bincount(minlength=401)[likeliest.indices].double()
    assert counts.sum() == draws
    expected = draws * likeliest.values.double().softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum().item() < 16.3  # three degrees of freedom: 1 in 1,000 is larger


def test_the_seed_decides(decoder):
    lm = decoder(temperature=1.0)
    texts = [lm.generate([[0, 5]], [seed])[0].text for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_the_repetition_penalty_sees_the_prompt_and_what_was_written(decoder):
    prompt = [0, 5, 9]
    lm = decoder(repetition_penalty=1.8, max_new_tokens=30)
    tokens, seen = [], set(prompt)
    for _ in range(30):
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*prompt, *tokens]]))[0, -1]
        for token in seen:
            logits[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8
        tokens.append(logits.argmax().item())
        seen.add(tokens[-1])
    assert lm.generate([prompt, [0]], [0, 0])[0].tokens == tokens
    assert decoder(max_new_tokens=30).generate([prompt], [0])[0].tokens != tokens


def test_the_repetition_penalty_of_a_row_sees_that_row_only(decoder):
    prompts = [[5], [6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16], [17, 18, 19]]
    lm = decoder(beginning=(), repetition_penalty=0.02, max_new_tokens=4)  # what was seen comes again
    together = lm.generate(prompts, [0] * 6)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == lm.generate([prompt], [0])[0].tokens


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_end_token_stops_and_is_not_text(at, decoder):
    free = decoder().generate([[0, 5]], [0])[0]
    end = free.tokens[at]
    first = free.tokens.index(end)
    result = decoder(stops=[end, 398]).generate([[0, 5]], [0])[0]
    assert (result.finish_reason, result.tokens) == ("stop", free.tokens[:first + 1])
    assert result.text == decoder().tokenizer.decode(free.tokens[:first]).rstrip("\ufffd")
    assert len(result.token_logprobs) == first + 1


@pytest.fixture
def story(decoder, small_tokenizer, small_model):
    """A model that writes one sentence over and over: the head knows the next token from the position alone."""
    class Parrot(torch.nn.Module):
        """Answers every prompt with the ids of `text`, then the end."""

        def __init__(self, text: str):
            super().__init__()
            self.ids = [*small_tokenizer.encode(text), 0]
            self.config = small_model(max_position_embeddings=128).config
            self.embedding = torch.nn.Embedding(401, 401)
            self.embedding.weight.data = torch.eye(401)
            self.head = torch.nn.Identity()

        def hidden(self, ids, mask=None, cache=None, memory=None):
            found = torch.zeros(*ids.shape, 401)
            if cache is not None:
                cache.length += ids.shape[1]
            written = (cache.length if cache else ids.shape[1]) - 2  # the prompt has two tokens
            found[:, -1, self.ids[min(written, len(self.ids) - 1)]] = 9.0
            return found

    def run(text: str, *stops: str, **options):
        lm = decoder(Parrot(text), stop_strings=stops, **{"stops": [0], "max_new_tokens": 100, **options})
        pieces = list(lm.stream([[0, 5]], [0]))
        return pieces[-1].result, [piece.text for piece in pieces]
    return run


TEXT = "the dog saw a cat and the cat ran; zebra quartz 日本 jumped"


@pytest.mark.parametrize(("stops", "text", "reason"), [
    ((), TEXT, "stop"),
    (("never said",), TEXT, "stop"),
    ((" cat",), "the dog saw a", "stop"),
    (("the",), "", "stop"),  # at the very start
    (("at and t",), "the dog saw a c", "stop"),  # over three tokens
    (("ran; z", "quartz"), "the dog saw a cat and the cat ", "stop"),
    (("quartz", "ran"), "the dog saw a cat and the cat ", "stop"),  # the first in the text, not in the list
    (("cat and the dog",), TEXT, "stop"),  # begins, and does not go on so
    (("cat r",), "the dog saw a cat and the ", "stop"),  # begins twice
    (("本",), "the dog saw a cat and the cat ran; zebra quartz 日", "stop"),
    (("jumped over",), TEXT, "stop"),  # held back until the end, then given
    (("jumped",), TEXT.removesuffix("jumped"), "stop"),
])
def test_stop_strings(stops, text, reason, story):
    result, pieces = story(TEXT, *stops)
    assert (result.text, result.finish_reason) == (text, reason)
    assert "".join(pieces) == text


def test_only_what_a_stop_string_may_take_back_is_held_back(story):
    _, free = story(TEXT)
    assert story(TEXT, "☃")[1] == free
    given = list(accumulate(story(TEXT, "cat and the dog")[1]))
    assert not any(text.endswith((" cat", " and")) for text in given)  # the first cat: held until "c" is no "dog"
    assert "the dog saw a " in given
    assert given.index(TEXT) == list(accumulate(free)).index(TEXT)


def test_text_held_back_is_given_when_the_length_is_reached(story):
    result, pieces = story(TEXT, "dog saw a cat and the dog", max_new_tokens=4)
    assert result.finish_reason == "length"
    assert "".join(pieces) == result.text
    assert result.text == story(TEXT, max_new_tokens=4)[0].text


def test_a_character_is_streamed_whole(story):
    _, pieces = story("日本語 🙂 日本語")
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == "日本語 🙂 日本語"
    assert "" in pieces  # bytes of an open character give nothing yet


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_pieces_of_a_stream_make_up_the_texts(temperature, decoder):
    lm = decoder(temperature=temperature, max_new_tokens=90, stops=[3], stop_strings=("ing", "e t"))
    texts, results = [""] * len(PROMPTS), {}
    for piece in lm.stream(PROMPTS, list(range(len(PROMPTS)))):
        assert piece.row not in results
        texts[piece.row] += piece.text
        if piece.result:
            results[piece.row] = piece.result
    assert [results[i].text for i in range(len(PROMPTS))] == texts
    assert results == dict(enumerate(lm.generate(PROMPTS, list(range(len(PROMPTS))))))


def test_prompts_and_seeds_go_together(decoder):
    with pytest.raises(ValueError, match="zip"):
        decoder().generate(PROMPTS, [1])
