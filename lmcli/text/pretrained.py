"""Tokenizers as others' folders hold them: `tokenizer.json`, `vocab.txt`, `vocab.json` + `merges.txt`, SentencePiece.

A folder names a tokenizer class (or a model type, which implies one), and that class decides more than the files say:
how text is normalized and split, which tokens are special, what the template is. `FAMILIES` holds those decisions, as
`AutoTokenizer` of transformers 5 takes them; a class that is not listed leaves the files as they are.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lmcli.errors import UserError
from lmcli.storage import read_json, user_errors
from lmcli.text import sentencepiece
from lmcli.text.sentencepiece import MarianSide, Proto

QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
END_OF_TEXT = "<|endoftext|>"
MARIAN = "MarianTokenizer"
PLAIN = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it is
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OF_MODEL_TYPE = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "mistral": PLAIN,
                 "gpt_neox": "GPTNeoXTokenizer", "bert": "BertTokenizer", "distilbert": "BertTokenizer",
                 "roberta": "RobertaTokenizer", "bart": "RobertaTokenizer", "t5": "T5Tokenizer", "marian": MARIAN}
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
HINT = ("a folder needs tokenizer.json, vocab.txt, vocab.json and merges.txt, spiece.model, tokenizer.model, or Marian's "
        "source.spm, target.spm and vocab.json")


class Found(NamedTuple):
    """A folder's tokenizer: its core, that of the target language if it has its own, settings, and files to keep."""

    core: tokenizers.Tokenizer | MarianSide
    settings: dict[str, Any]
    target: MarianSide | None
    files: dict[str, bytes]


class Family(NamedTuple):
    """What a tokenizer class decides: its special tokens, and the parts around the vocabulary."""

    special: dict[str, str]
    dress: Callable[[tokenizers.Tokenizer, dict[str, Any], Proto | None], None]
    template: Callable[[tokenizers.Tokenizer, dict[str, Any]], Any] | None = None


def read(path: Path) -> Found:
    """The tokenizer of a folder, or of a tokenizer.json and what lies beside it.

    Raises UserError when there is none, or naming the file that cannot be read.
    """
    folder, saved = (path.parent, path) if path.is_file() else (path, path / "tokenizer.json")
    config, settings = _json(folder / "config.json"), settings_of(folder)
    name = class_name(config.get("model_type"), settings.get("tokenizer_class") or config.get("tokenizer_class"), saved)
    if name not in FAMILIES and not saved.is_file():
        name = _class_by_files(folder) or name
    if name == MARIAN and not path.is_file() and (folder / "source.spm").is_file():
        return _marian(folder, settings)
    family = FAMILIES.get(name or "")
    settings = {**(family.special if family else {}), **settings, "tokenizer_class": name if family else PLAIN}
    if name == "T5Tokenizer" and not (settings.get("extra_special_tokens") or settings.get("additional_special_tokens")):
        settings["extra_special_tokens"] = [token for token, _ in reversed(_sentinels(settings))]
    core, proto = _core(folder, saved, settings, name)
    if proto and not family:
        settings = {**proto.names, **settings}
    elif not (config or settings_of(folder)) and core.token_to_id(END_OF_TEXT) is not None:  # nothing names an end
        settings.setdefault("eos_token", END_OF_TEXT)
    where = folder / "tokenizer_config.json"
    _parsed(where if where.is_file() else saved, lambda: _dress(core, settings, saved, family, proto))
    return Found(core, settings, None, {})


def _dress(core: tokenizers.Tokenizer, settings: dict[str, Any], saved: Path, family: Family | None,
           proto: Proto | None) -> None:
    """Puts around a vocabulary what its class and settings say. A tokenizer.json says itself what to put in front."""
    if saved.is_file():
        settings = {key: value for key, value in settings.items() if key not in ("add_bos_token", "add_eos_token")}
    if family:
        family.dress(core, settings, proto)
    _add_special_tokens(core, settings, saved.parent, proto)
    if family and family.template:
        core.post_processor = family.template(core, settings)
    elif not saved.is_file():
        core.post_processor = _bos_eos(core, settings)


def class_name(model_type: str | None, declared: str | None, saved: Path) -> str | None:
    """The class that AutoTokenizer takes, by its name without "Fast"; None where nothing names one."""
    registered = OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    short = declared.removesuffix("Fast").replace("BartTokenizer", "RobertaTokenizer") if isinstance(declared, str) else None
    if short == "LlamaTokenizer" and saved.is_file() and _byte_level(saved):
        return PLAIN  # Llama 3, declared as if it were Llama 2
    if short is None or short == registered:
        return registered
    if registered == PLAIN or model_type == "qwen2":
        return registered
    return short if short in FAMILIES or short == MARIAN else PLAIN


def _byte_level(file: Path) -> bool:
    with user_errors(file, "read"):
        return b'"ByteLevel"' in file.read_bytes()


