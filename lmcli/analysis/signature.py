"""One line that says what a figure was made of, so that it can be had again: `lm perplexity --verify`."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from lmcli import __version__
from lmcli.checkpoints import adapter_base
from lmcli.errors import UsageError
from lmcli.inference.perplexity import Perplexity
from lmcli.inference.scoring import Score, Scorer
from lmcli.storage import user_errors
from lmcli.text.records import CHUNK_BYTES

DIGITS = 12  # of each hash
TOLERANCE = 1e-5  # of the nats: what other threads, batches and processors change


@dataclass(frozen=True)
class Signature:
    """What was measured, how, and what came out. Hashes are the first 12 digits of a SHA-256: of config.json and all
    weights, of the tokenizer's definition, of the documents."""

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
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return "|".join(("lm-perplexity", *(f"{name}:{value:.6f}" if name == "nats" else f"{name}:{value}"
                                            for name, value in values)))

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """Back from its line. Raises UsageError for what is none."""
        head, *parts = text.strip().split("|")
        try:
            values = dict(part.split(":", 1) for part in parts)
            kinds = {f.name: f.type for f in fields(cls)}
            if head != "lm-perplexity" or values.keys() != kinds.keys():
                raise ValueError
            return cls(**{name: kinds[name](value) for name, value in values.items()})
        except ValueError:
            raise UsageError(f"{text[:60]!r} is no signature of lm perplexity", where="--verify",
                             hint="it begins with lm-perplexity|model:, in the last column of a row") from None

    def differences(self, other: "Signature") -> list[str]:
        """What of another signature is not as here, in words; figures within the tolerance count as the same."""
        found = []
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            same = abs(mine - theirs) <= TOLERANCE * max(1.0, abs(mine)) if name == "nats" else mine == theirs
            if not same and name != "version":
                found.append(f"{name} is {theirs}, not {mine}")
        return found


def of_model(folder: Path) -> str:
    """The hash of a model folder: config.json and its files of weights; of an adapter's, its own and its base's."""
    digest, config = hashlib.sha256(), folder / "config.json"
    if adapter_base.is_adapter(folder):
        base, config = adapter_base.find(folder), folder / adapter_base.CONFIG
        digest.update(b"" if base == folder else of_model(base).encode())
    for file in sorted((config, *folder.glob("*.safetensors"))):
        digest.update(file.name.encode())
        with user_errors(file, "read"), file.open("rb") as handle:
            while chunk := handle.read(16 * CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:DIGITS]


@dataclass
class Tally:
    """The sums of lines as `lm perplexity --documents line` has them; what is blank is no document there."""

    scorer: Scorer

    def __post_init__(self) -> None:
        self.figures = Perplexity(context=self.scorer.context, stride=self.scorer.stride)
        self._texts = hashlib.sha256()

    def add(self, text: str, score: Score) -> None:
        """Counts one more line."""
        data = text.encode("utf-8")
        if data.strip():
            self.figures.add(np.array([-(score.logprob or 0.0), score.tokens, score.bytes, 0, 0]))
            self._texts.update(hashlib.sha256(data).digest())

    def signed(self, folder: Path, dtype: str) -> Signature:
        """The signature of all lines so far, by the model of a folder in a precision."""
        return signed(self.figures, of_model(folder), self.scorer.tokenizer.hash, self._texts.hexdigest(), "line",
                      bool(self.scorer.beginning), self.scorer.end is not None, dtype)


def signed(figures: Perplexity, model: str, tokenizer: str, text: str, documents: str, bos: bool, eos: bool,
           dtype: str) -> Signature:
    """The signature of figures, given the hashes and how documents were told apart and begun and ended."""
    return Signature(model, tokenizer[:DIGITS], text[:DIGITS], documents, figures.context, figures.stride, int(bos),
                     int(eos), dtype, -figures.logprob, figures.tokens, figures.bytes)
