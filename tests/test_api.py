"""`lmcli.load`: the Python API that notebooks and commands use."""

import json
import math

import pytest
import torch

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.errors import UsageError, UserError
from lmcli.scoring.scorer import ScoringInput


@pytest.fixture(scope="module")
def folder(small_model, small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(
        folder, small_model(), small_tokenizer, GenerateConfig(temperature=0.9, max_new_tokens=6)
    )
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return lmcli.load(str(folder), device="cpu")


@pytest.fixture
def without_bos(folder, tmp_path):
    """The same model where nothing names a beginning token."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, keys in (
        ("tokenizer.json", ["post_processor"]),
        ("config.json", ["bos_token_id", "eos_token_id"]),
        ("tokenizer_config.json", ["bos_token", "eos_token", "add_bos_token"]),
        ("generation_config.json", ["bos_token_id", "eos_token_id"]),
    ):
        document = json.loads((tmp_path / name).read_text())
        document.update(dict.fromkeys(keys))
        (tmp_path / name).write_text(json.dumps(document))
    return lmcli.load(tmp_path, device="cpu")


@pytest.mark.parametrize("text", ["", "The old dog", " é 日本 🙂\n\tx", "<|endoftext|>"])
def test_encode_and_decode(text, lm):
    ids = lm.encode(text)
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert lm.decode(ids) == text
    assert ids == lm.tokenizer.core.encode(text, add_special_tokens=False).ids


def test_logits_and_model(lm):
    assert isinstance(lm.model, torch.nn.Module) and not lm.model.training
    ids = [[0, 5, 9], [0, 7, 8]]
    logits = lm.logits(ids)
    assert (logits.shape, logits.dtype) == ((2, 3, 401), torch.float32)
    assert torch.equal(logits, lm.logits(torch.tensor(ids)))
    padded = lm.logits([[0, 5, 9], [33, 0, 7]], [[1, 1, 1], [0, 1, 1]])
    assert torch.allclose(padded[1, 1:], lm.logits([[0, 7]])[0], atol=1e-5)
    assert torch.allclose(padded[0], logits[0], atol=1e-5)


def test_precision_is_float32_unless_asked(folder, lm):
    assert lm.model.head.output.weight.dtype == torch.float32
    assert lmcli.load(folder, dtype="bfloat16").logits([[0, 5]]).dtype == torch.bfloat16


def test_generate_gives_a_result_a_prompt_in_order(lm):
    prompts = ["The dog", "", "A much longer prompt than the others, really", "The dog"]
    results = lm.generate(prompts, seed=5)
    assert len(results) == 4
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        alone = lm.generate(prompt, seed=5 + i)[0]
        assert (alone.text, alone.tokens, alone.finish_reason, alone.seed) == (
            result.text,
            result.tokens,
            result.finish_reason,
            5 + i,
        )
        assert (
            1 <= len(result.tokens) == len(result.token_logprobs) <= 6
        )  # the folder's own default
        assert all(logprob <= 0 for logprob in result.token_logprobs)
        assert result.finish_reason == ("stop" if result.tokens[-1] == 0 else "length")
    assert [result.tokens for result in lm.generate(prompts, seed=5, batch=8)] == [
        result.tokens for result in results
    ]


def test_options_override_the_folders_defaults(lm):
    assert lm.decoder().config == GenerateConfig(temperature=0.9, max_new_tokens=6)
    assert lm.decoder(temperature=0, max_new_tokens=None).config == GenerateConfig(
        temperature=0.0, max_new_tokens=6
    )
    assert len(lm.generate("The", temperature=0, max_new_tokens=40)[0].tokens) in range(7, 41)


def test_samples_of_a_prompt_differ_and_are_consecutive(lm):
    results = lm.generate(["The dog", "A cat"], num_samples=3, seed=10, temperature=1.5)
    assert [result.seed for result in results] == [10, 11, 12, 13, 14, 15]
    assert len({tuple(result.tokens) for result in results}) == 6
    assert results[4].tokens == lm.generate("A cat", seed=14, temperature=1.5)[0].tokens


def test_without_a_seed_one_is_drawn_and_returned(lm):
    first, other = (lm.generate("The", temperature=1.5, max_new_tokens=20)[0] for _ in range(2))
    assert first.seed != other.seed and first.tokens != other.tokens
    assert (
        lm.generate("The", temperature=1.5, max_new_tokens=20, seed=first.seed)[0].tokens
        == first.tokens
    )


def test_beam_search(lm):
    results = lm.generate(["The dog", "A cat"], num_samples=2, num_beams=4)
    assert [len(result.tokens) > 0 for result in results] == [True] * 4
    scores = [sum(result.token_logprobs) / len(result.tokens) for result in results]
    assert scores[0] >= scores[1] and scores[2] >= scores[3]
    with pytest.raises(UsageError, match="--num-samples 5 is more than --num-beams 4"):
        lm.generate("The dog", num_samples=5, num_beams=4)


def test_a_stream_ends_with_the_result(lm):
    pieces = list(lm.stream("The dog", seed=3))
    assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert (
        "".join(piece.text for piece in pieces)
        == pieces[-1].result.text
        == lm.generate("The dog", seed=3)[0].text
    )


@pytest.mark.parametrize("many", [False, True])
def test_stop_strings_may_be_one_or_many(many, lm):
    whole = lm.generate("The dog", seed=3, max_new_tokens=20)[0].text
    stop = whole[4:7]
    result = lm.generate(
        "The dog", seed=3, max_new_tokens=20, stop=[stop, "never"] if many else stop
    )[0]
    assert (result.text, result.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"temprature": 1},
            TypeError,
            "unknown option 'temprature'; known: stop, bos, bad_words_ids",
        ),
        ({"temperature": -1}, UsageError, "temperature: -1.0 is outside 0.0 to 100.0"),
        ({"top_p": 1.5}, UsageError, "top_p: 1.5 is outside 0.0 to 1.0"),
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens: 0 is outside 1 or more"),
        ({"top_k": "many"}, UsageError, "top_k: 'many' is not a whole number"),
        ({"stop": ""}, UsageError, "--stop: must not be empty"),
    ],
)
def test_impossible_options_are_refused(options, error, message, lm):
    with pytest.raises(error) as caught:
        lm.generate("The dog", **options)
    assert message in str(caught.value)


def test_score(lm):
    results = lm.score(["The old dog", "", "cat"])
    assert [(score.tokens, score.bytes) for score in results] == [
        (len(lm.encode("The old dog")), 11),
        (0, 0),
        (len(lm.encode("cat")), 3),
    ]
    assert results[0].bits_per_byte == pytest.approx(-results[0].logprob / math.log(2) / 11)
    assert (results[1].logprob, results[1].bits_per_byte, results[0].pieces) == (0, None, None)
    ids = lm.encode("cat")
    logprobs = lm.logits([[0, *ids]])[0, :-1].log_softmax(-1)
    assert results[2].logprob == pytest.approx(
        sum(logprobs[i, token].item() for i, token in enumerate(ids)), abs=1e-4
    )
    assert lm.score("cat")[0].logprob == pytest.approx(results[2].logprob, abs=1e-5)
    assert [unit.piece for unit in lm.score("The old dog", per="word")[0].pieces] == [
        "The",
        "old",
        "dog",
    ]
    assert (
        "".join(unit.piece for unit in lm.score("The old dog", per="token")[0].pieces)
        == "The old dog"
    )


def test_perplexity(lm):
    text = "The old dog slept in the sun. " * 8
    results = lm.perplexity(text)
    assert (results.tokens, results.bytes, results.documents) == (
        len(lm.encode(text)),
        len(text),
        1,
    )
    assert results.perplexity == pytest.approx(math.exp(-results.logprob / results.tokens))
    assert results.logprob == pytest.approx(lm.score(text)[0].logprob, rel=1e-6)
    narrow = lm.perplexity(text, context=4, stride=2)
    assert (narrow.context, narrow.stride, narrow.tokens) == (4, 2, results.tokens)
    assert narrow.logprob != pytest.approx(results.logprob, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.perplexity("a", context=33), "--context: 33 is outside 2 to 32"),
        (lambda lm: lm.perplexity("a", context=1), "--context: 1 is outside 2 to 32"),
        (lambda lm: lm.perplexity("a", context=8, stride=9), "--stride: 9 is outside 1 to 8"),
        (lambda lm: lm.perplexity("a", stride=0), "--stride: 0 is outside 1 to 32"),
        (
            lambda lm: lm.score("a", per="sentence"),
            "--per: 'sentence' is none of record, word, token",
        ),
    ],
)
def test_impossible_windows_are_refused(call, message, lm):
    with pytest.raises(UsageError) as caught:
        call(lm)
    assert message in str(caught.value)


def test_bos_and_eos_can_be_switched(lm):
    usual, without, closed = (
        lm.score("The dog"),
        lm.score("The dog", bos=False),
        lm.score("The dog", eos=True),
    )
    assert [results[0].tokens - usual[0].tokens for results in (without, closed)] == [-1, 1]
    assert lm.prompt("The dog") == [0, *lm.encode("The dog")] == lm.prompt("<|endoftext|>The dog")
    assert lm.prompt("The dog", bos=False) == lm.encode("The dog")


def test_a_model_without_bos_token(without_bos):
    lm = without_bos
    assert lm.prompt("The dog") == lm.encode("The dog")
    assert lm.score("The dog")[0].tokens == len(lm.encode("The dog")) - 1
    assert (
        len(lm.generate("The dog", max_new_tokens=40)[0].tokens) == 40
    )  # nothing ends it but its length
    for call, message in (
        (lambda: lm.prompt(""), "the prompt is empty"),
        (lambda: lm.score("a", eos=True), "no closing"),
        (lambda: lm.score("a", bos=True), "no beginning token"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, UsageError, "no tpu device on this machine"),
        ({"dtype": "float12"}, UsageError, "no precision 'float12'"),
    ],
)
def test_unknown_devices_are_refused(options, error, message, folder):
    with pytest.raises(error, match=message):
        lmcli.load(folder, **options)


def test_a_missing_folder_is_refused():
    with pytest.raises(UserError, match="no such model folder"):
        lmcli.load("no/such/folder")


def test_the_package_exports_nothing_else():
    assert lmcli.load is lmcli.api.load
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = lmcli.lode


class TestAnswers:
    @pytest.fixture(scope="class")
    def spans(self, small_model, small_tokenizer, tmp_path_factory):
        from lmcli.checkpoints.families import FAMILIES

        folder = tmp_path_factory.mktemp("spans")
        expected = FAMILIES["bert"].options_for("span")
        model = small_model(
            **{
                **expected,
                "model_type": "bert",
                "shape": "encoder",
                "head": "span",
                "num_key_value_heads": 4,
            }
        )
        checkpoints.save(folder, model, small_tokenizer, GenerateConfig())
        return lmcli.load(folder, device="cpu")

    def test_one_context_may_serve_all_questions(self, spans):
        context = "The baker of Köln baked."
        both = spans.answer(["Who baked?", "Where?"], context, threshold=1.0)
        (single,) = spans.answer("Where?", context, threshold=1.0, count=2)
        assert both[1].text == single.text == context.encode()[single.start : single.end].decode()
        assert (
            both[1].score == pytest.approx(single.score, rel=1e-4) and len(single.candidates) == 2
        )

    def test_impossible_questions_are_refused(self, spans, lm):
        with pytest.raises(UsageError, match="2 questions, but 1 contexts"):
            spans.answer(["a", "b"], ["c"])
        with pytest.raises(UsageError, match=r"1\.5 is outside 0 to 1"):
            spans.answer("a", "b", threshold=1.5)
        with pytest.raises(UserError, match="is a question-answering model"):
            spans.classify("a")
        with pytest.raises(UserError, match="is a language model"):
            lm.answer("a", "b")


def test_texts_may_come_from_anything_that_is_iterated_over(lm):
    expected = lm.score(["One two.", "Three"])
    for texts in ((x for x in ("One two.", "Three")), {"One two.": 1, "Three": 2}.keys()):
        scores = lm.score(texts)
        assert scores == expected and scores.inputs == ["One two.", "Three"]
    (same,) = lm.generate(iter(["One"]), max_new_tokens=4, temperature=0)
    assert same.tokens == lm.generate("One", max_new_tokens=4, temperature=0)[0].tokens
    assert lm.score([]) == [] and lm.score(iter(())).inputs == []


@pytest.mark.parametrize(
    "texts, message",
    [
        (["x", 3.5], "text 2: is no text, but float"),
        (b"x", "text 1: is no text, but int"),
        (None, "None is neither a text nor a list of texts"),
        ([["x"]], "text 1: is no text, but list"),
        (["ok", "a\ud800b"], r"text 2: character 1 is half a surrogate pair, '\\ud800'"),
        ([ScoringInput("x", "\udfff")], "text 1: character 0 is half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused_by_name(lm, texts, message):
    with pytest.raises(UsageError, match=message):
        lm.score(texts)


@pytest.mark.parametrize("method", ["perplexity", "generate"])
def test_half_a_surrogate_pair_is_refused_everywhere(lm, method):
    with pytest.raises(UsageError, match="1: character 2 is half a surrogate pair"):
        getattr(lm, method)("ab\udc00")
    with pytest.raises(UsageError, match="is no text, but"):
        getattr(lm, method)([["a list"]])
