"""lm bench: how fast work runs, beside what the machine can do."""

import dataclasses

import click

from lmcli.commands import options
from lmcli.errors import UsageError

COLUMNS = ("name", "tokens_per_second", "achieved", "limit", "unit", "ratio", "dtype", "threads", "step_ms", "steps",
           "flops_per_token", "parameters", "peak_memory_bytes")


@click.command(epilog="""\b
Examples:
  lm bench --train
  lm bench --train --preset small --seconds 30
  lm bench --train --preset seq2seq-small --dtype float32 --json
  lm bench --train --set train.optimizer=muon --threads 1""")
@click.option("--train", is_flag=True, help="Measure training steps.")
@click.option("--preset", metavar="NAME|FILE", help="Measure the model and batch of this recipe.  [default: shapes R and S]")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of what is measured.")
@click.option("--seconds", type=options.Duration(), default=10.0, show_default=True, metavar="DURATION",
              help="How long each is measured: seconds, 90s, 2m.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              help="Precision of the forward pass; auto: the recipe's, else bfloat16 where the hardware is made for it.")
@options.device
@options.threads
@options.json_output
@options.quiet
def bench(train, preset, sets, seconds, dtype, device, threads, as_json, quiet):
    """Tokens per second of real training steps on random ids, and their share of the machine's limit.

    The limit is measured in the same run, in turns with the steps: the rate, in FLOP/s, of the matrix products that a
    step is made of, in the same precision. Of attention the whole square is counted, causal or not. Without --preset two
    shapes are measured, both with AdamW: R, 6 layers × 384 with 6 heads, vocabulary 4,096, 16 rows of 256 tokens a step;
    and S, 4 layers × 128 with 4 heads, vocabulary 65, 12 rows of 64. Peak memory is that of the process so far.
    """
    if not train:
        raise UsageError("what is to be measured? nothing was named", hint="there is: --train")
    from lmcli import recipes
    from lmcli.analysis import benchmark
    from lmcli.display import print_rows

    given = {"precision": None if dtype == "auto" else dtype}
    workloads = {preset: recipes.resolve(preset, sets, given)} if preset else \
        {name: benchmark.reference(name, sets, given) for name in benchmark.REFERENCES}
    print_rows(_measured(workloads, seconds, device, threads or 0, quiet), COLUMNS, as_json, _readable)


def _measured(workloads, seconds, device, threads, quiet):
    """The measurements as they are made."""
    from lmcli.analysis import benchmark
    from lmcli.display import note
    from lmcli.model.device import place

    for name, recipe in workloads.items():
        placement = place(device, recipe.train.precision, threads, training=True)
        if not quiet:
            note(f"train {name}: {seconds:g} s on {placement}")
        yield dataclasses.asdict(benchmark.measure_training(f"train {name}", recipe, placement, seconds))


def _readable(row) -> dict[str, str]:
    """Column → cell of a table that fits on a terminal."""
    return {"name": row["name"], "tokens/s": f"{row['tokens_per_second']:,.0f}",
            f"G{row['unit']}": f"{row['achieved'] / 1e9:,.1f}", "limit": f"{row['limit'] / 1e9:,.1f}",
            "share": f"{row['ratio']:.0%}", "dtype": row["dtype"], "threads": str(row["threads"]),
            "step ms": f"{row['step_ms']:,.1f}", "peak MB": f"{row['peak_memory_bytes'] / 1e6:,.0f}"}
