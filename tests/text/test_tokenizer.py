"""The tokenizer: round trips, byte offsets, the ids of published tokenizers, error messages."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import AddedToken, processors

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.characters import byte_offsets
from lmcli.text.sentencepiece import parse
from lmcli.text.stream_decoder import REPLACEMENT, StreamDecoder
from lmcli.text.tokenizer import END_OF_TEXT

SAMPLE = [
    "The baker's child didn't sleep; it's 2024, they'll say.\r\n\tHello  world!\n\n",
    "红楼梦的故事，你好世界。\n" * 3,
    "naïve café 🎉 éclair\n",
] * 4
LEARNED = {
    pattern: tokenizers.learn(SAMPLE, TokenizerConfig(vocab_size=400, pattern=pattern))
    for pattern in ("gpt2", "qwen2")
}
patterns = pytest.mark.parametrize("pattern", LEARNED)
any_text = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [
            "\0",
            "\r\n",
            "\n\n",
            " ",
            "  ",
            "\t",
            "🎉",
            "👩‍👩‍👧",
            "红楼梦",
            "é",
            "e\u0301",
            "'s",
            "'LL",
            "2024",
            END_OF_TEXT,
            "<|endof",
            "\ufeff",
            "\x85",
            "\u2028",
            "\u3000",
            "ſ",
            "ẞ",
            "The",
            "hello",
        ]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def gpt2(shared):
    return tokenizers.load(shared / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def bert(shared):
    return tokenizers.load(shared / "tokenizers" / "bert-minilm")


@pytest.fixture(scope="module")
def stories(shared):
    """A SentencePiece-like vocabulary of 512 ids with byte fallback."""
    return tokenizers.load(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def thousand_lines(shared):
    """Real lines of several kinds: dialogue, encyclopedia with @-@ marks, Chinese, empty ones."""
    lines = []
    for name in ("tinyshakespeare", "wikitext-2-valid", "zh-hongloumeng"):
        lines += (shared / "text" / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:334]
    return lines[:1000]


class TestLearning:
    @patterns
    @given(text=any_text)
    @settings(max_examples=60)
    @example(text="\0").via("NUL")
    @example(text=f"a{END_OF_TEXT}\r\n{END_OF_TEXT}")
    def test_any_text_round_trips(self, pattern, text):
        tokenizer = LEARNED[pattern]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]

    @patterns
    def test_the_end_of_text_token_is_id_0_and_comes_first(self, pattern):
        tokenizer = LEARNED[pattern]
        assert tokenizer.id(END_OF_TEXT) == 0 and tokenizer.encode(END_OF_TEXT) == [0]
        assert (tokenizer.prefix, tokenizer.suffix) == ([0], [])
        assert tokenizer.special_id("bos_token") == tokenizer.special_id("eos_token") == 0
        assert tokenizer.decode([0, *tokenizer.encode("a")], special=False) == "a"

    @patterns
    def test_the_vocabulary_has_the_size_asked_for_unless_the_text_is_too_small(self, pattern):
        assert tokenizers.learn(SAMPLE, TokenizerConfig(280, pattern)).size == 280
        assert (
            tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(260, pattern)).size == 259
        )  # "ab", " ab" at most
        assert tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(257, pattern)).size == 257
        assert tokenizers.learn([], TokenizerConfig(4096, pattern)).size == 257

    def test_merges_computed_by_hand(self):
        """'a' + 'b' is the only pair, then the pair with the space before it."""
        tokenizer = tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(4096))
        assert tokenizer.pieces(tokenizer.encode("ab ab b")) == ["ab", "Ġab", "Ġ", "b"]

    def test_the_patterns_split_text_differently(self):
        """GPT-2 keeps digits together and is case-sensitive for 'LL; Qwen2 is neither."""
        text = "20242024 " * 200 + "WE'LL " * 200
        pieces = {
            pattern: tokenizers.learn([text], TokenizerConfig(300, pattern)) for pattern in LEARNED
        }
        assert [len(pieces[pattern].encode("2024")) for pattern in ("gpt2", "qwen2")] == [1, 4]
        assert "'LL" in pieces["qwen2"].pieces(pieces["qwen2"].encode("WE'LL"))
        assert "'LL" not in pieces["gpt2"].pieces(pieces["gpt2"].encode("WE'LL"))

    @patterns
    def test_a_saved_folder_loads_as_the_same_tokenizer(self, tmp_path, pattern):
        LEARNED[pattern].save(tmp_path, context=128)
        loaded = tokenizers.load(tmp_path)
        assert loaded.hash == LEARNED[pattern].hash and loaded.prefix == [0]
        assert loaded.settings == {**LEARNED[pattern].settings, "model_max_length": 128}
        assert tokenizers.load(tmp_path / "tokenizer.json").encode("Hello 世界") == LEARNED[
            pattern
        ].encode("Hello 世界")

    def test_transformers_reads_it_with_the_same_ids_and_bos(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        LEARNED["gpt2"].save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in SAMPLE:
            assert theirs(text).input_ids == [0, *LEARNED["gpt2"].encode(text)]

    def test_learning_is_deterministic(self):
        assert tokenizers.learn(SAMPLE, TokenizerConfig(400)).hash == LEARNED["gpt2"].hash
        assert LEARNED["gpt2"].hash != LEARNED["qwen2"].hash


class TestLearningFromLongText:
    def learn(self, folder, monkeypatch, sample_bytes):
        from lmcli.data import corpus, documents

        monkeypatch.setattr(corpus, "TOKENIZER_SAMPLE_BYTES", sample_bytes)
        monkeypatch.setattr(documents, "PIECE_CHARS", 100)
        (folder / "a.txt").write_text("first words here\n" * 1000 + "later terms there\n" * 1000)
        doc_format, notes = documents.DocumentFormat(), []
        survey = documents.survey([str(folder / "a.txt")], doc_format)
        texts = []
        monkeypatch.setattr(
            corpus, "learn", lambda sample, *_: texts.extend(sample) or LEARNED["gpt2"]
        )
        corpus.learn_tokenizer(
            survey.documents, doc_format, TokenizerConfig(vocab_size=300), notes.append
        )
        return texts, notes

    def test_a_sample_from_the_whole_text_is_used_and_its_size_reported(
        self, tmp_path, monkeypatch
    ):
        texts, notes = self.learn(tmp_path, monkeypatch, 3500)
        sample = "".join(texts)
        assert 3000 < len(sample) < 4200
        assert 0.8 < sample.count("first") / sample.count("later") < 1.25
        assert notes == [
            "the vocabulary is learned from about 0 of 0 MB: "
            "one of every 10 pieces of 4,096 characters"
        ]

    def test_a_pattern_in_the_text_has_no_influence(self):
        """Every tenth piece of alternating ones would be of one kind."""
        from lmcli.data.corpus import _sampled

        sample = list(_sampled(range(10_000), 10))
        assert len(sample) == 1000 and [number // 10 for number in sample] == list(range(1000))
        counts = np.bincount([number % 10 for number in sample])
        assert chisquare(counts).pvalue > 0.001

    def test_a_shorter_text_is_used_completely(self, tmp_path, monkeypatch):
        texts, notes = self.learn(tmp_path, monkeypatch, 35_000)
        assert "".join(texts) == (tmp_path / "a.txt").read_text() and not notes


class TestByteEnds:
    @patterns
    @given(text=any_text)
    @settings(max_examples=60)
    def test_each_token_covers_its_own_bytes(self, pattern, text):
        check_bytes(LEARNED[pattern], text)

    def test_each_token_covers_its_own_bytes_in_real_lines(self, gpt2, thousand_lines):
        for text in thousand_lines[::10]:
            check_bytes(gpt2, text)

    @given(text=any_text)
    @settings(max_examples=40)
    def test_they_increase_to_the_byte_count_with_any_vocabulary(self, bert, stories, text):
        for tokenizer in (bert, stories):
            ((ids, ends),) = tokenizer.encode_with_ends([text])
            assert ids == tokenizer.encode(text)
            assert ends == sorted(ends)
            assert not ends or (ends[0] >= 0 and ends[-1] == len(text.encode()))

    def test_byte_fallback_tokens_share_a_character(self, stories):
        """好 becomes three byte tokens; the ▁ in front of the text covers none of its bytes."""
        ((ids, ends),) = stories.encode_with_ends(["a好b"])
        assert stories.pieces(ids) == ["▁a", "<0xE5>", "<0xA5>", "<0xBD>", "b"] and ends == [
            1,
            2,
            3,
            4,
            5,
        ]

    def test_bytes_that_a_normalizer_drops_belong_to_the_next_token(self, bert):
        ((ids, ends),) = bert.encode_with_ends(["Hello,  wörld!"])
        assert bert.pieces(ids) == ["hello", ",", "world", "!"] and ends == [5, 6, 14, 15]

    def test_byte_offsets_of_characters(self):
        assert list(byte_offsets("aé字🎉!")) == [0, 1, 3, 6, 10, 11] and list(
            byte_offsets("ab")
        ) == [0, 1, 2]


def check_bytes(tokenizer, text):
    """Checks that the spelling of each byte-level token is the bytes of its slice of the text."""
    ((ids, ends),) = tokenizer.encode_with_ends([text])
    data, byte_of = text.encode(), {character: byte for byte, character in byte_alphabet().items()}
    starts = [0, *ends][:-1]
    assert ids == tokenizer.encode(text) and ([*ends] or [0])[-1] == len(data)
    for piece, start, end in zip(tokenizer.pieces(ids), starts, ends, strict=True):
        spelled = (
            piece.encode()
            if piece == END_OF_TEXT
            else bytes(byte_of[character] for character in piece)
        )
        assert spelled == data[start:end]


def byte_alphabet():
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others for 256, 257 …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + i) for i, byte in enumerate(others)},
    }


