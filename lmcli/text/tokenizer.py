"""The tokenizer of a model folder: learnt as byte-level BPE, or read from any Hugging Face `tokenizer.json`.

Encoding is the `tokenizers` library's; here stand the special tokens, byte offsets and decoding as a stream.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.storage import user_errors, write_text
from lmcli.text.documents import SAFE_CUT

END_OF_TEXT = "<|endoftext|>"
OPEN = "\ufffd"  # how a decoder shows bytes that are no whole character
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Encoded(NamedTuple):
    """Token ids of one text, and for each the bytes of the text it stands for: `ends[i]` is where token i ends."""

    ids: list[int]
    ends: list[int]


class Tokenizer:
    """Text ↔ ids. `encode` adds no special tokens; `prefix` and `suffix` are those that the template puts around a text."""

    def __init__(self, core: tokenizers.Tokenizer, settings: dict | None = None):
        core.no_padding()
        core.no_truncation()
        self.core, self.settings = core, settings or {}
        self.size = core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the template's special tokens. Special tokens spelled out in it keep their own id."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [found.ids for found in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_ends(self, texts: list[str]) -> list[Encoded]:
        """Ids with byte offsets. Tokens that share a character share out its bytes, so the last end is the byte count."""
        return [Encoded(found.ids, self._ends(text, found))
                for text, found in zip(texts, self.core.encode_batch(texts, add_special_tokens=False))]

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Text of ids; `special=False` leaves special tokens out."""
        return self.core.decode(ids, skip_special_tokens=not special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return [self.core.id_to_token(index) or "" for index in ids]

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self.core.token_to_id(token)

    @cached_property
    def prefix(self) -> list[int]:
        """Ids that the template puts before a text: the beginning token, if there is one."""
        return self._template[0]

    @cached_property
    def suffix(self) -> list[int]:
        """Ids that the template puts after a text."""
        return self._template[1]

    @cached_property
    def _template(self) -> tuple[list[int], list[int]]:
        plain = self.core.encode("a", add_special_tokens=False).ids
        full = self.core.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(full)) if full[i:i + len(plain)] == plain), 0)
        prefix, suffix = full[:at], full[at + len(plain):]
        beginning = self.special("bos_token")
        if not prefix and self.settings.get("add_bos_token") and beginning is not None:
            prefix = [beginning]
        return prefix, suffix

    def special(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token` … as `tokenizer_config.json` names it, or None."""
        value = self.settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self.id(text) if isinstance(text, str) else None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    @cached_property
    def _definition(self) -> dict:
        return json.loads(self.core.to_str())

    @cached_property
    def cuts_at_words(self) -> bool:
        """Whether text cut at documents.SAFE_CUT gives the same ids as text in one go (GPT-2's and Qwen2's patterns)."""
        if self._definition["normalizer"] is not None or self._definition["truncation"]:
            return False
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] or any(map(str.isspace, token["content"]))
               or SAFE_CUT.search(token["content"]) for token in self._definition["added_tokens"]):
            return False  # such a token may reach, or look, across a cut
        splitter = self._definition["pre_tokenizer"] or {}
        parts = splitter.get("pretokenizers", [splitter])
        kinds = [part.get("type") for part in parts]
        if any(part.get("add_prefix_space") for part in parts):
            return False
        if kinds == ["ByteLevel"]:
            return parts[0].get("use_regex", True)
        return kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == QWEN2_PATTERN

    @cached_property
    def _byte_lengths(self) -> list[int] | None:
        """Bytes of each token, for byte-level vocabularies, whose tokens spell one character a byte."""
        if (self._definition["decoder"] or {}).get("type") != "ByteLevel" or self._definition["normalizer"]:
            return None
        added = {token["id"]: len(token["content"].encode()) for token in self._definition["added_tokens"]}
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            lengths[index] = added.get(index, len(token))
        return lengths

    def _ends(self, text: str, found: tokenizers.Encoding) -> list[int]:
        size = len(text.encode("utf-8"))
        if self._byte_lengths is not None:
            ends, end = [], 0
            for index in found.ids:
                end += self._byte_lengths[index]
                ends.append(end)
            if end == size:
                return ends
        return _ends_from_characters(text, found.offsets, size)

    def save(self, folder: Path, context: int | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, with a model's `context` if it is to serve one."""
        write_text(folder / "tokenizer.json", self.core.to_str(pretty=True))
        settings = {**self.settings, **({"model_max_length": context} if context else {})}
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def byte_offsets(text: str) -> Sequence[int]:
    """For each character of a text, and for its end, the UTF-8 bytes before it. byte_offsets("aé!") == [0, 1, 3, 4]."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode("utf-8")) for character in text)]


def _ends_from_characters(text: str, spans: list[tuple[int, int]], size: int) -> list[int]:
    """Byte ends of tokens given as character spans; what lies between two spans goes to the token after it.

    Several tokens on one character (byte fallback) get a byte each, the last one the rest.
    """
    byte_at, ends, last = byte_offsets(text), [], 0
    for i, (start, end) in enumerate(spans):
        shared = i + 1 < len(spans) and spans[i + 1] == (start, end)
        last = min(max(last, byte_at[start]) + 1, byte_at[end]) if shared else max(last, byte_at[end])
        ends.append(last)
    if ends:
        ends[-1] = size
    return ends


def learn(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `config.vocab_size` ids, learnt from a stream.

    Any text round-trips, since all 256 bytes are in the vocabulary. `<|endoftext|>` is id 0, and the template puts it
    in front. Text too small for the vocabulary gives a smaller one: see the result's `size`.
    """
    core = tokenizers.Tokenizer(models.BPE())
    if config.pattern == "gpt2":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1", special_tokens=[(END_OF_TEXT, 0)])
    return Tokenizer(core, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False})


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (`tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`) or of a `tokenizer.json`.

    Raises UserError when there is none or it cannot be read.
    """
    path = Path(path)
    with user_errors(path, "read"):  # a name too long
        file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        core = _read(file, lambda: tokenizers.Tokenizer.from_file(str(file)))
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        core = _gpt2(path)
    elif not path.exists():
        raise UserError("no such folder", where=str(path), hint="-m takes a model folder or a tokenizer.json")
    else:
        raise UserError("holds no tokenizer", where=str(path),
                        hint="a folder needs tokenizer.json, or vocab.json and merges.txt")
    return Tokenizer(core, _settings(file.parent, core))


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    def build() -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        if core.token_to_id(END_OF_TEXT) is not None:
            core.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        return core
    return _read(folder / "vocab.json", build)


def _read(file: Path, build) -> tokenizers.Tokenizer:
    try:
        return build()
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise UserError(f"is no tokenizer: {error}", where=str(file)) from error


def _settings(folder: Path, core: tokenizers.Tokenizer) -> dict:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        known = core.token_to_id(END_OF_TEXT) is not None
        return {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": END_OF_TEXT} if known else {})}
    with user_errors(file, "read"):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(settings, dict):
        raise UserError("is not a JSON object", where=str(file))
    return settings


class StreamDecoder:
    """Text of tokens as they come, never half a character: `push` returns what has become certain.

    Bytes that never become a character are left out, and with them U+FFFD, which stands for nothing else.
    `ids` is what stands before the stream (the prompt). Decoding looks at a few earlier ids as well, since some
    tokenizers write a space only between words.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self._start = tokenizer, ids[-8:], 0
        while self.ids and self._decoded().startswith(OPEN):  # the last eight may begin inside a character
            del self.ids[0]
        self._whole = len(self.ids)  # decoding starts at `_start`; up to here every character is whole
        self._given = len(self._decoded())

    def push(self, index: int) -> str:
        """The text that this token completes: "" while a character is still open."""
        self.ids.append(index)
        text = self._decoded()
        if text.endswith(OPEN):  # half a character: one OPEN or, by byte fallback, one for each byte of its run
            start, self._given = self._given, max(self._given, len(text.rstrip(OPEN)))
            return text[start:self._given].replace(OPEN, "")
        new = text[self._given:]
        self._start, self._whole = self._whole, len(self.ids)
        self._given = len(self._decoded())
        return new.replace(OPEN, "")

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.ids[self._start:], special=False)
