"""Encoder–decoders: sources are encoded once; targets do not depend on the batch."""

import random
import threading

import pytest
import torch

from lmcli.generation.batch_generation import generate_all, generate_each
from lmcli.generation.decoding import Decoder
from lmcli.generation.prompts import Prompt
from lmcli.kernels import build
from lmcli.kernels.fast_decoding import CrossHeads, FastDecodingState

needs_kernels = pytest.mark.skipif(build.library() is None, reason=build.problem())
SOURCES = [[5, 9, 0], [0], [*range(40, 80), 0], [300, 301, 0], [7] * 20 + [0], [5, 9, 0]]


@pytest.fixture(scope="module")
def translator(small_model, decoder, small_tokenizer):
    """translator(positions, **options): a greedy encoder–decoder, context 64, start id 3."""

    def build(positions="sinusoidal", **options) -> Decoder:
        model = small_model(
            shape="encoder-decoder",
            positions=positions,
            decoder_start_token_id=3,
            max_position_embeddings=64,
            vocab_size=small_tokenizer.size,
        )
        return decoder(model, bos=(), **options)

    return build


def plain_greedy(model, source: list[int], steps: int) -> list[int]:
    """The slow reference: a full forward pass of source and target for every token."""
    target = [3]
    for _ in range(steps):
        with torch.no_grad():
            target.append(
                model(torch.tensor([source]), decoder_input_ids=torch.tensor([target]))[0, -1]
                .argmax()
                .item()
            )
    return target[1:]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ["sinusoidal", "relative", "learned", "rotary"])
def test_greedy_decoding_equals_a_plain_loop(positions, use_cache, translator):
    lm = translator(positions, max_new_tokens=15, use_cache=use_cache)
    for source, result in zip(SOURCES, lm.generate(SOURCES, [0] * len(SOURCES)), strict=True):
        assert result.tokens == plain_greedy(lm.model, source, 15)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_a_target_depends_on_its_source_and_seed_only(options, translator):
    lm = translator(max_new_tokens=12, stop_ids=[17, 30, 44, 390], **options)

    def generate(sources, seeds):
        if lm.config.num_beams > 1:
            return [results[0] for results in lm.beams(sources, 1)]
        return lm.generate(sources, seeds)

    together = generate(SOURCES, list(range(6)))
    for i, result in enumerate(together):
        alone = generate([SOURCES[i]], [i])[0]
        assert (result.tokens, result.text) == (alone.tokens, alone.text)
        assert result.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)


def test_equal_sources_are_encoded_once(translator, monkeypatch):
    lm, seen = translator(max_new_tokens=10), []
    encode = lm.model.encode
    monkeypatch.setattr(
        lm.model, "encode", lambda ids, mask=None: seen.append(len(ids)) or encode(ids, mask)
    )
    lm.generate([SOURCES[0], SOURCES[2], SOURCES[0]], [1, 2, 3])
    assert seen == [2]
    translator(num_beams=4).beams(SOURCES[:3], 4)


def test_chunks_add_up_to_the_target_and_stop_strings_end_it(translator):
    lm = translator(max_new_tokens=30)
    chunks = list(lm.stream(SOURCES[:1], [0]))
    free = chunks[-1].result
    assert "".join(chunk.text for chunk in chunks) == free.text and free.finish_reason == "length"
    stop = free.text[4:7]
    cut = translator(max_new_tokens=30, stop_strings=[stop]).generate(SOURCES[:1], [0])[0]
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_target_ends_at_the_context_unless_positions_are_relative(options, translator):
    def length(positions):
        lm = translator(positions, max_new_tokens=100, **options)
        return len(
            (lm.beams([SOURCES[0]], 1)[0] if options else lm.generate([SOURCES[0]], [0]))[0].tokens
        )

    assert length("learned") == length("sinusoidal") == 64
    assert length("relative") == 100


def test_a_source_longer_than_the_context_is_cut_at_the_end(translator):
    long = [*(i * 7 % 390 for i in range(90))]
    for positions in ("learned", "sinusoidal"):
        lm = translator(positions)
        assert lm.generate([long], [0])[0].tokens == plain_greedy(lm.model, long[:64], 20)
    lm = translator("relative")
    assert lm.generate([long], [0])[0].tokens == plain_greedy(lm.model, long, 20)


def test_a_long_target_outgrows_the_first_cache(translator):
    lm = translator("relative", max_new_tokens=150)
    assert lm.generate(SOURCES[:2], [0, 0])[1].tokens == plain_greedy(lm.model, SOURCES[1], 150)


def some_sources(count: int) -> list[list[int]]:
    draw = random.Random(2)
    return [[*draw.choices(range(4, 400), k=draw.randrange(25)), 0] for _ in range(count)]


@needs_kernels
@pytest.mark.parametrize(
    ("positions", "options", "samples"),
    [
        ("sinusoidal", {}, 1),
        ("relative", {"temperature": 1.0, "max_new_tokens": 90}, 2),  # beyond the context
        ("learned", {"no_repeat_ngram_size": 2, "stop_strings": ("e",)}, 1),
    ],
    ids=str,
)
def test_sources_enter_while_others_go_on(positions, options, samples, translator, monkeypatch):
    """As groups are that are decoded to their ends, to the bit, in fewer steps."""
    lm = translator(
        positions, **{"max_new_tokens": 30, "stop_ids": list(range(0, 400, 30)), **options}
    )
    rows, forward = [], FastDecodingState._forward

    def counting(state, tokens, *rest):
        rows.append(len(tokens))
        return forward(state, tokens, *rest)

    monkeypatch.setattr(FastDecodingState, "_forward", counting)
    texts, steps = [], []
    for lm.extendable in (False, True):
        rows.clear()
        texts.append(generate_all(lm, some_sources(90), samples, seed=3, batch_tokens=250))
        steps.append(len(rows))
        assert max(rows) < 100
    assert texts[1] == texts[0] and steps[1] < 0.85 * steps[0]
    seeds = [result.seed for results in texts[1] for result in results]
    assert seeds == list(range(3, 3 + 90 * samples))


@needs_kernels
def test_memory_for_sources_does_not_grow_with_their_number(translator, monkeypatch):
    lm, sizes = translator(max_new_tokens=9, stop_ids=list(range(0, 400, 9))), []
    join = CrossHeads.joined

    def joined(heads, *arguments):
        result = join(heads, *arguments)
        sizes.append((len(result.lengths), result.longest))
        return result

    monkeypatch.setattr(CrossHeads, "joined", joined)
    batches = ([Prompt("", source) for source in some_sources(40)] for _ in range(20))
    results = [result for _, (result,) in generate_each(lm, batches, 0, batch_tokens=200)]
    assert [result.seed for result in results] == list(range(800))
    # 4 · 200 tokens: two groups of at most 40 sources of 25 tokens and the end, in blocks of 16
    assert len(sizes) > 30 and max(count for count, _ in sizes) <= 80
    assert {longest for _, longest in sizes} <= {16, 32}


@needs_kernels
def test_a_source_is_answered_before_the_next_arrives(translator):
    lm, answered = translator(max_new_tokens=5), threading.Event()

    def arriving():
        for source in SOURCES:
            yield [Prompt("", source)]
            assert answered.wait(10)
            answered.clear()

    texts = []
    for _, (result,) in generate_each(lm, arriving(), 0):
        texts.append(result)
        answered.set()
    alone = [generate_all(lm, [source], 1, seed=i)[0][0] for i, source in enumerate(SOURCES)]
    assert texts == alone
