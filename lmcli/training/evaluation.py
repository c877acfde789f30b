"""Figures of a model on its validation part, for all objectives but the causal one, whose figure is `lm perplexity`'s."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcli.model.likelihood import pieces, target_logprobs
from lmcli.model.transformer import Transformer
from lmcli.text.batches import Batch
from lmcli.training.objectives import Objective, Predictions


@dataclass
class Figures:
    """Sums over validation targets: natural-log probability, their number, how many were the likeliest choice.

    `end`, if not None, is a closing token: it counts in none of them. `bytes` is the text that the targets stand for, 0
    where they stand for none. `entropy` is what is lost, in nats a target, by a model that only counts targets. The best
    figures are told `by` loss or accuracy.
    """

    target: str
    end: int | None = None
    bytes: int = 0
    entropy: float = 0.0
    by: str = "loss"
    logprob: float = 0.0
    targets: int = 0
    correct: int = 0

    @property
    def criterion(self) -> float:
        """What tells the best model of a run, the lower the better: nats per target, or the share of wrong ones."""
        return self.loss if self.by == "loss" else 1.0 - self.accuracy

    @property
    def loss(self) -> float:
        """Nats per target."""
        return -self.logprob / max(1, self.targets)

    @property
    def accuracy(self) -> float:
        """Share of targets that were the likeliest choice."""
        return self.correct / max(1, self.targets)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the targets' text, where they are one."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else None

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl and recipe.yaml."""
        found = {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_targets": self.targets,
                 "val_unigram_entropy": self.entropy}
        return found | ({"val_bits_per_byte": self.bits_per_byte, "val_bytes": self.bytes} if self.bytes else {})

    facts = metrics

    def headline(self) -> str:
        """The figures on one line."""
        bits = f" · {self.bits_per_byte:.4f} bits/byte" if self.bytes else ""
        return (f"{self.loss:.4f} nats/{self.target}{bits} · {self.accuracy:.1%} right "
                f"(counting alone: {self.entropy:.3f} nats)")


@torch.inference_mode()
def evaluate(objective: Objective, model: Transformer, batches: Iterable[Batch], figures: Figures) -> Figures:
    """`figures`, which may bring what does not hang on the model, with the sums over these batches. The model is in
    evaluation mode."""
    for batch in batches:
        add(figures, objective.predict(model, batch))
    return figures


def add(figures: Figures, predicted: Predictions) -> None:
    """Adds what was predicted for one batch."""
    logprobs, right = target_logprobs(*predicted), _right(predicted)
    counted = torch.ones_like(right) if figures.end is None else predicted.targets != figures.end
    figures.logprob += float(logprobs[counted].cpu().double().sum())  # Apple's GPUs have no float64
    figures.targets += int(counted.sum())
    figures.correct += int(right[counted].sum())


def _right(predicted: Predictions) -> Tensor:
    """(N,) bool: whether the target was the likeliest choice; of several labels, whether each was held for what it is."""
    hidden, head, targets = predicted
    if targets.is_floating_point():
        return ((head(hidden) > 0) == (targets > 0)).all(-1)
    return torch.cat([head(rows).argmax(-1) == wanted for rows, wanted in pieces(head, hidden, targets)])
