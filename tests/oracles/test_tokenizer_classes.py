"""Which tokenizer class a folder means, against AutoTokenizer; no class is ever guessed."""

import itertools
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

from lmcli.errors import UserError
from lmcli.text import sentencepiece as spm
from lmcli.text import tokenizer as tokenizers
from lmcli.text.huggingface import KNOWN_CLASSES
from lmcli.text.tokenizer_classes import (
    ALIASES,
    CLASS_OF_MODEL_TYPE,
    GENERIC_CLASS,
    GENERIC_NAMES,
    PYTHON_CLASSES,
    class_name,
)

transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
library = pytest.importorskip("sentencepiece")

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "Once upon a time, Tom saw a cat.",
    "  two  spaces",
    "naïve x's I'LL 2024",
    "日本 x",
    "\ny",
]
# classes in the registry of transformers, without those that are no tokenizers
REGISTERED = sorted({*filter(None, auto.TOKENIZER_MAPPING_NAMES.values())})
NOT_KNOWN = [
    name
    for name in (*REGISTERED, "BertJapaneseTokenizerFast", "InventedTokenizer")
    if ALIASES.get(name.removesuffix("Fast"), name.removesuffix("Fast")) not in KNOWN_CLASSES
    and name not in GENERIC_NAMES
]
FAMILIES = ("bart", "bert", "distilbert", "gpt2", "gpt_neox", "llama", "marian", "mistral")
FAMILIES += ("modernbert", "qwen2", "qwen3", "roberta", "t5")


@pytest.fixture(scope="module")
def lines():
    return (ROOT / "data" / "stories.txt").read_text(encoding="utf-8").splitlines()[:300]


@pytest.fixture(scope="module")
def vocabularies(lines):
    """The files of each kind of vocabulary, by the name of the first."""
    import io

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(byte_level.to_str())["model"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the"]
    files = {}
    for kind in ("unigram", "bpe"):
        file = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type=kind,
            vocab_size=400,
            byte_fallback=kind == "bpe",
            num_threads=1,
            minloglevel=2,
        )
        files[kind] = file.getvalue()
    return {
        "tokenizer.json": {"tokenizer.json": byte_level.to_str().encode()},
        "vocab.txt": {"vocab.txt": "\n".join(words).encode()},
        "vocab.json": {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": "\n".join(" ".join(pair) for pair in model["merges"]).encode(),
        },
        "spiece.model": {"spiece.model": files["unigram"]},
        "tokenizer.model": {"tokenizer.model": files["bpe"]},
        "sentencepiece.bpe.model": {"sentencepiece.bpe.model": files["unigram"]},
    }


