"""A training run under way: steps, evaluations, samples and saves, to the finished folder."""

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig, TrainConfig
from lmcli.data.corpus import EncodedDocument
from lmcli.data.length_batching import tokens_per_forward
from lmcli.distributed.signals import handled
from lmcli.errors import UserError
from lmcli.generation.decoding import Decoder
from lmcli.kernels import build
from lmcli.kernels.decoding_state import decoding_state
from lmcli.model.device import DeviceConfig
from lmcli.model.transformer import Transformer
from lmcli.runs.run_record import RunRecord
from lmcli.scoring import forgetting
from lmcli.scoring.perplexity import measure_perplexity
from lmcli.scoring.scorer import Scorer
from lmcli.terminal.training_state import SampleText
from lmcli.text.tokenizer import Tokenizer
from lmcli.training import datasets, resume_state, schedules
from lmcli.training.divergence import Diverged
from lmcli.training.loop import Due, Event, Trainer, Validation, evaluated_per_trained
from lmcli.training.objective import Evaluation, Objective, TrainingData
from lmcli.training.resume_state import Counters
from lmcli.training.train_step import Note, Step, TrainStep

SAMPLE_TOKENS = 60
LARGE = 1_000_000_000  # parameters


def make_train_step(
    model: Transformer,
    data: TrainingData,
    train: TrainConfig,
    device_config: DeviceConfig,
    sharded: bool = False,
    look_first: bool = False,
) -> TrainStep:
    """The TrainStep of a model before its first step; seeds the random generators.

    A model that will be `sharded` may be too large for one device: it stays where it is. With
    `look_first` the model is evaluated before the first step.
    """
    model = (model if sharded else model.to(device_config.device)).train()
    torch.manual_seed(train.seed)
    step = TrainStep(
        model,
        data.batches(train, model.config),
        train,
        device_config,
        data.objective,
        Counters(look_first=look_first),
    )
    step.compile_if_worthwhile()
    return step


def make_trainer(train_step: TrainStep, data: TrainingData, started_at: float) -> Trainer:
    """The Trainer of a step, which evaluates on the validation set as the objective says."""
    device = train_step.device_config.device

    def perplexity(
        model: Transformer, tokenizer: Tokenizer, documents: list[EncodedDocument]
    ) -> Evaluation:
        batch_tokens = tokens_per_forward(device.type)
        scorer = Scorer(model, tokenizer, tokenizer.prefix, batch=batch_tokens)
        tokens = sum(len(document.ids) for document in documents)
        tokens = tokens * scorer.context // scorer.stride
        return Evaluation(lambda: measure_perplexity(scorer, documents), tokens)

    config = train_step.config
    evaluation = data.evaluation(train_step.model, config, perplexity)
    ratio = evaluated_per_trained(train_step.device_config.dtype)
    planned = schedules.planned_tokens(config, data.tokens)
    times = schedules.counted_evaluations(planned, evaluation.tokens, ratio)
    return Trainer(train_step, evaluation, started_at, times)


def sample_text(model: Transformer, data: TrainingData, config: GenerateConfig, step: int) -> str:
    """A text that the model continues; "" if the objective has no sample text."""
    prompt = data.sample_prompt(step, model.config)
    if prompt is None:
        return ""
    config = dataclasses.replace(config, max_new_tokens=SAMPLE_TOKENS, num_beams=1)
    if prompt.greedy:
        config = dataclasses.replace(config, temperature=0.0)
    tokenizer = data.tokenizer
    states = partial(decoding_state, model.eval())
    decoder = Decoder(model.config, states, tokenizer, tokenizer.prefix, prompt.stop_ids, config)
    text = decoder.generate([prompt.ids], [step])[0].text
    model.train()
    return f"{prompt.text} → {text}" if prompt.text else text


def finished_sample(record: RunRecord, trainer: Trainer) -> str:
    """A text of the best model, which the model card shows, too.

    "" where the objective has none, and for a model that is too large to be loaded beside it.
    """
    model, counters = trainer.train_step.model, trainer.counters
    if trainer.replicas.sharded or sum(p.numel() for p in model.parameters()) > LARGE:
        return ""
    if counters.best_step != counters.step or counters.averaged:
        try:
            model = checkpoints.load(record.path, record.device_config.device).model
        except (MemoryError, torch.OutOfMemoryError):
            return ""
    sample = sample_text(model, record.data, record.recipe.generate, counters.step)
    record.write_card(trainer.train_step, sample)
    return sample


