"""Starts a new training run: from the options of `lm train` to the first step."""

import os
import shlex
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcli.checkpoints import adapter_base, hub
from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.folder import Checkpoint
from lmcli.config import Recipe
from lmcli.data import diagnostics
from lmcli.data.documents import DocumentFormat, read_pieces
from lmcli.data.files import display_name
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup
from lmcli.errors import UsageError
from lmcli.model.device import DeviceConfig
from lmcli.model.transformer import Transformer
from lmcli.recipes import refuse_partial_training, require_budget
from lmcli.runs import initial_model, memory_fit, parallelism, run_folder
from lmcli.runs.run import TrainingRun, make_train_step, make_trainer
from lmcli.runs.run_record import RunRecord
from lmcli.scoring import forgetting
from lmcli.terminal import progress
from lmcli.text import tokenizer as tokenizers
from lmcli.text.tokenizer import Tokenizer
from lmcli.training import datasets, learning_rate_search, lora_init, objectives, schedules
from lmcli.training.datasets import Source, Split
from lmcli.training.loop import evaluated_per_trained
from lmcli.training.objective import Objective, TrainingData
from lmcli.training.train_step import Note, TrainStep

if TYPE_CHECKING:
    from lmcli.planning.auto_preset import AutoPreset

NoteSink = Callable[[str], None]
FEWEST_EXAMPLES = 20  # that are evaluated, unless there are fewer, or fewer bytes are asked for


@dataclass(frozen=True)
class Request:
    """The options of `lm train` for a new run; `auto` chooses the recipe of preset auto."""

    preset: str
    recipe: Recipe
    data: tuple[str, ...]
    output: str | None
    val: tuple[str, ...]
    include: str | None
    doc_format: DocumentFormat
    origin: str | None
    tokenizer: str | None
    overwrite: bool
    device: str
    threads: int
    auto: "AutoPreset | None" = None
    on_long: str = "truncate"
    targets: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of DATA and of --val
    remember: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    shard: bool | None = None  # None: if one process cannot hold the model


@dataclass(frozen=True)
class Origin:
    """The model of --from and a given tokenizer.

    `base` is what an adapter records of its model; `remember` are the files of --remember.
    """

    checkpoint: Checkpoint | None
    tokenizer: Tokenizer | None
    base: dict[str, str]
    remember: list[str]


def start(
    request: Request, started_at: float, note: NoteSink, replicas: ReplicaGroup = SINGLE_PROCESS
) -> TrainingRun:
    """A new run whose folder is claimed and loadable, ready for its first step.

    `note` gets what was chosen and left out. Raises UsageError or UserError for mistakes that the
    user can correct; nothing is left behind then.
    """
    _check(request)
    device_config = parallelism.select_device(request.device, request.recipe, request.threads)
    origin = _load_origin(request)
    folder = run_folder.claim(request.output, _run_name(request), request.overwrite)
    try:
        objective, source = _open_data(request, origin, note)
        recipe, reasons = _choose_preset(request, origin, objective, source, note)
        split = datasets.split(source, recipe.train.validation_bytes, note)
        if request.auto and not origin.checkpoint and objective.auto_sizes:
            recipe, reasons = _choose_sizes(request, origin, split, device_config, note)
        recipe, split = _choose_validation(recipe, origin, objective, split, device_config, note)
        data = _encode(request, origin, recipe, objective, split, note, started_at)
        recipe, model = _build_model(origin, recipe, data, device_config, note)
        replicas = parallelism.choose(replicas, request.shard, recipe, device_config, note)
        train_step = make_train_step(
            model,
            data,
            recipe.train,
            device_config,
            replicas.sharded,
            look_first=bool(origin.checkpoint and model is origin.checkpoint.model),
        )
        memory_fit.fit(train_step, replicas, note)
        _initialize_adapters(train_step, replicas, note)
        if request.auto and origin.checkpoint:
            train_step = _choose_learning_rate(request.auto, train_step, reasons, note)
        recipe = replace(recipe, train=train_step.config)
        remembered = _measure_before(origin, model, note)
        record = RunRecord(
            folder, recipe, data, split.source, device_config, reasons, origin.base, remembered
        )
        record.create(train_step)
        train_step = parallelism.start_workers(train_step, replicas, folder.path, resumed=False)
        run = TrainingRun(record, make_trainer(train_step, data, started_at))
    except BaseException:
        folder.abandon()
        raise
    for text in run.opening_lines():
        note(text)
    return run


def _check(request: Request) -> None:
    """Raises UsageError for options that contradict each other."""
    if request.origin and request.tokenizer:
        raise UsageError("--from brings its own tokenizer: leave --tokenizer out")
    require_budget(request.recipe, "train")
    if not request.origin:
        refuse_partial_training(request.recipe)
        if request.remember:
            raise UsageError(
                "--remember measures what a model that is trained further forgets",
                hint="name that model with --from",
            )


