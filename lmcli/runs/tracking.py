"""--report-to: a run's figures in Weights & Biases, trackio or TensorBoard, where installed."""

import io
import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmcli.errors import UsageError
from lmcli.runs.run_folder import REPORTS
from lmcli.storage import read_json, write_text

if TYPE_CHECKING:
    from lmcli.runs.run import TrainingRun

PROJECT = "lm"
INIT_SECONDS = 30  # for a service to answer


class Tracker(Protocol):
    """One run in one service. Any of its methods may raise anything."""

    where: str

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds figures by name."""

    def text(self, sample: str, step: int) -> None:
        """Adds a sample text."""

    def close(self) -> None:
        """Sends what is left."""


class TensorBoard:
    """Event files in the run's folder; what a resumed run makes again replaces what was there."""

    def __init__(self, run: "TrainingRun", key: str):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1 if run.step else None)
        self.where = f"tensorboard --logdir {folder}"

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds a scalar for each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def text(self, sample: str, step: int) -> None:
        """Adds a sample as a block of code, which is shown as it is."""
        self._writer.add_text(
            "sample", "\n".join(f"    {line}" for line in sample.split("\n")), step
        )

    def close(self) -> None:
        """Writes what is left to the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, by its id; the axis is `step`, so that a resumed run may go back a little."""

    def __init__(self, run: "TrainingRun", key: str):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.resolve().name,
            id=key,
            resume="allow",
            dir=str(run.folder),
            config=_config(run),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS),
        )
        self._run.define_metric("*", step_metric="step")
        self.where = str(run.folder / "wandb") if self._run.offline else str(self._run.url)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds a row of figures."""
        self._run.log({**figures, "step": step})

    def text(self, sample: str, step: int) -> None:
        """Adds a sample as preformatted text."""
        from html import escape

        self._run.log({"sample": self._wandb.Html(f"<pre>{escape(sample)}</pre>"), "step": step})

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, by its name."""

    def __init__(self, run: "TrainingRun", key: str):
        import trackio

        name = f"{run.folder.resolve().name}-{key}"
        config = _config(run)
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=name, resume="allow", config=config)
        self._finish = trackio.finish
        self.where = f"trackio show --project {project}"

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds a row of figures."""
        self._run.log(figures, step=step)

    def text(self, sample: str, step: int) -> None:
        """Adds a sample as a text."""
        self._run.log({"sample": sample}, step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._finish()


SERVICES: dict[str, Callable[["TrainingRun", str], Tracker]] = {
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}


def require_installed(services: Iterable[str]) -> None:
    """Raises UsageError naming the package of a service that is not installed."""
    for name in services:
        if not find_spec(name):
            raise UsageError(
                f"needs {name}", where=f"--report-to {name}", hint=f"pip install {name}"
            )


class Tracking:
    """The services that a run reports to; one that fails is named once and left out from then on.

    The run's folder keeps the services and the run's id in them, so that a resumed run goes on in
    the same places without being told.
    """

    def __init__(self, run: "TrainingRun", services: Iterable[str], note: Callable[[str], None]):
        self._note = note
        self._trackers: dict[str, Tracker] = {}
        file = run.folder / REPORTS
        keys = {name: key for name, key in _recorded(file).items() if name in SERVICES}
        new = {name: secrets.token_hex(4) for name in services if name not in keys}
        if new:
            write_text(file, json.dumps(keys | new) + "\n")
        for name, key in (keys | new).items():
            self._attempt(name, self._begin, name, run, key)

    def _begin(self, name: str, run: "TrainingRun", key: str) -> None:
        self._trackers[name] = SERVICES[name](run, key)
        self._note(f"reporting to {name}: {self._trackers[name].where}")

    def report(self, kind: str, event: Any) -> None:
        """Passes on an event of the run: the figures of metrics.jsonl and the samples."""
        from lmcli.runs.run_record import NOT_LOGGED

        for name, tracker in list(self._trackers.items()):
            if kind == "step":
                figures = {
                    key: value for key, value in asdict(event).items() if key not in NOT_LOGGED
                }
                step = figures.pop("step")
                self._attempt(name, tracker.log, figures, step)
            elif kind == "validation":
                self._attempt(name, tracker.log, event.figures.metrics(), event.step)
            elif kind == "sample":
                self._attempt(name, tracker.text, event.text, event.step)

    def close(self) -> None:
        """Sends what is left, after the last event."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)
        self._trackers.clear()

    def _attempt(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        """Calls a service, whose failure must not end the training.

        What it prints is dropped: trackio greets on standard output, which is for the result.
        """
        try:
            with redirect_stdout(io.StringIO()):
                action(*arguments)
        except Exception as error:
            self._trackers.pop(name, None)
            what = " ".join(str(error).split()) or type(error).__name__
            self._note(f"{name} failed, and gets nothing more of this run: {what:.200}")


def _config(run: "TrainingRun") -> dict[str, Any]:
    from lmcli.runs.changes import plain

    return plain(run.record.recipe)


def _recorded(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    keys = read_json(file)
    return {str(name): str(key) for name, key in keys.items()} if isinstance(keys, dict) else {}
