"""The tokenizer: any text comes back, each token knows its bytes, and others' tokenizers give their own ids."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.sentencepiece import parse
from lmcli.text.tokenizer import END_OF_TEXT, OPEN, StreamDecoder, byte_offsets

SAMPLE = ["The baker's child didn't sleep; it's 2024, they'll say.\r\n\tHello  world!\n\n",
          "红楼梦的故事，你好世界。\n" * 3,
          "naïve café 🎉 éclair\n"] * 4
LEARNT = {pattern: tokenizers.learn(SAMPLE, TokenizerConfig(vocab_size=400, pattern=pattern))
          for pattern in ("gpt2", "qwen2")}
patterns = pytest.mark.parametrize("pattern", LEARNT)
any_text = st.text(max_size=40) | st.lists(st.sampled_from(
    ["\0", "\r\n", "\n\n", " ", "  ", "\t", "🎉", "👩‍👩‍👧", "红楼梦", "é", "e\u0301", "'s", "'LL", "2024", END_OF_TEXT,
     "<|endof", "\ufeff", "\x85", "\u2028", "\u3000", "ſ", "ẞ", "The", "hello"]), max_size=12).map("".join)


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
    """Every kind of real line: dialogue, encyclopaedia with its @-@ marks, Chinese; and empty ones."""
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
    def test_any_text_comes_back(self, pattern, text):
        tokenizer = LEARNT[pattern]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]

    @patterns
    def test_the_end_of_text_token_is_id_0_and_comes_first(self, pattern):
        tokenizer = LEARNT[pattern]
        assert tokenizer.id(END_OF_TEXT) == 0 and tokenizer.encode(END_OF_TEXT) == [0]
        assert (tokenizer.prefix, tokenizer.suffix) == ([0], [])
        assert tokenizer.special("bos_token") == tokenizer.special("eos_token") == 0
        assert tokenizer.decode([0, *tokenizer.encode("a")], special=False) == "a"

    @patterns
    def test_the_vocabulary_is_as_large_as_asked_and_no_larger_than_the_text_allows(self, pattern):
        assert tokenizers.learn(SAMPLE, TokenizerConfig(280, pattern)).size == 280
        assert tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(260, pattern)).size == 259  # "ab", " ab" at most
        assert tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(257, pattern)).size == 257
        assert tokenizers.learn([], TokenizerConfig(4096, pattern)).size == 257

    def test_merges_by_hand(self):
        """'a' + 'b' is the only pair, then with the space before it."""
        tokenizer = tokenizers.learn(["ab ab ab"] * 50, TokenizerConfig(4096))
        assert tokenizer.pieces(tokenizer.encode("ab ab b")) == ["ab", "Ġab", "Ġ", "b"]

    def test_the_patterns_part_text_differently(self):
        """GPT-2 keeps digits together and separates 'LL by case; Qwen2 takes single digits and any case."""
        text = "20242024 " * 200 + "WE'LL " * 200
        pieces = {pattern: tokenizers.learn([text], TokenizerConfig(300, pattern)) for pattern in LEARNT}
        assert [len(pieces[pattern].encode("2024")) for pattern in ("gpt2", "qwen2")] == [1, 4]
        assert "'LL" in pieces["qwen2"].pieces(pieces["qwen2"].encode("WE'LL"))
        assert "'LL" not in pieces["gpt2"].pieces(pieces["gpt2"].encode("WE'LL"))

    @patterns
    def test_a_saved_folder_loads_as_the_same_tokenizer(self, tmp_path, pattern):
        LEARNT[pattern].save(tmp_path, context=128)
        loaded = tokenizers.load(tmp_path)
        assert loaded.hash == LEARNT[pattern].hash and loaded.prefix == [0]
        assert loaded.settings == {**LEARNT[pattern].settings, "model_max_length": 128}
        assert tokenizers.load(tmp_path / "tokenizer.json").encode("Hello 世界") == LEARNT[pattern].encode("Hello 世界")

    def test_transformers_reads_it_with_the_same_ids_and_the_beginning(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        LEARNT["gpt2"].save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in SAMPLE:
            assert theirs(text).input_ids == [0, *LEARNT["gpt2"].encode(text)]

    def test_learning_twice_gives_the_same(self):
        assert tokenizers.learn(SAMPLE, TokenizerConfig(400)).hash == LEARNT["gpt2"].hash
        assert LEARNT["gpt2"].hash != LEARNT["qwen2"].hash


class TestLearningFromMuchText:
    def learn(self, folder, monkeypatch, most):
        from lmcli.text import documents

        monkeypatch.setattr(tokenizers, "LEARNT_FROM_BYTES", most)
        monkeypatch.setattr(documents, "PIECE_CHARS", 100)
        (folder / "a.txt").write_text("first words here\n" * 1000 + "later terms there\n" * 1000)
        layout, notes = documents.Layout(), []
        found, _ = layout.survey([str(folder / "a.txt")])
        texts = []
        monkeypatch.setattr(tokenizers, "learn", lambda parts, config, kind: texts.extend(parts) or LEARNT["gpt2"])
        tokenizers.learn_from(found, layout, TokenizerConfig(vocab_size=300), notes.append)
        return texts, notes

    def test_a_sample_from_all_over_it_and_its_size_told(self, tmp_path, monkeypatch):
        texts, notes = self.learn(tmp_path, monkeypatch, 3500)
        read = "".join(texts)
        assert 3000 < len(read) < 4200 and 0.8 < read.count("first") / read.count("later") < 1.25
        assert notes == ["the vocabulary is learnt from some 0 of 0 MB: of every 10 stretches of 4,096 characters one, all "
                         "over the text"]

    def test_a_shorter_text_whole(self, tmp_path, monkeypatch):
        texts, notes = self.learn(tmp_path, monkeypatch, 35_000)
        assert "".join(texts) == (tmp_path / "a.txt").read_text() and not notes


class TestByteEnds:
    @patterns
    @given(text=any_text)
    @settings(max_examples=60)
    def test_each_token_stands_for_its_bytes(self, pattern, text):
        check_bytes(LEARNT[pattern], text)

    def test_on_real_lines(self, gpt2, thousand_lines):
        for text in thousand_lines[::10]:
            check_bytes(gpt2, text)

    @given(text=any_text)
    @settings(max_examples=40)
    def test_they_grow_to_the_byte_count_whatever_the_vocabulary(self, bert, stories, text):
        for tokenizer in (bert, stories):
            (ids, ends), = tokenizer.encode_with_ends([text])
            assert ids == tokenizer.encode(text)
            assert ends == sorted(ends)
            assert not ends or (ends[0] >= 0 and ends[-1] == len(text.encode()))

    def test_byte_fallback_shares_out_a_character(self, stories):
        """' 好' is ▁ and three bytes; the ▁ that the normalizer puts in front stands for no byte of the text."""
        (ids, ends), = stories.encode_with_ends(["a好b"])
        assert stories.pieces(ids) == ["▁a", "<0xE5>", "<0xA5>", "<0xBD>", "b"] and ends == [1, 2, 3, 4, 5]

    def test_what_a_normalizer_drops_goes_to_the_token_after_it(self, bert):
        (ids, ends), = bert.encode_with_ends(["Hello,  wörld!"])
        assert bert.pieces(ids) == ["hello", ",", "world", "!"] and ends == [5, 6, 14, 15]

    def test_offsets_of_characters(self):
        assert list(byte_offsets("aé字🎉!")) == [0, 1, 3, 6, 10, 11] and list(byte_offsets("ab")) == [0, 1, 2]


def check_bytes(tokenizer, text):
    """A byte-level token is spelled by its bytes, so the slice of the text must be those very bytes."""
    (ids, ends), = tokenizer.encode_with_ends([text])
    data, byte_of = text.encode(), {character: byte for byte, character in byte_alphabet().items()}
    starts = [0, *ends][:-1]
    assert ids == tokenizer.encode(text) and ([*ends] or [0])[-1] == len(data)
    for piece, start, end in zip(tokenizer.pieces(ids), starts, ends, strict=True):
        spelled = piece.encode() if piece == END_OF_TEXT else bytes(byte_of[character] for character in piece)
        assert spelled == data[start:end]


def byte_alphabet():
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others for 256, 257 …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


class TestOthers:
    def test_gpt2_published_ids(self, gpt2):
        assert gpt2.encode("Hello world, it's 2024") == [15496, 995, 11, 340, 338, 48609]
        assert gpt2.encode(END_OF_TEXT) == [50256] and gpt2.size == 50257
        assert gpt2.special("eos_token") == 50256 and gpt2.prefix == []

    def test_gpt2_against_transformers(self, shared, gpt2, thousand_lines):
        transformers = pytest.importorskip("transformers")
        folder = shared / "tokenizers" / "gpt2"
        theirs = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
        assert theirs(thousand_lines, add_special_tokens=False).input_ids == gpt2.encode_batch(thousand_lines)

    def test_bert_against_transformers(self, shared, bert, thousand_lines):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(str(shared / "tokenizers" / "bert-minilm"))
        assert theirs(thousand_lines, add_special_tokens=False).input_ids == bert.encode_batch(thousand_lines)

    def test_berts_own_padding_and_truncation_are_off(self, shared, bert):
        stored = json.loads((shared / "tokenizers" / "bert-minilm" / "tokenizer.json").read_text(encoding="utf-8"))
        assert stored["padding"] and stored["truncation"]  # else this test shows nothing
        assert [len(ids) for ids in bert.encode_batch(["a", "a " * 700])] == [1, 700]

    def test_berts_template(self, bert):
        assert bert.pieces(bert.prefix) == ["[CLS]"] and bert.pieces(bert.suffix) == ["[SEP]"]

    def test_stories_template(self, stories):
        assert (stories.prefix, stories.suffix) == ([1], []) and stories.pieces([1]) == ["<s>"]

    def test_a_beginning_asked_for_in_the_settings_counts_where_no_tokenizer_json_says_a_template(self, shared, tmp_path):
        """As transformers 5 has it: with a tokenizer.json, add_bos_token is not read."""
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((shared / "tokenizers" / "gpt2" / name).read_bytes())
        settings = {"bos_token": {"content": END_OF_TEXT}, "add_bos_token": True, "add_eos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        asked = tokenizers.load(tmp_path)
        assert (asked.prefix, asked.suffix) == ([50256], [50256])
        asked.core.post_processor = None
        asked.save(tmp_path)
        assert tokenizers.load(tmp_path).prefix == []


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "##b", "."]


class TestTemplates:
    @pytest.mark.parametrize("kind, single, pair, types", [
        ("decoder", [0, 8], [0, 8, 0, 9], [0, 0, 0, 1]),
        ("encoder", [2, 8, 3], [2, 8, 3, 9, 3], [0, 0, 0, 1, 1]),
        ("encoder-decoder", [8, 1], [8, 1, 9, 1], [0] * 4)])
    def test_each_shape_has_its_own(self, kind, single, pair, types):
        learnt = tokenizers.learn(SAMPLE, TokenizerConfig(300), kind)
        assert learnt.with_template([8]) == (single, [0] * len(single))
        assert learnt.with_template([8], [9]) == (pair, types)
        assert [*learnt.prefix, 8, *learnt.suffix] == single
        assert learnt.with_template([])[0] == learnt.prefix + learnt.suffix
        assert learnt.target is learnt

    def test_of_a_tokenizer_without_one(self, gpt2):
        assert gpt2.with_template([8]) == ([8], [0]) and gpt2.with_template([8], [9]) == ([8, 9], [0, 1])

    @pytest.mark.parametrize("processor, pair, types", [
        (processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), [2, 8, 3, 9, 3], [0, 0, 0, 1, 1]),
        (processors.RobertaProcessing(("</s>", 3), ("<s>", 2)), [2, 8, 3, 3, 9, 3], [0] * 6),
        (processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing("$A", "$B:1 $A", [])]), [9, 8], [1, 0])])
    def test_of_every_kind_in_a_tokenizer_json(self, processor, pair, types):
        learnt = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        learnt.core.post_processor = processor
        assert tokenizers.Tokenizer(learnt.core).with_template([8], [9]) == (pair, types)

    def test_the_mask_takes_the_space_before_it(self):
        learnt = tokenizers.learn(SAMPLE, TokenizerConfig(300), "encoder")
        ids = learnt.encode("the [MASK] of")
        assert ids.index(4) == len(learnt.encode("the")) and learnt.pieces(ids)[ids.index(4) + 1].startswith("Ġ")
        named = [learnt.special(f"{name}_token") for name in ("pad", "unk", "cls", "sep", "mask", "eos")]
        assert named == [0, 1, 2, 3, 4, None]

    def test_a_vocabulary_too_small_for_the_special_tokens(self):
        with pytest.raises(UserError, match=r"vocab_size 258 is too small.*an encoder make 261"):
            tokenizers.learn(SAMPLE, TokenizerConfig(258), "encoder")
        assert tokenizers.learn(SAMPLE, TokenizerConfig(261), "encoder").size == 261


