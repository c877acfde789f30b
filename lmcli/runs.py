"""How a training run comes to be: from what a user asked for, from its folder, or beside the process that leads it."""

import dataclasses
import os
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcli import first_model, launch
from lmcli.analysis import auto, remembering
from lmcli.checkpoints import adapter_base, hub
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import Recipe
from lmcli.errors import Lost, UsageError, UserError
from lmcli.model import group, kernels
from lmcli.model.device import Placement, dtype_name, place
from lmcli.model.transformer import Transformer
from lmcli.recipes import changed, require_budget, require_origin
from lmcli.text import tokenizer as tokenizers
from lmcli.text.documents import Layout
from lmcli.training import adapter_start, changes, data, memory_room, rate_trial, run_folder, state
from lmcli.training.divergence import Diverged
from lmcli.training.objectives import OBJECTIVES
from lmcli.training.parallel import ALONE, Team
from lmcli.training.sharding import ShardedTeam
from lmcli.training.stepper import Note
from lmcli.training_run import TrainingRun, tokenizer_files

ONE_EACH = "each process takes a GPU of its own: start no more than there are, or with --device cpu"


@dataclass
class Request:
    """What a user asked `lm train` for. With `refine` (preset auto) the recipe is chosen by the data: it gives the recipe
    with such settings below the user's own, of another preset where one is named. `shard` says whether processes share out
    the model; None: where one could not hold it."""

    recipe: Recipe
    data: tuple[str, ...]
    output: str | None
    val: tuple[str, ...]
    include: str | None
    layout: Layout
    origin: str | None
    tokenizer: str | None
    overwrite: bool
    device: str
    threads: int
    refine: Callable[..., Recipe] | None = None
    on_long: str = "truncate"
    targets: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    remember: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    shard: bool | None = None


def start(request: Request, began: float, note: Callable[[str], None], team: Team = ALONE) -> TrainingRun:
    """A new run, its folder claimed and loadable, ready for its first step; the others of the team `follow`. `note` gets
    what was chosen and left out.

    Raises UsageError or UserError for what the user can mend; nothing is left behind then.
    """
    recipe = request.recipe
    if request.origin and request.tokenizer:
        raise UsageError("--from brings its own tokenizer: leave --tokenizer out")
    require_budget(recipe, "train")
    if not request.origin:
        require_origin(recipe)
        if request.remember:
            raise UsageError("--remember measures what a model that is trained further forgets",
                             hint="--from names that model")
    placement = place(request.device, recipe.train.precision, request.threads, training=True)
    group.require_gpus(group.here(), placement.device, ONE_EACH)
    folder = Path(hub.find(request.origin)) if request.origin else None
    base = _base(request, folder) if folder and recipe.train.lora_rank else {}
    origin = checkpoints.load(folder) if folder else None
    tokenizer = origin.tokenizer if origin else \
        tokenizers.load(hub.find(request.tokenizer, weights=False)) if request.tokenizer else None
    remember = remembering.checked(request.remember, origin.model.config.shape if origin else "")
    if not origin:
        recipe.model.complete()  # impossible sizes are told before any work is done
    name = Path(os.path.abspath(request.data[0])).stem if request.data and request.data[0] != "-" else "stdin"
    place_of_run = run_folder.claim(request.output, name or "run", request.overwrite)
    try:
        source = data.find(request.data, request.val, request.layout, request.include, note, request.on_long,
                           request.targets, request.weights)
        config = origin.model.config if origin else recipe.model
        objective = data.settle(source, recipe.train.objective, config.shape, note, config.multi_label)
        parts, chosen = data.split(source, recipe.train.validation_bytes, note), []
        if request.refine and origin:
            preset = auto.further(objective.name)
            recipe, chosen = request.refine({}, preset), [f"as preset {preset}, since --from names a model"]
        elif request.refine and objective.name == "causal":
            text = auto.describe((piece.text for piece in source.layout.pieces(parts.training)), parts.training.bytes)
            recipe, chosen = auto.refined(request.refine, text, placement, tokenizer.size if tokenizer else 0)
        for reason in chosen:
            note(f"auto: {reason}")
        context = recipe.train.context
        if origin and context > origin.model.config.max_position_embeddings:
            context = origin.model.config.max_position_embeddings
            note(f"context is {context} tokens, all that {request.origin} has")
        prepared = data.prepare(source, parts, recipe.tokenizer, context, tokenizer, note, objective,
                                () if recipe.train.new_head else config.labels)
        if long := data.in_windows(prepared):
            note(f"{long:,} of {len(prepared.corpus):,} contexts have no room in {context} tokens: they are read in windows")
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(
            recipe.train, context=prepared.context, objective=objective.name))
        model = first_model.adopted(origin.model, recipe, prepared, objective, note) if origin else \
            first_model.fresh(recipe, prepared, placement, objective)
        recipe = dataclasses.replace(recipe, model=model.config)
        team = _dividing(team, request.shard, recipe, placement, note)
        run = TrainingRun(place_of_run, recipe, prepared, source, model, placement, began, team)
        run.chosen, run.base = chosen, base
        run.loop.counters.look_first = bool(origin) and model is origin.model  # a head that is new knows nothing yet
        memory_room.fit(run.loop, note, team)
        if recipe.train.lora_rank and recipe.train.lora_init == "gradient":
            if team.shards:
                raise UsageError("lora_init: the first gradient is one process's, which --shard leaves without the model",
                                 where="train", hint="lora_init: random")
            _noted(adapter_start.align(run.loop), note)
        if request.refine and origin and auto.further(objective.name) == auto.AS_TEXT:
            run.chosen += _rate_chosen(run, request.refine, note)
        for file in remember:
            note(remembering.begun(file))
            run.remembered.append({"file": file, "before": remembering.bits_per_byte(run.model, tokenizer, file),
                                   "after": None})
        run.create()
        _lead(run, team, resumed=False)
    except BaseException:
        place_of_run.abandon()
        raise
    _tell(run, note)
    return run


