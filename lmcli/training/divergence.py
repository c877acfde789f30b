"""When a run has gone wrong for good: a loss that is no number, or one that explodes. Pure functions, and what is said."""

from collections.abc import Sequence

from lmcli.config import TrainConfig
from lmcli.errors import UserError

STEPS_ABOVE = 8
FAR_ABOVE = 20.0


class Diverged(UserError):
    """Loss, gradient or weights are where training does not come back from. `since` is the first step that saw it, so the
    weights after the step before that, and all later ones, are broken. `remedy` are options to try."""

    def __init__(self, what: str, remedy: str, since: int):
        super().__init__(what, where="training", hint=f"try {remedy}")
        self.remedy, self.since = remedy, since


def highest_sound_loss(uniform: float, first: float) -> float:
    """The loss, nats a target, above which a run is in trouble: twice what it can begin with, and 5 nats.

    `uniform` is ln of the number of choices: what guessing costs, with label smoothing too. `first` is the loss before
    the first update: more than that where a model is trained further on text that it finds unlikely. Neither a share of
    the best loss so far (it goes to 0 on a small text, and one hard batch is then a thousand times as much) nor the
    uniform loss alone (0.7 with two labels, where a few confident mistakes cost more) would do.
    """
    return 2 * max(uniform, first) + 5


def exploded(losses: Sequence[float], limit: float) -> bool:
    """Whether a run with these last losses will not come back: each of the last 8 is above `limit`, or the last one is
    above 20 times that.

    Spikes do come back: with ten times a good rate, losses of two to four times the uniform one were seen for a step or
    two, and never eight in a row above the uniform one itself; with a hundred times a good rate they stay at four times
    it and more (3 × 64, vocabulary 512; Muon and AdamW, float32 and bfloat16, with warm-up and without).
    """
    return losses[-1] > FAR_ABOVE * limit or steps_above(losses, limit) >= STEPS_ABOVE


def steps_above(losses: Sequence[float], limit: float) -> int:
    """How many of the last losses, without one between them that is not, are above `limit`."""
    return next((i for i, loss in enumerate(reversed(losses)) if not loss > limit), len(losses))


def rows_told(position: int, count: int, per_epoch: int) -> str:
    """"rows 3–6 of epoch 1", counted from 1, for `count` rows of a run from number `position` (counted from 0) on."""
    (epoch, first), (last_epoch, last) = divmod(position, per_epoch), divmod(position + max(1, count) - 1, per_epoch)
    if epoch != last_epoch:
        return f"row {first + 1:,} of epoch {epoch + 1:,} to row {last + 1:,} of epoch {last_epoch + 1:,}"
    span = f"row {first + 1:,}" if first == last else f"rows {first + 1:,}–{last + 1:,}"
    return f"{span} of epoch {epoch + 1:,}"


def remedy(config: TrainConfig, precise: bool) -> str:
    """Options to try after a run diverged: a third of its learning rates, the usual ones at most, and, unless it was
    `precise`, float32."""
    rates = {"learning_rate": 1e-2, **({"matrix_learning_rate": 2e-2} if config.optimizer == "muon" else {})}
    lower = " ".join(f"--set train.{key}={min(getattr(config, key) / 3, usual):.1g}" for key, usual in rates.items())
    return lower if precise else f"{lower} or --set train.precision=float32"