class TestTextOfIds:
    @pytest.mark.parametrize("settings, expected", [
        ({}, "the ' the."), ({"clean_up_tokenization_spaces": True}, "the'the.")])
    def test_spaces_are_tidied_where_the_settings_say_so(self, tmp_path, settings, expected):
        (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "'"]) + "\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = tokenizers.load(tmp_path)
        assert tokenizer.decode(tokenizer.prefix + tokenizer.encode("The ' THE ."), special=False) == expected

    def test_but_not_of_a_byte_level_vocabulary(self):
        learnt = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        asked = tokenizers.Tokenizer(learnt.core, {"clean_up_tokenization_spaces": True})
        assert asked.decode(learnt.encode("a , b ' c")) == "a , b ' c"


class TestSpecialTokens:
    def test_those_that_only_an_older_file_names(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "<begin>"]) + "\n")
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(
            {"bos_token": "<begin>", "eos_token": {"content": "[SEP]", "lstrip": False}}))
        tokenizer = tokenizers.load(tmp_path)
        assert [tokenizer.special(f"{name}_token") for name in ("bos", "eos", "cls", "mask")] == [9, 3, 2, 4]
        assert tokenizer.encode("a<begin>") == [6, 9]


def streamed(tokenizer, before, after):
    """The pieces of a stream, checked to be what decoding in one go gives for `after`."""
    decoder = StreamDecoder(tokenizer, before)
    pieces = [decoder.push(index) for index in after]
    start = len(tokenizer.decode(before, special=False))
    assert "".join(pieces) == tokenizer.decode(before + after, special=False)[start:]
    return pieces


