"""Which documents are trained on, which are held out, and which of these are measured.

The key of a document is a hash of its text, and documents are chosen by the order of their keys.
So the choice is random; neither the order of the documents nor a pattern in it has an influence,
and copies of a text are all held out or none unless there are very many.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lmcli.data.byte_ranges import (
    MAX_IN_MEMORY,
    Document,
    DocumentLabels,
    Documents,
    random_numbers,
)
from lmcli.data.documents import SPLIT_SEED, DocumentFormat, Survey
from lmcli.data.files import open_bytes
from lmcli.data.rows import display_name
from lmcli.errors import UserError

VALIDATION_SHARE = 0.1  # of the documents, or of each
MIN_DOCUMENTS = 20  # of fewer the last tenth of each is held out
KEY_RANGE = (-(2**63), 2**63)


def split(
    surveyed: Survey, doc_format: DocumentFormat, seed: int | None = SPLIT_SEED
) -> tuple[Documents, Documents]:
    """(training, validation): a tenth of 20 or more documents, else the last 10 % of each.

    The tenth has the smallest keys; of rows with labels it is a tenth of each label, however few
    they are. Texts are cut at a line end. Rows are not cut: of fewer than 20 rows the last one is
    held out. `seed` None: every tenth, as in runs of November 2026 and before. Raises UserError
    when nothing would be left on one side.
    """
    documents = surveyed.documents
    if seed is None and len(documents) >= MIN_DOCUMENTS:
        held_out = np.arange(len(documents)) % 10 == 9
    elif seed is not None and (surveyed.labels or len(documents) >= MIN_DOCUMENTS):
        held_out = _held_out(surveyed)
    else:
        return _last_tenths(documents, doc_format)
    return documents.select(~held_out), documents.select(held_out)


def _held_out(surveyed: Survey) -> np.ndarray:
    """(N,) bool: the documents to validate on. Raises UserError if each label occurs once."""
    documents, labels = surveyed.documents, surveyed.labels
    if labels:
        held_out = hold_out_of_each_label(documents.keys, labels, VALIDATION_SHARE)
    else:
        held_out = hold_out(documents.keys, round(VALIDATION_SHARE * len(documents)))
    if held_out.any():
        return held_out
    raise UserError(
        "no record can be held out for validation: each label occurs once",
        where=display_name(documents.files[0]),
        hint="give --val FILE; or do --fields TEXT,LABEL name the labels?",
    )


def _last_tenths(documents: Documents, doc_format: DocumentFormat) -> tuple[Documents, Documents]:
    rows = [document for document in documents if doc_format.has_rows(document.file)]
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        if document in rows:
            last = document == rows[-1] and len(documents) > 1
            (held_out if last else training).append(document)
            continue
        size = document.end - document.start
        cut = _line_end(document, document.start + size * 9 // 10)
        training += [document._replace(end=cut)] if cut > document.start else []
        held_out += [document._replace(start=cut)] if cut < document.end else []
    if not training or not held_out:
        raise UserError(
            "too little text for a 10 % validation split",
            where=display_name(documents[0].file),
            hint="give more text, or --val FILE",
        )
    return Documents.of(training), Documents.of(held_out)


def limit(
    documents: Documents, doc_format: DocumentFormat, max_bytes: int, seed: int | None = SPLIT_SEED
) -> Documents:
    """About `max_bytes` of the documents, from all over them: some of many, or a part of each.

    Those with the smallest keys are taken, or with `seed` None every k-th. Where sizes differ much
    they may still be too much: then texts are cut as well.
    """
    total = documents.bytes
    if total <= max_bytes:
        return documents
    many = len(documents) >= MIN_DOCUMENTS
    if many or any(doc_format.has_rows(document.file) for document in documents):
        every = -(-total // max_bytes)
        if seed is None:
            documents = documents[::every]
        else:
            documents = documents.select(smallest_keys(documents.keys, -(-len(documents) // every)))
        total = documents.bytes
        if total <= 2 * max_bytes:
            return documents
    return Documents.of(_beginnings(documents, doc_format, max_bytes, total))


def limit_each(
    sources: Sequence[Documents], doc_format: DocumentFormat, max_bytes: int, seed: int | None
) -> Documents:
    """About `max_bytes` of several lists of documents, of each its share: at least some of each."""
    total = max(1, sum(documents.bytes for documents in sources))
    return Documents.joined(
        [
            limit(documents, doc_format, max(1, max_bytes * documents.bytes // total), seed)
            for documents in sources
        ]
    )


def _beginnings(
    documents: Documents, doc_format: DocumentFormat, max_bytes: int, total: int
) -> Iterator[Document]:
    for document in documents:
        if doc_format.has_rows(document.file):
            yield document
            continue
        size = (document.end - document.start) * max_bytes // total
        end = _line_end(document, document.start + size)
        if end > document.start:
            yield document._replace(end=end)


def _line_end(document: Document, at: int) -> int:
    """The first line end from byte `at` on; without one nearby the next space or character."""
    with open_bytes(document.file) as handle:
        handle.seek(at)
        text = handle.read(min(1 << 16, document.end - at))
    for mark in (b"\n", b" "):
        if 0 <= (offset := text.find(mark)) < len(text) - 1:
            return at + offset + 1
    continuation = next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))
    return at + continuation


# -- choices by key


def smallest_keys(keys: np.ndarray, count: int) -> np.ndarray:
    """(N,) bool: True for the `count` documents with the smallest keys."""
    candidates = _candidates(keys, count)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[candidates[np.argsort(keys[candidates], kind="stable")[:count]]] = True
    return chosen


def hold_out(keys: np.ndarray, count: int) -> np.ndarray:
    """(N,) bool: True for about `count` documents, by the order of their keys.

    Documents with the same key are all chosen or none. Those that are more than half of `count` are
    not chosen, unless there are few others: then chance decides about each of them.

    >>> hold_out(np.array([3, 1, 2, 1, 4]), 2).tolist()
    [True, False, True, False, False]
    """
    candidates = _candidates(keys, count)
    order = candidates[np.argsort(keys[candidates], kind="stable")]
    sorted_keys = keys[order]
    _, starts, sizes = np.unique(sorted_keys, return_index=True, return_counts=True)
    fits = sizes <= max(1, count // 2)
    copies = np.repeat(~fits, sizes)
    if sizes[fits].sum() >= 2 * count:
        order, units = order[~copies], sorted_keys[~copies]
    else:
        number = np.arange(len(order)) - np.repeat(starts, sizes)
        units = np.where(copies, random_numbers(sorted_keys, number), sorted_keys)
    _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order] = (np.cumsum(sizes) <= count)[unit]
    return chosen


def _candidates(keys: np.ndarray, count: int) -> np.ndarray:
    """Indices of the documents to choose from: of a long list those with small keys."""
    if len(keys) <= MAX_IN_MEMORY:
        return np.arange(len(keys))
    share = min(1.0, 2 * count / len(keys))
    low, high = KEY_RANGE
    return np.flatnonzero(keys < low + int(share * (high - low - 1)))


def hold_out_of_each_label(keys: np.ndarray, labels: DocumentLabels, share: float) -> np.ndarray:
    """(N,) bool: `hold_out` of this share of the documents of each label, rounded.

    A label of two or more documents has at least one on each side where that can be; one that
    occurs once is not held out. Of several labels of a document the rarest decides (Sechidis et al.
    2011).
    """
    counts = np.bincount(labels.ids)
    by_label = labels.documents[np.argsort(labels.ids, kind="stable")]
    members = np.split(by_label, np.cumsum(counts)[:-1])
    order = np.argsort(-counts, kind="stable")  # the most frequent label first
    quotas = _quotas(counts[order], share)
    chosen, undecided = np.zeros((2, len(keys)), dtype=bool)
    undecided[:] = True
    for label, quota in zip(order[::-1], quotas[::-1]):
        documents = members[label]
        free = documents[undecided[documents]]
        undecided[free] = False
        held_out = int(chosen[documents].sum())
        trained_on = len(documents) - len(free) - held_out
        count = min(quota - held_out, len(free) - (not trained_on))
        if count > 0:
            chosen[free[hold_out(keys[free], count)]] = True
    # the last document of a label may have been held out for another label of it
    for documents in members:
        if len(documents) and chosen[documents].all():
            chosen[documents[np.argmin(keys[documents])]] = False
    return chosen


def _quotas(counts: np.ndarray, share: float) -> list[int]:
    """How many documents of each label to hold out: the total is the share, rounded once."""
    quotas: list[int] = []
    total = 0
    for count, until_here in zip(counts.tolist(), np.cumsum(counts).tolist()):
        quotas.append(max(1, int(share * until_here + 0.5) - total) if count > 1 else 0)
        total += quotas[-1]
    return quotas