class TrainingRun:
    """A run under way. Iterate `events()` inside `signals()`; `stopped` if a signal ended it."""

    def __init__(self, record: RunRecord, trainer: Trainer):
        self.record, self.trainer = record, trainer

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.record.path

    @property
    def model(self) -> Transformer:
        """The model in training."""
        return self.trainer.train_step.model

    @property
    def objective(self) -> Objective:
        """What the model is trained for."""
        return self.record.data.objective

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.counters.step

    @property
    def stopped(self) -> bool:
        """True if the run was stopped before its budget was used up and the result measured."""
        return self.trainer.stop and self.trainer.counters.looked < 1.0

    def events(self) -> Iterator[tuple[str, object]]:
        """("step" | "due" | "validation" | "sample" | "note", record) as they happen.

        Raises UserError if the time is over before the first step (nothing is left behind), and if
        the run diverges (the best model and earlier states stay). Then the folder is unlocked.
        """
        record, trainer = self.record, self.trainer
        try:
            for event in trainer.events():
                self._require_a_step(event)
                match event:
                    case Note():
                        yield "note", event
                    case Step():
                        record.log_step(event)
                        yield "step", event
                    case Validation():
                        record.log_validation(event, trainer.train_step, trainer.elapsed())
                        yield "validation", event
                    case Due():
                        yield "due", event
                        if event.what == "sample" and (sample := self._sample()):
                            yield "sample", SampleText(self.step, sample)
                        elif event.what == "save":
                            record.save_state(trainer.train_step)
                            if trainer.counters.begins_stage:
                                record.write_recipe()
            record.finish(trainer.train_step, self.stopped)
            if not self.stopped and (sample := finished_sample(record, trainer)):
                yield "sample", SampleText(self.step, sample, finished=True)
            if record.remembered and not self.stopped:
                yield from self._measure_forgetting()
        except Diverged as error:
            raise self._divergence(error) from error
        finally:
            record.folder.release()

    def _require_a_step(self, event: Event) -> None:
        """Raises UserError, and removes what was written, if the run ends before its first step."""
        first = isinstance(event, Note | Step) or not getattr(event, "final", True)
        counters = self.trainer.counters
        announced = isinstance(event, Due) and (event.what == "evaluation" or counters.begins_stage)
        if first or announced or counters.step > counters.stage_step or self.trainer.stop:
            return
        self.record.folder.abandon()
        raise UserError(
            f"the {self.record.recipe.train.time:g} s were over before the first step",
            where="--time",
            hint=f"it could begin after {counters.preparation:.0f} s: give more time",
        )

    def _divergence(self, error: Diverged) -> UserError:
        """The error that says what is left of a diverged run; broken states are removed."""
        best_step = self.trainer.counters.best_step
        sound_step = resume_state.drop_from(self.record.folder.states, error.since - 1)
        model = (
            f"the best model, of step {best_step:,}" if best_step else "the weights it began with"
        )
        if not sound_step:  # step 0 is an untrained model
            hint = f"no state to go back to: start again with --overwrite {error.remedy}"
        else:
            command = f"lm train --resume {self.folder} {error.remedy}"
            hint = f"the state of step {sound_step:,}: {command}"
        return UserError(error.what, error.where, f"{self.folder} keeps {model}, and {hint}")

    def _sample(self) -> str:
        if self.trainer.replicas.sharded:
            return ""
        return sample_text(self.model, self.record.data, self.record.recipe.generate, self.step)

    def _measure_forgetting(self) -> Iterator[tuple[str, object]]:
        """Measures the texts of --remember once more, with the best model."""
        sharded = self.trainer.replicas.sharded
        device = torch.device("cpu") if sharded else self.record.device_config.device
        best = checkpoints.load(self.folder, device)
        for entry in self.record.remembered:
            yield "note", Note(self.step, forgetting.progress_line(entry["file"]))
            entry["after"] = forgetting.bits_per_byte(best.model, best.tokenizer, entry["file"])
        self.record.write_recipe()

    def opening_lines(self) -> Iterator[str]:
        """What to know before the first step: model, data, device, missing locks and kernels."""
        if self.record.folder.lock_problem:
            yield self.record.folder.lock_problem
        yield self._description()
        rows = self.trainer.train_step.rows
        planned = datasets.planned_rows(self.record.recipe.train, rows.rows_per_epoch)
        yield from datasets.mixture_lines(self.record.source.shares, rows, planned)
        yield from map(forgetting.result_line, self.record.remembered)
        if self.record.device_config.device.type == "cpu" and build.problem():
            yield f"without compiled kernels training takes 1.5 times as long: {build.problem()}"

    def closing_lines(self) -> Iterator[str]:
        """The results of a finished run: figures of the best model, mixture, forgetting."""
        yield self._summary()
        rows, count = self.trainer.train_step.rows, self.trainer.counters.rows
        yield from datasets.mixture_lines(self.record.source.shares, rows, count)
        yield from map(forgetting.result_line, self.record.remembered)

    def _description(self) -> str:
        config, data = self.model.config, self.record.data
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        share = ""
        if trained < total:
            share = f", {trained:,} of them ({100 * trained / total:.1f} %) trained"
        encoder = f"{config.num_encoder_layers} + " if config.shape == "encoder-decoder" else ""
        return (
            f"{total:,} parameters{share} ({encoder}{config.num_hidden_layers} × "
            f"{config.hidden_size}), context {data.context}, vocabulary {config.vocab_size:,}, "
            f"{data.tokens:,} tokens; {self.objective.name} objective; "
            f"on {self.record.device_config}; into {self.folder}"
        )

    def _summary(self) -> str:
        result = self.record.result
        steps = f"{result['steps']:,} steps"
        when = f"before the first of {steps}"
        if result["best_step"]:
            when = f"at step {result['best_step']:,} of {result['steps']:,}"
        check = self.objective.card.verification.replace("DIR", str(self.folder))
        return (
            f"validation {self.record.headline or 'as before'}, {when} "
            f"({result['seconds']:.0f} s){f'; {check}' if check else ''}"
        )

    def signals(self) -> AbstractContextManager[None]:
        """Lets Ctrl-C, SIGTERM and SIGHUP end the run after the current step.

        A second Ctrl-C ends it at once. SIGTERM and SIGHUP often arrive twice: once is enough.
        """

        def stop(number: int, frame: object) -> None:
            if self.trainer.stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.trainer.stop = True

        return handled(stop)