valid_text = any_text.filter(lambda text: OPEN not in text)


class TestStreaming:
    @patterns
    @given(prompt=valid_text, text=valid_text)
    @settings(max_examples=80)
    @example(prompt="红楼梦", text="的故事🎉")
    def test_pieces_of_a_byte_level_text_join_to_it(self, pattern, prompt, text):
        tokenizer = LEARNT[pattern]
        pieces = streamed(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text))
        assert OPEN not in "".join(pieces)
        assert "".join(pieces) == text.replace(END_OF_TEXT, "")

    @given(prompt=valid_text, text=valid_text)
    @settings(max_examples=80)
    @example(prompt="好好好", text="好🎉")
    @example(prompt="", text="héllo 🎉🎉 x")
    def test_pieces_of_a_byte_fallback_text_join_to_it(self, stories, prompt, text):
        pieces = streamed(stories, stories.encode(prompt), stories.encode(text))
        assert OPEN not in "".join(pieces)

    @given(prompt=st.text("abc de", max_size=20), text=st.text("abc de", max_size=20))
    @settings(max_examples=40)
    def test_spaces_between_words_survive(self, stories, prompt, text):
        ids = stories.encode(prompt + text)
        for cut in range(len(ids)):
            streamed(stories, ids[:cut], ids[cut:])

    def test_a_character_in_pieces_is_given_whole_with_its_last_byte(self, gpt2):
        ids = gpt2.encode("梦🎉")
        assert len(ids) > 4  # cut inside both characters
        pieces = streamed(gpt2, gpt2.encode("红"), ids)
        assert [piece for piece in pieces if piece] == ["梦", "🎉"]

    def test_real_chinese(self, gpt2, stories, shared):
        text = (shared / "text" / "zh-lunyu.txt").read_text(encoding="utf-8")[:1500]
        for tokenizer in (gpt2, stories):
            assert OPEN not in "".join(streamed(tokenizer, tokenizer.encode("子曰："), tokenizer.encode(text)))

    def test_broken_bytes_do_not_swallow_the_text_after_them(self, gpt2):
        half = gpt2.encode("梦")[:1]
        decoder = StreamDecoder(gpt2, gpt2.encode("a"))
        text = "".join(decoder.push(index) for index in half + gpt2.encode(" ok then"))
        assert text == " ok then"

    def test_a_replacement_character_is_left_out_too(self, gpt2):
        decoder = StreamDecoder(gpt2, gpt2.encode("a"))
        assert "".join(decoder.push(index) for index in gpt2.encode(f"b{OPEN}c")) == "bc"

    def test_the_space_after_a_special_token_survives(self, stories):
        ids = [*stories.encode("one"), 2, *stories.encode("two three")]
        assert "".join(streamed(stories, [], ids)) == "one two three"

    def test_special_tokens_give_nothing(self):
        assert streamed(LEARNT["gpt2"], [0], [0, *LEARNT["gpt2"].encode("The"), 0])[-1] == ""


