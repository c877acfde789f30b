"""`lm score` output: TSV or JSON Lines for records, words, tokens, pairs, choices; colored text."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lmcli.data.output_file import escaped, json_line
from lmcli.data.rows import Record, records_from_json, records_to_json
from lmcli.data.schema import join_prefix
from lmcli.distributed.work_queue import RemoteTask
from lmcli.evaluation.intervals import wilson_interval
from lmcli.output.cells import cell, numbered, paint, shade, tsv_line
from lmcli.scoring.scorer import NATS_PER_BIT, Score, Scorer, ScoringInput, Unit, choose
from lmcli.text.characters import visible

SCORE_COLUMNS = ("logprob", "tokens", "bytes", "bits_per_byte")
PIECE_COLUMNS = ("line", "index", "piece", "start", "end", "bytes", "logprob", "surprisal")


@dataclass(frozen=True)
class ScoreFormat:
    """How scores are written: JSON or TSV, and surprisal to the base "2" (bits) or "e" (nats).

    `method` is the scorer's; `join` goes between a prefix and its continuation, see `joined`.
    """

    as_json: bool = False
    base: str = "2"
    method: str = "causal"
    join: str | None = None


def score_fields(score: Score) -> dict[str, Any]:
    """The figures of one text, as SCORE_COLUMNS names them."""
    return {name: getattr(score, name) for name in SCORE_COLUMNS}


def score_cells(score: Score) -> list[str]:
    """The cells of SCORE_COLUMNS."""
    return [cell(value) for value in score_fields(score).values()]


def texts_with_scores(texts: Sequence[str], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The texts, each with its figures, as JSON."""
    return [{"text": text, **score_fields(score)} for text, score in zip(texts, scores)]


@dataclass
class RecordRows:
    """One row per record. Other forms override `questions`, `fields` (JSON) and `lines` (TSV)."""

    style: ScoreFormat
    per: str = "record"
    columns: Sequence[str] = (*SCORE_COLUMNS, "text")

    def questions(self, record: Record) -> list[ScoringInput]:
        """What is scored for a record.

        Its first extra text, if any, is a prefix or a source, and the second is what joins them.
        """
        before, *joins = record.extra_texts or ("",)
        if self.style.method == "conditional":
            return [ScoringInput(record.text, source=before)]
        join = joins[0] if joins else self.style.join
        return [ScoringInput(join_prefix(before, record.text, join), before)]

    def format(self, record: Record, scores: Sequence[Score]) -> str:
        """The output for one record: one line of JSON, or any number of lines of TSV."""
        if not self.style.as_json:
            return self.lines(record, scores)
        fields = {**(record.fields or {}), **self.fields(record, scores)}
        return json_line({**fields, "method": self.style.method})

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The JSON fields for one record."""
        return {"text": record.text, **score_fields(scores[0])}

    def lines(self, record: Record, scores: Sequence[Score]) -> str:
        """The TSV lines for one record."""
        return tsv_line(*score_cells(scores[0]), escaped(record.text))

    def count(self, record: Record, scores: Sequence[Score]) -> None:
        """Notes a record for `remaining` and `summary`; called in input order."""

    def remaining(self) -> Iterator[str]:
        """The output that follows the last record."""
        return iter(())

    def summary(self) -> str:
        """A line for standard error at the end; empty for none."""
        return ""


@dataclass
class PieceRows(RecordRows):
    """One row per word or token, none for a record without words; in JSON one line per record.

    With `alternatives` each token also has its rank, the entropy and that many likeliest tokens.
    """

    alternatives: int = 0

    def __post_init__(self) -> None:
        more = ["rank", "entropy", *numbered(["alternative", "logprob"], self.alternatives)]
        self.columns = (*PIECE_COLUMNS, *(more if self.alternatives else ()))

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The figures of the record, then of its pieces."""
        pieces = [self._piece_fields(unit) for unit in scores[0].pieces or ()]
        return {**super().fields(record, scores), "pieces": pieces}

    def lines(self, record: Record, scores: Sequence[Score]) -> str:
        """A line for each piece."""
        return "".join(
            tsv_line(str(record.line), str(i), *self._cells(unit))
            for i, unit in enumerate(scores[0].pieces or ())
        )

    def _piece_fields(self, unit: Unit) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(unit, name) for name in PIECE_COLUMNS[2:-1]}
        nats = self.style.base == "e"
        fields["surprisal"] = -unit.logprob if nats and unit.logprob is not None else unit.surprisal
        if self.alternatives:
            fields["rank"], fields["entropy"] = unit.rank, unit.entropy
            if nats and unit.entropy is not None:
                fields["entropy"] = unit.entropy * NATS_PER_BIT
            fields["alternatives"] = [
                {"piece": piece, "logprob": logprob} for piece, logprob in unit.alternatives or ()
            ]
        return fields

    def _cells(self, unit: Unit) -> list[str]:
        fields = self._piece_fields(unit)
        cells = [escaped(unit.piece), *(cell(fields[name]) for name in PIECE_COLUMNS[3:])]
        if self.alternatives:
            cells += [cell(unit.rank), cell(fields["entropy"])]
            for other in (unit.alternatives or [])[: self.alternatives]:
                cells += [escaped(other.piece), cell(other.logprob)]
        return cells + ["NA"] * (len(self.columns) - 2 - len(cells))


