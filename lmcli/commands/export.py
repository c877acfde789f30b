"""lm export: a model folder in another precision, or with its adapter merged."""

from pathlib import Path

import click

from lmcli.commands import options
from lmcli.errors import UsageError


@options.command("""
  lm export runs/more --merge -o more
  lm export runs/book -o book-16 --dtype bfloat16
  lm export gpt2 -o gpt2-half --dtype float16 --overwrite
""")
@click.argument("name", metavar="MODEL")
@click.option(
    "-o", "--output", metavar="DIR", required=True, help="Folder to write, complete or not at all."
)
@options.flag("--merge", help="Merge an adapter (of lm train --lora, or of PEFT) into its base.")
@options.choice(
    "--dtype",
    values=["float32", "bfloat16", "float16"],
    default="float32",
    show_default=True,
    help="Precision of the stored weights.",
)
@options.flag("--overwrite", help="Replace the model in the folder of -o.")
@options.quiet
def export(args: options.Arguments) -> None:
    """Writes a model as a standard Hugging Face folder, and prints that folder.

    Copies the tokenizer and the generation defaults. MODEL is a folder or a name on the Hugging
    Face Hub.
    """
    folder = Path(args.output)
    _check_output(folder, args.overwrite)
    import torch

    from lmcli import display
    from lmcli.checkpoints import export as exporting
    from lmcli.checkpoints import hub

    exporting.export(Path(hub.find(args.name)), folder, getattr(torch, args.dtype), args.merge)
    if not args.quiet:
        size = (folder / "model.safetensors").stat().st_size
        display.note(f"{size / 1e6:,.1f} MB of {args.dtype} weights")
    options.echo(folder)


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
