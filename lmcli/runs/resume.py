"""Resumes a run from its folder, as its newest intact state left it, or trains it further."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmcli.checkpoints import adapter_base
from lmcli.config import Recipe, TrainConfig
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup
from lmcli.errors import UsageError, UserError
from lmcli.kernels.fast_path import build_model
from lmcli.model.device import DeviceConfig
from lmcli.recipes import BUDGETS, with_budget, with_settings
from lmcli.runs import changes, initial_model, memory_fit, parallelism, run_folder
from lmcli.runs.run import TrainingRun, make_train_step, make_trainer
from lmcli.runs.run_record import RunRecord, tokenizer_hashes
from lmcli.terminal import progress
from lmcli.text import tokenizer as tokenizers
from lmcli.training import datasets, objectives, resume_state
from lmcli.training.datasets import Split
from lmcli.training.objective import TrainingData
from lmcli.training.resume_state import SavedState
from lmcli.training.train_step import TrainStep


@dataclass(frozen=True)
class ResumeRequest:
    """The options of `lm train --resume`; `sets` are settings, section.key=value.

    `budget` (time, tokens, steps, epochs) is that of more training, unless the processes have
    `restarted` amid it.
    """

    path: Path
    device: str
    threads: int
    sets: tuple[str, ...] = ()
    allow_changes: bool = False
    shard: bool | None = None  # None: if one process cannot hold the model
    budget: Mapping[str, float] = field(default_factory=dict)
    restarted: bool = False


def resume(
    request: ResumeRequest,
    started_at: float,
    note: Callable[[str], None],
    replicas: ReplicaGroup = SINGLE_PROCESS,
) -> TrainingRun:
    """The run of a folder, ready for its next step. `note` gets what has changed since.

    Raises UserError if data or state are missing or damaged, if anything that decides about the
    run's numbers has changed (unless `allow_changes`), and if another process trains there.
    """
    folder, recipe, facts = run_folder.take(request.path)
    try:
        saved = resume_state.newest(folder.states, note)
        recipe = with_settings(with_settings(recipe, _state_budget(saved, facts)), request.sets)
        more = _is_more_training(request, saved, recipe.train)
        progress.now("reading the data")
        split = _reread_data(request, recipe, facts, saved, note)
        if more:
            recipe = _begin_stage(saved, recipe, request.budget)
        device_config = parallelism.select_device(request.device, recipe, request.threads)
        replicas = parallelism.choose(replicas, request.shard, recipe, device_config, note)
        data, train_step = rebuild(
            request.path, recipe, split, device_config, replicas.sharded, note
        )
        train_step = parallelism.start_workers(train_step, replicas, folder.path, resumed=True)
        result = dict(facts.get("result") or {})
        record = RunRecord(
            folder,
            recipe,
            data,
            split.source,
            device_config,
            facts.get("choice") or [],
            _recorded_base(request.path) if recipe.train.lora_rank else {},
            result.pop("remembered", []),
            # a state without a result: the model is the one that a stop has left
            saved.metadata.result or result,
            saved.metadata.headline,
            saved.metadata.stages,
        )
        train_step.begin(saved.restore(train_step.model, train_step.optimizer))
        trainer = make_trainer(train_step, data, started_at)
        if record.budget_changed(saved) and not more:
            trainer.change_budget()
        record.restore(saved, train_step, facts.get("versions") or {}, note)
        memory_fit.fit(train_step, replicas, note)
        if not more:
            record.write_recipe()
    except BaseException:
        folder.release()
        raise
    run = TrainingRun(record, trainer)
    for text in _opening_lines(run, more):
        note(text)
    return run


def _state_budget(saved: SavedState, facts: dict[str, Any]) -> list[str]:
    """Settings of the state's budget, if recipe.yaml has one of more or less training."""
    if saved.metadata.stages == (facts.get("stages") or []):
        return []
    train = saved.metadata.recipe.get("train") or {}
    return [f"train.{name}={train.get(name)}" for name in BUDGETS]


def _is_more_training(request: ResumeRequest, saved: SavedState, train: TrainConfig) -> bool:
    """True if the request's budget begins here. Raises UsageError if the run is not finished."""
    if not request.budget:
        return False
    # processes that were restarted amid more training, or at its very end
    counters = saved.counters
    finished = counters.finished or counters.begins_stage
    amid = not finished or _budget(train) == request.budget
    if request.restarted and saved.metadata.stages and amid:
        return False
    if not finished:
        raise UsageError(
            f"is not finished: it stands after step {counters.step:,}",
            where=str(request.path),
            hint=f"lm train --resume {request.path} finishes it; then it can be trained further",
        )
    return True


