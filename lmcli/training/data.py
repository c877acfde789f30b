"""From files to what a run trains and validates on: documents, held-out part, tokenizer, token ids."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.text import corpus, documents
from lmcli.text import tokenizer as tokenizers
from lmcli.text.corpus import Corpus, EncodedDocument
from lmcli.text.documents import Document, Layout
from lmcli.text.records import expand, shown
from lmcli.text.tokenizer import Tokenizer

FEWEST_TOKENS = 32


@dataclass
class Source:
    """Where a run's text comes from, as `recipe.yaml` stores it: absolute files, and how they hold documents."""

    files: list[str]
    validation_files: list[str]
    layout: Layout
    hashes: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict:
        """Plain values for `recipe.yaml`."""
        return {"files": self.files, "validation_files": self.validation_files, "documents": self.layout.documents,
                "format": self.layout.format, "fields": list(self.layout.fields), "on_error": self.layout.on_error,
                "sha256": self.hashes}


def source_from_facts(facts: dict) -> Source:
    """The Source that `facts` came from."""
    layout = Layout(facts["documents"], facts["format"], tuple(facts["fields"]), facts["on_error"])
    return Source(list(facts["files"]), list(facts["validation_files"]), layout, dict(facts["sha256"]))


@dataclass
class TrainingData:
    """Token ids to train on, documents to validate on (`measured`: those that are), and the tokenizer of both."""

    tokenizer: Tokenizer
    corpus: Corpus
    measured: list[Document]
    validation: list[EncodedDocument]
    context: int


def find(arguments: tuple[str, ...], val: tuple[str, ...], layout: Layout, include: str | None,
         note: Callable[[str], None]) -> Source:
    """The Source of DATA… and --val arguments; standard input is pinned in the cache. `note` gets what was left out."""
    files, skipped = expand(arguments, include)
    if skipped:
        note(f"{skipped} files that are not UTF-8 text left out")
    held_out = expand(val)[0] if val else []
    pinned = [documents.pin_stdin() if file == "-" else str(Path(file).absolute()) for file in files]
    return Source(pinned, [str(Path(file).absolute()) for file in held_out], layout)


def prepare(source: Source, config: TokenizerConfig, context: int, validation_bytes: int, tokenizer: Tokenizer | None,
            note: Callable[[str], None]) -> TrainingData:
    """Surveys, splits, learns a tokenizer on the training part if none is given, and encodes.

    Raises UserError for empty or too little text, and when `source` was read before and its content has changed.
    """
    layout = source.layout
    found, hashes = layout.survey(source.files)
    if source.validation_files:
        held_out, more = layout.survey(source.validation_files)
        training, hashes = found, {**hashes, **more}
    else:
        training, held_out = documents.split(found, layout)
    _check_unchanged(source, hashes)
    if layout.skipped:
        note(f"{layout.skipped} bad records left out")
    measured = documents.limit(held_out, layout, validation_bytes)
    _note_sizes(note, training, held_out, measured)
    if tokenizer is None:
        tokenizer = tokenizers.learn((piece.text for piece in layout.pieces(training)), config)
        if tokenizer.size < config.vocab_size:
            note(f"the text has room for a vocabulary of {tokenizer.size:,}, not {config.vocab_size:,}")
    ids = corpus.build(training, hashes, layout, tokenizer, tokenizer.special("eos_token"))
    if ids.tokens < FEWEST_TOKENS:
        raise UserError(f"only {ids.tokens} tokens to train on", where=shown(source.files[0]),
                        hint=f"at least {FEWEST_TOKENS} are needed: give more text")
    if ids.tokens < context:
        note(f"context shrinks from {context} to {ids.tokens} tokens, all there are to train on")
        context = ids.tokens
    validation = list(corpus.encode_documents(measured, layout, tokenizer))
    return TrainingData(tokenizer, ids, measured, validation, context)


def _check_unchanged(source: Source, hashes: dict[str, str]) -> None:
    for file, known in source.hashes.items():
        if hashes.get(file) != known:
            raise UserError("has changed since the run began", where=file,
                            hint="a run resumes on the same data; start a new one with --from to go on with other data")
    source.hashes = hashes


def _note_sizes(note: Callable[[str], None], training: list[Document], held_out: list[Document],
                measured: list[Document]) -> None:
    sizes = [sum(document.end - document.start for document in part) for part in (training, held_out, measured)]
    text = f"{len(training):,} documents, {sizes[0]:,} bytes to train on; {sizes[1]:,} bytes held out"
    if sizes[2] < sizes[1]:
        text += f", {sizes[2]:,} of them measured (train.validation_bytes)"
    note(text)


def ranges(documents_: list[Document]) -> list[dict]:
    """Documents as `recipe.yaml` stores them: for each file its byte ranges, "0-120 240-360"."""
    found: dict[str, list[str]] = {}
    for document in documents_:
        found.setdefault(document.file, []).append(f"{document.start}-{document.end}")
    return [{"file": file, "ranges": " ".join(parts)} for file, parts in found.items()]


def from_ranges(stored: list[dict]) -> list[Document]:
    """The documents that `ranges` stored."""
    return [Document(part["file"], *map(int, span.split("-"))) for part in stored for span in part["ranges"].split()]


def validation_documents(facts: dict, stored: list[dict]) -> tuple[list[Document], Layout]:
    """The held-out documents of a run, as its `recipe.yaml` tells, with their layout. UserError when a file has changed."""
    source = source_from_facts(facts)
    files = [part["file"] for part in stored]
    for file in files:
        if not Path(file).is_file():
            raise UserError("the validation text is no longer there", where=file)
    _, hashes = source.layout.survey(files)
    source.hashes = {file: source.hashes[file] for file in files}
    _check_unchanged(source, hashes)
    return from_ranges(stored), source.layout
