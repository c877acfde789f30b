"""Text of tokens as they are generated, one at a time."""

from lmcli.text.characters import REPLACEMENT
from lmcli.text.tokenizer import Tokenizer


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
