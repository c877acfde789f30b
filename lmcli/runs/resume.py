"""Resumes an interrupted run from its folder, as its newest intact state left it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmcli.checkpoints import adapter_base
from lmcli.config import Recipe
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup
from lmcli.errors import UserError
from lmcli.kernels.fast_path import build_model
from lmcli.model.device import DeviceConfig
from lmcli.recipes import with_settings
from lmcli.runs import changes, initial_model, memory_fit, parallelism, run_folder
from lmcli.runs.run import TrainingRun, make_train_step, make_trainer
from lmcli.runs.run_record import RunRecord, tokenizer_hashes
from lmcli.terminal import activity
from lmcli.text import tokenizer as tokenizers
from lmcli.training import datasets, objectives, resume_state
from lmcli.training.datasets import Split
from lmcli.training.objective import TrainingData
from lmcli.training.resume_state import SavedState
from lmcli.training.train_step import TrainStep


@dataclass(frozen=True)
class ResumeRequest:
    """The options of `lm train --resume`; `sets` are settings, section.key=value."""

    path: Path
    device: str
    threads: int
    sets: tuple[str, ...] = ()
    allow_changes: bool = False
    shard: bool | None = None  # None: if one process cannot hold the model


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
        recipe = with_settings(recipe, request.sets)
        saved = resume_state.newest(folder.states, note)
        activity.now("reading the data")
        split = _reread_data(request, recipe, facts, saved, note)
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
        )
        train_step.begin(saved.restore(train_step.model, train_step.optimizer))
        trainer = make_trainer(train_step, data, started_at)
        if record.budget_changed(saved):
            trainer.change_budget()
        record.restore(saved, train_step, facts.get("versions") or {}, note)
        memory_fit.fit(train_step, replicas, note)
        record.write_recipe()
    except BaseException:
        folder.release()
        raise
    note(f"going on after step {saved.counters.step:,}")
    run = TrainingRun(record, trainer)
    for text in run.opening_lines():
        note(text)
    return run


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
