"""lm plan: what a training run will come to, before it is run."""

import dataclasses
import functools
import sys
import time

import click

from lmcli.commands import BEGAN, options
from lmcli.errors import UsageError

PRESETS = ("auto", "tiny", "small", "base")  # decoders: what lm train chooses, then smallest first


@click.command(epilog="""\b
Examples:
  lm plan notes.txt --time 30m
  lm plan book.txt --time 10m --preset small --set model.hidden_size=256
  lm plan corpus/ --tokens 50000000 --preset tiny --preset ./mine.yaml --json
  lm plan corpus/ --preset base --devices 8,64,512 --interconnect 50
  cat *.txt | lm plan --epochs 3 --preset tiny""")
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option("--preset", "presets", multiple=True, metavar="NAME|FILE",
              help=f"Plan this recipe; may be given several times.  [default: {', '.join(PRESETS)}]")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the presets.")
@options.budgets
@click.option("--val", multiple=True, metavar="FILE", help="Validate on this, instead of on a held-out tenth.")
@click.option("--documents", type=click.Choice(["file", "line", "blank"]), default="file", show_default=True,
              help="What a document is: the whole file, a line, or a paragraph.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              help="Precision of the forward pass; auto: the recipe's, else bfloat16 where the hardware is faster in it.")
@click.option("--devices", "counts", type=options.Counts(), multiple=True, metavar="N[,N...]",
              help="Plan for so many devices like this one, a row for each number.")
@click.option("--interconnect", type=click.FloatRange(min=0, min_open=True), metavar="GB/S",
              help="What goes between two devices, each way.  [default: 25, a port of 200 Gbit/s for each]")
@options.nproc
@options.reading
@options.device
@options.threads
@options.json_output
@options.quiet
def plan(data, presets, sets, time_, steps, tokens, epochs, val, documents, dtype, counts, interconnect, nproc, format_,
         fields, include, on_error, device, threads, as_json, quiet):
    """What training on DATA will come to here, a row a preset: size, memory, time, and about how good it gets.

    The budget is that of lm train: the first one reached of --time, --steps, --tokens and --epochs, else the preset's.
    Tokens per second are measured by a few real training steps; bytes per token by a tokenizer learnt from a sample.
    Memory is the most that the process will hold: weights, gradients, the optimizer's moments, activations, and the
    program itself. Bits per byte are of held-out text, from a fit to small models trained for minutes: good to about a
    tenth.

    --devices is for others like the GPU here, or machines like this one; --nproc for processes on this machine, as in lm
    train. Memory is then that of one device, and what was taken for granted is said.
    """
    if not data and sys.stdin.isatty():
        raise UsageError("nothing to plan for: give DATA, or pipe text in", hint="lm plan --help")
    counts = [count for given in counts for count in given]
    if counts and nproc > 1:
        raise UsageError("--nproc is for processes on this machine, --devices for others like it: leave one of them out")
    if interconnect and not counts and nproc == 1:
        raise UsageError("--interconnect joins several devices: say how many, with --devices")
    from lmcli import display, launch, recipes
    from lmcli.analysis import advice, auto, devices, planning
    from lmcli.analysis.company import Company
    from lmcli.model.device import place
    from lmcli.text.documents import Layout

    note = (lambda text: None) if quiet else display.note
    budget = {"time": time_, "steps": steps, "tokens": tokens, "epochs": epochs,
              "precision": None if dtype == "auto" else dtype}
    resolve = functools.partial(recipes.resolve, sets=sets, train=budget)
    chosen = {name: resolve(name) for name in presets or PRESETS}
    for name, recipe in chosen.items():
        recipes.require_budget(recipe, name)
        recipes.require_origin(recipe)
    first = next(iter(chosen.values()))
    placement = place(device, first.train.precision, threads or (nproc > 1 and launch.threads_of_one(nproc)) or 0,
                      training=True)
    groups = devices.groups(counts, nproc, interconnect and 1e9 * interconnect, placement.device)
    startup = time.monotonic() - BEGAN
    text = planning.read(data, val, Layout(documents, format_, fields, on_error), include, first, note)
    note(f"{text.documents:,} documents, {text.bytes:,} bytes to train on; trying {', '.join(chosen)} on {placement}")
    if "auto" in chosen:
        seen = auto.describe(text.sample, text.bytes)
        chosen["auto"], reasons = auto.refined(lambda below: resolve("auto", below=below), seen, placement)
        for reason in reasons:
            note(f"auto: {reason}")
    assumed = devices.assumptions(groups, str(placement))
    for assumption in assumed:
        note(assumption)
    planner = planning.Planner(text, placement, startup, Company(nproc - 1, placement) if groups[0].here else None)
    told = [advice.advise([planner.plan(name, recipe, group) for name, recipe in chosen.items()]) for group in groups]
    rows = [{**dataclasses.asdict(plan), "bits_per_byte": planning.rounded(plan.bits_per_byte)}
            for plans, _ in told for plan in plans]
    columns, several = list(rows[0]), bool(assumed)
    display.print_rows([{**row, "assumptions": assumed} for row in rows], columns, as_json,
                       _readable_of_several if several else _readable)
    if sys.stdout.isatty() and not as_json:
        for row in rows:
            print(f"{row['preset']}{_on(row['devices']) if several else ''}: {row['advice']} ({_parts(row)})")
    for group, (_, best) in zip(groups, told):
        note(f"{_on(group.count).strip()}: {best}" if len(groups) > 1 else best)


def _readable(row) -> dict[str, str]:
    """Column → cell of a table that fits on a terminal."""
    from lmcli.display import clock

    bits = row["bits_per_byte"]
    return {"preset": row["preset"], "params": _short(row["parameters"]), "tokens": _short(row["tokens"]),
            "epochs": f"{row['epochs']:,.2g}" if row["epochs"] < 100 else f"{row['epochs']:,.0f}",
            "tok/par": f"{row['tokens_per_parameter']:,.2g}", "FLOPs": f"{row['flops']:.0e}".replace("e+", "e"),
            "MB": f"{row['memory'] / 1e6:,.0f}", "tok/s": f"{row['tokens_per_second']:,.0f}",
            "time": clock(row["seconds"]), "bits/byte": "–" if bits is None else f"about {bits}"}


def _readable_of_several(row) -> dict[str, str]:
    """The same where devices share a run: what one holds, what all do."""
    alone = _readable(row)
    waiting = row["seconds_communicating"] / row["seconds"] if row["seconds"] else 0
    return {"preset": row["preset"], "devices": f"{row['devices']:,}", "idle": f"{row['idle_devices']:,}",
            "weights": "sharded" if row["sharding"] == "sharded" else "whole", "MB each": alone["MB"],
            "tok/s": alone["tok/s"], "× one": "–" if row["speedup"] is None else f"{row['speedup']:,.1f}",
            "sends": f"{waiting:.0%}", "time": alone["time"], "bits/byte": alone["bits/byte"]}


def _on(count: int) -> str:
    return f" on {count:,} devices" if count > 1 else " on 1 device"


def _parts(row) -> str:
    """Where the memory goes."""
    parts = (f"{name} {row[name] / 1e6:,.0f}" for name in ("weights", "gradients", "optimizer", "activations"))
    return f"{', '.join(parts)}, the program {row['process'] / 1e6:,.0f} MB"


def _short(number) -> str:
    """"1.2M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return str(number)
