"""stories260K, a published Llama: its published text, and transformers on real lines."""

import json
import math

import pytest
import torch

import lmcli

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def ours(folder):
    return lmcli.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def lines(shared):
    text = (shared / "text" / "tinystories-sample.txt").read_text(encoding="utf-8")
    return [
        *[line for line in text.splitlines() if line][:145],
        "",
        " ",
        "却说 \U0001f600",
        "a",
        "tab\there",
    ]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_equals_the_published_text(ours, folder, use_cache):
    expected = json.loads((folder / "expected_greedy.json").read_text())
    decoder = ours.decoder(temperature=0, max_new_tokens=len(expected["greedy_ids"]) - 1)
    decoder.use_cache = use_cache
    result = decoder.generate([ours.prompt("")], [0])[0]
    assert [1, *result.tokens] == expected["greedy_ids"]
    assert result.text == expected["greedy_text"]


@pytest.fixture(scope="module")
def expected(ours, theirs, lines):
    """(tokens, log-probability) of each line."""
    scores = []
    for line in lines:
        ids = torch.tensor([ours.prompt(line)])
        with torch.no_grad():
            logprobs = theirs(ids).logits[0, :-1].log_softmax(-1)
        scores.append((ids.shape[1] - 1, logprobs.gather(1, ids[0, 1:, None]).sum().item()))
    return scores


@pytest.mark.parametrize("batch", [64, 4096])
def test_logprobs_of_150_lines_equal_a_plain_loop(ours, lines, expected, batch):
    scores = ours.scorer(batch=batch).score(lines)
    for line, (tokens, logprob), score in zip(lines, expected, scores, strict=True):
        assert score.tokens == tokens and score.bytes == len(line.encode())
        assert score.logprob == pytest.approx(logprob, abs=1e-4 * max(1, tokens / 10))
    assert scores[145].logprob == 0 and scores[145].bits_per_byte is None


@pytest.mark.parametrize("beams, penalty", [(2, 1.0), (4, 1.0), (4, 0.5), (4, 2.0), (3, 0.0)])
def test_beam_search_equals_that_of_transformers(ours, theirs, beams, penalty):
    for prompt in ("Once upon a time", "The big dog"):
        ids = torch.tensor([ours.prompt(prompt)])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=24,
            length_penalty=penalty,
            num_return_sequences=beams,
            pad_token_id=0,
        )
        found = ours.generate(
            prompt, num_samples=beams, num_beams=beams, length_penalty=penalty, max_new_tokens=24
        )
        assert [
            row[ids.shape[1] :].tolist()[: len(f.tokens)] for row, f in zip(expected, found)
        ] == [f.tokens for f in found]


def test_text_does_not_depend_on_the_batch(ours):
    prompts = ["Once upon a time", "The", "Lily and Tom went to the park. They saw", "A big", ""]
    batched = ours.generate(prompts, seed=4, max_new_tokens=40)
    for i, (prompt, result) in enumerate(zip(prompts, batched, strict=True)):
        alone = ours.generate(prompt, seed=4 + i, max_new_tokens=40)[0]
        assert (alone.tokens, alone.text, alone.finish_reason) == (
            result.tokens,
            result.text,
            result.finish_reason,
        )
        torch.testing.assert_close(alone.token_logprobs, result.token_logprobs, atol=1e-4, rtol=0)


def test_text_continues_past_the_context(ours):
    """The context is 512; without a cache only the tokens around its end are computed again."""
    decoder, prompt = ours.decoder(temperature=0, max_new_tokens=560), ours.prompt("Once")
    decoder.stops = []
    cached = decoder.generate([prompt], [0])[0]
    assert len(cached.tokens) == 560 and cached.finish_reason == "length"
    again = ours.decoder(temperature=0, max_new_tokens=40)
    again.stops, again.use_cache = [], False
    found = again.generate([[*prompt, *cached.tokens[:495]]], [0])[0]
    assert found.tokens == cached.tokens[495:535]


def test_text_ends_before_a_stop_string(ours):
    whole = ours.generate("Once upon a time", temperature=0, max_new_tokens=60)[0].text
    cut = ours.generate("Once upon a time", temperature=0, max_new_tokens=60, stop=("named Li",))[0]
    assert cut.finish_reason == "stop" and cut.text == whole[: whole.index("named Li")]
    pieces = list(
        ours.stream("Once upon a time", temperature=0, max_new_tokens=60, stop=("named Li",))
    )
    assert (
        "".join(piece.text for piece in pieces) == cut.text and pieces[-1].result.text == cut.text
    )


def test_perplexity_of_windows_equals_a_plain_loop(ours, theirs, shared):
    text = (shared / "text" / "tinystories-sample.txt").read_text(encoding="utf-8")[:6000]
    ids, total, first, context, stride = ours.encode(text), 0.0, 0, 128, 48
    end = min(context, len(ids))
    while first < len(ids):
        start = max(0, end - context)
        with torch.no_grad():
            logprobs = theirs(torch.tensor([[1, *ids[start : end - 1]]])).logits[0].log_softmax(-1)
        total += sum(logprobs[i - start, ids[i]].item() for i in range(first, end))
        first, end = end, min(end + stride, len(ids))
    result = ours.perplexity(text, context=context, stride=stride)
    assert result.tokens == len(ids)
    assert result.perplexity == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(
        -total / math.log(2) / len(text.encode()), rel=1e-4
    )
