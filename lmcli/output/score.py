"""`lm score` output: TSV, JSON Lines or a table for records, words and tokens."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lmcli.data.output_file import escaped, json_line
from lmcli.data.rows import Record
from lmcli.data.schema import join_prefix
from lmcli.output.cells import cell, numbered, tsv_line
from lmcli.scoring.scorer import NATS_PER_BIT, Score, ScoringInput, Unit
from lmcli.terminal.tables import Column, RowTable

SCORE_COLUMNS = ("logprob", "tokens", "bytes", "bits_per_byte")
PIECE_COLUMNS = ("index", "piece", "start", "end", "bytes", "logprob", "surprisal")
# columns that a terminal without room leaves out, the first ones last; others are always drawn
OPTIONAL = (
    *("rank", "entropy", "alternative", "record", "line", "logprobs", "logprob", "index"),
    *("by_byte", "by_token", "tokens", "bytes", "end", "start"),
)
TEXTS = ("text", "text_1", "text_2")


@dataclass(frozen=True)
class ScoreFormat:
    """How scores are written: JSON or TSV, and surprisal to the base "2" (bits) or "e" (nats).

    `methods` are the scorers'; `join` goes between a prefix and its continuation, see `joined`.
    `models` are the names of several models, `keep` the row's fields that are written, too. Only
    figures above and below the limits are written: bits per byte of a record, surprisal of a piece,
    those of the first model.
    """

    as_json: bool = False
    base: str = "2"
    methods: tuple[str, ...] = ("causal",)
    join: str | None = None
    models: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    above: float | None = None
    below: float | None = None

    @property
    def limited(self) -> bool:
        """True if some figures are not written."""
        return self.above is not None or self.below is not None

    def selects(self, value: float | None) -> bool:
        """True if a figure is within the limits; what is not scored is within none."""
        if not self.limited:
            return True
        return (
            value is not None
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def of_models(self, names: Sequence[str]) -> list[str]:
        """The names of columns: for several models each with a model's name."""
        return [f"{name}_{model}" for name in names for model in self.models] or [*names]

    def suffixes(self) -> list[str]:
        """What the names of a model's figures end in."""
        return [f"_{model}" for model in self.models] or [""]


def score_fields(score: Score, suffix: str = "") -> dict[str, Any]:
    """The figures of one text, as SCORE_COLUMNS names them."""
    return {f"{name}{suffix}": getattr(score, name) for name in SCORE_COLUMNS}


def score_cells(score: Score) -> list[str]:
    """The cells of SCORE_COLUMNS."""
    return [cell(value) for value in score_fields(score).values()]


