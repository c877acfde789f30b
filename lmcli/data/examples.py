"""Rows with two sides (source and target, or text and label) → token ids in mapped arrays."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from lmcli.data.byte_ranges import Document
from lmcli.data.corpus import fingerprint, id_type
from lmcli.data.documents import DocumentFormat, location, read_rows
from lmcli.data.files import write_pinned
from lmcli.data.rows import RowReader, display_name
from lmcli.data.schema import (
    MESSAGES,
    SOURCE_TARGET,
    matching_label,
    row_field,
    row_messages,
    sort_labels,
)
from lmcli.errors import UsageError, UserError
from lmcli.storage import cached
from lmcli.text.chat_template import AssistantSpan, ChatTemplate, assistant_mask
from lmcli.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 2048
# how the files of `pin_parallel_files` are read
PARALLEL_FORMAT: dict[str, Any] = {"format": "jsonl", "fields": SOURCE_TARGET}


# -- arrays in the cache


class ArrayWriter:
    """Writes a .npy file row by row; the array is complete when the block ends."""

    def __init__(self, file: Path, dtype: type, *width: int):
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0
        self.out = file.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """NumPy pads the header, so that its size does not depend on the number of rows."""
        self.out.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.width),
        }
        np.lib.format.write_array_header_1_0(self.out, header)

    def extend(self, rows: Sequence | np.ndarray) -> None:
        """Appends rows."""
        array = np.asarray(rows, dtype=self.dtype)
        self.out.write(array.tobytes())
        self.rows += len(array)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self.out:
            self._write_header()


class Texts:
    """Token ids of many texts in one array; `texts[i]` are the ids of text i."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.ids, self.starts, self.lengths = ids, starts, lengths

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i] + self.lengths[i]]

    def select(self, chosen: np.ndarray) -> "Texts":
        """The texts with these indices."""
        return Texts(self.ids, self.starts[chosen], self.lengths[chosen])

    @staticmethod
    def writer(
        stack: ExitStack, folder: Path, name: str, dtype: type
    ) -> Callable[[Iterable[Sequence[int]]], None]:
        """A function that appends texts to files of the cache, which `stack` closes."""
        ids = stack.enter_context(ArrayWriter(folder / f"{name}.ids.npy", dtype))
        lengths = stack.enter_context(ArrayWriter(folder / f"{name}.lengths.npy", np.int64))

        def extend(texts: Iterable[Sequence[int]]) -> None:
            arrays: list[np.ndarray] = [np.asarray(text, dtype=dtype) for text in texts]
            ids.extend(np.concatenate(arrays))
            lengths.extend([len(array) for array in arrays])

        return extend

    @classmethod
    def load(cls, folder: Path, name: str) -> "Texts":
        """The texts that `writer` wrote; their ids are memory-mapped."""
        lengths = np.load(folder / f"{name}.lengths.npy")
        # an empty file cannot be mapped
        ids = np.load(folder / f"{name}.ids.npy", mmap_mode="r" if lengths.any() else None)
        return cls(ids, np.cumsum(lengths) - lengths, lengths)


# -- rows to examples


@dataclass
class Examples:
    """Encoded examples: sources with targets, or texts (`sources`) with labels.

    A pair of texts with labels is in `sources` and `targets`. labels: (N,) int64 indices into the
    label names, or (N, labels) float32 of 0 and 1 if multi-label. sizes: (N,) UTF-8 bytes of target
    text, with labels of all text. masks: of conversations (`sources`), 1 for each token that the
    assistant says; the last one is.
    """

    sources: Texts
    targets: Texts | None
    labels: np.ndarray | None
    sizes: np.ndarray
    masks: Texts | None = None

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def bytes(self) -> int:
        """Total of `sizes`."""
        return int(self.sizes.sum())

    @property
    def tokens(self) -> int:
        """Number of ids of both sides."""
        return int(self.sources.lengths.sum() + (self.targets.lengths.sum() if self.targets else 0))

    def select(self, chosen: np.ndarray) -> "Examples":
        """The examples with these indices."""
        return Examples(
            self.sources.select(chosen),
            self.targets and self.targets.select(chosen),
            None if self.labels is None else self.labels[chosen],
            self.sizes[chosen],
            self.masks and self.masks.select(chosen),
        )


