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
              help="Precision of the forward pass; auto: the recipe's, else bfloat16 where the hardware is made for it.")
@options.reading
@options.device
@options.threads
@options.json_output
@options.quiet
def plan(data, presets, sets, time_, steps, tokens, epochs, val, documents, dtype, format_, fields, include, on_error,
         device, threads, as_json, quiet):
    """What training on DATA will come to here, a row a preset: size, memory, time, and about how good it gets.

    The budget is that of lm train: the first one reached of --time, --steps, --tokens and --epochs, else the preset's.
    Tokens per second are measured by a few real training steps; bytes per token by a tokenizer learnt from a sample.
    Memory is the most that the process will hold: weights, gradients, the optimizer's moments, activations, and the
    program itself. Bits per byte are of held-out text, from a fit to small models trained for minutes: good to about a
    tenth.
    """
    if not data and sys.stdin.isatty():
        raise UsageError("nothing to plan for: give DATA, or pipe text in", hint="lm plan --help")
    from lmcli import display, recipes
    from lmcli.analysis import auto, planning
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
    placement = place(device, first.train.precision, threads or 0, training=True)
    startup = time.monotonic() - BEGAN
    text = planning.read(data, val, Layout(documents, format_, fields, on_error), include, first, note)
    note(f"{text.documents:,} documents, {text.bytes:,} bytes to train on; trying {', '.join(chosen)} on {placement}")
    if "auto" in chosen:
        seen = auto.describe(text.sample, text.bytes)
        chosen["auto"], reasons = auto.refined(lambda below: resolve("auto", below=below), seen, placement)
        for reason in reasons:
            note(f"auto: {reason}")
    planner = planning.Planner(text, placement, startup)
    plans, best = planning.advise([planner.plan(name, recipe) for name, recipe in chosen.items()])
    rows = [{**dataclasses.asdict(plan), "bits_per_byte": planning.rounded(plan.bits_per_byte)} for plan in plans]
    display.print_rows(rows, list(rows[0]), as_json, _readable)
    if sys.stdout.isatty() and not as_json:
        for row in rows:
            print(f"{row['preset']}: {row['advice']} ({_parts(row)})")
    note(best)


def _readable(row) -> dict[str, str]:
    """Column → cell of a table that fits on a terminal."""
    from lmcli.display import clock

    bits = row["bits_per_byte"]
    return {"preset": row["preset"], "params": _short(row["parameters"]), "tokens": _short(row["tokens"]),
            "epochs": f"{row['epochs']:,.2g}" if row["epochs"] < 100 else f"{row['epochs']:,.0f}",
            "tok/par": f"{row['tokens_per_parameter']:,.2g}", "FLOPs": f"{row['flops']:.0e}".replace("e+", "e"),
            "MB": f"{row['memory'] / 1e6:,.0f}", "tok/s": f"{row['tokens_per_second']:,.0f}",
            "time": clock(row["seconds"]), "bits/byte": "–" if bits is None else f"about {bits}"}


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