class TestPublishedTokenizers:
    def test_gpt2_gives_the_published_ids(self, gpt2):
        assert gpt2.encode("Hello world, it's 2024") == [15496, 995, 11, 340, 338, 48609]
        assert gpt2.encode(END_OF_TEXT) == [50256] and gpt2.size == 50257
        assert gpt2.special_id("eos_token") == 50256 and gpt2.prefix == []

    def test_gpt2_against_transformers(self, shared, gpt2, thousand_lines):
        transformers = pytest.importorskip("transformers")
        folder = shared / "tokenizers" / "gpt2"
        theirs = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
        assert theirs(thousand_lines, add_special_tokens=False).input_ids == gpt2.encode_batch(
            thousand_lines
        )

    def test_bert_against_transformers(self, shared, bert, thousand_lines):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(
            str(shared / "tokenizers" / "bert-minilm")
        )
        assert theirs(thousand_lines, add_special_tokens=False).input_ids == bert.encode_batch(
            thousand_lines
        )

    def test_padding_and_truncation_in_berts_file_are_off(self, shared, bert):
        stored = json.loads(
            (shared / "tokenizers" / "bert-minilm" / "tokenizer.json").read_text(encoding="utf-8")
        )
        assert stored["padding"] and stored["truncation"]  # otherwise this test proves nothing
        assert [len(ids) for ids in bert.encode_batch(["a", "a " * 700])] == [1, 700]

    def test_berts_template(self, bert):
        assert bert.pieces(bert.prefix) == ["[CLS]"] and bert.pieces(bert.suffix) == ["[SEP]"]

    def test_stories_template(self, stories):
        assert (stories.prefix, stories.suffix) == ([1], []) and stories.pieces([1]) == ["<s>"]

    def test_add_bos_token_counts_only_without_a_tokenizer_json(self, shared, tmp_path):
        """As in transformers 5: with a tokenizer.json, add_bos_token is not read."""
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((shared / "tokenizers" / "gpt2" / name).read_bytes())
        settings = {
            "bos_token": {"content": END_OF_TEXT},
            "add_bos_token": True,
            "add_eos_token": True,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = tokenizers.load(tmp_path)
        assert (tokenizer.prefix, tokenizer.suffix) == ([50256], [50256])
        tokenizer.core.post_processor = None
        tokenizer.save(tmp_path)
        assert tokenizers.load(tmp_path).prefix == []


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "##b", "."]


