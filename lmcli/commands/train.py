"""lm train: from text files to a model folder."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import STARTED_AT, options
from lmcli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from lmcli.config import Recipe
    from lmcli.display import TrainingView
    from lmcli.distributed.data_parallel import ReplicaGroup
    from lmcli.runs.run import TrainingRun
    from lmcli.runs.start import Request

# options that --resume takes; any other would make it another run
WITH_RESUME = {
    *("resume", "allow_changes", "nproc", "shard", "sets", "device", "threads"),
    *("quiet", "verbose"),
    *("time_", "steps", "tokens", "epochs", "report_to"),
}


def _list_presets(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        options.print_presets()
        context.exit()


@options.command(
    """
  lm train notes.txt -o runs/notes             a small model of your text
  lm train book.txt --preset small --time 10m
  lm train reviews.csv --fields text=review,label=sentiment  a classifier
  lm train more.txt --from runs/book -o runs/more            fine-tuning
  lm train --resume runs/book                  goes on with an interrupted run
  lm train --resume runs/book --time 10m       ten more minutes for a finished run
  lm train pairs.jsonl          rows with source and target: a translator
  lm train a.txt b.jsonl --weights 3,1   three rows of a.txt for each one of b.jsonl
  lm train chat.jsonl --field message --set model.hidden_size=192
  lm train squad.jsonl --preset qa --from bert    rows with context, question, answers
  lm train more.txt --from runs/book --lora 8     a LoRA adapter of rank 8
  lm train notes.txt --check-resume     tests that runs here resume bit for bit