def _class_by_files(folder: Path) -> str | None:
    if (folder / "tokenizer.json").is_file():
        return None
    return next((name for file, name in (("vocab.txt", "BertTokenizer"), ("merges.txt", "GPT2Tokenizer"),
                 ("spiece.model", "T5Tokenizer"), ("source.spm", MARIAN)) if (folder / file).is_file()), None)


def settings_of(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, and what an older folder says of special tokens in `special_tokens_map.json`."""
    settings = _json(folder / "tokenizer_config.json")
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" not in settings:
        settings |= _json(folder / "special_tokens_map.json")
    return {key: {**value, "__type": "AddedToken"} if key.endswith("_token") and isinstance(value, dict) else value
            for key, value in settings.items()}  # transformers takes no such object without its type


def _json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one when there is no file."""
    return read_json(file) if file.is_file() else {}


def _parsed(file: Path, build: Callable[[], Any]) -> Any:
    with user_errors(file, "read"):
        try:
            return build()
        except (OSError, UserError):
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise UserError(f"is no tokenizer: {error}", where=str(file)) from error


def _core(folder: Path, saved: Path, settings: dict[str, Any],
          name: str | None) -> tuple[tokenizers.Tokenizer, Proto | None]:
    """The vocabulary with what its files say, and the SentencePiece file if it came from one."""
    if saved.is_file():
        return _parsed(saved, lambda: tokenizers.Tokenizer.from_file(str(saved))), None
    merges = folder / "merges.txt"
    if (file := folder / "vocab.txt").is_file():
        return tokenizers.Tokenizer(_parsed(file, lambda: _wordpiece(file, settings))), None
    if (file := folder / "vocab.json").is_file() and merges.is_file():
        return tokenizers.Tokenizer(_parsed(file, lambda: models.BPE.from_file(str(file), str(merges)))), None
    for file in (folder / "spiece.model", folder / "tokenizer.model"):
        if file.is_file():
            proto = _parsed(file, lambda file=file: sentencepiece.parse(file.read_bytes()))
            return _parsed(file, lambda proto=proto: _from_pieces(proto, settings, name)), proto
    raise UserError("holds no tokenizer", where=str(folder), hint=HINT)


def _wordpiece(file: Path, settings: dict[str, Any]) -> models.WordPiece:
    vocabulary, unknown = models.WordPiece.read_file(str(file)), _content(settings["unk_token"])
    if unknown not in vocabulary:
        raise ValueError(f"it lacks {unknown}")
    return models.WordPiece(vocabulary, unk_token=unknown)


def _from_pieces(proto: Proto, settings: dict[str, Any], name: str | None) -> tokenizers.Tokenizer:
    if name == "T5Tokenizer":
        pieces = [(piece.text, piece.score) for piece in proto.pieces]
        return tokenizers.Tokenizer(models.Unigram(pieces + _sentinels(settings), 2, False))
    if name == "LlamaTokenizer":
        return tokenizers.Tokenizer(sentencepiece.bpe(proto, byte_fallback=True))
    return sentencepiece.plain(proto)


def _sentinels(settings: dict[str, Any]) -> list[tuple[str, float]]:
    """T5's <extra_id_99> … <extra_id_0>, which close its vocabulary."""
    count = settings.get("extra_ids", 100)
    return [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count if isinstance(count, int) else 100))]


