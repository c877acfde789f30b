"""How far a run has come, and the learning-rate factor there. Pure functions."""

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
