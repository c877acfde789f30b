"""Texts of a given form, and banned texts: held for random logits and every kind of tokenizer."""

import json
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lmcli.config import GenerateConfig, ModelConfig
from lmcli.errors import UsageError, UserError
from lmcli.generation.batch_generation import generate_all, row_by_row
from lmcli.generation.decoding import NO_TOKEN, Decoder
from lmcli.generation.options import with_logit_bias
from lmcli.generation.structure import check_form
from lmcli.text.stream_decoder import token_bytes
from lmcli.text.tokenizer import Tokenizer, load

CHARACTERS = [chr(code) for code in range(32, 127)] + ["é", "日", "本", "\n"]
LINES = ["the cat saw a dog, and the dog ran; 日本 é 1,234 yes no"] * 20
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b/c", "é"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}


def unigram() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            initial_alphabet=CHARACTERS,
        ),
    )
    return core


def wordpiece() -> tokenizers.Tokenizer:
    shown = [char for char in CHARACTERS if not char.isspace()]
    words = ["the", "cat", "##at", "yes", "no", "##es", "saw", "name", "##ame"]
    pieces = ["[PAD]", "[SEP]", "[UNK]", *shown, *("##" + char for char in shown), *words]
    ids = {piece: i for i, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.add_special_tokens(pieces[:3])
    return core


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "unigram", "wordpiece"])
def vocabulary(request, small_tokenizer):
    """(tokenizer, stop id)"""
    if request.param == "sentencepiece":
        return load(request.getfixturevalue("shared") / "models" / "stories260K"), 2
    if request.param == "byte-level":
        return small_tokenizer, 0
    return Tokenizer({"unigram": unigram, "wordpiece": wordpiece}[request.param]()), 1


class RandomState:
    """A decoding state with random logits."""

    def __init__(self, size, rows, seed=0):
        self._random, self._size, self._rows = np.random.default_rng(seed), size, rows
        self.full = False
        self.add(None)

    def add(self, tokens):
        shape = self._rows, self._size
        self.logits = 3 * self._random.standard_normal(shape, dtype=np.float32)

    def keep(self, rows):
        self._rows = len(rows)
        self.add(None)


