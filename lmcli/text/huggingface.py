"""Tokenizers in any folder: tokenizer.json, vocab.txt, vocab.json + merges.txt, SentencePiece.

A folder names a tokenizer class (or a model type, which implies one: see tokenizer_classes.py). The
class decides more than the files say: how text is normalized and split, which tokens are special,
what the template is. `TOKENIZER_CLASSES` has these rules, as transformers 5 applies them. For a
class that is not listed a tokenizer.json is used as it is.
"""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lmcli.errors import UserError
from lmcli.storage import read_json, user_errors
from lmcli.text import chat_template, sentencepiece
from lmcli.text.chat_template import spelling
from lmcli.text.library_errors import library_errors
from lmcli.text.sentencepiece import SPACE, MarianSide, SentencePieceModel
from lmcli.text.tokenizer_classes import (
    GENERIC_CLASS,
    MARIAN_CLASS,
    UNREGISTERED,
    check_known,
    class_name,
    class_of_files,
    declared_class,
    own_code,
)

Core = tokenizers.Tokenizer
Settings = dict[str, Any]
Pieces = SentencePieceModel | None

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
END_OF_TEXT = "<|endoftext|>"
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
MOST_SENTINELS = 10_000
GENERIC_FILES = ("tokenizer.model",)
BPE_FILES = ("vocab.json", "merges.txt")
# the first file of a class's vocabulary → the kind of its model
KINDS = {
    "vocab.json": "BPE",
    "vocab.txt": "WordPiece",
    "spiece.model": "Unigram",
    "tokenizer.model": "BPE",
}
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FolderTokenizer(NamedTuple):
    """A folder's tokenizer, that of the target language if it has one, settings, files to keep."""

    core: Core | MarianSide
    settings: Settings
    target: MarianSide | None
    files: dict[str, bytes]


class TokenizerClass(NamedTuple):
    """What a tokenizer class decides.

    `files` hold its vocabulary, `special` are its special tokens; `set_up` installs the steps
    around the vocabulary; `template` makes the template. `from_pieces` makes a tokenizer of a
    SentencePiece file, `fill_in` completes the settings.
    """

    files: tuple[str, ...]
    special: dict[str, str]
    set_up: Callable[[Core, Settings, Pieces], None]
    template: Callable[[Core, Settings], Any] | None = None
    from_pieces: Callable[[SentencePieceModel, Settings], Core] | None = None
    fill_in: Callable[[Settings], Settings] | None = None


def read(path: Path) -> FolderTokenizer:
    """The tokenizer of a folder, or of a tokenizer.json and the files next to it.

    Raises UserError if there is none, naming a class that is not supported, or naming the file that
    cannot be read.
    """
    folder, saved = (path.parent, path) if path.is_file() else (path, path / "tokenizer.json")
    # the class
    config, settings = _json(folder / "config.json"), read_settings(folder)
    declared, model_type = declared_class(config, settings, folder), config.get("model_type")
    code, names_nothing = own_code(settings), not (config or settings)
    name = class_name(model_type, declared, lambda: not code and _is_byte_level(saved))
    if name is None and not code and (saved.is_file() or model_type in UNREGISTERED):
        name = class_of_files(folder, saved, model_type, KNOWN_CLASSES)
    check_known(name, code, KNOWN_CLASSES, model_type, saved)
    has_marian_files = (folder / "source.spm").is_file() or not saved.is_file()
    if name == MARIAN_CLASS and not path.is_file() and has_marian_files:
        return _read_marian(folder, settings)
    rules = TOKENIZER_CLASSES.get(name or "")
    # the settings
    if rules:
        settings = {**rules.special, **settings, "tokenizer_class": name}
        settings = rules.fill_in(settings) if rules.fill_in else settings
    else:
        settings = {**settings, "tokenizer_class": GENERIC_CLASS}
    # the vocabulary, and the steps around it
    core, pieces = _read_core(folder, saved, settings, rules)
    if pieces and not rules:
        settings = {**pieces.special, **settings}
    elif names_nothing and core.token_to_id(END_OF_TEXT) is not None:
        settings.setdefault("eos_token", END_OF_TEXT)
    where = folder / "tokenizer_config.json"
    with _parsing(where if where.is_file() else saved):
        _set_up(core, settings, saved, rules, pieces)
    return FolderTokenizer(core, settings, None, {})


