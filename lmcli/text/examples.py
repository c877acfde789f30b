"""Examples: rows with two sides (source and target, or text and label) → token ids in memory-mapped arrays."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from lmcli.errors import UserError
from lmcli.storage import cached
from lmcli.text.batches import IGNORED, Batch, padded, real_tokens
from lmcli.text.documents import Layout, line_number
from lmcli.text.fields import pair_of, row_field
from lmcli.text.ranges import Document
from lmcli.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 2048


class Texts:
    """Token ids of many texts in one array: `texts[i]` are those of text i."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.ids, self.starts, self.lengths = ids, starts, lengths

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i]:self.starts[i] + self.lengths[i]]

    def kept(self, chosen: np.ndarray) -> "Texts":
        """Those of these numbers."""
        return Texts(self.ids, self.starts[chosen], self.lengths[chosen])

    @staticmethod
    def save(folder: Path, name: str, texts: list[np.ndarray], dtype: type) -> None:
        """Writes texts into a folder of the cache."""
        np.save(folder / f"{name}.ids.npy", np.concatenate([np.zeros(0, dtype=dtype), *texts]))
        np.save(folder / f"{name}.lengths.npy", np.asarray([len(text) for text in texts], dtype=np.int64))

    @classmethod
    def load(cls, folder: Path, name: str) -> "Texts":
        """The texts that `save` wrote, their ids memory-mapped."""
        lengths = np.load(folder / f"{name}.lengths.npy")  # nothing cannot be mapped
        ids = np.load(folder / f"{name}.ids.npy", mmap_mode="r" if lengths.any() else None)
        return cls(ids, np.cumsum(lengths) - lengths, lengths)


@dataclass
class Examples:
    """`sources` and `targets`, or texts (pairs of texts: `sources` and `targets`) with `labels`: numbers into the names of
    the labels, (N,) int64, or (N, labels) float32 of 0 and 1 where a text may have several. `sizes` (N,) are the bytes of
    target text (with labels: of text)."""

    sources: Texts
    targets: Texts | None
    labels: np.ndarray | None
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def bytes(self) -> int:
        """Bytes of all target text, with labels of all text."""
        return int(self.sizes.sum())

    @property
    def tokens(self) -> int:
        """Ids of both sides."""
        return int(self.sources.lengths.sum() + (self.targets.lengths.sum() if self.targets else 0))

    def kept(self, chosen: np.ndarray) -> "Examples":
        """The examples of these numbers."""
        return Examples(self.sources.kept(chosen), self.targets and self.targets.kept(chosen),
                        None if self.labels is None else self.labels[chosen], self.sizes[chosen])


def label_names(documents: Sequence[Document], layout: Layout) -> tuple[str, ...]:
    """The labels that rows have, sorted (whole numbers by value)."""
    found = {label for _, row in layout.raw_rows(documents) for label in layout.labels_of(row)}
    return tuple(sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name)))


