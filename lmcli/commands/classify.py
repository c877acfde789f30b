"""lm classify: the label of each text, or of each of its tokens; the answer to each question."""

from itertools import islice

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError


@click.command(epilog="""\b
Examples:
  echo "This is a test sentence." | lm classify -m bert-sentiment
  lm classify -m bert-sentiment --logits reviews.txt
  lm classify -m bert-topics --top 3 --json news.jsonl
  lm classify -m bert-nli --field premise,hypothesis pairs.jsonl
  lm classify -m bert-names --per token letters.txt | grep PER
  lm classify -m bert-squad questions.jsonl                    rows with context and question
  lm classify -m bert-squad --top 3 --threshold 0.9 --json questions.jsonl""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@options.model
@click.option("--per", type=click.Choice(["record", "token"]), help="What is labelled.  [default: what the model labels]")
@click.option("--logits", is_flag=True, help="Write the logits, a column a label, instead of label and probability.")
@click.option("--top", type=click.IntRange(min=1), metavar="K",
              help="Write the K likeliest labels and their probabilities, or the K likeliest answers.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Probability above which a label of a multi-label model holds. With questions: of there being no answer, "
              "beside the best one, above which none is given.")
@click.option("--max-answer-tokens", "longest", type=click.IntRange(min=1), metavar="N",
              help="Tokens of an answer at most.  [default: 30]")
@click.option("--on-long", type=click.Choice(["truncate", "error"]), default="truncate", show_default=True,
              help="A record longer than the model's context: read its beginning, or stop. A question's context is read "
              "whole, in windows.")
@click.option("--header/--no-header", default=None,
              help="Name the columns in a first line.  [default: with --logits and --per token, and for answers]")
@options.json_output
@options.reading
@options.writing
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.several
def classify(files, model, per, logits, top, threshold, longest, on_long, header, as_json, format_, fields, include,
             on_error, output, resume, device, dtype, threads, batch_tokens, quiet, verbose, crew):
    """Labels records (lines) with a classifier: label, probability and text, tab-separated, in the order read.

    A multi-label model gives all labels that hold, joined by commas, and their probabilities likewise; NA when none
    does, and for an empty record. With --json a field of the record that is named like a result (as label) is kept as
    given_NAME. The tokenizer's special tokens are put around each text. Two fields joined by a comma are a pair of texts,
    as models of inference or paraphrase read them; several --field are one text, put together as they stand.

    A question-answering model reads rows with context and question (or --field CONTEXT --field QUESTION) and finds the
    answer in the context: columns answer, score (its probability), start and end (bytes of the context) and question; NA
    where there is none.
    """
    from lmcli.analysis import label_rows
    from lmcli.text import records

    if logits and top:
        raise UsageError("--logits and --top are two ways to write a result: leave one out")
    names = options.input_files(files, include, quiet) if crew.leads else ()
    loaded = options.load_model(model, device, dtype, threads, verbose)
    wanted, batch = label_rows.Wanted(per, logits, top, as_json, fields), batch_tokens or 0
    if loaded.model.config.head == "span":
        most = {"longest": longest} if longest else {}
        rows = label_rows.Answers(loaded.answerer(threshold, **most, count=top or 1, batch=batch), wanted)
    elif longest:
        raise UsageError("only a question-answering model gives answers", where="--max-answer-tokens")
    else:
        rows = label_rows.Labels(loaded.classifier(threshold, batch), wanted)
    errand = label_rows.errand(rows)
    if not crew.leads:
        return crew.follow(errand)
    reader = rows.reader(format_, on_error)
    header = not as_json and (header if header is not None else rows.header)
    if resume and rows.per_token and not as_json:
        raise UsageError("--continue cannot count records in rows of a token each",
                         hint="add --json, which writes a line a record")
    long = 0
    with records.Output(output, resume) as out:
        done = out.lines_kept - int(header and out.lines_kept > 0)
        if header and not out.lines_kept:
            out.write("\t".join(rows.columns) + "\n")
        parts = (batch[i:i + 512] for batch in reader.batches(names) for i in range(0, len(batch), 512))
        for (part, written), found in crew.in_order(records.unwritten(parts, done), errand):
            for record, (text, truncated) in islice(zip(part, found), written, None):
                if truncated and on_long == "error":
                    raise UserError(f"longer than the model's context of {loaded.context} tokens",
                                    where=f"{records.shown(record.file)}, line {record.line}",
                                    hint="--on-long truncate reads the beginning of such records")
                long += truncated
                out.write(text)
            out.flush()
    if long and not quiet:
        which = "1 record is" if long == 1 else f"{long} records are"
        click.echo(f"lm: {which} longer than the context of {loaded.context} tokens; only the beginning was read", err=True)
    if reader.skipped and not quiet:
        click.echo(f"lm: {reader.skipped} bad records left out", err=True)
