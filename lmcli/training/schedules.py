"""How far a run has come, its learning-rate factor there, its evaluations. Pure functions."""

import math
from dataclasses import dataclass

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