def _set_up(
    core: Core, settings: Settings, saved: Path, rules: TokenizerClass | None, pieces: Pieces
) -> None:
    """Installs the steps that the class and the settings say around a vocabulary."""
    if saved.is_file():  # a tokenizer.json has a template of its own
        ignored = ("add_bos_token", "add_eos_token")
        settings = {key: value for key, value in settings.items() if key not in ignored}
    if rules:
        rules.set_up(core, settings, pieces)
    _add_special_tokens(core, settings, saved.parent, pieces)
    if rules and rules.template:
        core.post_processor = rules.template(core, settings)
    elif not saved.is_file():
        core.post_processor = bos_eos_template(core, settings)


def _is_byte_level(file: Path) -> bool:
    with user_errors(file, "read"):
        return file.is_file() and b'"ByteLevel"' in file.read_bytes()


def read_settings(folder: Path) -> Settings:
    """`tokenizer_config.json`, with the chat template files and an older special_tokens_map."""
    settings = _json(folder / "tokenizer_config.json") | chat_template.read_files(folder)
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" not in settings:
        settings |= _json(folder / "special_tokens_map.json")
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(value, dict):
            settings[key] = {**value, "__type": "AddedToken"}  # transformers requires the type
    return settings


def _json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if there is no file."""
    return read_json(file) if file.is_file() else {}


NEEDED = "lm tokenize --train -o DIR TEXT makes one: a folder with a tokenizer.json"


@contextmanager
def _parsing(file: Path) -> Iterator[None]:
    """Turns whatever the library raises for a file that it cannot parse into a UserError."""
    with user_errors(file, "read"):
        try:
            with library_errors("is no tokenizer", str(file), NEEDED):
                yield
        except (OSError, UserError):
            raise
        except Exception as error:  # a value of the wrong type
            raise UserError(f"is no tokenizer: {error}", str(file), NEEDED) from error


def _read_core(
    folder: Path, saved: Path, settings: Settings, rules: TokenizerClass | None
) -> tuple[Core, Pieces]:
    """The vocabulary with the steps in its files, and the SentencePiece model if it is from one."""
    if saved.is_file():
        with _parsing(saved):
            core = Core.from_file(str(saved))
        _check_kind(core, settings["tokenizer_class"], saved, rules)
        return core, None
    files = [folder / name for name in (rules.files if rules else GENERIC_FILES)]
    if not all(file.is_file() for file in files):
        raise UserError(
            "holds no tokenizer",
            where=str(folder),
            hint=f"{settings['tokenizer_class']} needs tokenizer.json, or "
            + " and ".join(file.name for file in files),
        )
    with _parsing(files[0]):
        if files[0].name == "vocab.txt":
            return Core(_wordpiece(files[0], settings)), None
        if files[0].name == "vocab.json":
            return Core(models.BPE.from_file(str(files[0]), str(files[1]))), None
        pieces = sentencepiece.parse(files[0].read_bytes())
        if rules and rules.from_pieces:
            return rules.from_pieces(pieces, settings), pieces
        return sentencepiece.generic_tokenizer(pieces), pieces


def _check_kind(core: Core, name: str, saved: Path, rules: TokenizerClass | None) -> None:
    """Raises UserError if a tokenizer.json holds another kind of model than the class has."""
    kind = type(core.model).__name__
    if rules and kind != (expected := KINDS[rules.files[0]]):
        raise UserError(
            f"holds a {kind}, but tokenizer class {name} has a {expected}",
            where=str(saved),
            hint=f"to use it as it is, set tokenizer_class to {GENERIC_CLASS}",
        )


def _wordpiece(file: Path, settings: Settings) -> models.WordPiece:
    vocabulary, unknown = models.WordPiece.read_file(str(file)), spelling(settings["unk_token"])
    if unknown not in vocabulary:
        raise ValueError(f"it lacks {unknown}")
    return models.WordPiece(vocabulary, unk_token=unknown)


def _read_marian(folder: Path, settings: Settings) -> FolderTokenizer:
    settings = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **settings}
    if settings.get("separate_vocabs"):
        raise UserError(
            "has a vocabulary for each language, which is not supported", where=str(folder)
        )
    files, models_by_side = {}, []
    for name in MARIAN_FILES:
        with user_errors(folder / name, "read"):
            files[name] = (folder / name).read_bytes()
    special = {role: spelling(settings[role]) for role in ROLES if settings.get(role)}
    for name in MARIAN_FILES[:2]:
        with _parsing(folder / name):
            models_by_side.append(sentencepiece.parse(files[name]))
    ids = _json(folder / "vocab.json")
    with _parsing(folder / "vocab.json"):
        source, target = (MarianSide(pieces, ids, special) for pieces in models_by_side)
    return FolderTokenizer(source, {**settings, "tokenizer_class": MARIAN_CLASS}, target, files)


def _added_token(value: str | dict[str, Any], special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    keys = ("lstrip", "rstrip", "normalized", "single_word")
    options = {key: value[key] for key in keys if key in value}
    return AddedToken(value["content"], special=special, **options)


def _add_special_tokens(core: Core, settings: Settings, folder: Path, pieces: Pieces) -> None:
    """Adds the tokens in the settings as tokens that are never split, with new ids if needed."""
    listed = settings.get("added_tokens_decoder")
    special = {spelling(value) for key, value in settings.items() if key.endswith("_token")}
    if listed is None:
        file = folder / "added_tokens.json"
        with _parsing(file):
            listed = {int(index): token for token, index in _json(file).items()}
        special |= {
            spelling(value) for value in _extra_tokens(settings.get("extra_special_tokens"))
        }
    # tokens with a description of their own, then those that are only named
    described = {}
    for _, value in sorted(listed.items(), key=lambda item: int(item[0])):
        text = spelling(value)
        is_special = text in special or (isinstance(value, dict) and value.get("special", False))
        described[text] = _added_token(value, is_special)
    described |= {token.content: token for token in (pieces.added if pieces else [])}
    known = {*described, *(token.content for token in core.get_added_tokens_decoder().values())}
    named = [token for text, token in _named_tokens(settings).items() if text not in known]
    core.add_tokens([*described.values(), *named])


def _extra_tokens(tokens: dict[str, Any] | list | None) -> list:
    return list(tokens.values() if isinstance(tokens, dict) else tokens or [])


def _named_tokens(settings: Settings) -> dict[str, AddedToken]:
    """Special tokens by their spelling, in the order of new ids: first those with a role."""
    further = [key for key in settings if key.endswith("_token") and key not in ROLES]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    values = [*(settings.get(key) for key in (*ROLES, *further)), *_extra_tokens(extra)]
    return {
        spelling(value): _added_token(value, True)
        for value in values
        if value and isinstance(value, str | dict)
    }


# templates ----------------------------------------------------------------------------------------


def bos_eos_template(core: Core, settings: Settings) -> processors.TemplateProcessing:
    """The template of `add_bos_token` and `add_eos_token`."""
    bos, eos = (
        [spelling(settings[f"{name}_token"])]
        if settings.get(f"add_{name}_token") and settings.get(f"{name}_token")
        else []
        for name in ("bos", "eos")
    )
    first, second = (
        " ".join(f"{item}:{i}" for item in (*bos, text, *eos))
        for i, text in enumerate(("$A", "$B"))
    )
    return _template(core, first, f"{first} {second}", *bos, *eos)


def _template(core: Core, single: str, pair: str, *special: str) -> processors.TemplateProcessing:
    ids = [(token, core.token_to_id(token)) for token in dict.fromkeys(special)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _roberta_template(core: Core, settings: Settings) -> processors.RobertaProcessing:
    sep, cls = (spelling(settings[role]) for role in ("sep_token", "cls_token"))
    return processors.RobertaProcessing(
        (sep, core.token_to_id(sep)),  # type: ignore[arg-type]  # both are in the vocabulary
        (cls, core.token_to_id(cls)),  # type: ignore[arg-type]
        settings.get("trim_offsets", True),
        bool(settings.get("add_prefix_space")),
    )


def _bert_template(core: Core, settings: Settings) -> processors.TemplateProcessing:
    cls, sep = (spelling(settings[role]) for role in ("cls_token", "sep_token"))
    return _template(core, f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", cls, sep)


def _t5_template(core: Core, settings: Settings) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=["$A", "</s>"],
        pair=["$A", "</s>", "$B", "</s>"],
        special_tokens=[("</s>", core.token_to_id(spelling(settings["eos_token"])))],
    )


# normalizers, pre-tokenizers and decoders of each class -------------------------------------------


def byte_level_splitter(pattern: str, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    """Splits text by a pattern, "" for GPT-2's, into bytes; `prefix` puts a space in front."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not pattern)
    if not pattern:
        return byte_level
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def _gpt2(core: Core, settings: Settings, pieces: Pieces) -> None:
    core.normalizer, core.decoder = None, decoders.ByteLevel()
    prefix = bool(settings.get("add_prefix_space"))
    core.pre_tokenizer = byte_level_splitter("", prefix)


