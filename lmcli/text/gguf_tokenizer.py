"""The tokenizer of a GGUF file: its metadata (keys `tokenizer.*`) ↔ a Tokenizer.

llama.cpp has two kinds that decoders use. "gpt2" is byte-level BPE, where a name stands for the
pattern that splits text. "llama" is SentencePiece's BPE, which joins the two pieces whose join has
the highest score.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, decoders, models, normalizers

from lmcli.errors import UserError
from lmcli.text.chat_template import spelling
from lmcli.text.huggingface import (
    GENERIC_CLASS,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    Core,
    bos_eos_template,
    byte_level_splitter,
)
from lmcli.text.library_errors import library_errors
from lmcli.text.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    MarianSide,
    bpe_merges,
)

KEY = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
BYTE_LEVEL_KIND, SENTENCEPIECE_KIND = "gpt2", "llama"


class PreTokenizer(NamedTuple):
    """A pattern that llama.cpp knows by names, the first of which is written.

    Without a `pattern` it is GPT-2's. With `ignore_merges` a whole word of the vocabulary is one
    token, whatever its merges; `bos` tells if a text begins with the BOS token unless a key says.
    """

    names: tuple[str, ...]
    pattern: str = ""
    ignore_merges: bool = False
    bos: bool = False


PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "a.x-4.0", "gigachat")),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"), QWEN2_PATTERN
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        LLAMA3_PATTERN,
        ignore_merges=True,
        bos=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx"), LLAMA3_PATTERN),
)
ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "mask_token": "mask_token_id",
}
PADDING_TOKEN = re.compile(r"\[PAD\d+\]")  # a row of the embedding that is no token
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _refused(what: str) -> UserError:
    return UserError(
        f"llama.cpp cannot express this tokenizer: {what}",
        where="tokenizer.json",
        hint="llama.cpp knows byte-level BPE with the patterns of "
        f"{', '.join(pattern.names[0] for pattern in PRE_TOKENIZERS)}, and SentencePiece's BPE",
    )


# writing ------------------------------------------------------------------------------------------


def to_metadata(
    core: Core | MarianSide,
    settings: Mapping[str, Any],
    template: tuple[list[int], list[int]],
    rows: int,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    """Keys of a GGUF file and their values, for a model whose embedding has `rows` rows.

    `template` are the ids before and after a text. `stop_ids` end one, the first in place of the
    tokenizer's own. Raises UserError for a tokenizer that llama.cpp does not have.
    """
    definition = json.loads(core.to_str())
    model = definition.get("model", {})
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type', 'of Marian')}")
    # all tokens and their types
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, index in core.get_vocab(with_added_tokens=True).items():
        tokens[index], types[index] = text, NORMAL
    for token in definition["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(f"{token['content']} takes in the spaces next to it")
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if len({*tokens}) < rows:
        raise _refused("two tokens have one spelling")
    # how a text is split
    if (definition["decoder"] or {}).get("type") == "ByteLevel":
        metadata = _byte_level(definition)
    else:
        metadata = _sentencepiece(definition, tokens, types)
    metadata |= {f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    # special tokens, and which of them the template adds
    ids = {role: _id(core, settings.get(role)) for role in ROLE_KEYS}
    ids["eos_token"] = stop_ids[0] if stop_ids else ids["eos_token"]
    if ids["eos_token"] is None:
        raise _refused("no token ends a text")
    for name, put in zip(("bos", "eos"), template):
        if put and ids[f"{name}_token"] is None:
            ids[f"{name}_token"] = put[0]
        if put not in ([], [ids[f"{name}_token"]]):
            raise _refused(f"its template puts the ids {put} at an end of a text")
        metadata[f"{KEY}add_{name}_token"] = bool(put)
    metadata |= {f"{KEY}{ROLE_KEYS[role]}": i for role, i in ids.items() if i is not None}
    if len(stop_ids) > 1:
        metadata[f"{KEY}eot_token_id"] = stop_ids[1]
    chat = settings.get("chat_template")
    if isinstance(chat, list):  # of named ones
        chat = next((entry["template"] for entry in chat if entry["name"] == "default"), None)
    if isinstance(chat, str):
        metadata[CHAT_TEMPLATE] = chat
    return metadata


def _id(core: Core | MarianSide, token: Any) -> int | None:
    """The id of a special token in the settings."""
    text = spelling(token)
    return core.token_to_id(text) if isinstance(text, str) else None


def _byte_level(definition: dict[str, Any]) -> dict[str, Any]:
    model, normalizer = definition["model"], definition["normalizer"] or {"type": "NFC"}
    if normalizer["type"] != "NFC":
        raise _refused(f"it normalizes text by {normalizer['type']}")
    splitter = definition["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("it puts a space in front of a text")
    pattern = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        pattern = ""
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
    ignores = bool(model.get("ignore_merges"))
    for known in PRE_TOKENIZERS:
        if (known.pattern, known.ignore_merges) == (pattern, ignores):
            return {
                f"{KEY}model": BYTE_LEVEL_KIND,
                f"{KEY}pre": known.names[0],
                f"{KEY}merges": [" ".join(pair) for pair in model["merges"]],
            }
    raise _refused(f"it splits text by {pattern or kinds}, ignore_merges is {ignores}")


def _sentencepiece(
    definition: dict[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Also sets the types of byte pieces and of the unknown token."""
    model = definition["model"]
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and BYTE_PIECE.fullmatch(token):
            types[i] = BYTE
    if not model["byte_fallback"] or types.count(BYTE) < 256:
        raise _refused("it has no piece for each byte")
    # a piece's score stands for its place among the merges, which must be all that pieces allow
    pairs = [(left, right) for left, right in model["merges"]]
    joined = [left + right for left, right in pairs]
    order = {piece: -float(i) for i, piece in enumerate(dict.fromkeys(joined))}
    plain = [token for token, kind in zip(tokens, types) if kind == NORMAL]
    if {*pairs} != {*bpe_merges(plain, model["vocab"])}:
        raise _refused("its merges are not all that its pieces allow, as in SentencePiece")
    if sum(a != b for a, b in zip(joined, ["", *joined])) != len(order):
        raise _refused("its merges are not in the order of the pieces that they make")
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return {
        f"{KEY}model": SENTENCEPIECE_KIND,
        f"{KEY}pre": "default",
        f"{KEY}scores": [order.get(token, -float(len(tokens))) for token in tokens],
        f"{KEY}add_space_prefix": _has_space_prefix(definition),
    }


