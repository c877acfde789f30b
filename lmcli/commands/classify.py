"""lm classify: the label of each text, or of each of its tokens."""

import json
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
  lm classify -m bert-names --per token letters.txt | grep PER""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@options.model
@click.option("--per", type=click.Choice(["record", "token"]), help="What is labelled.  [default: what the model labels]")
@click.option("--logits", is_flag=True, help="Write the logits, a column a label, instead of label and probability.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Write the K likeliest labels and their probabilities.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Probability above which a label of a multi-label model holds.")
@click.option("--on-long", type=click.Choice(["truncate", "error"]), default="truncate", show_default=True,
              help="A record longer than the model's context: read its beginning, or stop.")
@click.option("--header/--no-header", default=None,
              help="Name the columns in a first line.  [default: with --logits and --per token]")
@options.json_output
@options.reading
@options.writing
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
def classify(files, model, per, logits, top, threshold, on_long, header, as_json, format_, fields, include, on_error,
             output, resume, device, dtype, threads, batch_tokens, quiet, verbose):
    """Labels records (lines) with a classifier: label, probability and text, tab-separated, in the order read.

    A multi-label model gives all labels that hold, joined by commas, and their probabilities likewise; NA when none
    does, and for an empty record. With --json a field of the record that is named like a result (as label) is kept as
    given_NAME. The tokenizer's special tokens are put around each text. Two fields joined by a comma are a pair of texts,
    as models of inference or paraphrase read them; several --field are one text, put together as they stand.
    """
    from lmcli.text import records

    if logits and top:
        raise UsageError("--logits and --top are two ways to write a result: leave one out")
    names = options.input_files(files, include, quiet)
    pair = tuple(fields[0].split(",")) if len(fields) == 1 and fields[0].count(",") == 1 else ()
    reader = records.Reader(format_, pair or fields, on_error)
    loaded = options.load_model(model, device, dtype, threads, verbose)
    classifier = loaded.classifier(threshold, batch_tokens or 0)
    style = _Style(classifier, per, logits, top, as_json, pair)
    header = not as_json and (header if header is not None else logits or classifier.per_token)
    if resume and classifier.per_token and not as_json:
        raise UsageError("--continue cannot count records in rows of a token each",
                         hint="add --json, which writes a line a record")
    long = 0
    with records.Output(output, resume) as out:
        done = out.lines_kept - int(header and out.lines_kept > 0)
        if header and not out.lines_kept:
            out.write("\t".join(style.columns()) + "\n")
        for batch in reader.batches(names):
            for part in (batch[i:i + 512] for i in range(0, len(batch), 512)):
                written, done = min(done, len(part)), max(0, done - len(part))
                if written == len(part):
                    continue
                # a part begun is worked on whole again: other neighbours in a batch would change the last digits
                results = zip(part, classifier.classify([style.text(record) for record in part]))
                for record, found in islice(results, written, None):
                    if found.truncated and on_long == "error":
                        raise UserError(f"longer than the model's context of {loaded.context} tokens",
                                        where=f"{records.shown(record.file)}, line {record.line}",
                                        hint="--on-long truncate reads the beginning of such records")
                    long += found.truncated
                    out.write(style.written(record, found))
                out.flush()
    if long and not quiet:
        which = "1 record is" if long == 1 else f"{long} records are"
        click.echo(f"lm: {which} longer than the context of {loaded.context} tokens; only the beginning was read", err=True)
    if reader.skipped and not quiet:
        click.echo(f"lm: {reader.skipped} bad records left out", err=True)


class _Style:
    """How results are written: `written` gives the lines of one record, `columns` their names."""

    def __init__(self, classifier, per, logits, top, as_json, pair):
        given = "token" if classifier.per_token else "record"
        if pair and classifier.per_token:
            raise UsageError("this model labels the tokens of one text, not of a pair", where="--field")
        if per and per != given:
            raise UsageError(f"this model labels each {given}, not each {per}", where="--per")
        self.per_token, self.labels = classifier.per_token, classifier.labels
        self.logits, self.top, self.as_json, self.pair = logits, top and min(top, len(self.labels)), as_json, pair

    def text(self, record):
        """What is labelled: the text of a record, or its pair of texts."""
        return tuple((record.fields or {}).get(name, "") for name in self.pair) if self.pair else record.text

    def columns(self):
        if self.logits:
            found = self.labels
        else:
            found = ["label", "probability"] if not self.top else [
                f"{name}_{k + 1}" for k in range(self.top) for name in ("label", "probability")]
        return ["line", "index", "piece", "start", "end", *found] if self.per_token else [*found, *(self.pair or ["text"])]

    def written(self, record, found):
        from lmcli.text.records import escaped

        if self.as_json:
            return self._json(record, found)
        if not self.per_token:
            text = self.text(record) if self.pair else (record.text,)
            return "\t".join((*self._cells(found), *map(escaped, text))) + "\n"
        return "".join("\t".join((str(record.line), str(i), escaped(piece.piece), str(piece.start), str(piece.end),
                                  *self._cells(piece))) + "\n" for i, piece in enumerate(found.pieces))

    def _cells(self, verdict):
        """The columns of one verdict; NA for what there is not."""
        from lmcli.text.records import escaped

        if self.logits:
            return [f"{value:.7g}" for value in verdict.logits] or ["NA"] * len(self.labels)
        if self.top:
            pairs = verdict.top(self.top) or [("NA", None)] * self.top
            return [cell for label, chance in pairs for cell in (escaped(label), _number(chance))]
        return [escaped(",".join(verdict.labels)) or "NA",
                ",".join(_number(verdict.probabilities[label]) for label in verdict.labels) or "NA"]

    def _json(self, record, found):
        facts = {**({} if self.pair else {"text": record.text}), "truncated": found.truncated}
        if self.per_token:
            facts["pieces"] = [{"piece": piece.piece, "start": piece.start, "end": piece.end, **self._facts(piece)}
                               for piece in found.pieces]
        else:
            facts |= self._facts(found)
        given = {f"given_{key}" if key in facts and (key != "text" or value != record.text) else key: value
                 for key, value in (record.fields or {}).items()}
        return json.dumps({**given, **facts}, ensure_ascii=False) + "\n"

    def _facts(self, verdict):
        chances = dict(verdict.top(self.top)) if self.top else verdict.probabilities
        return {"label": verdict.label, "probability": verdict.probability, "labels": verdict.labels,
                "probabilities": chances, "logits": verdict.logits}


def _number(value):
    return "NA" if value is None else f"{value:.6g}"
