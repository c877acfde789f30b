"""lm export: a model in another precision or format, or with its adapter merged."""

from pathlib import Path

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError
from lmcli.terminal import progress


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
@click.option("--measure", metavar="FILE", help="Bits per byte of FILE, quantized and before.")
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
    bits = _bits(args)
    _check_options(args)
    if args.gguf:
        _export_gguf(args)
        return
    folder = Path(args.output)
    _check_output(folder, args.overwrite)
    import torch

    from lmcli import display
    from lmcli.checkpoints import export as exporting
    from lmcli.checkpoints import hub

    text = _text(args.measure) if args.measure else ""
    source = Path(hub.find(args.name))
    with progress.stage(f"writing {folder}"):
        exporting.export(source, folder, getattr(torch, args.dtype), args.merge, bits)
    if not args.quiet:
        size = (folder / "model.safetensors").stat().st_size
        kind = f"int{bits} and {args.dtype}" if bits else args.dtype
        display.note(f"{size / 1e6:,.1f} MB of {kind} weights")
        if args.measure:
            display.note(f"{args.measure}: {_loss(source, folder, text)}")
        elif bits:
            display.note(f"to measure the loss: lm perplexity FILE -m {args.name} -m {folder}")
    options.echo(folder)


def _check_options(args: options.Arguments) -> None:
    """Raises UsageError unless there is one thing to write, and for options of the other kind."""
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


def _export_gguf(args: options.Arguments) -> None:
    file = Path(args.gguf)
    if file.is_dir() or (file.exists() and not args.overwrite):
        what = "is a folder" if file.is_dir() else "exists already"
        raise UsageError(what, where=str(file), hint="name another file, or give --overwrite")
    from lmcli import display
    from lmcli.checkpoints import export as exporting
    from lmcli.checkpoints import hub

    source = Path(hub.find(args.name))
    with progress.stage(f"writing {file}"):
        remark = exporting.export_gguf(source, file, args.number_type, args.merge)
    if not args.quiet:
        display.note(f"{file.stat().st_size / 1e6:,.1f} MB of {args.number_type} weights")
        if remark:
            display.note(remark)
    options.echo(file)


def _bits(args: options.Arguments) -> int:
    """Bits of quantized weights, 0 for none; UsageError for options that contradict each other."""
    if args.int8 and args.int4:
        raise UsageError("--int8 and --int4 are given", hint="give one of them")
    bits = 8 * args.int8 + 4 * args.int4
    if args.measure and not bits:
        raise UsageError("measures the loss by --int8 or --int4", where="--measure")
    return bits


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


def _loss(source: Path, quantized: Path, text: str) -> str:
    """One line with the bits per byte of a text in both models, computed in float32."""
    from lmcli import api

    before, after = (
        api.load(folder, dtype="float32").perplexity(text).bits_per_byte
        for folder in (source, quantized)
    )
    change = 100 * (after / before - 1)
    return f"{after:.4f} bits per byte, {before:.4f} before ({change:+.2f} %)"


def _check_output(folder: Path, overwrite: bool) -> None:
    """Raises UsageError for a folder with something else than a model that may be replaced."""
    if not folder.is_dir():
        if folder.exists():
            raise UsageError("is a file", where=str(folder), hint="give a folder with -o")
        return
    names = {entry.name for entry in folder.iterdir()}
    if not names or (overwrite and names & {"config.json", "adapter_config.json"}):
        return
    if overwrite:
        raise UsageError(
            "is not empty and holds no model",
            where=str(folder),
            hint="choose another folder with -o",
        )
    raise UsageError("exists already", where=str(folder), hint="replace its model with --overwrite")