def _has_space_prefix(definition: dict[str, Any]) -> bool:
    """True if a space is put in front of a text; UserError for other steps than SentencePiece's."""
    normalizer, splitter = definition["normalizer"], definition["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prepends = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
    if splitter and splitter["type"] == "Metaspace" and not steps and not splitter.get("split"):
        return splitter["prepend_scheme"] != "never"
    # Gemma's splits at spaces, of which the normalizer leaves none
    at_spaces = (splitter or {}).get("pattern") == {"String": " "}
    if steps[prepends:] != [REPLACE_SPACES] or (splitter and not at_spaces):
        raise _refused("it splits text neither by bytes nor as SentencePiece does")
    return prepends


# reading ------------------------------------------------------------------------------------------


def from_metadata(metadata: Mapping[str, Any], where: str) -> tuple[Core, dict[str, Any]]:
    """The tokenizer of a GGUF file with this metadata, and its settings; `where` names the file.

    Raises UserError for a kind or a pattern that lm does not know, and for damaged values.
    """
    kind, tokens = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}tokens")
    if not _all(str, tokens) or not tokens:
        raise UserError("has no list of tokens", where=where)
    size = len(tokens)
    types = metadata.get(f"{KEY}token_type", [NORMAL] * size)
    if not _all(int, types) or len(types) != size:
        raise UserError("its token types are not one number a token", where=where)
    used = [i for i in range(size) if types[i] != UNUSED or not PADDING_TOKEN.fullmatch(tokens[i])]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) < len(used):
        raise UserError("two tokens have one spelling", where=where)
    if kind not in (BYTE_LEVEL_KIND, SENTENCEPIECE_KIND):
        raise UserError(
            f"tokenizer {kind!r} is not supported",
            where=where,
            hint=f"supported: {BYTE_LEVEL_KIND}, {SENTENCEPIECE_KIND}",
        )
    settings = _settings(metadata, tokens, where)
    with library_errors("its tokenizer is damaged", where):
        build = _byte_level_core if kind == BYTE_LEVEL_KIND else _sentencepiece_core
        core, bos = build(metadata, vocabulary, settings, where)
        core.add_tokens(
            [
                AddedToken(tokens[i], special=types[i] != USER_DEFINED, normalized=False)
                for i in used
                if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
            ]
        )
        for role, default in (("bos", bos), ("eos", False)):
            settings[f"add_{role}_token"] = bool(metadata.get(f"{KEY}add_{role}_token", default))
        core.post_processor = bos_eos_template(core, settings)
    return core, settings


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text."""
    ids = (metadata.get(f"{KEY}{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _settings(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": GENERIC_CLASS}
    for role, key in ROLE_KEYS.items():
        index = metadata.get(f"{KEY}{key}")
        if index is None or index == 0xFFFF_FFFF:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(f"{KEY}{key} {index!r} is the id of no token", where=where)
        settings[role] = tokens[index]
    if isinstance(template := metadata.get(CHAT_TEMPLATE), str):
        settings["chat_template"] = template
    return {**settings, "clean_up_tokenization_spaces": False}


def _byte_level_core(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], settings: dict[str, Any], where: str
) -> tuple[Core, bool]:
    name = metadata.get(f"{KEY}pre")
    merges: Any = metadata.get(f"{KEY}merges")
    known = next((pattern for pattern in PRE_TOKENIZERS if name in pattern.names), None)
    if known is None:
        names = sorted(name for pattern in PRE_TOKENIZERS for name in pattern.names)
        raise UserError(
            f"pre-tokenizer {name!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(names)}",
        )
    if not _all(str, merges):
        raise UserError("has no list of merges", where=where)
    pairs = [(left, right) for left, _, right in (_split_merge(merge) for merge in merges)]
    core = Core(models.BPE(vocabulary, pairs, ignore_merges=known.ignore_merges))
    core.pre_tokenizer = byte_level_splitter(known.pattern)
    core.decoder = decoders.ByteLevel()
    return core, known.bos


def _split_merge(merge: str) -> tuple[str, str, str]:
    """The two parts of "a b", as llama.cpp splits: at the first space behind a character."""
    left, space, right = merge[1:].partition(" ")
    return merge[:1] + left, space, right


def _sentencepiece_core(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], settings: dict[str, Any], where: str
) -> tuple[Core, bool]:
    scores: Any = metadata.get(f"{KEY}scores")
    if not _all(float, scores) or len(scores) < len(vocabulary):
        raise UserError("its scores are not one number a token", where=where)
    by_score: Iterable[str] = sorted(vocabulary, key=lambda text: -scores[vocabulary[text]])
    unknown = settings.get("unk_token")
    core = Core(
        models.BPE(
            vocabulary,
            bpe_merges(by_score, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get(f"{KEY}add_space_prefix", True))
    steps: list = [normalizers.Prepend(SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core, True
