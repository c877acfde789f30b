"""How far a run has come, how long it still takes, its learning-rate factor, its evaluations."""

import math
from dataclasses import dataclass, field, replace

from lmcli.config import TrainConfig


@dataclass(frozen=True)
class Progress:
    """What a run has used of its budgets: optimizer steps, tokens, epochs, seconds."""

    steps: int
    tokens: int
    epochs: float
    seconds: float

    def share(
        self, config: TrainConfig, seconds_before: float = 0.0, seconds_after: float = 0.0
    ) -> float:
        """The largest share, 0 to 1, used of any budget; 1 ends the run.

        The seconds before the first step, and those that the final evaluation and save will take,
        are no part of the time budget: the schedule spans the steps and the run ends on time.
        """
        shares = [
            used / most
            for used, most in (
                (self.steps, config.steps),
                (self.tokens, config.tokens),
                (self.epochs, config.epochs),
            )
            if most
        ]
        if config.time:
            room = config.time - seconds_before - seconds_after
            shares.append((self.seconds - seconds_before) / room if room > 0 else 1.0)
        return min(1.0, max(shares, default=1.0))


SPEED_SECONDS = 30.0  # over about so many seconds of steps their speed is averaged


@dataclass
class TimeLeft:
    """The seconds that a run has left.

    Time budgets are known. For the others the steps are measured: each share of the budget that
    they used, and the seconds of the steps alone; what happens between them is added.
    """

    config: TrainConfig
    _seconds: float = field(default=0.0, init=False)  # of steps, older ones with less weight
    _share: float = field(default=0.0, init=False)  # that these have used, likewise
    _reached: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._counted = replace(self.config, time=0.0)

    def begin(self, progress: Progress) -> None:
        """Sets where the run stands before its next step."""
        self._reached = self._counted_share(progress)

    def add_step(self, progress: Progress, seconds: float) -> None:
        """Adds a step that took so many seconds and has led to `progress`.

        The first one counts only until there is another: it may take many times as long.
        """
        weight = math.exp(-seconds / SPEED_SECONDS) if self._steps > 1 else 0.0
        reached = self._counted_share(progress)
        self._seconds = weight * self._seconds + seconds
        self._share = weight * self._share + reached - self._reached
        self._reached = reached
        self._steps += 1

    def estimate(self, progress: Progress, between: float) -> float | None:
        """Seconds that are left; `between` are those of evaluations and saves to come."""
        estimates = []
        if self.config.time:
            estimates.append(max(0.0, self.config.time - progress.seconds))
        if self._has_counted and self._share > 0:
            steps = (1.0 - self._reached) * self._seconds / self._share
            estimates.append(max(0.0, steps) + between)
        return min(estimates, default=None)

    @property
    def _has_counted(self) -> bool:
        return bool(self._counted.steps or self._counted.tokens or self._counted.epochs)

    def _counted_share(self, progress: Progress) -> float:
        return progress.share(self._counted) if self._has_counted else 0.0


def factor(schedule: str, share: float, warmup: float) -> float:
    """Learning-rate factor at `share` (0 to 1) of the run: up to `warmup`, then down to 0."""
    fall = min(1.0, max(0.0, (share - warmup) / (1.0 - warmup))) if warmup < 1.0 else 0.0
    after = {
        "constant": 1.0,
        "linear": 1.0 - fall,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * fall)),
    }[schedule]
    return after if share >= warmup else share / warmup * after


EVALUATIONS = 8  # of a run unless eval_every is set; as many saves and sample texts
EVALUATION_SHARE = 1 / 15  # of a run's time, for all its evaluations
COUNTED_SHARE = 1 / 20  # where their time is estimated by their tokens
EVALUATED_BYTES = 250_000  # that are evaluated unless validation_bytes is set
FEWER_BYTES, FEWEST_BYTES = 20_000, 2_000  # to afford several evaluations; to afford one
# bytes a token, when no tokenizer is there yet; low, so that evaluations are not underestimated
FEW_BYTES_PER_TOKEN = 2.0


def planned_tokens(config: TrainConfig, tokens_per_epoch: float) -> float:
    """Tokens that a run trains on by its budgets; 0 if only time limits it."""
    budgets = config.steps * config.batch_tokens, config.tokens, config.epochs * tokens_per_epoch
    return min((tokens for tokens in budgets if tokens), default=0)


def timed_evaluations(budget: float, cost: float) -> int:
    """How many evaluations of `cost` seconds a run of `budget` seconds (0: no limit) affords.

    The last one is counted, and made in any case.
    """
    if not budget:
        return EVALUATIONS
    return min(EVALUATIONS, max(1, int(budget * EVALUATION_SHARE / max(cost, 1e-9))))


def counted_evaluations(planned: float, evaluated: float, ratio: float) -> int:
    """How many evaluations a run of `planned` training tokens (0: no limit) affords.

    Each reads `evaluated` tokens, `ratio` of them in the time of one training token. The clock has
    no part in it, so that a run by steps, tokens or epochs always gives the same result.
    """
    if not planned or not evaluated:
        return EVALUATIONS
    return min(EVALUATIONS, max(1, int(planned * COUNTED_SHARE * ratio / evaluated)))


def validation_bytes(config: TrainConfig, bytes_per_epoch: int, ratio: float) -> int:
    """Bytes of the validation set to evaluate: fewer than EVALUATED_BYTES in a short run.

    Rather fewer bytes than fewer than four evaluations, but no fewer than FEWER_BYTES for that.
    `ratio` is as for `counted_evaluations`, how often a byte is read included. What is set, or
    evaluations that are (eval_every), are taken as they are.
    """
    planned = FEW_BYTES_PER_TOKEN * planned_tokens(config, bytes_per_epoch / FEW_BYTES_PER_TOKEN)
    if config.validation_bytes or config.eval_every or not planned:
        return config.validation_bytes or EVALUATED_BYTES
    affordable = int(planned * COUNTED_SHARE * ratio)
    size = max(affordable // 4, min(affordable, FEWER_BYTES), FEWEST_BYTES)
    return min(EVALUATED_BYTES, size)
