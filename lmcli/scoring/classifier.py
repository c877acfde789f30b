"""Texts → labels of each text or each of its tokens, with logits and probabilities."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmcli.data.batches import truncate_pair
from lmcli.data.length_batching import map_by_length, tokens_per_forward
from lmcli.errors import UsageError
from lmcli.model import finite
from lmcli.model.cached_forward import padded_logits
from lmcli.model.transformer import Transformer
from lmcli.terminal.notebook import NotebookTable
from lmcli.text.tokenizer import Tokenizer


@dataclass
class LabelPrediction:
    """The `labels` that apply (one, or all above the threshold), with logits and probabilities."""

    labels: list[str] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict, repr=False)
    logits: list[float] = field(default_factory=list, repr=False)

    @property
    def label(self) -> str | None:
        """The likeliest label that applies; None if none does or the text is empty."""
        return self.labels[0] if self.labels else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`."""
        return self.probabilities[self.labels[0]] if self.labels else None

    @property
    def problem(self) -> str:
        """What is wrong with the prediction; "" if its logits are numbers."""
        return "" if math.isfinite(sum(self.logits)) else finite.LOGIT

    def top(self, count: int) -> list[tuple[str, float]]:
        """The `count` likeliest labels with their probabilities, whether they apply or not."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


@dataclass
class LabeledToken(LabelPrediction):
    """The prediction for a token: bytes `start` to `end` of the text, without surrounding space."""

    piece: str = ""
    start: int = 0
    end: int = 0


@dataclass
class Classification(LabelPrediction, NotebookTable):
    """The prediction for a text, or only for its `pieces`; `truncated` if the text was cut."""

    truncated: bool = False
    pieces: list[LabeledToken] | None = field(default=None, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Its labels and probabilities in one row, or a row for each of its pieces."""
        if self.pieces is None:
            labels = ", ".join(self.labels) or None
            return [{"labels": labels, "probability": self.probability, **self.probabilities}]
        return [
            {
                **{"index": i, "piece": piece.piece, "start": piece.start, "end": piece.end},
                **{"label": piece.label, "probability": piece.probability},
            }
            for i, piece in enumerate(self.pieces)
        ]

    @property
    def problem(self) -> str:
        """What is wrong with the prediction or one of its pieces; "" if nothing is."""
        wrong = super().problem
        return wrong or next((each.problem for each in self.pieces or () if each.problem), "")


@dataclass
class Classifier:
    """A classification model; a label of a multi-label model applies above `threshold`.

    `batch` is tokens per forward pass, 0 for what suits the device.
    """

    model: Transformer
    tokenizer: Tokenizer
    threshold: float = 0.5
    batch: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.batch = tokens_per_forward(self.model.embedding.weight.device.type, self.batch)
        self.per_token = config.head == "token"
        self.labels = list(config.labels)
        for i, label in enumerate(self.labels):
            if label in self.labels[:i]:  # two labels of one name would share a dictionary key
                self.labels[i] = f"{label}_{i}"

    @torch.inference_mode()
    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Classification]:
        """The Classification of each text or pair of texts, cut at the end (the longer first).

        Raises UsageError for pairs if the model labels tokens.
        """
        # tokenize and cut
        pairs = [text if isinstance(text, tuple) else (text, None) for text in texts]
        second_texts = [second for _, second in pairs if second is not None]
        if self.per_token and second_texts:
            raise UsageError("this model labels the tokens of one text, not of a pair")
        encodings = self.tokenizer.encode_with_ends([first for first, _ in pairs])
        seconds = iter(self.tokenizer.encode_batch(second_texts))
        ids = [
            (encoded.ids, None if second is None else next(seconds))
            for encoded, (_, second) in zip(encodings, pairs)
        ]
        cut = [self._cut(*pair_ids) for pair_ids in ids]
        results = [
            Classification(truncated=before != after, pieces=[] if self.per_token else None)
            for before, after in zip(ids, cut)
        ]
        # predict, in batches of similar length
        indices = [i for i, (first, second) in enumerate(cut) if first or second]
        rows = [self.tokenizer.with_template(*cut[i]) for i in indices]
        padding = self.model.config.pad_token_id or 0
        logits = map_by_length(
            [len(row) for row, _ in rows],
            self.batch,
            lambda group: padded_logits(self.model, [rows[g] for g in group], padding),
        )
        for i, row_logits in zip(indices, logits):
            if self.per_token:
                first = len(self.tokenizer.prefix)
                row_logits = row_logits[first : first + len(cut[i][0])]
                results[i].pieces = list(self._pieces(pairs[i][0], encodings[i].ends, row_logits))
            else:
                (prediction,) = self._predictions(row_logits[None])
                results[i].labels, results[i].probabilities, results[i].logits = prediction
        return results

    def _cut(
        self, first: list[int], second: list[int] | None
    ) -> tuple[list[int], list[int] | None]:
        """A text, or both of a pair, cut to the context."""
        special = len(self.tokenizer.with_template([], None if second is None else [])[0])
        room = max(0, self.model.config.max_position_embeddings - special)
        if second is None:
            return first[:room], None
        return truncate_pair(first, second, room)

    def _pieces(self, text: str, ends: list[int], logits: Tensor) -> Iterator[LabeledToken]:
        data = text.encode("utf-8")
        for start, end, prediction in zip([0, *ends[:-1]], ends, self._predictions(logits)):
            piece = data[start:end]
            start += len(piece) - len(piece.lstrip())
            end -= len(piece) - len(piece.rstrip())
            text = data[start:end].decode("utf-8", "backslashreplace")
            yield LabeledToken(*prediction, text, start, max(start, end))

    def _predictions(
        self, logits: Tensor
    ) -> Iterator[tuple[list[str], dict[str, float], list[float]]]:
        """(labels that apply, probabilities, logits) of each row of logits (N, labels)."""
        multi_label = self.model.config.multi_label
        probabilities = logits.double().sigmoid() if multi_label else logits.double().softmax(-1)
        for row, values in zip(logits.tolist(), probabilities.tolist()):
            order = sorted(range(len(values)), key=lambda i: -values[i])
            applies = [i for i in order if values[i] > self.threshold] if multi_label else order[:1]
            yield [self.labels[i] for i in applies], dict(zip(self.labels, values)), row
