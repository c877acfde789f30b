"""lm export: a model folder in another form."""

from pathlib import Path

import click

from lmcli.commands import options
from lmcli.errors import UsageError


@click.command(epilog="""\b
Examples:
  lm export runs/more --merge -o more
  lm export runs/book -o book-16 --dtype bfloat16
  lm export gpt2 -o gpt2-half --dtype float16 --overwrite""")
@click.argument("name", metavar="MODEL")
@click.option("-o", "--output", metavar="DIR", required=True, help="The folder to write, whole or not at all.")
@click.option("--merge", is_flag=True, help="Add an adapter (of lm train --lora, or of peft) to its base model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Precision of the stored weights.")
@click.option("--overwrite", is_flag=True, help="Replace the model that the folder -o holds.")
@options.quiet
def export(name, output, merge, dtype, overwrite, quiet):
    """Writes a model as a standard Hugging Face folder, and prints that folder.

    Tokenizer and generation defaults are taken over. MODEL is a folder or a name on Hugging Face's hub.
    """
    target = Path(output)
    _refuse_existing(target, overwrite)
    import torch

    from lmcli import display
    from lmcli.checkpoints import exporting, hub

    exporting.export(Path(hub.find(name)), target, getattr(torch, dtype), merge)
    if not quiet:
        size = (target / "model.safetensors").stat().st_size
        display.note(f"{size / 1e6:,.1f} MB of {dtype} weights")
    click.echo(target)


def _refuse_existing(target, overwrite):
    """UsageError for a folder with something in it, unless that is a model that may be replaced."""
    if not target.is_dir():
        if target.exists():
            raise UsageError("is a file", where=str(target), hint="-o takes a folder")
        return
    names = {entry.name for entry in target.iterdir()}
    if not names or (overwrite and names & {"config.json", "adapter_config.json"}):
        return
    if overwrite:
        raise UsageError("is not empty and holds no model", where=str(target), hint="choose another folder with -o")
    raise UsageError("is there already", where=str(target), hint="--overwrite replaces the model in it")