def _gpt_neox(core: Core, settings: Settings, pieces: Pieces) -> None:
    _gpt2(core, settings, pieces)
    core.normalizer = normalizers.NFC()


def _qwen2(core: Core, settings: Settings, pieces: Pieces) -> None:
    core.normalizer, core.decoder = normalizers.NFC(), decoders.ByteLevel()
    prefix = bool(settings.get("add_prefix_space"))
    core.pre_tokenizer = byte_level_splitter(QWEN2_PATTERN, prefix)


def _bert(core: Core, settings: Settings, pieces: Pieces) -> None:
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")


def _t5(core: Core, settings: Settings, pieces: Pieces) -> None:
    charsmap = pieces.charsmap if pieces else _charsmap(core)
    core.normalizer = normalizers.Precompiled(charsmap) if charsmap else None
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
        ]
    )
    core.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)


def _charsmap(core: Core) -> bytes:
    """SentencePiece's character table in a tokenizer.json; T5's class keeps no other step."""
    normalizer = json.loads(core.to_str())["normalizer"] or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


def _t5_pieces(pieces: SentencePieceModel, settings: Settings) -> Core:
    vocabulary = [(piece.text, piece.score) for piece in pieces.pieces]
    vocabulary += [(token, 0.0) for token in _sentinels(settings)]
    return Core(models.Unigram(vocabulary, 2, False))


