"""Where a long text may be split so that the pieces encode to the same tokens as the whole."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PIECE_CHARS = 1 << 12  # at least, in each piece; with 32,000 a character takes a tenth longer

# Between these two characters every pattern that lm knows (GPT-2, Qwen2, Llama 3) ends a word, so a
# cut here changes no token: after a single newline; before a single space between letters; and, for
# languages without spaces, before punctuation after a letter (one in every version of Unicode).
# Never before the start of a special token that may take the space before it: [MASK], <mask>.
SAFE_CUT = re.compile(
    r"(?<=\S\n)(?=[^\s\[<])|(?<=[^\W\d_])(?= [^\W\d_])"
    r"|(?<=[A-Za-zぁ-ゖァ-ヺ一-龥가-힣])(?=[,.;:!?，．。、；：！？])"
)
# the same in text whose CR LF line ends will be read as \n
SAFE_CUT_CRLF = re.compile(rf"{SAFE_CUT.pattern}|(?<=\S\r\n)(?=[^\s\[<])")
# A text without such a place is cut after this many characters all the same: encoding a word takes
# 100 bytes of memory for each character, and words of real text have a few hundred at most.
LONGEST_PIECE = 1 << 20


def cut_position(text: str, start: int, at_least: int, cut: re.Pattern[str] = SAFE_CUT) -> int:
    """Where a text is cut next, `at_least` characters after `start`; 0 if nowhere (yet).

    >>> cut_position("one two three", 0, 2), cut_position("one", 0, 2)
    (3, 0)
    """
    if match := cut.search(text, start + at_least, start + LONGEST_PIECE):
        return match.start()
    if len(text) <= (at := start + LONGEST_PIECE):
        return 0
    return at + (text[at - 1 : at + 1] == "\r\n")  # not inside of a line end


# A word that a BPE is learned from: every merge rewrites all words that contain it, so that a line
# of a million letters takes minutes. No word of a language is as long.
LONGEST_WORD = 256
# all that the patterns of GPT-2, Qwen2 and Llama 3 make a word of, with less than two kinds in it
ONE_KIND = re.compile(
    "|".join(f"(?:{kind}){{{LONGEST_WORD}}}" for kind in (r"[^\W_]", r"\s", r"[^\w\s]|_"))
)
LONG_WORD_CHARS = 1 << 20  # of such words, what is learned from


def split_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, split where a word goes on for over LONGEST_WORD characters, to learn a BPE from.

    Words of up to that length stay whole. Of what is split off, about LONG_WORD_CHARS are kept.
    """
    room = LONG_WORD_CHARS
    for text in texts:
        start = 0
        for at in range(LONGEST_WORD, len(text) - LONGEST_WORD + 2, LONGEST_WORD):
            # a run of more than two such lengths contains such a place
            if ONE_KIND.match(text, at - 1):
                if at - start > LONGEST_WORD or room > 0:
                    yield text[start:at]
                room -= LONGEST_WORD
                start = at
        yield text[start:]


def in_batches(
    items: Iterable[Item], most: int, size: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """The items in lists, each of which ends where its sizes reach `most` together."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
