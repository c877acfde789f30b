"""Other forms of `lm score` output: pairs, choices, best and worst, colored text; its task."""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lmcli.data.output_file import OutputFile, escaped
from lmcli.data.rows import Record, records_from_json, records_to_json
from lmcli.data.schema import join_prefix
from lmcli.distributed.work_queue import RemoteTask
from lmcli.evaluation.intervals import wilson_interval
from lmcli.output.cells import cell, tsv_line
from lmcli.output.score import (
    SCORE_COLUMNS,
    PieceRows,
    RecordRows,
    ScoreFormat,
    score_cells,
    texts_with_scores,
)
from lmcli.scoring.scorer import Score, Scorer, ScoringInput, Unit, choose
from lmcli.terminal import progress
from lmcli.terminal.painted_page import LARGE_PAGE, HtmlPage, PaintedPage, SvgPage
from lmcli.terminal.painted_text import Segment, in_lines, paint, painted, segments
from lmcli.terminal.tables import RowTable
from lmcli.text.characters import visible

CONTEXT_CHARACTERS = 24  # on each side of a word
CONTEXT_BYTES = 4 * (CONTEXT_CHARACTERS + 2)  # that hold one more, and a part of another
PLACES = ("index", "start", "end", "bytes", "logprob")  # columns that a terminal leaves out


@dataclass
class PairRows(RecordRows):
    """One row per pair of texts: the figures of both, and whether the first is likelier by its sum.

    `first_likelier` counts such pairs, `counted` those with a figure for both texts, `pairs` all.
    Of two equal sums neither is likelier.
    """

    first_likelier: int = 0
    counted: int = 0
    pairs: int = 0

    @property
    def figure_columns(self) -> Sequence[str]:
        """The figures of both, then which is likelier."""
        figures = (f"{name}_{k}" for k in (1, 2) for name in SCORE_COLUMNS)
        return (*figures, "first_likelier", "text_1", "text_2")

    def questions(self, record: Record) -> list[ScoringInput]:
        """Both texts; none for a bad record."""
        return [ScoringInput(text) for text in record.extra_texts]

    def fields(self, record: Record, scores: Sequence[Score]) -> dict[str, Any]:
        """Whether the first text is likelier, and the figures of both."""
        return {
            "first_likelier": first_is_likelier(scores),
            "scores": texts_with_scores(record.extra_texts or ("", ""), scores or UNSCORED_PAIR),
        }

    def lines(self, record: Record, scores: Sequence[Score]) -> list[list[str]]:
        """One line."""
        figures = [text for score in scores or UNSCORED_PAIR for text in score_cells(score)]
        likelier = first_is_likelier(scores)
        texts = map(escaped, record.extra_texts or ("", ""))
        return [[*figures, cell(None if likelier is None else int(likelier)), *texts]]

    def count(self, record: Record, scores: Sequence[Score]) -> None:
        """Counts one more pair."""
        likelier = first_is_likelier(scores)
        self.first_likelier += bool(likelier)
        self.counted += likelier is not None
        self.pairs += 1

    def summary(self) -> str:
        """The rate of pairs whose first text is likelier, with its 95 % interval."""
        if not self.counted:
            return "no pair with a figure for both" if self.pairs else ""
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

    @property
    def figure_columns(self) -> Sequence[str]:
        """The choices, then the figures of all."""
        return ("by_sum", "by_token", "by_byte", "logprobs", "text")

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

    def lines(self, record: Record, scores: Sequence[Score]) -> list[list[str]]:
        """One line; the log-probabilities of the choices stand in one cell."""
        logprobs = " ".join(cell(score.logprob) for score in scores) or "NA"
        return [[*map(cell, choose(scores)), logprobs, escaped(record.text)]]


