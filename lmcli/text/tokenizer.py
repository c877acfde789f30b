"""The tokenizer of a model folder: byte-level BPE learned here, or any kind that others use.

The `tokenizers` library encodes; this file adds templates, special tokens and byte offsets.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.storage import atomic_path, user_errors, write_text
from lmcli.text import huggingface
from lmcli.text.characters import byte_offsets
from lmcli.text.chat_template import spelling
from lmcli.text.gguf_header import is_gguf, read_header
from lmcli.text.gguf_tokenizer import from_metadata
from lmcli.text.huggingface import END_OF_TEXT, GENERIC_CLASS, LLAMA3_PATTERN, QWEN2_PATTERN
from lmcli.text.interruptible import run_in_thread
from lmcli.text.library_errors import library_errors
from lmcli.text.sentencepiece import SPACE, MarianSide, SideEncoding
from lmcli.text.splitting import PIECE_CHARS, SAFE_CUT, cut_position, in_batches, split_long_words

# what clean_up_tokenization_spaces replaces
CLEANED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
CANNOT_ENCODE = "the tokenizer cannot encode this text"
LONG_TEXT = 4 * PIECE_CHARS  # texts of more characters are encoded in pieces
ENCODED_AT_ONCE = 256 * PIECE_CHARS  # encoded by one call, in which no signal is handled
Encoding = tokenizers.Encoding | SideEncoding


class Encoded(NamedTuple):
    """Token ids of one text; `ends[i]` is the byte of the text at which token i ends."""

    ids: list[int]
    ends: list[int]


class TemplateItem(NamedTuple):
    """An item of a template: the text "A" or "B", or the ids of a special token; its token type."""

    content: str | list[int]
    type: int

    def ids(self, a: list[int], b: list[int]) -> list[int]:
        """The ids of this item in a template around two texts."""
        return {"A": a, "B": b}[self.content] if isinstance(self.content, str) else self.content


class Tokenizer:
    """Text ↔ ids. `encode` adds no special tokens; `prefix` and `suffix` are the template's.

    `target` tokenizes the target language: another tokenizer with the same ids in Marian's folders,
    else this one. `files` are a folder's files that cannot be regenerated: `save` writes them again
    instead of tokenizer.json.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer | MarianSide,
        settings: dict[str, Any] | None = None,
        target: "Tokenizer | None" = None,
        files: dict[str, bytes] | None = None,
    ):
        core.no_padding()
        core.no_truncation()
        self.core, self.settings, self.files = core, settings or {}, files or {}
        self.target = target or self

    @cached_property
    def size(self) -> int:
        """The largest id and one: the rows that an embedding needs, since ids may have gaps.

        Raises UserError if two tokens have one id.
        """
        ids = self.core.get_vocab(with_added_tokens=True).values()
        if len({*ids}) < len(ids):
            raise UserError("the tokenizer has one id for two tokens")
        return max(ids, default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the template. Special tokens in the text get their own ids."""
        with library_errors(CANNOT_ENCODE):
            return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        if any(len(text) > LONG_TEXT for text in texts):
            split = self._encode_pieces(texts, self._encode_ids)
            return [[index for ids in pieces for index in ids] for pieces in split]
        return self._encode_ids(texts)

    def encode_with_ends(self, texts: list[str]) -> list[Encoded]:
        """Ids with byte ends. Tokens of one character share its bytes; the last end is the size."""
        if any(len(text) > LONG_TEXT for text in texts):
            return [_concatenate(pieces) for pieces in self._encode_pieces(texts, self._encode)]
        return self._encode(texts)

    def _encode_ids(self, texts: list[str]) -> list[list[int]]:
        with library_errors(CANNOT_ENCODE):
            encodings = self.core.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _encode(self, texts: list[str]) -> list[Encoded]:
        with library_errors(CANNOT_ENCODE):
            encodings: Sequence[Encoding] = self.core.encode_batch(texts, add_special_tokens=False)
        return [
            Encoded(encoding.ids, self._ends(text, encoding))
            for text, encoding in zip(texts, encodings)
        ]

    def _encode_pieces(
        self, texts: list[str], encode: Callable[[list[str]], list]
    ) -> Iterator[list]:
        """The encoded pieces of each text, some at a time.

        The library's data about a token takes a hundred times the memory of its id.
        """
        split = [self._split(text) for text in texts]
        pieces = [piece for pieces in split for piece in pieces]
        encoded = (
            result for batch in in_batches(pieces, ENCODED_AT_ONCE, len) for result in encode(batch)
        )
        for own_pieces in split:
            yield list(islice(encoded, len(own_pieces)))

    def _split(self, text: str) -> list[str]:
        starts = [0]
        while self.split_safe and (cut := cut_position(text, starts[-1], PIECE_CHARS)):
            starts.append(cut)
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Text of ids, without special tokens if `special` is false, with spaces as in settings."""
        with library_errors("the tokenizer cannot decode these ids"):
            text = self.core.decode(ids, skip_special_tokens=not special)
        if isinstance(self.core, MarianSide):
            text = text.strip()
        if self.settings.get("clean_up_tokenization_spaces"):
            is_bpe = self._definition["model"].get("type") == "BPE"
            for spaced, plain in () if is_bpe else CLEANED:
                text = text.replace(spaced, plain)
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return [self.core.id_to_token(index) or "" for index in ids]

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each id alone. Bytes that are not a whole character show as U+FFFD."""
        return [self.token_text(i) for i in range(self.size)]

    def token_text(self, index: int) -> str:
        """The text of an id alone, special tokens included."""
        piece = self.core.id_to_token(index) or ""
        if SPACE in piece:
            return piece.replace(SPACE, " ")
        return self.core.decode([index], skip_special_tokens=False) or piece

    @cached_property
    def special_ids(self) -> set[int]:
        """The ids of special tokens."""
        if isinstance(self.core, MarianSide):
            return set(self.core.special)
        return {token["id"] for token in self._definition["added_tokens"] if token["special"]}

    @cached_property
    def word_starts(self) -> list[bool] | None:
        """For each id, true if a word before it has ended: it begins with a space, or is special.

        None for vocabularies without spaces (WordPiece).
        """
        if (self._definition["decoder"] or {}).get("type") == "WordPiece":
            return None
        special = self.special_ids
        return [i in special or text[:1].isspace() for i, text in enumerate(self.token_texts)]

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self.core.token_to_id(token)

    def special_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, `mask_token` …, or None if there is no such token."""
        text = spelling(self.settings.get(name))
        return self.id(text) if isinstance(text, str) else None

    @cached_property
    def prefix(self) -> list[int]:
        """Ids that the template puts before a text: the bos token, if there is one."""
        before = self._templates[0][: self._text_index]
        return [index for item in before for index in item.ids([], [])]

    @cached_property
    def suffix(self) -> list[int]:
        """Ids that the template puts after a text."""
        after = self._templates[0][self._text_index + 1 :]
        return [index for item in after for index in item.ids([], [])]

    @cached_property
    def _text_index(self) -> int:
        items = self._templates[0]
        return next((i for i, item in enumerate(items) if item.content == "A"), len(items))

    def with_template(
        self, ids: list[int], pair_ids: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, token types) of one text or a pair of texts, with the template's special tokens."""
        all_ids: list[int] = []
        types: list[int] = []
        for item in self._templates[pair_ids is not None]:
            item_ids = item.ids(ids, pair_ids or [])
            all_ids += item_ids
            types += [item.type] * len(item_ids)
        return all_ids, types

    def second_start(self, first_size: int) -> int:
        """How many tokens precede the second text of a pair whose first text has `first_size`."""
        items = self._templates[1]
        before = items[: [item.content for item in items].index("B")]
        return sum(len(item.ids([0] * first_size, [])) for item in before)

    @cached_property
    def _templates(self) -> tuple[list[TemplateItem], list[TemplateItem]]:
        """The templates for one text and for a pair."""
        a, b = TemplateItem("A", 0), TemplateItem("B", 1)
        processor = self._definition["post_processor"] or {}
        for step in processor.get("processors", [processor]):
            if step.get("type") == "TemplateProcessing":
                return _template(step, "single"), _template(step, "pair")
            if step.get("type") in ("BertProcessing", "RobertaProcessing"):
                cls, sep = ([step[name][1]] for name in ("cls", "sep"))
                single = [TemplateItem(cls, 0), a, TemplateItem(sep, 0)]
                if step["type"] == "BertProcessing":
                    return single, [*single, b, TemplateItem(sep, 1)]
                separator = TemplateItem(sep, 0)
                return single, [*single, separator, TemplateItem("B", 0), separator]
        return [a], [a, b]

    @property
    def template_ids(self) -> list[int]:
        """All ids that the templates add to a text or a pair of texts."""
        items = (item for template in self._templates for item in template)
        return [index for item in items for index in item.ids([], [])]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    @cached_property
    def _definition(self) -> dict[str, Any]:
        return json.loads(self.core.to_str())

    @cached_property
    def split_safe(self) -> bool:
        """True if text split at SAFE_CUT encodes to the same ids as the whole text.

        It does with the patterns of GPT-2, Qwen2 and Llama 3. NFC composes nothing across such a
        cut; it leaves a letter there a letter, or one with a mark before a space.
        """
        normalizer = self._definition["normalizer"] or {"type": "NFC"}
        if normalizer["type"] != "NFC" or self._definition["truncation"]:
            return False
        # an added token may reach or look across a cut
        for token in self._definition["added_tokens"]:
            text = token["content"]
            strips = token["rstrip"] or (token["lstrip"] and text[:1] not in ("[", "<"))
            has_space = any(map(str.isspace, text))
            if strips or token["single_word"] or has_space or SAFE_CUT.search(text):
                return False
        splitter = self._definition["pre_tokenizer"] or {}
        steps = splitter.get("pretokenizers", [splitter])
        if any(step.get("add_prefix_space") for step in steps):
            return False
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return steps[0].get("use_regex", True)
        patterns = (QWEN2_PATTERN, LLAMA3_PATTERN)
        return kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in patterns

    @cached_property
    def _byte_lengths(self) -> list[int] | None:
        """Bytes of each token of a byte-level vocabulary, which spells each byte as a character."""
        is_byte_level = (self._definition["decoder"] or {}).get("type") == "ByteLevel"
        if not is_byte_level or self._definition["normalizer"]:
            return None
        added = {
            token["id"]: len(token["content"].encode())
            for token in self._definition["added_tokens"]
        }
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            lengths[index] = added.get(index, len(token))
        return lengths

    def count_bytes(self, ids: list[int]) -> int:
        """UTF-8 bytes of the text of these ids; a byte-level token may be part of a character."""
        lengths = self._byte_lengths
        if lengths is None:
            return len(self.decode(ids).encode("utf-8"))
        return sum(lengths[index] for index in ids)

    def _ends(self, text: str, encoding: Encoding) -> list[int]:
        size, lengths = len(text.encode("utf-8")), self._byte_lengths
        if lengths is not None:
            ends = list(accumulate(lengths[index] for index in encoding.ids))
            if (ends or [0])[-1] == size:
                return ends
        return _ends_from_offsets(text, encoding.offsets, size)

    def save(self, folder: Path, context: int | None = None) -> None:
        """Writes tokenizer.json (or Marian's files) and the settings, with a model's `context`."""
        for name, content in self.files.items():
            with atomic_path(folder / name) as unfinished:
                unfinished.write_bytes(content)
        if not self.files:
            write_text(folder / "tokenizer.json", self.core.to_str(pretty=True))
        settings = {**self.settings, **({"model_max_length": context} if context else {})}
        if isinstance(settings.get("chat_template"), str):  # as transformers does
            write_text(folder / "chat_template.jinja", settings.pop("chat_template"))
        document = json.dumps(settings, indent=2, ensure_ascii=False)
        write_text(folder / "tokenizer_config.json", f"{document}\n")


def _template(step: dict[str, Any], name: str) -> list[TemplateItem]:
    items = []
    for entry in step[name]:
        ((kind, fields),) = entry.items()
        is_text = kind == "Sequence"
        content = fields["id"] if is_text else step["special_tokens"][fields["id"]]["ids"]
        items.append(TemplateItem(content, fields["type_id"]))
    return items


def _concatenate(pieces: list[Encoded]) -> Encoded:
    ids: list[int] = []
    ends: list[int] = []
    for piece in pieces:
        start = ends[-1] if ends else 0
        ids += piece.ids
        ends += [start + end for end in piece.ends]
    return Encoded(ids, ends)


def _ends_from_offsets(text: str, offsets: list[tuple[int, int]], size: int) -> list[int]:
    """Byte ends of tokens from their characters; text between two tokens goes to the later one.

    Several tokens for one character (byte fallback) get a byte each, the last one the rest.
    """
    byte_at, ends, last = byte_offsets(text), [], 0
    for i, (start, end) in enumerate(offsets):
        if i + 1 < len(offsets) and offsets[i + 1] == (start, end):
            last = min(max(last, byte_at[start]) + 1, byte_at[end])
        else:
            last = max(last, byte_at[end])
        ends.append(last)
    if ends:
        ends[-1] = size
    return ends


def learn(
    texts: Iterable[str],
    config: TokenizerConfig,
    shape: str = "decoder",
    deadline: float | None = None,
) -> Tokenizer:
    """A byte-level BPE of at most `config.vocab_size` ids, learned from a stream of texts.

    (Sennrich et al. 2016; Radford et al. 2019.) The vocabulary has all 256 bytes, so any text can
    be encoded and decoded. The first ids are the special tokens of the model's shape:
    `<|endoftext|>` at the start for a decoder, `[CLS] … [SEP]` and a mask for an encoder, `… </s>`
    for an encoder–decoder. A small text gives a smaller vocabulary: see the result's `size`. Raises
    DeadlineExceeded unless it is learned by the `deadline` (of `time.monotonic`).
    """
    special, single, pair, settings = SHAPES[shape]
    smallest = 256 + len(special)
    if config.vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size {config.vocab_size} is too small: 256 bytes and the "
            f"{len(special)} special tokens of an {shape} make {smallest}"
        )
    core = tokenizers.Tokenizer(models.BPE())
    pattern = "" if config.pattern == "gpt2" else QWEN2_PATTERN
    core.pre_tokenizer = huggingface.byte_level_splitter(pattern)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special,
        show_progress=False,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = split_long_words(texts)
    run_in_thread(lambda fed: core.train_from_iterator(fed, trainer), words, deadline)
    core.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(str(token.content), i) for i, token in enumerate(special)],
    )
    settings = {"tokenizer_class": GENERIC_CLASS, **settings}
    return Tokenizer(core, {**settings, "clean_up_tokenization_spaces": False})


