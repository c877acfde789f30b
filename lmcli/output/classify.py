"""`lm classify` output: TSV or JSON Lines for labels of texts or tokens, and for answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcli.data import schema
from lmcli.data.output_file import escaped, json_line
from lmcli.data.rows import Record, RowReader, records_from_json, records_to_json
from lmcli.distributed.work_queue import RemoteTask
from lmcli.errors import UsageError
from lmcli.output.cells import cell, numbered, tsv_line
from lmcli.scoring.classifier import Classification, Classifier, LabelPrediction
from lmcli.scoring.question_answering import Answer, Candidate, QuestionAnswerer
from lmcli.terminal.tables import RowTable, named_columns

ANSWER_COLUMNS = ("answer", "score", "start", "end")


@dataclass(frozen=True)
class ClassifyOptions:
    """The options of `lm classify` that decide what is written."""

    per: str | None = None
    logits: bool = False
    top: int | None = None
    as_json: bool = False
    fields: tuple[str, ...] = ()


class LabelRows:
    """Labels of records, of pairs of texts, or of tokens.

    `columns` names the columns of TSV, `header` says whether they are written by default.
    Raises UsageError for what the model cannot label.
    """

    def __init__(self, classifier: Classifier, options: ClassifyOptions):
        self.classifier, self.options = classifier, options
        self.labels, self.per_token = classifier.labels, classifier.per_token
        fields, unit = options.fields, "token" if self.per_token else "record"
        self.pair: tuple[str, ...] = ()
        if len(fields) == 1 and fields[0].count(",") == 1:
            self.pair = tuple(fields[0].split(","))
        if self.pair and self.per_token:
            message = "this model labels the tokens of one text, not of a pair"
            raise UsageError(message, where="--field")
        if options.per not in (None, unit):
            message = f"this model labels each {unit}, not each {options.per}"
            raise UsageError(message, where="--per")
        self.top = options.top and min(options.top, len(self.labels))
        self.header = options.logits or self.per_token
        cells = self.labels if options.logits else numbered(["label", "probability"], self.top)
        if self.per_token:
            self.columns = ["line", "index", "piece", "start", "end", *cells]
        else:
            self.columns = [*cells, *(self.pair or ["text"])]

    def table(self, header: bool) -> RowTable:
        """Draws the rows on a terminal."""
        ids = [name for name in ("line", "index", "start", "end") if self.per_token]
        texts = ["piece"] if self.per_token else [*(self.pair or ["text"])]
        predicted = [name for name in self.columns if name not in (*ids, *texts)]
        names = [] if self.options.logits else predicted[::2]
        # the first label, its probability and the text are always drawn
        optional = [*predicted[2:], *ids]
        return RowTable(named_columns(self.columns, names, texts, optional), header)

    def reader(self, format_: str, on_error: str) -> RowReader:
        """Reads the text of each record, or its pair of texts."""
        return RowReader(format_, self.pair or self.options.fields, on_error)

    def process(self, records: Sequence[Record]) -> list[tuple[str, bool, str]]:
        """For each record its output, whether it was truncated, and what is wrong with it."""
        inputs = [self._texts(record) if self.pair else record.text for record in records]
        results = self.classifier.classify(inputs)
        return [_processed(self._format, *each) for each in zip(records, results)]

    def _texts(self, record: Record) -> tuple[str, str]:
        first, second = self.pair
        row = record.fields or {}
        return row.get(first, ""), row.get(second, "")

    def _format(self, record: Record, result: Classification) -> str:
        tokens = result.pieces or []
        if self.options.as_json:
            fields: dict[str, Any] = {} if self.pair else {"text": record.text}
            fields["truncated"] = result.truncated
            if self.per_token:
                fields["pieces"] = [
                    {"piece": t.piece, "start": t.start, "end": t.end, **self._fields(t)}
                    for t in tokens
                ]
            else:
                fields |= self._fields(result)
            return json_line(with_row(record, fields, {"text": record.text}))
        if not self.per_token:
            texts = self._texts(record) if self.pair else (record.text,)
            return tsv_line(*self._cells(result), *map(escaped, texts))
        return "".join(
            tsv_line(
                *(str(record.line), str(i), escaped(token.piece), str(token.start), str(token.end)),
                *self._cells(token),
            )
            for i, token in enumerate(tokens)
        )

    def _cells(self, prediction: LabelPrediction) -> list[str]:
        """The cells of one prediction; NA where there is no label."""
        if self.options.logits:
            return [f"{value:.7g}" for value in prediction.logits] or ["NA"] * len(self.labels)
        if self.top:
            pairs = prediction.top(self.top)
            cells = [text for label, p in pairs for text in (escaped(label), cell(p))]
            return cells or ["NA"] * (2 * self.top)
        labels = prediction.labels
        probabilities = ",".join(cell(prediction.probabilities[label]) for label in labels)
        return [escaped(",".join(labels)) or "NA", probabilities or "NA"]

    def _fields(self, prediction: LabelPrediction) -> dict[str, Any]:
        probabilities = prediction.probabilities
        return {
            "label": prediction.label,
            "probability": prediction.probability,
            "labels": prediction.labels,
            "probabilities": dict(prediction.top(self.top)) if self.top else probabilities,
            "logits": prediction.logits,
        }


class AnswerRows:
    """Answers to questions; with `top` the columns of that many answers.

    Records are rows with a context and a question, which two fields may name; start and end are
    bytes of the context. Raises UsageError for options of labels and for another number of fields.
    """

    header, per_token = True, False

    def __init__(self, question_answerer: QuestionAnswerer, options: ClassifyOptions):
        for option, value in (("--per", options.per), ("--logits", options.logits)):
            if value:
                raise UsageError("this model answers questions and gives no labels", where=option)
        if len(options.fields) not in (0, 2):
            raise UsageError(
                f"a question needs two fields, context and question; got {len(options.fields)}",
                where="--field",
            )
        self.question_answerer, self.options = question_answerer, options
        self.columns = [*numbered([*ANSWER_COLUMNS], options.top), "question"]

    def table(self, header: bool) -> RowTable:
        """Draws the rows on a terminal."""
        answers = [name for name in self.columns if name.startswith("answer")]
        positions = [name for name in self.columns if name.startswith(("start", "end"))]
        others = [name for name in self.columns[len(ANSWER_COLUMNS) : -1] if name not in positions]
        columns = named_columns(self.columns, (), [*answers, "question"], [*others, *positions])
        return RowTable(columns, header)

    def reader(self, format_: str, on_error: str) -> RowReader:
        """Reads the question of each record, with its context as an extra text."""
        return RowReader(format_, (), on_error, schema.QuestionFields(*self.options.fields))

    def process(self, records: Sequence[Record]) -> list[tuple[str, bool, str]]:
        """For each record its output, whether its question was truncated, and what is wrong.

        A bad record, which stands as an empty text, has no answer.
        """
        contexts = ["".join(record.extra_texts) for record in records]
        answers = self.question_answerer.answer([record.text for record in records], contexts)
        return [_processed(self._format, *each) for each in zip(records, answers)]

    def _format(self, record: Record, answer: Answer) -> str:
        top = self.options.top
        if self.options.as_json:
            fields = {
                **_answer_fields(answer),
                "no_answer": answer.no_answer,
                "truncated": answer.truncated,
            }
            if top:
                fields["candidates"] = [_answer_fields(each) for each in answer.candidates]
            return json_line(with_row(record, fields, {}))
        answers: list[Answer | Candidate] = [*answer.candidates] if top else [answer]
        answers += [Answer()] * ((top or 1) - len(answers))
        cells = [
            text
            for each in answers
            for text in (
                "NA" if each.text is None else escaped(each.text),
                *(cell(value) for value in (each.score, each.start, each.end)),
            )
        ]
        return tsv_line(*cells, escaped(record.text))


def _processed(write: Callable[..., str], record: Record, result: Any) -> tuple[str, bool, str]:
    """(output, truncated, problem) of a record; the output is empty with a problem."""
    problem = result.problem
    return "" if problem else write(record, result), result.truncated, problem


def _answer_fields(answer: Answer | Candidate) -> dict[str, Any]:
    return dict(zip(ANSWER_COLUMNS, (answer.text, answer.score, answer.start, answer.end)))


def with_row(
    record: Record, result: Mapping[str, Any], input_fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The record's own fields, then the result's.

    A field of the record that has a result's name becomes given_NAME, unless the result only
    repeats it (`input_fields`).
    """
    row = {}
    for key, value in (record.fields or {}).items():
        repeated = key in input_fields and value == input_fields[key]
        row[f"given_{key}" if key in result and not repeated else key] = value
    return {**row, **result}


def remote_task(rows: LabelRows | AnswerRows) -> RemoteTask:
    """The task of classifying (records, …): see `LabelRows.process`."""
    return RemoteTask(
        lambda part: rows.process(part[0]),
        lambda part: records_to_json(part[0]),
        lambda words: (records_from_json(words), 0),
        size=lambda part: len(part[0]) - part[1],
    )