@dataclass
class RankedRows(RecordRows):
    """Rows of the `limit` records or words with the highest figures, or the lowest (`best`).

    They are written at the end. A record has bits per byte, a word surprisal; those without a
    figure, such as empty lines, are left out, and so is a word that stands there with the same
    figure. A word has its `context`.
    """

    limit: int = 1
    best: bool = False
    # (figure, minus the order of arrival, key, line): of equal records the earlier one stays
    _heap: list[tuple[float, int, str, str]] = field(default_factory=list)
    _seen: int = 0

    def __post_init__(self) -> None:
        self.rows = PieceRows(self.style, self.per) if self.per == "word" else None
        self.has_line = True

    @property
    def figure_columns(self) -> Sequence[str]:
        """As of all records or words."""
        return (*self.rows.figure_columns, "context") if self.rows else super().figure_columns

    def table(self, header: bool) -> RowTable:
        """As for records; of words without what no reader needs."""
        if not self.rows:
            return super().table(header)
        shown = [i for i, name in enumerate(self.columns) if name not in PLACES]
        columns = [self._column(self.columns[i], False) for i in shown]
        return RowTable(columns, header, lambda cells: [cells[i] for i in shown])

    def format(self, record: Record, scores: Sequence[Score]) -> list[tuple[float, str, str]]:
        """The candidates of a record: (figure, what equal words share, line)."""
        if self.rows:
            pieces = self._candidates(self.rows, record, scores)
            return heapq.nlargest(self.limit, pieces, key=lambda each: each[0])
        value = scores[0].bits_per_byte
        if value is None or not self.selects(scores):
            return []
        return [(-value if self.best else value, "", super().format(record, scores))]

    def _candidates(
        self, rows: PieceRows, record: Record, scores: Sequence[Score]
    ) -> Iterator[tuple[float, str, str]]:
        data = self.questions(record)[0].text.encode("utf-8")
        for i, units in rows.pieces(scores):
            value = units[0].surprisal
            if value is None:
                continue
            context = _context(data, units[0])
            if self.style.as_json:
                line = {} if self.numbers_records else {"line": record.line}
                fields = {**line, "index": i, **rows.piece_fields(units), "context": context}
                text = self.json(record, fields)
            else:
                cells = rows.cells(units)
                text = tsv_line(*self.ids(record), str(i), *cells, escaped(context))
            key = f"{cell(value)} {units[0].piece}"
            yield -value if self.best else value, key, text

    def written(self, output: Any) -> str:
        """Keeps the candidates while they are among the highest."""
        for value, key, line in output:
            self._seen += 1
            if key and any(key == other[2] for other in self._heap):
                continue
            push = heapq.heappush if len(self._heap) < self.limit else heapq.heappushpop
            push(self._heap, (value, -self._seen, key, line))
        return ""

    def remaining(self) -> Iterator[str]:
        """The rows of the highest seen, the highest first."""
        for _, _, _, line in sorted(self._heap, key=lambda item: item[:2], reverse=True):
            yield line


def _context(data: bytes, unit: Unit) -> str:
    """A word of a text in UTF-8 between « and », with what stands around it."""
    before = data[max(0, unit.start - CONTEXT_BYTES) : unit.start].decode("utf-8", "replace")
    after = data[unit.end : unit.end + CONTEXT_BYTES].decode("utf-8", "replace")
    start = before[-CONTEXT_CHARACTERS:] if len(before) > CONTEXT_CHARACTERS else before
    end = after[:CONTEXT_CHARACTERS]
    if len(before) > CONTEXT_CHARACTERS:
        start = "…" + start[start.find(" ") :] if " " in start else "…" + start
    if len(after) > CONTEXT_CHARACTERS:
        end = end[: end.rfind(" ") + 1] + "…" if " " in end else end + "…"
    return f"{start}«{unit.piece}»{end}"


