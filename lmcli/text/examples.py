"""Examples: rows with two sides (source and target, or text and label) → token ids in memory-mapped arrays."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from lmcli.errors import UserError
from lmcli.storage import cached
from lmcli.text.batches import IGNORED, Batch, padded, real_tokens
from lmcli.text.documents import Document, Layout
from lmcli.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 2048


class Texts:
    """Token ids of many texts, one after another: `texts[i]` are those of text i."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray):
        self.ids, self.ends = ids, ends
        self.lengths = np.diff(ends, prepend=0)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.ends[i] - self.lengths[i]:self.ends[i]]

    @staticmethod
    def save(folder: Path, name: str, texts: list[np.ndarray], dtype: type) -> None:
        """Writes texts into a folder of the cache."""
        np.save(folder / f"{name}.ids.npy", np.concatenate([np.zeros(0, dtype=dtype), *texts]))
        np.save(folder / f"{name}.ends.npy", np.cumsum([len(text) for text in texts], dtype=np.int64))

    @classmethod
    def load(cls, folder: Path, name: str) -> "Texts":
        """The texts that `save` wrote, their ids memory-mapped."""
        ends = np.load(folder / f"{name}.ends.npy")
        some = len(ends) and ends[-1]  # nothing cannot be mapped
        return cls(np.load(folder / f"{name}.ids.npy", mmap_mode="r" if some else None), ends)


@dataclass
class Examples:
    """`sources` and either `targets` or `labels` (numbers into the names of the labels). `bytes` counts target text
    (with labels: text), `tokens` all ids."""

    sources: Texts
    targets: Texts | None
    labels: np.ndarray | None
    bytes: int

    def __len__(self) -> int:
        return len(self.sources.ends)

    @property
    def tokens(self) -> int:
        """Ids of both sides."""
        return len(self.sources.ids) + (len(self.targets.ids) if self.targets else 0)


def label_names(documents: list[Document], layout: Layout) -> tuple[str, ...]:
    """The labels that rows have, sorted (whole numbers by value)."""
    found = {layout.label_of(row) for row in layout.raw_rows(documents)}
    return tuple(sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name)))


def fingerprint(documents: list[Document], hashes: dict[str, str], settings: tuple) -> str:
    """A key for what is made of these documents, which lie in files with these hashes, with such settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for document in documents:
        digest.update(f"{hashes[document.file]} {document.start} {document.end}\n".encode())
    return digest.hexdigest()[:32]


def build(documents: list[Document], hashes: dict[str, str], layout: Layout, tokenizer: Tokenizer,
          labels: tuple[str, ...] = ()) -> Examples:
    """The examples of these rows, from the cache when they are there; with `labels` each is a text and its label's number.

    `hashes` is the SHA-256 of each file's content. Raises UserError for a label that is not among `labels`, and when the
    cache folder cannot be written.
    """
    key = fingerprint(documents, hashes, (2, tokenizer.hash, layout.fields, layout.label, layout.format, labels))
    folder = cached("examples", key, lambda part: _write(part, documents, layout, tokenizer, labels))
    facts = json.loads((folder / "facts.json").read_text())
    sides = [Texts.load(folder, side) for side in ("source", "target")]
    numbers = np.load(folder / "labels.npy") if labels else None
    return Examples(sides[0], None if labels else sides[1], numbers, facts["bytes"])


def _write(folder: Path, documents: list[Document], layout: Layout, tokenizer: Tokenizer, labels: tuple[str, ...]) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    ids: dict[str, list[np.ndarray]] = {"source": [], "target": []}
    numbers, size = [], 0
    rows = layout.raw_rows(documents)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        sources, targets = zip(*(_sides(row, layout, labels) for row in batch))
        encoded = {"source": tokenizer.encode_batch(list(sources))}
        if labels:
            numbers += [_number(layout.label_of(row), labels) for row in batch]
        else:
            encoded["target"] = tokenizer.target.encode_batch(list(targets))
        size += sum(len(text.encode("utf-8")) for text in (sources if labels else targets))
        for side, found in encoded.items():
            ids[side] += [np.asarray(text, dtype=dtype) for text in found]
    for side, texts in ids.items():
        Texts.save(folder, side, texts, dtype)
    np.save(folder / "labels.npy", np.asarray(numbers, dtype=np.int64))
    (folder / "facts.json").write_text(json.dumps({"bytes": size}))


def _sides(row: dict, layout: Layout, labels: tuple[str, ...]) -> tuple[str, str]:
    if labels:
        return "".join(row[name] for name in layout.fields), ""
    return row[layout.fields[0]], row[layout.fields[1]]


def _number(label: str, labels: tuple[str, ...]) -> int:
    if label not in labels:
        raise UserError(f"label {label!r} is none of the model's labels", where="training data",
                        hint=f"labels: {', '.join(labels[:20])}")
    return labels.index(label)


@dataclass(frozen=True)
class Template:
    """What stands around a text, and which ids a decoder that reads an encoder begins and fills up with."""

    before: list[int]
    after: list[int]
    context: int
    padding: int
    start: int = 0
    end: int | None = None

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
        """Tokens of each example, both sides."""
        around = len(self.before) + len(self.after)
        found = np.minimum(examples.sources.lengths + around, self.context)
        return found + (np.minimum(examples.targets.lengths + 1, self.context) if examples.targets else 0)

    def cut(self, examples: Examples) -> int:
        """How many examples do not fit."""
        long = examples.sources.lengths > self.context - len(self.before) - len(self.after)
        return int((long | (examples.targets.lengths >= self.context) if examples.targets else long).sum())

    def batch(self, examples: Examples, chosen: np.ndarray) -> Batch:
        """The Batch of these examples. A decoder reads `start` and the target, and predicts the target and its end."""
        sources = [self.source(examples.sources[i]) for i in chosen]
        read = Batch(padded(sources, self.padding), np.zeros(0, dtype=np.int64), real_tokens(sources))
        if examples.targets is None:
            return replace(read, targets=examples.labels[chosen])
        targets = [self.target(examples.targets[i]) for i in chosen]
        inputs = [np.concatenate([[self.start], target[:-1]]) for target in targets]
        return replace(read, targets=padded(targets, IGNORED), decoder_ids=padded(inputs, self.padding))


def unigram_entropy(targets: Iterator[np.ndarray]) -> float:
    """Entropy, in nats, of the targets taken one by one: what a model knows that has only counted them."""
    counts = np.zeros(0, dtype=np.int64)
    for found in targets:
        new = np.bincount(found[found != IGNORED])
        wide, narrow = (new, counts) if len(new) > len(counts) else (counts, new)
        wide = wide.copy()
        wide[:len(narrow)] += narrow
        counts = wide
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log(share)).sum())
