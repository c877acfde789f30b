"""Answers beside the right ones, as SQuAD compares them (Rajpurkar et al. 2016; 2018 for questions without an answer)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and surplus space. normalized("The V&A, London") == "va london"."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 when a prediction is, normalized, one of the answers, else 0.0. None or "" says that there is no answer, which is
    right where there are no `answers`."""
    return float(normalized(prediction or "") in map(normalized, _kept(answers)))


def token_f1(prediction: str | None, answers: Sequence[str]) -> float:
    """The best F1 of a prediction's words with those of an answer, 0.0 to 1.0; "no answer" is all right or all wrong.

    token_f1("the brown fox", ["a quick brown fox"]) == 0.8: both of its words are right, of three there.
    """
    return max(_f1(normalized(prediction or "").split(), normalized(answer).split()) for answer in _kept(answers))


def _kept(answers: Sequence[str]) -> Sequence[str]:
    """The answers that say something; [""] where there is none, as SQuAD's own script has it."""
    return [answer for answer in answers if normalized(answer)] or [""]


def _f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    same = (Counter(found) & Counter(right)).total()
    return 2 * same / (len(found) + len(right))
