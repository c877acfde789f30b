"""Scores as they are written: rows of TSV or JSON Lines for records, words, tokens, pairs, choices; texts in colour."""

import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lmcli.inference.crew import Errand
from lmcli.inference.scoring import NATS_PER_BIT, Question, Score, Scorer, Unit, choose
from lmcli.text.asked import joined
from lmcli.text.records import Record, escaped, heard, said


def cell(value: float | int | None) -> str:
    """A value as TSV has it: six figures, NA for None."""
    if value is None:
        return "NA"
    return str(value) if isinstance(value, int) else f"{value:.6g}" if value else "0"


@dataclass
class Style:
    """How everything is written: JSON or TSV, surprisal to the base "2" or "e"; `method` is the scorer's."""

    as_json: bool = False
    base: str = "2"
    method: str = "causal"
    between: str | None = None

    def surprisal(self, unit: Unit) -> float | None:
        """In bits, or with base e in nats."""
        return unit.surprisal if self.base == "2" or unit.logprob is None else -unit.logprob

    def json(self, record: Record, facts: Mapping[str, Any]) -> str:
        """One line: the row's own fields, then what was found."""
        return json.dumps({**(record.fields or {}), **facts, "method": self.method}, ensure_ascii=False) + "\n"


def figures(score: Score) -> dict[str, Any]:
    """The figures of one text."""
    return {"logprob": score.logprob, "tokens": score.tokens, "bytes": score.bytes, "bits_per_byte": score.bits_per_byte}


def row(score: Score, text: str, *before: int) -> str:
    """One line of TSV."""
    return "\t".join((*map(str, before), *map(cell, figures(score).values()), escaped(text))) + "\n"


@dataclass
class Records:
    """A row for each record."""

    style: Style
    per = "record"
    columns = ("logprob", "tokens", "bytes", "bits_per_byte", "text")

    def questions(self, record: Record) -> list[Question]:
        """What is to be scored for a record; one with parts has its prefix, or its source, there."""
        return _behind(record, self.style)

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """The lines of one record."""
        if self.style.as_json:
            return self.style.json(record, {"text": record.text, **figures(scores[0])})
        return row(scores[0], record.text)


def _behind(record: Record, style: Style) -> list[Question]:
    part = record.parts[0] if record.parts else ""
    if style.method == "conditional":
        return [Question(record.text, source=part)]
    return [Question(joined(part, record.text, style.between), part)]


