"""Several sources of text in one run, drawn by weight: which files are whose, and what is told of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmcli.config import TrainConfig
from lmcli.errors import UsageError
from lmcli.text.batches import Rings
from lmcli.text.corpus import Mixture
from lmcli.text.records import expand

SMALLEST_SHARE = 1e-5


@dataclass(frozen=True)
class Share:
    """One source: what the user called it, how many of the run's files are its own, and its weight."""

    name: str
    files: int
    weight: float


def expanded(arguments: tuple[str, ...], weights: tuple[float, ...],
             include: str | None) -> tuple[list[str], int, list[Share]]:
    """(files, how many were left out as no text, the sources' shares) of DATA… with a weight for each.

    Raises UsageError where there is not one weight for each source, or one is too small to be kept to.
    """
    if len(weights) != len(arguments):
        raise UsageError(f"{len(weights)} weights for {len(arguments)} sources of data", where="--weights",
                         hint="one for each DATA in their order, as in: lm train a.txt b.jsonl --weights 3,1")
    if min(weights) < SMALLEST_SHARE * sum(weights):
        raise UsageError(f"{min(weights):g} is less than {SMALLEST_SHARE:g} of all weights", where="--weights",
                         hint="leave that source out, or give it more")
    files, skipped, shares = [], 0, []
    for argument, weight in zip(arguments, weights):
        found, left_out = expand((argument,), include)
        files, skipped = files + found, skipped + left_out
        shares.append(Share(argument, len(found), weight))
    return files, skipped, shares


def parted(files: list[str], shares: list[Share]) -> Iterator[list[str]]:
    """The files of each source."""
    start = 0
    for share in shares:
        yield files[start:start + share.files]
        start += share.files


def rows_planned(train: TrainConfig, per_epoch: int) -> int:
    """Rows that a run will read by its budget of steps, tokens or epochs; 0 where time alone ends it."""
    a_step = max(1, train.batch_tokens // train.context)
    found = [train.steps * a_step if train.steps else 0, -(-train.tokens // train.context) if train.tokens else 0,
             round(train.epochs * per_epoch) if train.epochs else 0]
    return min((rows for rows in found if rows), default=0)


def drawn(shares: Sequence[Share], rings: Rings, rows: int) -> list[dict]:
    """For each source its rows among the first `rows` of a run, and how many epochs of it they are, for `recipe.yaml`."""
    return [{"name": share.name, "rows": count, "epochs": round(count / ring.per_epoch, 3)}
            for share, ring, count in zip(shares, rings.rings, rings.drawn(rows))]


def told(shares: Sequence[Share], rings: Rings, corpora: Mixture, rows: int) -> Iterator[str]:
    """A line for each source: its part of the rows, and how many epochs of it `rows` of them are; where their number is
    not known (0), how many rows make one."""
    whole = sum(share.weight for share in shares)
    for share, ring, part, found in zip(shares, rings.rings, corpora.parts, drawn(shares, rings, rows)):
        apart = ring.per_epoch * whole / share.weight
        often = f"{found['epochs']:.3g} epochs" if rows else f"every {apart:,.0f} rows an epoch"
        yield f"{share.name}: {100 * share.weight / whole:.3g} % of the rows, {often} of its {part.tokens:,} tokens"
