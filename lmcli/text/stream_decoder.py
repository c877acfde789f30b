"""Text of tokens as they are generated, one at a time, and the bytes that each token adds."""

import functools
import json
import re

from lmcli.text.characters import REPLACEMENT
from lmcli.text.sentencepiece import SPACE, MarianSide
from lmcli.text.tokenizer import Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a piece of sentencepiece that is one byte


class StreamDecoder:
    """Text of tokens as they come, never half a character: `push` returns the text now certain.

    Bytes that never become a character are left out, and so is U+FFFD, which stands for such bytes.
    `ids` are the ids before the stream (the prompt). Each step decodes a few earlier ids as well,
    since some tokenizers write a space only between words.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self.tokenizer, self.ids = tokenizer, ids[-8:]
        # decoding starts at `_start`; before `_whole` every character is complete
        self._start = 0
        while self.ids and self._decode().startswith(REPLACEMENT):
            del self.ids[0]  # the last eight ids may begin inside a character
        self._whole = len(self.ids)
        self._returned = len(self._decode())

    def push(self, index: int) -> str:
        """The text that this token completes: "" while a character is incomplete."""
        self.ids.append(index)
        text = self._decode()
        start = self._returned
        if text.endswith(REPLACEMENT):
            # half a character: one U+FFFD or, with byte fallback, one for each of its bytes
            self._returned = max(start, len(text.rstrip(REPLACEMENT)))
            return text[start : self._returned].replace(REPLACEMENT, "")
        if len(text) > start:
            # a token without text stays: without it the next would lose its space, as a first token
            self._start, self._whole = self._whole, len(self.ids)
        self._returned = len(self._decode())
        return text[start:].replace(REPLACEMENT, "")

    def _decode(self) -> str:
        # spaces are not cleaned up, so the text only grows
        return self.tokenizer.core.decode(self.ids[self._start :], skip_special_tokens=True)


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id after other text: part of a character, if need be.

    Special tokens and ids without a token have none, since they are not shown.
    """
    definition = json.loads(tokenizer.core.to_str())
    decoder = definition["decoder"] or {}
    kinds = {step.get("type") for step in decoder.get("decoders", [decoder])}
    added = {token["id"]: token for token in definition["added_tokens"]}
    hidden = {index for index, token in added.items() if token["special"]}
    if isinstance(tokenizer.core, MarianSide):
        hidden = {*tokenizer.core.special}
    pieces = {i: piece for piece, i in tokenizer.core.get_vocab(with_added_tokens=True).items()}
    has_spaces = any(SPACE in piece for piece in pieces.values())
    result = [b""] * tokenizer.size
    shown = (i for i in pieces if i not in added and tokenizer.core.decode([i]).isalpha())
    other = None if has_spaces or "ByteLevel" in kinds else next(shown, None)
    for index, piece in pieces.items():
        if index in hidden:
            continue
        if index in added:
            result[index] = piece.encode()
        elif "ByteLevel" in kinds:
            result[index] = b"".join(BYTE_OF.get(char) or char.encode() for char in piece)
        elif "ByteFallback" in kinds and (byte := BYTE.fullmatch(piece)):
            result[index] = bytes.fromhex(byte[1])
        elif has_spaces:
            result[index] = piece.replace(SPACE, " ").encode()
        else:
            result[index] = _text_after(tokenizer, other, index)
    return result


def drops_first_space(tokenizer: Tokenizer, token_bytes: list[bytes], ids: list[int]) -> bool:
    """True if the space of a word is not shown after these ids, as at the start of a text."""
    words = (
        i for i, piece in enumerate(token_bytes) if piece[:1] == b" " and piece.strip().isalpha()
    )
    word = next(words, None)
    shown = "" if word is None else StreamDecoder(tokenizer, ids).push(word)
    return bool(shown) and not shown.startswith(" ")


def _text_after(tokenizer: Tokenizer, other: int | None, index: int) -> bytes:
    """The text of an id after another where the decoder itself puts spaces, as WordPiece's does."""
    before = [] if other is None else [other]
    start, both = (tokenizer.core.decode(ids) for ids in (before, [*before, index]))
    return both[len(start) :].encode()


def _byte_of() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): bytes([byte]) for byte in shown}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


BYTE_OF = _byte_of()
