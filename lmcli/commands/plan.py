"""lm plan: size, memory, time and quality of a training run, before it is run."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import STARTED_AT, options
from lmcli.errors import UsageError
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.config import Recipe
    from lmcli.model.device import DeviceConfig
    from lmcli.planning.cluster import DeviceGroup
    from lmcli.planning.plan import Plan, PlannedText, Planner

PRESETS = ("auto", "tiny", "small", "base")  # what lm train chooses, then decoders by size


@options.command(
    """
  lm plan notes.txt --time 30m
  lm plan book.txt --time 10m --preset small --set model.hidden_size=256
  lm plan corpus/ --tokens 50000000 --preset tiny --preset ./mine.yaml --json
  lm plan corpus/ --preset base --devices 8,64,512 --interconnect 50
  cat *.txt | lm plan --epochs 3 --preset tiny
""",
    guide="planning",
)
@options.data
@options.repeated(
    "--preset",
    "presets",
    metavar="NAME|FILE",
    help=f"Plan this recipe; may be repeated.  [default: {', '.join(PRESETS)}]",
)
@options.settings
@options.budgets
@options.validation
@options.rare(options.documents)
@options.training_dtype("Precision; auto: the recipe's, else bfloat16 where it is faster.")
@options.section(
    "Machine",
    click.option(
        "--devices",
        "counts",
        type=options.COUNTS_TYPE,
        multiple=True,
        metavar="N[,N...]",
        help="Plan for N devices like this; a row each.",
    ),
    options.rare(
        click.option(
            "--interconnect",
            type=click.FloatRange(min=0, min_open=True),
            metavar="GB/S",
            help="Bandwidth between two devices in each direction.  [default: 25, that is "
            "200 Gbit/s]",
        )
    ),
)
@options.nproc
@options.reading_documents
@options.device
@options.threads
@options.json_output
@options.quiet
def plan(args: options.Arguments) -> None:
    """Predicts a training run on DATA here, a row a preset: size, memory, time, about how good.

    Budgets are those of lm train: the run ends at the first one reached of --time, --steps,
    --tokens and --epochs, else of the preset's. Tokens per second are measured with a few real
    training steps, bytes per token with a tokenizer learned from a sample. Memory is the peak of
    the process: weights, gradients, optimizer state, activations, and the program itself. Bits per
    byte on the validation set are estimated by a fit to small models, good to about a tenth.

    --devices plans for several GPUs like the one here, or machines like this one; --nproc for
    several processes on this machine, as in lm train. Memory is then that of one device, and the
    assumptions are printed.
    """
    counts = _check(args)
    from lmcli import display
    from lmcli.data.documents import DocumentFormat
    from lmcli.distributed import launcher
    from lmcli.model.device import select_device
    from lmcli.output import plan as output
    from lmcli.output.cells import short_names
    from lmcli.planning import advice, cluster
    from lmcli.planning import plan as planning
    from lmcli.planning.background_load import BackgroundLoad
    from lmcli.terminal.wrapping import message_for
    from lmcli.text.characters import counted

    note: Callable[[str], None] = (lambda text: None) if args.quiet else display.note
    recipes = _recipes(args)
    first = next(iter(recipes.values()))
    threads = args.threads or (launcher.threads_per_process(args.nproc) if args.nproc > 1 else 0)
    device_config = select_device(args.device, first.train.precision, threads, training=True)
    bandwidth = args.interconnect and 1e9 * args.interconnect
    groups = cluster.device_groups(counts, args.nproc, bandwidth, device_config.device)
    startup = time.monotonic() - STARTED_AT
    document_format = DocumentFormat(args.documents, args.format_, args.fields, args.on_error)
    text = planning.read_text(args.data, args.val, document_format, args.include, first, note)
    note(
        f"{counted(text.documents, 'document')}, {text.bytes:,} bytes to train on; "
        f"trying {', '.join(recipes)} on {device_config}"
    )
    if "auto" in recipes:
        recipes["auto"] = _chosen_by_auto(args, text, device_config, note)
    assumptions = cluster.assumptions(groups, str(device_config))
    for assumption in assumptions:
        note(assumption)
    load = BackgroundLoad(args.nproc - 1, device_config) if groups[0].local else None
    planner = planning.Planner(text, device_config, startup, load)
    advised = [advice.advise(list(_plans(planner, recipes, group))) for group in groups]
    rows = output.rows([plan for plans, _ in advised for plan in plans])
    many, names = bool(assumptions), dict(zip(recipes, short_names(list(recipes))))
    display.print_rows(
        [{**row, "assumptions": assumptions} for row in rows],
        list(rows[0]),
        args.as_json,
        lambda row: output.readable(row, names, display.clock(row["seconds"]), many),
    )
    if sys.stdout.isatty() and not args.as_json:
        options.echo(message_for(sys.stdout, "\n".join(output.advice(rows, many))))
    for group, (_, best) in zip(groups, advised):
        note(f"{output.devices(group.size)}: {best}" if len(groups) > 1 else best)


def _plans(
    planner: "Planner", recipes: Mapping[str, "Recipe"], group: "DeviceGroup"
) -> "Iterator[Plan]":
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        with progress.stage(f"measuring {name} ({number} of {len(recipes)})"):
            plan = planner.plan(name, recipe, group)
        yield plan


def _check(args: options.Arguments) -> list[int]:
    """The numbers of devices to plan for; UsageError for options that exclude each other."""
    counts = [count for numbers in args.counts for count in numbers]
    if not args.data and sys.stdin.isatty():
        raise UsageError(
            "nothing to plan for: give DATA, or pipe text in", hint="see lm plan --help"
        )
    if counts and args.nproc > 1:
        raise UsageError(
            "--nproc plans for processes on this machine, --devices for a cluster",
            hint="leave one of them out",
        )
    if args.interconnect and not counts and args.nproc == 1:
        raise UsageError(
            "--interconnect connects several devices", hint="say how many, with --devices"
        )
    return counts


def _resolve(args: options.Arguments, preset: str, defaults: Mapping[str, Any]) -> "Recipe":
    from lmcli import recipes

    precision = None if args.dtype == "auto" else args.dtype
    train = {**options.budget(args), "precision": precision}
    return recipes.resolve(preset, args.sets, train, defaults)


def _recipes(args: options.Arguments) -> dict[str, "Recipe"]:
    """The recipes to plan by their names; UsageError for one that cannot be planned."""
    from lmcli import recipes

    resolved = {name: _resolve(args, name, {}) for name in args.presets or PRESETS}
    for name, recipe in resolved.items():
        recipes.require_budget(recipe, name)
        recipes.refuse_partial_training(recipe)
    return resolved


def _chosen_by_auto(
    args: options.Arguments,
    text: "PlannedText",
    device_config: "DeviceConfig",
    note: Callable[[str], None],
) -> "Recipe":
    """The recipe that preset auto chooses for this text and machine, as lm train does."""
    from lmcli.planning.auto_preset import AutoPreset

    auto = AutoPreset(lambda defaults: _resolve(args, "auto", defaults))
    with progress.stage("measuring this machine"):
        recipe, reasons = auto.for_text(text.sample, text.bytes, device_config)
    for reason in reasons:
        note(f"auto: {reason}")
    return recipe