def texts_with_scores(texts: Sequence[str], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The texts, each with its figures, as JSON."""
    return [{"text": text, **score_fields(score)} for text, score in zip(texts, scores)]


@dataclass
class RecordRows:
    """One row per record. Other forms override `questions`, `fields` (JSON) and `lines` (TSV).

    `scores` are those of the questions; of several models, that of each. With `has_line` a row
    begins with its line.
    """

    style: ScoreFormat
    per: str = "record"
    has_line: bool = False

    @property
    def figure_columns(self) -> Sequence[str]:
        """The columns after those that say which record it is."""
        figures = ("logprob", "bits_per_byte") if self.style.models else SCORE_COLUMNS
        return (*self.style.of_models(figures), "text")

    @property
    def numbers_records(self) -> bool:
        """True if a row has the number of its record and the fields that are kept."""
        return bool(self.style.models or self.style.keep)

    @property
    def columns(self) -> Sequence[str]:
        """The columns of TSV."""
        line = ("line",) if self.has_line else ()
        ids = ("record", *self._kept_names()) if self.numbers_records else line
        return (*ids, *self.figure_columns)

    def _kept_names(self) -> list[str]:
        """The names of the kept fields; given_NAME for one with the name of a result."""
        taken = {"record", "line", *self.figure_columns}
        return [f"given_{name}" if name in taken else name for name in self.style.keep]

    def table(self, header: bool) -> RowTable:
        """Draws the rows on a terminal."""
        kept_names = self._kept_names()
        return RowTable([self._column(name, name in kept_names) for name in self.columns], header)

    def _column(self, name: str, kept: bool) -> Column:
        stem = next((each for each in OPTIONAL if f"{name}_".startswith(f"{each}_")), "")
        rank = 0 if kept or not stem else 100 * (OPTIONAL.index(stem) + 1)
        if kept or name in ("piece", "context"):
            return Column(name, rank, "name")
        if stem == "alternative":  # one after the other leaves
            number = name.removeprefix("alternative_")
            return Column(f"alt. {number}", rank + int(number), "name")
        title = name.replace("bits_per_byte_", "bits/byte ")
        short = title.removeprefix("surprisal_" if self.style.models else "")
        return Column((title, short), rank, "text" if name in TEXTS else "number")

    def questions(self, record: Record) -> list[ScoringInput]:
        """What is scored for a record.

        Its first extra text, if any, is a prefix or a source, and the second is what joins them.
        """
        before, *joins = record.extra_texts or ("",)
        if self.style.methods[0] == "conditional":
            return [ScoringInput(record.text, source=before)]
        join = joins[0] if joins else self.style.join
        return [ScoringInput(join_prefix(before, record.text, join), before)]

    def format(self, record: Record, scores: Sequence[Score]) -> Any:
        """The output for one record: one line of JSON, or any number of lines of TSV."""
        if not self.style.as_json:
            ids = self.ids(record)
            return "".join(tsv_line(*ids, *cells) for cells in self.lines(record, scores))
        return self.json(record, self.fields(record, scores)) if self.selects(scores) else ""

    def selects(self, scores: Sequence[Score]) -> bool:
        """True if the record is written at all."""
        return self.style.selects(scores[0].bits_per_byte if scores else None)

    def json(self, record: Record, fields: dict[str, Any]) -> str:
        """A line of JSON with the row's fields, or those that are kept, and the result's."""
        row, methods = record.fields or {}, self.style.methods
        if self.style.keep:
            row = dict(zip(self._kept_names(), map(row.get, self.style.keep)))
        if self.numbers_records:
            row = {"record": record.number, **row}
        named = zip(self.style.suffixes(), methods)
        return json_line({**row, **fields, **{f"method{name}": method for name, method in named}})

    def ids(self, record: Record) -> list[str]:
        """The first cells of a row, which say which record it is."""
        if self.numbers_records:
            row = record.fields or {}
            return [str(record.number), *(_kept_cell(row.get(name)) for name in self.style.keep)]
        return [str(record.line)] if self.has_line else []

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The JSON fields for one record."""
        named = zip(self.style.suffixes(), scores)
        figures = [score_fields(score, suffix) for suffix, score in named]
        line = {"line": record.line} if self.has_line and not self.numbers_records else {}
        return {**line, "text": record.text, **{k: v for each in figures for k, v in each.items()}}

    def lines(self, record: Record, scores: Sequence[Score]) -> list[list[str]]:
        """The TSV cells for one record, after `ids`, in lines."""
        if not self.selects(scores):
            return []
        if not self.style.models:
            return [[*score_cells(scores[0]), escaped(record.text)]]
        figures = [cell(score.logprob) for score in scores]
        return [[*figures, *(cell(score.bits_per_byte) for score in scores), escaped(record.text)]]

    def count(self, record: Record, scores: Sequence[Score]) -> None:
        """Notes a record for `summary`; called in input order."""

    def opened(self, models: Sequence[str]) -> AbstractContextManager[None]:
        """Writes other files of these models while the block runs; here none."""
        return nullcontext()

    def written(self, output: Any) -> str:
        """What is written at once of the output for a record; called in input order."""
        return output

    def remaining(self) -> Iterator[str]:
        """The output that follows the last record."""
        return iter(())

    def summary(self) -> str:
        """A line for standard error at the end; empty for none."""
        return ""


def _kept_cell(value: Any) -> str:
    """The value of a field as a TSV cell: a text as it is, others as JSON has them."""
    if value is None:
        return "NA"
    return escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@dataclass
class PieceRows(RecordRows):
    """One row per word or token, none for a record without words; in JSON one line per record.

    With `alternatives` each token also has its rank, the entropy and that many likeliest tokens.
    """

    alternatives: int = 0
    has_line: bool = True

    @property
    def figure_columns(self) -> Sequence[str]:
        """Where the piece is, then its figures."""
        if self.style.models:
            return (*PIECE_COLUMNS[:-2], *self.style.of_models(["surprisal"]))
        more = ["rank", "entropy", *numbered(["alternative", "logprob"], self.alternatives)]
        return (*PIECE_COLUMNS, *(more if self.alternatives else ()))

    def table(self, header: bool) -> RowTable:
        """As for records; an alternative and its probability stand in one cell."""
        if self.per != "token":
            return super().table(header)
        names = [name for name in self.columns if not name.startswith("logprob_")]
        kept_names = self._kept_names()
        return RowTable(
            [self._column(name, name in kept_names) for name in names], header, self._merged
        )

    def _merged(self, cells: list[str]) -> list[str]:
        merged: list[str] = []
        for name, text in zip(self.columns, cells):
            if name.startswith("logprob_"):  # of the alternative before
                merged[-1] += "" if text == "NA" else f" {math.exp(float(text)):.0%}"
            else:
                is_piece = name == "piece" or name.startswith("alternative_")
                merged.append(text.replace(" ", "␣") if is_piece else text)
        return merged

    def pieces(self, scores: Sequence[Score]) -> list[tuple[int, list[Unit]]]:
        """The pieces to write: the number of each, and the piece as each model has it."""
        of_models = [score.pieces or [] for score in scores]
        return [
            (i, list(units))
            for i, units in enumerate(zip(*of_models, strict=True))
            if self.style.selects(self._surprisal(units[0]))
        ]

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The figures of the record, then of its pieces."""
        pieces = [self.piece_fields(units) for _, units in self.pieces(scores)]
        fields = super().fields(record, scores)
        fields.pop("line", None)
        return {**fields, "pieces": pieces}

    def selects(self, scores: Sequence[Score]) -> bool:
        """True if a piece is written."""
        return not self.style.limited or bool(self.pieces(scores))

    def lines(self, record: Record, scores: Sequence[Score]) -> list[list[str]]:
        """A line for each piece."""
        return [[str(i), *self.cells(units)] for i, units in self.pieces(scores)]

    def _surprisal(self, unit: Unit) -> float | None:
        if self.style.base == "e" and unit.logprob is not None:
            return -unit.logprob
        return unit.surprisal

    def piece_fields(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The JSON fields of a piece, as each model has it."""
        first = units[0]
        fields: dict[str, Any] = {name: getattr(first, name) for name in PIECE_COLUMNS[1:-2]}
        for suffix, unit in zip(self.style.suffixes(), units):
            fields[f"logprob{suffix}"] = unit.logprob
            fields[f"surprisal{suffix}"] = self._surprisal(unit)
        if self.alternatives:
            fields["rank"], fields["entropy"] = first.rank, first.entropy
            if self.style.base == "e" and first.entropy is not None:
                fields["entropy"] = first.entropy * NATS_PER_BIT
            fields["alternatives"] = [
                {"piece": piece, "logprob": logprob} for piece, logprob in first.alternatives or ()
            ]
        return fields

    def cells(self, units: Sequence[Unit]) -> list[str]:
        """The TSV cells of a piece after its index."""
        fields, first = self.piece_fields(units), units[0]
        cells = [escaped(first.piece), *(cell(fields[name]) for name in PIECE_COLUMNS[2:-2])]
        if self.style.models:
            return cells + [cell(fields[f"surprisal{name}"]) for name in self.style.suffixes()]
        cells += [cell(fields["logprob"]), cell(fields["surprisal"])]
        if self.alternatives:
            cells += [cell(first.rank), cell(fields["entropy"])]
            for other in (first.alternatives or [])[: self.alternatives]:
                cells += [escaped(other.piece), cell(other.logprob)]
        return cells + ["NA"] * (len(self.figure_columns) - 1 - len(cells))