def fingerprint(documents: Sequence[Document], hashes: dict[str, str], settings: tuple) -> str:
    """A key for what is made of these documents, which lie in files with these hashes, with such settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for document in documents:
        digest.update(f"{hashes[document.file]} {document.start} {document.end}\n".encode())
    return digest.hexdigest()[:32]


def build(documents: Sequence[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
          labels: tuple[str, ...] = (), joined: bool = False) -> Examples:
    """The examples of these rows, one for each in their order, from the cache when they are there; with `labels` each is a
    text, or with two fields a pair of texts, and its label's number. Sides that are `joined` are encoded as one text: a
    token that spans both is the target's.

    `hashes` is the SHA-256 of each file's content. Raises UserError for a label that is not among `labels`, and when the
    cache folder cannot be written.
    """
    kind = (4, tokenizer.hash, layout.fields, layout.label, layout.several, layout.format, labels, joined)
    folder = cached("examples", fingerprint(documents, hashes, kind),
                    lambda part: _write(part, documents, layout, tokenizer, labels, joined))
    sides = [Texts.load(folder, side) for side in ("source", "target")]
    numbers = np.load(folder / "labels.npy") if labels else None
    alone = labels and len(layout.fields) != 2
    return Examples(sides[0], None if alone else sides[1], numbers, np.load(folder / "sizes.npy"))


class _Growing:
    """A .npy file that is written row by row; its array is whole when the block ends."""

    def __init__(self, file: Path, dtype: type, width: tuple[int, ...] = ()):
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0
        self.out = file.open("wb")
        self._head()

    def _head(self) -> None:
        """The header, of one length whatever the number of rows: NumPy leaves room for 21 digits of it."""
        self.out.seek(0)
        np.lib.format.write_array_header_1_0(self.out, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows, *self.width)})

    def extend(self, rows: Sequence) -> None:
        found = np.asarray(rows, dtype=self.dtype)
        self.out.write(found.tobytes())
        self.rows += len(found)

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, *_: object) -> None:
        with self.out:
            self._head()


def _write(folder: Path, documents: Sequence[Document], layout: Layout, tokenizer: Tokenizer, labels: tuple[str, ...],
           joined: bool) -> None:
    dtype, rows = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32, layout.raw_rows(documents)
    with ExitStack() as stack:
        def growing(name: str, kind: type, *width: int) -> _Growing:
            return stack.enter_context(_Growing(folder / f"{name}.npy", kind, width))

        sides = [(growing(f"{side}.ids", dtype), growing(f"{side}.lengths", np.int64)) for side in ("source", "target")]
        numbers = growing("labels", np.float32, len(labels)) if layout.several else growing("labels", np.int64)
        sizes = growing("sizes", np.int64)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            if labels:
                numbers.extend([_numbers(document, layout.labels_of(row), labels, layout.several)
                                for document, row in batch])
            encoded, sized = _encoded([row for _, row in batch], layout, tokenizer, bool(labels), joined)
            sizes.extend([len(text.encode("utf-8")) for text in sized])
            for (ids, lengths), found in zip(sides, encoded):
                ids.extend(np.concatenate([np.asarray(text, dtype=dtype) for text in found]))
                lengths.extend([len(text) for text in found])
        (folder / "facts.json").write_text(json.dumps({"examples": sizes.rows}))


def _encoded(rows: list[dict], layout: Layout, tokenizer: Tokenizer, labelled: bool,
             joined: bool) -> tuple[Iterable[list[list[int]]], list[str]]:
    """(ids of both sides of some rows, the texts whose bytes count)."""
    if labelled:
        texts = [_texts(row, layout) for row in rows]
        return map(tokenizer.encode_batch, map(list, zip(*texts))), list(map("".join, texts))
    sides = [layout.sides_of(row) for row in rows]
    targets = [target for _, target in sides]
    if joined:
        return _joined(sides, pair_of(layout.fields).between, tokenizer), targets
    return (tokenizer.encode_batch([source for source, _ in sides]), tokenizer.target.encode_batch(targets)), targets


def _texts(row: dict, layout: Layout) -> tuple[str, str]:
    """The text of a row, or its two."""
    return tuple(row_field(row, name) for name in layout.fields) if len(layout.fields) == 2 else (layout.text_of(row), "")


def _joined(sides: list[tuple[str, str]], between: str, tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    sources, targets = [], []
    for (source, _), found in zip(sides, tokenizer.encode_with_ends([between.join(pair) for pair in sides])):
        border = bisect_right(found.ends, len((source + between).encode("utf-8")))
        sources.append(found.ids[:border])
        targets.append(found.ids[border:])
    return sources, targets


def _numbers(document: Document, found: tuple[str, ...], labels: tuple[str, ...], several: bool) -> int | list[int]:
    for label in found:
        if label not in labels:
            raise UserError(f"label {label!r} is none of the labels that the model has or the training part shows",
                            where=f"{document.file}, line {line_number(document.file, document.start)}",
                            hint=f"labels: {', '.join(labels[:20])}; --set train.new_head=true takes those of the data")
    return [int(label in found) for label in labels] if several else labels.index(found[0])


def shortened(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both of a pair, cut to `room` ids together as `tokenizers` does it: the longer loses its end first."""
    short = min(len(first), len(second))
    if len(first) + len(second) <= room:
        return first, second
    if 2 * short <= room:
        return (first[:room - short], second) if len(first) > short else (first, second[:room - short])
    half, more = room // 2, room - room // 2
    return (first[:more], second[:half]) if len(first) > len(second) else (first[:half], second[:more])