class TestTemplates:
    @pytest.mark.parametrize(
        "kind, single, pair, types",
        [
            ("decoder", [0, 8], [0, 8, 0, 9], [0, 0, 0, 1]),
            ("encoder", [2, 8, 3], [2, 8, 3, 9, 3], [0, 0, 0, 1, 1]),
            ("encoder-decoder", [8, 1], [8, 1, 9, 1], [0] * 4),
        ],
    )
    def test_each_model_shape_has_a_template(self, kind, single, pair, types):
        learned = tokenizers.learn(SAMPLE, TokenizerConfig(300), kind)
        assert learned.with_template([8]) == (single, [0] * len(single))
        assert learned.with_template([8], [9]) == (pair, types)
        assert [*learned.prefix, 8, *learned.suffix] == single
        assert learned.with_template([])[0] == learned.prefix + learned.suffix
        assert learned.target is learned

    def test_a_tokenizer_without_a_template(self, gpt2):
        assert gpt2.with_template([8]) == ([8], [0]) and gpt2.with_template([8], [9]) == (
            [8, 9],
            [0, 1],
        )

    @pytest.mark.parametrize(
        "processor, pair, types",
        [
            (
                processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
                [2, 8, 3, 9, 3],
                [0, 0, 0, 1, 1],
            ),
            (processors.RobertaProcessing(("</s>", 3), ("<s>", 2)), [2, 8, 3, 3, 9, 3], [0] * 6),
            (
                processors.Sequence(
                    [processors.ByteLevel(), processors.TemplateProcessing("$A", "$B:1 $A", [])]
                ),
                [9, 8],
                [1, 0],
            ),
        ],
    )
    def test_every_kind_of_template_in_a_tokenizer_json(self, processor, pair, types):
        learned = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        learned.core.post_processor = processor
        assert tokenizers.Tokenizer(learned.core).with_template([8], [9]) == (pair, types)

    def test_the_mask_takes_the_space_before_it(self):
        learned = tokenizers.learn(SAMPLE, TokenizerConfig(300), "encoder")
        ids = learned.encode("the [MASK] of")
        assert ids.index(4) == len(learned.encode("the")) and learned.pieces(ids)[
            ids.index(4) + 1
        ].startswith("Ġ")
        named = [
            learned.special_id(f"{name}_token")
            for name in ("pad", "unk", "cls", "sep", "mask", "eos")
        ]
        assert named == [0, 1, 2, 3, 4, None]

    def test_a_vocabulary_too_small_for_the_special_tokens_is_an_error(self):
        with pytest.raises(UserError, match=r"vocab_size 258 is too small.*an encoder make 261"):
            tokenizers.learn(SAMPLE, TokenizerConfig(258), "encoder")
        assert tokenizers.learn(SAMPLE, TokenizerConfig(261), "encoder").size == 261