def _base(request: Request, folder: Path) -> dict[str, str]:
    """What an adapter is to know of the model in a folder, of which nothing has been read yet: it may be replaced meanwhile.

    Raises UsageError where the adapter would lie in the same folder, and for an adapter.
    """
    if request.output and folder.resolve() == Path(request.output).resolve():
        raise UsageError("is the base that the adapter needs", where=request.output, hint="choose another folder with -o")
    if adapter_base.is_adapter(folder):
        raise UsageError("is an adapter itself, and an adapter needs a whole model under it", where=request.origin,
                         hint=f"lm export {request.origin} --merge -o DIR makes one of it")
    called = request.origin if str(folder) != request.origin else str(folder.resolve())
    return {"model": called, "weights": adapter_base.fingerprint(folder)}


def _rate_chosen(run: TrainingRun, refine: Callable[..., Recipe], note: Callable[[str], None]) -> list[str]:
    """Has a model of --from learn at the rate that a few steps say suits it, unless the user gave one; says why."""
    rates = auto.rates(run.recipe.train)
    if any(refine({"train.learning_rate": rate}, auto.AS_TEXT).train.learning_rate != rate for rate in rates):
        return []
    alone = run.loop.counters.look_first and run.loop.team.size == 1
    losses = _noted(rate_trial.tried(run.loop, rates), note) if alone else {}
    rate, reason = auto.best_rate(losses, run.objective.target, rate_trial.STEPS) if losses else \
        (rates[0], f"learning rate {rates[0]:g}: there is no room to try others")
    run.learn_at(rate)
    note(f"auto: {reason}")
    return [reason]


def _noted(events: Generator[Note, None, Any], note: Callable[[str], None]) -> Any:
    """What a generator of Notes comes to, each of them told."""
    try:
        while True:
            note(next(events).text)
    except StopIteration as end:
        return end.value


def resume(path: str, device: str, threads: int, began: float, note: Callable[[str], None],
           sets: tuple[str, ...] = (), allow_changes: bool = False, team: Team = ALONE,
           shard: bool | None = None) -> TrainingRun:
    """The run of a folder, as its newest sound state left it, with `section.key=value` settings from there on. `note` gets
    what has changed since, which `allow_changes` lets it.

    Raises UserError when data or state are missing or damaged, when anything the run's numbers come from has changed, and
    when another process is training in the folder.
    """
    place_of_run, recipe, facts = run_folder.take(Path(path))
    try:
        recipe = changed(recipe, sets)
        saved = state.newest(place_of_run.states, note)
        source = data.source_from_facts(facts["data"])
        known, source.hashes = source.hashes, {}
        parts = data.split(source, recipe.train.validation_bytes, note)
        changes.require_allowed([
            *changes.settings(saved.beside.recipe, recipe), *changes.files(known, source.hashes),
            *changes.files(facts["data"].get("tokenizer_files", {}), tokenizer_files(Path(path))),
            *changes.versions(facts.get("versions") or {})], Path(path), allow_changes, note)
        placement = place(device, recipe.train.precision, threads, training=True)
        group.require_gpus(group.here(), placement.device, ONE_EACH)
        team = _dividing(team, shard, recipe, placement, note)
        run = _rebuilt(place_of_run, recipe, source, parts, placement, began, note, team)
        _lead(run, team, resumed=True)
        run.chosen = facts.get("choice") or []
        if recipe.train.lora_rank:
            adapter_base.find(Path(path))
            run.base = {**adapter_base.facts(Path(path)), "model": adapter_base.name(Path(path))}
        run.go_on_from(saved, facts, note)
    except BaseException:
        place_of_run.release()
        raise
    note(f"going on after step {run.step:,}")
    _tell(run, note)
    return run


