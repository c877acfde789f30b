"""lm tokenize: text to token ids and back, and learning a BPE."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcli.commands import options
from lmcli.errors import UsageError
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.data.rows import Record, RowReader
    from lmcli.text.tokenizer import Tokenizer

MODES = ("decode", "pieces", "offsets", "count", "color", "train")
LEARN = "learn one with lm tokenize --train -o tok FILE"


@options.command(
    """
  echo "Hello world" | lm tokenize -m runs/s
  lm tokenize -m runs/s notes.txt | lm tokenize -m runs/s --decode
  lm tokenize -m runs/s --count *.txt
  lm tokenize -m runs/s --color notes.txt
  lm tokenize --train -o tok --vocab-size 8000 notes.txt
""",
    guide="data",
)
@options.files
@options.model
@options.flag("--decode", help="Decode ids to text, one record per line.")
@options.flag("--pieces", help="Write tokens instead of ids.")
@options.flag("--offsets", help="Write each id as id:start:end, in bytes.")
@options.flag("--count", help="Write the number of tokens of each record.")
@options.flag("--color", help="Write the text, each token on a background.")
@options.rare(
    options.number("--truncate", at_least=0, help="Keep the first N tokens."),
    options.flag("--special", help="Add the tokenizer's special tokens to each record."),
)
@options.section(
    "Learning a tokenizer",
    options.flag("--train", help="Learn a byte-level BPE from FILE, into -o."),
    options.number("--vocab-size", at_least=257, help="Vocabulary to learn.  [default: 4096]"),
    options.rare(
        options.choice(
            "--pattern",
            values=["gpt2", "qwen2"],
            help="How learning splits words.  [default: gpt2]",
        )
    ),
)
@options.json_output
@options.reading
@options.writing
@options.quiet
def tokenize(args: options.Arguments) -> None:
    """Encodes records (lines) as token ids separated by spaces, one record per line.

    MODEL is a model folder, a tokenizer.json, or a folder with vocab.json and merges.txt. Special
    tokens in the text are recognized. With a byte-level tokenizer --decode restores every byte, but
    for a byte order mark and the CR of CR LF, which are no text.
    """
    modes = [f"--{mode}" for mode in MODES if getattr(args, mode)]
    if len(modes) > 1:
        raise UsageError(f"{modes[0]} and {modes[1]} exclude each other", hint="choose one")
    if args.color and args.as_json:
        raise UsageError("--color and --json exclude each other", hint="leave one of them out")
    if args.train:
        return _learn(args)
    if args.vocab_size or args.pattern:
        raise UsageError("--vocab-size and --pattern need --train", hint="add --train -o DIR")
    options.need_model(args.model)
    from lmcli.checkpoints import hub
    from lmcli.data.output_file import OutputFile, json_line
    from lmcli.data.rows import RowReader
    from lmcli.output.tokenize import TokenFormat
    from lmcli.terminal.wrapping import columns_of
    from lmcli.text import tokenizer as tokenizers

    tokenizer = tokenizers.load(hub.find(args.model, weights=False))
    reader = RowReader(args.format_, args.fields, args.on_error)
    terminal = sys.stdout.isatty() and not args.output and not args.as_json
    style = TokenFormat(
        args.pieces,
        args.offsets,
        args.count,
        args.truncate,
        args.special,
        args.color,
        columns_of(sys.stdout) if terminal else None,
    )
    write: Callable[..., Iterable[tuple[str, dict[str, Any]] | None]] = style.encode
    batches = reader.batches(options.input_files(args.files, args.include, args.quiet))
    if args.decode:
        write = partial(_decoded, reader=reader)
    else:
        batches = options.remarked(batches, {args.model: tokenizer}, args, advice=LEARN)
    with OutputFile(args.output, args.resume, styled=args.color) as out:
        progress.current().begin()
        finished = options.write_header(out, ())  # records that --continue skips
        for batch in batches:
            records, finished = list(islice(batch, finished, None)), max(0, finished - len(batch))
            for record, line in zip(records, write(records, tokenizer)):
                if line is None:
                    continue
                text, facts = line
                if args.as_json:
                    fields = {**(record.fields or {}), **facts}
                    out.write(json_line(fields))
                else:
                    out.write(text + ("\n" if record.newline else ""))
            out.flush()
            progress.current().advance(len(records))
    options.report_skipped(reader.skipped, args.quiet)


def _decoded(
    records: Sequence["Record"], tokenizer: "Tokenizer", reader: "RowReader"
) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """(text, JSON fields) of each record of ids; None for a bad one that is skipped."""
    from lmcli.data.rows import bad_record

    for record in records:
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


def _id(word: str, size: int) -> int:
    if not word.isdecimal():
        raise ValueError(f"{word!r} is not a token id")
    if int(word) >= size:
        raise ValueError(f"id {word} is outside 0 to {size - 1}, the tokenizer's ids")
    return int(word)


def _learn(args: options.Arguments) -> None:
    """Learns a BPE from the files and saves it."""
    paths = options.input_files(args.files, args.include, args.quiet)
    if not args.output:
        raise UsageError("--train needs an output folder", hint="name it with -o DIR")
    from lmcli import display
    from lmcli.config import TokenizerConfig
    from lmcli.data.corpus import learn_tokenizer
    from lmcli.data.documents import DocumentFormat, survey
    from lmcli.data.files import pin
    from lmcli.storage import user_errors

    folder = Path(args.output)
    if (folder / "tokenizer.json").exists():
        raise UsageError(
            "holds a tokenizer already", where=args.output, hint="choose another folder with -o"
        )

    def note(text: str) -> None:
        if not args.quiet:
            display.note(text)

    config = TokenizerConfig(args.vocab_size or 4096, args.pattern or "gpt2")
    document_format = DocumentFormat("file", args.format_, args.fields, args.on_error)
    documents = survey(map(pin, paths), document_format).documents
    tokenizer = learn_tokenizer(documents, document_format, config, note)
    with user_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder, None)
    options.echo(args.output)
