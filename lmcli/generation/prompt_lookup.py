"""Guesses of what follows in a text: the tokens that followed its last n-gram before.

A model that reads several guessed tokens in one pass reads its weights once for all of them (prompt
look-up, Saxena 2023; speculative decoding, Leviathan et al. 2023).
"""

from itertools import islice

NGRAM_SIZES = (4, 2)  # of n-grams, the longest first
# tokens: with the newest one they are rows in numbers that the products of decode_step.c read at
# once (4 rows take 1.0 to 1.5 times as long as 1, and 3 rows no less)
GUESSES = (3, 7, 15)
LONGEST_PAUSE = 32  # tokens


class PromptLookup:
    """The n-grams of a text, and how long the next guess is, by how the ones before did."""

    def __init__(self, prompt: list[int]):
        self._text = list(prompt)
        self._prompt_length = len(prompt)
        self._next: dict[tuple[int, ...], int] = {}  # n-gram → place of the token after its last
        self._indexed = 0
        self._guess = GUESSES[0]
        self._pause = self._left = 0

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow the prompt and these tokens, or none."""
        if self._left:
            self._left -= 1
            return []
        text = self._text
        text += islice(tokens, len(text) - self._prompt_length, None)
        for end in range(self._indexed, len(text)):  # the last n-grams have nothing after them yet
            for size in NGRAM_SIZES:
                if end >= size:
                    self._next[tuple(text[end - size : end])] = end
        self._indexed = len(text)
        for size in NGRAM_SIZES:
            if (start := self._next.get(tuple(text[-size:]))) is not None:
                period = len(text) - start  # a guess may go on into itself
                return [text[start + i % period] for i in range(min(most, self._guess))]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Sets the length of the next guess by this one; after a wrong one there is a pause."""
        self._guess = next((size for size in GUESSES if size > right), GUESSES[-1])
        if right == guessed:
            self._pause = 0
        elif not right:
            self._pause = min(2 * self._pause + 1, LONGEST_PAUSE)
            self._left = self._pause
