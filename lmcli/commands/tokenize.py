"""lm tokenize: text ↔ ids, and learning a BPE."""

import json
from itertools import islice

import click

from lmcli.commands import options
from lmcli.errors import UsageError


@click.command(epilog="""\b
Examples:
  echo "Hello world" | lm tokenize -m runs/s
  lm tokenize -m runs/s notes.txt | lm tokenize -m runs/s --decode
  lm tokenize -m runs/s --count *.txt
  lm tokenize --train -o tok --vocab-size 8000 notes.txt""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@options.model
@click.option("--decode", is_flag=True, help="Ids back to text, a record a line.")
@click.option("--pieces", is_flag=True, help="Write the vocabulary's tokens instead of ids.")
@click.option("--offsets", is_flag=True, help="Write each id as id:start:end, in bytes.")
@click.option("--count", is_flag=True, help="Write the number of tokens of each record.")
@click.option("--truncate", type=click.IntRange(min=0), metavar="N", help="Keep the first N tokens.")
@click.option("--special", is_flag=True, help="Put the tokenizer's special tokens around each record, and show them.")
@click.option("--train", "learn", is_flag=True, help="Learn a byte-level BPE from the files, into the folder -o.")
@click.option("--vocab-size", type=click.IntRange(min=257), default=None, help="Vocabulary to learn.  [default: 4096]")
@click.option("--pattern", type=click.Choice(["gpt2", "qwen2"]), default=None,
              help="How learning splits words.  [default: gpt2]")
@options.json_output
@options.reading
@options.writing
@options.quiet
def tokenize(files, model, decode, pieces, offsets, count, truncate, special, learn, vocab_size, pattern, as_json,
             format_, fields, include, on_error, output, resume, quiet):
    """Encodes records (lines) as token ids separated by spaces, a record a line.

    MODEL is a model folder, a tokenizer.json, or a folder with vocab.json and merges.txt. Special tokens spelled out in
    the text are recognised. Text that comes back through --decode is the same to the last byte with a byte-level
    tokenizer.
    """
    if sum((decode, pieces, offsets, count, learn)) > 1:
        raise UsageError("only one of --decode, --pieces, --offsets, --count, --train makes sense at a time")
    if not learn and (vocab_size or pattern):
        raise UsageError("--vocab-size and --pattern belong to --train")
    if learn:
        return _learn(options.input_files(files, include, quiet), output, vocab_size, pattern,
                      (format_, fields, on_error), quiet)
    options.need_model(model)
    from lmcli.checkpoints import hub
    from lmcli.text import records
    from lmcli.text import tokenizer as tokenizers

    tokenizer = tokenizers.load(hub.find(model, weights=False))
    reader = records.Reader(format_, fields, on_error)
    show = {"pieces": pieces, "offsets": offsets, "count": count}
    with records.Output(output, resume) as out:
        left = out.lines_kept
        for batch in reader.batches(options.input_files(files, include, quiet)):
            batch, left = list(islice(batch, left, None)), max(0, left - len(batch))
            lines = _decoded(batch, tokenizer, reader) if decode else _encoded(batch, tokenizer, show, truncate, special)
            for record, line in zip(batch, lines):
                if line is None:
                    continue
                text, facts = line
                if as_json:
                    out.write(json.dumps({**(record.fields or {}), **facts}, ensure_ascii=False) + "\n")
                else:
                    out.write(text + ("\n" if record.newline else ""))
            out.flush()
    if reader.skipped and not quiet:
        click.echo(f"lm: {reader.skipped} bad records left out", err=True)


def _encoded(batch, tokenizer, show, truncate, special):
    """(line, JSON fields) of each record."""
    texts = [record.text for record in batch]
    if show["offsets"]:
        encoded = tokenizer.encode_with_ends(texts)
    else:
        encoded = [(ids, None) for ids in tokenizer.encode_batch(texts)]
    for record, (ids, ends) in zip(batch, encoded):
        starts = [0, *ends[:-1]] if ends else []
        ids = ids if truncate is None else ids[:truncate]
        spans = list(zip(starts, ends or []))[:len(ids)]
        if special:
            ids = tokenizer.prefix + ids + tokenizer.suffix
            spans = [(0, 0)] * len(tokenizer.prefix) + spans + [(len(record.text.encode()),) * 2] * len(tokenizer.suffix)
        tokens = tokenizer.pieces(ids) if show["pieces"] else None
        facts = {"text": record.text, "ids": ids, **({"pieces": tokens} if tokens is not None else {}),
                 **({"offsets": spans} if show["offsets"] else {}), "count": len(ids)}
        if show["count"]:
            yield str(len(ids)), facts
        elif show["offsets"]:
            yield " ".join(f"{index}:{start}:{end}" for index, (start, end) in zip(ids, spans)), facts
        else:
            yield " ".join(tokens if tokens is not None else map(str, ids)), facts


def _decoded(batch, tokenizer, reader):
    """(text, JSON fields) of each record of ids; None for a bad one that is to be left out."""
    from lmcli.text.records import bad_record

    for record in batch:
        try:
            ids = [_id(word, tokenizer.size) for word in record.text.split()]
        except ValueError as error:
            if reader.on_error == "stop":
                raise bad_record(error, record.file, record.line) from error
            reader.skipped += reader.on_error == "skip"
            yield ("", {"ids": [], "text": ""}) if reader.on_error == "blank" else None
            continue
        text = tokenizer.decode(ids)
        yield text, {"ids": ids, "text": text}


def _id(word, size):
    if not word.isdecimal():
        raise ValueError(f"{word!r} is no token id")
    if int(word) >= size:
        raise ValueError(f"id {word} is outside 0 to {size - 1}, the tokenizer's ids")
    return int(word)


def _learn(files, output, vocab_size, pattern, reading, quiet):
    if not output:
        raise UsageError("where to? --train needs -o DIR")
    from pathlib import Path

    from lmcli.config import TokenizerConfig
    from lmcli.storage import user_errors
    from lmcli.text import tokenizer as tokenizers
    from lmcli.text.documents import Layout, pin_stdin

    folder = Path(output)
    if (folder / "tokenizer.json").exists():
        raise UsageError("holds a tokenizer already", where=output, hint="choose another folder with -o")
    config = TokenizerConfig(vocab_size or 4096, pattern or "gpt2")
    layout = Layout("file", *reading)
    documents, _ = layout.survey([pin_stdin() if file == "-" else file for file in files])
    learnt = tokenizers.learn_from(documents, layout, config,
                                   lambda text: None if quiet else click.echo(f"lm: {text}", err=True))
    with user_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    learnt.save(folder, None)
    click.echo(output)