class TestWordCuts:
    """Which tokenizers may be fed a text in pieces."""

    @patterns
    def test_learnt_ones_may(self, pattern):
        assert LEARNT[pattern].cuts_at_words

    def test_gpt2_may_and_those_that_normalize_may_not(self, gpt2, bert, stories):
        assert gpt2.cuts_at_words and not bert.cuts_at_words and not stories.cuts_at_words

    @pytest.mark.parametrize("token, safe", [
        (AddedToken("<mask>"), True), (AddedToken("<mask>", lstrip=True), True), (AddedToken("mask", lstrip=True), False),
        (AddedToken("MASK", rstrip=True), False), (AddedToken("new york"), False),
        (AddedToken("e.g."), False), (AddedToken(",x", single_word=True), False)])
    def test_an_added_token_that_reaches_across_a_cut_forbids_it(self, token, safe):
        tokenizer = tokenizers.learn(SAMPLE, TokenizerConfig(300))
        tokenizer.core.add_tokens([token])
        assert tokenizers.Tokenizer(tokenizer.core).cuts_at_words is safe


# protobuf by hand: field 1 (a piece) of 14 bytes: text "<unk>", score 0.0, type 2; then of 8: "a", -1.0, no type
TWO_PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02" b"\x0a\x08\x0a\x01a\x15\0\0\x80\xbf"