def label_names(documents: Sequence[Document], doc_format: DocumentFormat) -> tuple[str, ...]:
    """The labels in rows, sorted; whole numbers by value."""
    rows = (row for _, row in read_rows(documents, doc_format))
    names = {label for row in rows for label in doc_format.labels(row)}
    return tuple(sort_labels(names))


def build(
    documents: Sequence[Document],
    hashes: dict[str, str],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    labels: tuple[str, ...] = (),
    joined: bool = False,
    unknown_label: str = "",
    template: ChatTemplate | None = None,
) -> Examples:
    """The examples of these rows in order, from the cache when they are there.

    hashes: the SHA-256 of each file's content. labels: names of the labels; without them rows are
    sources and targets. `joined` sides are encoded as one text: a token across their border is the
    target's. `template` writes conversations. Raises UserError for an unknown label, with the
    advice `unknown_label`, for messages that the template refuses, and when the cache cannot be
    written.
    """
    settings = (
        4,
        tokenizer.hash,
        doc_format.fields,
        doc_format.label,
        doc_format.multi_label,
        doc_format.format,
        labels,
        joined,
        *((template.source, sorted(template.special.items())) if template else ()),
    )
    folder = cached(
        "examples",
        fingerprint(documents, hashes, settings),
        lambda part: (
            _write_chats(part, documents, doc_format, tokenizer, template)
            if template
            else _write(part, documents, doc_format, tokenizer, labels, joined, unknown_label)
        ),
    )
    has_targets = not template and (not labels or len(doc_format.fields) == 2)
    return Examples(
        Texts.load(folder, "source"),
        Texts.load(folder, "target") if has_targets else None,
        np.load(folder / "labels.npy") if labels else None,
        np.load(folder / "sizes.npy"),
        Texts.load(folder, "mask") if template else None,
    )