@dataclass
class PairRows(RecordRows):
    """One row per pair of texts: the figures of both, and whether the first is likelier by its sum.

    `first_likelier` counts such pairs, `counted` all pairs with a figure for both texts. Of two
    equal sums neither is likelier.
    """

    columns: Sequence[str] = (
        *(f"{name}_{k}" for k in (1, 2) for name in SCORE_COLUMNS),
        *("first_likelier", "text_1", "text_2"),
    )
    first_likelier: int = 0
    counted: int = 0

    def questions(self, record: Record) -> list[ScoringInput]:
        """Both texts; none for a bad record."""
        return [ScoringInput(text) for text in record.extra_texts]

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """Whether the first text is likelier, and the figures of both."""
        return {
            "first_likelier": first_is_likelier(scores),
            "scores": texts_with_scores(record.extra_texts or ("", ""), scores or UNSCORED_PAIR),
        }

    def lines(self, record: Record, scores: Sequence[Score]) -> str:
        """One line."""
        figures = [text for score in scores or UNSCORED_PAIR for text in score_cells(score)]
        likelier = first_is_likelier(scores)
        texts = map(escaped, record.extra_texts or ("", ""))
        return tsv_line(*figures, cell(None if likelier is None else int(likelier)), *texts)

    def count(self, record: Record, scores: Sequence[Score]) -> None:
        """Counts one more pair."""
        likelier = first_is_likelier(scores)
        self.first_likelier += bool(likelier)
        self.counted += likelier is not None

    def summary(self) -> str:
        """The rate of pairs whose first text is likelier, with its 95 % interval."""
        if not self.counted:
            return "no pair with a figure for both"
        low, high = wilson_interval(self.first_likelier, self.counted)
        rate = self.first_likelier / self.counted
        return (
            f"the first is likelier in {self.first_likelier:,} of {self.counted:,} pairs: "
            f"{rate:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )


UNSCORED_PAIR = (Score(None, 0, 0), Score(None, 0, 0))


def first_is_likelier(scores: Sequence[Score]) -> bool | None:
    """Whether the first of two texts has the higher sum; None unless both have a figure."""
    sums = [score.logprob for score in scores if score.logprob is not None]
    return sums[0] > sums[1] if len(sums) == 2 else None


@dataclass
class ChoiceRows(RecordRows):
    """One row per record: its likeliest choice by sum, per token and per byte, counted from 0."""

    columns: Sequence[str] = ("by_sum", "by_token", "by_byte", "logprobs", "text")

    def questions(self, record: Record) -> list[ScoringInput]:
        """The choices, each after the same text."""
        prefix = record.text
        return [
            ScoringInput(join_prefix(prefix, text, self.style.join), prefix)
            for text in record.extra_texts
        ]

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The likeliest choices, and the figures of all."""
        each = texts_with_scores(record.extra_texts, scores)
        return {"text": record.text, **choose(scores)._asdict(), "scores": each}

    def lines(self, record: Record, scores: Sequence[Score]) -> str:
        """One line; the log-probabilities of the choices stand in one cell."""
        logprobs = " ".join(cell(score.logprob) for score in scores) or "NA"
        return tsv_line(*map(cell, choose(scores)), logprobs, escaped(record.text))


@dataclass
class WorstRows(RecordRows):
    """Rows of the `limit` records with the most bits per byte, written at the end.

    Records without a figure, such as empty lines, are left out.
    """

    limit: int = 1
    columns: Sequence[str] = ("line", *RecordRows.columns)
    # (bits per byte, minus the order of arrival, …): of equal records the earlier one stays
    _heap: list[tuple[float, int, Record, Score]] = field(default_factory=list)
    _seen: int = 0

    def format(self, record: Record, scores: Sequence[Score]) -> str:
        """Nothing yet."""
        return ""

    def count(self, record: Record, scores: Sequence[Score]) -> None:
        """Keeps the record while it is one of the worst."""
        self._seen += 1
        if scores[0].bits_per_byte is not None:
            push = heapq.heappush if len(self._heap) < self.limit else heapq.heappushpop
            push(self._heap, (scores[0].bits_per_byte, -self._seen, record, scores[0]))

    def remaining(self) -> Iterator[str]:
        """The output for the worst records seen, the worst first."""
        for _, _, record, score in sorted(self._heap, key=lambda item: item[:2], reverse=True):
            yield super().format(record, [score])

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """The figures of the record with its line number."""
        return {"line": record.line, **super().fields(record, scores)}

    def lines(self, record: Record, scores: Sequence[Score]) -> str:
        """The line number, then as for any record."""
        return f"{record.line}\t{super().lines(record, scores)}"


@dataclass
class ColoredRows(RecordRows):
    """The text of each record, the background of each token colored by its surprisal.

    No color below 2 bits, then pale yellow to red; tokens that are context only are dim. Control
    characters are drawn.
    """

    per: str = "token"
    columns: Sequence[str] = ()

    def format(self, record: Record, scores: Sequence[Score]) -> str:
        """The colored text on one line."""
        data, colored, run = record.text.encode("utf-8"), [], b""
        color: int | None = 0
        for unit in scores[0].pieces or []:
            unit_color = shade(unit.surprisal)
            inside_character = data[unit.start : unit.start + 1] and data[unit.start] & 0xC0 == 0x80
            if unit_color != color and not inside_character:  # a character has one color
                colored.append(_drawn(run, color))
                run, color = b"", unit_color
            run += data[unit.start : unit.end]
        return "".join((*colored, _drawn(run, color))) + "\n"


def _drawn(data: bytes, color: int | None) -> str:
    return paint(visible(data.decode("utf-8", "replace"), keep="\t"), color)


def row_format(
    style: ScoreFormat,
    per: str,
    pairs: bool = False,
    choices_field: str | None = None,
    worst: int | None = None,
    color: bool = False,
    alternatives: int | None = None,
) -> RecordRows:
    """How results are written, by the options of `lm score`."""
    if pairs:
        return PairRows(style)
    if choices_field:
        return ChoiceRows(style)
    if worst:
        return WorstRows(style, limit=worst)
    if color:
        return ColoredRows(style)
    if per == "record":
        return RecordRows(style)
    return PieceRows(style, per, alternatives=alternatives or 0)


def remote_task(scorer: Scorer, rows: RecordRows, alternatives: int) -> RemoteTask:
    """The task of scoring (records, …): for each record its output, and (logprob, tokens, bytes)
    of each text that was scored for it. A record with a score that is no number has no output."""

    def work(part: tuple[list[Record], int]) -> list[tuple[str, list[tuple]]]:
        questions = [rows.questions(record) for record in part[0]]
        flat = [question for of_record in questions for question in of_record]
        scores = iter(scorer.score(flat, rows.per, alternatives))
        results = []
        for record, of_record in zip(part[0], questions):
            own_scores = list(islice(scores, len(of_record)))
            figures = [(score.logprob, score.tokens, score.bytes) for score in own_scores]
            sound = not any(score.problem for score in own_scores)
            results.append((rows.format(record, own_scores) if sound else "", figures))
        return results

    return RemoteTask(
        work,
        lambda part: records_to_json(part[0]),
        lambda words: (records_from_json(words), 0),
        size=lambda part: len(part[0]) - part[1],
    )