def test_a_sentencepiece_file_by_hand():
    found = parse(TWO_PIECES)
    assert found.pieces == [("<unk>", 0.0, 2), ("a", -1.0, 1)] and found.names == {"unk_token": "<unk>", "bos_token": "<s>"}
    assert found.add_dummy_prefix and found.remove_extra_whitespaces and found.charsmap == b"" and found.unk_id == 0


class TestErrors:
    def test_a_missing_folder(self, tmp_path):
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

    @pytest.mark.parametrize("content, message", [(b"{", "is not JSON"), (b"[]", "is not a JSON object"),
                                                  (b"\xff", "is not JSON")])
    def test_broken_settings(self, tmp_path, content, message):
        LEARNT["gpt2"].save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            tokenizers.load(tmp_path)

    def test_broken_gpt2_files(self, tmp_path):
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "merges.txt").write_text("a b\n")
        with pytest.raises(UserError, match=r"vocab\.json: is no tokenizer"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize("name, content, message", [
        ("vocab.txt", b"\xff\n", "is no tokenizer"), ("vocab.txt", b"a\nb\n", r"is no tokenizer: it lacks \[UNK\]"),
        ("spiece.model", b"\x0a\xff", "is no tokenizer: it is damaged or no SentencePiece model"),
        ("tokenizer.model", b"hello there", "is no tokenizer: it is damaged or no SentencePiece model"),
        ("tokenizer.model", b"", "is no tokenizer: it has no pieces"),
        ("source.spm", b"", "cannot read: No such file")])
    def test_files_of_each_kind(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        where = "target.spm" if name == "source.spm" else name
        with pytest.raises(UserError, match=rf"{where}: {message}"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize("name, content, message", [
        ("special_tokens_map.json", "{", "is not JSON"), ("special_tokens_map.json", "[]", "is not a JSON object"),
        ("added_tokens.json", "nothing", "is not JSON"), ("added_tokens.json", '{"a": "b"}', "is no tokenizer"),
        ("config.json", "{", "is not JSON"), ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is no tokenizer"),
        ("tokenizer_config.json", '{"eos_token": {"lstrip": true}}', "is no tokenizer")])
    def test_what_lies_beside_them(self, tmp_path, name, content, message):
        LEARNT["gpt2"].save(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            tokenizers.load(tmp_path)

    @pytest.mark.parametrize("files, message", [
        ({"source.spm": b"?"}, r"source\.spm: is no tokenizer"), ({"target.spm": b"?"}, r"target\.spm: is no tokenizer"),
        ({"vocab.json": b"{}"}, r"vocab\.json: is no tokenizer: it lacks <unk>"),
        ({"vocab.json": b'{"<unk>": "0"}'}, r"vocab\.json: is no tokenizer: an id is no number"),
        ({"tokenizer_config.json": b'{"separate_vocabs": true}'}, "has a vocabulary for each language")])
    def test_marians_files(self, tmp_path, files, message):
        good = {"source.spm": TWO_PIECES, "target.spm": TWO_PIECES, "vocab.json": b'{"<unk>": 0, "a": 1, "</s>": 2}'}
        for name, content in (good | files).items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenizers.load(tmp_path)


@pytest.mark.parametrize("text", ["a long line of words, and more é 却说 " * 300, "x" * 9000, "a\n\nb  c. " * 900])
def test_a_long_text_is_encoded_in_parts_as_in_one_go(text, small_tokenizer, monkeypatch):
    whole, ids = small_tokenizer.encode_with_ends([text, "short"]), small_tokenizer.encode_batch([text, "short"])
    monkeypatch.setattr(tokenizers, "LONG_TEXT", 100)
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokenizers, "PARTS_AT_ONCE", 3)
    assert small_tokenizer.encode_batch([text, "short"]) == ids == [found.ids for found in whole]
    assert small_tokenizer.encode_with_ends([text, "short"]) == whole and whole[0].ends[-1] == len(text.encode())
