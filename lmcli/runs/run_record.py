"""What a run writes into its folder: model, states, metrics, recipe.yaml, model card."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmcli.checkpoints import adapter_base
from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import family_of
from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.kernels import build
from lmcli.model.device import DeviceConfig
from lmcli.recipes import BUDGETS
from lmcli.runs import changes
from lmcli.runs.model_card import CommandExample, example_text, model_card
from lmcli.runs.run_folder import RunFolder
from lmcli.storage import copy_file, sha256_of, write_text
from lmcli.terminal.loss_curve import draw
from lmcli.training import datasets, resume_state
from lmcli.training.datasets import Source
from lmcli.training.loop import Validation
from lmcli.training.objective import TrainingData
from lmcli.training.resume_state import Counters, RunMetadata, SavedState
from lmcli.training.train_step import Step, TrainStep

NOT_LOGGED = ("share", "epoch", "remaining")  # fields of a Step


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a run's tokenizer."""
    names = (
        *checkpoints.TOKENIZER_FILES,
        "target.spm",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    files = (folder / name for name in names)
    return {file.name: sha256_of(file) for file in files if file.is_file()}


@dataclass
class RunRecord:
    """The written side of a run. What `result` and `headline` say is true of the best model so far.

    `choices` are the reasons of preset auto. `base` is what an adapter is for: `model` names it,
    `weights` is its fingerprint. `remembered` are the figures of --remember. `stages` are the
    budgets used up before the present one, with what was done in each.
    """

    folder: RunFolder
    recipe: Recipe
    data: TrainingData
    source: Source
    device_config: DeviceConfig
    choices: list[str] = field(default_factory=list)
    base: dict[str, str] = field(default_factory=dict)
    remembered: list[dict] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    best_sha256: str = ""  # of the best model's weights in the folder

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def create(self, train_step: TrainStep) -> None:
        """Writes the model folder, empty metrics, the state before the first step, and the recipe.

        The recipe comes last: a folder that has one can be resumed.
        """
        self.folder.begin()
        checkpoints.save(
            self.path,
            train_step.model,
            self.data.tokenizer,
            self.recipe.generate,
            self.base.get("model", ""),
        )
        self.folder.open_metrics(0)
        self.save_state(train_step)
        self.write_recipe()

    def restore(
        self, saved: SavedState, train_step: TrainStep, before: dict, note: Callable[[str], None]
    ) -> None:
        """Makes the folder what it was when the state was saved: later evaluations are made again.

        `before` are the versions in recipe.yaml; `note` gets what differs from then.
        """
        file, self.best_sha256 = self._weights_file(), saved.metadata.best_sha256
        damaged = not file.is_file() or (self.best_sha256 and sha256_of(file) != self.best_sha256)
        if damaged and saved.best_weights:
            copy_file(saved.best_weights, file)
        elif damaged:
            self._save_weights(train_step)
        if not self.folder.open_metrics(saved.counters.step, saved.metadata.metrics_bytes):
            file = self.path / "metrics.jsonl"
            note(f"{file} has changed since the state was saved: lines may be missing")
        now = self._environment()
        moved = [
            f"{before[key]} → {now[key]}" for key in now if before.get(key, now[key]) != now[key]
        ]
        if moved:
            note(f"goes on elsewhere, so not the same to the bit: {'; '.join(moved)}")

    def budget_changed(self, saved: SavedState) -> bool:
        """True if the budget is not the one that the state was saved with."""
        before = saved.metadata.recipe.get("train") or {}
        return any(
            key in before and before[key] != getattr(self.recipe.train, key) for key in BUDGETS
        )

    def log_step(self, step: Step) -> None:
        """Appends a step to metrics.jsonl."""
        self.folder.log(
            {key: value for key, value in asdict(step).items() if key not in NOT_LOGGED}
        )

    def log_validation(self, event: Validation, train_step: TrainStep, elapsed: float) -> None:
        """Appends an evaluation to metrics.jsonl; saves the weights if they are the best so far."""
        position = {"step": event.step, "tokens": train_step.counters.tokens, "elapsed": elapsed}
        self.folder.log({**position, **event.figures.metrics()})
        if event.best:
            self._save_weights(train_step)
            self.best_sha256 = sha256_of(self._weights_file())
            self.result = {"best_step": event.step, **event.figures.facts()}
            self.headline = event.figures.headline()
            self.write_recipe()

    def save_state(self, train_step: TrainStep) -> None:
        """Writes a state. Raises UserError, which says how to resume, if the disk refuses."""
        counters = train_step.counters
        # the best weights are copied into the state unless they are its own
        is_best = counters.best_step == counters.step and not counters.averaged
        metadata = RunMetadata(
            self.result,
            self.headline,
            self.folder.flush_metrics(),
            changes.plain(self.recipe),
            self.best_sha256,
            self._weights_file() if counters.best_step and not is_best else None,
            self.stages,
        )
        try:
            resume_state.save(
                self.folder.states, counters, train_step.model, train_step.optimizer, metadata
            )
        except UserError as error:
            hint = (
                "free some disk space; earlier states are intact: "
                f"lm train --resume {self.path} goes on from them"
            )
            raise UserError(
                error.what, error.where, hint if counters.step else error.hint
            ) from error

    def _save_weights(self, train_step: TrainStep) -> None:
        model = train_step.replicas.gather(train_step.model)
        assert model is not None  # only workers get None
        checkpoints.save_weights(self.path, model)

    def _weights_file(self) -> Path:
        adapter = self.recipe.train.lora_rank
        return self.path / (adapter_base.ADAPTER_WEIGHTS if adapter else checkpoints.WEIGHTS_FILE)

    def write_recipe(self) -> None:
        """Writes recipe.yaml with the facts known so far."""
        facts = {"choice": self.choices, "base": self.base, "stages": self.stages}
        self.folder.write_recipe(
            self.recipe,
            versions=changes.versions_here() | self._environment(),
            data=self.source.facts()
            | {
                "tokenizer": self.data.tokenizer.hash,
                "tokens": self.data.tokens,
                "bytes": self.data.bytes,
                "tokenizer_files": tokenizer_hashes(self.path),
            },
            validation=datasets.ranges(self.data.measured),
            result=self.result | ({"remembered": self.remembered} if self.remembered else {}),
            **{key: value for key, value in facts.items() if value},
        )

    def _environment(self) -> dict[str, str]:
        """What decides about the last bits besides versions: device, precision, kernels."""
        environment = {"device": str(self.device_config)}
        if self.device_config.device.type == "cpu":
            environment["kernels"] = "torch's kernels" if build.problem() else "compiled kernels"
        return environment

    def finish(self, train_step: TrainStep, stopped: bool) -> None:
        """Writes recipe.yaml, loss.svg and the model card of a run that has ended or stopped.

        The card has no sample yet.
        """
        counters: Counters = train_step.counters
        self.result |= {
            "steps": counters.step,
            "tokens": counters.tokens,
            "seconds": round(counters.seconds, 1),
            "epochs": round(counters.rows / train_step.rows.rows_per_epoch, 3),
            "stopped": stopped,
        }
        if drawn := datasets.drawn_rows(self.source.shares, train_step.rows, counters.rows):
            self.result["drawn"] = drawn
        self.write_recipe()
        name, target = self.path.resolve().name, self.data.objective.target
        best_step = self.result.get("best_step")
        curve = draw(self.folder.metrics(), name, target, self.data.bytes_per_token, best_step)
        write_text(self.path / "loss.svg", curve)
        self.write_card(train_step)

    def example(self, folder: str) -> CommandExample:
        """What the commands of this run are shown with."""
        chat = self.source.doc_format.chat
        return CommandExample(folder, example_text(self.data), self.source.files[0], chat)

    def write_card(self, train_step: TrainStep, sample: str = "") -> None:
        """Writes the model card, with a sample of the finished model."""
        config = train_step.model.config
        card = model_card(
            self.example(self.path.resolve().name),
            config,
            self.recipe.train,
            self.data.objective,
            sum(p.numel() for p in train_step.model.parameters()),
            family_of(config).heads[config.head],
            self.source.files,
            self.result,
            self.data.context_prefix,
            self.base.get("model", ""),
            sample,
        )
        write_text(self.path / "README.md", card)
