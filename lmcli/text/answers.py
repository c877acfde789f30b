"""Rows that pose a question, and answers beside the right ones as SQuAD compares them (Rajpurkar et al. 2016; 2018 for
questions without an answer)."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmcli.text.fields import row_field

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Right(NamedTuple):
    """A right answer: characters `start` to `end` of the context are its text."""

    text: str
    start: int
    end: int


class Posed(NamedTuple):
    """A question about a context, with its right answers: none where the context holds no answer."""

    context: str
    question: str
    answers: list[Right]


def posed(row: dict, context: str, question: str, answers: str) -> Posed:
    """What a row poses, by the names of its three fields. Answers are SQuAD's list of {"text", "answer_start"}, or as
    Hugging Face keeps them {"text": [...], "answer_start": [...]}; offsets count characters.

    Raises ValueError for an empty question or context, and for an answer that does not stand where it should.
    """
    texts = [row_field(row, name) for name in (context, question)]
    for name, text in zip((context, question), texts):
        if not text.strip():
            raise ValueError(f"field {name!r} is empty")
    return Posed(*texts, [_placed(texts[0], *pair) for pair in _pairs(row.get(answers), answers)])


def _pairs(value: Any, name: str) -> list[tuple[Any, Any]]:
    """(text, offset) of each answer, as they stand in the row."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts))
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        return [(answer.get("text"), answer.get("answer_start")) for answer in value]
    raise ValueError(f"field {name!r} is missing or no list of objects with text and answer_start (empty: no answer)")


def _placed(context: str, text: Any, start: Any) -> Right:
    """The answer without the white space around it."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"an answer's text is {text!r}, not a text of the context")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= len(context) - len(text):
        raise ValueError(f"answer {text!r} cannot start at {start!r} of a context of {len(context)} characters")
    if (there := context[start:start + len(text)]) != text:
        raise ValueError(f"answer {text!r} does not stand at character {start} of the context, {there!r} does")
    start += len(text) - len(text.lstrip())
    return Right(text.strip(), start, start + len(text.strip()))


def normalized(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus space. normalized("The V&A, London") == "va london"."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str | None, answers: Sequence[str], version: int = 2) -> float:
    """1.0 when a prediction is, normalized, one of the answers, else 0.0. By the rules of SQuAD 2.0 None or "" says that
    there is no answer, which is right where there are no `answers`; those of `version` 1 know no such question."""
    return float(normalized(prediction or "") in map(normalized, _kept(answers, version)))


def token_f1(prediction: str | None, answers: Sequence[str], version: int = 2) -> float:
    """The best F1 of a prediction's words with those of an answer, 0.0 to 1.0; "no answer" is all right or all wrong.

    token_f1("the brown fox", ["a quick brown fox"]) == 0.8: both of its words are right, of three there.
    """
    found = normalized(prediction or "").split()
    return max((_f1(found, normalized(answer).split(), version) for answer in _kept(answers, version)), default=0.0)


def _kept(answers: Sequence[str], version: int) -> Sequence[str]:
    """The answers that say something; [""] where there is none, as SQuAD's own script has it. In version 1 all."""
    return answers if version == 1 else [answer for answer in answers if normalized(answer)] or [""]


def _f1(found: list[str], right: list[str], version: int) -> float:
    if not found or not right:
        return float(version == 2 and found == right)
    same = (Counter(found) & Counter(right)).total()
    return 2 * same / (len(found) + len(right))
