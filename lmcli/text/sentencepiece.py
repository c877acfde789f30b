"""SentencePiece files (`.model`, `.spm`): read without the library, and turned into a `tokenizers.Tokenizer`.

Marian's two files share the ids of one `vocab.json`; `MarianSide` is the tokenizer of one of them.
"""

import json
import struct
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
TEXT = (NORMAL, USER_DEFINED, BYTE)
UNIGRAM, BPE = 1, 2  # types of models


class Piece(NamedTuple):
    """One row of the vocabulary: its spelling, its log-probability (of a Unigram) and its type."""

    text: str
    score: float
    type: int


class Proto(NamedTuple):
    """What a SentencePiece file says, as far as it decides how text is cut."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    unk_id: int
    names: dict[str, str]  # bos_token, eos_token, unk_token, of those that the model has
    charsmap: bytes  # the compiled table of its normalizer; b"" changes nothing
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def added(self) -> list[AddedToken]:
        """Control pieces (special) and pieces that a user defined (not), as they stand in the file."""
        return [AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
                for piece in self.pieces if piece.type in (CONTROL, USER_DEFINED)]


def parse(data: bytes) -> Proto:
    """Reads a serialized ModelProto (sentencepiece_model.proto). Raises ValueError when the bytes are none."""
    try:
        fields = list(_fields(data))
        trainer = dict(field for number, message in fields if number == 2 for field in _fields(message))
        normalizer = dict(field for number, message in fields if number == 3 for field in _fields(message))
        pieces = [_piece(dict(_fields(message))) for number, message in fields if number == 1]
        if not pieces:
            raise ValueError("it has no pieces")
        names = {f"{name}_token": trainer.get(text, default).decode() for name, at, at_default, text, default in (
            ("unk", 40, 0, 45, b"<unk>"), ("bos", 41, 1, 46, b"<s>"), ("eos", 42, 2, 47, b"</s>"))
            if 0 <= trainer.get(at, at_default) < len(pieces)}
        return Proto(pieces, trainer.get(3, UNIGRAM), bool(trainer.get(35, 0)), trainer.get(40, 0), names,
                     normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))
    except (IndexError, AttributeError, TypeError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError("it is damaged or no SentencePiece model") from error


def _piece(fields: dict) -> Piece:
    return Piece(fields[1].decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message in protobuf's wire format: integers, or bytes for whatever else."""
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
        yield tag >> 3, data[at:at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends. _varint(b"\\xac\\x02", 0) == (300, 2)."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def bpe(proto: Proto, **options) -> models.BPE:
    """The BPE of a file. Merges are not stored there: whatever two pieces join to a third is one, in the thirds' order."""
    ids = {piece.text: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for text in ids:
        merges += [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
    return models.BPE(ids, merges, fuse_unk=True, **options)


def plain(proto: Proto) -> tokenizers.Tokenizer:
    """A file's tokenizer as `transformers` builds it for families without a class of their own: no space in front."""
    if proto.model_type == UNIGRAM:  # Kudo 2018
        vocabulary = [(piece.text, piece.score) for piece in proto.pieces]
        core = tokenizers.Tokenizer(models.Unigram(vocabulary, proto.unk_id, proto.byte_fallback))
    else:
        core = tokenizers.Tokenizer(bpe(proto, unk_token=proto.names.get("unk_token", "<unk>"),
                                        byte_fallback=proto.byte_fallback))
    steps = [normalizers.Precompiled(proto.charsmap)] if proto.charsmap else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if proto.byte_fallback else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *fallback])
    return core


class SideEncoding(NamedTuple):
    """Ids of the shared vocabulary, and the characters of the text that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class MarianSide:
    """One side of a Marian vocabulary, used where a `tokenizers.Tokenizer` is: pieces of its own file, ids of `vocab.json`.

    What the file does not know is looked up in `vocab.json` as it stands, since the other side may know it.
    """

    normalizer = post_processor = None

    def __init__(self, proto: Proto, ids: dict[str, int], special: dict[str, str]):
        if proto.model_type != UNIGRAM:
            raise ValueError("its pieces are no Unigram model's")
        if not all(isinstance(index, int) for index in ids.values()):
            raise ValueError("an id is no number")
        if special["unk_token"] not in ids:
            raise ValueError(f"it lacks {special['unk_token']}")
        self.ids = dict(ids)
        for token in special.values():
            self.ids.setdefault(token, len(self.ids))
        self.tokens = {index: token for token, index in self.ids.items()}
        self.special, self.eos = {self.ids[token] for token in special.values()}, special["eos_token"]
        self.unk = self.ids[special["unk_token"]]
        # control pieces match no text: spelled with a space they do not, since no space is left by then
        vocabulary = [(piece.text if piece.type in TEXT else f" {piece.text}", piece.score) for piece in proto.pieces]
        self.core = tokenizers.Tokenizer(models.Unigram(vocabulary, proto.unk_id, proto.byte_fallback))
        tidy = [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        self.core.normalizer = self._normalizer = normalizers.Sequence([
            # composed first: the table composes as well, but this library applies it to a letter without its accent
            *([normalizers.NFC(), normalizers.Precompiled(proto.charsmap)] if proto.charsmap else []),
            *(tidy if proto.remove_extra_whitespaces else []),
            *([normalizers.Prepend(SPACE)] if proto.add_dummy_prefix else []), normalizers.Replace(" ", SPACE)])
        self.core.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(special.values())])
        self._decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        pieces = self.core.get_vocab(with_added_tokens=True)
        self._unknown = proto.unk_id
        self._shared = {index: self.ids.get(piece, self.unk) for piece, index in pieces.items()}

    def no_padding(self) -> None:
        """There is none."""

    def no_truncation(self) -> None:
        """There is none."""

    def encode(self, text: str, add_special_tokens: bool = False) -> SideEncoding:
        """Ids of one text."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = False) -> list[SideEncoding]:
        """Ids of many texts. A language code such as >>fr<< in front is one token."""
        starts = [text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0 for text in texts]
        bodies = [text[start:] for text, start in zip(texts, starts)]
        found = self.core.encode_batch(bodies, add_special_tokens=False)
        return [self._renumbered(text, start, encoding, [self.ids[self.eos]] if add_special_tokens else [])
                for text, start, encoding in zip(texts, starts, found)]

    encode_batch_fast = encode_batch

    def _renumbered(self, text: str, start: int, found: tokenizers.Encoding, last: list[int]) -> SideEncoding:
        spans = [(start + a, start + b) for a, b in found.offsets]
        ends = [*(a for a, _ in spans[1:]), len(text)]  # up to the next: an accent that was composed belongs to no token
        ids = [self._shared[index] if index != self._unknown else self._look_up(text[a:end])
               for index, (a, _), end in zip(found.ids, spans, ends)]
        code = [self.ids.get(text[:start], self.unk)] if start else []
        return SideEncoding([*code, *ids, *last], [*[(0, start)] * len(code), *spans, *[(len(text),) * 2] * len(last)])

    def _look_up(self, text: str) -> int:
        shown = self._normalizer.normalize_str(text).removeprefix(SPACE)
        return self.ids.get(shown, self.unk)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids: pieces joined, a space after each special token."""
        text = ""
        kept = (index for index in ids if not (skip_special_tokens and index in self.special))
        for special, group in groupby(kept, self.special.__contains__):
            tokens = [self.tokens.get(index, "") for index in group]
            text += "".join(f"{token} " for token in tokens) if special else self._decoder.decode(tokens).lstrip(" ")
        return text

    def id_to_token(self, index: int) -> str | None:
        """The spelling of an id."""
        return self.tokens.get(index)

    def token_to_id(self, token: str) -> int | None:
        """The id of a spelling."""
        return self.ids.get(token)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Ids of the shared vocabulary."""
        return len(self.ids)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Spelling → id."""
        return self.ids

    @cached_property
    def _definition(self) -> str:
        template = {"type": "TemplateProcessing", "special_tokens": {self.eos: {"ids": [self.ids[self.eos]]}}, **{
            kind: [*({"Sequence": {"id": name, "type_id": 0}} for name in names),
                   {"SpecialToken": {"id": self.eos, "type_id": 0}}] for kind, names in (("single", "A"), ("pair", "AB"))}}
        return json.dumps({**json.loads(self.core.to_str()), "post_processor": template, "ids": self.ids})

    def to_str(self, pretty: bool = False) -> str:
        """A definition to compare by: that of the pieces, the shared ids, and the template."""
        return self._definition