@dataclass
class ColoredRows(RecordRows):
    """The text of each record, the background of each token or word colored by its surprisal.

    No color below 2 bits, then pale yellow to red; what is context only is dim. Control characters
    are drawn. Several models have a line each; with `width` lines end after words. The files `html`
    and `svg` are written meanwhile.
    """

    per: str = "token"
    color: bool = True
    width: int | None = None
    html: str | None = None
    svg: str | None = None
    _pages: list[tuple[PaintedPage, OutputFile]] = field(default_factory=list)

    @property
    def columns(self) -> Sequence[str]:
        """None: it is no table."""
        return ()

    @contextmanager
    def opened(self, models: Sequence[str]) -> Iterator[None]:
        """Writes the pages while the block runs; they appear at its end."""
        paths = ((self.html, HtmlPage), (self.svg, SvgPage))
        with ExitStack() as stack:
            self._pages = [
                (page(models), stack.enter_context(OutputFile(path)))
                for path, page in paths
                if path
            ]
            for page, file in self._pages:
                file.write(page.start())
            yield
            for page, file in self._pages:
                file.write(page.end())

    def summary(self) -> str:
        """A note about a page that is too large."""
        large = [page.size for page, _ in self._pages if page.size > LARGE_PAGE]
        if not large:
            return ""
        return (
            f"{self.html} has {large[0] / 1e6:,.0f} MB: browsers need minutes above "
            f"{LARGE_PAGE / 1e6:.0f}; paint fewer records, as with head -n"
        )

    def format(self, record: Record, scores: Sequence[Score]) -> tuple[int, list[list[Segment]]]:
        """The number of the record, and the segments of its text, for each model."""
        text = self.questions(record)[0].text
        return record.number, [
            segments(text, ((unit.start, unit.end, unit.surprisal) for unit in score.pieces or ()))
            for score in scores
        ]

    def written(self, output: Any) -> str:
        """The colored text, a line for each model."""
        number, of_models = output
        parts = [[Segment(*each) for each in segments_] for segments_ in of_models]
        for page, file in self._pages:
            file.write(page.record(number, parts))
        if not self.color:
            return ""
        names = [visible(name, keep="") for name in self.style.models] or [""]
        indent = max(map(len, names)) + 2 if self.style.models else 0
        text = ""
        for name, segments_of_model in zip(names, parts):
            lines = [segments_of_model]
            if self.width is not None:
                lines = in_lines(segments_of_model, max(1, self.width - indent))
            for k, line in enumerate(lines):
                label = (name if k == 0 else "").ljust(indent)
                text += paint(label, None) + painted(line) + "\n"
        return text


@dataclass(frozen=True)
class RowOptions:
    """The options of `lm score` that choose the form of its rows."""

    pairs: bool = False
    choices_field: str | None = None
    worst: int | None = None
    best: int | None = None
    color: bool = False
    html: str | None = None
    svg: str | None = None
    alternatives: int | None = None

    def rows(self, style: ScoreFormat, per: str, width: int | None = None) -> RecordRows:
        """How results are written; `width` is that of a terminal."""
        if self.pairs:
            return PairRows(style)
        if self.choices_field:
            return ChoiceRows(style)
        if self.worst or self.best:
            limit = self.worst or self.best or 0
            return RankedRows(style, per, limit=limit, best=bool(self.best))
        if self.color or self.html or self.svg:
            per = per if per == "word" else "token"
            return ColoredRows(style, per, False, self.color, width, self.html, self.svg)
        if per == "record":
            return RecordRows(style)
        return PieceRows(style, per, alternatives=self.alternatives or 0)


def remote_task(scorers: Sequence[Scorer], rows: RecordRows, alternatives: int) -> RemoteTask:
    """The task of scoring (records, …): for each record its output, and (logprob, tokens, bytes)
    of each text that was scored for it, by each scorer. A record with a score that is no number has
    no output."""

    def work(part: tuple[list[Record], int]) -> list[tuple[Any, list[tuple]]]:
        questions = [rows.questions(record) for record in part[0]]
        flat = [question for of_record in questions for question in of_record]
        scores = []
        with progress.stage(total=len(scorers)) as models:
            for scorer in scorers:
                with models.item():
                    scores.append(iter(scorer.score(flat, rows.per, alternatives)))
        results = []
        for record, of_record in zip(part[0], questions):
            own_scores = [score for each in scores for score in islice(each, len(of_record))]
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
