"""lm bench: how fast work runs, beside what the machine can do."""

import dataclasses

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

COLUMNS = ("name", "tokens_per_second", "achieved", "limit", "unit", "ratio", "dtype", "threads", "step_ms", "steps",
           "flops_per_token", "parameters", "peak_memory_bytes")
SCORE_COLUMNS = ("name", "lines_per_second", "tokens_per_second", "achieved", "limit", "unit", "ratio", "bits_per_byte",
                 "dtype", "threads", "pass_ms", "passes", "parameters", "peak_memory_bytes")
MOST_LINES = 4096


@click.command(epilog="""\b
Examples:
  lm bench --train
  lm bench --train --preset small --seconds 30
  lm bench --train --preset seq2seq-small --dtype float32 --json
  lm bench --train --set train.optimizer=muon --threads 1
  lm bench --score --dtype bfloat16
  lm bench --score -m runs/s lines.txt""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--train", is_flag=True, help="Measure training steps.")
@click.option("--score", is_flag=True, help="Measure scoring: of random lines and windows, or of the lines of FILE.")
@options.model
@click.option("--preset", metavar="NAME|FILE", help="Measure the model and batch of this recipe.  [default: shapes R and S]")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of what is measured.")
@click.option("--seconds", type=options.Duration(), default=10.0, show_default=True, metavar="DURATION",
              help="How long each is measured: seconds, 90s, 2m.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              help="auto: to train the recipe's, else bfloat16 where the hardware is faster in it; to score float32.")
@options.device
@options.threads
@options.json_output
@options.quiet
def bench(files, train, score, model, preset, sets, seconds, dtype, device, threads, as_json, quiet):
    """Tokens per second of real work, and its share of the machine's limit.

    The limit is measured in the same run, in turns with the work: the rate, in FLOP/s, of the matrix products that it is
    made of, in the same precision. Of attention the whole square is counted, causal or not. Training is measured on random
    ids; without --preset two shapes, both with AdamW: R, 6 layers × 384 with 6 heads, vocabulary 4,096, 16 rows of 256
    tokens a step; and S, 4 layers × 128 with 4 heads, vocabulary 65, 12 rows of 64. Scoring is measured at the size of
    GPT-2 small with random weights, or with -m of that model, on lines of some 24 random tokens and on windows of the
    context that add half of it; or by -m on the first 4,096 lines of FILE, tokenizing included. Peak memory is that of the
    process so far.
    """
    if train == score:
        raise UsageError("what is to be measured? " + ("one at a time" if train else "nothing was named"),
                         hint="there are: --train, --score")
    if (train and files) or (score and (preset or sets)):
        raise UsageError("FILE goes with --score, --preset and --set with --train")
    from lmcli.display import print_rows

    if score:
        return print_rows(_scored(model, files, seconds, dtype, device, threads, quiet), SCORE_COLUMNS, as_json, _readable)
    from lmcli import recipes
    from lmcli.analysis import benchmark

    given = {"precision": None if dtype == "auto" else dtype}
    workloads = {preset: recipes.resolve(preset, sets, given)} if preset else \
        {name: benchmark.reference(name, sets, given) for name in benchmark.REFERENCES}
    print_rows(_trained(workloads, seconds, device, threads or 0, quiet), COLUMNS, as_json, _readable)


def _trained(workloads, seconds, device, threads, quiet):
    """The measurements of training as they are made."""
    from lmcli.analysis import benchmark
    from lmcli.display import note
    from lmcli.model.device import place

    for name, recipe in workloads.items():
        placement = place(device, recipe.train.precision, threads, training=True)
        if not quiet:
            note(f"train {name}: {seconds:g} s on {placement}")
        yield dataclasses.asdict(benchmark.measure_training(f"train {name}", recipe, placement, seconds))


def _scored(model, files, seconds, dtype, device, threads, quiet):
    """The measurements of scoring as they are made."""
    from lmcli.analysis import score_benchmark
    from lmcli.display import note
    from lmcli.model.device import place

    if model or files:
        loaded = options.load_model(model, device, dtype, threads, False)
        loaded.require("perplexity")
        placement, network = loaded.placement, loaded.model
    else:
        placement = place(device, dtype, threads or 0)
        network = score_benchmark.random_model(placement)
    works = [score_benchmark.line_work(f"score {model}", loaded.scorer(), _lines(files, quiet))] if files else \
        score_benchmark.random_work(network)
    for work in works:
        if not quiet:
            note(f"{work.name}: {seconds:g} s on {placement}")
        yield dataclasses.asdict(score_benchmark.measure(work, network.config, placement, seconds))


def _lines(files, quiet):
    """The first lines of the files that are not empty."""
    from lmcli.text.records import Reader

    found = []
    for batch in Reader().batches(options.input_files(files, None, quiet)):
        found += [record.text for record in batch if record.text][:MOST_LINES - len(found)]
        if len(found) == MOST_LINES:
            break
    if not found:
        raise UserError("no text in it", where=files[0])
    return found


def _readable(row) -> dict[str, str]:
    """Column → cell of a table that fits on a terminal."""
    scored = {"lines/s": f"{row['lines_per_second']:,.0f}"} if "lines_per_second" in row else {}
    bits = row.get("bits_per_byte")
    time = "step_ms" if "step_ms" in row else "pass_ms"
    return {"name": row["name"], **scored, "tokens/s": f"{row['tokens_per_second']:,.0f}",
            f"G{row['unit']}": f"{row['achieved'] / 1e9:,.1f}", "limit": f"{row['limit'] / 1e9:,.1f}",
            "share": f"{row['ratio']:.0%}", **({"bits/byte": f"{bits:.4f}"} if bits else {}), "dtype": row["dtype"],
            "threads": str(row["threads"]), time.replace("_", " "): f"{row[time]:,.1f}",
            "peak MB": f"{row['peak_memory_bytes'] / 1e6:,.0f}"}