def _begin_stage(saved: SavedState, recipe: Recipe, budget: Mapping[str, float]) -> Recipe:
    """The recipe with a new budget, which begins where the state stands."""
    counters = saved.counters
    if counters.step > counters.stage_step:
        stage = {
            "budget": _budget(recipe.train),
            "steps": counters.step - counters.stage_step,
            "tokens": counters.tokens - counters.stage_tokens,
            "seconds": round(counters.seconds - counters.stage_seconds, 1),
        }
        saved.metadata.stages.append(stage)
    counters.begin_stage()
    return with_budget(recipe, budget)


def _budget(train: TrainConfig) -> dict[str, float]:
    """The budgets of a run by name, without those that do not limit it."""
    return {name: getattr(train, name) for name in BUDGETS if getattr(train, name)}


def _opening_lines(run: TrainingRun, more: bool) -> list[str]:
    """What to know before the next step; only that it is finished of a finished run."""
    finished = run.trainer.counters.finished
    return [_progress_line(run, more), *([] if finished else run.opening_lines())]


def _progress_line(run: TrainingRun, more: bool) -> str:
    """The line that says where the run goes on, and how far."""
    step, train = run.step, run.record.recipe.train
    if run.trainer.counters.finished:
        return (
            f"{run.folder} is finished, after {step:,} steps: "
            f"lm train --resume {run.folder} --time 10m trains it further"
        )
    if not more:
        return f"going on after step {step:,}"
    rise = f"rises to {train.learning_rate:g} in the first {train.warmup:.0%} of it"
    fall = "stays there" if train.schedule == "constant" else "falls to 0"
    budget = ", ".join(_worded(name, value) for name, value in _budget(train).items())
    return f"more training after step {step:,}: {budget}; the learning rate {rise} and {fall}"


def _worded(name: str, value: float) -> str:
    return f"{value:g} s" if name == "time" else f"{value:,} {name}"


def _reread_data(
    request: ResumeRequest,
    recipe: Recipe,
    facts: dict[str, Any],
    saved: SavedState,
    note: Callable[[str], None],
) -> Split:
    """The run's documents; requires that nothing has changed, or that the user allows it."""
    recorded = datasets.source_from_facts(facts["data"])
    unread = replace(recorded, hashes={})
    split = datasets.split(unread, recipe.train.validation_bytes, note)
    tokenizer_files = facts["data"].get("tokenizer_files", {})
    differences = [
        *changes.settings(saved.metadata.recipe, recipe),
        *changes.files(recorded.hashes, split.source.hashes),
        *changes.files(tokenizer_files, tokenizer_hashes(request.path)),
        *changes.versions(facts.get("versions") or {}),
    ]
    changes.require_allowed(differences, request.path, request.allow_changes, note)
    return split


def rebuild(
    folder: Path,
    recipe: Recipe,
    split: Split,
    device_config: DeviceConfig,
    sharded: bool,
    note: Callable[[str], None],
) -> tuple[TrainingData, TrainStep]:
    """The data and the train step of a run's folder; the weights are not loaded yet."""
    tokenizer = tokenizers.load(str(folder))
    if tokenizer.size > recipe.model.vocab_size:
        raise UserError(
            f"has {tokenizer.size:,} ids, the model has {recipe.model.vocab_size:,} rows for them",
            where=f"{folder}/tokenizer.json",
            hint="a run goes on with the tokenizer it began with",
        )
    train, objective = recipe.train, objectives.OBJECTIVES[recipe.train.objective]
    data = objectives.encode(
        objective, split, recipe.tokenizer, train.context, tokenizer, note, recipe.model.labels
    )
    model = build_model(recipe.model.complete(), train.dropout)
    if train.lora_rank or train.frozen_layers:
        initial_model.set_trainable(model, train)
    return data, make_train_step(model, data, train, device_config, sharded)


def _recorded_base(folder: Path) -> dict[str, str]:
    """What an adapter's folder records of its base model, which must exist."""
    adapter_base.find_base(folder)
    return {**adapter_base.recorded_base(folder), "model": adapter_base.base_name(folder)}