def _marian(folder: Path, settings: dict[str, Any]) -> Found:
    settings = {**{"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}, **settings}
    if settings.get("separate_vocabs"):
        raise UserError("has a vocabulary for each language, which lm does not read yet", where=str(folder))
    files = {}
    for name in MARIAN_FILES:
        with user_errors(folder / name, "read"):
            files[name] = (folder / name).read_bytes()
    special = {name: _content(settings[name]) for name in NAMES if settings.get(name)}
    source, target = (
        _parsed(folder / name, lambda name=name: sentencepiece.parse(files[name])) for name in MARIAN_FILES[:2])
    ids = _json(folder / "vocab.json")
    sides = [_parsed(folder / "vocab.json", lambda proto=proto: MarianSide(proto, ids, special))
             for proto in (source, target)]
    return Found(sides[0], {**settings, "tokenizer_class": MARIAN}, sides[1], files)


def _content(token: Any) -> str:
    """The spelling of a special token, which settings give as a string or as an object."""
    return token.get("content", "") if isinstance(token, dict) else token


def _token(value: str | dict[str, Any], special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    known = {key: value[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in value}
    return AddedToken(value["content"], special=special, **known)


def _add_special_tokens(core: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path, proto: Proto | None) -> None:
    """Makes whatever the settings name a token that no text is cut through, with a new id if the vocabulary lacks it."""
    named, listed = _named(settings), settings.get("added_tokens_decoder")
    special = {_content(value) for key, value in settings.items() if key.endswith("_token")}
    if listed is None:
        file = folder / "added_tokens.json"
        ids = _json(file)
        listed = _parsed(file, lambda: {int(index): token for token, index in ids.items()})
        special |= {_content(value) for value in _extra(settings.get("extra_special_tokens"))}
    described = {}
    for _, value in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _content(value)
        described[text] = _token(value, text in special or (isinstance(value, dict) and value.get("special", False)))
    described |= {token.content: token for token in (proto.added if proto else [])}
    there = {token.content for token in core.get_added_tokens_decoder().values()}
    missing = [token for text, token in named.items() if text not in described and text not in there]
    core.add_tokens([*described.values(), *missing])


def _extra(tokens: dict[str, Any] | list | None) -> list:
    return list(tokens.values() if isinstance(tokens, dict) else tokens or [])


def _named(settings: dict[str, Any]) -> dict[str, AddedToken]:
    """Special tokens by their spelling: those with a name of their own first, in the order that gives new ids."""
    further = [key for key, value in settings.items() if key.endswith("_token") and key not in NAMES and value]
    extra = _extra(settings.get("extra_special_tokens") or settings.get("additional_special_tokens"))
    values = [*(settings.get(key) for key in (*NAMES, *further)), *extra]
    return {_content(value): _token(value, True) for value in values if value and isinstance(value, str | dict)}


def _bos_eos(core: tokenizers.Tokenizer, settings: dict[str, Any]) -> processors.TemplateProcessing:
    """The template that `add_bos_token` and `add_eos_token` ask for where no tokenizer.json says one."""
    wanted = {name: _content(settings[f"{name}_token"]) for name in ("bos", "eos")
              if settings.get(f"add_{name}_token") and settings.get(f"{name}_token")}
    parts = [" ".join(filter(None, (wanted.get("bos") and f"{wanted['bos']}:{i}", f"${name}:{i}",
                                    wanted.get("eos") and f"{wanted['eos']}:{i}"))) for i, name in enumerate("AB")]
    return _template(core, parts[0], " ".join(parts), *wanted.values())


def _template(core: tokenizers.Tokenizer, single: str, pair: str, *special: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[
        (token, core.token_to_id(token)) for token in dict.fromkeys(special)])


def _gpt2(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    core.normalizer, core.decoder = None, decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))


def _gpt_neox(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    _gpt2(core, settings, proto)
    core.normalizer = normalizers.NFC()


def _qwen2(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    core.normalizer, core.decoder = normalizers.NFC(), decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=False)])


def _roberta_template(core: tokenizers.Tokenizer, settings: dict[str, Any]) -> processors.RobertaProcessing:
    sep, cls = (_content(settings[name]) for name in ("sep_token", "cls_token"))
    return processors.RobertaProcessing((sep, core.token_to_id(sep)), (cls, core.token_to_id(cls)),
                                        settings.get("trim_offsets", True), bool(settings.get("add_prefix_space")))


def _bert(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"), lowercase=settings.get("do_lower_case", True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")


def _bert_template(core: tokenizers.Tokenizer, settings: dict[str, Any]) -> processors.TemplateProcessing:
    cls, sep = (_content(settings[name]) for name in ("cls_token", "sep_token"))
    return _template(core, f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", cls, sep)


def _t5(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    spaces = {"replacement": sentencepiece.SPACE, "prepend_scheme": "always", "split": True}
    charsmap = proto.charsmap if proto else _charsmap(core)
    core.normalizer = normalizers.Precompiled(charsmap) if charsmap else None
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)])
    core.decoder = decoders.Metaspace(**spaces)


def _charsmap(core: tokenizers.Tokenizer) -> bytes:
    """SentencePiece's table of characters in a tokenizer.json: the one part of its normalizer that T5's class keeps."""
    found = json.loads(core.to_str())["normalizer"] or {}
    return next((base64.b64decode(part["precompiled_charsmap"]) for part in found.get("normalizers", [found])
                 if part.get("type") == "Precompiled"), b"")


def _t5_template(core: tokenizers.Tokenizer, settings: dict[str, Any]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[
        ("</s>", core.token_to_id(_content(settings["eos_token"])))])


def _llama(core: tokenizers.Tokenizer, settings: dict[str, Any], proto: Proto | None) -> None:
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=sentencepiece.SPACE, prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence([decoders.Replace(sentencepiece.SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                      *([decoders.Strip(content=" ", left=1)] if prefix else [])])


_ENDS = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
FAMILIES = {
    "GPT2Tokenizer": Family(_ENDS, _gpt2),
    "GPTNeoXTokenizer": Family({**_ENDS, "pad_token": "<|padding|>"}, _gpt_neox, _bos_eos),
    "Qwen2Tokenizer": Family({"unk_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, _qwen2),
    "RobertaTokenizer": Family({**_MARKS, "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>",
                                "mask_token": "<mask>"}, _gpt2, _roberta_template),
    "BertTokenizer": Family(_BERT, _bert, _bert_template),
    "DistilBertTokenizer": Family(_BERT, _bert, _bert_template),
    "T5Tokenizer": Family({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, _t5, _t5_template),
    "LlamaTokenizer": Family(_MARKS, _llama)}
