"""Signatures: one line that says what a figure was made of, for `lm perplexity --verify`."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np

from lmcli import __version__
from lmcli.checkpoints import adapter_base
from lmcli.data.rows import CHUNK_BYTES
from lmcli.errors import UsageError
from lmcli.scoring.perplexity import Perplexity
from lmcli.scoring.scorer import Score, Scorer
from lmcli.storage import user_errors
from lmcli.text.gguf_header import is_gguf

HASH_DIGITS = 12
# relative difference in nats that other threads, batches and processors may cause
NATS_TOLERANCE = 1e-5
SIGNATURE_PREFIX = "lm-perplexity"


@dataclass(frozen=True)
class Signature:
    """What was measured, how, and the result.

    `model`, `tokenizer` and `text` are the first 12 digits of a SHA-256: of config.json and all
    weights, of the tokenizer's definition, of the documents.
    """

    model: str
    tokenizer: str
    text: str
    documents: str
    context: int
    stride: int
    bos: int
    eos: int
    dtype: str
    nats: float
    tokens: int
    bytes: int
    version: str = __version__

    def __str__(self) -> str:
        cells = [SIGNATURE_PREFIX]
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            cells.append(f"{name}:{value:.6f}" if name == "nats" else f"{name}:{value}")
        return "|".join(cells)

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """The signature of a text, also wrapped as a terminal shows it; UsageError for none."""
        prefix, *cells = "".join(text.split()).split("|")
        try:
            values = dict(cell.split(":", 1) for cell in cells)
            types = get_type_hints(cls)
            if prefix != SIGNATURE_PREFIX or values.keys() != types.keys():
                raise ValueError
            return cls(**{name: types[name](value) for name, value in values.items()})
        except ValueError:
            raise UsageError(
                f"{text[:60]!r} is no signature of lm perplexity",
                where="--verify",
                hint=f"give the last column of a row; it begins with {SIGNATURE_PREFIX}|model:",
            ) from None

    def differences(self, other: "Signature") -> list[str]:
        """What differs in another signature, in words; nats within the tolerance are equal."""
        differences = []
        for name in (field.name for field in fields(self) if field.name != "version"):
            ours, theirs = getattr(self, name), getattr(other, name)
            same = ours == theirs
            if name == "nats":
                same = abs(ours - theirs) <= NATS_TOLERANCE * max(1.0, abs(ours))
            if not same:
                differences.append(f"{name} is {theirs}, not {ours}")
        return differences


def sign(
    figures: Perplexity, scorer: Scorer, model: str, text: str, documents: str, dtype: str
) -> Signature:
    """The signature of figures that a scorer gave.

    `model` and `text` are hashes, `documents` is what a document was (file, line, blank).
    """
    return Signature(
        model=model,
        tokenizer=scorer.tokenizer.hash[:HASH_DIGITS],
        text=text[:HASH_DIGITS],
        documents=documents,
        context=figures.context,
        stride=figures.stride,
        bos=int(bool(scorer.bos)),
        eos=int(scorer.eos is not None),
        dtype=dtype,
        nats=-figures.logprob,
        tokens=figures.tokens,
        bytes=figures.bytes,
    )


def model_hash(folder: Path) -> str:
    """The hash of a model's folder (config.json, all weights, an adapter's base) or GGUF file."""
    digest, config = hashlib.sha256(), folder / "config.json"
    if adapter_base.is_adapter(folder):
        base, config = adapter_base.find_base(folder), folder / adapter_base.ADAPTER_CONFIG
        digest.update(b"" if base == folder else model_hash(base).encode())
    files = [folder] if is_gguf(folder) else sorted((config, *folder.glob("*.safetensors")))
    for file in files:
        digest.update(file.name.encode())
        with user_errors(file, "read"), file.open("rb") as handle:
            while chunk := handle.read(16 * CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:HASH_DIGITS]


class LineTotals:
    """Sums over lines as `lm perplexity --documents line` has them; blank lines do not count."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.figures = Perplexity(context=scorer.context, stride=scorer.stride)
        self._texts = hashlib.sha256()

    def add(self, text: str, score: Score) -> None:
        """Counts one more line."""
        data = text.encode("utf-8")
        if data.strip():
            self.figures.add(np.array([-(score.logprob or 0.0), score.tokens, score.bytes, 0, 0]))
            self._texts.update(hashlib.sha256(data).digest())

    def signature(self, folder: Path, dtype: str) -> Signature:
        """The signature of all lines so far, scored by the model of a folder in a precision."""
        model, text = model_hash(folder), self._texts.hexdigest()
        return sign(self.figures, self.scorer, model, text, "line", dtype)