def _write_chats(
    folder: Path,
    documents: Sequence[Document],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> None:
    rows = read_rows(documents, doc_format)
    with ExitStack() as stack:
        add_ids, add_masks = (
            Texts.writer(stack, folder, name, id_type(tokenizer)) for name in ("source", "mask")
        )
        sizes = stack.enter_context(ArrayWriter(folder / "sizes.npy", np.int64))
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            chats = [_written(template, *each) for each in batch]
            for (text, spans), encoded in zip(
                chats, tokenizer.encode_with_ends([text for text, _ in chats])
            ):
                mask = assistant_mask(text, spans, encoded.ends)
                size = len(mask) - mask[::-1].index(True)  # nothing is learned from the rest
                add_ids([encoded.ids[:size]])
                add_masks([mask[:size]])
                answers = (text[span.start : span.content_end] for span in spans)
                sizes.extend([len("".join(answers).encode("utf-8"))])


def _written(
    template: ChatTemplate, document: Document, row: dict
) -> tuple[str, list[AssistantSpan]]:
    """The text of a conversation, and what the assistant says in it."""
    try:
        text, spans = template.text_and_spans(row_messages(row, MESSAGES[0]))
        if not any(text[span.start : span.end] for span in spans):
            raise UserError("the chat template shows nothing of what the assistant says")
    except UserError as error:
        where = location(document.file, document.start)
        raise UserError(error.what, where, error.hint) from error
    return text, spans


def _write(
    folder: Path,
    documents: Sequence[Document],
    doc_format: DocumentFormat,
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
    joined: bool,
    unknown_label: str,
) -> None:
    multi_label, rows = doc_format.multi_label, read_rows(documents, doc_format)
    numbers = {label: i for i, label in enumerate(labels)}
    with ExitStack() as stack:

        def writer(name: str, dtype: type, *width: int) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.npy", dtype, *width))

        add_sources = Texts.writer(stack, folder, "source", id_type(tokenizer))
        add_targets = Texts.writer(stack, folder, "target", id_type(tokenizer))
        width = (len(labels),) if multi_label else ()
        indices = writer("labels", np.float32 if multi_label else np.int64, *width)
        sizes = writer("sizes", np.int64)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            if labels:
                indices.extend(
                    [
                        _label_indices(
                            document, doc_format.labels(row), numbers, multi_label, unknown_label
                        )
                        for document, row in batch
                    ]
                )
                sides = [_texts(row, doc_format) for _, row in batch]
                sized = ["".join(texts) for texts in sides]
            else:
                sides = [doc_format.pair(row) for _, row in batch]
                sized = [target for _, target in sides]
            sizes.extend([len(text.encode("utf-8")) for text in sized])
            separator = doc_format.pair_schema.separator if joined else None
            sources, targets = _encode(sides, tokenizer, separator, bool(labels))
            add_sources(sources)
            add_targets(targets)
        (folder / "facts.json").write_text(json.dumps({"examples": sizes.rows}))


def _texts(row: dict, doc_format: DocumentFormat) -> tuple[str, str]:
    """The text of a row with labels ("" as the second), or its two texts."""
    if len(doc_format.fields) != 2:
        return doc_format.text(row), ""
    first, second = doc_format.fields
    return row_field(row, first), row_field(row, second)


def _encode(
    sides: list[tuple[str, str]], tokenizer: Tokenizer, separator: str | None, labeled: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """(ids of the sources, of the targets); with a separator both sides are encoded as one text."""
    firsts, seconds = map(list, zip(*sides))
    if separator is None:
        target_tokenizer = tokenizer if labeled else tokenizer.target
        return tokenizer.encode_batch(firsts), target_tokenizer.encode_batch(seconds)
    sources, targets = [], []
    encoded = tokenizer.encode_with_ends([separator.join(pair) for pair in sides])
    for source, (ids, ends) in zip(firsts, encoded):
        border = bisect_right(ends, len((source + separator).encode("utf-8")))
        sources.append(ids[:border])
        targets.append(ids[border:])
    return sources, targets


def _label_indices(
    document: Document,
    labels: tuple[str, ...],
    numbers: dict[str, int],
    multi_label: bool,
    unknown_label: str,
) -> int | list[int]:
    """The number of a row's label, or with `multi_label` 0 or 1 for each known label."""
    indices = []
    for label in labels:
        if label not in numbers:
            label = matching_label(label, numbers)
        if label not in numbers:
            names = list(numbers)
            raise UserError(
                f"label {label!r} is none of the model's labels: "
                f"{', '.join(names[:20])}{', …' if names[20:] else ''}",
                where=location(document.file, document.start),
                hint=unknown_label,
            )
        indices.append(numbers[label])
    return [int(i in indices) for i in range(len(numbers))] if multi_label else indices[0]


# -- parallel files


def pin_parallel_files(sources: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Copies each source and target file into one file of rows, named by its content, in the cache.

    Raises UsageError when there are not as many files of each, UserError when one has more lines
    than the other.
    """
    if len(sources) != len(targets):
        raise UsageError(
            f"{len(sources)} files of sources and {len(targets)} of targets",
            where="--target",
            hint="one --target for each FILE, one --val-target for each --val, in the same order",
        )
    paths = []
    for source, target in zip(sources, targets):
        rows = (json.dumps(row, ensure_ascii=False) for row in _parallel_rows(source, target))
        lines = (row.encode("utf-8") + b"\n" for row in rows)
        paths.append(write_pinned("aligned", ".jsonl", "keep parallel lines", lines))
    return paths


def _parallel_rows(source: str, target: str) -> Iterator[dict[str, str]]:
    for number, (left, right) in enumerate(zip_longest(_lines(source), _lines(target)), 1):
        if left is None or right is None:
            ended, other = (source, target) if left is None else (target, source)
            raise UserError(
                f"ends after line {number - 1:,}, {display_name(other)} does not",
                where=display_name(ended),
                hint="line N of one file belongs to line N of the other",
            )
        yield {"source": left, "target": right}


def _lines(file: str) -> Iterator[str]:
    return (record.text for batch in RowReader("text").batches([file]) for record in batch)
