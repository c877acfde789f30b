"""SentencePiece files (`.model`, `.spm`), read without the library, → a `tokenizers.Tokenizer`.

Marian's two files share the ids of one `vocab.json`; `MarianSide` is the tokenizer of one file.
"""

import json
import struct
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
TEXT_TYPES = (NORMAL, USER_DEFINED, BYTE)
UNIGRAM, BPE = 1, 2  # types of models
# special tokens: name, then number and default of the fields for id and spelling
SPECIAL_FIELDS = (
    ("unk", 40, 0, 45, b"<unk>"),
    ("bos", 41, 1, 46, b"<s>"),
    ("eos", 42, 2, 47, b"</s>"),
)


class VocabularyPiece(NamedTuple):
    """An entry of the vocabulary: its spelling, its log-probability (of a Unigram) and its type."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """What a SentencePiece file says about how text is split."""

    pieces: list[VocabularyPiece]
    model_type: int
    byte_fallback: bool
    unk_id: int
    special: dict[str, str]  # bos_token, eos_token, unk_token, as far as the model has them
    charsmap: bytes  # the compiled table of its normalizer; b"" for none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def added(self) -> list[AddedToken]:
        """Control pieces, which are special, and user-defined pieces, in the order of the file."""
        return [
            AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
            for piece in self.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]


def parse(data: bytes) -> SentencePieceModel:
    """The model in a serialized ModelProto (sentencepiece_model.proto); ValueError for no model."""
    try:
        fields = list(_fields(data))
        pieces = [_piece(dict(_fields(message))) for number, message in fields if number == 1]
        trainer, normalizer = (
            dict(
                field
                for number, section_bytes in fields
                if number == section
                for field in _fields(section_bytes)
            )
            for section in (2, 3)
        )
        if not pieces:
            raise ValueError("it has no pieces")
        special = {
            f"{name}_token": trainer.get(spelling, default).decode()
            for name, index, default_index, spelling, default in SPECIAL_FIELDS
            if 0 <= trainer.get(index, default_index) < len(pieces)
        }
        return SentencePieceModel(
            pieces,
            model_type=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            unk_id=trainer.get(40, 0),
            special=special,
            charsmap=normalizer.get(2, b""),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        )
    except (IndexError, AttributeError, TypeError, KeyError, struct.error, UnicodeError) as error:
        raise ValueError("it is damaged or no SentencePiece model") from error


def _piece(fields: dict[int, Any]) -> VocabularyPiece:
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return VocabularyPiece(fields[1].decode(), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message in protobuf's wire format; a value is an int or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise IndexError
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, its end): seven bits a byte, lowest first. _varint(b"\\xac\\x02", 0) == (300, 2)."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def bpe(model: SentencePieceModel, **options: Any) -> models.BPE:
    """The BPE of a file, which stores no merges."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    return models.BPE(ids, bpe_merges(ids, ids), fuse_unk=True, **options)


def bpe_merges(pieces: Iterable[str], ids: Container[str]) -> list[tuple[str, str]]:
    """The merges of a BPE: any two of `ids` that make one of the pieces, in the order of those."""
    merges = []
    for text in pieces:
        splits = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(left, right) for left, right in splits if left in ids and right in ids]
    return merges


def unigram(model: SentencePieceModel) -> models.Unigram:
    """The Unigram of a file (Kudo 2018)."""
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocabulary, model.unk_id, model.byte_fallback)


def generic_tokenizer(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """A file's tokenizer as `transformers` builds it without a class: no space in front."""
    if model.model_type == UNIGRAM:
        core = tokenizers.Tokenizer(unigram(model))
    else:
        unknown = model.special.get("unk_token", "<unk>")
        core = tokenizers.Tokenizer(
            bpe(model, unk_token=unknown, byte_fallback=model.byte_fallback)
        )
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if model.byte_fallback else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *fallback])
    return core


