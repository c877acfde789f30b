"""Tokenizers of every family against AutoTokenizer: ids, templates, special tokens, text."""

import io
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lmcli.config import TokenizerConfig
from lmcli.text import sentencepiece as ours_spm
from lmcli.text import tokenizer as tokenizers
from lmcli.text.sentencepiece import MarianSide
from lmcli.text.stream_decoder import StreamDecoder
from lmcli.text.tokenizer import END_OF_TEXT

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", END_OF_TEXT, "<mask>", "<|padding|>"]
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
HOSTILE = [
    "",
    " ",
    "  two  spaces ",
    "a\tb\nc",
    "naïve Café e\u0301",
    "ﬁne ½ ①",
    "红楼梦 x",
    "🎉👩‍👩‍👧",
    "[MASK] the [MASK].",
    "<s> a </s><pad><mask> b",
    f"x{END_OF_TEXT} y",
    "<extra_id_0> and <extra_id_99>",
    "don't , they 're ! ?",
    "\u200bzero",
    "\r\nx",
    "ßß größ",
    "각",
    "e\u0301\u0302",
    "字字 字x",
    "ＡＢＣ　ｘ",
    ">>de<< Hello",
    "ÀÉ ß straße",
    "I'LL 20242024 x's",
    "a\u00a0b",
    "Ünï ‑ – —",
]


def lines_of(shared, count):
    """`count` real lines, a third each of an English encyclopedia, German captions and Chinese.

    At most 160 characters of each: the rest of a long line shows no more than another line does.
    """
    english, pairs, chinese = (
        [
            line if name.endswith(".jsonl") else line[:160]
            for line in (shared / name).read_text(encoding="utf-8").split("\n")[: 2 * count]
            if line.strip()
        ]
        for name in (
            "text/wikitext-2-valid.txt",
            "translation/multi30k.train.en-de.jsonl",
            "text/zh-hongloumeng.txt",
        )
    )
    german = [json.loads(line)["target"] for line in pairs]
    share = count // 3
    return [*english[: count - 2 * share], *german[:share], *chinese[:share]]


@pytest.fixture(scope="module")
def lines(shared):
    return lines_of(shared, 90)


@pytest.fixture(scope="module")
def many_lines(shared):
    """For the tokenizers that others learned from far more text."""
    return lines_of(shared, 300)


@pytest.fixture(scope="module")
def training(shared):
    """Text to learn from; most of its lines are not among those compared."""
    return lines_of(shared, 6000)[1000:]