def _load_origin(request: Request) -> Origin:
    if not request.origin:
        tokenizer = None
        if request.tokenizer:
            tokenizer = tokenizers.load(hub.find(request.tokenizer, weights=False))
        request.recipe.model.complete()  # impossible sizes are reported before any work
        return Origin(None, tokenizer, {}, [])
    progress.now(f"loading {request.origin}")
    folder = Path(hub.find(request.origin))
    # before anything is read: the folder may be replaced meanwhile
    base = _adapter_base(request, folder) if request.recipe.train.lora_rank else {}
    checkpoint = checkpoints.load(folder)
    remember = forgetting.require_files(request.remember, checkpoint.model.config.shape)
    return Origin(checkpoint, checkpoint.tokenizer, base, remember)


def _adapter_base(request: Request, folder: Path) -> dict[str, str]:
    """What an adapter records of its base model: name and fingerprint.

    Raises UsageError if the adapter would replace its base, or the base is an adapter itself.
    """
    if request.output and folder.resolve() == Path(request.output).resolve():
        raise UsageError(
            "is the base that the adapter needs",
            where=request.output,
            hint="choose another folder with -o",
        )
    if adapter_base.is_adapter(folder):
        raise UsageError(
            "is an adapter itself, and an adapter needs a whole model",
            where=request.origin,
            hint=f"lm export {request.origin} --merge -o DIR makes one of it",
        )
    on_hub = str(folder) != request.origin
    name = str(request.origin) if on_hub else str(folder.resolve())
    return {"model": name, "weights": adapter_base.fingerprint(folder)}


def _run_name(request: Request) -> str:
    """The name of the run's folder without -o: that of the first file."""
    if not request.data or request.data[0] == "-" or request.data[0].startswith("/dev/"):
        return "stdin"
    return Path(os.path.abspath(request.data[0])).stem or "run"


def _open_data(request: Request, origin: Origin, note: NoteSink) -> tuple[Objective, Source]:
    """The objective, and the files with the format in which it reads them."""
    progress.now("reading the data")
    source = datasets.open_sources(
        request.data,
        request.val,
        request.doc_format,
        request.include,
        note,
        request.on_long,
        request.targets,
        request.weights,
    )
    train = request.recipe.train
    config = origin.checkpoint.model.config if origin.checkpoint else request.recipe.model
    objective, doc_format = objectives.resolve_objective(
        source,
        train.objective,
        config,
        note,
        _command(request),
        # preset auto has a decoder, and takes another preset if the data need another model
        any_shape=bool(request.auto and not origin.checkpoint and config.shape == "decoder"),
    )
    return objective, replace(source, doc_format=doc_format)


def _command(request: Request) -> str:
    """The command line as far as it says what is trained on what, for messages."""
    words = ["lm", "train", *request.data]
    words += [] if request.auto else ["--preset", request.preset]
    words += ["--from", request.origin] if request.origin else []
    return shlex.join(words)


def _choose_preset(
    request: Request, origin: Origin, objective: Objective, source: Source, note: NoteSink
) -> tuple[Recipe, list[str]]:
    """(recipe, reasons): with preset auto that of the preset for this model or these data."""
    if not request.auto:
        return request.recipe, []
    if origin.checkpoint:
        preset, why = objective.finetune_preset, "--from names a model"
    elif objective.preset:
        preset, why = objective.preset, f"the data are {datasets.kind(source.doc_format)}"
        chosen = request.recipe.train.objective
        if chosen in objectives.OBJECTIVES:
            why = f"train.objective is {objective.name}"
    else:
        return request.recipe, []
    reason, recipe = f"as preset {preset}, since {why}", request.auto.resolve({}, preset)
    if not origin.checkpoint and recipe.model.shape != objective.shape:
        raise UsageError(
            f"objective {objective.name} needs the shape {objective.shape}",
            where="--set model.shape",
            hint=f"leave it out: preset {preset} has that shape",
        )
    note(f"auto: {reason}")
    return recipe, [reason]


def _choose_sizes(
    request: Request, origin: Origin, split: Split, device_config: DeviceConfig, note: NoteSink
) -> tuple[Recipe, list[str]]:
    """(recipe, reasons) of preset auto for a text."""
    assert request.auto is not None
    progress.now("measuring this machine")
    pieces = read_pieces(split.training, split.source.doc_format)
    texts, size = (piece.text for piece in pieces), split.training.bytes
    vocab_size = origin.tokenizer.size if origin.tokenizer else 0
    recipe, reasons = request.auto.for_text(texts, size, device_config, vocab_size)
    for reason in reasons:
        note(f"auto: {reason}")
    return recipe, reasons


