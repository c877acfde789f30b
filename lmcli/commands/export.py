"""lm export: a model in another precision or format, or with its adapter merged."""

from pathlib import Path
from typing import Any

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError
from lmcli.terminal import progress

UNMEASURED = "that takes a C compiler, and a decoder that the decode step in C can run"


@options.command(
    """
  lm export runs/more --merge -o more
  lm export runs/book -o book-16 --dtype bfloat16
  lm export runs/book -o book-8 --int8 --measure test.txt
  lm export runs/book --gguf book.gguf --type q8_0
  lm export book.gguf -o book
""",
    guide="finetuning",
)
@click.argument("name", metavar="MODEL")
@options.flag("--merge", help="Merge a LoRA adapter into its base.")
@options.flag("--int8", help="Quantize the blocks' matrices to 8 bits.")
@options.flag("--int4", help="Quantize them to 4 bits.")
@click.option("--gguf", metavar="FILE", help="Write a file for llama.cpp, not a folder.")
@click.option("--measure", metavar="FILE", help="Bits per byte of FILE, before and after.")
@options.section(
    "Output",
    click.option("-o", "--output", metavar="DIR", help="Folder to write, complete or not at all."),
    options.choice(
        "--dtype",
        values=["float32", "bfloat16", "float16"],
        default="float32",
        help="Precision of the stored weights.",
    ),
    options.choice(
        "--type",
        "number_type",
        values=["f32", "bf16", "f16", "q8_0"],
        default="f32",
        help="Type of the matrices in the file of --gguf.",
    ),
    options.flag("--overwrite", help="Replace what is in -o, or --gguf."),
)
@options.quiet
def export(args: options.Arguments) -> None:
    """Writes a model as a standard Hugging Face folder or a GGUF file, and prints its name.

    Copies the tokenizer and the generation defaults. MODEL is a folder, a GGUF file or a name on
    the Hugging Face Hub.
    """
    bits = _check_options(args)
    target = Path(args.gguf or args.output)
    _check_target(target, args)
    from lmcli import api, display
    from lmcli.checkpoints import hub

    text = _text(args.measure) if args.measure else ""
    source = Path(hub.find(args.name))
    measured = args.measure and not args.quiet
    before = api.load(source, dtype="float32").perplexity(text).bits_per_byte if measured else 0.0
    if measured and not before > 0:
        raise UserError("no token of it is scored", args.measure, "give a longer text")
    with progress.stage(f"writing {target}"):
        notes = (_write_gguf if args.gguf else _write_folder)(source, target, bits, args)
    if measured:
        notes += _losses(before, target, text, bits, args)
    elif bits:
        notes += [f"to measure the loss: lm perplexity FILE -m {args.name} -m {target}"]
    for note in notes if not args.quiet else ():
        display.note(note)
    options.echo(target)


def _check_options(args: options.Arguments) -> int:
    """Bits of quantized weights, 0 for none.

    Raises UsageError unless there is one thing to write, and for options of the other kind.
    """
    if args.int8 and args.int4:
        raise UsageError("--int8 and --int4 are given", hint="give one of them")
    if bool(args.gguf) == bool(args.output):
        raise UsageError("give one of -o DIR and --gguf FILE", hint="see lm export --help")
    others = {
        "--type": not args.gguf and args.number_type != "f32",
        "--dtype": args.gguf and args.dtype != "float32",
        "--int8 and --int4": args.gguf and (args.int8 or args.int4),
    }
    for name, given in others.items():
        if given:
            hint = "--type q8_0 writes 8 bits" if args.gguf else "--dtype is for folders"
            raise UsageError(f"does not apply to {'--gguf' if args.gguf else '-o'}", name, hint)
    return 8 * args.int8 + 4 * args.int4


def _write_folder(source: Path, folder: Path, bits: int, args: options.Arguments) -> list[str]:
    """Writes the folder; returns what to tell about it."""
    import torch

    from lmcli.checkpoints import export as exporting

    exporting.export(source, folder, getattr(torch, args.dtype), args.merge, bits)
    size = (folder / "model.safetensors").stat().st_size
    kind = f"int{bits} and {args.dtype}" if bits else args.dtype
    return [f"{size / 1e6:,.1f} MB of {kind} weights"]


def _write_gguf(source: Path, file: Path, bits: int, args: options.Arguments) -> list[str]:
    """Writes the file; returns what to tell about it."""
    from lmcli.checkpoints import export as exporting

    remark = exporting.export_gguf(source, file, args.number_type, args.merge)
    size = f"{file.stat().st_size / 1e6:,.1f} MB of {args.number_type} weights"
    return [size, remark] if remark else [size]


def _text(file: str) -> str:
    """The text of a file; UserError if there is none, or it is not UTF-8."""
    from lmcli.data.files import open_bytes
    from lmcli.storage import user_errors

    with user_errors(file, "read"), open_bytes(file) as handle:
        try:
            text = handle.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"is not UTF-8 at byte {error.start:,}", where=file) from None
    if not text:
        raise UserError("is empty", where=file, hint="give a file with text")
    return text


def _losses(
    before: float, target: Path, text: str, bits: int, args: options.Arguments
) -> list[str]:
    """Lines with the bits per byte of a text: before, with the stored weights, as generated."""
    from lmcli import api
    from lmcli.data.corpus import encode_text
    from lmcli.scoring.decode_step_logprobs import as_generated
    from lmcli.scoring.perplexity import measure_perplexity

    def line(bits_per_byte: float, computed: str) -> str:
        change = f" ({100 * (bits_per_byte / before - 1):+.2f} %)" if computed != "before" else ""
        return f"{args.measure}: {bits_per_byte:.4f} bits per byte {computed}{change}"

    stored = api.load(target, dtype="float32")
    lines = [line(before, "before")]
    lines += [line(stored.perplexity(text).bits_per_byte, "with the stored weights")]
    if not bits and args.dtype != "bfloat16":  # lm generate computes with the same numbers
        return lines
    option = f"--quantize int{bits}" if bits else "--dtype bfloat16"
    dtype, quantize = ("auto", f"int{bits}") if bits else (args.dtype, "")
    decoder: Any = api.load(target, "cpu", dtype, 0, True).decoder()
    if not decoder.extendable:
        return [*lines, f"{args.measure}: lm generate {option} is not measured: {UNMEASURED}"]
    decoder = api.load(target, "cpu", dtype, 0, True, quantize).decoder()
    scorer = as_generated(stored.scorer(), decoder.decoding_state)
    with progress.stage(f"measuring {option}", len(text.encode()), "bytes"):
        figures = measure_perplexity(scorer, [encode_text(text, stored.tokenizer)])
    return [*lines, line(figures.bits_per_byte, f"by lm generate {option}")]


def _check_target(target: Path, args: options.Arguments) -> None:
    """Raises UsageError for a path with something else than a model that may be replaced."""
    if args.gguf:
        if target.is_dir() or (target.exists() and not args.overwrite):
            what = "is a folder" if target.is_dir() else "exists already"
            raise UsageError(what, where=str(target), hint="name another file, or give --overwrite")
        return
    if not target.is_dir():
        if target.exists():
            raise UsageError("is a file", where=str(target), hint="give a folder with -o")
        return
    names = {entry.name for entry in target.iterdir()}
    if not names or (args.overwrite and names & {"config.json", "adapter_config.json"}):
        return
    if args.overwrite:
        raise UsageError(
            "is not empty and holds no model",
            where=str(target),
            hint="choose another folder with -o",
        )
    raise UsageError("exists already", where=str(target), hint="replace its model with --overwrite")
