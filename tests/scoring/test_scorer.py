"""Log-probabilities of tokens, words, records and documents, against transformers."""

import functools
import math
import random

import numpy as np
import pytest
import torch

from lmcli.checkpoints import folder as checkpoints
from lmcli.data.corpus import encode_text
from lmcli.scoring.perplexity import Perplexity, measure_perplexity
from lmcli.scoring.scorer import Scorer
from lmcli.scoring.token_logprobs import ScoreFields

TEXTS = [
    "",
    "a",
    " ",
    "\t\t",
    "The old dog slept.",
    "  two  spaces  ",
    "日本語の本",
    "é 🙂 naïve café",
    "a\rb",
    "x" * 150,
    "The baker went to the market and bought a big loaf of bread, " * 6,
]


@functools.cache
def window_logprobs(model, window: tuple[int, ...]):
    """Log-probabilities of the next token after each token of a window, by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([window])).logits[0].log_softmax(-1)


def plain(model, ids: list[int], bos: list[int], context: int, stride: int) -> list[float]:
    """The log-probability of every token in its window, by transformers."""
    lead, logprobs = len(bos), []
    span = context - lead + 1  # the last token of a window is never read
    for i, token in enumerate(ids):
        if not bos and i == 0:
            logprobs.append(math.nan)
            continue
        end = span if i < span else min(span + ((i - span) // stride + 1) * stride, len(ids))
        start = max(0, end - span) if i >= span else 0
        rows = window_logprobs(model, (*bos, *ids[start:end][: span - 1]))
        logprobs.append(rows[lead + i - start - 1][token].item())
    return logprobs


def ids_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(1, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("context", "stride"), [(32, 16), (32, 32), (32, 5), (9, 4), (8, 1), (2, 1), (2, 2)]
)
@pytest.mark.parametrize("bos", [[], [0], [0, 7]], ids=str)
def test_every_token_is_scored_in_its_window_as_by_transformers(bos, context, stride, scorer, twin):
    if len(bos) > 1 and context < 8:
        pytest.skip("a template as long as the context leaves no room for text")
    room = min(stride, context - max(0, len(bos) - 1))
    sequences = [ids_of(length) for length in (0, 1, 2, 31, 32, 33, 34, 75)]
    results = scorer(bos, context=context, stride=stride).token_logprobs(sequences)
    for ids, logprobs in zip(sequences, results, strict=True):
        expected = np.array(plain(twin[1], ids, bos, context, room), dtype=np.float32)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4, rtol=0, equal_nan=True)


def test_the_default_windows_are_the_context_and_half_of_it(scorer):
    lm = scorer()
    assert (lm.context, lm.stride) == (32, 16)
    ids = ids_of(90)
    assert np.array_equal(
        lm.token_logprobs([ids])[0], scorer(context=32, stride=16).token_logprobs([ids])[0]
    )
    assert not np.allclose(
        lm.token_logprobs([ids])[0], scorer(context=32, stride=32).token_logprobs([ids])[0]
    )


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (32, 32), (32, 5), (8, 1), (2, 2)])
@pytest.mark.parametrize("bos", [[], [0], [0, 7]], ids=str)
@pytest.mark.parametrize("eos", [None, 0])
def test_slices_of_a_long_text_have_the_windows_of_the_whole(bos, context, stride, eos, scorer):
    if len(bos) > 1 and context < 8:
        pytest.skip("a template as long as the context leaves no room for text")
    lm = scorer(bos, context=context, stride=stride, eos=eos)
    for ids in (
        [],
        ids_of(9),
        ids_of(75),
        [0, *ids_of(75)],
        [0, 7, *ids_of(33)],
    ):  # some spell out the bos token
        (whole,) = lm.token_logprobs([ids])
        for most in (1, 20, 40, 1000):
            slices = list(lm.slices(np.array(ids, dtype=np.int32), most))
            assert all(len(part.ids) <= max(most, context + 1) + len(bos) for part in slices)
            results = [
                scores.logprobs[part.context_only :]
                for part, scores in zip(slices, lm.backend.compute(slices, ScoreFields()))
            ]
            np.testing.assert_allclose(
                np.concatenate(results), whole, atol=1e-5, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize("batch", [1, 40, 200, 100_000])
def test_neither_batches_nor_order_change_a_number(batch, scorer):
    sequences = [ids_of(length, seed=length) for length in (0, 3, 90, 1, 32, 33, 7, 7, 50, 200)]
    expected = scorer(batch=1).token_logprobs(sequences)
    order = random.Random(batch).sample(range(10), 10)
    results = scorer(batch=batch).token_logprobs([sequences[i] for i in order])
    for i, logprobs in zip(order, results, strict=True):
        np.testing.assert_allclose(logprobs, expected[i], atol=1e-5, rtol=0)


def test_lines_of_real_text_in_any_batch_and_order(shared):
    """Lines up to several contexts long and a model of others; more are in tests/oracles."""
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / "stories260K"
    loaded, theirs = checkpoints.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    lines = [
        *(shared / "text" / "wikitext-2-test.txt").read_text(encoding="utf-8").split("\n")[:59],
        "",
    ]
    ids = [[1, *loaded.tokenizer.encode(line)] for line in lines]
    short = [i for i in range(60) if len(ids[i]) <= 512]
    assert 25 < len(short) < 60 and ids[-1] == [1]
    scores = {}
    for batch, seed in ((600, 1), (8192, 2)):
        order = random.Random(seed).sample(range(60), 60)
        lm = Scorer(loaded.model, loaded.tokenizer, loaded.bos, batch=batch)
        scores[batch] = dict(zip(order, lm.score([lines[i] for i in order]), strict=True))
    for i in range(60):
        one, other = scores[600][i], scores[8192][i]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4 * max(1, one.tokens / 10))
        assert (
            (one.tokens, one.bytes)
            == (other.tokens, other.bytes)
            == (len(ids[i]) - 1, len(lines[i].encode()))
        )
    for i in short:
        with torch.inference_mode():
            rows = theirs(torch.tensor([ids[i]])).logits[0, :-1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(ids[i])[1:, None]).double().sum().item()
        assert scores[600][i].logprob == pytest.approx(
            expected, abs=1e-4 * max(1, len(ids[i]) / 10)
        )


def test_scores_agree_with_the_logprobs_of_generation(scorer, decoder, twin):
    lm = decoder(twin[0], temperature=1.0, max_new_tokens=25)
    result = lm.generate([[0, 5, 9]], [3])[0]
    logprobs = scorer().token_logprobs([[5, 9, *result.tokens]])[0]
    np.testing.assert_allclose(logprobs[2:], result.token_logprobs, atol=1e-4)


def test_a_bos_token_in_the_text_is_neither_doubled_nor_scored(scorer):
    plain, leading_bos = scorer().score(["The dog", "<|endoftext|>The dog"])
    assert leading_bos.logprob == pytest.approx(plain.logprob, abs=1e-5)
    assert (
        (leading_bos.tokens, leading_bos.bytes) == (plain.tokens, plain.bytes) == (plain.tokens, 7)
    )
    doubled = scorer().score(["<|endoftext|><|endoftext|>The dog"])[0]  # the second one is text
    assert doubled.tokens == plain.tokens + 1
    only = scorer().score(["<|endoftext|>"], per="token")[0]
    assert (only.logprob, only.tokens, only.bytes, only.bits_per_byte) == (None, 0, 0, None)
    assert [(unit.piece, unit.logprob) for unit in only.pieces] == [("<|endoftext|>", None)]


def test_without_bos_the_first_token_is_context_only(scorer, small_tokenizer):
    with_it, without = (scorer(bos).score(["The old dog"], per="token")[0] for bos in ([0], []))
    assert without.pieces[0].logprob is None and without.pieces[0].surprisal is None
    assert all(unit.logprob is not None for unit in [*with_it.pieces, *without.pieces[1:]])
    assert without.tokens == with_it.tokens - 1
    assert without.bytes == with_it.bytes - without.pieces[0].bytes
    assert scorer([]).score(["T"])[0] == scorer([]).score(["T"], per="record")[0]
    assert scorer([]).score(["T"])[0].logprob is None  # one token, and that is context


def test_a_word_with_a_context_only_token_has_no_score(scorer):
    words = scorer([]).score(["The old dog"], per="word")[0].pieces
    assert [unit.piece for unit in words] == ["The", "old", "dog"]
    assert words[0].logprob is None and None not in (words[1].logprob, words[2].logprob)


@pytest.mark.parametrize("bos", [[0], []], ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_tokens_add_up_to_the_record_and_words_are_its_words(text, bos, scorer):
    lm, data = scorer(bos), text.encode()
    record, tokens, words = (lm.score([text], per=per)[0] for per in ("record", "token", "word"))
    assert (record.tokens, record.bytes, record.pieces) == (tokens.tokens, tokens.bytes, None)
    scored = [unit for unit in tokens.pieces if unit.logprob is not None]
    assert record.tokens == len(scored)
    assert sum(unit.logprob for unit in scored) == pytest.approx(record.logprob or 0.0, abs=1e-4)
    assert sum(unit.bytes for unit in scored) == record.bytes
    assert sum(unit.bytes for unit in tokens.pieces) == len(data)
    assert [unit.start for unit in tokens.pieces[1:]] == [unit.end for unit in tokens.pieces[:-1]]
    assert [data[unit.start : unit.end].decode() for unit in words.pieces] == text.split()


def test_a_word_includes_the_space_before_it_and_its_ending(scorer, twin, small_tokenizer):
    """See test_word_scores.py; here with a vocabulary of BPE."""
    starts = torch.tensor(
        [
            *small_tokenizer.word_starts,
            *[False] * (twin[0].config.vocab_size - small_tokenizer.size),
        ]
    )
    assert starts.sum() > 20 and starts[0] and starts[small_tokenizer.encode(" the")[0]]
    for text in ("The old dog", "baker  and\tmarket ", " the.dog café 日本語 x"):
        ids = small_tokenizer.encode(text)
        with torch.inference_mode():
            ended = (
                twin[1](torch.tensor([[0, *ids]]))
                .logits[0]
                .log_softmax(-1)[:, starts]
                .logsumexp(-1)
                .tolist()
            )
        tokens, words = (scorer().score([text], per=per)[0].pieces for per in ("token", "word"))
        assert len(words) > 1 and any(unit.piece.startswith(" ") for unit in tokens)
        start = 0
        for word in words:
            own = [i for i, unit in enumerate(tokens) if start <= unit.start < word.end]
            given = ended[own[0]] if own[0] and starts[ids[own[0]]] else 0.0
            expected = sum(tokens[i].logprob for i in own) + ended[own[-1] + 1] - given
            assert word.logprob == pytest.approx(expected, abs=1e-4), (text, word.piece)
            start = word.end


def test_figures_of_a_record_by_hand():
    from lmcli.scoring.scorer import Score, Unit

    score = Score(logprob=-6 * math.log(2), tokens=2, bytes=3)
    assert score.bits_per_byte == pytest.approx(2.0)
    assert Unit("ab", 4, 6, -math.log(8)).surprisal == pytest.approx(3.0)
    assert Unit("ab", 4, 6, -1.0).bytes == 2
    assert Score(None, 0, 0).bits_per_byte is Score(0.0, 0, 0).bits_per_byte is None


def test_an_empty_line_scores_nothing(scorer):
    for per, pieces in (("record", None), ("token", []), ("word", [])):
        score = scorer().score([""], per=per)[0]
        assert (score.logprob, score.tokens, score.bytes, score.bits_per_byte, score.pieces) == (
            0,
            0,
            0,
            None,
            pieces,
        )


@pytest.mark.parametrize(
    "text", ["The old dog", "", "x" * 200, "<|endoftext|>a"], ids=lambda text: text[:12]
)
def test_the_closing_token_is_scored_with_eos(text, scorer, small_tokenizer, twin):
    without, closed = scorer().score([text])[0], scorer(eos=0).score([text], per="token")[0]
    assert closed.tokens == without.tokens + 1
    assert closed.bytes == without.bytes
    assert len(closed.pieces) == len(small_tokenizer.encode(text))  # it is no piece of the text
    ids = small_tokenizer.encode(text.removeprefix("<|endoftext|>"))
    expected = plain(twin[1], [*ids, 0], [0], 32, 16)
    assert closed.logprob == pytest.approx(sum(expected), abs=1e-3)


def test_a_closing_token_other_than_bos(scorer, twin):
    closed = scorer(eos=9).score([""])[0]
    assert (closed.tokens, closed.bytes) == (1, 0)
    assert closed.logprob == pytest.approx(plain(twin[1], [9], [0], 32, 16)[0], abs=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(0, 0), (32, 32), (16, 3), (2, 1)])
@pytest.mark.parametrize("bos", [[0], []], ids=str)
def test_perplexity_equals_a_plain_loop(bos, context, stride, scorer, twin, small_tokenizer):
    text = TEXTS[-1] + "\n\nThe end. "
    results = measure_perplexity(
        scorer(bos, context=context, stride=stride), [encode_text(text, small_tokenizer)]
    )
    context, stride = context or 32, stride or 16
    expected = [
        x
        for x in plain(twin[1], small_tokenizer.encode(text), bos, context, stride)
        if not math.isnan(x)
    ]
    first = 0 if bos else len(small_tokenizer.decode(small_tokenizer.encode(text)[:1]))
    assert (results.tokens, results.bytes, results.documents) == (
        len(expected),
        len(text) - first,
        1,
    )
    assert (results.context, results.stride) == (context, stride)
    assert results.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    assert results.bits_per_byte == pytest.approx(
        -sum(expected) / math.log(2) / results.bytes, rel=1e-4
    )


def test_documents_add_up(scorer, small_tokenizer):
    texts = [text for text in TEXTS if text]
    documents = [encode_text(text, small_tokenizer) for text in texts]
    whole, alone = (
        measure_perplexity(scorer(), documents),
        [measure_perplexity(scorer(), [document]) for document in documents],
    )
    for name in ("tokens", "bytes", "characters", "words", "documents"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in alone), name
    assert whole.logprob == pytest.approx(sum(part.logprob for part in alone), rel=1e-6)
    assert whole.logprob == pytest.approx(
        sum(score.logprob for score in scorer().score(texts)), rel=1e-6
    )
    assert (whole.bytes, whole.characters) == (
        sum(len(t.encode()) for t in texts),
        sum(map(len, texts)),
    )
    assert whole.words == sum(len(text.split()) for text in texts)


def test_documents_are_read_one_by_one(scorer, small_tokenizer):
    """More documents than are scored at a time, from a generator."""
    lm, document = scorer(context=32, stride=32), encode_text("abc " * 8000, small_tokenizer)
    count = 1 + 200_000 // len(document.ids)
    one, many = (
        measure_perplexity(lm, [document]),
        measure_perplexity(lm, (document for _ in range(count))),
    )
    assert (many.documents, many.tokens) == (count, count * one.tokens)
    assert many.logprob == pytest.approx(count * one.logprob, rel=1e-6)


@pytest.mark.parametrize("bos", [[0], []], ids=str)
def test_a_document_has_the_bytes_of_the_record(bos, scorer, small_tokenizer):
    lm = scorer(bos)
    for text in ("The dog", "<|endoftext|>The dog", "<|endoftext|>"):
        results, score = (
            measure_perplexity(lm, [encode_text(text, small_tokenizer)]),
            lm.score([text])[0],
        )
        assert (results.tokens, results.bytes) == (score.tokens, score.bytes)


def test_figures_of_a_document_by_hand():
    results = Perplexity(
        logprob=-12 * math.log(2), tokens=4, bytes=8, characters=6, words=3, documents=1
    )
    assert results.perplexity == pytest.approx(8.0)
    assert (results.bits_per_byte, results.bits_per_character) == (
        pytest.approx(1.5),
        pytest.approx(2.0),
    )
    assert results.word_perplexity == pytest.approx(16.0)
    nothing = Perplexity()
    assert all(
        math.isnan(x) for x in (nothing.perplexity, nothing.bits_per_byte, nothing.word_perplexity)
    )
    assert Perplexity(logprob=-1e6, tokens=1, words=1).perplexity == math.inf
