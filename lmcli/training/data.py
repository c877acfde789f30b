"""From files to what a run trains and validates on: documents, held-out part, tokenizer, token ids."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from lmcli.config import TokenizerConfig, TrainConfig
from lmcli.errors import UsageError, UserError
from lmcli.text import aligned, checks, corpus, documents, examples, questions
from lmcli.text import tokenizer as tokenizers
from lmcli.text.answers import Posed
from lmcli.text.batches import ExampleRows, MaskedRows, Masking, PackedRows
from lmcli.text.corpus import Corpus, EncodedDocument, Mixture
from lmcli.text.documents import Layout
from lmcli.text.examples import Examples, Template
from lmcli.text.fields import LABELLED, PAIRS, TEXT_FIELDS, known_pair, pair_of
from lmcli.text.questions import Framing, Questions, Windows
from lmcli.text.ranges import Document, Documents
from lmcli.text.records import expand, shown
from lmcli.text.tokenizer import Tokenizer
from lmcli.training import mixing
from lmcli.training.mixing import Share
from lmcli.training.objectives import OBJECTIVES, Objective

FEWEST_TOKENS = 32
BY_EXAMPLES = ("completion", "seq2seq", "classification")  # objectives whose rows are examples, the others' are packed
ANSWERED = ("context", "question", "answers")


@dataclass
class Source:
    """Where a run's text comes from, as `recipe.yaml` stores it: absolute files, and how they hold documents. `on_long`,
    truncate, skip or error, is what becomes of examples that are longer than the context. With `shares` there are several
    sources, each with its own of the `files`, drawn by weight."""

    files: list[str]
    validation_files: list[str]
    layout: Layout
    hashes: dict[str, str] = field(default_factory=dict)
    on_long: str = "truncate"
    shares: list[Share] = field(default_factory=list)

    def facts(self) -> dict:
        """Plain values for `recipe.yaml`."""
        return {"files": self.files, "validation_files": self.validation_files, "documents": self.layout.documents,
                "format": self.layout.format, "fields": list(self.layout.fields), "label": self.layout.label,
                "several": self.layout.several, "paired": self.layout.paired, "answers": self.layout.answers,
                "on_error": self.layout.on_error, "on_long": self.on_long, "sha256": self.hashes,
                **({"shares": [asdict(share) for share in self.shares]} if self.shares else {})}


def source_from_facts(facts: dict) -> Source:
    """The Source that `facts` came from."""
    layout = Layout(facts["documents"], facts["format"], tuple(facts["fields"]), facts["on_error"], facts.get("label", ""),
                    facts.get("several", False), facts.get("paired", False), facts.get("answers", ""))
    return Source(list(facts["files"]), list(facts["validation_files"]), layout, dict(facts["sha256"]),
                  facts.get("on_long", "truncate"), [Share(**share) for share in facts.get("shares", [])])


@dataclass
class TrainingData:
    """What to train on (token ids, examples, or questions), documents to validate on (`measured`: those that are), the
    tokenizer of both, for classification the labels, of which a text may have `several`, and for spans what the validation
    part poses."""

    tokenizer: Tokenizer
    corpus: Corpus | Mixture | Examples | Questions
    measured: Documents
    validation: list[EncodedDocument] | Examples | Questions
    context: int
    labels: tuple[str, ...] = ()
    several: bool = False
    objective: str = "causal"
    posed: list[Posed] = field(default_factory=list)


def find(arguments: tuple[str, ...], val: tuple[str, ...], layout: Layout, include: str | None,
         note: Callable[[str], None], on_long: str = "truncate",
         targets: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()), weights: tuple[float, ...] = ()) -> Source:
    """The Source of DATA… and --val arguments; standard input is pinned in the cache. `note` gets what was left out.

    `targets` are files whose lines are the targets of the lines of DATA…, and those of --val: both are pinned as rows.
    With `weights`, one for each of DATA…, rows are drawn from these in that proportion.
    """
    files, skipped, shares = mixing.expanded(arguments, weights, include) if weights else (*expand(arguments, include), [])
    if skipped:
        note(f"{skipped} files that are not UTF-8 text left out")
    held_out = expand(val)[0] if val else []
    if any(targets):
        files, held_out = (aligned.pin(*both, layout) for both in zip((files, held_out), targets))
    pinned = [documents.pin_stdin() if file == "-" else str(Path(file).absolute()) for file in files]
    return Source(pinned, [str(Path(file).absolute()) for file in held_out], layout, on_long=on_long, shares=shares)


def settle(source: Source, asked: str, shape: str, note: Callable[[str], None], several: bool = False) -> Objective:
    """The objective that was asked for or, for "auto", follows from the model's shape and the first row's fields; the
    fields it reads are written into `source.layout`. A row has `several` labels where told so, or the first has a list.

    Raises UsageError for an objective that the shape cannot have, UserError when the data has not the fields.
    """
    layout = source.layout
    row = layout.first_row(source.files) or {}
    labelled = layout.fields[-1] == LABELLED[-1] if layout.fields else set(LABELLED) <= row.keys()
    pair = pair_of(layout.fields) or (None if layout.fields or TEXT_FIELDS[0][0] in row else known_pair(row))
    if asked == "auto":
        continued = pair is not None and not layout.fields and pair.fields != PAIRS[0].fields
        of_encoder = "span" if set(ANSWERED) <= row.keys() else "classification" if labelled else "masked"
        asked = {"decoder": "completion" if continued else "causal", "encoder-decoder": "seq2seq"}.get(shape, of_encoder)
    objective = OBJECTIVES[asked]
    if objective.shape != shape:
        raise UsageError(f"objective {asked} needs the shape {objective.shape}, not {shape}", where="train",
                         hint="choose a preset of that shape: encoder-small, seq2seq-small, or small for a decoder")
    if source.shares and asked not in ("causal", "masked"):
        raise UsageError(f"--weights mixes text, and objective {asked} learns from single rows", where="train",
                         hint="leave --weights out, or for a decoder --set train.objective=causal")
    if asked in ("seq2seq", "completion"):
        if pair is None:
            raise UserError(f"objective {asked} learns from rows with two texts" + (f"; fields: {', '.join(row)}" if row
                            else ", and there are none"), where=shown(source.files[0]),
                            hint="JSON Lines or TSV with source and target, or name the two: --fields a,b")
        layout.fields, layout.paired = pair.fields, True
        if asked == "completion":
            note(f"the loss is on what follows {pair.fields[0]!r} alone; --set train.objective=causal learns both")
    elif asked == "classification":
        *fields, label = layout.fields or LABELLED
        layout.fields, layout.label = tuple(fields) or ("text",), label
        layout.several = several or isinstance(row.get(label), list)
    elif asked == "span":
        if not row or len(layout.fields) not in (0, 3):
            raise UserError("answers are learnt from rows with three fields", where=shown(source.files[0]),
                            hint="JSON Lines with context, question, answers, or name the three, in this order, by --fields")
        *layout.fields, layout.answers = layout.fields or ANSWERED
        layout.fields = tuple(layout.fields)
    elif set(PAIRS[0].fields) <= row.keys() and not layout.fields:
        note("the rows have source and target, a decoder reads source alone; --preset translate learns from both, and so "
             "does --set train.objective=completion")
    return objective


@dataclass
class Parts:
    """The documents to train on, those held out, and of these the ones that are measured; where sources are mixed, those
    to train on of each."""

    training: Documents
    held_out: Documents
    measured: Documents
    mixed: list[Documents] = field(default_factory=list)


def split(source: Source, validation_bytes: int, note: Callable[[str], None]) -> Parts:
    """Reads all files once and parts what they hold; `source` gets their hashes.

    Raises UserError for empty text, and when `source` was read before and its content has changed.
    """
    layout, hashes, training, held_out = source.layout, {}, [], []
    for files in mixing.parted(source.files, source.shares) if source.shares else [source.files]:
        found, read = layout.survey(files)
        hashes |= read
        kept, left = (found, []) if source.validation_files else documents.split(found, layout)
        training.append(kept)
        held_out.append(left)
    if source.validation_files:
        found, read = layout.survey(source.validation_files)
        hashes |= read
        held_out = [found]
    _check_unchanged(source, hashes)
    if layout.skipped:
        note(f"{layout.skipped} bad records left out")
    if layout.empty:
        note(f"{layout.empty:,} rows with an empty {'side' if layout.paired else 'text'} left out")
    whole, left = (Documents.of(chain.from_iterable(part)) if len(part) > 1 else part[0] for part in (training, held_out))
    parts = Parts(whole, left, documents.limit(left, layout, validation_bytes), training if source.shares else [])
    _note_sizes(note, parts, layout)
    return parts


def prepare(source: Source, parts: Parts, config: TokenizerConfig, context: int, tokenizer: Tokenizer | None,
            note: Callable[[str], None], objective: Objective = OBJECTIVES["causal"],
            labels: tuple[str, ...] = ()) -> TrainingData:
    """Learns a tokenizer on the training part if none is given, and encodes.

    `labels` are those of a model that is trained further. Raises UserError for too little text.
    """
    layout, hashes, training, measured = source.layout, source.hashes, parts.training, parts.measured
    if tokenizer is None:
        tokenizer = tokenizers.learn_from(training, layout, config, note, objective.shape)
    if objective.name == "span":
        asked = [questions.build(part, hashes, layout, tokenizer) for part in (training, measured)]
        return TrainingData(tokenizer, asked[0], measured, asked[1], context, posed=questions.posed_by(measured, layout))
    if objective.name in BY_EXAMPLES:
        return _examples(source, parts, tokenizer, context, objective, labels, note)
    closing = tokenizer.special("eos_token" if objective.name == "causal" else "sep_token")
    built = [corpus.build(part, hashes, layout, tokenizer, closing, note) for part in parts.mixed or [training]]
    for i, part in enumerate(built):
        if part.tokens < FEWEST_TOKENS:
            name = source.shares[i].name if source.shares else shown(source.files[0])
            raise UserError(f"only {part.tokens} tokens to train on", where=name,
                            hint=f"at least {FEWEST_TOKENS} are needed: give more text")
    ids = corpus.Mixture(built, [share.weight for share in source.shares]) if source.shares else built[0]
    if ids.tokens < context:
        note(f"context shrinks from {context} to {ids.tokens} tokens, all there are to train on")
        context = ids.tokens
    validation = list(corpus.encode_documents(measured, layout, tokenizer))
    return TrainingData(tokenizer, ids, measured, validation, context, objective=objective.name)


def _examples(source: Source, parts: Parts, tokenizer: Tokenizer, context: int, objective: Objective,
              labels: tuple[str, ...], note: Callable[[str], None]) -> TrainingData:
    layout = source.layout
    if objective.name == "classification":
        labels = labels or examples.label_names(parts.training, layout)
        if len(labels) < 2 and not layout.several:
            raise UserError(f"all rows have the same label {labels[0]!r}", where=shown(source.files[0]),
                            hint=f"is {layout.label!r} the field with the labels? --fields TEXT,LABEL names others")
    sides = [examples.build(part, source.hashes, layout, tokenizer, labels, objective.name == "completion")
             for part in (parts.training, parts.measured)]
    prepared = TrainingData(tokenizer, sides[0], parts.measured, sides[1], context, labels, layout.several, objective.name)
    for text in checks.findings(*sides, labels):
        note(text)
    return _without_long(prepared, source.on_long, parts, note)


def _without_long(prepared: TrainingData, on_long: str, parts: Parts, note: Callable[[str], None]) -> TrainingData:
    """What is left of examples that are longer than the context; UserError with "error", naming the first."""
    around, found = template(prepared, None), []
    for documents_, part in zip((parts.training, parts.measured), (prepared.corpus, prepared.validation)):
        lost = around.lost(part)
        long = np.flatnonzero(lost)
        if len(long) and on_long == "error":
            first = documents_[long[0]]
            raise UserError(f"longer than the context of {prepared.context} tokens, and so are {len(long) - 1:,} others",
                            where=f"{first.file}, line {documents.line_number(first.file, first.start)}",
                            hint="--on-long truncate or skip, or a larger --set train.context")
        if len(long) and on_long == "truncate" and part is prepared.corpus:
            share = lost.sum() / (lost.sum() + around.lengths(part).sum())
            note(f"{len(long):,} of {len(part):,} examples are longer than the context of {prepared.context} tokens: "
                 f"{int(lost.sum()):,} tokens ({share:.1%}) are cut off; --on-long skip or error, or a larger train.context")
        if len(long) and on_long == "skip":
            note(f"{len(long):,} of {len(part):,} {'training' if part is prepared.corpus else 'validation'} examples are "
                 f"longer than the context of {prepared.context} tokens: left out")
            if len(long) == len(part):
                raise UserError("no example is left", where="--on-long skip", hint="a larger --set train.context")
        found.append(part.kept(np.flatnonzero(lost == 0)) if on_long == "skip" else part)
    return replace(prepared, corpus=found[0], validation=found[1])


def template(prepared: TrainingData, start: int | None) -> Template:
    """How examples are put together; a decoder begins from `start`."""
    tokenizer = prepared.tokenizer
    padding = tokenizer.special("pad_token")
    return Template(tokenizer.prefix, tokenizer.suffix, prepared.context, 0 if padding is None else padding,
                    0 if start is None else start, None if prepared.labels else tokenizer.special("eos_token"),
                    prepared.objective == "completion", tokenizer.with_template)


def windows(prepared: TrainingData, found: Questions, stride: int) -> Windows:
    """The windows over the contexts of questions, `stride` tokens apart."""
    padding = prepared.tokenizer.special("pad_token")
    return Windows(found, Framing(prepared.tokenizer, prepared.context, stride, padding or 0))


def in_windows(prepared: TrainingData) -> int:
    """How many training contexts are longer than what one row has room for."""
    if not isinstance(prepared.corpus, Questions):
        return 0
    return int((np.bincount(windows(prepared, prepared.corpus, 0).places[:, 0]) > 1).sum())


def training_rows(prepared: TrainingData, objective: Objective, start: int | None,
                  train: TrainConfig) -> PackedRows | MaskedRows | ExampleRows:
    """The rows of a run, in an order that follows from the seed."""
    tokenizer, seed = prepared.tokenizer, train.seed
    if objective.name == "span":
        asked = windows(prepared, prepared.corpus, train.doc_stride)
        return ExampleRows(asked.lengths, asked.batch, seed)
    if objective.name == "causal":
        beginning = tokenizer.prefix[0] if len(tokenizer.prefix) == 1 else None
        closing = tokenizer.special("eos_token") if train.document_masks else None
        return PackedRows(prepared.corpus.ids, prepared.context, beginning, seed, closing)
    if objective.name == "masked":
        mask = tokenizer.special("mask_token")
        if mask is None:
            raise UserError("the tokenizer has no mask token",
                            hint="an encoder's tokenizer names one; leave --tokenizer out to learn such a one")
        special = {tokenizer.special(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
        masking = Masking(mask, tokenizer.size, tuple(special - {None}), train.mask_share)
        return MaskedRows(prepared.corpus.ids, prepared.context, (tokenizer.prefix, tokenizer.suffix), masking, seed)
    return example_rows(prepared.corpus, template(prepared, start), seed)


def example_rows(found: Examples, around: Template, seed: int = 0) -> ExampleRows:
    """Examples as rows, put together by length."""
    return ExampleRows(around.lengths(found), lambda chosen: around.batch(found, chosen), seed)


def validation_ids(prepared: TrainingData) -> np.ndarray:
    """The ids of all validation documents in a row."""
    return np.concatenate([document.ids for document in prepared.validation])


def _check_unchanged(source: Source, hashes: dict[str, str]) -> None:
    for file, known in source.hashes.items():
        if hashes.get(file) != known:
            raise UserError("has changed since the run began", where=file,
                            hint="a run resumes on the same data; start a new one with --from to go on with other data")
    source.hashes = hashes


def _note_sizes(note: Callable[[str], None], parts: Parts, layout: Layout) -> None:
    sizes = [part.bytes for part in (parts.training, parts.held_out, parts.measured)]
    text = f"{len(parts.training):,} {_called(layout)}, {sizes[0]:,} bytes to train on; {sizes[1]:,} bytes held out"
    if sizes[2] < sizes[1]:
        text += f", {sizes[2]:,} of them measured (train.validation_bytes)"
    note(text)


def _called(layout: Layout) -> str:
    """What the documents of a layout are, with the fields that are read."""
    if layout.paired:
        return f"pairs ({' + '.join(layout.fields)})"
    if layout.label:
        return f"labelled texts ({' + '.join((*layout.fields, layout.label))})"
    return f"questions ({' + '.join((*layout.fields, layout.answers))})" if layout.answers else "documents"


def ranges(documents_: Documents) -> list[dict]:
    """Documents as `recipe.yaml` stores them: for each file its byte ranges, "0-120 240-360"."""
    found: dict[str, list[str]] = {}
    for document in documents_:
        found.setdefault(document.file, []).append(f"{document.start}-{document.end}")
    return [{"file": file, "ranges": " ".join(parts)} for file, parts in found.items()]


def from_ranges(stored: list[dict]) -> Documents:
    """The documents that `ranges` stored."""
    return Documents.of(Document(part["file"], *map(int, span.split("-")))
                        for part in stored for span in part["ranges"].split())


def validation_documents(facts: dict, stored: list[dict]) -> tuple[Documents, Layout]:
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