@pytest.fixture(scope="module")
def byte_level(training):
    """A byte-level BPE of 1,000 ids; the first are the special tokens of several families."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    core.train_from_iterator(
        training[:1500],
        trainers.BpeTrainer(
            vocab_size=1000,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL,
        ),
    )
    return core


@pytest.fixture(scope="module")
def spm(training):
    """spm(**options): a SentencePiece file of 1,200 pieces, trained by the library itself."""

    def train(**options):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            **{
                "sentence_iterator": iter(training[:3200:3]),
                "model_writer": model,
                "vocab_size": 1200,
                "num_threads": 1,
                "character_coverage": 0.98,
                "minloglevel": 2,
                **options,
            }
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="module")
def t5_spm(spm):
    return spm(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def llama_spm(spm):
    return spm(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|tool|>"],
    )


@pytest.fixture(scope="module")
def wordpieces(training):
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lower = [line.lower() for line in training[:1500]]
    core.train_from_iterator(
        training[:1500] + lower,
        trainers.WordPieceTrainer(
            vocab_size=2500,
            show_progress=False,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        ),
    )
    return [token for token, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]


def write(folder: Path, model_type=None, settings=None, **files):
    """Writes a folder of these files (bytes, text or JSON); __ in a name is a dot."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": model_type} if model_type else None
    documents = {"config__json": config, "tokenizer_config__json": settings, **files}
    for name, content in documents.items():
        if content is not None:
            data = (
                content
                if isinstance(content, bytes)
                else (content if isinstance(content, str) else json.dumps(content)).encode()
            )
            (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def merges(core):
    """vocab.json and merges.txt of a byte-level BPE."""
    model = json.loads(core.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "vocab__json": model["vocab"],
        "merges__txt": "#version: 0.2\n" + "\n".join(pairs) + "\n",
    }


def check(folder, lines):
    """Compares all results for these lines with AutoTokenizer; returns our tokenizer."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    texts = [*lines, *HOSTILE]
    encoded = ours.encode_batch(texts)
    assert ours.size == len(theirs)
    for i, (text, a, b) in enumerate(
        zip(texts, theirs(texts, add_special_tokens=False).input_ids, encoded, strict=True)
    ):
        assert a == b, (i, text)
    assert theirs(texts).input_ids == [ours.with_template(ids)[0] for ids in encoded]
    assert [ours.prefix + ids + ours.suffix for ids in encoded] == [
        ours.with_template(ids)[0] for ids in encoded
    ]
    pairs = [(text, other) for text, other in zip(texts, reversed(texts)) if text and other]
    both = theirs([a for a, _ in pairs], [b for _, b in pairs], return_token_type_ids=True)
    mine = [ours.with_template(ours.encode(a), ours.encode(b)) for a, b in pairs]
    assert both.input_ids == [ids for ids, _ in mine]
    if "token_type_ids" in both and not isinstance(theirs, transformers.MarianTokenizer):
        assert both.token_type_ids == [types for _, types in mine]
    for name in NAMES:
        assert ours.special_id(f"{name}_token") == getattr(theirs, f"{name}_token_id"), name
    whole = theirs(texts).input_ids
    for ids in whole[::4]:
        assert ours.decode(ids) == theirs.decode(ids)
    for ids in whole:
        assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)
    for text, (_, ends) in zip(texts, ours.encode_with_ends(texts), strict=True):
        assert ends == sorted(ends) and (not ends or ends[-1] == len(text.encode())), text
    return ours


def check_saved(folder, lines, again):
    """Compares a folder, and the folder that we save of it, with AutoTokenizer and each other."""
    ours = check(folder, lines)
    again.mkdir(exist_ok=True)
    if (folder / "config.json").is_file():
        shutil.copy(folder / "config.json", again)
    ours.save(again)
    same = check(again, lines[::10])
    assert same.encode_batch(lines) == ours.encode_batch(lines) and same.prefix == ours.prefix
    if not isinstance(ours.core, MarianSide) and type(ours.core.model).__name__ != "Unigram":
        # a Unigram's scores lose their last bit when the library reads them
        assert same.hash == ours.hash
    return ours


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("gpt2", None),
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("gpt2", {"add_bos_token": True}),
        ("qwen2", None),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("gpt_neox", None),
        (
            "gpt_neox",
            {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True, "add_eos_token": True},
        ),
        ("roberta", None),
        ("roberta", {"add_prefix_space": True, "tokenizer_class": "RobertaTokenizer"}),
        ("bart", {"tokenizer_class": "BartTokenizer"}),
    ],
    ids=str,
)
def test_vocabulary_and_merges(tmp_path, lines, byte_level, model_type, settings):
    folder = write(tmp_path / "a", model_type, settings, **merges(byte_level))
    # this class ignores the bos in the template of a tokenizer.json
    ignores_bos = model_type == "gpt_neox" and settings
    ours = check(folder, lines) if ignores_bos else check_saved(folder, lines, tmp_path / "b")
    assert len(ours.prefix) == int(
        model_type in ("roberta", "bart") or bool(settings and settings.get("add_bos_token"))
    )


def test_special_tokens_of_an_older_folder(tmp_path, lines, byte_level):
    mask = {
        "content": "<mask>",
        "single_word": False,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
    }
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "mask_token": mask,
        "additional_special_tokens": ["<new>"],
    }
    folder = write(
        tmp_path / "a",
        "roberta",
        {"model_max_length": 512},
        **merges(byte_level),
        special_tokens_map__json=special,
        added_tokens__json={"<other>": 1000, "<new>": 1001},
    )
    ours = check_saved(folder, [*lines[:100], "a <mask> <other>b<new> c"], tmp_path / "b")
    assert ours.id("<new>") == 1001 and ours.pieces(ours.encode("the <mask> of"))[-2] == "<mask>"


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("gpt2", None),
        (
            "gpt2",
            {
                "tokenizer_class": "GPT2TokenizerFast",
                "add_bos_token": True,
                "add_prefix_space": False,
            },
        ),
        ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("gpt_neox", {"tokenizer_class": "GPTNeoXTokenizerFast"}),
        (
            "gpt_neox",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "pad_token": "<further>",
            },
        ),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}),
        ("llama", {"bos_token": "<s>"}),
        ("mistral", None),
        ("mistral", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}),
        ("roberta", None),
        (None, {"bos_token": "<s>"}),
        (
            "qwen3",
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    **{
                        str(i): {"content": token, "special": True, "normalized": False}
                        for i, token in enumerate(SPECIAL)
                    },
                    "1000": {"content": "<|im_end|>", "special": True, "normalized": False},
                    "1001": {"content": "<think>", "special": False, "normalized": False},
                },
            },
        ),
    ],
    ids=str,
)
def test_byte_level_tokenizer_json(tmp_path, lines, byte_level, model_type, settings):
    if model_type is None:
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write(tmp_path / "a", model_type, settings, tokenizer__json=byte_level.to_str())
    check_saved(folder, [*lines, "<think>so<|im_end|> <further>"], tmp_path / "b")


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("bert", None),
        ("bert", {"do_lower_case": False}),
        ("bert", {"do_lower_case": False, "strip_accents": True}),
        (
            "bert",
            {
                "tokenize_chinese_chars": False,
                "tokenizer_class": "BertTokenizer",
                "clean_up_tokenization_spaces": True,
            },
        ),
        (
            "distilbert",
            {
                "tokenizer_class": "DistilBertTokenizer",
                "do_lower_case": True,
                "strip_accents": False,
            },
        ),
        ("distilbert", None),
    ],
    ids=str,
)
def test_vocab_txt(tmp_path, lines, wordpieces, model_type, settings):
    folder = write(tmp_path / "a", model_type, settings, vocab__txt="\n".join(wordpieces) + "\n")
    ours = check_saved(folder, lines, tmp_path / "b")
    assert ours.with_template([7], [8, 9]) == ([2, 7, 3, 8, 9, 3], [0, 0, 0, 1, 1, 1])
    assert ours.special_id("mask_token") == 4


def test_real_bert(shared, many_lines, tmp_path):
    folder = shared / "tokenizers" / "bert-minilm"
    check_saved(folder, many_lines, tmp_path / "b")
    files = {
        name: (folder / name.replace("__", ".")).read_bytes()
        for name in ("config__json", "vocab__txt")
    }
    ours = check(write(tmp_path / "bare", **files), many_lines)
    assert ours.encode_batch(many_lines) == tokenizers.load(folder).encode_batch(many_lines)


def test_real_gpt2(shared, many_lines, tmp_path):
    folder = write(tmp_path / "a", "gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(shared / "tokenizers" / "gpt2" / name, folder / name)
    check_saved(folder, many_lines, tmp_path / "b")


def test_stories260k(shared, many_lines, tmp_path):
    check_saved(shared / "models" / "stories260K", many_lines, tmp_path / "b")


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 10},
        {"clean_up_tokenization_spaces": True, "tokenizer_class": "T5TokenizerFast"},
    ],
    ids=str,
)
def test_t5(tmp_path, lines, t5_spm, settings):
    folder = write(tmp_path / "a", "t5", settings, spiece__model=t5_spm)
    ours = check_saved(folder, lines, tmp_path / "b")
    assert (ours.prefix, ours.suffix) == ([], [1])
    extra = settings.get("extra_ids", 100) if settings else 100
    assert (
        ours.id("<extra_id_0>") == ours.size - 1
        and ours.id(f"<extra_id_{extra - 1}>") == ours.size - extra
    )
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "c")
    shutil.copy(folder / "config.json", tmp_path / "c")
    check_saved(tmp_path / "c", lines[::5], tmp_path / "d")


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ("llama", None),
        ("mistral", None),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_eos_token": True}),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
        ("mistral", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    ],
    ids=str,
)
def test_sentencepiece_file_of_llama(tmp_path, lines, llama_spm, model_type, settings):
    folder = write(tmp_path / "a", model_type, settings, tokenizer__model=llama_spm)
    ours = check_saved(folder, [*lines, "a<|tool|> b"], tmp_path / "b")
    assert ours.prefix == ([1] if settings and settings.get("add_bos_token") else [])


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    ],
    ids=str,
)
def test_older_tokenizer_json_of_llama(tmp_path, lines, llama_spm, settings):
    """As in Llama 2's folders: the normalizer adds ▁, the template <s>."""
    core = ours_spm.generic_tokenizer(ours_spm.parse(llama_spm))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    folder = write(tmp_path / "a", "llama", settings, tokenizer__json=core.to_str())
    assert check_saved(folder, lines, tmp_path / "b").prefix == [1]


@pytest.fixture(scope="module")
def marian(shared, tmp_path_factory):
    """An English–German folder of Marian's converter: two SentencePiece files and a vocab.json."""
    rows = [
        json.loads(line)
        for line in (shared / "translation" / "multi30k.train.en-de.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")[:2000]
        if line
    ]
    models_ = []
    for side in ("source", "target"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(row[side] for row in rows),
            model_writer=model,
            vocab_size=900,
            num_threads=1,
            minloglevel=2,
            character_coverage=0.9999,
        )
        models_.append(model.getvalue())
    pieces = dict.fromkeys(["</s>", "<unk>"])
    for data in models_:
        pieces |= dict.fromkeys(
            piece.text for piece in ours_spm.parse(data).pieces if piece.type == ours_spm.NORMAL
        )
    vocabulary = {piece: i for i, piece in enumerate([*pieces, ">>de<<", "<pad>"])}
    settings = {
        "source_lang": "en",
        "target_lang": "de",
        "model_max_length": 512,
        "tokenizer_class": "MarianTokenizer",
    }
    return write(
        tmp_path_factory.mktemp("marian"),
        "marian",
        settings,
        source__spm=models_[0],
        target__spm=models_[1],
        vocab__json=vocabulary,
    )


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian(tmp_path, shared, lines, marian):
    rows = [
        json.loads(line)
        for line in (shared / "translation" / "multi30k.val.en-de.jsonl")
        .read_text(encoding="utf-8")
        .split("\n")[:200]
        if line
    ]
    english, german = [row["source"] for row in rows], [row["target"] for row in rows]
    ours = check_saved(marian, [*lines, *english], tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    texts = [*german, *lines, *HOSTILE]
    expected = theirs(text_target=texts).input_ids
    encoded = ours.target.encode_batch(texts)
    assert [ours.target.with_template(ids)[0] for ids in encoded] == expected
    for ids in expected:
        assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)
    assert sum(ours.encode(text) != ours.target.encode(text) for text in german) > 180
    for name in ("source.spm", "target.spm", "vocab.json"):
        assert (tmp_path / "b" / name).read_bytes() == (marian / name).read_bytes()
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    for text in german[:100]:
        ids = ours.target.encode(text)
        stream = StreamDecoder(ours, [])
        assert "".join(stream.push(index) for index in ids).strip() == ours.decode(
            ids, special=False
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"model_type": "bpe", "byte_fallback": True},
    ],
    ids=str,
)
def test_a_sentencepiece_file_is_parsed_as_by_the_library(spm, options):
    from sentencepiece import sentencepiece_model_pb2

    data = spm(bos_id=-1, vocab_size=700, **options)
    theirs = sentencepiece_model_pb2.ModelProto.FromString(data)
    ours = ours_spm.parse(data)
    assert [tuple(piece) for piece in ours.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in theirs.pieces
    ]
    assert (ours.model_type, ours.byte_fallback, ours.unk_id) == (
        theirs.trainer_spec.model_type,
        theirs.trainer_spec.byte_fallback,
        theirs.trainer_spec.unk_id,
    )
    assert ours.special == {"unk_token": "<unk>", "eos_token": "</s>"}
    assert (ours.charsmap, ours.add_dummy_prefix, ours.remove_extra_whitespaces) == (
        theirs.normalizer_spec.precompiled_charsmap,
        theirs.normalizer_spec.add_dummy_prefix,
        theirs.normalizer_spec.remove_extra_whitespaces,
    )


@pytest.mark.parametrize(
    "kind, model_types",
    [
        ("decoder", ("llama", "qwen3")),
        ("encoder", ("bert", "roberta", "distilbert")),
        ("encoder-decoder", ("t5", "bart", "marian")),
    ],
)
@pytest.mark.parametrize("pattern", ["gpt2", "qwen2"])
def test_learned_tokenizers(tmp_path, lines, training, kind, model_types, pattern):
    """With any family, transformers uses the tokenizer.json as it is."""
    learned = tokenizers.learn(training[:300], TokenizerConfig(600, pattern), kind)
    for model_type in model_types:
        folder = write(tmp_path / model_type, model_type)
        learned.save(folder, context=64)
        ours = check(folder, lines if model_type == model_types[0] else lines[::20])
        assert ours.hash == learned.hash and ours.settings == {
            **learned.settings,
            "model_max_length": 64,
        }
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert type(theirs).__name__ == "TokenizersBackend" and theirs.model_max_length == 64
        assert ("token_type_ids" in theirs("a", "b")) == (kind == "encoder")
        if kind == "encoder":
            assert theirs.mask_token_id == 4 and theirs("the [MASK] of").input_ids[-3] == 4