""",
    guide="training",
)
@options.data
@click.option("--preset", default="auto", metavar="NAME|FILE", help="Recipe; auto chooses one.")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="List the presets and what each is for.",
)
@click.option("--from", "origin", metavar="MODEL", help="Fine-tune this model, with its tokenizer.")
@click.option(
    "--resume", metavar="DIR", help="Resume a run bit for bit; with a budget, train it further."
)
@options.rare(
    options.flag(
        "--allow-changes",
        help="With --resume: continue although data, tokenizer, recipe or versions have changed, "
        "and list the changes.",
    ),
    options.flag(
        "--check-resume",
        help="Do not train; test in under a minute that runs on this data resume bit for bit here.",
    ),
    options.number("--seed", at_least=0, help="Seed of weights, data order, dropout and samples."),
)
@options.validation
@options.reading_documents
@options.section(
    "Data",
    options.rare(
        click.option(
            "--weights",
            type=options.WEIGHTS_TYPE,
            default=(),
            metavar="W,W...",
            help="Sampling weights: draw rows from the DATA in this proportion, for any sizes.",
        ),
        options.repeated(
            "--target",
            "targets",
            metavar="FILE",
            help="Target of each line of DATA, line by line (two parallel files).",
        ),
        options.repeated("--val-target", "val_targets", metavar="FILE", help="Targets of --val."),
        options.choice(
            "--on-long",
            values=["truncate", "skip", "error"],
            default="truncate",
            help="Example longer than the context: cut off its end, skip it, or stop.",
        ),
        options.documents,
    ),
)
@options.settings
@options.section(
    "Model",
    click.option(
        "--tokenizer",
        "tokenizer_folder",
        metavar="DIR",
        help="Use this tokenizer instead of learning one.",
    ),
    options.number("--lora", metavar="RANK", help="With --from: train a LoRA adapter."),
    options.rare(
        options.number("--freeze", help="With --from: freeze the embedding and the first N blocks.")
    ),
)
@options.budgets
@options.section(
    "Output",
    click.option(
        "-o", "--output", metavar="DIR", help="Run folder.  [default: the next runs/NAME]"
    ),
    options.rare(
        options.flag("--overwrite", help="Replace the run in the folder of -o."),
        options.repeated(
            "--remember",
            metavar="FILE",
            help="With --from: measure bits per byte of FILE before and after, to see forgetting.",
        ),
        click.option(
            "--report-to",
            multiple=True,
            type=click.Choice(["wandb", "trackio", "tensorboard"]),
            help="Send figures and samples there too, resumed runs included; may be repeated.",
        ),
    ),
)
@options.quiet
@options.verbose
@options.hardware
@options.nproc
@options.section(
    "Machine",
    options.rare(
        click.option(
            "--shard/--no-shard",
            default=None,
            help="Shard the model across processes, or replicate it.  [default: shard if need be]",
        )
    ),
)
def train(args: options.Arguments) -> None:
    """Trains a model on text, or fine-tunes one, and prints its folder.

    DATA is text files, directories, or standard input. A decoder learns from text; an encoder from
    text (masked words), from rows with text and label, or from rows with context, question and
    answers; an encoder–decoder from rows with source and target. Preset auto goes by the fields
    and says what it takes. Without --tokenizer a byte-level BPE is learned first, on the training
    set only.

    The run ends at the first budget reached of --time, --steps, --tokens and --epochs; any of them
    replaces the preset's budgets. Ctrl-C, SIGTERM or a closed terminal save the run; how to resume
    it is printed. Of --set, --resume takes train.learning_rate.
    """
    _check(args)
    from lmcli.display import TrainingView, note
    from lmcli.distributed import launcher

    if args.nproc > 1 and not launcher.is_distributed():
        click.get_current_context().exit(
            launcher.run_processes(args.nproc, sys.argv[1:], _silent if args.quiet else note)
        )
    with TrainingView(args.quiet or not launcher.is_leader()) as view, launcher.report_loss_once():
        from lmcli.distributed import data_parallel  # torch, while the view is there already

        replicas = data_parallel.join()
        if replicas.is_leader:
            _lead(args, replicas, view, _silent if args.quiet else note)
        else:
            _work(args, replicas)


def _silent(text: str) -> None:
    """Drops a message, with --quiet."""


def _lead(
    args: options.Arguments,
    replicas: "ReplicaGroup",
    view: "TrainingView",
    note: Callable[[str], None],
) -> None:
    """Trains as the leader, or as the only process, and prints the folder."""
    from lmcli.distributed import launcher
    from lmcli.runs import closing_report, resume_check, start
    from lmcli.runs.resume import ResumeRequest, resume

    budget = {name: value for name, value in options.budget(args).items() if value and args.resume}
    if replicas.size > 1:
        args.output, args.resume, args.overwrite = launcher.restart_options(
            args.output, args.resume, args.overwrite
        )
    if args.check_resume:
        result = resume_check.check(_request(args), note)
        view.end()
        options.echo(result)
        return
    if args.resume:
        request = ResumeRequest(
            Path(args.resume),
            args.device,
            args.threads or 0,
            args.sets,
            args.allow_changes,
            args.shard,
            budget,
            launcher.is_restarted(),
        )
        run = resume(request, STARTED_AT, note, replicas)
    else:
        run = start.start(_request(args), STARTED_AT, note, replicas)
    _show(run, view, args.report_to, note)
    view.end(report=closing_report.report(run) if view.live else None)
    summary, *others = run.closing_lines()
    for line in others if view.live else (summary, *others):
        note(line)
    options.echo(run.folder)


def _show(
    run: "TrainingRun", view: "TrainingView", services: Sequence[str], note: Callable[[str], None]
) -> None:
    """Trains to the end and shows the run's events; raises Interrupted after Ctrl-C."""
    from lmcli.runs.tracking import Tracking

    view.begin(run)
    with run.signals(), closing(Tracking(run, services, note)) as tracking:
        for kind, event in run.events():
            view.show(kind, event)
            tracking.report(kind, event)
    if run.stopped:
        raise Interrupted(
            f"stopped after step {run.step:,} and saved; "
            f"resume with: lm train --resume {run.folder}"
        )


