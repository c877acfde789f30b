"""lm score: how likely a model finds each line, word or token."""

import json
from itertools import islice

import click

from lmcli.commands import options
from lmcli.errors import UsageError


@click.command(epilog="""\b
Examples:
  lm score -m runs/s notes.txt
  echo "To be or not to be" | lm score -m runs/s --per word
  lm score -m runs/s --json --per token notes.txt | jq .pieces
  tail -f chat.log | lm score -m runs/s --no-header""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@options.model
@click.option("--per", type=click.Choice(["record", "word", "token"]), default="record", show_default=True)
@click.option("--base", type=click.Choice(["2", "e"]), default="2", show_default=True,
              help="Unit of surprisal: bits or nats. logprob is always nats.")
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
def score(files, model, per, base, eos, bos, context, stride, header, as_json, format_, fields, include, on_error,
          output, resume, device, dtype, threads, batch_tokens, quiet, verbose):
    """Scores records (lines): natural-log probability, scored tokens, bytes, bits per byte.

    Tab-separated columns, a line for each record in the order read; with --per word or token a line for each of those.
    A model with a beginning token scores a record's first token too; without one the first token is context only.
    """
    from lmcli.text import records

    if resume and per != "record" and not as_json:
        raise UsageError(f"--continue cannot count records in rows of a {per} each",
                         hint="add --json, which writes a line a record")
    names = options.input_files(files, include, quiet)
    reader = records.Reader(format_, fields, on_error)
    loaded = options.load_model(model, device, dtype, threads, verbose)
    scorer = loaded.scorer(bos, eos, context, stride, batch_tokens or 0)
    columns = RECORD_COLUMNS if per == "record" else UNIT_COLUMNS
    with records.Output(output, resume) as out:
        done = out.lines_kept - int(header and not as_json and out.lines_kept > 0)
        if header and not as_json and not out.lines_kept:
            out.write("\t".join(columns) + "\n")
        for batch in reader.batches(names):
            for part in (batch[i:i + 512] for i in range(0, len(batch), 512)):
                written, done = min(done, len(part)), max(0, done - len(part))
                if written == len(part):
                    continue
                # a part begun is scored whole again: other neighbours in a batch would change the last digits
                scores = zip(part, scorer.score([record.text for record in part], per))
                for record, found in islice(scores, written, None):
                    out.write(_json(record, found, per, base) if as_json else
                              _row(record, found) if per == "record" else _unit_rows(record, found, base))
                out.flush()
    if reader.skipped and not quiet:
        click.echo(f"lm: {reader.skipped} bad records left out", err=True)


RECORD_COLUMNS = ("logprob", "tokens", "bytes", "bits_per_byte", "text")
UNIT_COLUMNS = ("line", "index", "piece", "start", "end", "bytes", "logprob", "surprisal")


def _number(value: float | None) -> str:
    return "NA" if value is None else f"{value:.6g}" if value else "0"


def _row(record, found) -> str:
    from lmcli.text.records import escaped

    return "\t".join((_number(found.logprob), str(found.tokens), str(found.bytes), _number(found.bits_per_byte),
                      escaped(record.text))) + "\n"


def _surprisal(unit, base: str) -> float | None:
    return unit.surprisal if base == "2" or unit.logprob is None else -unit.logprob


def _unit_rows(record, found, base: str) -> str:
    from lmcli.text.records import escaped

    return "".join("\t".join((str(record.line), str(i), escaped(unit.piece), str(unit.start), str(unit.end),
                              str(unit.bytes), _number(unit.logprob), _number(_surprisal(unit, base)))) + "\n"
                   for i, unit in enumerate(found.pieces))


def _json(record, found, per: str, base: str) -> str:
    facts = {"text": record.text, "logprob": found.logprob, "tokens": found.tokens, "bytes": found.bytes,
             "bits_per_byte": found.bits_per_byte}
    if per != "record":
        facts["pieces"] = [{"piece": unit.piece, "start": unit.start, "end": unit.end, "bytes": unit.bytes,
                            "logprob": unit.logprob, "surprisal": _surprisal(unit, base)} for unit in found.pieces]
    return json.dumps({**(record.fields or {}), **facts}, ensure_ascii=False) + "\n"