@dataclass
class Units:
    """A row for each word or token of each record; `alternatives` are so many likely tokens beside each."""

    style: Style
    per: str
    alternatives: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names, those of alternatives numbered."""
        more = ("rank", "entropy", *(f"{name}_{k + 1}" for k in range(self.alternatives) for name in (
            "alternative", "logprob"))) if self.alternatives else ()
        return ("line", "index", "piece", "start", "end", "bytes", "logprob", "surprisal", *more)

    def questions(self, record: Record) -> list[Question]:
        """As of `Records`."""
        return _behind(record, self.style)

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """The lines of one record; of one without words none. In JSON one line all the same."""
        units = scores[0].pieces or []
        if self.style.as_json:
            return self.style.json(record, {"text": record.text, **figures(scores[0]),
                                            "pieces": [self._facts(unit) for unit in units]})
        return "".join("\t".join((str(record.line), str(i), escaped(unit.piece), str(unit.start), str(unit.end),
                                  str(unit.bytes), cell(unit.logprob), cell(self.style.surprisal(unit)),
                                  *self._more(unit))) + "\n" for i, unit in enumerate(units))

    def _facts(self, unit: Unit) -> dict[str, Any]:
        more = {"rank": unit.rank, "entropy": self._entropy(unit), "alternatives": [
            {"piece": piece, "logprob": logprob} for piece, logprob in unit.alternatives or ()]} if self.alternatives else {}
        return {"piece": unit.piece, "start": unit.start, "end": unit.end, "bytes": unit.bytes, "logprob": unit.logprob,
                "surprisal": self.style.surprisal(unit), **more}

    def _more(self, unit: Unit) -> Iterator[str]:
        if self.alternatives:
            found = unit.alternatives or []
            yield from (cell(unit.rank), cell(self._entropy(unit)))
            for k in range(self.alternatives):
                yield from (escaped(found[k].piece), cell(found[k].logprob)) if k < len(found) else ("NA", "NA")

    def _entropy(self, unit: Unit) -> float | None:
        return unit.entropy if self.style.base == "2" or unit.entropy is None else unit.entropy * NATS_PER_BIT


@dataclass
class Pairs:
    """A row for each pair of texts: the figures of both, and whether the first is the likelier by its sum. `first` counts
    those, `counted` all with a figure for both; of equal ones neither is likelier."""

    style: Style
    per = "record"
    columns = (*(f"{name}_{k}" for k in (1, 2) for name in ("logprob", "tokens", "bytes", "bits_per_byte")),
               "first_likelier", "text_1", "text_2")
    first: int = 0
    counted: int = 0

    def questions(self, record: Record) -> list[Question]:
        """Both texts; none for a bad record."""
        return [Question(text) for text in record.parts]

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """One line."""
        texts = record.parts or ("", "")
        scores = scores or [Score(None, 0, 0)] * 2
        likelier = _first_likelier(scores)
        if self.style.as_json:
            return self.style.json(record, {"first_likelier": likelier, "scores": [
                {"text": text, **figures(score)} for text, score in zip(texts, scores)]})
        return "\t".join((*(cell(value) for score in scores for value in figures(score).values()),
                          cell(None if likelier is None else int(likelier)), *map(escaped, texts))) + "\n"

    def take(self, record: Record, scores: Sequence[Score]) -> None:
        """Counts one more pair."""
        likelier = _first_likelier(scores)
        self.first, self.counted = self.first + bool(likelier), self.counted + (likelier is not None)

    def summary(self) -> str:
        """The rate of first texts that are likelier, with its 95 % interval."""
        if not self.counted:
            return "no pair with a figure for both"
        low, high = wilson(self.first, self.counted)
        return (f"the first is likelier in {self.first:,} of {self.counted:,} pairs: {self.first / self.counted:.1%} "
                f"(95 % interval {low:.1%} to {high:.1%})")


def _first_likelier(scores: Sequence[Score]) -> bool | None:
    """Whether the first of two has the higher sum; None where there is no figure for both."""
    sums = [score.logprob for score in scores]
    return None if None in sums or not sums else sums[0] > sums[1]


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a rate (Wilson 1927), 95 % by default; within 0 and 1 however few were counted."""
    rate, spread = hits / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    width = z * math.sqrt(rate * (1 - rate) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - width), min(1.0, middle + width)


@dataclass
class Choices:
    """A row for each record: which of its choices, counted from 0, is the likeliest by sum, per token and per byte, and the
    log-probability of each."""

    style: Style
    per = "record"
    columns = ("by_sum", "by_token", "by_byte", "logprobs", "text")

    def questions(self, record: Record) -> list[Question]:
        """The choices, each behind the same text."""
        return [Question(joined(record.text, text, self.style.between), record.text) for text in record.parts]

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """One line."""
        found = choose(scores)
        if self.style.as_json:
            return self.style.json(record, {"text": record.text, **found._asdict(), "scores": [
                {"text": text, **figures(score)} for text, score in zip(record.parts, scores)]})
        return "\t".join((*map(cell, found), " ".join(cell(score.logprob) for score in scores) or "NA",
                          escaped(record.text))) + "\n"


