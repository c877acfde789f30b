"""What `lm classify` finds as it is written: rows of TSV or JSON Lines, for labels of texts or tokens, and for answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcli.errors import UsageError
from lmcli.inference.classification import Classified, Classifier, Verdict
from lmcli.inference.crew import Errand
from lmcli.inference.spans import Answer, Answerer, Candidate
from lmcli.text import asked
from lmcli.text.records import Reader, Record, escaped, heard, said


@dataclass(frozen=True)
class Wanted:
    """The options of the command that say what is written, as they were typed."""

    per: str | None = None
    logits: bool = False
    top: int | None = None
    as_json: bool = False
    fields: tuple[str, ...] = ()


class Labels:
    """Labels: `written` gives the lines of one record, `columns` their names.

    Raises UsageError for what the model does not label.
    """

    def __init__(self, classifier: Classifier, wanted: Wanted):
        given = "token" if classifier.per_token else "record"
        fields, per = wanted.fields, wanted.per
        self.pair = tuple(fields[0].split(",")) if len(fields) == 1 and fields[0].count(",") == 1 else ()
        if self.pair and classifier.per_token:
            raise UsageError("this model labels the tokens of one text, not of a pair", where="--field")
        if per and per != given:
            raise UsageError(f"this model labels each {given}, not each {per}", where="--per")
        self.classifier, self.per_token, self.labels = classifier, classifier.per_token, classifier.labels
        self.logits, self.top, self.as_json = wanted.logits, wanted.top and min(wanted.top, len(self.labels)), wanted.as_json
        self.header, self.fields = wanted.logits or self.per_token, self.pair or fields

    def reader(self, format_: str, on_error: str) -> Reader:
        """What reads the records."""
        return Reader(format_, self.fields, on_error)

    def results(self, records: Sequence[Record]) -> list[Classified]:
        """What is found of each record."""
        return self.classifier.classify([self._text(record) for record in records])

    def _text(self, record: Record) -> str | tuple[str, ...]:
        """What is labelled: the text of a record, or its pair of texts."""
        return tuple((record.fields or {}).get(name, "") for name in self.pair) if self.pair else record.text

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        found = self.labels if self.logits else _numbered(["label", "probability"], self.top)
        return ["line", "index", "piece", "start", "end", *found] if self.per_token else [*found, *(self.pair or ["text"])]

    def written(self, record: Record, found: Classified) -> str:
        """The lines of one record."""
        if self.as_json:
            return self._json(record, found)
        if not self.per_token:
            text = self._text(record) if self.pair else (record.text,)
            return "\t".join((*self._cells(found), *map(escaped, text))) + "\n"
        return "".join("\t".join((str(record.line), str(i), escaped(piece.piece), str(piece.start), str(piece.end),
                                  *self._cells(piece))) + "\n" for i, piece in enumerate(found.pieces))

    def _cells(self, verdict: Verdict) -> list[str]:
        """The columns of one verdict; NA for what there is not."""
        if self.logits:
            return [f"{value:.7g}" for value in verdict.logits] or ["NA"] * len(self.labels)
        if self.top:
            pairs = verdict.top(self.top) or [("NA", None)] * self.top
            return [cell for label, chance in pairs for cell in (escaped(label), _number(chance))]
        return [escaped(",".join(verdict.labels)) or "NA",
                ",".join(_number(verdict.probabilities[label]) for label in verdict.labels) or "NA"]

    def _json(self, record: Record, found: Classified) -> str:
        facts = {**({} if self.pair else {"text": record.text}), "truncated": found.truncated}
        if self.per_token:
            facts["pieces"] = [{"piece": piece.piece, "start": piece.start, "end": piece.end, **self._facts(piece)}
                               for piece in found.pieces]
        else:
            facts |= self._facts(found)
        return _line(record, facts, {"text": record.text})

    def _facts(self, verdict: Verdict) -> dict[str, Any]:
        chances = dict(verdict.top(self.top)) if self.top else verdict.probabilities
        return {"label": verdict.label, "probability": verdict.probability, "labels": verdict.labels,
                "probabilities": chances, "logits": verdict.logits}


class Answers:
    """Answers to questions: `answer score start end question`, or with `top` so many times the first four, bytes of the
    context for start and end. Records are rows with a context and a question, named by two fields where need be.

    Raises UsageError for what answers have not, and for another number of fields.
    """

    header, per_token = True, False

    def __init__(self, answerer: Answerer, wanted: Wanted):
        for option, given in (("--per", wanted.per), ("--logits", wanted.logits)):
            if given:
                raise UsageError("this model answers questions and gives no labels", where=option)
        if len(wanted.fields) not in (0, 2):
            raise UsageError(f"{len(wanted.fields)} fields were named, a question has 2: its context and itself",
                             where="--field")
        self.answerer, self.take = answerer, asked.QuestionFields(*wanted.fields)
        self.top, self.as_json = wanted.top, wanted.as_json

    def reader(self, format_: str, on_error: str) -> Reader:
        """What reads the records: a question each, with its context as a part."""
        return Reader(format_, (), on_error, self.take)

    def results(self, records: Sequence[Record]) -> list[Answer]:
        """The answer to each record; a bad one, which stands as an empty text, has none."""
        return self.answerer.answer([record.text for record in records], ["".join(record.parts) for record in records])

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [*_numbered(["answer", "score", "start", "end"], self.top), "question"]

    def written(self, record: Record, found: Answer) -> str:
        """The line of one record."""
        if self.as_json:
            return self._json(record, found)
        shown: list[Answer | Candidate] = [found]
        if self.top:
            shown = [*found.candidates, *[Answer()] * self.top][:self.top]
        cells = [cell for one in shown for cell in (
            "NA" if one.text is None else escaped(one.text), _number(one.score), _number(one.start), _number(one.end))]
        return "\t".join((*cells, escaped(record.text))) + "\n"

    def _json(self, record: Record, found: Answer) -> str:
        facts = {"answer": found.text, "score": found.score, "start": found.start, "end": found.end,
                 "no_answer": found.no_answer, "truncated": found.truncated}
        if self.top:
            facts["candidates"] = [{"answer": one.text, "score": one.score, "start": one.start, "end": one.end}
                                   for one in found.candidates]
        return _line(record, facts, {})


def errand(rows: Labels | Answers) -> Errand:
    """The labelling of (records, …): of each record what is written, and whether it was cut."""
    return Errand(lambda part: [(rows.written(record, found), found.truncated)
                                for record, found in zip(part[0], rows.results(part[0]))],
                  lambda part: said(part[0]), lambda words: (heard(words), 0))


def _numbered(names: list[str], top: int | None) -> list[str]:
    return [f"{name}_{k + 1}" for k in range(top) for name in names] if top else names


def _line(record: Record, facts: dict[str, Any], same: dict[str, Any]) -> str:
    """A line of JSON: the record's own fields, those named like a result as given_NAME unless they are the `same`."""
    given = {f"given_{key}" if key in facts and (key not in same or value != same[key]) else key: value
             for key, value in (record.fields or {}).items()}
    return json.dumps({**given, **facts}, ensure_ascii=False) + "\n"


def _number(value: float | None) -> str:
    return "NA" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
