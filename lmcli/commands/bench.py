"""lm bench: speed of training, scoring and generation, and the share of the machine's limit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

MOST_LINES = 4096


@options.command(
    """
  lm bench --train
  lm bench --train --preset small --seconds 30
  lm bench --train --preset seq2seq-small --dtype float32 --json
  lm bench --train --set train.optimizer=muon --threads 1
  lm bench --score --dtype bfloat16
  lm bench --score -m runs/s lines.txt
  lm bench --generate -m runs/s --quantize int8
""",
    guide="planning",
)
@options.files
@options.flag("--train", help="Measure training steps.")
@options.flag("--score", help="Measure scoring, of random lines or of FILE.")
@options.flag("--generate", help="Measure generation, one text and 16 at once.")
@click.option(
    "--preset",
    metavar="NAME|FILE",
    help="Measure the model and batch of this recipe.  [default: shapes R and S]",
)
@options.model
@options.settings
@options.section(
    "Budget",
    click.option(
        "--seconds",
        type=options.DURATION_TYPE,
        default=10.0,
        help="Duration of each measurement: seconds, 90s, 2m.",
    ),
)
@options.quantize
@options.training_dtype(
    "Precision; auto: float32 to score; to train the recipe's, else bfloat16 where it is faster."
)
@options.device
@options.threads
@options.json_output
@options.quiet
def bench(args: options.Arguments) -> None:
    """Tokens per second of real work, and its share of the machine's limit.

    The limit is the rate, in FLOP/s, of the same matrix products in the same precision, measured
    in the same run. Attention counts as the whole square, causal or not. Training is measured on
    random ids; without --preset with two shapes and AdamW: R, 6 layers × 384 with 6 heads,
    vocabulary 4,096, 16 rows of 256 tokens a step; and S, 4 layers × 128 with 4 heads, vocabulary
    65, 12 rows of 64. Scoring is measured with GPT-2 small of random weights, or with the model of
    -m, on lines of about 24 random tokens and on windows that add half the context; or, with -m
    and FILE, on its first 4,096 lines, tokenizing included. Generation is measured on a CPU, with
    the model of -m or a random Llama of 162 million parameters: 128 tokens after 32. Its limit is a
    memory read in bytes/s, beside the bytes of its weights. Peak memory is the process's so far.
    """
    if args.train + args.score + args.generate != 1:
        chosen = args.train or args.score or args.generate
        what = "only one can be measured" if chosen else "nothing to measure"
        raise UsageError(what, hint="choose one of --train, --score and --generate")
    if (args.files and not args.score) or ((args.preset or args.sets) and not args.train):
        raise UsageError(
            "FILE goes with --score, --preset and --set with --train",
            hint="leave out what does not fit",
        )
    if args.quantize and not args.generate:
        raise UsageError("goes with --generate", where="--quantize", hint="leave it out")
    from lmcli.display import print_rows
    from lmcli.output.plan import speed_cells
    from lmcli.planning.benchmark import Measurement
    from lmcli.planning.generation_benchmark import GenerationSpeed
    from lmcli.planning.score_benchmark import ScoringSpeed

    rows: Iterator[dict[str, Any]]
    kind: type
    if args.generate:
        rows, kind = _generating(args), GenerationSpeed
    elif args.score:
        rows, kind = _scoring(args), ScoringSpeed
    else:
        rows, kind = _training(args), Measurement
    columns = [field.name for field in dataclasses.fields(kind)]
    print_rows(rows, columns, args.as_json, speed_cells)


def _training(args: options.Arguments) -> Iterator[dict[str, Any]]:
    """Measures training; yields each row when it is ready."""
    from lmcli import recipes
    from lmcli.display import note
    from lmcli.model.device import select_device
    from lmcli.planning import benchmark

    train = {"precision": None if args.dtype == "auto" else args.dtype}
    if args.preset:
        workloads = {args.preset: recipes.resolve(args.preset, args.sets, train)}
    else:
        workloads = {
            name: benchmark.reference(name, args.sets, train) for name in benchmark.REFERENCES
        }
    for name, recipe in workloads.items():
        precision, threads = recipe.train.precision, args.threads or 0
        device_config = select_device(args.device, precision, threads, training=True)
        if not args.quiet:
            note(f"train {name}: {args.seconds:g} s on {device_config}")
        yield dataclasses.asdict(
            benchmark.measure_training(f"train {name}", recipe, device_config, args.seconds)
        )


def _scoring(args: options.Arguments) -> Iterator[dict[str, Any]]:
    """Measures scoring; yields each row when it is ready."""
    from lmcli.display import note
    from lmcli.model.device import select_device
    from lmcli.planning import score_benchmark

    if args.model or args.files:
        model = options.load_model(args.model, args)
        model.require("perplexity")
        device_config, network = model.device_config, model.model
    else:
        device_config = select_device(args.device, args.dtype, args.threads or 0)
        network = score_benchmark.random_model(device_config)
    if args.files:
        name, lines = f"score {args.model}", _lines(args)
        works = [score_benchmark.line_workload(name, model.scorer(), lines)]
    else:
        works = score_benchmark.random_workloads(network)
    for work in works:
        if not args.quiet:
            note(f"{work.name}: {args.seconds:g} s on {device_config}")
        yield dataclasses.asdict(
            score_benchmark.measure_scoring(work, network.config, device_config, args.seconds)
        )


def _generating(args: options.Arguments) -> Iterator[dict[str, Any]]:
    """Measures generation; yields each row when it is ready."""
    from lmcli.display import note
    from lmcli.kernels.decoding_state import supports, weights_of
    from lmcli.model.device import select_device
    from lmcli.planning import generation_benchmark, score_benchmark

    device_config = select_device(args.device, args.dtype, args.threads or 0, training=True)
    if args.model:
        name, network = f"generate {args.model}", options.load_model(args.model, args, True).model
    else:
        name, network = "generate", score_benchmark.random_model(device_config)
    if network.config.shape != "decoder" or not supports(network):
        raise UserError(
            "generation is measured with decoders that run in C",
            where=args.model or "lm bench",
            hint="that takes a CPU, float32 or bfloat16, and a C compiler",
        )
    weights = weights_of(network, args.quantize)
    if not args.quiet:
        note(f"{name}: 2 × {args.seconds:g} s on {device_config}, {weights.weight_type} weights")
    for row in generation_benchmark.measure_generation(name, weights, args.seconds):
        yield dataclasses.asdict(row)


def _lines(args: options.Arguments) -> list[str]:
    """The first MOST_LINES lines of the files that are not empty."""
    from lmcli.data.rows import RowReader

    lines: list[str] = []
    for batch in RowReader().batches(options.input_files(args.files, None, args.quiet)):
        lines += [record.text for record in batch if record.text][: MOST_LINES - len(lines)]
        if len(lines) == MOST_LINES:
            break
    if not lines:
        raise UserError("no text in it", where=args.files[0], hint="give a file with text")
    return lines