@dataclass
class Worst:
    """No row but those of the `count` records with the most bits per byte, the worst first, which `rows` gives at the end;
    records without a figure, such as empty lines, are left out."""

    style: Style
    count: int
    per = "record"
    columns = ("line", *Records.columns)
    _kept: list[tuple[float, int, Record, Score]] = field(default_factory=list)
    _seen: int = 0

    def questions(self, record: Record) -> list[Question]:
        """As of `Records`."""
        return _behind(record, self.style)

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """Nothing yet."""
        return ""

    def take(self, record: Record, scores: Sequence[Score]) -> None:
        """Keeps the record while it is one of the worst."""
        self._seen += 1
        if scores[0].bits_per_byte is not None:
            one = (scores[0].bits_per_byte, -self._seen, record, scores[0])  # of equal ones the earlier
            (heapq.heappush if len(self._kept) < self.count else heapq.heappushpop)(self._kept, one)

    def rows(self) -> Iterator[str]:
        """The lines, when all records have been seen."""
        for _, _, record, score in sorted(self._kept, key=lambda one: one[:2], reverse=True):
            yield self.style.json(record, {"line": record.line, "text": record.text, **figures(score)}) \
                if self.style.as_json else row(score, record.text, record.line)


def chosen(style: Style, per: str, pairs: bool = False, choices_field: str | None = None, worst: int | None = None,
           color: bool = False, alternatives: int | None = None) -> "Records | Units | Pairs | Choices | Worst | Painted":
    """How results are written, by the options of `lm score`."""
    if pairs:
        return Pairs(style)
    if choices_field:
        return Choices(style)
    if worst:
        return Worst(style, worst)
    if color:
        return Painted(style)
    return Records(style) if per == "record" else Units(style, per, alternatives or 0)


def errand(scorer: Scorer, rows: "Records | Units | Pairs | Choices | Worst | Painted", alternatives: int) -> Errand:
    """The scoring of (records, …): of each record what is written, and logprob, tokens and bytes of its texts."""
    def work(part: tuple[list[Record], int]) -> list[tuple[str, list[tuple]]]:
        questions = [rows.questions(record) for record in part[0]]
        scores = iter(scorer.score([question for own in questions for question in own], rows.per, alternatives))
        found = [list(islice(scores, len(own))) for own in questions]
        return [(rows.written(record, own), [(score.logprob, score.tokens, score.bytes) for score in own])
                for record, own in zip(part[0], found)]

    return Errand(work, lambda part: said(part[0]), lambda words: (heard(words), 0))


# bits of surprisal from which a token has this background (of xterm's 256 colours)
SHADES = ((14.0, 203), (10.0, 209), (7.0, 215), (4.0, 222), (2.0, 230))


@dataclass
class Painted:
    """Each record's text with every token on a background that tells its surprisal: none below 2 bits, then from pale
    yellow to red; a token that is context only is dim. Control characters are shown as pictures of them."""

    style: Style
    per = "token"
    columns = ()

    def questions(self, record: Record) -> list[Question]:
        """As of `Records`."""
        return _behind(record, self.style)

    def written(self, record: Record, scores: Sequence[Score]) -> str:
        """The text in colour."""
        data, painted, run = record.text.encode("utf-8"), [], b""
        shade: int | None = 0
        for unit in scores[0].pieces or []:
            own, inside = _shade(unit.surprisal), data[unit.start:unit.start + 1] and data[unit.start] & 0xC0 == 0x80
            if own != shade and not inside:  # a character has one colour
                painted.append(_paint(run, shade))
                run, shade = b"", own
            run += data[unit.start:unit.end]
        return "".join((*painted, _paint(run, shade))) + "\n"


def _shade(bits: float | None) -> int | None:
    return None if bits is None else next((colour for least, colour in SHADES if bits >= least), 0)


def _paint(data: bytes, shade: int | None) -> str:
    text = "".join(chr(0x2400 + ord(letter)) if letter < " " and letter != "\t" else letter
                   for letter in data.decode("utf-8", "replace"))
    if not text or shade == 0:
        return text
    return f"\x1b[2m{text}\x1b[0m" if shade is None else f"\x1b[48;5;{shade};38;5;16m{text}\x1b[0m"


def legend() -> str:
    """What the colours stand for."""
    parts = (f"\x1b[48;5;{colour};38;5;16m {least:g} \x1b[0m" for least, colour in reversed(SHADES))
    return f"bits of surprisal from {' '.join(parts)}"
