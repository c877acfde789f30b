"""Texts → labels: of the whole text, or of each of its tokens, with logits and probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmcli.errors import UsageError
from lmcli.inference.ordering import batch_tokens, in_order, pad
from lmcli.model.transformer import Transformer
from lmcli.text.examples import shortened
from lmcli.text.tokenizer import Tokenizer


@dataclass
class Verdict:
    """What a classifier says. `labels` are those that hold: the likeliest one, or with a multi-label model all above the
    threshold, likeliest first. `logits` are in the order of the model's labels, and so are the `probabilities`."""

    labels: list[str] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    logits: list[float] = field(default_factory=list)

    @property
    def label(self) -> str | None:
        """The likeliest label that holds; None when none does, or when there was nothing to label."""
        return self.labels[0] if self.labels else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`."""
        return self.probabilities[self.labels[0]] if self.labels else None

    def top(self, count: int) -> list[tuple[str, float]]:
        """The `count` likeliest labels with their probabilities, whether they hold or not."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


@dataclass
class LabelledPiece(Verdict):
    """What a token classifier says of one token: bytes `start` to `end` of the text, without space around them."""

    piece: str = ""
    start: int = 0
    end: int = 0


@dataclass
class Classified(Verdict):
    """What a classifier says of one text; `truncated` when the text is longer than the model's context. A token
    classifier says nothing of the text, but something of each of its `pieces`. A text without tokens has no verdict."""

    truncated: bool = False
    pieces: list[LabelledPiece] | None = None


@dataclass
class Classifier:
    """A model with what labelling needs to know. A label of a multi-label model holds when its probability is above
    `threshold`. `batch` is tokens a forward pass, 0 takes what suits the device."""

    model: Transformer
    tokenizer: Tokenizer
    threshold: float = 0.5
    batch: int = 0

    def __post_init__(self) -> None:
        self.device = self.model.embedding.weight.device
        self.batch = batch_tokens(self.device, self.batch)
        config = self.model.config
        self.per_token = config.head == "token"
        self.labels = list(config.labels)
        for i, label in enumerate(self.labels):
            if label in self.labels[:i]:  # two of one name would hide each other
                self.labels[i] = f"{label}_{i}"

    @torch.inference_mode()
    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Classified]:
        """A Classified for each text, or pair of texts, in order; those of like length are worked on together. Too long
        ones are cut at the end, of a pair the longer text first.

        Raises UsageError for pairs when the model labels tokens.
        """
        pairs = [text if isinstance(text, tuple) else (text, None) for text in texts]
        if self.per_token and any(second is not None for _, second in pairs):
            raise UsageError("this model labels the tokens of one text, not of a pair")
        encoded = self.tokenizer.encode_with_ends([first for first, _ in pairs])
        seconds = iter(self.tokenizer.encode_batch([second for _, second in pairs if second is not None]))
        ids = [(item.ids, None if second is None else next(seconds)) for item, (_, second) in zip(encoded, pairs)]
        cut = [self._cut(*both) for both in ids]
        found = [Classified(truncated=before != after, pieces=[] if self.per_token else None)
                 for before, after in zip(ids, cut)]
        jobs = [i for i, (first, second) in enumerate(cut) if first or second]
        rows = [self.tokenizer.with_template(*cut[i]) for i in jobs]
        lengths = [len(row) for row, _ in rows]
        for i, logits in zip(jobs, in_order(lengths, self.batch, lambda group: self._logits([rows[g] for g in group]))):
            if self.per_token:
                lead = len(self.tokenizer.prefix)
                found[i].pieces = list(self._pieces(texts[i], encoded[i].ends, logits[lead:lead + len(cut[i][0])]))
            else:
                (verdict,) = self._verdicts(logits[None])
                found[i].labels, found[i].probabilities, found[i].logits = verdict
        return found

    def _logits(self, rows: list[tuple[list[int], list[int]]]) -> list[Tensor]:
        """The logits of rows of (ids, token types)."""
        ids, real = pad([row for row, _ in rows], self.model.config.pad_token_id or 0, left=False, device=self.device)
        types = pad([types for _, types in rows], 0, left=False, device=self.device)[0]
        has_types = self.model.config.type_vocab_size > 1
        return list(self.model(ids, real, token_type_ids=types if has_types else None).float().cpu())

    def _cut(self, first: list[int], second: list[int] | None) -> tuple[list[int], list[int] | None]:
        """A text, or both of a pair, cut to the context."""
        around = len(self.tokenizer.with_template([], None if second is None else [])[0])
        room = max(0, self.model.config.max_position_embeddings - around)
        if second is None:
            return first[:room], None
        return shortened(first, second, room)

    def _pieces(self, text: str, ends: list[int], logits: Tensor) -> Iterator[LabelledPiece]:
        data = text.encode("utf-8")
        for start, end, verdict in zip([0, *ends[:-1]], ends, self._verdicts(logits)):
            piece = data[start:end]
            start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
            yield LabelledPiece(*verdict, data[start:end].decode("utf-8", "backslashreplace"), start, max(start, end))

    def _verdicts(self, logits: Tensor) -> Iterator[tuple[list[str], dict[str, float], list[float]]]:
        """(labels that hold, probabilities, logits) of each row of logits (N, labels)."""
        several = self.model.config.multi_label
        chances = logits.double().sigmoid() if several else logits.double().softmax(-1)
        for row, chance in zip(logits.tolist(), chances.tolist()):
            likeliest = sorted(range(len(chance)), key=lambda i: -chance[i])
            holding = [i for i in likeliest if chance[i] > self.threshold] if several else likeliest[:1]
            yield [self.labels[i] for i in holding], dict(zip(self.labels, chance)), row
