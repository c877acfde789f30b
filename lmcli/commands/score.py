"""lm score: how likely a model finds each line, word or token."""

import sys

import click

from lmcli.commands import options
from lmcli.errors import UsageError


@click.command(epilog="""\b
Examples:
  lm score -m runs/s notes.txt
  echo "To be or not to be" | lm score -m runs/s --per word
  lm score -m runs/s --per token --alternatives 3 notes.txt
  git diff | lm score -m runs/s --worst 5
  lm score -m runs/s --prefix "Question: " questions.txt
  lm score -m runs/s --prefix-field question --choices-field options quiz.jsonl
  lm score -m bert --pll within-word --pairs blimp.jsonl
  lm score -m marian-en-de pairs.tsv
  tail -f chat.log | lm score -m runs/s --no-header""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@options.model
@click.option("--per", type=click.Choice(["record", "word", "token"]), help="What a row is for.  [default: record]")
@click.option("--alternatives", type=click.IntRange(min=1), metavar="N",
              help="Beside each token its rank, the entropy in bits and the N likeliest; means --per token.")
@click.option("--prefix", metavar="TEXT", help="Score each record as it goes on from this text.")
@click.option("--prefix-field", metavar="FIELD", help="Score each record as it goes on from this field of its row.")
@click.option("--join", "between", metavar="TEXT", help="Put between both.  [default: a space, unless one is there]")
@click.option("--choices-field", metavar="FIELD", help="Tell which text of this field's list is the likeliest.")
@click.option("--pairs", is_flag=True, help="Score two texts of each row, as of BLiMP and CrowS-Pairs, or two --field.")
@click.option("--pll", type=click.Choice(["original", "within-word"]), default="original", show_default=True,
              help="What an encoder masks: each token, or with it the rest of its word.")
@click.option("--worst", type=click.IntRange(min=1), metavar="N",
              help="Write only the N records with the most bits per byte, at the end or when interrupted.")
@click.option("--color", is_flag=True, help="Write the text itself, its tokens painted by surprisal.")
@click.option("--base", type=click.Choice(["2", "e"]), default="2", show_default=True,
              help="Unit of surprisal and entropy: bits or nats. logprob is always nats.")
@click.option("--eos/--no-eos", default=False, help="Score the closing token after each record too.")
@options.beginning
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window.  [default: the model's context]")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens a window adds.  [default: half the context]")
@click.option("--header/--no-header", default=True, help="Name the columns in a first line.")
@options.json_output
@options.reading
@options.writing
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.several
def score(files, model, pll, eos, bos, context, stride, header, format_, fields, include, on_error, output, resume, device,
          dtype, threads, batch_tokens, quiet, verbose, crew, **form):
    """Scores records (lines): natural-log probability, scored tokens, bytes, bits per byte.

    A decoder gives the log-probability of a text, an encoder–decoder that of the target of a row or of a line
    source<TAB>target, an encoder the pseudo-log-likelihood; --json names it as method. Tab-separated columns, a line for
    each record in the order read; with --per word or token a line for each of those. A model with a beginning token
    scores a record's first token too; without one the first token is context only.
    """
    from lmcli.analysis import score_rows, signature
    from lmcli.inference.ordering import growing
    from lmcli.inference.scoring import Score
    from lmcli.model.device import dtype_name
    from lmcli.text import records

    per = _check(form, fields, resume)
    names = options.input_files(files, include, quiet) if crew.leads else ()
    loaded = options.load_model(model, device, dtype, threads, verbose)
    scorer = loaded.scorer(bos, eos, context, stride, batch_tokens or 0, pll == "within-word")
    style = score_rows.Style(form["as_json"], form["base"], scorer.method, form["between"])
    rows = score_rows.chosen(style, per, **{name: form[name] for name in FORMS})
    errand = score_rows.errand(scorer, rows, form["alternatives"] or 0)
    if not crew.leads:
        return crew.follow(errand)
    reader = records.Reader(format_, fields, on_error, _asked(form, fields, scorer.method))
    if form["color"] and sys.stdout.isatty() and not quiet:
        click.echo(f"lm: {score_rows.legend()}", err=True)
    with records.Output(output, resume) as out:
        header = header and not form["as_json"] and bool(rows.columns)
        done = out.lines_kept - int(header and out.lines_kept > 0)
        if header and not out.lines_kept:
            out.write("\t".join(rows.columns) + "\n")
        signable = verbose and not resume and reader.take is None and scorer.method == "causal"
        tally = signature.Tally(scorer) if signable else None
        counting = form["worst"] or form["pairs"]
        parts = (part for batch in reader.batches(names) for part in growing(batch))
        try:
            for (part, written), found in crew.in_order(records.unwritten(parts, done, form["pairs"]), errand):
                for place, (record, (text, figures)) in enumerate(zip(part, found)):
                    scores = [Score(*one) for one in figures] if tally or counting else ()
                    if tally:
                        tally.add(record.text, scores[0])
                    if counting:
                        rows.take(record, scores)
                    if place >= written:
                        out.write(text)
                out.flush()
        finally:  # an interrupted run tells what it has found
            for text in rows.rows() if form["worst"] else ():
                out.write(text)
            if form["pairs"] and not quiet:
                click.echo(f"lm: {rows.summary()}", err=True)
    if tally and tally.figures.tokens:
        click.echo(f"lm: {tally.signed(loaded.folder, dtype_name(loaded.placement.dtype))}", err=True)
    if reader.skipped and not quiet:
        click.echo(f"lm: {reader.skipped} bad records left out", err=True)


# options that choose what a row is; any two of them exclude each other
FORMS = {"pairs": "--pairs", "choices_field": "--choices-field", "worst": "--worst", "color": "--color",
         "alternatives": "--alternatives"}


def _check(form, fields, resume):
    """What pieces a row is for; raises UsageError for options that do not go together."""
    chosen = [option for name, option in FORMS.items() if form[name]]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} exclude each other")
    per = form["per"] or ("token" if form["alternatives"] else "record")
    if chosen and per != ("token" if form["alternatives"] else "record"):
        raise UsageError(f"--per {per} and {chosen[0]} exclude each other")
    if form["prefix"] and form["prefix_field"]:
        raise UsageError("--prefix and --prefix-field exclude each other")
    if form["pairs"] and (form["prefix"] or form["prefix_field"]):
        raise UsageError("--pairs scores whole texts: leave the prefix out")
    if resume and form["worst"]:
        raise UsageError("--continue and --worst exclude each other")
    if resume and per != "record" and not form["as_json"]:
        raise UsageError(f"--continue cannot count records in rows of a {per} each",
                         hint="add --json, which writes a line a record")
    return per


def _asked(form, fields, method):
    """What the reader takes of a row; None where it is the text alone."""
    from lmcli.text.asked import Asked

    asked = Asked(fields, form["pairs"], method == "conditional", form["prefix"] or "", form["prefix_field"] or "",
                  form["choices_field"] or "")
    return None if asked == Asked(fields) else asked