class TestDecoding:
    @pytest.mark.parametrize(
        "settings, expected",
        [({}, "the ' the."), ({"clean_up_tokenization_spaces": True}, "the'the.")],
    )
    def test_spaces_are_cleaned_up_if_the_settings_say_so(self, tmp_path, settings, expected):
        (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "'"]) + "\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = tokenizers.load(tmp_path)
        assert (
            tokenizer.decode(tokenizer.prefix + tokenizer.encode("The ' THE ."), special=False)
            == expected
        )

    def test_spaces_of_a_byte_level_vocabulary_are_never_cleaned_up(self):
        learned = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        cleaning = tokenizers.Tokenizer(learned.core, {"clean_up_tokenization_spaces": True})
        assert cleaning.decode(learned.encode("a , b ' c")) == "a , b ' c"


class TestSpecialTokens:
    def test_tokens_named_only_in_special_tokens_map_json(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "<begin>"]) + "\n")
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": "<begin>", "eos_token": {"content": "[SEP]", "lstrip": False}})
        )
        tokenizer = tokenizers.load(tmp_path)
        assert [
            tokenizer.special_id(f"{name}_token") for name in ("bos", "eos", "cls", "mask")
        ] == [9, 3, 2, 4]
        assert tokenizer.encode("a<begin>") == [6, 9]


def streamed(tokenizer, before, after):
    """The pieces of a stream of `after`; together they must equal decoding in one go."""
    decoder = StreamDecoder(tokenizer, before)
    pieces = [decoder.push(index) for index in after]
    start = len(tokenizer.decode(before, special=False))
    assert "".join(pieces) == tokenizer.decode(before + after, special=False)[start:]
    return pieces


valid_text = any_text.filter(lambda text: REPLACEMENT not in text)