def _rebuilt(place_of_run: run_folder.RunFolder, recipe: Recipe, source: data.Source, parts: data.Parts,
             placement: Placement, began: float, note: Callable[[str], None], team: Team) -> TrainingRun:
    """The run of a folder with weights that are nothing yet."""
    path = place_of_run.path
    tokenizer = tokenizers.load(str(path))
    if tokenizer.size > recipe.model.vocab_size:
        raise UserError(f"has {tokenizer.size:,} ids, the model has {recipe.model.vocab_size:,} rows for them",
                        where=f"{path}/tokenizer.json", hint="a run goes on with the tokenizer it began with")
    prepared = data.prepare(source, parts, recipe.tokenizer, recipe.train.context, tokenizer, note,
                            OBJECTIVES[recipe.train.objective], recipe.model.labels)
    model = Transformer(recipe.model.complete(), recipe.train.dropout)
    if recipe.train.lora_rank or recipe.train.frozen_layers:
        first_model.choose_trained(model, recipe.train)
    return TrainingRun(place_of_run, recipe, prepared, source, model, placement, began, team)


def _dividing(team: Team, shard: bool | None, recipe: Recipe, placement: Placement, note: Callable[[str], None]) -> Team:
    """The team as one that shares out the model, where that was asked for or one process could not hold it."""
    if team.size == 1:
        if shard:
            raise UsageError("--shard shares out a model among processes, and there is one", hint="give --nproc N as well")
        return team
    if shard is None and memory_room.for_one(recipe, placement):
        return team
    note(f"weights, gradients and moments are shared out among {team.size} processes")
    return ShardedTeam(team.rank, team.size)


def _lead(run: TrainingRun, team: Team, resumed: bool) -> None:
    """Lets the other processes of a team, which `follow`, join a run that has its weights, or is about to take them from its
    newest state."""
    if team.size == 1:
        return
    launch.remember_folder(run.folder)
    team.tell({"folder": str(run.folder.resolve()), "resumed": resumed, "shards": team.shards,
               "precision": dtype_name(run.placement.dtype)})
    if not resumed:
        team.share_weights(run.model)
    run.loop.join(team)


def follow(team: Team, device: str, threads: int) -> None:
    """Joins the run that the leader tells of and makes its steps to the end; all see the same files.

    Raises Lost when the leader has gone, or ends for a reason that this process has found as well.
    """
    def silent(text: str) -> None:
        """The leader has said it."""

    heard = team.hear()
    if heard["shards"]:
        team = ShardedTeam(team.rank, team.size)
    place_of_run, recipe, facts = run_folder.reopen(Path(heard["folder"]))
    source = data.source_from_facts(facts["data"])
    parts = data.split(source, recipe.train.validation_bytes, silent)
    placement = place(device, heard["precision"], threads, training=True)  # "auto" is measured, and must not differ
    run = _rebuilt(place_of_run, recipe, source, parts, placement, 0.0, silent, team)
    if not heard["resumed"]:
        team.share_weights(run.model)
    run.loop.join(team)
    if heard["resumed"]:
        state.newest(place_of_run.states, silent).restore(run.model, run.loop.optimizer)
    try:
        for _, part in run.loop.follow():
            with suppress(UserError):  # of a disk that refuses: the leader hears of it, and tells it
                state.write_share(Path(part), run.model, run.loop.optimizer)
    except UserError as error:
        if team.shards and not isinstance(error, Diverged):  # memory that ran out here alone
            raise
        raise Lost(error.what, hint="the leader has met the same, and tells it") from error


def _tell(run: TrainingRun, note: Callable[[str], None]) -> None:
    if run.place.held.missing:
        note(run.place.held.missing)
    note(run.description())
    for text in (*run.shares(), *run.memories()):
        note(text)
    if run.placement.device.type == "cpu" and kernels.problem():
        note(f"without the compiled kernels training takes half as long again: {kernels.problem()}")
