"""lm perplexity: how well models predict files."""

from pathlib import Path

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

COLUMNS = ("file", "perplexity", "bits_per_byte", "bits_per_character", "word_perplexity", "logprob", "tokens", "bytes",
           "characters", "words", "documents", "context", "stride")


@click.command(epilog="""\b
Examples:
  lm perplexity -m runs/s other.txt
  lm perplexity -m runs/s --validation
  lm perplexity -m runs/a -m runs/b test.txt
  cat *.txt | lm perplexity -m runs/s --documents line""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-m", "--model", "models", multiple=True, envvar="LM_MODEL", type=click.Path(), metavar="DIR",
              show_envvar=True, help="Model folder; several are measured one after the other.")
@click.option("--validation", is_flag=True, help="Measure the held-out text of the run that the model folder is.")
@click.option("--documents", type=click.Choice(["file", "line", "blank"]), default="file", show_default=True,
              help="What a document is: the whole file (<|endoftext|> parts it), a line, or a paragraph.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window.  [default: the model's context]")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens a window adds.  [default: half the context]")
@click.option("--eos/--no-eos", default=False, help="Score the closing token of each document too.")
@options.beginning
@options.json_output
@options.reading
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
def perplexity(files, models, validation, documents, context, stride, eos, bos, as_json, format_, fields, include,
               on_error, device, dtype, threads, batch_tokens, quiet, verbose):
    """Perplexity and bits per byte, a row for each file and model.

    Every token is scored once, with at least context - stride tokens of its document before it. Bits per byte compares
    models whatever their tokenizers; perplexity only those with the same one. logprob is in nats.
    """
    from lmcli.display import print_rows
    from lmcli.text.documents import pin_stdin
    from lmcli.text.records import shown

    if not models:
        options.need_model(None)
    if validation and files:
        raise UsageError("--validation measures the run's own held-out text: leave FILE out")
    sources = [("validation", None)] if validation else [
        (shown(name), pin_stdin() if name == "-" else name) for name in options.input_files(files, include, quiet)]

    def rows():
        for folder in models:
            loaded = options.load_model(folder, device, dtype, threads, verbose)
            loaded.require("perplexity")
            scorer = loaded.scorer(bos, eos, context, stride, batch_tokens or 0)
            for label, name in sources:
                found = _validation(folder) if validation else _survey(name, documents, format_, fields, on_error, quiet)
                yield {"model": folder, **_figures(scorer, loaded, *found, label)}

    print_rows(rows(), (("model",) if len(models) > 1 else ()) + COLUMNS, as_json)


def _figures(scorer, loaded, documents, layout, label):
    from lmcli.text.corpus import encode_documents

    figures = scorer.perplexity(encode_documents(documents, layout, loaded.tokenizer))
    if not figures.tokens:
        raise UserError("no token to score", where=label, hint="without a beginning token the first one is context only")
    return {"file": label, **{key: getattr(figures, key) for key in COLUMNS[1:]},
            "dtype": str(loaded.placement.dtype).removeprefix("torch.")}


def _survey(name, documents, format_, fields, on_error, quiet):
    from lmcli.text.documents import Layout

    layout = Layout(documents, format_, fields, on_error)
    found, _ = layout.survey([name])
    if layout.skipped and not quiet:
        click.echo(f"lm: {layout.skipped} bad records left out", err=True)
    return found, layout


def _validation(folder):
    from lmcli.training import data, run_folder

    _, _, facts = run_folder.reopen(Path(folder))
    return data.validation_documents(facts["data"], facts["validation"])