def writer(vocabulary, stop_ids=None, **options) -> Decoder:
    tokenizer, stop = vocabulary
    size = tokenizer.size + 7  # checkpoints pad the vocabulary
    return Decoder(
        ModelConfig(vocab_size=size, max_position_embeddings=4096).complete(),
        lambda sequences, sources, capacity: RandomState(size, len(sequences)),
        tokenizer,
        [],
        [stop] if stop_ids is None else stop_ids,
        GenerateConfig(**{"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 400, **options}),
    )


def texts(vocabulary, prompt, count=12, **options) -> list:
    ids = vocabulary[0].encode(prompt) if prompt else [vocabulary[1]]
    return writer(vocabulary, **options).generate([ids] * count, list(range(count)))


@pytest.mark.parametrize("prompt", ["", "the cat", "the "])
@pytest.mark.parametrize(
    "regex", [r"(yes|no)", r"a{3}b? [0-9/]{2,9}é?\.", r"[A-Z][a-z ]{0,12}", r"\"\\?[^a-z]{1,5}日本"]
)
def test_every_text_matches_the_expression(regex, prompt, vocabulary):
    for result in texts(vocabulary, prompt, regex=regex):
        assert result.finish_reason == "stop", result
        assert re.fullmatch(regex, result.text), result


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_every_text_is_one_of_the_choices(prompt, vocabulary):
    choices = ("yes", "no", "a, b", "日本", 'say "é"', " a")
    results = texts(vocabulary, prompt, 60, choices=choices)
    written = {result.text for result in results}
    assert written <= {*choices} and len(written) >= 4  # WordPiece never begins with a space
    assert {result.finish_reason for result in results} == {"stop"}


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_every_text_is_json_of_the_schema(prompt, vocabulary):
    for result in texts(vocabulary, prompt, json_schema=json.dumps(SCHEMA)):
        assert result.finish_reason == "stop" and "\n" not in result.text, result
        value = json.loads(result.text)
        assert list(value) == list(SCHEMA["properties"]) and isinstance(value["ok"], bool)
        assert len(value["name"]) <= 6 and 0 <= value["age"] <= 99
        assert type(value["age"]) is int and {*value["tags"]} <= {"a", "b/c", "é"}


def test_a_text_that_may_go_on_ends_by_its_stop_token_or_complete_at_the_limit(small_tokenizer):
    vocabulary = small_tokenizer, 0
    results = texts(vocabulary, "a", 40, regex="[ab]+", max_new_tokens=20)
    assert {result.finish_reason for result in results} == {"stop"}
    assert all(re.fullmatch("[ab]+", result.text) for result in results)
    assert len({len(result.tokens) for result in results}) > 3
    (endless,) = texts(vocabulary, "a", 1, regex="[ab]+", stop_ids=[], max_new_tokens=20)
    assert (len(endless.tokens), endless.finish_reason) == (20, "stop")


def test_a_cut_text_says_so_and_greedy_follows_the_form(small_tokenizer):
    vocabulary = small_tokenizer, 0
    for result in texts(vocabulary, "a", 5, regex="[0-9]{30}", max_new_tokens=9, temperature=0.0):
        assert result.finish_reason == "length" and re.fullmatch("[0-9]{9,29}", result.text)


def test_what_no_token_can_continue_is_an_error(small_tokenizer):
    vocabulary = small_tokenizer, 0
    (result,) = texts(vocabulary, "a", 1, regex="a?xyz", ban=("x",))
    assert result.problem == NO_TOKEN
    letters = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    letters.decoder = decoders.Fuse()
    (result,) = texts((Tokenizer(letters), 2), "a", 1, regex="abc")
    assert result.problem == NO_TOKEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a["}, "--regex: unclosed character class"),
        ({"regex": "(?=a)"}, "--regex: look-around"),
        ({"json_schema": "{"}, "--json-schema: not JSON"),
        ({"json_schema": '{"type": "foo"}'}, "--json-schema: .*Invalid type: foo"),
    ],
)
def test_what_is_no_form(options, message, small_tokenizer):
    with pytest.raises(UsageError, match=message):
        writer((small_tokenizer, 0), **options)


@pytest.mark.parametrize(
    ("options", "shape", "stop", "message"),
    [
        ({"regex": "a", "choices": ("a",)}, "decoder", (), "--regex and --choices exclude"),
        ({"regex": "a"}, "encoder", (), "--regex: an encoder"),
        ({"regex": "a", "num_beams": 2}, "decoder", (), "--regex: beam search"),
        ({"json_schema": "{}"}, "decoder", ("x",), "--json-schema: --stop would cut"),
    ],
)
def test_what_a_form_excludes(options, shape, stop, message):
    with pytest.raises(UsageError, match=message):
        check_form(GenerateConfig(**options), shape, stop)


def test_without_the_library_the_error_names_the_extra(small_tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match="--regex needs llguidance") as error:
        writer((small_tokenizer, 0), regex="a")
    assert error.value.hint == "pip install 'lmcli[structure]'"


def test_the_bytes_of_tokens_are_those_of_the_text(vocabulary):
    tokenizer, _ = vocabulary
    own = token_bytes(tokenizer)
    ids = tokenizer.encode("the cat saw, a dog no 日")
    assert b"".join(own[i] for i in ids).decode().strip() == tokenizer.decode(ids).strip()
    assert not own[vocabulary[1]]


def test_a_banned_text_is_never_written_however_it_is_split(vocabulary):
    banned = ("e", "th", " a", "日", "\n")
    options = {"max_new_tokens": 60, "stop_ids": []}
    free = texts(vocabulary, "the cat", 20, **options)
    assert all(any(text in result.text for result in free) for text in ("e", " a"))
    for result in texts(vocabulary, "the cat", 20, **options, ban=banned):
        assert not any(text in result.text for text in banned)
        assert len(result.tokens) == 60


def test_a_banned_text_may_not_be_completed_after_the_prompt(small_tokenizer):
    results = texts((small_tokenizer, 0), "the c", 300, max_new_tokens=1, ban=("ca",))
    assert not any(result.text.startswith("a") for result in results)
    assert len({result.text for result in results}) > 50


def test_a_logit_bias_names_a_token_by_text_or_id(small_tokenizer):
    def biased(*items):
        return with_logit_bias(GenerateConfig(logit_bias=items), small_tokenizer, 400).sequence_bias

    (index,) = small_tokenizer.encode(" the")
    assert biased(" the=2", f"{index}=-1e2") == (((index,), 2.0), ((index,), -100.0))
    assert biased("==1") == (((small_tokenizer.id("="),), 1.0),)
    assert biased("<|endoftext|>=-5") == (((0,), -5.0),)
    for item, message in (
        (" the", "not TOKEN=VALUE"),
        ("a=x", "not TOKEN=VALUE"),
        ("a=nan", "not TOKEN=VALUE"),
        ("=3", "not TOKEN=VALUE"),
        ("zzqq=3", "is not one token of this model, but 4: z z q q"),
        ("400=3", "400 is not an id of this model, which has 0 to 399"),
    ):
        with pytest.raises(UsageError, match=message):
            biased(item)


def test_samples_of_a_prompt_share_one_prefill(decoder):
    lm, prefills = decoder(temperature=1.0, max_new_tokens=12), []
    states = lm.decoding_state
    lm.decoding_state = lambda texts, *rest: prefills.append(len(texts)) or states(texts, *rest)
    prompts, seeds = [[0, 5], [0, 7, 9], [0, 5], [0, 5]], [1, 2, 3, 4]
    together = lm.generate(prompts, seeds)
    assert prefills == [2]
    alone = [lm.generate([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds)]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert len({tuple(together[i].tokens) for i in (0, 2, 3)}) == 3


def test_best_of_returns_the_likeliest_samples_per_token(decoder):
    lm, prompts = decoder(temperature=1.0, stop_ids=[3, 30, 90, 200]), [[0, 5], [0, 7]]
    everything = generate_all(lm, prompts, 6, seed=1)
    best = generate_all(lm, prompts, 2, seed=1, best_of=6)

    def mean(result):
        return sum(result.token_logprobs) / len(result.tokens)

    for samples, chosen in zip(everything, best, strict=True):
        assert chosen == sorted(samples, key=mean, reverse=True)[:2]
    for options, count, message in (
        ({"temperature": 0.0}, 1, "--best-of 6 needs texts that are drawn"),
        ({"num_beams": 2}, 1, "--best-of 6 needs texts that are drawn"),
        ({"temperature": 1.0}, 7, "--best-of 6 is less than --num-samples 7"),
    ):
        with pytest.raises(UsageError, match=message):
            generate_all(decoder(**options), prompts, count, seed=1, best_of=6)


def test_chunks_of_later_rows_wait_for_their_turn(decoder):
    lm = decoder(temperature=1.0, max_new_tokens=9, stop_ids=[*range(0, 400, 8)])
    chunks = list(lm.stream([[0, 5]] * 5, [1, 2, 3, 4, 5]))
    ordered = list(row_by_row(chunks))
    assert ordered == sorted(chunks, key=lambda chunk: chunk.row) and ordered != chunks
