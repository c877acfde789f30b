"""Labelled records and predictions for them, read side by side: what was asked, what is right, what was said."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from lmcli.errors import UsageError, UserError
from lmcli.text.asked import PAIR_FIELDS
from lmcli.text.fields import known_pair, row_field
from lmcli.text.records import SEPARATED, Reader, Record, cells, file_format, json_row, shown


@dataclass(frozen=True)
class Form:
    """Which fields of a row hold what; the first one, or the first set of inputs, that a row has is taken. `kind` is what
    is right: labels, texts, answers or, of a pair of texts, the first."""

    kind: str
    inputs: tuple[tuple[str, ...], ...]
    references: tuple[str, ...]
    predictions: tuple[str, ...]


# `lm classify --json` calls a label that the record had given_label, and its own label; the others say text or answer
FORMS = {
    "labels": Form("labels", (("text",),), ("given_labels", "given_label", "labels", "label"),
                   ("prediction", "labels", "label")),
    "texts": Form("texts", (("source",), ("prompt",), ("document",), ("article",)),
                  ("target", "completion", "summary", "highlights"), ("prediction", "text")),
    "answers": Form("answers", (("question", "context"),), ("answers", "answer"),
                    ("prediction", "prediction_text", "answer", "text")),
    "pairs": Form("pairs", PAIR_FIELDS, (), ("prediction", "first_likelier"))}
SAID = ("messages", "instruction")  # a first field by which rows are known whose texts are put together


class Labelled(NamedTuple):
    """One record: what a model is to read (() where the data does not say), the labels or texts that are right, what its
    own row says was predicted (None: it does not), its row, and where it stands."""

    inputs: tuple[str, ...]
    references: tuple[str, ...]
    predicted: tuple[str, ...] | None
    row: dict
    file: str
    line: int

    @property
    def place(self) -> str:
        """Its file and line."""
        return f"{shown(self.file)}, line {self.line}"


@dataclass
class Data:
    """Labelled records in files, as often as they are asked for. `references` is a file with what is right, beside files
    with what was asked, or alone. `fields` are the inputs, put together unless `paired`, `reference` is the field of what
    is right, where their names are not among the form's. With `several` a text of labels has commas between them."""

    files: list[str]
    form: Form
    format: str = "auto"
    references: str | None = None
    fields: tuple[str, ...] = ()
    paired: bool = False
    reference: str | None = None
    prediction: str | None = None
    several: bool = False
    by: str | None = None
    names: dict[str, str] = field(default_factory=dict)  # files that have another name in messages

    def __iter__(self) -> Iterator[Labelled]:
        """Raises UserError (file and line) for a record that is none, and where two files are not of one length."""
        if not self.references:
            return (self._labelled(record) for record in self._records(self.files, self.format))
        if not self.files:
            return (self._labelled(record) for record in self._records([self.references], self.format))
        right = (self._labelled(record) for record in self._records([self.references], "auto"))
        asked = (self._labelled(record, given=True) for record in self._records(self.files, self.format))
        return (one._replace(references=two.references) for one, two in beside(asked, right, self.references, "references"))

    def parts(self, size: int) -> Iterator[list[Labelled]]:
        """Lists of so many records."""
        records = iter(self)
        while part := list(islice(records, size)):
            yield part

    def _records(self, files: list[str], layout: str) -> Iterator[Record]:
        reader = Reader(layout, take=lambda row: (row if isinstance(row, str) else "", ()))
        try:
            for batch in reader.batches(files):
                for record in batch:
                    record.file = self.names.get(record.file, record.file)
                yield from batch
        except UserError as error:
            where = error.where or ""
            for file, name in self.names.items():
                where = where.replace(file, name)
            hint = error.hint and "every record counts: mend the line or take it out"
            raise UserError(error.what, where, hint) from error

    def name_of(self, file: str) -> str:
        """A file as messages call it."""
        return self.names.get(file, shown(file))

    def _labelled(self, record: Record, given: bool = False) -> Labelled:
        """A record; with `given` what is right stands elsewhere."""
        row = record.fields
        try:
            if row is None:
                found = Labelled((record.text,) if given else (), () if given else self._right(record.text), None, {},
                                 record.file, record.line)
            else:
                found = Labelled(self._inputs(row), () if given else self._reference(row), self._predicted(row), row,
                                 record.file, record.line)
            if self.by and self.by not in found.row:
                raise ValueError(f"no field {self.by!r} to group by; fields: {', '.join(map(repr, found.row)) or 'none'}")
            return found
        except ValueError as error:
            raise UserError(str(error), where=f"{shown(record.file)}, line {record.line}", hint=self._help(row)) from error

    def _help(self, row: dict | None) -> str | None:
        if row is None:
            rows = self.by or self.form.kind == "pairs"
            return "it is plain text; --format jsonl or tsv reads it as rows" if rows else None
        return "--field names both of a pair" if self.form.kind == "pairs" else "--field and --reference-field name others"

    def _sides(self, row: dict) -> tuple[str, str] | None:
        """What was said and what is to follow, of rows of messages or instructions, where no field is named."""
        pair = None if self.form.kind != "texts" or self.fields or self.reference else known_pair(row)
        return pair.sides(row) if pair and pair.fields[0] in SAID else None

    def _inputs(self, row: dict) -> tuple[str, ...]:
        if sides := self._sides(row):
            return sides[:1]
        names = self.fields or next((names for names in self.form.inputs if all(name in row for name in names)), None)
        if names is None and self.form.kind == "pairs":
            raise ValueError(f"no pair of fields among {', '.join(map(repr, row)) or 'none'}")
        found = () if names is None else tuple(row_field(row, name) for name in names)
        return found if self.paired or self.form.kind in ("answers", "pairs") or not found else ("".join(found),)

    def _reference(self, row: dict) -> tuple[str, ...]:
        if self.form.kind == "pairs":
            return ()
        if sides := self._sides(row):
            return sides[1:]
        if self.reference and self.reference not in row:
            raise ValueError(f"no field {self.reference!r}; fields: {', '.join(map(repr, row)) or 'none'}")
        name = self.reference or next((name for name in self.form.references if name in row), None)
        if name is None:
            raise ValueError(f"nothing that is right: none of the fields {', '.join(map(repr, self.form.references))} among "
                             f"{', '.join(map(repr, row)) or 'none'}")
        return self._right(row[name], name)

    def _right(self, value: Any, name: str = "text") -> tuple[str, ...]:
        if self.form.kind == "labels":
            found = labels(value, self.several, name)
            if not found and not self.several:
                raise ValueError(f"field {name!r} has no label")
            return found
        if self.form.kind == "answers":
            return answers(value, name)
        return texts(value, name)

    def _predicted(self, row: dict) -> tuple[str, ...] | None:
        """What the row says was predicted: in a field `prediction`, or where a command wrote it beside what is right."""
        written = {"labels": "given_label" in row or "given_labels" in row, "texts": False,
                   "answers": "answers" in row and "answer" in row, "pairs": True}[self.form.kind]
        known = self.form.predictions if written else ("prediction",)
        name = self.prediction or next((name for name in known if name in row), None)
        return None if name is None or name not in row else said(row[name], self.form.kind, self.several, name)

    def of_file(self, file: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """(what was predicted, its place) of each line of a file of predictions: plain lines, rows of JSON, TSV or CSV, or
        as `lm classify` and `lm generate` write them.

        Raises UserError for a row without a prediction.
        """
        form = None
        for record in self._records([file], "text"):
            if form is None:
                form = self._layout(file, record.text)
                if form.header:
                    continue
            place = f"{shown(file)}, line {record.line}"
            try:
                yield form.prediction(record.text), place
            except ValueError as error:
                raise UserError(str(error), where=place, hint="--prediction-field names another") from error

    def _layout(self, file: str, first: str) -> "_Layout":
        """How a file of predictions is written, by its name and its first line."""
        layout = file_format(file, "auto")
        names = (self.prediction,) if self.prediction else self.form.predictions
        if layout == "text" and first.startswith("{"):
            try:
                json_row(first)
                layout = "jsonl"
            except ValueError:
                pass
        named = any(name in cells(first, "tsv") for name in names)
        if layout == "text" and "\t" in first and (named or self.form.kind == "labels"):
            layout = "tsv"
        header = cells(first, layout) if layout in SEPARATED else []
        if layout == "tsv" and self.form.kind == "labels" and not named:
            header = []  # as lm classify writes it: label, probability, text
        return _Layout(layout, header, names, self.form.kind, self.several)


@dataclass
class _Layout:
    """How a file holds predictions; a `header` names columns, without one the first column of a table is taken."""

    layout: str
    header: list[str]
    names: tuple[str, ...]
    kind: str
    several: bool

    def prediction(self, line: str) -> tuple[str, ...]:
        if self.layout == "text":
            return said(line, self.kind, self.several, "text")
        if self.layout in SEPARATED and not self.header:
            cell = cells(line, self.layout)[0]
            return said(None if cell == "NA" else cell, self.kind, self.several, "label")
        row = json_row(line) if self.layout == "jsonl" else {
            name: None if cell == "NA" else cell for name, cell in zip(self.header, cells(line, self.layout))}
        name = next((name for name in self.names if name in row), None)
        if name is None:
            raise ValueError(f"no prediction: none of the fields {', '.join(map(repr, self.names))} among "
                             f"{', '.join(map(repr, row)) or 'none'}")
        return said(row[name], self.kind, self.several, name)


def beside(records: Iterable[Labelled], others: Iterable[Any], file: str, what: str) -> Iterator[tuple[Labelled, Any]]:
    """Records with what stands in `file` for them, `what` in the plural.

    Raises UserError with both counts and the first line that has no partner.
    """
    count, records, others = 0, iter(records), iter(others)
    while True:
        one, other = next(records, None), next(others, None)
        if one is None and other is None:
            return
        if one is None or other is None:
            more = 1 + sum(1 for _ in (records if other is None else others))
            place = one.place if one else other.place if isinstance(other, Labelled) else other[1]
            counts = (count, count + more) if other is None else (count + more, count)
            raise UserError(f"{counts[0]:,} {what} for {counts[1]:,} records", where=shown(file),
                            hint=f"the first without {'a record' if one is None else 'one'} is {place}")
        count += 1
        yield one, other


def predicted(data: Data, file: str | None) -> Iterator[tuple[Labelled, tuple[str, ...]]]:
    """Each record with what a file says was predicted for it; without a file with what its own row says.

    Raises UsageError when rows do not say it, UserError where records and predictions are not as many.
    """
    if file is not None:
        yield from ((record, given) for record, (given, _) in beside(data, data.of_file(file), file, "predictions"))
        return
    for record in data:
        if record.predicted is None:
            raise UsageError("nothing was predicted for this record", where=record.place, hint="-m DIR makes predictions, "
                             "--predictions FILE reads them, --prediction-field names the field that has them")
        yield record, record.predicted


def labels(value: Any, several: bool, name: str) -> tuple[str, ...]:
    """The labels that a field holds; ValueError for what is no label, and for two where there is to be one."""
    if isinstance(value, str) and several:
        value = [part for part in value.split(",") if part.strip()]
    found = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    if any(isinstance(one, bool) or not isinstance(one, str | int) for one in found):
        raise ValueError(f"field {name!r} has {json.dumps(value, ensure_ascii=False)[:60]}, which is no label")
    if len(found) > 1 and not several:
        raise ValueError(f"field {name!r} has {len(found)} labels, where the first record has one")
    return tuple(str(one).strip() for one in found)


def texts(value: Any, name: str) -> tuple[str, ...]:
    """The texts that are right: one, or a list of them."""
    found = value if isinstance(value, list) and value else [value]
    return tuple(row_field({name: text}, name) for text in found)


def answers(value: Any, name: str) -> tuple[str, ...]:
    """The texts of answers as SQuAD has them, a list of objects or an object of lists, or a list of texts; in a table or a
    plain line JSON or one text. () when there is no answer."""
    if isinstance(value, str):
        if not value.startswith(("[", "{")):
            return (value,) if value else ()
        try:
            value = json.loads(value)
        except ValueError:
            return (value,)
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} has no list of answers")
    found = [one.get("text") if isinstance(one, dict) else one for one in value]
    return tuple(row_field({name: text}, name) for text in found)


def said(value: Any, kind: str, several: bool, name: str) -> tuple[str, ...]:
    """What was predicted: labels, or one text; () when nothing was. A pair has "true" where the first is the likelier."""
    if kind == "labels":
        return labels(value, several, name)
    if kind == "pairs":
        known = {"true": "true", "1": "true", "false": "false", "0": "false", "na": "", "": "", "none": ""}
        if (found := known.get(str("" if value is None else value).lower())) is None:
            raise ValueError(f"field {name!r} has {value!r}, which is neither true nor false")
        return (found,) if found else ()
    if value is None or value == "":
        return ()
    return (row_field({name: value}, name),)


def first_row(files: Iterable[str], layout: str) -> Record | None:
    """The first record of some files, as its row or its plain text; None when there is none. Bad ones are told later."""
    reader = Reader(layout, on_error="blank", take=lambda row: (row if isinstance(row, str) else "", ()))
    return next(chain.from_iterable(reader.batches(list(files))), None)