@dataclass(frozen=True)
class Template:
    """What stands around a text, and which ids a decoder that reads an encoder begins and fills up with. A decoder alone
    reads source and target `joined`. `pair` puts two texts together and gives the ids with their types."""

    before: list[int]
    after: list[int]
    context: int
    padding: int
    start: int = 0
    end: int | None = None
    joined: bool = False
    pair: Callable[[list[int], list[int]], tuple[list[int], list[int]]] | None = None

    def source(self, ids: np.ndarray) -> np.ndarray:
        """A text inside its template, cut at the context."""
        room = self.context - len(self.before) - len(self.after)
        return np.concatenate([self.before, ids[:room], self.after]).astype(np.int64)

    def target(self, ids: np.ndarray) -> np.ndarray:
        """A target with its closing token, cut at the context."""
        if self.end is None:
            return ids[:self.context].astype(np.int64)
        return np.concatenate([ids[:self.context - 1], [self.end]]).astype(np.int64)

    def lengths(self, examples: Examples) -> np.ndarray:
        """Tokens of each example's sides as far as they are read, (N, 1 or 2)."""
        return np.minimum(np.stack(self._whole(examples), axis=1), self.context)

    def lost(self, examples: Examples) -> np.ndarray:
        """Tokens of each example that do not fit."""
        return sum(np.maximum(side - self.context, 0) for side in self._whole(examples))

    def _whole(self, examples: Examples) -> tuple[np.ndarray, ...]:
        """Tokens that each side of each example would take."""
        sources, closing = examples.sources.lengths + len(self.before), int(self.end is not None)
        if self.joined:
            return (sources + examples.targets.lengths + closing - 1,)  # the last token is predicted and not read
        if examples.targets and examples.labels is not None:
            return (examples.sources.lengths + examples.targets.lengths + len(self.pair([], [])[0]),)
        sources = sources + len(self.after)
        return (sources, examples.targets.lengths + closing) if examples.targets else (sources,)

    def batch(self, examples: Examples, chosen: np.ndarray) -> Batch:
        """The Batch of these examples. A decoder that reads an encoder reads `start` and the target, and predicts the target
        and its end."""
        if self.joined:
            return self._continued(examples, chosen)
        if examples.targets and examples.labels is not None:
            return self._pairs(examples, chosen)
        sources = [self.source(examples.sources[i]) for i in chosen]
        read = Batch(padded(sources, self.padding), np.zeros(0, dtype=np.int64), real_tokens(sources))
        if examples.targets is None:
            return replace(read, targets=examples.labels[chosen])
        targets = [self.target(examples.targets[i]) for i in chosen]
        inputs = [np.concatenate([[self.start], target[:-1]]) for target in targets]
        return replace(read, targets=padded(targets, IGNORED), decoder_ids=padded(inputs, self.padding))

    def _pairs(self, examples: Examples, chosen: np.ndarray) -> Batch:
        room = max(0, self.context - len(self.pair([], [])[0]))
        rows = [self.pair(*shortened(examples.sources[i].tolist(), examples.targets[i].tolist(), room)) for i in chosen]
        ids, types = ([np.asarray(part, dtype=np.int64) for part in side] for side in zip(*rows))
        return Batch(padded(ids, self.padding), examples.labels[chosen], real_tokens(ids), types=padded(types, 0))

    def _continued(self, examples: Examples, chosen: np.ndarray) -> Batch:
        """Source and target in a row, of which only the target is to be predicted; too long a source loses its beginning."""
        rows, wanted = [], []
        for i in chosen:
            target = self.target(examples.targets[i])
            room = self.context + 1 - len(self.before) - len(target)
            source = examples.sources[i][-room:] if room > 0 else []
            row = np.concatenate([self.before, source, target]).astype(np.int64)[-self.context - 1:]
            rows.append(row[:-1])
            wanted.append(np.where(np.arange(len(row)) >= len(row) - len(target), row, IGNORED)[1:])
        return Batch(padded(rows, self.padding), padded(wanted, IGNORED), real_tokens(rows))


def unigram_entropy(targets: Iterator[np.ndarray]) -> float:
    """Entropy, in nats, of the targets taken one by one: what a model knows that has only counted them. Of several labels
    (N, labels) the sum of each one's."""
    counts, rows = np.zeros(0, dtype=np.int64), 0
    for found in targets:
        several = found.dtype == np.float32
        rows += len(found) if several else 0
        new = found.sum(0).astype(np.int64) if several else np.bincount(found[found != IGNORED])
        wide, narrow = (new, counts) if len(new) > len(counts) else (counts, new)
        wide = wide.copy()
        wide[:len(narrow)] += narrow
        counts = wide
    shares = np.stack([counts, rows - counts]) / rows if rows else counts[None] / max(1, counts.sum())
    return float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum())