def _choose_validation(
    recipe: Recipe,
    origin: Origin,
    objective: Objective,
    split: Split,
    device_config: DeviceConfig,
    note: NoteSink,
) -> tuple[Recipe, Split]:
    """The recipe with the bytes to evaluate, and the split with as many of them."""
    ratio = evaluated_per_trained(device_config.dtype) / objective.evaluation_passes
    if origin.checkpoint:  # it is evaluated before the first step as well
        ratio /= 2
    size = schedules.validation_bytes(recipe.train, split.training.bytes, ratio)
    if split.source.doc_format.has_examples and not recipe.train.validation_bytes:
        size = max(size, FEWEST_EXAMPLES * split.validation.bytes // len(split.validation) + 1)
    recipe = replace(recipe, train=replace(recipe.train, validation_bytes=size))
    return recipe, datasets.measure_fewer(split, size, note)


def _remarks(origin: Origin, split: Split) -> Iterator[str]:
    """What will make a model bad: a text of another language than the tokenizer's, too little."""
    doc_format = split.source.doc_format
    if origin.tokenizer:
        texts = (piece.text for piece in read_pieces(split.training, doc_format))
        data = display_name(split.source.files[0])
        advice = (
            f"learn one with lm tokenize --train -o tok {data} and a model with --tokenizer tok"
        )
        yield diagnostics.foreign_text(texts, origin.tokenizer, advice)
    if not (origin.checkpoint or doc_format.has_examples):
        yield diagnostics.little_text(split.training.bytes)


def _encode(
    request: Request,
    origin: Origin,
    recipe: Recipe,
    objective: Objective,
    split: Split,
    note: NoteSink,
    started_at: float,
) -> TrainingData:
    """The encoded data, in a context that the model of --from has."""
    for remark in filter(None, _remarks(origin, split)):
        note(remark)
    context = recipe.train.context
    config = origin.checkpoint.model.config if origin.checkpoint else recipe.model
    if origin.checkpoint and context > config.max_position_embeddings:
        context = config.max_position_embeddings
        note(f"context is {context} tokens, all that {request.origin} has")
    labels = () if recipe.train.new_head else config.labels
    deadline = started_at + recipe.train.time if recipe.train.time else None
    return objectives.encode(
        objective, split, recipe.tokenizer, context, origin.tokenizer, note, labels, deadline
    )


def _build_model(
    origin: Origin, recipe: Recipe, data: TrainingData, device_config: DeviceConfig, note: NoteSink
) -> tuple[Recipe, Transformer]:
    """(the recipe with all that is now known, the model to train)."""
    progress.now("building the model")
    train = replace(recipe.train, context=data.context, objective=data.objective.name)
    recipe = replace(recipe, train=train)
    if origin.checkpoint:
        model = initial_model.from_pretrained(origin.checkpoint.model, recipe, data, note)
    else:
        model = initial_model.from_scratch(recipe, data, device_config)
    return replace(recipe, model=model.config), model


def _initialize_adapters(train_step: TrainStep, replicas: ReplicaGroup, note: NoteSink) -> None:
    """With lora_init=gradient, starts adapters at the first gradient."""
    if not train_step.config.lora_rank or train_step.config.lora_init != "gradient":
        return
    if replicas.sharded:
        raise UsageError(
            "lora_init=gradient does not work with --shard", where="train", hint="lora_init: random"
        )
    _drain_notes(lora_init.gradient_init(train_step), note)


def _choose_learning_rate(
    auto: "AutoPreset", train_step: TrainStep, reasons: list[str], note: NoteSink
) -> TrainStep:
    """The step at a rate that suits the model, unless the user gave one; adds the reason."""
    objective, config = train_step.objective, train_step.config
    rates = auto.learning_rates(objective.finetune_preset, config)
    if not rates:
        return train_step
    losses: dict[float, float] = {}
    progress.now("trying learning rates")
    if train_step.counters.look_first:
        losses = _drain_notes(learning_rate_search.search(train_step, rates), note)
    rate, reason = rates[0], f"learning rate {rates[0]:g}: the budget is too small to try others"
    if losses:
        rate, reason = auto.best_rate(losses, objective.target, learning_rate_search.STEPS)
    note(f"auto: {reason}")
    reasons.append(reason)
    return replace(train_step, config=replace(config, learning_rate=rate))


def _drain_notes(events: Generator[Note, None, Any], note: NoteSink) -> Any:
    """The result of a generator of Notes, each of which is passed on."""
    while True:
        try:
            note(next(events).text)
        except StopIteration as done:
            return done.value


def _measure_before(origin: Origin, model: Transformer, note: NoteSink) -> list[dict[str, Any]]:
    """Bits per byte of the texts of --remember before training."""
    entries: list[dict[str, Any]] = []
    for file in origin.remember:
        assert origin.tokenizer is not None
        note(forgetting.progress_line(file))
        before = forgetting.bits_per_byte(model, origin.tokenizer, file)
        entries.append({"file": file, "before": before, "after": None})
    return entries
