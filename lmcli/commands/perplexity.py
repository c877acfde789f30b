"""lm perplexity: how well models predict files."""

import sys
from pathlib import Path

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError


@click.command(epilog="""\b
Examples:
  lm perplexity -m runs/s other.txt
  lm perplexity -m runs/s --validation
  lm perplexity -m runs/a -m runs/b --documents line test.txt
  lm perplexity -m runs/s --by topic articles.jsonl
  cat *.txt | lm perplexity -m runs/s --documents line
  lm perplexity -m runs/s --verify "lm-perplexity|model:…" other.txt""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-m", "--model", "models", multiple=True, envvar="LM_MODEL", type=click.Path(), metavar="DIR",
              show_envvar=True, help="Model folder; several are measured side by side.")
@click.option("--validation", is_flag=True, help="Measure the held-out text of the run that the model folder is.")
@click.option("--documents", type=click.Choice(["file", "line", "blank"]), default="file", show_default=True,
              help="What a document is: the whole file (<|endoftext|> parts it), a line, or a paragraph.")
@click.option("--by", metavar="FIELD", help="A row for each value of this field of JSON, TSV or CSV rows.")
@click.option("--differing", type=click.IntRange(min=0), default=3, show_default=True, metavar="N",
              help="With several models: show the N lines in which each differs most from the first.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window.  [default: the model's context]")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens a window adds.  [default: half the context]")
@click.option("--eos/--no-eos", default=False, help="Score the closing token of each document too.")
@options.beginning
@click.option("--verify", metavar="SIGNATURE", help="Measure as this signature says, and tell whether the same comes out.")
@options.json_output
@options.reading
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.several
def perplexity(models, verify, as_json, quiet, crew, **given):
    """Perplexity and bits per byte, a row for each file and model.

    Every token is scored once, with at least context - stride tokens of its document before it. Bits per byte compares
    models whatever their tokenizers; perplexity only those with the same one. logprob is in nats; NAME_se is the standard
    error of a figure over documents. With several models each row tells the difference of its bits per byte from those of
    the first, with a 95 % interval over documents. The last column says what the figure was made of: see --verify.
    """
    from lmcli.analysis import perplexity_rows
    from lmcli.display import note, print_rows

    if not models:
        options.need_model(None)
    if given["validation"] and (given["files"] or given["by"]):
        raise UsageError("--validation measures the run's own held-out text: leave FILE and --by out")
    if verify:
        from lmcli.analysis.signature import Signature

        wanted = Signature.parse(verify)
        given |= {"documents": wanted.documents, "context": wanted.context, "stride": wanted.stride, "dtype": wanted.dtype,
                  "bos": bool(wanted.bos), "eos": bool(wanted.eos)}
    if not crew.leads:
        return crew.follow(*_loaded(models, given)[2])
    if verify:
        return _verified(wanted, list(_rows(models, given, True, crew)))
    told, columns = [], perplexity_rows.columns("group" if given["by"] else "file", len(models) > 1)

    def rows():
        for row in _rows(models, given, quiet, crew):
            told.append(row)
            yield row

    print_rows(rows(), columns, as_json, lambda row: perplexity_rows.readable(row, columns))
    if sys.stdout.isatty() and not as_json:
        click.echo("".join(f"{row['signature']}\n" for row in told), nl=False)
    for text in () if quiet else perplexity_rows.remarks(told):
        note(text)


def _loaded(models, given):
    """The models, their scorers, and the errands of these."""
    from lmcli.inference.perplexity import errand

    loaded = [options.load_model(name, given["device"], given["dtype"], given["threads"], given["verbose"])
              for name in models]
    for model in loaded:
        model.require("perplexity")
    scorers = [model.scorer(given["bos"], given["eos"], given["context"], given["stride"], given["batch_tokens"] or 0)
               for model in loaded]
    return loaded, scorers, list(map(errand, scorers))


def _rows(models, given, quiet, crew):
    """A row for each file or group, and model."""
    names = [] if given["validation"] else options.input_files(given["files"], given["include"], quiet)
    from lmcli.analysis import comparison, perplexity_rows, signature
    from lmcli.model.device import dtype_name

    loaded, scorers, _ = _loaded(models, given)
    hashes = [signature.of_model(model.folder) for model in loaded]
    for label, documents, layout, chosen in _sources(models, names, given, quiet):
        groups = comparison.measure([scorers[k] for k in chosen], label, documents, layout, given["by"] or "",
                                    given["differing"] if len(chosen) > 1 else 0, crew, chosen)
        for group in groups:
            for place, k in enumerate(chosen):
                figures = group.figures[place]
                if not figures.tokens:
                    raise UserError("no token to score", where=group.name,
                                    hint="without a beginning token the first one is context only")
                dtype = dtype_name(loaded[k].placement.dtype)
                signed = signature.signed(figures, hashes[k], loaded[k].tokenizer.hash, group.digest, given["documents"],
                                          bool(scorers[k].beginning), given["eos"], dtype)
                apart = perplexity_rows.difference(group.pairs[place - 1] if place else None) if len(models) > 1 else {}
                yield {"model": models[k], "group" if given["by"] else "file": group.name,
                       **perplexity_rows.figures(figures), **apart, "dtype": dtype, "tokenizer": signed.tokenizer,
                       "signature": str(signed)}


def _sources(models, names, given, quiet):
    """(name, the documents anew at each call, their layout, places of the models to measure) of each source."""
    from lmcli.text.documents import Layout, pin_stdin
    from lmcli.text.records import shown
    from lmcli.training import data, run_folder

    if given["validation"]:
        for k, folder in enumerate(models):
            _, _, facts = run_folder.reopen(Path(folder))
            documents, layout = data.validation_documents(facts["data"], facts["validation"])
            yield "validation", lambda documents=documents: iter(documents), layout, [k]
        return
    for name in names:
        label, file = shown(name), pin_stdin() if name == "-" else name
        first, layout = (Layout(given["documents"], given["format_"], given["fields"], given["on_error"]) for _ in range(2))
        if given["by"] and not layout.rows(file):
            raise UsageError("is plain text, which has no fields to group by", where=label, hint="--format says otherwise")
        if not sum(1 for _ in first.find([file])):  # reads it once, so that a bad line is told before the work
            raise UserError("no text in it", where=label, hint="give a file with text, or pipe some in")
        if first.skipped and not quiet:
            click.echo(f"lm: {first.skipped} bad records left out", err=True)
        yield label, lambda file=file, layout=layout: layout.find([file]), layout, range(len(models))


def _verified(wanted, rows):
    """Prints how near the figures come to those of a signature; UserError when they are others."""
    from lmcli.analysis.signature import Signature

    found = [Signature.parse(row["signature"]) for row in rows]
    nearest = min(found, key=lambda one: len(wanted.differences(one)))
    if apart := wanted.differences(nearest):
        raise UserError(f"not what was measured then: {'; '.join(apart)}", where="--verify",
                        hint=f"it was made by lm {wanted.version}" if wanted.version != nearest.version else None)
    click.echo(f"the same: {nearest.nats:.6f} nats, {nearest.nats - wanted.nats:+.6f} from those of the signature")
