"""What the screen of a training run shows, as plain values; `training_screen` draws it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lmcli.terminal.curve import Series
from lmcli.terminal.progress import Shown


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after `step` steps: `value` in the unit of the curve, all of it on one line."""

    step: int
    value: float
    headline: str
    best: bool


@dataclass(frozen=True)
class SampleText:
    """What the model wrote after `step` steps; `finished` is that of the finished model."""

    step: int
    text: str
    finished: bool = False


@dataclass(frozen=True)
class Comparison:
    """A figure beside those of simple methods; `unit` says what it is, `remark` how they do it."""

    unit: str
    values: dict[str, float]
    remark: str


@dataclass(frozen=True)
class Report:
    """The end of a run: its figures, what they mean, and the commands to try next."""

    name: str
    figures: list[str]
    comparison: Comparison | None
    commands: list[str]


@dataclass
class TrainingState:
    """A run as far as it has come. Losses are in `unit`, such as bits/byte.

    `remaining` are the seconds that were left at `updated` (of `time.monotonic`); None: unknown.
    """

    name: str = ""
    unit: str = "nats/token"
    nats_per_unit: float = 1.0
    target: str = "token"
    selection: str = "lowest loss"  # what makes a model the best
    memory: Callable[[], int] = lambda: 0  # bytes
    stopping: Callable[[], bool] = lambda: False
    step: int = 0
    share: float = 0.0
    epoch: float = 0.0
    learning_rate: float = 0.0
    elapsed: float = 0.0
    remaining: float | None = None
    updated: float = 0.0
    loss: float | None = None  # moving averages
    tokens_per_second: float | None = None
    losses: Series = field(default_factory=Series)
    speeds: Series = field(default_factory=Series)
    evaluations: list[Evaluated] = field(default_factory=list)
    samples: list[SampleText] = field(default_factory=list)
    phase: Shown | None = None  # what is done between steps
    ended: str = ""  # how the run ended, as "stopped"

    def copy(self) -> "TrainingState":
        """This state as it is now, to be drawn while the run goes on in another thread."""
        return replace(
            self,
            losses=Series(list(self.losses.points)),
            speeds=Series(list(self.speeds.points)),
            evaluations=list(self.evaluations),
            samples=list(self.samples),
        )

    def seconds_left(self, now: float) -> float | None:
        """The estimate at `now`: it falls with the clock.

        Work that takes longer than expected stops it where that work should have ended.
        """
        if self.remaining is None:
            return None
        overdue, stage = 0.0, self.phase.stage if self.phase else None
        if stage and stage.seconds:
            overdue = max(0.0, stage.age(now) - stage.seconds)
        return max(0.0, self.remaining - max(0.0, now - self.updated) + overdue)

    @property
    def best(self) -> Evaluated | None:
        """The best evaluation so far."""
        return next((each for each in reversed(self.evaluations) if each.best), None)

    def add_step(
        self,
        step: int,
        loss: float,
        speed: float,
        share: float,
        epoch: float,
        learning_rate: float,
        elapsed: float,
        remaining: float | None,
        now: float,
    ) -> None:
        """Adds a training step; `loss` is in nats. Averages are over about 20 and 10 steps."""
        self.loss = moving_average(self.loss, loss, 0.05)
        self.tokens_per_second = moving_average(self.tokens_per_second, speed, 0.1)
        self.step, self.share, self.epoch, self.learning_rate = step, share, epoch, learning_rate
        self.elapsed, self.remaining, self.updated = elapsed, remaining, now
        self.losses.add(step, loss / self.nats_per_unit)
        self.speeds.add(step, speed)


def clock(seconds: float | None) -> str:
    """Seconds as "1:05" or "2:03:04"; "–" for None."""
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def moving_average(average: float | None, value: float, weight: float) -> float:
    """The exponential moving average after one more value, which has this weight."""
    return value if average is None else (1 - weight) * average + weight * value