class TestStreaming:
    @patterns
    @given(prompt=valid_text, text=valid_text)
    @settings(max_examples=80)
    @example(prompt="红楼梦", text="的故事🎉")
    def test_pieces_of_a_byte_level_text_concatenate_to_it(self, pattern, prompt, text):
        tokenizer = LEARNED[pattern]
        pieces = streamed(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text))
        assert REPLACEMENT not in "".join(pieces)
        assert "".join(pieces) == text.replace(END_OF_TEXT, "")

    @given(prompt=valid_text, text=valid_text)
    @settings(max_examples=80)
    @example(prompt="好好好", text="好🎉")
    @example(prompt="", text="héllo 🎉🎉 x")
    def test_pieces_of_a_byte_fallback_text_concatenate_to_it(self, stories, prompt, text):
        pieces = streamed(stories, stories.encode(prompt), stories.encode(text))
        assert REPLACEMENT not in "".join(pieces)

    @given(prompt=st.text("abc de", max_size=20), text=st.text("abc de", max_size=20))
    @settings(max_examples=40)
    def test_spaces_between_words_survive(self, stories, prompt, text):
        ids = stories.encode(prompt + text)
        for cut in range(len(ids)):
            streamed(stories, ids[:cut], ids[cut:])

    def test_a_split_character_is_returned_whole_with_its_last_byte(self, gpt2):
        ids = gpt2.encode("梦🎉")
        assert len(ids) > 4  # cut inside both characters
        pieces = streamed(gpt2, gpt2.encode("红"), ids)
        assert [piece for piece in pieces if piece] == ["梦", "🎉"]

    def test_real_chinese_text(self, gpt2, stories, shared):
        text = (shared / "text" / "zh-lunyu.txt").read_text(encoding="utf-8")[:1500]
        for tokenizer in (gpt2, stories):
            assert REPLACEMENT not in "".join(
                streamed(tokenizer, tokenizer.encode("子曰："), tokenizer.encode(text))
            )

    def test_invalid_bytes_do_not_hide_the_text_after_them(self, gpt2):
        half = gpt2.encode("梦")[:1]
        decoder = StreamDecoder(gpt2, gpt2.encode("a"))
        text = "".join(decoder.push(index) for index in half + gpt2.encode(" ok then"))
        assert text == " ok then"

    def test_a_replacement_character_in_the_text_is_left_out_too(self, gpt2):
        decoder = StreamDecoder(gpt2, gpt2.encode("a"))
        assert "".join(decoder.push(index) for index in gpt2.encode(f"b{REPLACEMENT}c")) == "bc"

    def test_the_space_after_a_special_token_survives(self, stories):
        ids = [*stories.encode("one"), 2, *stories.encode("two three")]
        assert "".join(streamed(stories, [], ids)) == "one two three"

    def test_special_tokens_give_no_text(self):
        assert streamed(LEARNED["gpt2"], [0], [0, *LEARNED["gpt2"].encode("The"), 0])[-1] == ""


class TestSplitSafe:
    """Which tokenizers give the same ids for a text in pieces."""

    @patterns
    def test_learned_tokenizers_are_safe(self, pattern):
        assert LEARNED[pattern].split_safe

    def test_gpt2_is_safe_and_tokenizers_that_normalize_are_not(self, gpt2, bert, stories):
        assert gpt2.split_safe and not bert.split_safe and not stories.split_safe

    @pytest.mark.parametrize(
        "token, safe",
        [
            (AddedToken("<mask>"), True),
            (AddedToken("<mask>", lstrip=True), True),
            (AddedToken("mask", lstrip=True), False),
            (AddedToken("MASK", rstrip=True), False),
            (AddedToken("new york"), False),
            (AddedToken("e.g."), False),
            (AddedToken(",x", single_word=True), False),
        ],
    )
    def test_an_added_token_that_may_reach_across_a_cut_is_not_safe(self, token, safe):
        tokenizer = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        tokenizer.core.add_tokens([token])
        assert tokenizers.Tokenizer(tokenizer.core).split_safe is safe


# protobuf by hand: field 1 (a piece) of 14 bytes: text "<unk>", score 0.0, type 2; then one of 8
# bytes: "a", -1.0, no type
TWO_PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02\x0a\x08\x0a\x01a\x15\0\0\x80\xbf"


def test_a_sentencepiece_file_written_by_hand():
    model = parse(TWO_PIECES)
    assert model.pieces == [("<unk>", 0.0, 2), ("a", -1.0, 1)] and model.special == {
        "unk_token": "<unk>",
        "bos_token": "<s>",
    }
    assert (
        model.add_dummy_prefix
        and model.remove_extra_whitespaces
        and model.charsmap == b""
        and model.unk_id == 0
    )


