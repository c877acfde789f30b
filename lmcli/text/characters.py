"""What is not text: half surrogates in input, control characters on a terminal, other values."""

import json
import os
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TextIO

from lmcli.errors import UsageError

SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"  # for what is not text: half a surrogate pair, half a character

# C0, DEL, C1; marks and overrides of the writing direction; line and paragraph separators;
# surrogates
CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # what a terminal is sent before and after dim text


def shows_color(stream: TextIO) -> bool:
    """True for a terminal that shows colors, unless NO_COLOR says otherwise."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with control characters, except those in `keep`, drawn as printable ones.

    C0 and DEL are drawn as their Unicode pictures, others by their code point.

    >>> visible("\\x1b[31m\\u202e")
    '␛[31m<U+202E>'
    """
    return CONTROLS.sub(lambda match: match[0] if match[0] in keep else _picture(match[0]), text)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def for_stream(text: str, stream: TextIO, keep: str = "\n\t") -> str:
    """The text as it may be written to a stream: `visible` on a terminal, elsewhere as it is."""
    return visible(text, keep) if stream.isatty() else text


def byte_offsets(text: str) -> Sequence[int]:
    """The UTF-8 bytes before each character and before the end: "aé!" → [0, 1, 3, 4]."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode("utf-8")) for character in text)]


class RepeatedKey(ValueError):
    """A JSON object in which a key stands twice; Python's parser would take the last one."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"field {name!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)


def parse_json(text: str) -> Any:
    """The JSON value of a text; NaN and Infinity, which Python writes, are read as null.

    Halves of surrogate pairs become U+FFFD. Raises ValueError: RepeatedKey, invalid or too deep.
    """
    try:
        value = _DECODER.decode(text)
        # else no text can have half a surrogate pair
        return without_surrogates(value) if "\\ud" in text.lower() else value
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} (column {error.colno})") from None


def without_surrogates(value: Any) -> Any:
    """A JSON value whose texts have U+FFFD for each half of a surrogate pair (as in "\\ud800").

    JSON can spell such a half, but no UTF-8 text can hold it.
    """
    if isinstance(value, str):
        return SURROGATE.sub(REPLACEMENT, value)
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value


def text_inputs(texts: Any, what: str = "text", tuples: bool = False) -> list[Any]:
    """Texts, with `tuples` also tuples of texts, as a list: one alone, or what is iterated over.

    Raises UsageError, which names the first one, for what is no text and for half surrogates.
    """
    try:
        inputs = [texts] if isinstance(texts, str) else list(texts)
    except TypeError:
        raise UsageError(f"{texts!r} is neither a text nor a list of texts") from None
    for number, each in enumerate(inputs, start=1):
        for part in each if tuples and isinstance(each, tuple) else (each,):
            problem, hint = "", None
            if not isinstance(part, str):
                problem = f"is no text, but {type(part).__name__}"
            elif half := SURROGATE.search(part):
                problem = f"character {half.start():,} is half a surrogate pair, {half[0]!a}"
                hint = "write U+FFFD, or what it stands for, in its place"
            if problem:
                raise UsageError(problem, f"{what} {number:,}", hint)
    return inputs


def counted(count: int, name: str) -> str:
    """The number with the name of what is counted: "1 row", "1,234 rows"."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"
