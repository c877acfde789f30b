"""Continuations: equal alone and in a batch, with and without cache, streamed and whole."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# of many lengths, one token, and one that almost fills the context of 64
PROMPTS = [
    [0, 5, 9],
    [0],
    [0, *range(40, 101)],
    [0, *range(100, 130)],
    [0, 300, 301, 302, 303],
    [0, 7] * 20,
]


def plain_greedy(model, bos: list[int], prompt: list[int], steps: int) -> list[int]:
    """The slow reference: a full forward pass of the window for every token."""
    context, window, tokens = model.config.max_position_embeddings, list(prompt), []
    for _ in range(steps):
        if len(window) > context:
            window = bos + window[-(context // 2 - len(bos)) :]
        with torch.no_grad():
            token = model(torch.tensor([window]))[0, -1].argmax().item()
        tokens, window = [*tokens, token], [*window, token]
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("steps", [1, 20, 110])
def test_greedy_decoding_equals_a_plain_loop_also_past_the_context(steps, use_cache, decoder):
    lm = decoder(max_new_tokens=steps, use_cache=use_cache)
    results = lm.generate(PROMPTS, [0] * len(PROMPTS))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == plain_greedy(lm.model, [0], prompt, steps)
        assert (result.finish_reason, len(result.token_logprobs)) == ("length", steps)


def test_without_bos_the_window_slides_without_it(decoder):
    lm = decoder(bos=(), max_new_tokens=150)
    assert lm.generate([[5, 6]], [0])[0].tokens == plain_greedy(lm.model, [], [5, 6], 150)


@pytest.mark.parametrize("context", [2, 3, 4, 5])
def test_the_smallest_contexts_slide_too(context, decoder, small_model):
    model = small_model(max_position_embeddings=context)
    with_cache, without = (
        decoder(model, use_cache=use, max_new_tokens=12).generate([[0, 5]], [0])[0].tokens
        for use in (True, False)
    )
    assert with_cache == without and len(without) == 12


@pytest.mark.parametrize("length", [63, 64, 65, 66, 200])
def test_prompts_at_and_past_the_context(length, decoder):
    lm = decoder(max_new_tokens=5)
    prompt = [0, *(i * 7 % 390 for i in range(length - 1))]
    assert lm.generate([prompt], [0])[0].tokens == plain_greedy(lm.model, [0], prompt, 5)


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(range(len(PROMPTS))), st.integers(1, len(PROMPTS)), st.sampled_from([0.0, 1.0])
)
def test_a_text_depends_on_its_prompt_and_seed_only(
    decoder, alone_by_temperature, order, count, temperature
):
    lm = decoder(max_new_tokens=12, temperature=temperature, stop_ids=[17, 30, 44, 390])
    chosen = order[:count]
    together = lm.generate([PROMPTS[i] for i in chosen], [100 + i for i in chosen])
    for i, result in zip(chosen, together, strict=True):
        alone = alone_by_temperature[temperature][i]
        assert (result.tokens, result.text, result.seed) == (alone.tokens, alone.text, 100 + i)
        assert result.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def alone_by_temperature(decoder):
    """Every prompt continued alone, greedily and sampled."""
    return {
        temperature: [
            decoder(
                max_new_tokens=12, temperature=temperature, stop_ids=[17, 30, 44, 390]
            ).generate([prompt], [100 + i])[0]
            for i, prompt in enumerate(PROMPTS)
        ]
        for temperature in (0.0, 1.0)
    }


def test_when_the_longest_row_ends_the_others_continue(decoder):
    """The long prompt almost fills the cache; the short one then needs more than was left."""
    long, short = PROMPTS[2], PROMPTS[0]
    first = decoder(max_new_tokens=1).generate([long], [0])[0].tokens[0]
    lm = decoder(max_new_tokens=50, stop_ids=[first])
    expected = [lm.generate([prompt], [0])[0] for prompt in (long, short)]
    assert len(expected[0].tokens) == 1 and len(expected[1].tokens) > 10
    assert [result.tokens for result in lm.generate([long, short], [0, 0])] == [
        result.tokens for result in expected
    ]


def test_logprobs_are_those_before_temperature_and_filters(decoder):
    lm = decoder(temperature=3.0, top_k=5, repetition_penalty=1.3, max_new_tokens=15)
    result = lm.generate([[0, 5, 9]], [1])[0]
    ids = torch.tensor([[0, 5, 9, *result.tokens]])
    with torch.no_grad():
        expected = lm.model(ids).log_softmax(-1)[0, 2:-1].gather(1, ids[0, 3:, None])[:, 0]
    assert result.token_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_draws_follow_the_models_probabilities(decoder):
    lm = decoder(temperature=1.0, top_k=4, max_new_tokens=1)
    draws = 2000
    results = torch.tensor(
        [result.tokens[0] for result in lm.generate([[0, 5]] * draws, list(range(draws)))]
    )
    with torch.no_grad():
        likeliest = lm.model(torch.tensor([[0, 5]]))[0, -1].topk(4)
    counts = results.bincount(minlength=401)[likeliest.indices].double()
    assert counts.sum() == draws
    expected = draws * likeliest.values.double().softmax(-1)
    assert (
        (counts - expected) ** 2 / expected
    ).sum().item() < 16.3  # three degrees of freedom: 1 in 1,000 is larger


def test_the_seed_determines_the_text(decoder):
    lm = decoder(temperature=1.0)
    texts = [lm.generate([[0, 5]], [seed])[0].text for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_the_repetition_penalty_covers_the_prompt_and_new_tokens(decoder):
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


def test_the_repetition_penalty_does_not_cover_other_rows(decoder):
    prompts = [[5], [6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16], [17, 18, 19]]
    lm = decoder(bos=(), repetition_penalty=0.02, max_new_tokens=4)  # what was seen comes again
    together = lm.generate(prompts, [0] * 6)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == lm.generate([prompt], [0])[0].tokens


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_stop_token_ends_the_text_and_is_not_in_it(at, decoder):
    free = decoder().generate([[0, 5]], [0])[0]
    end = free.tokens[at]
    first = free.tokens.index(end)
    result = decoder(stop_ids=[end, 398]).generate([[0, 5]], [0])[0]
    assert (result.finish_reason, result.tokens) == ("stop", free.tokens[: first + 1])
    assert result.text == decoder().tokenizer.decode(free.tokens[:first]).rstrip("\ufffd")
    assert len(result.token_logprobs) == first + 1


@pytest.fixture
def story(decoder, small_tokenizer, small_model):
    """story(text, *stop_strings): (result, texts of chunks) of a model that writes `text`."""

    class Parrot(torch.nn.Module):
        """Continues every prompt with the ids of `text`, then the stop token."""

        def __init__(self, text: str):
            super().__init__()
            self.ids = [*small_tokenizer.encode(text), 0]
            self.config = small_model(max_position_embeddings=128).config
            self.embedding = torch.nn.Embedding(401, 401)
            self.embedding.weight.data = torch.eye(401)
            self.head = torch.nn.Identity()

        def hidden(self, ids, mask=None, cache=None, encoder_output=None):
            logits = torch.zeros(*ids.shape, 401)
            if cache is not None:
                cache.length += ids.shape[1]
            written = (cache.length if cache else ids.shape[1]) - 2  # the prompt has two tokens
            logits[:, -1, self.ids[min(written, len(self.ids) - 1)]] = 9.0
            return logits

    def run(text: str, *stop_strings: str, **options):
        lm = decoder(
            Parrot(text),
            stop_strings=stop_strings,
            **{"stop_ids": [0], "max_new_tokens": 100, **options},
        )
        chunks = list(lm.stream([[0, 5]], [0]))
        return chunks[-1].result, [chunk.text for chunk in chunks]

    return run


TEXT = "the dog saw a cat and the cat ran; zebra quartz 日本 jumped"


@pytest.mark.parametrize(
    ("stop_strings", "text", "reason"),
    [
        ((), TEXT, "stop"),
        (("never said",), TEXT, "stop"),
        ((" cat",), "the dog saw a", "stop"),
        (("the",), "", "stop"),  # at the very start
        (("at and t",), "the dog saw a c", "stop"),  # over three tokens
        (("ran; z", "quartz"), "the dog saw a cat and the cat ", "stop"),
        (
            ("quartz", "ran"),
            "the dog saw a cat and the cat ",
            "stop",
        ),  # the first in the text, not in the list
        (("cat and the dog",), TEXT, "stop"),  # begins, and does not go on so
        (("cat r",), "the dog saw a cat and the ", "stop"),  # begins twice
        (("本",), "the dog saw a cat and the cat ran; zebra quartz 日", "stop"),
        (("jumped over",), TEXT, "stop"),  # held back until the end
        (("jumped",), TEXT.removesuffix("jumped"), "stop"),
    ],
)
def test_stop_strings(stop_strings, text, reason, story):
    result, chunks = story(TEXT, *stop_strings)
    assert (result.text, result.finish_reason) == (text, reason)
    assert "".join(chunks) == text


def test_only_a_possible_stop_string_is_held_back(story):
    _, free = story(TEXT)
    assert story(TEXT, "☃")[1] == free
    shown = list(accumulate(story(TEXT, "cat and the dog")[1]))
    assert not any(
        text.endswith((" cat", " and")) for text in shown
    )  # the first cat: held until "c" is no "dog"
    assert "the dog saw a " in shown
    assert shown.index(TEXT) == list(accumulate(free)).index(TEXT)


def test_held_back_text_appears_when_the_length_is_reached(story):
    result, chunks = story(TEXT, "dog saw a cat and the dog", max_new_tokens=4)
    assert result.finish_reason == "length"
    assert "".join(chunks) == result.text
    assert result.text == story(TEXT, max_new_tokens=4)[0].text


def test_characters_are_streamed_whole(story):
    _, chunks = story("日本語 🙂 日本語")
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert "".join(chunks) == "日本語 🙂 日本語"
    assert "" in chunks  # bytes of an incomplete character give no text yet


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_chunks_add_up_to_the_texts(temperature, decoder):
    lm = decoder(
        temperature=temperature, max_new_tokens=90, stop_ids=[3], stop_strings=("ing", "e t")
    )
    texts, results = [""] * len(PROMPTS), {}
    for chunk in lm.stream(PROMPTS, list(range(len(PROMPTS)))):
        assert chunk.row not in results
        texts[chunk.row] += chunk.text
        if chunk.result:
            results[chunk.row] = chunk.result
    assert [results[i].text for i in range(len(PROMPTS))] == texts
    assert results == dict(enumerate(lm.generate(PROMPTS, list(range(len(PROMPTS))))))


def test_prompts_need_as_many_seeds(decoder):
    with pytest.raises(ValueError, match="zip"):
        decoder().generate(PROMPTS, [1])