class TestErrors:
    def test_a_missing_folder_is_an_error(self, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such folder"):
            tokenizers.load(tmp_path / "nowhere")

    def test_a_name_too_long(self):
        with pytest.raises(UserError, match="cannot read: File name too long"):
            tokenizers.load("n" * 300)

    def test_a_folder_without_tokenizer(self, tmp_path):
        (tmp_path / "vocab.json").write_text("{}")
        with pytest.raises(UserError, match="holds no tokenizer") as caught:
            tokenizers.load(tmp_path)
        assert "vocab.json and merges.txt" in caught.value.hint

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "none"}}'])
    def test_a_broken_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: is no tokenizer: "):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize(
        "content, message",
        [(b"{", "is not JSON"), (b"[]", "is not a JSON object"), (b"\xff", "is not JSON")],
    )
    def test_broken_settings(self, tmp_path, content, message):
        LEARNED["gpt2"].save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            tokenizers.load(tmp_path)

    def test_broken_gpt2_files(self, tmp_path):
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "merges.txt").write_text("a b\n")
        with pytest.raises(UserError, match=r"vocab\.json: is no tokenizer"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("vocab.txt", b"\xff\n", "is no tokenizer"),
            ("vocab.txt", b"a\nb\n", r"is no tokenizer: it lacks \[UNK\]"),
            (
                "spiece.model",
                b"\x0a\xff",
                "is no tokenizer: it is damaged or no SentencePiece model",
            ),
            (
                "tokenizer.model",
                b"hello there",
                "is no tokenizer: it is damaged or no SentencePiece model",
            ),
            ("tokenizer.model", b"", "is no tokenizer: it has no pieces"),
            ("source.spm", b"", "cannot read: No such file"),
        ],
    )
    def test_broken_files_of_each_kind(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        where = "target.spm" if name == "source.spm" else name
        with pytest.raises(UserError, match=rf"{where}: {message}"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("special_tokens_map.json", "{", "is not JSON"),
            ("special_tokens_map.json", "[]", "is not a JSON object"),
            ("added_tokens.json", "nothing", "is not JSON"),
            ("added_tokens.json", '{"a": "b"}', "is no tokenizer"),
            ("config.json", "{", "is not JSON"),
            ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is no tokenizer"),
            ("tokenizer_config.json", '{"eos_token": {"lstrip": true}}', "is no tokenizer"),
        ],
    )
    def test_broken_files_next_to_a_tokenizer_json(self, tmp_path, name, content, message):
        LEARNED["gpt2"].save(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize(
        "files, message",
        [
            ({"source.spm": b"?"}, r"source\.spm: is no tokenizer"),
            ({"target.spm": b"?"}, r"target\.spm: is no tokenizer"),
            ({"vocab.json": b"{}"}, r"vocab\.json: is no tokenizer: it lacks <unk>"),
            (
                {"vocab.json": b'{"<unk>": "0"}'},
                r"vocab\.json: is no tokenizer: an id is no number",
            ),
            (
                {"tokenizer_config.json": b'{"separate_vocabs": true}'},
                "has a vocabulary for each language",
            ),
        ],
    )
    def test_broken_marian_files(self, tmp_path, files, message):
        good = {
            "source.spm": TWO_PIECES,
            "target.spm": TWO_PIECES,
            "vocab.json": b'{"<unk>": 0, "a": 1, "</s>": 2}',
        }
        for name, content in (good | files).items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["a long line of words, and more é 却说 " * 300, "x" * 9000, "a\n\nb  c. " * 900]
)
def test_a_long_text_in_pieces_has_the_ids_of_the_whole_text(text, small_tokenizer, monkeypatch):
    whole, ids = (
        small_tokenizer.encode_with_ends([text, "short"]),
        small_tokenizer.encode_batch([text, "short"]),
    )
    monkeypatch.setattr(tokenizers, "LONG_TEXT", 100)
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 150)
    assert (
        small_tokenizer.encode_batch([text, "short"]) == ids == [encoded.ids for encoded in whole]
    )
    assert small_tokenizer.encode_with_ends([text, "short"]) == whole and whole[0].ends[-1] == len(
        text.encode()
    )