def write(folder: Path, files: dict, config=None, settings=None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, document in (("config.json", config), ("tokenizer_config.json", settings)):
        if document is not None:
            (folder / name).write_text(json.dumps(document))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def refusal(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        tokenizers.load(folder)
    return caught.value


def assert_same_ids(folder: Path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    assert [ours.with_template(ours.encode(text))[0] for text in TEXTS] == [
        theirs(text).input_ids for text in TEXTS
    ]


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_a_class_that_is_not_known_is_refused_by_name(name, vocabularies, tmp_path):
    kinds = [kind for kind in vocabularies if kind != "tokenizer.json"]
    configs = ({"model_type": "bert"}, {"model_type": "llama"}, {"model_type": "t5"}, {})
    every = [*itertools.product(kinds, configs)]  # of which each class gets a tenth, in turn
    for kind, config in every[NOT_KNOWN.index(name) % 10 :: 10]:
        files = vocabularies[kind]
        folder = write(tmp_path / "a", files, {**config, "tokenizer_class": name})
        assert f"tokenizer class {name.removesuffix('Fast')} is not" in refusal(folder).what
        folder = write(tmp_path / "a", files, config, {"tokenizer_class": name})
        assert f"tokenizer class {name.removesuffix('Fast')} is not" in refusal(folder).what


def test_the_list_of_classes_in_python_is_that_of_transformers():
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    classes = {name: auto.tokenizer_class_from_name(name) for name in REGISTERED}
    in_python = {
        name
        for name, cls in classes.items()
        if cls is not None and not issubclass(cls, TokenizersBackend)
    }
    assert in_python - {"MarianTokenizer"} <= PYTHON_CLASSES
    assert not {name for name in PYTHON_CLASSES & {*classes} if name not in in_python}


@pytest.mark.parametrize("name", sorted(PYTHON_CLASSES))
def test_a_class_in_python_is_refused_with_a_tokenizer_json_too(name, vocabularies, tmp_path):
    """Transformers never reads the file for such a class."""
    files = vocabularies["tokenizer.json"]
    folder = write(tmp_path / "a", files, {"model_type": "bert"}, {"tokenizer_class": name})
    assert refusal(folder).what == f"tokenizer class {name} is not supported"


def test_the_class_of_each_model_type_is_that_of_transformers():
    names = {"TokenizersBackend": GENERIC_CLASS, "MistralCommonBackend": GENERIC_CLASS}
    for model_type, registered in auto.TOKENIZER_MAPPING_NAMES.items():
        if model_type in CLASS_OF_MODEL_TYPE:
            cls = auto.tokenizer_class_from_name(registered).__name__
            assert CLASS_OF_MODEL_TYPE[model_type] == names.get(cls, cls), model_type
    assert {*CLASS_OF_MODEL_TYPE} <= {*auto.TOKENIZER_MAPPING_NAMES}
    assert {*FAMILIES} - {*CLASS_OF_MODEL_TYPE} == {"llama"}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("byte_level", [True, False])
def test_the_order_of_rules_is_that_of_autotokenizer(
    model_type, byte_level, vocabularies, tmp_path, monkeypatch
):
    """For example, qwen2 ignores any class that its folder names, and llama has none of its own."""
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase,
        "from_pretrained",
        classmethod(lambda cls, *_, **__: cls.__name__),
    )
    files = vocabularies["tokenizer.json"]
    if not byte_level:
        core = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
        files = {"tokenizer.json": core.to_str().encode()}
    declared = [None, *KNOWN_CLASSES, *ALIASES, *GENERIC_NAMES, "LlamaTokenizerFast"]
    declared += ["BertTokenizerFast", "InventedTokenizer", "AlbertTokenizer"]
    for name in declared:
        folder = write(tmp_path / "a", files, {"model_type": model_type}, {"tokenizer_class": name})
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = class_name(model_type, name, lambda: byte_level) or GENERIC_CLASS
        if ours not in (*KNOWN_CLASSES, "AlbertTokenizer"):
            ours = "TokenizersBackend"
        assert ours == theirs, name


def test_qwen2_with_the_class_of_llama(vocabularies, tmp_path):
    for kind in ("tokenizer.json", "vocab.json"):
        folder = write(
            tmp_path / "a",
            vocabularies[kind],
            {"model_type": "qwen2"},
            {"tokenizer_class": "LlamaTokenizer"},
        )
        assert_same_ids(folder)
        assert tokenizers.load(folder).settings["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.parametrize("name", ["InventedTokenizer", GENERIC_CLASS, "PreTrainedTokenizer", None])
def test_a_tokenizer_json_of_another_class_is_used_as_it_is(name, vocabularies, tmp_path):
    files = vocabularies["tokenizer.json"]
    settings = {"tokenizer_class": name} if name else None
    assert_same_ids(write(tmp_path / "a", files, {"model_type": "llama"}, settings))


@pytest.mark.parametrize(
    "name", ["AlbertTokenizer", "CLIPTokenizer", "DebertaV2Tokenizer", "XLMRobertaTokenizer"]
)
def test_what_transformers_saves_for_a_class_is_read_as_it_is(name, lines, tmp_path):
    trained = getattr(transformers, name)().train_new_from_iterator(lines, 500)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert_same_ids(tmp_path)


@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": False}, {"add_prefix_space": False}], ids=str
)
@pytest.mark.parametrize("has_json", [True, False])
def test_code_llama(has_json, settings, vocabularies, tmp_path):
    """Its class splits text otherwise than the tokenizer.json in its folders says."""
    files = vocabularies["tokenizer.model"]
    if has_json:
        core = spm.generic_tokenizer(spm.parse(files["tokenizer.model"]))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        files = {"tokenizer.json": core.to_str().encode()}
    settings = {"tokenizer_class": "CodeLlamaTokenizer", **settings}
    assert_same_ids(write(tmp_path / "a", files, {"model_type": "llama"}, settings))


def test_a_class_without_its_own_files(vocabularies, tmp_path):
    for name, kind, missing in (
        ("BertTokenizer", "vocab.json", "vocab.txt"),
        ("GPT2Tokenizer", "vocab.txt", "vocab.json and merges.txt"),
        ("T5Tokenizer", "tokenizer.model", "spiece.model"),
        ("LlamaTokenizer", "spiece.model", "tokenizer.model"),
        (GENERIC_CLASS, "vocab.txt", "tokenizer.model"),
    ):
        folder = write(tmp_path / "a", vocabularies[kind], None, {"tokenizer_class": name})
        error = refusal(folder)
        assert error.what == "holds no tokenizer"
        assert error.hint == f"{name} needs tokenizer.json, or {missing}"


def test_a_tokenizer_json_that_does_not_fit_its_class(vocabularies, tmp_path):
    files = vocabularies["tokenizer.json"]
    folder = write(tmp_path / "a", files, {"model_type": "bert"}, None)
    error = refusal(folder)
    assert error.what == "holds a BPE, but tokenizer class BertTokenizer has a WordPiece"
    with pytest.raises(Exception, match="WordPiece"):  # transformers finds out with the first text
        transformers.AutoTokenizer.from_pretrained(folder)("日本")


@pytest.mark.parametrize("kind", ["vocab.txt", "spiece.model"])
def test_files_of_several_classes_need_a_name(kind, vocabularies, tmp_path):
    error = refusal(write(tmp_path / "a", vocabularies[kind], {"model_type": "llama"}))
    assert error.what == f"holds {kind}, but names no tokenizer class"
    assert "tokenizer_class" in error.hint
    error = refusal(write(tmp_path / "a", vocabularies[kind], {"model_type": "albert"}))
    assert "lm knows none for model_type 'albert'" in error.what


@pytest.mark.parametrize(
    ("model_type", "name", "refused"),
    [
        ("llama", "OwnTokenizer", True),
        ("llama", None, True),
        ("gpt2", "OwnTokenizer", True),
        ("llama", GENERIC_CLASS, False),
        ("llama", "LlamaTokenizer", False),
        ("gpt2", None, False),
    ],
)
@pytest.mark.parametrize("code", [["own.Own", None], {"AutoTokenizer": ["own.Own", None]}])
def test_a_tokenizer_with_its_own_code(model_type, name, refused, code, vocabularies, tmp_path):
    """Transformers uses a class of its own if it can, else it asks whether to run the code."""
    settings = {"auto_map": code, **({"tokenizer_class": name} if name else {})}
    files = vocabularies["tokenizer.json"]
    folder = write(tmp_path / "a", files, {"model_type": model_type}, settings)
    if not refused:
        return assert_same_ids(folder)
    assert "comes with its own code (own.Own), which lm never runs" in refusal(folder).what
    return None


def test_a_class_that_is_no_name(vocabularies, tmp_path):
    for name in (["BertTokenizer"], 7, {"a": 1}):
        folder = write(tmp_path / "a", vocabularies["vocab.txt"], {}, {"tokenizer_class": name})
        error = refusal(folder)
        assert error.what == f"tokenizer_class {name!r} is no name"
        assert error.where.endswith("tokenizer_config.json")