def _t5_settings(settings: Settings) -> Settings:
    if settings.get("extra_special_tokens") or settings.get("additional_special_tokens"):
        return settings
    return {**settings, "extra_special_tokens": _sentinels(settings)[::-1]}


def _sentinels(settings: Settings) -> list[str]:
    """T5's <extra_id_99> … <extra_id_0>, the last tokens of its vocabulary."""
    count = settings.get("extra_ids")
    count = 100 if count is None else count
    if not isinstance(count, int) or not 0 <= count <= MOST_SENTINELS:
        raise UserError(
            f"extra_ids: {count!r} is not a whole number from 0 to {MOST_SENTINELS}",
            where="tokenizer_config.json",
        )
    return [f"<extra_id_{i}>" for i in reversed(range(count))]


def _llama(core: Core, settings: Settings, pieces: Pieces) -> None:
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme=scheme, split=False
    )
    steps: list = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    core.decoder = decoders.Sequence(steps)


def _code_llama(core: Core, settings: Settings, pieces: Pieces) -> None:
    _llama(core, {**settings, "legacy": False}, pieces)


def _llama_pieces(pieces: SentencePieceModel, settings: Settings) -> Core:
    return Core(sentencepiece.bpe(pieces, byte_fallback=True))


def _code_llama_pieces(pieces: SentencePieceModel, settings: Settings) -> Core:
    unknown = spelling(settings["unk_token"])
    return Core(sentencepiece.bpe(pieces, byte_fallback=True, unk_token=unknown))


_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE_LLAMA_TOKENS = {
    **_LLAMA_TOKENS,
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_ROBERTA_TOKENS = {
    **_LLAMA_TOKENS,
    "sep_token": "</s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
_QWEN2_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), END_OF_TEXT)
_T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_NEOX_TOKENS = {**_GPT2_TOKENS, "pad_token": "<|padding|>"}
TOKENIZER_CLASSES = {
    "GPT2Tokenizer": TokenizerClass(BPE_FILES, _GPT2_TOKENS, _gpt2),
    "GPTNeoXTokenizer": TokenizerClass(BPE_FILES, _NEOX_TOKENS, _gpt_neox, bos_eos_template),
    "Qwen2Tokenizer": TokenizerClass(BPE_FILES, _QWEN2_TOKENS, _qwen2),
    "RobertaTokenizer": TokenizerClass(BPE_FILES, _ROBERTA_TOKENS, _gpt2, _roberta_template),
    "BertTokenizer": TokenizerClass(("vocab.txt",), _BERT_TOKENS, _bert, _bert_template),
    "DistilBertTokenizer": TokenizerClass(("vocab.txt",), _BERT_TOKENS, _bert, _bert_template),
    "T5Tokenizer": TokenizerClass(
        ("spiece.model",), _T5_TOKENS, _t5, _t5_template, _t5_pieces, _t5_settings
    ),
    "LlamaTokenizer": TokenizerClass(
        ("tokenizer.model",), _LLAMA_TOKENS, _llama, from_pieces=_llama_pieces
    ),
    "CodeLlamaTokenizer": TokenizerClass(
        ("tokenizer.model",),
        _CODE_LLAMA_TOKENS,
        _code_llama,
        from_pieces=_code_llama_pieces,
        fill_in=lambda settings: {"add_bos_token": True, **settings},
    ),
}
KNOWN_CLASSES = (*TOKENIZER_CLASSES, MARIAN_CLASS)