class SideEncoding(NamedTuple):
    """Ids of the shared vocabulary, and for each the span of characters that it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class MarianSide:
    """One side of a Marian vocabulary, with the methods of a `tokenizers.Tokenizer`.

    Text is split into the pieces of this side's file; ids are those of `vocab.json`. What the file
    does not know is looked up in `vocab.json`, since the other side may know it.
    """

    normalizer = post_processor = None

    def __init__(self, model: SentencePieceModel, ids: dict[str, int], special: dict[str, str]):
        if model.model_type != UNIGRAM:
            raise ValueError("it is no Unigram model")
        if not all(isinstance(index, int) for index in ids.values()):
            raise ValueError("an id is no number")
        if special["unk_token"] not in ids:
            raise ValueError(f"it lacks {special['unk_token']}")
        # the shared ids
        self.ids = dict(ids)
        for token in special.values():
            self.ids.setdefault(token, len(self.ids))
        self.tokens = {index: token for token, index in self.ids.items()}
        self.special = {self.ids[token] for token in special.values()}
        self.eos, self.unk = special["eos_token"], self.ids[special["unk_token"]]
        # control pieces must match no text: a space in front prevents it, since the text has none
        pieces = [
            piece if piece.type in TEXT_TYPES else piece._replace(text=f" {piece.text}")
            for piece in model.pieces
        ]
        self.core = tokenizers.Tokenizer(unigram(model._replace(pieces=pieces)))
        self.core.normalizer = self._normalizer = _marian_normalizer(model)
        self.core.add_special_tokens(
            [AddedToken(token, normalized=False) for token in dict.fromkeys(special.values())]
        )
        self._decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        self._unknown = model.unk_id
        self._shared = {index: self.ids.get(text, self.unk) for text, index in vocabulary.items()}

    def no_padding(self) -> None:
        """Does nothing: there is no padding."""

    def no_truncation(self) -> None:
        """Does nothing: there is no truncation."""

    def encode(self, text: str, add_special_tokens: bool = False) -> SideEncoding:
        """Ids of one text."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: list[str], add_special_tokens: bool = False
    ) -> list[SideEncoding]:
        """Ids of many texts. A language code such as >>fr<< in front is one token."""
        starts = [
            text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0 for text in texts
        ]
        bodies = [text[start:] for text, start in zip(texts, starts)]
        encodings = self.core.encode_batch(bodies, add_special_tokens=False)
        suffix = [self.ids[self.eos]] if add_special_tokens else []
        return [
            self._with_shared_ids(text, start, encoding, suffix)
            for text, start, encoding in zip(texts, starts, encodings)
        ]

    encode_batch_fast = encode_batch

    def _with_shared_ids(
        self, text: str, start: int, encoding: tokenizers.Encoding, suffix: list[int]
    ) -> SideEncoding:
        spans = [(start + first, start + last) for first, last in encoding.offsets]
        # up to the next token: a composed accent belongs to none
        ends = [*(first for first, _ in spans[1:]), len(text)]
        ids = [
            self._look_up(text[first:end]) if index == self._unknown else self._shared[index]
            for index, (first, _), end in zip(encoding.ids, spans, ends)
        ]
        code = [self.ids.get(text[:start], self.unk)] if start else []
        offsets = [*[(0, start)] * len(code), *spans, *[(len(text), len(text))] * len(suffix)]
        return SideEncoding([*code, *ids, *suffix], offsets)

    def _look_up(self, text: str) -> int:
        return self.ids.get(self._normalizer.normalize_str(text).removeprefix(SPACE), self.unk)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids: the pieces concatenated, with a space after each special token."""
        text = ""
        shown = (index for index in ids if not (skip_special_tokens and index in self.special))
        for is_special, group in groupby(shown, self.special.__contains__):
            tokens = [self.tokens.get(index, "") for index in group]
            if is_special:
                text += "".join(f"{token} " for token in tokens)
            else:
                text += self._decoder.decode(tokens).lstrip(" ")
        return text

    def id_to_token(self, index: int) -> str | None:
        """The spelling of an id."""
        return self.tokens.get(index)

    def token_to_id(self, token: str) -> int | None:
        """The id of a spelling."""
        return self.ids.get(token)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """The number of shared ids."""
        return len(self.ids)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Spelling → id."""
        return self.ids

    @cached_property
    def _definition(self) -> str:
        eos = {"SpecialToken": {"id": self.eos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {
            "type": "TemplateProcessing",
            "special_tokens": {self.eos: {"ids": [self.ids[self.eos]]}},
            "single": [a, eos],
            "pair": [a, b, eos],
        }
        core = json.loads(self.core.to_str())
        return json.dumps({**core, "post_processor": template, "ids": self.ids})

    def to_str(self, pretty: bool = False) -> str:
        """A definition to compare by: the pieces, the shared ids and the template."""
        return self._definition


def _marian_normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    steps: list = []
    if model.charsmap:
        # NFC first: the table composes too, but this library applies it to letters without accents
        steps += [normalizers.NFC(), normalizers.Precompiled(model.charsmap)]
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
