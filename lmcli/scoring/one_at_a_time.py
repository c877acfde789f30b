"""Several models that do not fit in memory together: each scores all texts before the next."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from lmcli.data.rows import Record, records_from_json, records_to_json
from lmcli.errors import UserError
from lmcli.model.device import free_memory
from lmcli.scoring.scorer import Score, Scorer, ScoringInput, Unit
from lmcli.storage import cache_folder, user_errors
from lmcli.terminal import progress

Batch = tuple[Sequence[Record], int]  # records, and how many of them are written already


class StoredScorer:
    """A Scorer that is in memory only while `store` runs; `score` returns what that has scored.

    `make` loads it and `unload` frees its memory; both are called once here, for its errors.
    """

    def __init__(self, name: str, make: Callable[[], Scorer], unload: Callable[[], None]):
        self.name, self.make, self.unload = name, make, unload
        scorer = make()
        self.method, self.text_tokenizer = scorer.method, scorer.text_tokenizer
        self.device = scorer.device
        del scorer
        self._free()
        self._stored = _JsonLines()
        self._scores: Iterator[Any] = iter(())

    def _free(self) -> None:
        self.unload()
        free_memory(self.device)

    def store(self, batches: Iterable[list[ScoringInput]], total: int, per: str) -> None:
        """Scores all batches; `total` is the number of their texts."""
        scorer = self.make()
        with progress.stage(f"scoring with {self.name}", total, "texts") as stage:
            for batch in batches:
                with stage.item(len(batch)):
                    self._stored.write([_to_json(score) for score in scorer.score(batch, per)])
        del scorer
        self._free()
        self._scores = self._stored.values()

    def score(self, texts: list[ScoringInput], per: str, alternatives: int) -> list[Score]:
        """The scores of the next batch, in the order of `store`."""
        return [_from_json(*values) for values in next(self._scores)]


def score_one_at_a_time(
    scorers: Sequence[Scorer | StoredScorer],
    batches: Iterable[Batch],
    inputs_of: Callable[[Record], list[ScoringInput]],
    per: str,
) -> Iterator[Batch]:
    """The batches, once all StoredScorers have scored them; an error of reading comes last.

    Standard input can be read only once, so they are kept in a temporary file. Without
    StoredScorers they come as they are read.
    """
    stored_scorers = [each for each in scorers if isinstance(each, StoredScorer)]
    if not stored_scorers:
        yield from batches
        return
    stored, total, error = _JsonLines(), 0, None
    try:
        for records, written in batches:
            stored.write([records_to_json(list(records)), written])
            total += sum(len(inputs_of(record)) for record in records)
    except UserError as mistake:
        error = mistake

    def restored() -> Iterator[Batch]:
        for records, written in stored.values():
            yield records_from_json(records), written

    for scorer in stored_scorers:
        texts = ([text for record in each for text in inputs_of(record)] for each, _ in restored())
        scorer.store(texts, total, per)
    yield from restored()
    if error:
        raise error


class _JsonLines:
    """JSON values in a temporary file, which takes no memory: `values` are read from its start."""

    def __init__(self) -> None:
        folder = cache_folder(action="store results")
        self._file: IO[str] = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8")

    def write(self, value: Any) -> None:
        with user_errors(str(cache_folder()), "store results"):
            print(json.dumps(value), file=self._file)

    def values(self) -> Iterator[Any]:
        with user_errors(str(cache_folder()), "store results"):
            self._file.seek(0)
        return map(json.loads, self._file)


def _to_json(score: Score) -> list[Any]:
    pieces = score.pieces
    cells = None if pieces is None else [(u.piece, u.start, u.end, u.logprob) for u in pieces]
    return [score.logprob, score.tokens, score.bytes, cells]


def _from_json(logprob: float | None, tokens: int, bytes: int, cells: list[Any] | None) -> Score:
    pieces = None if cells is None else [Unit(*values) for values in cells]
    return Score(logprob, tokens, bytes, pieces)
