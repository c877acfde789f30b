"""Records to evaluate, and predictions for them: from files, or from fields of the records."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from lmcli.data.rows import (
    TABLES,
    Record,
    RowReader,
    column_names,
    display_name,
    file_format,
    parse_json_row,
    parse_row,
    split_cells,
)
from lmcli.data.schema import (
    TaskSchema,
    answer_texts,
    check_text,
    field_names,
    find_pair_schema,
    first_present,
    matching_label,
    parse_labels,
    row_field,
    row_labels,
    row_texts,
)
from lmcli.errors import UsageError, UserError
from lmcli.text.characters import RepeatedKey

Other = TypeVar("Other")
Prediction = tuple[str, ...]  # labels, or one text; () for none

# how predictions for pairs may be written: is the first text the likelier one?
PAIR_PREDICTIONS = {"true": ("true",), "1": ("true",), "false": ("false",), "0": ("false",)}
NO_PREDICTION = ("", "na", "none")


class EvalRecord(NamedTuple):
    """One record: `inputs` for a model (() if the data has none) and the correct `references`.

    `predicted` is the prediction that its own row holds, None without one.
    """

    inputs: tuple[str, ...]
    references: tuple[str, ...]
    predicted: Prediction | None
    row: dict[str, Any]
    file: str
    line: int

    @property
    def location(self) -> str:
        """Its file and line."""
        return f"{display_name(self.file)}, line {self.line}"


@dataclass(frozen=True)
class EvalDataset:
    """The records of files, read anew in each iteration.

    `references` is a file with the references of the records in `files`, or of records without
    inputs. `fields` name the inputs, concatenated unless `paired`; `reference` and `prediction`
    name fields; without names the schema's are used. `by` names a field that all rows must have.
    `labels` are those of the models.
    """

    files: list[str]
    schema: TaskSchema
    format: str = "auto"
    references: str | None = None
    fields: tuple[str, ...] = ()
    paired: bool = False
    reference: str | None = None
    prediction: str | None = None
    multi_label: bool = False
    by: str | None = None
    labels: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[EvalRecord]:
        """Raises UserError (file and line) for a bad record, and for files of different lengths."""
        if not self.references:
            return map(self._eval_record, self._records(self.files, self.format))
        if not self.files:
            return map(self._eval_record, self._records([self.references], self.format))
        rows = self._records(self.files, self.format)
        inputs = (self._eval_record(record, with_references=False) for record in rows)
        references = map(self._eval_record, self._records([self.references], "auto"))
        return (
            record._replace(references=other.references)
            for record, other in zip_records(inputs, references, self.references, "references")
        )

    def batches(self, size: int) -> Iterator[list[EvalRecord]]:
        """Lists of `size` records."""
        records = iter(self)
        while batch := list(islice(records, size)):
            yield batch

    def read_predictions(self, file: str) -> Iterator[tuple[Prediction, str]]:
        """(prediction, file and line) of each line of a file: plain text, JSON Lines, TSV or CSV.

        What `lm classify` and `lm generate` write is read too. Raises UserError for a row without a
        prediction.
        """
        format: PredictionFormat | None = None
        suffix = file_format(file, "auto")
        # a row of CSV may have several lines; whether TSV has a header, its first line tells
        for record in self._records([file], suffix if suffix in ("csv", "jsonl") else "text"):
            location = f"{display_name(file)}, line {record.line}"
            try:
                if format is None:
                    format = _prediction_format(
                        suffix, record.text, self.schema, self.prediction, record.fields is not None
                    )
                    if format.has_header:
                        continue
                if not record.text.strip() and format.format == "jsonl" and record.fields is None:
                    continue
                value, name = format.value(record.text if record.fields is None else record.fields)
                prediction = parse_prediction(value, self.schema.kind, self.multi_label, name)
            except ValueError as error:
                hint = "--prediction-field names another"
                raise UserError(str(error), where=location, hint=hint) from error
            yield prediction, location

    def _records(self, files: Sequence[str], format: str) -> Iterator[Record]:
        try:
            for batch in _whole_rows(format).batches(files):
                yield from batch
        except UserError as error:
            hint = error.hint and "every record counts: correct the line or take it out"
            raise UserError(error.what, error.where, hint) from error

    def _eval_record(self, record: Record, with_references: bool = True) -> EvalRecord:
        """The record of a row or line; without references, if they are in another file."""
        row, predicted = record.fields, None
        references: tuple[str, ...] = ()
        try:
            if row is not None:
                inputs = self._inputs(row)
                references = self._references(row) if with_references else ()
                predicted = self._predicted(row)
            elif with_references:
                inputs, references = (), self._references_in({"text": record.text}, "text")
            else:
                inputs = (record.text,)
            row = row or {}
            if self.by and self.by not in row:
                raise ValueError(f"no field {self.by!r} to group by; fields: {field_names(row)}")
        except ValueError as error:
            raise self._bad(record, error) from error
        return EvalRecord(inputs, references, predicted, row, record.file, record.line)

    def _bad(self, record: Record, error: ValueError) -> UserError:
        pairs, hint = self.schema.kind == "pairs", None
        if record.fields is not None:
            hint = "--field and --reference-field name others"
            if pairs:
                hint = "--field names both of a pair"
        elif self.by or pairs:
            hint = "it is plain text; --format jsonl or tsv reads it as rows"
        where = f"{display_name(record.file)}, line {record.line}"
        return UserError(str(error), where=where, hint=hint)

    def _composed_pair(self, row: dict) -> tuple[str, str] | None:
        """The source and target of messages or instructions, unless fields are named."""
        if self.schema.kind != "texts" or self.fields or self.reference:
            return None
        pair = find_pair_schema(row)
        return pair.texts(row) if pair and pair.composed else None

    def _inputs(self, row: dict) -> tuple[str, ...]:
        if pair := self._composed_pair(row):
            return pair[:1]
        pairs = self.schema.kind == "pairs"
        names = self.fields or first_present(row, self.schema.inputs)
        if not names and pairs:
            raise ValueError(f"no pair of fields among {field_names(row)}")
        texts = tuple(row_field(row, name) for name in names)
        separate = self.paired or pairs or self.schema.kind == "answers"
        return texts if separate or not texts else ("".join(texts),)

    def _references(self, row: dict) -> tuple[str, ...]:
        if self.schema.kind == "pairs":
            return ()
        if pair := self._composed_pair(row):
            return pair[1:]
        if self.reference and self.reference not in row:
            raise ValueError(f"no field {self.reference!r}; fields: {field_names(row)}")
        known = self.schema.references
        name = self.reference or next((name for name in known if name in row), None)
        if name is None:
            raise ValueError(
                f"no reference: none of the fields {', '.join(map(repr, known))} "
                f"among {field_names(row)}"
            )
        return self._references_in(row, name)

    def _references_in(self, row: dict, name: str) -> tuple[str, ...]:
        if self.schema.kind == "labels":
            names = row_labels(row, name, self.multi_label)
            return tuple(matching_label(label, self.labels) for label in names)
        return answer_texts(row, name) if self.schema.kind == "answers" else row_texts(row, name)

    def _predicted(self, row: dict) -> Prediction | None:
        """The prediction in a row: in the field `prediction`, or as a command wrote it."""
        kind, known = self.schema.kind, self.schema.predictions
        has_output = {
            "labels": "given_label" in row or "given_labels" in row,
            "texts": False,
            "answers": "answers" in row and "answer" in row,
            "pairs": True,
        }[kind]
        names = known if has_output else ("prediction",)
        name = self.prediction or next((name for name in names if name in row), None)
        if name is None or name not in row:
            return None
        return parse_prediction(row[name], kind, self.multi_label, name)


def _whole_rows(format: str, on_error: str = "stop") -> RowReader:
    """A reader whose records have the text of plain lines only: of rows `fields` are used."""
    return RowReader(
        format, on_error=on_error, extract=lambda row: (row if isinstance(row, str) else "", ())
    )


def first_record(files: Iterable[str], format: str) -> Record | None:
    """The first record of some files, or None; errors are left to the first real pass."""
    return next(chain.from_iterable(_whole_rows(format, "blank").batches(files)), None)


@dataclass(frozen=True)
class PredictionFormat:
    """How a file holds predictions: the first of `fields` that is in a row is used."""

    format: str
    fields: tuple[str, ...]
    columns: tuple[str, ...] = ()
    has_header: bool = False

    def value(self, line: str | dict[str, Any]) -> tuple[Any, str]:
        """(the prediction on a line or in a row as it is written, the field that holds it)."""
        row = line
        if isinstance(line, str) and self.format in TABLES and not self.has_header:
            row = {"label": split_cells(line, self.format)[0]}
        elif isinstance(line, str):
            row = parse_row(line, self.format, self.columns)
        if isinstance(row, str):
            return row, "text"
        name = next((name for name in self.fields if name in row), None)
        if name is None:
            raise ValueError(
                f"no prediction: none of the fields {', '.join(map(repr, self.fields))} "
                f"among {field_names(row)}"
            )
        return None if self.format in TABLES and row[name] == "NA" else row[name], name


def _prediction_format(
    format: str, first_line: str, schema: TaskSchema, field: str | None, has_rows: bool
) -> PredictionFormat:
    """The format of a file of predictions, from that of its name and its first line.

    `has_rows`: its lines are read as rows already.
    """
    fields = (field,) if field else schema.predictions
    if has_rows:
        return PredictionFormat(format, fields)
    if format == "text" and first_line.startswith("{"):
        try:
            parse_json_row(first_line)
            format = "jsonl"
        except RepeatedKey:
            raise
        except ValueError:
            pass
    has_names = any(name in split_cells(first_line, "tsv") for name in fields)
    if format == "text" and "\t" in first_line and (has_names or schema.kind == "labels"):
        format = "tsv"
    if format == "tsv" and schema.kind == "labels" and not has_names:
        # as `lm classify` writes them: label, probability, text
        return PredictionFormat(format, ("label",))
    columns = tuple(column_names(first_line, format)) if format in TABLES else ()
    return PredictionFormat(format, fields, columns, has_header=format in TABLES)


def parse_prediction(value: Any, kind: str, multi_label: bool, name: str) -> Prediction:
    """The prediction in the value of field `name`; () for none.

    Of a pair it is "true" where the first text is the likelier one. Raises ValueError for values
    of another kind.
    """
    if kind == "labels":
        return parse_labels(value, name, multi_label)
    if kind == "pairs":
        text = str("" if value is None else value).lower()
        if text not in NO_PREDICTION and text not in PAIR_PREDICTIONS:
            raise ValueError(f"field {name!r} has {value!r}, which is neither true nor false")
        return PAIR_PREDICTIONS.get(text, ())
    if value is None or value == "":
        return ()
    return (check_text(value, name, {name: value}),)


def zip_records(
    records: Iterable[EvalRecord], others: Iterable[Other], file: str, what: str
) -> Iterator[tuple[EvalRecord, Other]]:
    """Records with what `file` holds for them: references or predictions (`what`).

    Raises UserError with both counts and the first line without a counterpart.
    """
    count, records, others = 0, iter(records), iter(others)
    while True:
        record, other = next(records, None), next(others, None)
        if record is not None and other is not None:
            count += 1
            yield record, other
            continue
        if record is None and other is None:
            return
        rest = 1 + sum(1 for _ in (records if other is None else others))
        if record is not None:
            present, total, missing, location = count, count + rest, "one", record.location
        else:
            present, total, missing = count + rest, count, "a record"
            extra: Any = other  # an EvalRecord, or (prediction, location)
            location = extra.location if isinstance(extra, EvalRecord) else extra[1]
        raise UserError(
            f"{present:,} {what} for {total:,} records",
            where=display_name(file),
            hint=f"the first without {missing} is {location}",
        )


def with_predictions(
    data: EvalDataset, file: str | None
) -> Iterator[tuple[EvalRecord, Prediction]]:
    """Each record with its prediction in a file, or without a file in its own row.

    Raises UsageError when rows have none, UserError when there are more or fewer predictions than
    records.
    """
    if file is not None:
        lines = zip_records(data, data.read_predictions(file), file, "predictions")
        yield from ((record, prediction) for record, (prediction, _) in lines)
        return
    for record in data:
        if record.predicted is None:
            raise UsageError(
                "this record has no prediction",
                where=record.location,
                hint="-m DIR makes predictions, --predictions FILE reads them, "
                "--prediction-field names the field that has them",
            )
        yield record, record.predicted
