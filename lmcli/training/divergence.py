"""When a run has diverged for good: a loss that is not finite, or that explodes. Pure functions."""

from collections.abc import Sequence

from lmcli.config import TrainConfig
from lmcli.errors import UserError

STEPS_ABOVE = 8
FAR_ABOVE = 20.0


class Diverged(UserError):
    """Loss, gradient or weights from which training does not recover.

    `since` is the first step that saw it: the weights after the step before, and all later ones,
    are broken. `remedy` are options to try.
    """

    def __init__(self, what: str, remedy: str, since: int):
        super().__init__(what, where="training", hint=f"try {remedy}")
        self.remedy, self.since = remedy, since


def highest_sound_loss(uniform: float, first: float) -> float:
    """The loss in nats per target that no sound run exceeds: twice the initial one, plus 5.

    `uniform` is ln of the number of choices, which guessing costs, with label smoothing too.
    `first` is the loss before the first update; it is higher if a model is trained further on text
    that it finds unlikely. Two simpler rules fail: a multiple of the best loss so far (it goes to 0
    on a small text, and one hard batch is then a thousand times as much), and the uniform loss
    alone (0.7 with two labels, where a few confident mistakes cost more).
    """
    return 2 * max(uniform, first) + 5


def exploded(losses: Sequence[float], limit: float) -> bool:
    """True if each of the last 8 losses is above `limit`, or the last one is above 20 times that.

    Spikes recover. With ten times a good learning rate, losses of two to four times the uniform one
    lasted a step or two, and never eight steps above the uniform one itself; with a hundred times a
    good rate they stay at four times it and more (3 × 64, vocabulary 512; Muon and AdamW, float32
    and bfloat16, with warm-up and without).
    """
    return losses[-1] > FAR_ABOVE * limit or steps_above(losses, limit) >= STEPS_ABOVE


def steps_above(losses: Sequence[float], limit: float) -> int:
    """How many losses in a row, up to the last one, are above `limit`."""
    return next((i for i, loss in enumerate(reversed(losses)) if not loss > limit), len(losses))


def row_range(position: int, count: int, per_epoch: int) -> str:
    """ "rows 3–6 of epoch 1" (from 1), for `count` rows from number `position` (from 0) on."""
    epoch, first = divmod(position, per_epoch)
    last_epoch, last = divmod(position + max(1, count) - 1, per_epoch)
    if epoch != last_epoch:
        end = f"row {last + 1:,} of epoch {last_epoch + 1:,}"
        return f"row {first + 1:,} of epoch {epoch + 1:,} to {end}"
    span = f"row {first + 1:,}" if first == last else f"rows {first + 1:,}–{last + 1:,}"
    return f"{span} of epoch {epoch + 1:,}"


def remedy(config: TrainConfig, full_precision: bool) -> str:
    """Options to try after divergence: a third of the rates, the usual ones at most; float32."""
    usual_rates = {"learning_rate": 1e-2}
    if config.optimizer == "muon":
        usual_rates["matrix_learning_rate"] = 2e-2
    lower = " ".join(
        f"--set train.{key}={min(getattr(config, key) / 3, usual):.1g}"
        for key, usual in usual_rates.items()
    )
    return lower if full_precision else f"{lower} or --set train.precision=float32"