class ShapeTokens(NamedTuple):
    """Special tokens in the order of their ids, templates for one text and for a pair, settings."""

    special: list[AddedToken]
    single: str
    pair: str
    settings: dict[str, Any]


def _special(*tokens: str) -> list[AddedToken]:
    # [MASK] replaces a word with the space before it, as the vocabulary spells words
    return [
        AddedToken(token, special=True, normalized=False, lstrip=token == "[MASK]")
        for token in tokens
    ]


SHAPES = {
    "decoder": ShapeTokens(
        _special(END_OF_TEXT),
        f"{END_OF_TEXT} $A",
        f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        {
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "add_bos_token": True,
            "add_eos_token": False,
        },
    ),
    "encoder": ShapeTokens(
        _special("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    ),
    "encoder-decoder": ShapeTokens(
        _special("<pad>", "</s>", "<unk>"),
        "$A </s>",
        "$A </s> $B </s>",
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder, as huggingface.py reads it, of a `tokenizer.json` or a GGUF file.

    Raises UserError if there is none or it cannot be read.
    """
    path = Path(path)
    with user_errors(path, "read"):  # the name may be too long
        if not path.is_file() and not path.exists():
            raise UserError(
                "no such folder",
                where=str(path),
                hint="-m takes a model folder or a tokenizer.json",
            )
    if is_gguf(path):
        return Tokenizer(*from_metadata(read_header(path).metadata, str(path)))
    core, settings, target_core, files = huggingface.read(path)
    target = Tokenizer(target_core, settings) if target_core else None
    return Tokenizer(core, settings, target, files)