def _request(args: options.Arguments) -> "Request":
    """The options as the request for a new run."""
    from lmcli import recipes
    from lmcli.data.documents import DocumentFormat
    from lmcli.planning.auto_preset import AutoPreset
    from lmcli.runs.start import Request

    train = {
        **options.budget(args),
        "seed": args.seed,
        "precision": None if args.dtype == "auto" else args.dtype,
        "lora_rank": args.lora,
        "frozen_layers": args.freeze,
    }

    def resolve(defaults: Mapping[str, Any], preset: str = args.preset) -> "Recipe":
        return recipes.resolve(preset, args.sets, train, defaults)

    return Request(
        preset=args.preset,
        recipe=resolve({}),
        data=args.data,
        output=args.output,
        val=args.val,
        include=args.include,
        doc_format=DocumentFormat(args.documents, args.format_, args.fields, args.on_error),
        origin=args.origin,
        tokenizer=args.tokenizer_folder,
        overwrite=args.overwrite,
        device=args.device,
        threads=args.threads or 0,
        auto=AutoPreset(resolve) if args.preset == "auto" else None,
        on_long=args.on_long,
        targets=(args.targets, args.val_targets),
        remember=args.remember,
        weights=args.weights,
        shard=args.shard,
    )


def _work(args: options.Arguments, replicas: "ReplicaGroup") -> None:
    """Trains as a worker: prints nothing, and leaves errors and signals to the leader."""
    import signal

    from lmcli.distributed.signals import stop_signals
    from lmcli.runs import worker

    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    worker.work(replicas, args.device, args.threads or 0)


def _check(args: options.Arguments) -> None:
    """Raises UsageError for options that exclude each other."""
    if args.dtype == "float16":
        raise UsageError(
            "float16 training needs loss scaling, which lm does not have",
            hint="use --dtype bfloat16 or float32",
        )
    if args.origin and any(
        setting.lstrip().startswith(("model.", "tokenizer.")) for setting in args.sets
    ):
        raise UsageError(
            "--from brings its own model and tokenizer",
            hint="leave out --set model.… and --set tokenizer.…",
        )
    if args.report_to:
        from lmcli.runs.tracking import require_installed

        require_installed(args.report_to)
        if args.check_resume:
            raise UsageError("--report-to and --check-resume exclude each other")
    if args.resume:
        _check_resume(args)
    elif args.allow_changes:
        raise UsageError("--allow-changes needs --resume", hint="add --resume DIR, or leave it out")
    elif args.weights and args.targets:
        raise UsageError(
            "--weights mixes texts, --target pairs the lines of two files",
            hint="leave one of them out",
        )
    elif not args.data and sys.stdin.isatty():
        raise UsageError(
            "nothing to train on: give DATA, or pipe text in", hint="see lm train --help"
        )


def _check_resume(args: options.Arguments) -> None:
    """Raises UsageError for options and settings that would make --resume another run."""
    from lmcli.runs.changes import CHANGEABLE

    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source == click.core.ParameterSource.COMMANDLINE and name not in WITH_RESUME:
            shown = "DATA" if name == "data" else parameter.opts[0]
            raise UsageError(
                f"--resume and {shown} exclude each other",
                hint="leave it out, or start a new run with --from",
            )
    budget = [name for name, value in options.budget(args).items() if value]
    for setting in args.sets:
        section, _, key = setting.partition("=")[0].strip().partition(".")
        if section == "train" and budget and key in options.budget(args):
            raise UsageError(
                f"--{budget[0]} and --set {setting} exclude each other", hint="give one of them"
            )
        if section != "train" or not (key in CHANGEABLE or args.allow_changes):
            raise UsageError(
                f"--set {setting} cannot be changed on resume",
                hint=f"leave it out: only {', '.join(CHANGEABLE)} of train may change; "
                "--allow-changes permits other keys of train",
            )
